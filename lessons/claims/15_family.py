"""15 · The family: adapters, prefix, prompt, IA³, DoRA, AdaLoRA, GaLore

The claims for this lesson: what each method trains, and what its papers measured.
"""

from minilora.classroom.claims import EXPLAINER, FAMILY, REVOLUTION, Claim, Finding
from minilora.llm.architectures import ARCHITECTURES
from minilora.llm.setup import Setup
from minilora.llm.sizes import houlsby_params, ia3_params, lora_params, prefix_params, prompt_params
from minilora.llm.training_memory import training_bytes

LLAMA_2, LLAMA_3 = ARCHITECTURES["llama-2-7b"], ARCHITECTURES["llama-3-8b"]


def prefix_with_projection() -> Finding:
    """PEFT's own encoder for Llama-2-7B, with and without the network that makes the prefix; and our count of it."""
    import peft
    import torch

    counts = {}
    for name, projection in {"prefix_projection=False": False, "prefix_projection=True (as in its code)": True}.items():
        sizes = {"token_dim": LLAMA_2.hidden, "num_layers": LLAMA_2.n_layers, "encoder_hidden_size": LLAMA_2.hidden}
        config = peft.PrefixTuningConfig(num_virtual_tokens=20, prefix_projection=projection, **sizes)
        with torch.device("meta"):
            counts[name] = sum(p.numel() for p in peft.PrefixEncoder(config).parameters())
    assert list(counts.values()) == [prefix_params(LLAMA_2, 20), prefix_params(LLAMA_2, 20, LLAMA_2.hidden)]
    return Finding(
        cases={name: round(n / 1e6) == 5 for name, n in counts.items()},
        found=f"Llama-2-7B: {' and '.join(f'{n:,}' for n in counts.values())} while it trains, for the network is "
        "as wide "
        f"as the model (PEFT {peft.__version__}). Llama-3-8B, which has fewer keys and values: "
        f"{prefix_params(LLAMA_3, 20):,} without",
    )


def prefix_of_20() -> Finding:
    """20 tokens, 32 layers."""
    n = prefix_params(LLAMA_2, 20)
    return Finding(cases=round(n / 1e6, 1) == 5.2, found=f"20 · 32 · 2 · 4,096 = {n:,}")


def prompt_of_100() -> Finding:
    """100 tokens, three models."""
    models = {"Llama-2-7B": "llama-2-7b", "Llama-3-8B": "llama-3-8b", "Llama-2-70B": "llama-2-70b"}
    counts = {name: prompt_params(ARCHITECTURES[key], 100) for name, key in models.items()}
    return Finding(
        cases={f"it is {name}": n == 409_600 for name, n in counts.items()},
        found=f"100 · hidden: {', '.join(f'{n:,}' for n in counts.values())}; it grows with the width, not with "
        "the depth",
    )


def prompt_share() -> Finding:
    """Of 10 · 10⁹ parameters."""
    shares = {f"the prompt has {n} tokens": n * 4096 / 10e9 for n in (100, 20)}
    told = " and ".join(f"{share:.4%}" for share in shares.values())
    return Finding(
        cases={name: 100 * share < 0.001 for name, share in shares.items()},
        found=f"100 · 4,096 and 20 · 4,096 of 10 · 10⁹ are {told}",
    )


def ia3_share() -> Finding:
    """LoRA's count over IA³'s, for three sets of layers."""
    sets = {
        "q and v": ("q_proj", "v_proj"),
        "q k v o": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "all linear layers": "all-linear",
    }
    n = ia3_params(LLAMA_2)
    times = {name: lora_params(LLAMA_2, 8, targets) / n for name, targets in sets.items()}
    return Finding(
        cases={f"LoRA is on {name}": abs(t - 10) <= 1 for name, t in times.items()},
        found=f"IA³ on Llama-2-7B: 32 · (4,096 + 4,096 + 11,008) = {n:,}; LoRA of r = 8 has "
        + ", ".join(f"{t:.1f} times as many ({name})" for name, t in times.items()),
    )


