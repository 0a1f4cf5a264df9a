"""10 · Save, load, share

The claims for this lesson: what an adapter weighs on disk, beside what a model weighs.
"""

from minilora.classroom.claims import EXPLAINER, FAMILY, MATHEMATICS, REVOLUTION, STICKY_NOTE, Claim, Finding
from minilora.llm.architectures import ARCHITECTURES
from minilora.llm.sizes import Targets, adapter_bytes, base_params, lora_params, weight_bytes

QV = ("q_proj", "v_proj")
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")


def megabytes(model: str, r: int, targets: Targets) -> dict[str, float]:
    """An adapter's tensors in MB, by their dtype."""
    return {dtype: adapter_bytes(ARCHITECTURES[model], r, targets, dtype) / 1e6 for dtype in ("fp32", "bf16")}


def about(said: float, mb: dict[str, float]) -> dict[str, bool]:
    """In which dtypes a size is within a tenth of what is said."""
    return {dtype: abs(size / said - 1) < 0.1 for dtype, size in mb.items()}


def weighs(said: float, model: str, r: int, targets: Targets) -> Finding:
    """An adapter's size in either dtype, beside what is said."""
    mb, n = megabytes(model, r, targets), lora_params(ARCHITECTURES[model], r, targets)
    return Finding(
        cases=about(said, mb),
        found=f"{n:,} parameters: {n:,} · 4 B = {mb['fp32']:.1f} MB in fp32 (as PEFT saves), {mb['bf16']:.1f} MB "
        "in bf16",
    )


def from_10_to_100() -> Finding:
    """Four adapters of Llama-2-7B, in fp32."""
    mb = {
        "r = 8 on q and v": megabytes("llama-2-7b", 8, QV)["fp32"],
        "r = 16 on q k v o": megabytes("llama-2-7b", 16, QKVO)["fp32"],
        "r = 16 on all linear layers": megabytes("llama-2-7b", 16, "all-linear")["fp32"],
        "r = 64 on all linear layers": megabytes("llama-2-7b", 64, "all-linear")["fp32"],
    }
    return Finding(
        cases={name: 10 <= size <= 100 for name, size in mb.items()},
        found="Llama-2-7B in fp32: " + ", ".join(f"{size:.0f} MB ({name})" for name, size in mb.items()),
    )


def a_few_mb() -> Finding:
    """The smallest usual adapter and the one that the article recommends."""
    mb = {
        "r = 4 on q and v in bf16": megabytes("llama-2-7b", 4, QV)["bf16"],
        "r = 16 on all linear layers (as it recommends)": megabytes("llama-2-7b", 16, "all-linear")["bf16"],
    }
    return Finding(
        cases={name: size < 10 for name, size in mb.items()},
        found="Llama-2-7B in bf16: " + ", ".join(f"{size:.1f} MB" for size in mb.values()),
    )


def model_file() -> Finding:
    """Llama-3-8B in bf16, in two units."""
    n_bytes = weight_bytes(ARCHITECTURES["llama-3-8b"], "bf16")
    sizes = {"GB of 10⁹ bytes": n_bytes / 1e9, "GiB of 2³⁰ bytes": n_bytes / 2**30}
    n = base_params(ARCHITECTURES["llama-3-8b"])
    return Finding(
        cases={f"counted in {unit}": round(size) == 15 for unit, size in sizes.items()},
        found=f"{n:,} · 2 B = {n_bytes / 1e9:.2f} GB = {n_bytes / 2**30:.2f} GiB",
    )


def five_variants() -> Finding:
    """Llama-2-70B in 16 bits, five times."""
    gb = weight_bytes(ARCHITECTURES["llama-2-70b"], "fp16") / 1e9
    return Finding(
        cases=abs(gb / 140 - 1) < 0.05 and abs(5 * gb / 700 - 1) < 0.05,
        found=f"Llama-2-70B: {base_params(ARCHITECTURES['llama-2-70b']):,} · 2 B = {gb:.0f} GB, five of them "
        f"{5 * gb:.0f}",
    )


def only_A_and_B() -> Finding:
    """The names that PEFT would write, with and without modules_to_save."""
    import peft
    from torch import nn

    saved = {}
    for name, more in {"without modules_to_save": None, "with modules_to_save": ["head"]}.items():
        model = nn.Sequential()
        model.add_module("q_proj", nn.Linear(8, 8))
        model.add_module("head", nn.Linear(8, 4))
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=more)
        saved[name] = list(peft.get_peft_model_state_dict(peft.get_peft_model(model, config)))
    return Finding(
        cases={name: all("lora_A" in key or "lora_B" in key for key in keys) for name, keys in saved.items()},
        found=f"PEFT {peft.__version__} saves "
        f"{', '.join(key.removeprefix('base_model.model.') for key in saved[name])}",
    )


CLAIMS = [
    Claim(
        id="10.20-mb",
        fact="r = 16 on q, k, v and o of Llama-2-7B is a file of about 20 MB.",
        source=STICKY_NOTE,
        settle=lambda: weighs(20, "llama-2-7b", 16, QKVO),
        verdict="does not hold",
    ),
    Claim(
        id="10.30-mb",
        fact="r = 16 on all linear layers of Llama-3-8B is about 30 MB.",
        source=f"{FAMILY}, its QLoRA pipeline",
        settle=lambda: weighs(30, "llama-3-8b", 16, "all-linear"),
        verdict="does not hold",
    ),
    Claim(
        id="10.120-mb",
        fact="r = 16 on all attention and feed-forward layers of Llama-3-8B is about 120 MB.",
        source=f"{MATHEMATICS}, “Adapter Saving and Loading”",
        settle=lambda: weighs(120, "llama-3-8b", 16, "all-linear"),
        verdict="does not hold",
    ),
    Claim(
        id="10.100-mb",
        fact="r = 16 on all linear layers of Llama-2-7B is about 100 MB.",
        source=f"{REVOLUTION}, “Saving and Merging”",
        settle=lambda: weighs(100, "llama-2-7b", 16, "all-linear"),
        verdict="does not hold",
    ),
    Claim(
        id="10.from-10-to-100",
        fact="Adapters are 10 to 100 MB.",
        source=f"{REVOLUTION}, “Multiple Adapters, One Base Model”",
        settle=from_10_to_100,
        verdict="holds when",
    ),
    Claim(
        id="10.a-few-mb",
        fact="An adapter is a few MB.",
        source=f"{EXPLAINER}, “Multi-LoRA Serving”",
        settle=a_few_mb,
        verdict="holds when",
    ),
    Claim(
        id="10.model-file",
        fact="A checkpoint of Llama-3-8B in bfloat16 is 15 GB.",
        source=f"{MATHEMATICS}, “Adapter Saving and Loading”",
        settle=model_file,
        verdict="holds when",
    ),
    Claim(
        id="10.five-variants",
        fact="A 70B model is 140 GB, and five variants of it 700 GB.",
        source=f"{MATHEMATICS}, “The Full Fine-Tuning Problem”",
        settle=five_variants,
        verdict="holds",
    ),
    Claim(
        id="10.only-A-and-B",
        fact="save_pretrained writes only A and B.",
        source=f"{STICKY_NOTE}, a comment in its code",
        settle=only_A_and_B,
        verdict="holds when",
    ),
]
