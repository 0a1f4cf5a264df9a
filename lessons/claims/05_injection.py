"""05 · Injection, and which layers

Claims on counts and layers that no lesson has taken up yet.
"""

from minilora.classroom.claims import MATHEMATICS, REVOLUTION, Claim, Finding, Unsettled
from minilora.llm.architectures import ARCHITECTURES
from minilora.llm.sizes import base_params, lora_params


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
