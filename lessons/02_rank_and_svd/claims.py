"""What articles say about rank: what it costs, how much of it a change needs, and what random directions are.

The last three are settled on a network of 5,120 weights that is fine-tuned here. It is no language model: it can refute
a sentence that says "always", and it can show which measure a number belongs to.
"""

import numpy as np

from minilora.classroom import small_network as small
from minilora.classroom.claims import Claim, Finding
from minilora.numpy_lora.forward import lora_init
from minilora.numpy_lora.rank import effective_rank, truncated_svd

REVOLUTION = "LoRA and the Efficiency Revolution"
FAMILY = "an article on parameter-efficient fine-tuning with LoRA, QLoRA and adapters"
EXPLAINER = "LoRA — Low-Rank Adaptation"
STICKY_NOTE = "LoRA: Low-rank adapters — fine-tune 0.1% of the parameters"
MATHEMATICS = "LoRA Mathematics and Implementation"

LOW = 6  # pieces of 64, a tenth: what counts as low rank here


def _numbers(r: int) -> int:
    """What A and B of a new adapter on a 4096 × 4096 weight hold."""
    A, B = lora_init(r, in_features=4096, out_features=4096, rng=np.random.default_rng(0))
    return A.size + B.size


def rank_4() -> Finding:
    """A (4, 4096) and B (4096, 4)."""
    n = _numbers(4)
    return Finding(cases=n == 32_768 and 4096**2 == 512 * n, found=f"4 · (4096 + 4096) = {n:,}; 4096² / {n:,} = 512")


def rank_16() -> Finding:
    """A (16, 4096) and B (4096, 16)."""
    share = _numbers(16) / 4096**2
    return Finding(cases=f"{share:.2%}" == "0.78%", found=f"16 · (4096 + 4096) / 4096² = {100 * share:.5f} %")


def one_product() -> Finding:
    """The best copy of rank 1 of a 64 × 64 matrix."""
    d = 64
    M = np.random.default_rng(0).normal(size=(d, d))
    B, A = truncated_svd(M, 1)
    is_outer = np.array_equal(B @ A, np.outer(B[:, 0], A[0]))
    return Finding(
        cases=is_outer and B.size + A.size == 2 * d,
        found=f"d = {d}: B holds {B.size}, A holds {A.size}; B A is np.outer of the two, number for number",
    )


def same_power() -> Finding:
    """Two updates, each put into factors of rank 8: one of rank 8, and one of any."""
    rng = np.random.default_rng(0)
    updates = {
        "the update has rank 8 or less": rng.normal(size=(64, 8)) @ rng.normal(size=(8, 64)),
        "the update is any 64 × 64 matrix": rng.normal(size=(64, 64)),
    }
    errors = {
        name: float(np.linalg.norm(M - np.matmul(*truncated_svd(M, 8))) / np.linalg.norm(M))
        for name, M in updates.items()
    }
    return Finding(
        cases={name: error < 1e-12 for name, error in errors.items()},
        found=f"rank-8 factors of a random 64 × 64 update are off by {list(errors.values())[1]:.0%} of its norm",
    )


def rows() -> Finding:
    """Rows that are no mixture of the others, in matrices of full rank."""
    shapes = {"it has no more rows than columns": (3, 5), "it has more rows than columns": (5, 3)}
    ranks = {
        name: int(np.linalg.matrix_rank(np.random.default_rng(0).normal(size=shape))) for name, shape in shapes.items()
    }
    assert all(ranks[name] == min(shape) for name, shape in shapes.items())  # both have full rank
    return Finding(
        cases={name: ranks[name] == shape[0] for name, shape in shapes.items()},
        found="a random 5 × 3 matrix has full rank, 3: two of its five rows are mixtures of the others",
    )


