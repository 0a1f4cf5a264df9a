"""11 · Many adapters, one base: serving

The claims for this lesson: what an adapter costs where it is not merged, and what becomes of several on one base.
"""

import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from minilora.classroom.claims import FAMILY, MATHEMATICS, REVOLUTION, STICKY_NOTE, Claim, Finding, Unsettled
from minilora.llm.architectures import ARCHITECTURES
from minilora.llm.sizes import linear_weights, lora_params


def products(r: int) -> int:
    """Multiplications for one row through a 512 × 512 weight with A and B beside it, counted by torch as it runs."""
    x, W, A, B = torch.ones(1, 512), torch.ones(512, 512), torch.ones(r, 512), torch.ones(512, r)
    with FlopCounterMode(display=False) as counter:
        x @ W.T + (x @ A.T) @ B.T
    return counter.get_total_flops() // 2  # a multiplication and an addition count as two


def linear_in_rank() -> Finding:
    """What each rank adds to the layer's own 512 · 512."""
    added = {r: products(r) - 512 * 512 for r in (8, 16, 256)}
    llama = ARCHITECTURES["llama-3-8b"]
    shares = {r: lora_params(llama, r) / linear_weights(llama) for r in (8, 32, 256)}
    return Finding(
        cases=all(n == r * (512 + 512) for r, n in added.items()),
        found="r · (in + out) multiplications a row: on all linear layers of Llama-3-8B "
        + ", ".join(f"{share:.1%} more at r = {r}" for r, share in shares.items())
        + ". How much later an answer comes is another question, below",
    )


def s_lora() -> Finding:
    """Requests a second of S-LoRA, 7B on an A100 of 80 GB."""
    per_second = {5: 8.05, 100: 7.99, 1000: 7.64, 2000: 7.61}
    lost = 1 - per_second[2000] / per_second[5]
    return Finding(
        cases=lost < 0.1,
        found=f"by the S-LoRA paper's Table 3 (arXiv 2311.03285) {per_second[5]} requests a second with 5 adapters and "
        f"{per_second[2000]} with 2,000: {lost:.1%} fewer; the table has no base model alone",
    )


VLLM = {"max_loras": "slots on the GPU", "max_cpu_loras": "adapters in the CPU's memory"}  # 0.11.0, as read in 2026


def max_loras() -> Finding:
    """What vLLM's setting bounds."""
    return Finding(
        cases=VLLM["max_loras"] == "slots on the GPU",
        found="by vLLM's config/lora.py and lora/model_manager.py (0.11.0) it is the number of slots on the GPU, and "
        "so of adapters in one batch; the default is 1. Many more can be registered: max_cpu_loras bounds "
        "those in memory",
    )


def three_models() -> Finding:
    """Three adapters with B = 1, 2 and 3, loaded one after another onto one base; which one each model runs."""
    import peft

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for n in (1, 2, 3):
            config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
            saved = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
            saved.base_model.model[0].lora_B.default.weight.fill_(n)
            saved.save_pretrained(str(Path(folder) / str(n)))
        base = nn.Sequential(nn.Linear(8, 8))
        models = [peft.PeftModel.from_pretrained(base, str(Path(folder) / str(n))) for n in (1, 2, 3)]
        x = torch.randn(4, 8)
        outputs = [model(x) for model in models]
    differ = [not torch.equal(outputs[a], outputs[b]) for a, b in ((0, 1), (1, 2), (0, 2))]
    assert any(differ) == all(differ)
    return Finding(
        cases=all(differ),
        found=f"in PEFT {peft.__version__} all three give the third's answers: each loads into the base object itself, "
        "under the same name; load_adapter(…, adapter_name=…) and set_adapter keep them apart",
    )


def rank_search() -> Finding:
    """Its loop over ranks, on one base; for training, B is filled with ones."""
    import peft

    base = nn.Sequential(nn.Linear(8, 8))
    x, adapted_at_start, trained = torch.ones(1, 8), {}, {}
    with warnings.catch_warnings(record=True) as said, torch.no_grad():
        warnings.simplefilter("always")
        alone = base(x)
        for r in (4, 8):
            config = peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=["0"])
            model = peft.get_peft_model(base, config)
            adapted_at_start[r] = not torch.allclose(model(x), alone)
            trained[r] = sum(p.numel() for p in model.parameters() if p.requires_grad)
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.fill_(1.0)
    assert said  # the second call warns
    return Finding(
        cases=not any(adapted_at_start.values()) and trained == {4: 64, 8: 128},
        found=f"in PEFT {peft.__version__} the second adapter takes the place of the first, of the same name; "
        f"get_peft_model warns (trained: {trained[4]}, then {trained[8]} parameters of an 8 × 8 layer)",
    )


CLAIMS = [
    Claim(
        id="11.linear-in-rank",
        fact="The adapter's extra work is linear in its rank.",
        source=f"{FAMILY}, on serving",
        settle=linear_in_rank,
        verdict="holds",
    ),
    Claim(
        id="11.s-lora",
        fact="S-LoRA serves 2,000 adapters on one GPU with minimal loss of throughput.",
        source=f"{FAMILY}, on serving",
        settle=s_lora,
        verdict="holds",
    ),
    Claim(
        id="11.max-loras",
        fact="vLLM's max_loras is the number of adapters that lie on the GPU at once.",
        source=f"{FAMILY}, on serving",
        settle=max_loras,
        verdict="holds",
    ),
    Claim(
        id="11.three-models",
        fact="Three times PeftModel.from_pretrained(base_model, …) gives three specialised models on one base.",
        source=f"{MATHEMATICS}, “Adapter Saving and Loading”",
        settle=three_models,
        verdict="does not hold",
    ),
    Claim(
        id="11.rank-search",
        fact="get_peft_model(base_model, …) in a loop over ranks starts each rank from the base model.",
        source=f"{MATHEMATICS}, “Rank Selection - How to Choose r”",
        settle=rank_search,
        verdict="holds",
    ),
]
UNSETTLED = [
    Unsettled(
        id="11.two-to-five-percent",
        fact="An adapter that is not merged costs 2 to 5 % of the latency, for r from 8 to 32.",
        source=f"{FAMILY}, on serving",
        needs="times of one row and of many, merged and not, on a GPU, where the two small products are launches "
        "of their "
        "own. Of multiplications there are 0.3 to 1.3 % more (11.linear-in-rank)",
    ),
    Unsettled(
        id="11.one-and-a-half-times",
        fact="An adapter that is not merged costs 1.2 to 1.5 times the latency.",
        source=f"{STICKY_NOTE}, its pitfalls",
        needs="the same; it contradicts the claim above. On two CPU cores 16 rows with 16 different adapters "
        "read their "
        "prompts in 1.16 of the plain base's time (README; `python benchmarks/serving.py --only batch`)",
    ),
    Unsettled(
        id="11.swap",
        fact="Swapping an adapter takes 10 to 50 ms.",
        source=f"{FAMILY}, on serving",
        needs="times of loading an adapter from a disk and from memory onto a GPU, by its rank",
    ),
    Unsettled(
        id="11.milliseconds",
        fact="Loading another adapter takes milliseconds.",
        source=f"{REVOLUTION}, “Multiple Adapters, One Base Model”",
        needs="the same",
    ),
]
