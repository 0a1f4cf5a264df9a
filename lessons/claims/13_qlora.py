"""13 · `QLoRALinear`

The claims for this lesson: what a 4-bit base takes, what is cast, and who wrote it.
"""

import warnings

from minilora.classroom.claims import (
    EXPLAINER,
    FAMILY,
    REVOLUTION,
    STICKY_NOTE,
    Claim,
    Finding,
    Unsettled,
)
from minilora.llm.architectures import ARCHITECTURES, Architecture
from minilora.llm.setup import Setup
from minilora.llm.sizes import weight_bytes
from minilora.llm.training_memory import training_bytes

LLAMA_65B = Architecture("llama", 80, 8192, 22016, 64, 64, 128, 32000)
LARGEST_CONSUMER_GIB = 32  # GeForce RTX 5090
SMALLEST = Setup(method="qlora", r=16, optimizer="adamw-8bit", batch=1, seq=512, checkpointing=True)


def in_4_bits(arch: Architecture) -> float:
    """GB of a base in NF4, embeddings and head in 16 bits."""
    return weight_bytes(arch, "bf16", in_4_bits=True) / 1e9


def base_of_35() -> Finding:
    """The 70B models in 4 bits."""
    gb = {name: in_4_bits(ARCHITECTURES[name.lower()]) for name in ("Llama-2-70B", "Llama-3-70B")}
    return Finding(
        cases={f"it is {name}": abs(size / 35 - 1) < 0.05 for name, size in gb.items()},
        found="linear weights at 4.127 bits, embeddings and head in 16: "
        f"{', '.join(f'{v:.1f} GB' for v in gb.values())}",
    )


def train_in_24() -> Finding:
    """The weights alone, beside 24 GB."""
    gb = {name: in_4_bits(ARCHITECTURES[name.lower()]) for name in ("Llama-2-70B", "Llama-3-70B")}
    return Finding(
        cases={name: size < 24 for name, size in gb.items()},
        found=f"the weights alone are {' and '.join(f'{v:.1f} GB' for v in gb.values())}; checkpointing makes no "
        "weight "
        "smaller",
    )


def on_48(name: str, arch: Architecture) -> Finding:
    """The smallest usual training of a model, beside 48 GiB."""
    used = training_bytes(arch, SMALLEST)
    return Finding(
        cases=used.total <= 48 * 2**30,
        found=f"{name}, r = 16 on all linear layers, one row of 512 tokens, checkpointing, 8-bit Adam: "
        f"{used.total / 1e9:.1f} GB, of which {used.weights / 1e9:.1f} are weights (activations estimated)",
    )


def on_consumer() -> Finding:
    """The weights of LLaMA-65B beside the largest consumer card."""
    n_bytes = weight_bytes(LLAMA_65B, "bf16", in_4_bits=True)
    return Finding(
        cases=n_bytes < LARGEST_CONSUMER_GIB * 2**30,
        found=f"its weights alone are {n_bytes / 2**30:.1f} GiB in 4 bits, a GeForce RTX 5090 has "
        f"{LARGEST_CONSUMER_GIB}; the QLoRA paper (arXiv 2305.14314) says one GPU of 48 GB",
    )


def tiny_llama(dtype):
    """transformers' Llama of 16 features."""
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=16, num_key_value_heads=2, **sizes)
    return transformers.LlamaForCausalLM(config).to(dtype)


def kbit_preparation() -> Finding:
    """What it casts of a bfloat16 model, whose linear weights would be 4-bit ones and stay."""
    import peft
    import torch

    model = peft.prepare_model_for_kbit_training(tiny_llama(torch.bfloat16), use_gradient_checkpointing=False)
    cast = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    norms = {name for name in cast if "norm" in name}
    ends = {name for name in cast if "embed_tokens" in name or "lm_head" in name}
    llama = ARCHITECTURES["llama-3-8b"]
    n = 2 * llama.vocab * llama.hidden
    return Finding(
        cases={"the norms among others are meant": bool(norms), "the norms alone are meant": not ends},
        found=f"PEFT {peft.__version__} casts everything that is not 4-bit, embeddings and head too: of Llama-3-8B "
        f"{n:,} parameters, {2 * n / 1e9:.1f} GB more than in bfloat16",
    )


