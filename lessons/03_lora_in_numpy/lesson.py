# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 03 · LoRA in NumPy: forward, and backward by hand
#
# * **You will be able to** *write* LoRA's forward pass without ever building a matrix as large as the weight; *derive*
#   its three gradients by hand and *check* them by differences; *explain* which of A and B learns first, and why one of
#   them must start at zero.
# * **You need** matrix products and transposes, the chain rule. Lesson 02 is about rank and the SVD; what is needed
#   of them here stands in section 1 again.
# * **Minutes**: read 25 · exercises 35 · stretch and explain 25.
# * **Runs on** any CPU in under a minute; NumPy is enough. No GPU.

# %% [markdown] tags=["solution"]
# This is the full notebook, with every answer. The one with blanks for you is `student/03_lora_in_numpy.ipynb`.

# %% [markdown] tags=["student"]
# This is your notebook: fill in the lines that say `...  # your code`. Building the course again never writes over a
# notebook that somebody has edited. The answers are in `03_lora_in_numpy.ipynb`, one folder up.

# %% tags=["setup"]
import importlib.util
import inspect
import logging

import numpy as np

from minilora.classroom.costs import BypassCost, human_bytes
from minilora.classroom.evidence import expect_bug
from minilora.classroom.bets import predict, settle
from minilora.classroom.claims import show_claims
from minilora.classroom.exercises import check, examine, find_exercise, overview
from minilora.classroom.exercises import hint  # noqa: F401  for you: hint("03.1")
from minilora.classroom.lessons import lesson_module
from minilora.classroom.explorer import explorer, show
from minilora.classroom.instrumented import watch
from minilora.classroom.plots import first_step, highway, recovery, symptoms
from minilora.numpy_lora import forward as layer1
from minilora.numpy_lora.forward import delta_weight, lora_init, merge, unmerge

lesson = lesson_module("03")
np.set_printoptions(precision=4, suppress=True)

# %% [markdown]
# ## 1 · Warm-up
#
# <!-- quiz: warm-up -->

# %% [markdown]
# **Rank, in six lines.** A column times a row is an *outer product*: a whole matrix from few numbers, of rank 1. A
# matrix of rank r is a sum of r of them, and not of fewer. `B A`, with B (out, r) and A (r, in), is such a sum: column
# i of B times row i of A, for i = 1 … r, so its rank is at most r. The SVD writes any matrix as such a sum with pieces
# at right angles, the largest first; their sizes are the *singular values* σ₁ ≥ σ₂ ≥ …, and their squares add up to
# the square of the matrix' norm. Keep the first r pieces: no matrix of rank r comes closer (Eckart and Young), and the
# error is the tail that you left out, √(σᵣ₊₁² + σᵣ₊₂² + …).

# %%
M = np.random.default_rng(0).normal(size=(6, 8))
U, sigma, Vh = np.linalg.svd(M, full_matrices=False)
for r in (1, 3, 6):
    cut = sum(sigma[i] * np.outer(U[:, i], Vh[i]) for i in range(r))  # r outer products
    error, tail = np.linalg.norm(M - cut), np.linalg.norm(sigma[r:])
    print(f"rank {np.linalg.matrix_rank(cut)}: the error is {error:.4f}, the tail {tail:.4f}")
    assert abs(error - tail) < 1e-12

# %% [markdown] tags=["slide"]
# ## 2 · The problem
#
# You have a trained layer and want it to do something slightly different. Its weight `W` is 4096 × 4096, as in a
# 7-billion-parameter model, which has 224 linear layers of this size and larger. To train `W` itself you hold its
# gradient and Adam's two averages beside it, each as large as `W`: three more matrices for every one you have. What you
# learn is a change `ΔW`, and a change of low rank can be written with far fewer numbers. So keep `W` still, learn the
# thin factors of the change, and be careful never to multiply them out.
#
# That is **LoRA**, low-rank adaptation: `ΔW = s · B A`, with `A` (r, in), `B` (out, r) and `s = alpha / r`. Only `A`
# and `B` are trained; together they are the *adapter*. `alpha` sets how strong the change is. Dividing by r keeps that
# strength comparable when you try another rank, because a sum of more outer products is larger.
#
# The number that hurts: **192 MiB** of gradient and optimizer state to nudge one 64 MiB matrix, and there are 224 of
# them.

