"""08 · How much rank? Sweep, elbow, overfitting

What its notebook leaves out. Scores and losses are the LoRA paper's (arXiv 2106.09685), by its tables.
"""

from minilora.classroom.claims import MATHEMATICS, REVOLUTION, STICKY_NOTE, Claim, Finding, Unsettled
from minilora.llm.architectures import ARCHITECTURES
from minilora.llm.sizes import lora_params

# Table 6: GPT-3 175B, adapters on W_q and W_v; with how far each score fluctuates between seeds.
TABLE_6 = {
    "GPT-3 learns WikiSQL": {1: 73.4, 2: 73.3, 4: 73.7, 8: 73.8, 64: 73.5},
    "GPT-3 learns MNLI": {1: 91.3, 2: 91.4, 4: 91.3, 8: 91.6, 64: 91.4},
}
FLUCTUATION = {"GPT-3 learns WikiSQL": 0.5, "GPT-3 learns MNLI": 0.1}
# Table 18: GPT-2 Medium on the E2E NLG Challenge, loss on the validation set and BLEU.
E2E_LOSS = {
    1: 1.23,
    2: 1.21,
    4: 1.18,
    8: 1.17,
    16: 1.16,
    32: 1.16,
    64: 1.16,
    128: 1.16,
    256: 1.16,
    512: 1.16,
    1024: 1.17,
}
E2E_BLEU = {1: 68.72, 2: 69.17, 4: 70.38, 8: 69.57, 16: 69.61, 32: 69.33, 64: 69.24, 128: 68.73, 256: 68.92, 512: 68.78}


def default_rank() -> Finding:
    """LoraConfig as installed."""
    import peft

    config = peft.LoraConfig()
    return Finding(
        cases=config.r == 16,
        found=f"LoraConfig() of PEFT {peft.__version__}: r = {config.r}, lora_alpha = {config.lora_alpha}, "
        f"lora_dropout = {config.lora_dropout}",
    )


def diminishing_returns() -> Finding:
    """The gain from 1 to 8 beside the noise, and beside the gain from 8 on."""
    cases = {
        task: scores[8] - scores[1] > FLUCTUATION[task] and scores[64] - scores[8] < FLUCTUATION[task]
        for task, scores in TABLE_6.items()
    }
    early, middle, late = (E2E_LOSS[a] - E2E_LOSS[b] for a, b in ((1, 8), (8, 32), (64, 512)))
    return Finding(
        cases={"GPT-2 Medium learns E2E (by its loss)": early > middle > late, **cases},
        found=f"by the LoRA paper's Table 18 the loss falls by {early:.2f}, {middle:.2f} and {late:.2f} (r 1 to "
        "8, 8 to 32, 64 to 512); by Table 6 WikiSQL gains 0.4 points from 1 to 8 and fluctuates by 0.5, "
        "MNLI gains 0.3 and fluctuates by 0.1",
    )


def saturation() -> Finding:
    """The smallest rank within the noise of the best."""
    first = {
        task: min(r for r, score in scores.items() if score >= max(scores.values()) - FLUCTUATION[task] - 1e-9)
        for task, scores in TABLE_6.items()
    }
    first["GPT-2 Medium learns E2E (by its loss)"] = min(
        r for r, loss in E2E_LOSS.items() if loss == min(E2E_LOSS.values())
    )
    first["GPT-2 Medium learns E2E (by BLEU)"] = max(E2E_BLEU, key=lambda r: E2E_BLEU[r])
    return Finding(
        cases={task: 16 <= r <= 32 for task, r in first.items()},
        found="by the LoRA paper's Tables 6 and 18 the smallest rank as good as the best is "
        + ", ".join(f"{r} ({task})" for task, r in first.items()),
    )


def four_to_eight() -> Finding:
    """From r = 4 to r = 8, beside the noise."""
    cases = {task: scores[8] - scores[4] > FLUCTUATION[task] for task, scores in TABLE_6.items()}
    return Finding(
        cases={**cases, "GPT-2 Medium learns E2E (by BLEU)": E2E_BLEU[8] > E2E_BLEU[4]},
        found="by the LoRA paper's Tables 6 and 18: WikiSQL + 0.1 of ± 0.5, MNLI + 0.3 of ± 0.1, BLEU "
        f"− {E2E_BLEU[4] - E2E_BLEU[8]:.2f}",
    )


