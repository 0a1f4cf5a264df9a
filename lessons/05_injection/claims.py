"""What articles say about how much LoRA trains and on which layers, settled by counting and by comparing names."""

from collections.abc import Sequence

from minilora.classroom.claims import (
    EXPLAINER,
    FAMILY,
    MATHEMATICS,
    REVOLUTION,
    STICKY_NOTE,
    Claim,
    Finding,
    Unsettled,
)
from minilora.llm.architectures import ARCHITECTURES
from minilora.llm.sizes import base_params, lora_params
from minilora.torch_lora.inject import ALL_LINEAR
from minilora.torch_lora.targets import DEFAULT_TARGETS

QV, QKVO = ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")
LLAMA = (*QKVO, "gate_proj", "up_proj", "down_proj")
FUSED = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")

# model_type -> last parts of the names of its linear layers, the head left out, in transformers 5.23
LINEAR_LAYERS: dict[str, tuple[str, ...]] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": QKVO,  # its experts are two parameters with three axes a layer, and no modules
    "falcon": FUSED,
    "gpt_neox": FUSED,
    "stablelm": LLAMA,
    "bloom": FUSED,
    "phi": ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
    "phi3": ("o_proj", "qkv_proj", "gate_up_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
}
ARTICLE_TABLE: dict[str, tuple[str, ...]] = {  # what the article lists, by model_type
    **dict.fromkeys(("llama", "mistral", "mixtral"), LLAMA),
    **dict.fromkeys(("falcon", "gpt_neox", "stablelm", "bloom"), FUSED),
    **dict.fromkeys(("phi", "phi3"), ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
}
# The linear layers of one layer of T5's decoder, in transformers 5.23.
T5_LAYER = [
    *(f"decoder.block.0.layer.{part}.{name}" for part in ("0.SelfAttention", "1.EncDecAttention") for name in "qkvo"),
    "decoder.block.0.layer.2.DenseReluDense.wi",
    "decoder.block.0.layer.2.DenseReluDense.wo",
]


def counted(name: str, r: int, targets: str | Sequence[str]) -> tuple[int, int]:
    """What trains, and what there is in all, as PEFT prints the two."""
    trained = lora_params(ARCHITECTURES[name], r, targets)
    return trained, base_params(ARCHITECTURES[name]) + trained


def printed(name: str, r: int, targets: str | Sequence[str], told: tuple[int, int], of: str = "") -> Finding:
    """Whether a printed pair (trainable, all) is the right one."""
    trained, total = counted(name, r, targets)
    return Finding(
        cases=(trained, total) == told,
        found=f"{trained:,} of {total:,}, {trained / total:.4%}{of}",
    )


def rank_table() -> Finding:
    """q and v of Llama-2-7B, rank by rank; the same with k and o."""
    told = {4: 4.2, 8: 8.4, 16: 16.8, 64: 67.1, 256: 268.4}
    counts = {r: counted("llama-2-7b", r, QV)[0] / 1e6 for r in told}
    doubled = all(round(counted("llama-2-7b", r, QKVO)[0] / 1e6, 1) == millions for r, millions in told.items())
    words = ", ".join(f"{millions:.2f} M" for millions in counts.values())
    return Finding(
        cases={f"r = {r}": abs(counts[r] - millions) < 0.05 * millions for r, millions in told.items()},
        found=f"32 · 2 · r · 8,192 = {words}; the table is that of q, k, v and o: {doubled}",
    )


def seven_on_llama_2() -> Finding:
    """Seven targets, r = 16; and of which model the printed count is."""
    is_llama_3 = counted("llama-3-8b", 16, ALL_LINEAR)[0] == 41_943_040
    of = f"; 41,943,040 is Llama-3-8B's count: {is_llama_3}"
    return printed("llama-2-7b", 16, ALL_LINEAR, (41_943_040, 6_779_371_520), of)


def seven_as_attention() -> Finding:
    """Seven targets, r = 16, on a 7B model."""
    trained, total = counted("llama-2-7b", 16, QKVO)
    of = f"; q, k, v and o alone are {trained:,} of {total:,}"
    return printed("llama-2-7b", 16, ALL_LINEAR, (16_777_216, 6_754_332_672), of)


def attention_on_llama_2() -> Finding:
    """q, k, v and o, r = 16; and what the printed count is of."""
    is_smaller = counted("llama-2-7b", 8, QV)[0] == 4_194_304
    of = f"; 4,194,304 is that of r = 8 on q and v, PEFT's own defaults: {is_smaller}"
    return printed("llama-2-7b", 16, QKVO, (4_194_304, 6_742_609_920), of)


def seven_on_llama_3() -> Finding:
    """Seven targets, r = 16, with few heads of keys; and what the printed count is of."""
    is_doubled = counted("llama-3-8b", 32, ALL_LINEAR)[0] == 83_886_080
    of = f"; 83,886,080 is the count of r = 32: {is_doubled}"
    return printed("llama-3-8b", 16, ALL_LINEAR, (83_886_080, 8_114_221_056), of)


def attention_rank_8() -> Finding:
    """q, k, v and o, r = 8."""
    trained, _ = counted("llama-2-7b", 8, QKVO)
    share = trained / base_params(ARCHITECTURES["llama-2-7b"])
    return Finding(
        cases=trained // 10**6 == 8 and round(100 * share, 2) == 0.12,
        found=f"32 layers · 4 · 8 · (4,096 + 4,096) = {trained:,}, {share:.2%}",
    )


def twenty_to_forty() -> Finding:
    """r = 16, all linear layers; “roughly” is read as within 5 %."""
    counts = {name: counted(name, 16, ALL_LINEAR)[0] for name in ("llama-2-7b", "mistral-7b", "qwen2.5-7b")}
    words = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    return Finding(cases={name: 0.95 * 20e6 <= count <= 1.05 * 40e6 for name, count in counts.items()}, found=words)


def on_70b() -> Finding:
    """Its own configuration, r = 16 with seven targets, and the one that comes near."""
    counts = {"seven targets, as its code has": LLAMA, "q, k, v and o alone": QKVO}
    found = {name: counted("llama-3-70b", 16, targets) for name, targets in counts.items()}
    return Finding(
        cases={name: abs(trained - 67e6) < 3e6 for name, (trained, _) in found.items()},
        found="; ".join(f"{name}: {trained:,}, {trained / total:.2%}" for name, (trained, total) in found.items()),
    )


def defaults_are_all_linear() -> Finding:
    """PEFT's table for Llama against Llama's linear layers."""
    default = DEFAULT_TARGETS["llama"]
    return Finding(
        cases=set(default) == set(LINEAR_LAYERS["llama"]),
        found=f"a table by architecture; Llama's entry is {' and '.join(default)}, two of seven",
    )


def defaults_are_attention() -> Finding:
    """PEFT's table, entry by entry: fc1 and fc2 are Phi's feed-forward part."""
    feed_forward = {name: sorted({"fc1", "fc2"} & set(targets)) for name, targets in DEFAULT_TARGETS.items()}
    without = [name for name, found in feed_forward.items() if not found]
    return Finding(
        cases={"the model is not a Phi": len(without) == len(DEFAULT_TARGETS) - 1, "it is": not feed_forward["phi"]},
        found=f"so it is for {', '.join(without)}; for phi it is {', '.join(DEFAULT_TARGETS['phi'])}",
    )


def target_table() -> Finding:
    """The article's lists against the linear layers of each architecture."""
    wrong = [name for name, listed in ARTICLE_TABLE.items() if set(listed) != set(LINEAR_LAYERS[name])]
    there = "; ".join(f"{name} has {', '.join(LINEAR_LAYERS[name])}" for name in wrong)
    return Finding(cases={name: name not in wrong for name in ARTICLE_TABLE}, found=there)


def substrings() -> Finding:
    """q, k, v and o as substrings, and as PEFT asks: the whole name, or its end after a dot."""
    names = {
        "Llama's q_proj, k_proj, v_proj, o_proj": (QKVO, [f"layers.0.{name}" for name in LLAMA]),
        "T5's q, k, v, o": (tuple("qkvo"), T5_LAYER),
    }
    hits = {
        case: (
            [name for name in there if any(target in name for target in targets)],
            [name for name in there if any(name == target or name.endswith(f".{target}") for target in targets)],
        )
        for case, (targets, there) in names.items()
    }
    return Finding(
        cases={case: loose == exact for case, (loose, exact) in hits.items()},
        found="; ".join(f"{case}: {len(loose)} layers, and {len(exact)}" for case, (loose, exact) in hits.items())
        + ": “decoder.block” has an o and a k in it",
    )


def gpt3_share() -> Finding:
    """r = 4 on q and v, the paper's."""
    gpt3 = ARCHITECTURES["gpt-3-175b"]
    n = lora_params(gpt3, 4, ["q_proj", "v_proj"])
    share = n / base_params(gpt3)
    return Finding(
        cases=round(100 * share, 2) == 0.01,
        found=f"r = 4 on q and v: 96 layers · 2 · 4 · (12,288 + 12,288) = {n:,} of {base_params(gpt3):,}, {share:.4%}",
    )


def gpt2_classifier() -> Finding:
    """r = 16 beside every linear layer, q, k and v apart, and a head of two classes that has an adapter as well."""
    gpt2 = ARCHITECTURES["gpt2"]
    per_layer = 16 * (4 * (768 + 768) + 2 * (768 + 3072))
    n = gpt2.n_layers * per_layer + 16 * (768 + 2)
    times = base_params(gpt2) / n
    return Finding(
        cases=(round(base_params(gpt2) / 1e6), round(n / 1e6, 1), round(times, -1)) == (124, 2.7, 50),
        found=f"12 · 16 · (4 · 1,536 + 2 · 3,840) + 16 · (768 + 2) = {n:,} of {base_params(gpt2):,}: {times:.0f} times "
        "fewer",
    )


CLAIMS = [
    Claim(
        id="05.rank-table",
        fact="Queries and values of a 7B model: 4.2M parameters at r = 4, 8.4M at 8, 16.8M at 16, 67.1M at 64, 268.4M "
        "at 256.",
        source=f"{REVOLUTION}, “Rank Selection”",
        settle=rank_table,
        verdict="does not hold",
    ),
    Claim(
        id="05.llama-2-seven",
        fact="r = 16 on seven targets of Llama-2-7B trains 41,943,040 of 6,779,371,520.",
        source=f"{REVOLUTION}, a printed output",
        settle=seven_on_llama_2,
        verdict="does not hold",
    ),
    Claim(
        id="05.seven-as-attention",
        fact="r = 16 on seven targets of a 7B model trains 16,777,216 of 6,754,332,672.",
        source=f"{FAMILY}, a printed output",
        settle=seven_as_attention,
        verdict="does not hold",
    ),
    Claim(
        id="05.llama-2-attention",
        fact="r = 16 on q, k, v and o of Llama-2-7B trains 4,194,304 of 6,742,609,920.",
        source=f"{STICKY_NOTE}, a printed output",
        settle=attention_on_llama_2,
        verdict="does not hold",
    ),
    Claim(
        id="05.llama-3-seven",
        fact="r = 16 on seven targets of Llama-3-8B trains 83,886,080 of 8,114,221,056.",
        source=f"{MATHEMATICS}, a printed output",
        settle=seven_on_llama_3,
        verdict="does not hold",
    ),
    Claim(
        id="05.attention-rank-8",
        fact="r = 8 on q, k, v and o of a 7B Llama, 32 layers, trains 8 million parameters: 0.12 %.",
        source=f"{MATHEMATICS}, “Parameter count comparison”",
        settle=attention_rank_8,
        verdict="holds",
    ),
    Claim(
        id="05.twenty-to-forty",
        fact="r = 16 on all linear layers of a 7B model trains roughly 20 to 40 million parameters.",
        source=f"{EXPLAINER}, “Key LoRA Parameters”",
        settle=twenty_to_forty,
        verdict="holds",
    ),
    Claim(
        id="05.seventy-billion",
        fact="r = 16 on a 70B model trains about 67M parameters.",
        source=f"{FAMILY}, a table",
        settle=on_70b,
        verdict="holds when",
    ),
    Claim(
        id="05.default-all-linear",
        fact="PEFT's defaults put an adapter on every linear layer.",
        source=STICKY_NOTE,
        settle=defaults_are_all_linear,
        verdict="does not hold",
    ),
    Claim(
        id="05.default-attention",
        fact="PEFT's defaults are attention layers only.",
        source=f"{MATHEMATICS}, “Which layers to apply LoRA to”",
        settle=defaults_are_attention,
        verdict="holds when",
    ),
    Claim(
        id="05.target-table",
        fact="A table lists the linear layers of ten architectures by name.",
        source=f"{MATHEMATICS}, “Target Module Selection by Architecture”",
        settle=target_table,
        verdict="holds when",
    ),
    Claim(
        id="05.substrings",
        fact="A target is a substring of the names of the layers that it hits.",
        source=f"{MATHEMATICS}, its code",
        settle=substrings,
        verdict="holds when",
    ),
    Claim(
        id="05.gpt-3-share",
        fact="On GPT-3 175B, LoRA trains 0.01 % of the parameters.",
        source=f"{MATHEMATICS}, “Historical Context”",
        settle=gpt3_share,
        verdict="holds",
    ),
    Claim(
        id="05.gpt-2-classifier",
        fact="At rank 16 GPT-2 124M trains 2.7M parameters, about 50 times fewer.",
        source=f"{REVOLUTION}, “Rank Selection”",
        settle=gpt2_classifier,
        verdict="holds",
    ),
]
UNSETTLED = [
    Unsettled(
        id="05.facts-and-style",
        fact="For facts, adapt the feed-forward layers; for style and instructions attention is enough.",
        source=f"{MATHEMATICS}, “Common Mistakes”",
        needs="two tasks, one of new facts and one of style, each with adapters on either set of layers at equal "
        "parameters, several seeds",
    ),
]
