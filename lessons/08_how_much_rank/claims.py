"""What articles say about rank and overfitting, settled by this lesson's sweeps and by the benchmarks' results."""

from minilora.classroom.claims import Claim, Finding
from minilora.classroom.lessons import lesson_module
from minilora.classroom.pictures.rank_sweep import IN, OUT, RANKS

EFFICIENCY = "LoRA and the Efficiency Revolution"
STICKY = "LoRA: Low-rank adapters — fine-tune 0.1% of the parameters"

# LoRA (arXiv 2106.09685), table 6: GPT-3 175B, adapters on W_q and W_v, accuracy in % by rank
TABLE_6 = {
    "WikiSQL": {1: 73.4, 2: 73.3, 4: 73.7, 8: 73.8, 64: 73.5},
    "MultiNLI": {1: 91.3, 2: 91.4, 4: 91.3, 8: 91.6, 64: 91.4},
}
GLUE = ("CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MultiNLI", "QNLI", "RTE", "WNLI")


def elbow_between_8_and_16() -> Finding:
    """Where the elbow is, for updates of known rank and on a real task."""
    lesson = lesson_module("08")
    elbows = {k: lesson.elbow(losses) for k, losses in lesson.planted_in_a_decoder().items()}
    real = lesson.elbow(lesson.real_sweep())
    cases = {f"a planted rank of {k}": 8 <= found <= 16 for k, found in elbows.items()}
    cases["32 steps on orders as JSON"] = 8 <= real <= 16
    told = ", ".join(f"{found} for {k}" for k, found in elbows.items())
    return Finding(
        cases=cases,
        found=f"the elbow is at the planted rank: {told} (benchmarks/planted_rank.py); on a real task, after 32 steps, "
        f"at {real} (benchmarks/methods.py)",
    )


def rank_4_on_glue() -> Finding:
    """What the paper's table of ranks, for GPT-3 175B, is about, and what it says of r = 1."""
    cases = {task: task in TABLE_6 and abs(TABLE_6[task][4] - TABLE_6[task][64]) <= 0.5 for task in GLUE}
    told = "; ".join(f"{task} {ranks[1]} with r = 1, {ranks[64]} with r = 64" for task, ranks in TABLE_6.items())
    named = {"MultiNLI": cases.pop("MultiNLI"), "the other tasks of GLUE": all(cases.values())}
    return Finding(cases=named, found=f"table 6 has two tasks, one of them of GLUE, and r = 1 is enough: {told}")


def examples_per_million() -> Finding:
    """Whether more than 100 to 200 rows a million parameters keep an adapter of this lesson from overfitting."""
    lesson, n = lesson_module("08"), 60
    rows = n / (RANKS[-1] * (IN + OUT)) * 1e6
    cases = {f"{n} rows, noise {noise}": not lesson.overfits(3, n, noise) for noise in (0.0, 0.5)}
    told = f"r = {RANKS[-1]} with {n} rows has {rows:,.0f} rows a million parameters"
    return Finding(cases=cases, found=f"{told}; with noise it overfits, without it does not: the noise decides")


CLAIMS = [
    Claim(
        id="08.elbow-between-8-and-16",
        fact="Plot the loss against r: the elbow is somewhere between 8 and 16.",
        source=STICKY,
        settle=elbow_between_8_and_16,
        verdict="holds when",
    ),
    Claim(
        id="08.rank-4-on-glue",
        fact="On GLUE, r = 4 had most of what r = 64 had, for GPT-3 175B.",
        source=EFFICIENCY,
        settle=rank_4_on_glue,
        verdict="holds when",
    ),
    Claim(
        id="08.examples-per-million",
        fact="With 100 to 200 examples a million trainable parameters an adapter does not overfit.",
        source=EFFICIENCY,
        settle=examples_per_million,
        verdict="holds when",
    ),
]