# %%
W_bytes = 4096 * 4096 * 4
print("W in float32:", human_bytes(W_bytes), "  gradient + two moments:", human_bytes(3 * W_bytes))

# %% [markdown]
# ## 3 · Predict
#
# Place a bet before you read on: put your answer in `bet=`. It is settled in section 7, nobody else sees it, and a
# wrong one teaches more than a right one. Leave `None` to skip.

# %%
predict(
    "03.flops",
    "in = out = 4096, r = 8, and one row x. How many times as many multiplications does x (B A)ᵀ take as (x Aᵀ) Bᵀ?",
    bet=None,
)
predict(
    "03.zero",
    "A starts random and B starts at zero. Which gradient is exactly zero before the first step?",
    choices=["dA", "dB", "both", "neither"],
    bet=None,
)
predict(
    "03.r2",
    "The change to learn has rank 3 and singular values 3, 2, 1. We allow r = 2 and train for long. "
    "Which part of it (Frobenius norm, 0 to 1) remains unlearned?",
    bet=None,
)

# %% [markdown] tags=["slide"]
# ## 4 · The one picture
#
# A frozen **highway** and a narrow **bypass**. Every row of `x` takes both roads and they add up at `h`. The bypass
# squeezes `in` numbers into `r`, then spreads `r` numbers to `out`. There are two ways to compute it, and they differ
# only in where the brackets stand:
#
# ```
# (x Aᵀ) Bᵀ      two thin products; in between lies u = x Aᵀ with r numbers a row
# x (B A)ᵀ       first multiply the factors out, to something as large as W, for one use
# ```
#
# Run the cell and drag: when does the orange bar get short? Is there any setting in which forming `B A` first wins?


# %%
def draw(r, d, rows):
    return highway(BypassCost(rows=rows, in_features=d, out_features=d, r=r))


def finding(r, d, rows):
    cost = BypassCost(rows=rows, in_features=d, out_features=d, r=r)
    more, less = ("more", cost.ratio) if cost.ratio >= 1 else ("fewer", 1 / cost.ratio)
    return f"r = {r}, d = {d:,}, {rows:,} rows: forming B A first takes {less:,.3g} times {more} multiplications."


def in_words(r, d, rows):
    cost = BypassCost(rows=rows, in_features=d, out_features=d, r=r)
    between = [human_bytes(cost.scratch_bytes(formed=formed)) for formed in (False, True)]
    return (
        f"Two roads from x ({rows:,} × {d:,}) to h. The highway is a large square, the frozen {d:,} × {d:,} weight. "
        f"The bypass is A transposed, {d:,} × {r}, tall and thin, then B transposed, {r} × {d:,}, flat and wide. Bars "
        f"count multiplications: highway {cost.highway:,}; through the bottleneck {cost.through_bottleneck:,}; with B A"
        f" formed first {cost.formed_first:,}. In between, the first keeps {between[0]}, the second {between[1]}."
    )


# %%
picture = explorer(
    draw,
    alt=in_words,
    finding=finding,
    start={"r": 16, "d": 4096, "rows": 256},
    r=[1, 2, 4, 8, 16, 32, 64, 128, 256, 512],
    d=[512, 1024, 2048, 4096],
    rows=[1, 16, 256, 4096],
)

# %%
picture.strip(r=[1, 4, 16, 64])

# %% [markdown]
# The second half of the picture is about the *start*. Someone has to choose the first `A` and `B`. With random numbers
# or zeros for each there are four ways, and the first backward pass tells them apart before a single step is made. Here
# `‖s B A‖` is how far the new adapter moves the layer at once, and `‖dA‖`, `‖dB‖` are how strongly each factor is
# pulled.

# %%
rng = np.random.default_rng(3)
x, W = rng.normal(size=(32, 16)), rng.normal(size=(12, 16)) / 4
dy = rng.normal(size=(32, 12)) / 32
drawn = {"A": lora_init(4, 16, 12, rng)[0], "B": rng.uniform(-0.25, 0.25, size=(12, 4))}
starts = {}
for a in ("random", "= 0"):
    for b in ("= 0", "random"):
        A, B = (drawn[name] * (kind == "random") for name, kind in (("A", a), ("B", b)))
        _, dA, dB = layer1.lora_backward(dy, x, W, A, B, alpha=8.0)
        arrays = {"‖s B A‖": delta_weight(A, B, 8.0), "‖dA‖": dA, "‖dB‖": dB}
        starts[f"A {a}, B {b}"] = {name: float(np.linalg.norm(array)) for name, array in arrays.items()}
