"""16 · Forgetting, combining, shipping

The claims for this lesson: adapters added up, and models in GGUF.
"""

import inspect
import typing

import gguf
import torch
from torch import nn

from minilora.classroom.claims import FAMILY, Claim, Finding, Unsettled
from minilora.llm.architectures import ARCHITECTURES, Architecture, parameter_shapes
from minilora.llm.sizes import base_params, count
from minilora.torch_lora.ties_dare import dare, ties
from minilora.torch_lora.updates import Update

USUAL = {"Q2_K": "Q2_K", "Q4_K_M": "Q4_K", "Q5_K_M": "Q5_K", "Q6_K": "Q6_K", "Q8_0": "Q8_0"}


def block_bits(kind: str) -> float:
    """Bits a weight of a block, from the gguf library's table of block sizes."""
    weights, n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return 8 * n_bytes / weights


def tensor_kind(file: str, name: str, layer: int, arch: Architecture) -> str:
    """What llama-quantize makes of a matrix: llama_tensor_get_type in llama.cpp's src/llama-quant.cpp (at 8784689)."""
    usual, n = USUAL[file], arch.n_layers
    if name == "lm_head":
        return "Q8_0" if file == "Q8_0" else "Q6_K"
    more = layer < n // 8 or layer >= 7 * n // 8 or (layer - n // 8) % 3 == 2
    if file == "Q2_K" and name in ("v_proj", "o_proj", "down_proj"):
        return "Q4_K" if name == "v_proj" and arch.n_heads >= 4 * arch.n_kv_heads else "Q3_K"
    if file in ("Q4_K_M", "Q5_K_M") and name in ("v_proj", "down_proj") and more:
        return "Q6_K"
    is_70b = arch.n_layers == 80
    return "Q5_K" if name == "v_proj" and usual == "Q4_K" and is_70b else usual


def gguf_bytes(file: str, arch: Architecture) -> float:
    """The tensors of a GGUF file: matrices by their kind, norms in fp32."""
    n_bytes = 0.0
    for name, shape in parameter_shapes(arch).items():
        parts = name.split(".")
        layer = int(parts[2]) if parts[1] == "layers" else 0
        bits = 32.0 if len(shape) == 1 else block_bits(tensor_kind(file, parts[-2], layer, arch))
        n_bytes += count([shape]) * bits / 8
    return n_bytes


def bits_a_weight() -> Finding:
    """Llama-2-7B's file in each kind, over its weights."""
    arch = ARCHITECTURES["llama-2-7b"]
    said = {"Q2_K": 2.5, "Q4_K_M": 4.5, "Q5_K_M": 5.5, "Q6_K": 6.5, "Q8_0": 8.0}
    bits = {kind: 8 * gguf_bytes(kind, arch) / base_params(arch) for kind in said}
    return Finding(
        cases={f"it is {kind}": abs(bits[kind] - figure) <= 0.1 for kind, figure in said.items()},
        found="Llama-2-7B, from the block layouts (gguf library) and llama.cpp's choice of kind for each tensor "
        f"(src/llama-quant.cpp): {', '.join(f'{kind} {value:.2f}' for kind, value in bits.items())}",
    )


def sizes_of_7b() -> Finding:
    """The same files in GB."""
    said = {"Q2_K": 2.5, "Q4_K_M": 4.5, "Q5_K_M": 5.5, "Q6_K": 6.5, "Q8_0": 8.0}
    gb = {kind: gguf_bytes(kind, ARCHITECTURES["llama-2-7b"]) / 1e9 for kind in said}
    return Finding(
        cases={f"it is {kind}": abs(gb[kind] / figure - 1) < 0.05 for kind, figure in said.items()},
        found=f"{', '.join(f'{kind} {value:.2f}' for kind, value in gb.items())} GB for Llama-2-7B. Its column "
        "repeats the "
        "bits: that would be a model of 8 · 10⁹ weights",
    )


def size_of_70b() -> Finding:
    """Llama-2-70B in Q4_K_M."""
    gb = gguf_bytes("Q4_K_M", ARCHITECTURES["llama-2-70b"]) / 1e9
    return Finding(cases=abs(gb / 40 - 1) < 0.05, found=f"Llama-2-70B in Q4_K_M: {gb:.1f} GB")


def by_hand_or_mergekit() -> Finding:
    """The kinds of combination that PEFT offers."""
    import peft

    method = peft.LoraModel.add_weighted_adapter
    kinds = typing.get_args(typing.get_type_hints(method)["combination_type"])
    assert "weights" in inspect.signature(method).parameters
    return Finding(
        cases="linear" not in kinds,
        found=f"PEFT {peft.__version__}: add_weighted_adapter(combination_type=…) offers {', '.join(kinds)}",
    )