def one_adapter_a_layer() -> Finding:
    """Its formula, for an adapter and for a layer of Houlsby's."""
    d, m = LLAMA_2.hidden, 64
    formula, in_layer = 2 * d * m + m + d, houlsby_params(LLAMA_2, m) // LLAMA_2.n_layers
    return Finding(
        cases={"one adapter is counted": formula == in_layer // 2, "a layer is counted": formula == in_layer},
        found=f"2 · 4,096 · 64 + 64 + 4,096 = {formula:,} an adapter; Houlsby et al. (arXiv 1902.00751, Figure 2) "
        "put one "
        f"after attention and one after the feed-forward part: {in_layer:,} a layer",
    )


def down_projection() -> Finding:
    """The parameters of Linear(4096 → 64), bias and all."""
    n = 4096 * 64 + 64
    assert houlsby_params(LLAMA_2, 64) // (2 * LLAMA_2.n_layers) == n + 64 * 4096 + 4096
    return Finding(cases=n == 64, found=f"64 is the number of features; parameters are 4,096 · 64 + 64 = {n:,}")


def adapter_latency() -> Finding:
    """Table 1 of the LoRA paper, batch 1, 128 tokens."""
    ms = {"LoRA, merged": 19.8, "Adapter-L": 23.9, "Adapter-H": 25.8}
    least = min(ms["Adapter-L"], ms["Adapter-H"]) / ms["LoRA, merged"] - 1
    return Finding(
        cases=least > 0,
        found="by the LoRA paper's Table 1 (GPT-2 Medium, batch 1, 128 tokens) "
        + ", ".join(f"{value} ms ({name})" for name, value in ms.items())
        + f": {least:.0%} and more",
    )


def dora_gains() -> Finding:
    """Points of DoRA above LoRA, by its README's means and PEFT's own benchmark."""
    gains = {
        "LLaMA-7B learns commonsense tasks": 78.4 - 76.3,
        "Llama-2-7B does": 79.7 - 77.6,
        "Llama-3-8B does": 85.2 - 80.8,
        "Llama-3.2-3B learns GSM8K": 49.4 - 48.2,
    }
    noise = {"Llama-3.2-3B learns GSM8K": 1.4}
    return Finding(
        cases={name: 1 <= gain <= 3 and gain > noise.get(name, 0) for name, gain in gains.items()},
        found="by DoRA's README (means over commonsense tasks, r = 32, DoRA at a rate of its own) and PEFT's "
        f"method_comparison (GSM8K, standard error 1.4): {', '.join(f'+{gain:.1f}' for gain in gains.values())} points",
    )


def dora_parameters() -> Finding:
    """What the magnitudes add to r = 16 on all linear layers."""
    plain, dora = (lora_params(LLAMA_2, 16, use_dora=use_dora) for use_dora in (False, True))
    return Finding(
        cases=dora / plain < 1.05,
        found=f"one number an output: {dora - plain:,} beside {plain:,}, {dora / plain - 1:.1%} more (Llama-2-7B, "
        "r = 16 on "
        "all linear layers)",
    )


def galore_footprint() -> Finding:
    """GaLore on 7B beside full training of 1B: all of a step, in bf16, one row of 512 tokens."""
    small = training_bytes(ARCHITECTURES["llama-3.2-1b"], Setup(method="full", master_weights=False)).total
    large = training_bytes(LLAMA_2, Setup(method="galore", r=1024))
    frugal = large.weights + large.optimizer  # each gradient is used up as it comes
    return Finding(
        cases=frugal <= small,
        found=f"Llama-2-7B's weights in bf16 and rank-1024 states are {frugal / 1e9:.0f} GB before any gradient; full "
        f"AdamW training of Llama-3.2-1B is {small / 1e9:.0f} GB. GaLore's own README has 22.8 GB for 7B, with 8-bit "
        "states and checkpointing",
    )


CLAIMS = [
    Claim(
        id="15.prefix-with-projection",
        fact="Prefix tuning a 7B model with 20 tokens trains roughly 5M parameters.",
        source=f"{FAMILY}, on prefix tuning",
        settle=prefix_with_projection,
        verdict="holds when",
    ),
    Claim(
        id="15.prefix-of-20",
        fact="A prefix of 20 tokens for 32 layers of width 4096 has 5.2M parameters.",
        source=f"{REVOLUTION}, “Prefix Tuning”",
        settle=prefix_of_20,
        verdict="holds",
    ),
    Claim(
        id="15.prompt-of-100",
        fact="A prompt of 100 tokens has 409,600 parameters, whatever the model's size.",
        source=f"{REVOLUTION}, “Prompt Tuning”",
        settle=prompt_of_100,
        verdict="holds when",
    ),
    Claim(
        id="15.prompt-share",
        fact="At 10B parameters prompt tuning trains less than 0.001 % of them.",
        source=f"{REVOLUTION}, “Prompt Tuning”",
        settle=prompt_share,
        verdict="holds when",
    ),
    Claim(
        id="15.ia3-share",
        fact="IA³ trains roughly 10 times fewer parameters than LoRA with r = 8.",
        source=f"{FAMILY}, on IA³",
        settle=ia3_share,
        verdict="does not hold",
    ),
    Claim(
        id="15.one-adapter-a-layer",
        fact="An adapter layer adds 2 · d · r + r + d parameters, after the feed-forward part.",
        source=f"{FAMILY}, on adapters",
        settle=one_adapter_a_layer,
        verdict="holds when",
    ),
    Claim(
        id="15.down-projection",
        fact="Its compressing layer has 4096 → 64 parameters.",
        source=f"{REVOLUTION}, “Adapter Layers”",
        settle=down_projection,
        verdict="does not hold",
    ),
    Claim(
        id="15.adapter-latency",
        fact="Adapters add latency at inference.",
        source=f"{EXPLAINER}, “Other PEFT Methods”",
        settle=adapter_latency,
        verdict="holds",
    ),
    Claim(
        id="15.dora-gains",
        fact="DoRA is consistently 1 to 3 % better than LoRA at the same rank.",
        source=f"{FAMILY}, on DoRA",
        settle=dora_gains,
        verdict="holds when",
    ),
    Claim(
        id="15.dora-parameters",
        fact="DoRA trains only marginally more parameters.",
        source=f"{FAMILY}, on DoRA",
        settle=dora_parameters,
        verdict="holds",
    ),
    Claim(
        id="15.galore-footprint",
        fact="GaLore trains a 7B model in the memory of a 1B model.",
        source=f"{FAMILY}, on GaLore",
        settle=galore_footprint,
        verdict="does not hold",
    ),
]