usual = starts["A random, B = 0"]
assert usual["‖dA‖"] == 0 < usual["‖dB‖"]
show(
    first_step(starts),
    alt="A table of four ways to start: the size of the update and of the gradients of A and B before the first step. "
    "A random and B zero: update and gradient of A exactly 0, gradient of B not. Both random: nothing is zero, the "
    "layer is disturbed at once. Both zero: all exactly 0. A zero and B random: update and gradient of B exactly 0.",
    finding="One factor must start at zero so that nothing is disturbed, and only one, or nothing ever moves.",
)

# %% [markdown] tags=["slide"]
# ## 5 · Derivation
#
# One layer, `n` rows at once. Write the shape beside every letter, and most of the derivation does itself.
#
# | letter | shape | what it is |
# |---|---|---|
# | `x` | (n, in) | the rows that come in |
# | `W` | (out, in) | the frozen weight |
# | `A`, `B` | (r, in), (out, r) | the two factors that are trained |
# | `s = alpha / r` | a number | how loud the bypass is |
# | `u = x Aᵀ` | (n, r) | the narrow middle |
# | `h = x Wᵀ + s · u Bᵀ` | (n, out) | what goes out |
# | `dy` | (n, out) | ∂loss/∂h, handed to us by the layer above |
#
# The rule behind all of backpropagation, in one line: if everything moves a little, the loss moves by the sum of `dy`
# times the movement of `h`. Move the four things one at a time.
#
# ```
# what moves  what that moves   and the loss by                            so
# δB          h by s · u δBᵀ    Σ dy · (s u δBᵀ) = Σ δB · (s dyᵀ u)        dB = s · dyᵀ u
# δu          h by s · δu Bᵀ    Σ dy · (s δu Bᵀ) = Σ δu · (s dy B)         du = s · dy B
# δA          u by x δAᵀ        Σ du · (x δAᵀ)   = Σ δA · (duᵀ x)          dA = duᵀ x
# δx          h by δx Wᵀ,       Σ dy · (δx Wᵀ) + Σ du · (δx Aᵀ)
#             and u by δx Aᵀ                     = Σ δx · (dy W + du A)    dx = dy W + du A
# ```
#
# **Shapes as a check.** `dB` must have the shape of `B`, (out, r). From `dy` (n, out) and `u` (n, r) there is one
# product of that shape: `dyᵀ u`. The rows of the batch disappear in it: they are *summed*. If you remember nothing
# else, this gets you home.
#
# **What is stored.** The backward pass needs `x` and the thin `u`, nothing as large as `W`; and `W` itself, but only to
# let the gradient pass to the layers below. Frozen means that `W` gets no gradient. It does not mean that the gradient
# skips it.
#
# **Who learns first.** Put `B = 0` into `du = s · dy B`: it is zero, so `dA` is zero. `dB` needs `u = x Aᵀ`, which is
# not. The first step moves only `B`; from the second on both move.
#
# **One example by hand**: in = 3, out = 2, r = 1, one row, alpha = 2, so s = 2. Take a pencil before you run it.
#
# ```
# x = [1 2 3]     W = [1 0 0]     A = [1 0 1]     B = [ 1]     dy = [1 2]
#                     [0 1 0]                         [-1]
#
# u  = 1 + 3 = 4                               h  = [1 2] + 2 · 4 · [1 -1] = [9 -6]
# du = 2 · (1·1 + 2·(-1)) = -2                 dB = 2 · [1 2]ᵀ · 4         = [8 16]ᵀ
# dA = -2 · [1 2 3] = [-2 -4 -6]               dx = [1 2 0] + (-2) · [1 0 1] = [-1 2 -2]
# ```