def change_is_low_rank() -> Finding:
    """The change of the first layer, 64 × 64, where all weights were free."""
    weight = effective_rank(small.pretrained()[0], 0.9)
    ranks = {task: effective_rank(small.change(task), 0.9) for task in small.TASKS}
    return Finding(
        cases={
            "the task asks one new question": ranks["narrow"] <= LOW,
            "the task is a wholly new one": ranks["wide"] <= LOW,
        },
        found=f"90 % of the change is in {ranks['narrow']} of 64 pieces where the task is narrow, in {ranks['wide']} "
        f"where it is wide; 90 % of the weight itself in {weight}",
    )


def random_directions() -> Finding:
    """Whether 90 % is reached: the narrow task, learned along random directions of all 5,120 weights together."""
    full = small.right_answers(small.fine_tuned("narrow"))
    learned = {k: small.in_random_directions(k) for k in (200, 800)}
    right = {k: small.right_answers(weights) / full for k, weights in learned.items()}
    loss = {k: small.improvement(weights) for k, weights in learned.items()}
    cases = {f"{k} directions, by right answers": right[k] >= 0.9 for k in learned}
    cases |= {f"{k} directions, by loss": loss[k] >= 0.9 for k in learned}
    return Finding(
        cases=cases,
        found=f"of {small.N_WEIGHTS:,} weights, 200 and 800 directions: {right[200]:.0%} and {right[800]:.0%} of full "
        f"fine-tuning's right answers (guessing gives half), {loss[200]:.0%} and {loss[800]:.0%} of what it takes off "
        "the loss",
    )


def directions_are_not_rank() -> Finding:
    """One random direction of all weights: the fewest numbers that can be trained."""
    moved = small.in_random_directions(1)[0] - small.pretrained()[0]
    rank, largest = effective_rank(moved, 0.9), min(moved.shape)
    return Finding(
        cases=rank <= LOW,
        found=f"one trained number, along one random direction of all weights: 90 % of a layer's change is "
        f"in {rank} of {largest} pieces, as many as of a random matrix",
    )


CLAIMS = [
    Claim(
        id="02.rank-4",
        fact="On a 4096 × 4096 weight rank 4 trains only 32,768 numbers: a 512-fold reduction.",
        source=f"{EXPLAINER}, “Parameter Count: Full Fine-Tuning vs LoRA”",
        settle=rank_4,
        verdict="holds",
    ),
    Claim(
        id="02.rank-16",
        fact="Even rank 16 trains only 0.78 % of it.",
        source=f"{EXPLAINER}, “Parameter Count: Full Fine-Tuning vs LoRA”",
        settle=rank_16,
        verdict="holds",
    ),
    Claim(
        id="02.one-product",
        fact="At r = 1 the update is a single outer product, one column times one row, with 2 d parameters.",
        source=STICKY_NOTE,
        settle=one_product,
        verdict="holds",
    ),
    Claim(
        id="02.same-power",
        fact="A large update splits into two small matrices: the same expressive power, far fewer parameters.",
        source=f"{EXPLAINER}, the caption of a figure",
        settle=same_power,
        verdict="holds when",
    ),
    Claim(
        id="02.rows",
        fact="In a matrix of full rank all rows bring new information.",
        source=f"{MATHEMATICS}, “What ‘rank’ means and why it matters”",
        settle=rows,
        verdict="holds when",
    ),
    Claim(
        id="02.change-is-low-rank",
        fact="The correction that fine-tuning makes to a weight is very close to low rank.",
        source=STICKY_NOTE,
        settle=change_is_low_rank,
        verdict="holds when",
    ),
    Claim(
        id="02.random-directions",
        fact="Fine-tuning in a random subspace of 200 to 800 dimensions recovers 90 % of full fine-tuning.",
        source=f"{FAMILY}; {REVOLUTION}, “Why Low Rank?”, in similar words",
        settle=random_directions,
        verdict="holds when",
    ),
    Claim(
        id="02.directions-are-not-rank",
        fact="If fine-tuning needs few directions of all weights, the change of a weight matrix has low rank.",
        source=f"{MATHEMATICS}, “Historical Context”",
        settle=directions_are_not_rank,
        verdict="does not hold",
    ),
]