def sixty_four_to_128() -> Finding:
    """Table 18, the two columns."""
    return Finding(
        cases=E2E_LOSS[128] >= E2E_LOSS[64] and E2E_BLEU[128] <= E2E_BLEU[64],
        found=f"by the LoRA paper's Table 18 the loss stays {E2E_LOSS[128]}, BLEU goes from {E2E_BLEU[64]} to "
        f"{E2E_BLEU[128]}",
    )


def examples_needed() -> Finding:
    """100 to 200 examples a million parameters, for three sets of layers at r = 16."""
    sets = {
        "q, k, v and o": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "q and v (as in its table)": ["q_proj", "v_proj"],
        "all linear layers (as in its code)": "all-linear",
    }
    counts = {name: lora_params(ARCHITECTURES["llama-2-7b"], 16, targets) for name, targets in sets.items()}
    told = ", ".join(f"{n / 1e6:.1f}M on {name} and {n / 1e4:,.0f} to {n / 5e3:,.0f}" for name, n in counts.items())
    return Finding(
        cases={
            f"the adapter is on {name}": (round(n / 1e6), round(n / 1e4, -2), round(n / 5e3, -2)) == (17, 1700, 3400)
            for name, n in counts.items()
        },
        found=f"on Llama-2-7B: {told}",
    )


CHOOSE = f"{MATHEMATICS}, “Rank Selection - How to Choose r”"
CLAIMS = [
    Claim(
        id="08.default-rank",
        fact="r = 16 is the default in most PEFT configurations.",
        source=f"{REVOLUTION}, “Rules of Thumb”",
        settle=default_rank,
        verdict="does not hold",
    ),
    Claim(
        id="08.diminishing-returns",
        fact="Performance improves steeply from r = 1 to 8, gradually from 8 to 32, and hardly beyond 64.",
        source=f"{REVOLUTION}, “The Diminishing Returns Curve”",
        settle=diminishing_returns,
        verdict="holds when",
    ),
    Claim(
        id="08.saturation",
        fact="Most tasks saturate around r = 16 to r = 32.",
        source=CHOOSE,
        settle=saturation,
        verdict="holds when",
    ),
    Claim(
        id="08.four-to-eight",
        fact="Going from r = 4 to r = 8 is a meaningful jump.",
        source=CHOOSE,
        settle=four_to_eight,
        verdict="holds when",
    ),
    Claim(
        id="08.64-to-128",
        fact="Going from r = 64 to r = 128 rarely helps.",
        source=CHOOSE,
        settle=sixty_four_to_128,
        verdict="holds",
    ),
    Claim(
        id="08.examples-needed",
        fact="100 to 200 examples a million trained parameters make 1,700 to 3,400 for r = 16, about 17M.",
        source=f"{REVOLUTION}, “The Relationship Between Rank and Data”",
        settle=examples_needed,
        verdict="holds when",
    ),
]
UNSETTLED = [
    Unsettled(
        id="08.elbow-on-alpaca",
        fact="Llama-2-7B on Alpaca, adapters on q and v: the elbow lies between 8 and 16.",
        source=f"{STICKY_NOTE}, its exercise",
        needs="that sweep, with two seeds or more: without them an elbow cannot be told from noise",
    ),
    Unsettled(
        id="08.upper-layers",
        fact="Upper layers want more rank than lower ones.",
        source=f"{STICKY_NOTE}, its pitfalls",
        needs="AdaLoRA's ranks by layer on a real task, several seeds. On a planted one they go where the update was "
        "planted: `python benchmarks/planted_rank.py`",
    ),
    Unsettled(
        id="08.smaller-models",
        fact="Smaller models benefit more from higher ranks.",
        source=f"{REVOLUTION}, “The Diminishing Returns Curve”",
        needs="one task and one sweep of ranks at several sizes of a family. The LoRA paper has GPT-2 Medium and GPT-3 "
        "on different tasks (Tables 18 and 6)",
    ),
    Unsettled(
        id="08.two-hundred-scalars",
        fact="A BERT model adapts with as few as 200 scalars.",
        source=STICKY_NOTE,
        needs="fine-tuning BERT in a random subspace of 200 dimensions. The figure is of RoBERTa on MRPC, and of 90 % "
        "of full fine-tuning (abstract of arXiv 2012.13255)",
    ),
]