# %%
x1, dy1 = np.array([[1.0, 2, 3]]), np.array([[1.0, 2]])
W1, A1, B1 = np.array([[1.0, 0, 0], [0, 1, 0]]), np.array([[1.0, 0, 1]]), np.array([[1.0], [-1]])
by_hand = {"h": [[9, -6]], "dx": [[-1, 2, -2]], "dA": [[-2, -4, -6]], "dB": [[8], [16]]}

computed = {"h": layer1.lora_forward(x1, W1, A1, B1, alpha=2.0)}
computed["dx"], computed["dA"], computed["dB"] = layer1.lora_backward(dy1, x1, W1, A1, B1, alpha=2.0)
for name, value in by_hand.items():
    assert np.array_equal(computed[name], value), name
    print(f"{name:>2} = {computed[name].tolist()}   as by hand")

# %% [markdown]
# ## 6 · Build it
#
# Three functions. `check` tries yours on random inputs and on properties that any right answer has; it says what came
# back and, if it knows the mistake, its name. What follows uses *your* function where it passes, else the reference,
# and says which. Stuck? Run `hint("03.1")` in a new cell, as often as there are steps.
#
# **03.1 · The forward pass.** The arrays that `check` passes in keep a log of every array made from them. One of the
# shape of `W` is found out.


# %%
def lora_forward(x, W, A, B, alpha):
    """h = x Wᵀ + (alpha / r) · (x Aᵀ) Bᵀ, without ever making an array as large as W."""
    # BEGIN SOLUTION
    r = len(A)
    return x @ W.T + (alpha / r) * (x @ A.T) @ B.T
    # END SOLUTION


forward = check("03.1", lora_forward).function

# %% [markdown]
# **03.2 · The backward pass.** Translate the four lines of the derivation. The check compares with **central
# differences**: move one entry a step up and a step down, and see how the loss changes. It answers as a lab book would,
# for each gradient: *exact* (bit for bit), *approximate* (within rounding), and the largest difference.
#
# A curiosity: the check's step is 1, not the usual 0.00001. The loss it uses, Σ dy · h, is a straight line along every
# single entry of x, A and B, and on a straight line a difference is right at any step.


# %%
def lora_backward(dy, x, W, A, B, alpha):
    """From dy = ∂loss/∂h to dx, dA and dB."""
    # BEGIN SOLUTION
    s = alpha / len(A)
    u = x @ A.T  # (n, r)
    du = s * dy @ B  # (n, r)
    return dy @ W + du @ A, du.T @ x, s * dy.T @ u
    # END SOLUTION


backward = check("03.2", lora_backward).function

# %% [markdown]
# **03.3 · Learn a planted change.** A teacher layer has the weight `W + ΔW`, where `ΔW` has rank 3. You see batches of
# its inputs and outputs, and you have `W`. Each batch is one step of SGD on the loss ½ ‖h − y‖², averaged over the
# rows, so `dy = (h − y) / n`. Use `forward` and `backward` from above, and leave the arrays you are given as they are.


# %%
def train(batches, W, A, B, alpha, lr):
    """A and B after one step of SGD for each batch (x, y)."""
    # BEGIN SOLUTION
    for x, y in batches:
        dy = (forward(x, W, A, B, alpha) - y) / len(x)
        _, dA, dB = backward(dy, x, W, A, B, alpha)
        A = A - lr * dA
        B = B - lr * dB
    return A, B
    # END SOLUTION


fit = check("03.3", train).function

# %% [markdown]
# ## 7 · Run it, then settle the bets
#
# **Multiplications, counted, not computed.** The same logging arrays as in the check, on a layer of the real size.

# %%
d, r = 4096, 8
(x, A, B), log = watch(np.ones((1, d)), *(np.ones(shape) for shape in ((r, d), (d, r))))
(x @ A.T) @ B.T
thin, largest_thin = log.multiplications, log.largest
x @ (B @ A).T
formed, largest_formed = log.multiplications - thin, log.largest
print(f"(x Aᵀ) Bᵀ  {thin:>12,} multiplications, largest new array {largest_thin}")
print(f"x (B A)ᵀ   {formed:>12,} multiplications, largest new array {largest_formed}")
cost = BypassCost(rows=1, in_features=d, out_features=d, r=r)
assert (thin, formed) == (cost.through_bottleneck, cost.formed_first)  # the picture told the truth
settle("03.flops", formed / thin)