def adapters_in_16_bits() -> Finding:
    """The dtype of A and B over a bfloat16 base, in PEFT as called and with its option."""
    import peft
    import torch

    kinds = {}
    for name, autocast in {
        "PEFT is called with autocast_adapter_dtype=False": False,
        "PEFT is called without it": True,
    }.items():
        config = peft.LoraConfig(r=2, target_modules=["q_proj"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model = peft.get_peft_model(tiny_llama(torch.bfloat16), config, autocast_adapter_dtype=autocast)
        kinds[name] = {p.dtype for p in model.parameters() if p.requires_grad}
    return Finding(
        cases={name: dtypes == {torch.bfloat16} for name, dtypes in kinds.items()},
        found=f"PEFT {peft.__version__} makes A and B float32 over a bfloat16 base unless told otherwise; so do we",
    )


def within_two_points() -> Finding:
    """Table 4 of the paper; what is said is 1 to 2 points."""
    mmlu = {"BF16": 53.0, "FP4": 52.2, "NF4 with double quantization": 53.1}
    lost = mmlu["BF16"] - mmlu["NF4 with double quantization"]
    return Finding(
        cases=lost <= 2,
        found="by the QLoRA paper's Table 4 the mean of MMLU over LLaMA 7B to 65B is "
        + ", ".join(f"{value} ({name})" for name, value in mmlu.items()),
    )


def authors() -> Finding:
    """The authors of arXiv 2305.14314."""
    paper = ("Tim Dettmers", "Artidoro Pagnoni", "Ari Holtzman", "Luke Zettlemoyer")
    return Finding(
        cases="Ashish Sharma" in paper,
        found=f"by arXiv 2305.14314 they are {', '.join(paper)}; the article's own list of references has it right",
    )


def flash_by_default() -> Finding:
    """What a model of transformers chooses when nothing is said."""
    import torch
    import transformers

    chosen = tiny_llama(torch.float32).config._attn_implementation
    return Finding(
        cases=chosen == "flash_attention_2",
        found=f"transformers {transformers.__version__} chooses {chosen!r}: torch's scaled_dot_product_attention, "
        "which "
        "picks a kernel itself",
    )


CLAIMS = [
    Claim(
        id="13.base-of-35-gb",
        fact="In 4 bits a 70B base takes about 35 GB.",
        source=STICKY_NOTE,
        settle=base_of_35,
        verdict="holds when",
    ),
    Claim(
        id="13.70b-in-24-gb",
        fact="With gradient checkpointing QLoRA trains a 70B model in about 24 GB.",
        source=f"{FAMILY}, its table for 70B",
        settle=train_in_24,
        verdict="does not hold",
    ),
    Claim(
        id="13.65b-on-48-gb",
        fact="QLoRA trains a 65B model on one GPU of 48 GB.",
        source=f"{EXPLAINER}, “QLoRA: LoRA on a Quantized Model”",
        settle=lambda: on_48("LLaMA-65B", LLAMA_65B),
        verdict="holds",
    ),
    Claim(
        id="13.70b-on-48-gb",
        fact="QLoRA trains Llama-70B on one GPU of 48 GB.",
        source=STICKY_NOTE,
        settle=lambda: on_48("Llama-2-70B", ARCHITECTURES["llama-2-70b"]),
        verdict="holds",
    ),
    Claim(
        id="13.consumer-gpu",
        fact="QLoRA trains a 65B model on one consumer GPU.",
        source=f"{EXPLAINER}, “Key Takeaways”",
        settle=on_consumer,
        verdict="does not hold",
    ),
    Claim(
        id="13.kbit-preparation",
        fact="prepare_model_for_kbit_training() casts the layer norms to float32.",
        source=f"{FAMILY}, its QLoRA pipeline",
        settle=kbit_preparation,
        verdict="holds when",
    ),
    Claim(
        id="13.adapters-in-16-bits",
        fact="The adapters are trained in 16 bits.",
        source=f"{EXPLAINER}, “QLoRA: LoRA on a Quantized Model”",
        settle=adapters_in_16_bits,
        verdict="holds when",
    ),
    Claim(
        id="13.within-two-points",
        fact="4-bit training stays within 1 to 2 points of 16 bits.",
        source=f"{FAMILY}, on QLoRA",
        settle=within_two_points,
        verdict="holds",
    ),
    Claim(
        id="13.authors",
        fact="Ashish Sharma is one of QLoRA's authors.",
        source=f"{REVOLUTION}, “QLoRA: Pushing Efficiency Further”",
        settle=authors,
        verdict="does not hold",
    ),
    Claim(
        id="13.flash-by-default",
        fact="Most ways to load a model now default to FlashAttention 2.",
        source=f"{FAMILY}, on Flash Attention",
        settle=flash_by_default,
        verdict="does not hold",
    ),
]
UNSETTLED = [
    Unsettled(
        id="13.7b-in-8-gb",
        fact="QLoRA trains Llama-2-7B on one GPU of 8 GB.",
        source=f"{REVOLUTION}, “The Combined Effect”",
        needs="its own run (4 × 512 tokens, r = 16 on all linear layers, checkpointing, paged 8-bit Adam) on "
        "such a card. "
        "The weights are 3.9 GB, 4.4 with embeddings and head in float32",
    ),
    Unsettled(
        id="13.nan-without-preparation",
        fact="Without prepare_model_for_kbit_training() the loss may become NaN.",
        source=f"{FAMILY}, its QLoRA pipeline",
        needs="a training of some hundred steps with it and without it, in bfloat16 and in float16, on a GPU",
    ),
]