def linear_combination() -> Finding:
    """½ ΔW₁ + ½ ΔW₂, beside what PEFT makes of two adapters."""
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config, adapter_name="one")
    model.add_adapter("two", config)
    layer, away = model.base_model.model[0], {}
    with torch.no_grad():
        wanted = 0.5 * layer.get_delta_weight("one") + 0.5 * layer.get_delta_weight("two")
        for kind in ("cat", "linear"):
            model.add_weighted_adapter(["one", "two"], [0.5, 0.5], adapter_name=kind, combination_type=kind)
            away[kind] = ((layer.get_delta_weight(kind) - wanted).norm() / wanted.norm()).item()
    return Finding(
        cases={f"PEFT's combination_type is {kind}": error < 1e-6 for kind, error in away.items()},
        found=f"PEFT {peft.__version__}: linear adds up A and B apart, so B₁A₂ and B₂A₁ come in: {away['linear']:.0%} "
        "of the sum away; cat is exact, with the ranks added",
    )


def dare_authors() -> Finding:
    """First authors of the two papers."""
    first = {"TIES (arXiv 2306.01708)": "Yadav", "DARE (arXiv 2311.03099)": "Yu"}
    return Finding(
        cases={f"{name} is meant": author in ("Zhang", "Yadav") for name, author in first.items()},
        found="by the papers, " + ", ".join(f"{name} is {author} et al.'s" for name, author in first.items()),
    )


def prunes_small_updates() -> Finding:
    """One update through TIES and DARE at density ½: are all entries that fell out smaller than all that stayed?"""
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(8, 8, generator=generator), torch.randn(8, 8, generator=generator)
    sizes, cases = (B @ A).abs(), {}
    for name, combine in {"TIES": ties, "DARE": dare}.items():
        (update,) = combine([{"layer": Update(A, B)}], [1.0], r=8, density=0.5).updates.values()
        out = (update.B @ update.A).abs() < 1e-4
        cases[f"it is {name}"] = bool(sizes[out].max() < sizes[~out].min())
    return Finding(
        cases=cases,
        found="TIES drops the smallest entries; DARE drops entries at random, whatever their size, and rescales "
        "the rest",
    )


CLAIMS = [
    Claim(
        id="16.bits-a-weight",
        fact="GGUF takes 2.5 bits a weight as Q2_K, 4.5 as Q4_K_M, 5.5 as Q5_K_M, 6.5 as Q6_K and 8.0 as Q8_0.",
        source=f"{FAMILY}, its table of GGUF",
        settle=bits_a_weight,
        verdict="holds when",
    ),
    Claim(
        id="16.sizes-of-7b",
        fact="A 7B model is 2.5, 4.5, 5.5, 6.5 and 8.0 GB in these.",
        source=f"{FAMILY}, its table of GGUF",
        settle=sizes_of_7b,
        verdict="holds when",
    ),
    Claim(
        id="16.size-of-70b",
        fact="A 70B model in Q4_K_M is about 40 GB.",
        source=f"{FAMILY}, on GGUF",
        settle=size_of_70b,
        verdict="holds",
    ),
    Claim(
        id="16.by-hand-or-mergekit",
        fact="To combine adapters by weighted averaging takes an implementation by hand, or mergekit.",
        source=f"{FAMILY}, on combining adapters",
        settle=by_hand_or_mergekit,
        verdict="does not hold",
    ),
    Claim(
        id="16.linear-combination",
        fact="Adapters can be linearly combined: α₁ ΔW₁ + α₂ ΔW₂.",
        source=f"{FAMILY}, on combining adapters",
        settle=linear_combination,
        verdict="holds when",
    ),
    Claim(
        id="16.dare-authors",
        fact="TIES and DARE are by Zhang et al. and Yadav et al.",
        source=f"{FAMILY}, on combining adapters",
        settle=dare_authors,
        verdict="holds when",
    ),
    Claim(
        id="16.prunes-small-updates",
        fact="TIES and DARE prune the updates of small magnitude.",
        source=f"{FAMILY}, on combining adapters",
        settle=prunes_small_updates,
        verdict="holds when",
    ),
]
UNSETTLED = [
    Unsettled(
        id="16.merge-then-quantize",
        fact="A model that is merged and then quantized answers better than a quantized base with the adapter "
        "beside it.",
        source=f"{FAMILY}, a note on GGUF",
        needs="one adapter, two GGUF files, the same held-out set: `minilora export` merged in Q4_0 and the "
        "adapter alone "
        "over the base in Q4_0. Of weights alone: 09.merge-then-quantize",
    ),
]