# %% [markdown]
# **The first gradients**, from your own backward pass, of a new adapter.

# %%
rng = np.random.default_rng(7)
A, B = lora_init(4, in_features=16, out_features=12, rng=rng)
x, y, W = rng.normal(size=(32, 16)), rng.normal(size=(32, 12)), rng.normal(size=(12, 16)) / 4
_, dA, dB = backward((forward(x, W, A, B, alpha=8.0) - y) / 32, x, W, A, B, alpha=8.0)
zero = {"dA": not dA.any(), "dB": not dB.any()}
print("before the first step:", {name: "exactly 0" if is_zero else "not 0" for name, is_zero in zero.items()})
settle("03.zero", "both" if all(zero.values()) else next((name for name in zero if zero[name]), "neither"))

# %% [markdown]
# **The planted change.** Rank 3, singular values 3, 2, 1. We train adapters with r = 1, 2, 3 and 4 on the same batches.
# By Eckart and Young (section 1) no matrix of rank r can come closer than the tail of the singular values: those floors
# are the dashed lines.

# %%
rng = np.random.default_rng(11)
in_features, out_features, every = 16, 12, 10
W = rng.normal(size=(out_features, in_features)) / np.sqrt(in_features)
planted = lesson.planted_update(rng, out_features, in_features)
batches = [(x, x @ (W + planted).T) for x in rng.normal(size=(400, 32, in_features))]
size = np.linalg.norm(planted)
errors, adapters = {}, {}
for r in (1, 2, 3, 4):
    A, B = lora_init(r, in_features, out_features, np.random.default_rng(r))
    errors[r] = [1.0]
    for start in range(0, len(batches), every):
        A, B = fit(batches[start : start + every], W, A, B, 2.0 * r, 0.05)
        errors[r].append(float(np.linalg.norm(delta_weight(A, B, 2.0 * r) - planted) / size))
    adapters[r] = A, B
floors = {r: float(np.linalg.norm([3, 2, 1][r:]) / size) for r in errors}

# %%
show(
    recovery(errors, floors, every),
    alt="Relative error of the learned change against the step of SGD, on a log scale, for r = 1 to 4. With r = 1 it "
    "stays near 0.6, with r = 2 near 0.27, each on its dashed floor. With r = 3 and 4 it falls in a straight line.",
    finding="Too small a rank stops at Eckart and Young's floor; enough rank gets all of it, and more is no better.",
)
for r in errors:
    print(f"r = {r}: the error ends", f"at {errors[r][-1]:.3f}" if r < 3 else "below 1e-9", f"  floor {floors[r]:.3f}")
assert errors[3][-1] < 1e-9 and errors[4][-1] < 1e-9
assert all(floors[r] <= errors[r][-1] < 1.1 * floors[r] for r in (1, 2))
settle("03.r2", errors[2][-1])

# %% [markdown]
# **Rank and parameter counts.** What was learned has the rank it was allowed, or the rank it needed, whichever is
# smaller: the fourth direction of r = 4 stays empty. On the right, what the same ranks cost on a real 4096 × 4096
# layer.

# %%
print("r   rank of s B A   singular values                 on 4096 × 4096: parameters  share of W  as float32")
for r, (A, B) in adapters.items():
    values = np.linalg.svd(delta_weight(A, B, 2.0 * r), compute_uv=False)
    rank = int(np.sum(values > 1e-6 * values[0]))
    assert rank == min(r, 3)
    cost = BypassCost(rows=1, in_features=4096, out_features=4096, r=r)
    shown = " ".join(f"{value:.3f}" for value in values[:5])
    print(
        f"{r}   {rank:<15} {shown}   {cost.trainable:>26,}  {cost.share:>10.3%}  {human_bytes(4 * cost.trainable):>10}"
    )

# %% [markdown]
# **Merging.** After training, the bypass can be folded into the highway: `W′ = W + s B A`. One product instead of
# three, the same answer up to the last digits, and the adapter can be taken out again.

# %%
A, B = adapters[3]
x = rng.normal(size=(64, in_features))
live, merged = forward(x, W, A, B, 6.0), x @ merge(W, A, B, 6.0).T
effect = np.linalg.norm(live - x @ W.T)
assert np.linalg.norm(merged - live) < 1e-13 * effect
print("merged against live: the difference is below 1e-13 of the adapter's effect")

back = unmerge(merge(W, A, B, 6.0), A, B, 6.0)
assert np.max(np.abs(back - W)) < 1e-14
print("merge, then unmerge: W returns to within 1e-14; bit for bit:", np.array_equal(back, W))

# %% [markdown]
# The last line is a warning in small print: floating-point addition forgets, so subtraction does not bring `W` back to
# the bit. In float64 that is a curiosity; in 16 bits it becomes a bug that people file. Lesson 09 is about it.

# %% [markdown] tags=["slide"]
# ## 8 · Break it
#
# Four patients, all from real notebooks. Each trained the planted change with one mistake inside. Broad grey is a
# healthy run, dashed is the patient's. Before you open the diagnosis: *which bug is this?*

# %%
case = lesson.training_inputs(np.random.default_rng(5), steps=300)


def losses(train, every=5):
    """The loss on a fixed batch, every few steps; it stops where the training runs off."""
    (x, y), A, B, seen = case["batches"][-1], case["A"], case["B"], []
    for start in range(0, len(case["batches"]), every):
        seen.append(0.5 * float(np.sum((layer1.lora_forward(x, case["W"], A, B, case["alpha"]) - y) ** 2)) / len(x))
        if seen[-1] > 1e6:
            break
        A, B = train(case["batches"][start : start + every], case["W"], A, B, case["alpha"], case["lr"])
    return seen


# %%
healthy = losses(lesson.train)
curves = {name: losses(train) for name, train in lesson.patients().items()}
show(
    symptoms(healthy, curves, every=5),
    alt="Four panels of loss against step on a log scale, each with the healthy run in grey, which falls in a "
    "straight line. Patient 1 shoots up at once. Patient 2 stays on a plateau where it began. Patient 3 falls "
    "too, but more slowly. Patient 4 lies exactly on the healthy run.",
    finding="One explodes, one stalls, one dawdles, and one looks perfectly healthy.",
)
assert curves["4"] == healthy

# %% [markdown]
# <details><summary><b>Patient 1</b>, who exploded</summary>
#
# The loss was averaged over the rows, the gradient was not: it is 32 times too long, and so is each step. The sign of
# it: everything works with a batch of one, and larger batches "need" smaller learning rates.
# </details>
#
# <details><summary><b>Patient 2</b>, who stalled</summary>
#
# Only `B` is trained; `A` stays as it was drawn. `B A` can then only have rows that are mixtures of `A`'s three random
# rows, and the planted change has others. In PyTorch this happens when `A` never reaches the optimizer, or when a cast
# cuts it from the graph.
# </details>
#
# <details><summary><b>Patient 3</b>, who dawdles</summary>
#
# The forward pass has `alpha / r`, the backward pass forgot it. The direction is right, the length is not: here s = 2,
# so it walks at half the pace. Nothing crashes, and somebody will "fix" it by tuning the learning rate.
# </details>
#
# <details><summary><b>Patient 4</b>, who looks healthy</summary>
#
# `dx` lacks the bypass' part. With a single layer nobody asks for `dx`, so the curve is the healthy one, to the bit. In
# a deep network every layer below this one trains on a wrong gradient. No loss curve shows it; the differences of
# exercise 03.2 do, in one line.
# </details>
#
# The check knows all four by name:

# %%
for exercise_id, name in lesson.PATIENTS.values():
    exercise = find_exercise(exercise_id)
    diagnosis = examine(exercise, exercise.bug(name)).failure.bug
    assert diagnosis.name == name
    print(f"{exercise_id}  {diagnosis.name}: {diagnosis.why}")

# %% [markdown]
# And two that do not need a plot. The first stops you at once on a 12 → 7 layer and **not at all** on a square one: `x
# @ W` instead of `x @ W.T`. Test on shapes that are all different. The second is patient 4, caught.

# %%
given = lesson.backward_inputs(np.random.default_rng(0))
dy, x, W, A, B = (given[name] for name in ("dy", "x", "W", "A", "B"))
with expect_bug(ValueError, match="size 7 is different from 12"):
    x @ W + (8.0 / 3) * (x @ A.T) @ B.T

square = np.random.default_rng(1).normal(size=(12, 12))
away = np.linalg.norm(x @ square - x @ square.T) / np.linalg.norm(x @ square.T)
print(f"a square W: no error, and an output that is {away:.0%} away from the right one")

wrong_dx, _, _ = find_exercise("03.2").bug("no bypass in dx")(*given.values())
measured = dict(lesson.central_differences(given))
with expect_bug(AssertionError, match="Not equal to tolerance"):
    np.testing.assert_allclose(wrong_dx, measured["dx"], rtol=1e-9)

# %% [markdown]
# ## 9 · Check the claims
#
# Sentences from articles about LoRA that you are likely to meet, each with the code that decides it. Not because their
# authors are careless: because these numbers are copied from text to text and hardly ever computed. The code lies
# beside this lesson, in `claims.py`; the one on rank 64 reads:

# %%
print(inspect.getsource(lesson_module("03", "claims").rank_64))

# %%
show_claims("03")

# %% [markdown]
# A verdict is not typed in and believed: it must follow from the code, or this notebook fails. *Holds when* means that
# some of the cases hold. All articles' claims together are in `CLAIMS.md`, at the top of the repository.
#
# ## 10 · Exercises
#
# **Core** (checked, in section 6):

# %%
overview("03")

# %% [markdown]
# **Stretch: row norms without the matrix.** A relative of LoRA, DoRA, needs the norm of every row of `W + s B A` at
# every step. Forming `B A` for it would bring back everything this lesson avoided. Expand the square of a sum and every
# term can be had from thin products:
#
# ```
# ‖wᵢ + s bᵢ A‖² = ‖wᵢ‖² + 2 s · (wᵢ Aᵀ) · bᵢ + s² · bᵢ (A Aᵀ) bᵢᵀ
# ```
#
# The target is not pass or fail: reach the right norms with the **smallest largest array** you can. `W**2` is as large
# as `W`; is there a way round it?


# %%
def row_norms(W, A, B, s):
    """The Euclidean norm of each row of W + s B A."""
    # BEGIN SOLUTION
    own = np.einsum("oi,oi->o", W, W)
    cross = np.einsum("or,or->o", W @ A.T, B)
    change = np.einsum("or,rq,oq->o", B, A @ A.T, B)
    return np.sqrt(own + 2 * s * cross + s**2 * change)
    # END SOLUTION


(W, A, B), log = watch(*(np.random.default_rng(2).normal(size=shape) for shape in ((200, 300), (4, 300), (200, 4))))
yours = row_norms(W, A, B, 0.5)
if yours is not None:
    right = np.linalg.norm(np.asarray(W) + 0.5 * np.asarray(B) @ np.asarray(A), axis=1)
    print(f"right: {np.allclose(yours, right)}; largest array that was made: {log.largest}; W is {W.shape}")

# %% [markdown]
# **Explain** (a few sentences each; the instructor's notes have a rubric with sample answers):
#
# 1. A colleague says: "W is frozen, so the backward pass does not need it, and I can unload it to save memory." Where
#    is the mistake?
# 2. Somebody starts with `A = 0` and `B` random, to be different. Is anything lost? What is the first step like?
# 3. You double r and keep alpha. What happens to the size of the first change of the layer's output, and why is "alpha
#    / r" not the last word on it?

# %% [markdown]
# ## 11 · The same in PEFT
#
# PEFT is the library that most people use. If it is installed, the next cell builds its layer with our `W`, `A` and
# `B`, lets autograd do the backward pass, trains it with torch's SGD on the same batches, and compares with the
# functions you wrote.

# %%
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT loads it, and it remarks on the processor
has_peft = all(importlib.util.find_spec(name) for name in ("peft", "torch"))
if has_peft:
    import torch
    from peft import LoraConfig, get_peft_model

    case = lesson.training_inputs(np.random.default_rng(5), steps=300)
    model = torch.nn.Sequential(torch.nn.Linear(16, 12, bias=False)).double()
    model = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=["0"]))
    layer = model.base_model.model[0]
    theirs = {"A": layer.lora_A.default.weight, "B": layer.lora_B.default.weight}
    with torch.no_grad():
        layer.base_layer.weight.copy_(torch.from_numpy(case["W"]))
        for name in ("A", "B"):
            theirs[name].copy_(torch.from_numpy(case[name]))
    optimizer = torch.optim.SGD(theirs.values(), lr=case["lr"])
    for x, y in case["batches"]:
        loss = 0.5 * (model(torch.from_numpy(x)) - torch.from_numpy(y)).square().sum() / len(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
else:
    print("PEFT is not installed: pip install peft, and run this cell again")

# %%
if has_peft:
    A, B = fit(*(case[name] for name in ("batches", "W", "A", "B", "alpha", "lr")))
    ours = {"A": A, "B": B}
    for name in "AB":
        away = np.max(np.abs(theirs[name].detach().numpy() - ours[name])) / np.max(np.abs(ours[name]))
        assert away < 1e-12
        print(f"{name} after 300 steps of SGD: PEFT's and ours differ by less than 1e-12 of the largest entry")
    x = case["batches"][0][0]
    away = np.max(np.abs(model(torch.from_numpy(x)).detach().numpy() - forward(x, case["W"], A, B, 6.0)))
    assert away < 1e-12
    print("and the layers' outputs by less than 1e-12")

# %% [markdown]
# ## 12 · Interview questions
#
# <details><summary>Why does B start at zero and A not? Could it be the other way round?</summary>
#
# One factor at zero makes `B A = 0`, so training starts from exactly the pretrained layer; the other must not be zero,
# or both gradients vanish. The other way round works too, with the roles of `dA` and `dB` exchanged. *A weak answer*
# stops at "so that nothing changes at first" and forgets that something has to move.
# </details>
#
# <details><summary>How much slower is a layer with an unmerged adapter?</summary>
#
# In multiplications: `r (in + out) / (in · out)`, 0.78 % at r = 16 on 4096 × 4096. In time it is more, because two
# small products cost more than their share: each has to be started and reads all of x or writes all of h again. *A weak
# answer* gives one number without saying which of the two it is.
# </details>
#
# <details><summary>Which activations must be kept for the backward pass of a LoRA layer?</summary>
#
# `x`, for `dA`; and `u = x Aᵀ`, r numbers a row, for `dB` (or compute it again). LoRA saves gradients and optimizer
# states of `W`. It does not save activations: `x` was kept before and is kept now. *A weak answer* claims that LoRA
# shrinks activation memory.
# </details>
#
# <details><summary>The weight is frozen. Why is it needed in the backward pass?</summary>
#
# For `dx = dy W + du A`: the layers below wait for it. *A weak answer* confuses "needs no gradient" with "takes no
# part". (The lowest adapted layer needs no `dx`, and autograd skips it there.)
# </details>
#
# <details><summary>Your gradients pass a check at 1e-3. Is that good?</summary>
#
# In float64, for this layer, no: the loss is a straight line along each entry, so differences agree to 1e-13, and 1e-3
# is a bug. A tolerance needs a reason: which rounding, which truncation. *A weak answer* says "close enough".
# </details>

# %% [markdown]
# ## 13 · Recap
#
# `W` (out, in) frozen · `A` (r, in), `B` (out, r) trained · `s = alpha / r` · `u = x Aᵀ` · `h = x Wᵀ + s · u Bᵀ` · `ΔW
# = s · B A`
#
# Five lines to carry forward:
#
# 1. Brackets are a decision: `(x Aᵀ) Bᵀ` costs `r (in + out)` a row and makes nothing as large as `W`.
# 2. `du = s dy B`, `dB = s dyᵀ u`, `dA = duᵀ x`, `dx = dy W + du A`: four products, each the only one with the right
#    shape.
# 3. One factor starts at zero, the other does not; the first step moves only the zero one.
# 4. What you can learn is what rank r can reach: below the rank of the change, Eckart and Young's floor.
# 5. A gradient is checked by differences, not by a loss curve: the worst bug of this lesson had a perfect one.
#
# Further reading: [LoRA, section 4](https://arxiv.org/abs/2106.09685), for the four sentences in which all this is
# introduced; [Intrinsic dimensionality](https://arxiv.org/abs/2012.13255), for why a low rank may be enough;
# [DoRA](https://arxiv.org/abs/2402.09353), for where the row norms of the stretch exercise are used.
#
# ### Before you go
#
# <!-- quiz: exit -->
