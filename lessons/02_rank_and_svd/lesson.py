# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 02 · Rank and SVD: how much of a matrix is there?
#
# * **You will be able to** *split* any matrix into outer products, the largest first, and *cut* it to rank r; *say*
#   how large the error is before you look at the copy; *measure* how much rank a change of a weight really uses.
# * **You need** matrix products and transposes, and that the norm ‖M‖ is the root of the sum of all squared entries.
#   From lesson 01 (The bill): what a number in a weight costs.
# * **Minutes**: read 30 · exercises 25 · stretch and explain 25.
# * **Runs on** any CPU in under a minute; NumPy is enough, but for section 11. No GPU. Section 7 reads three weights
#   of the small language model that the set-up has fetched.

# %% [markdown] tags=["solution"]
# This is the full notebook, with every answer. The one with blanks for you is `student/02_rank_and_svd.ipynb`.

# %% [markdown] tags=["student"]
# This is your notebook: fill in the lines that say `...  # your code`. Building the course again never writes over a
# notebook that somebody has edited. The answers are in `02_rank_and_svd.ipynb`, one folder up.

# %% tags=["setup"]
import importlib.util
import logging

import numpy as np
from safetensors import safe_open

from minilora.classroom import small_network as small
from minilora.classroom.bets import predict, settle
from minilora.classroom.claims import show_claims
from minilora.classroom.costs import human_bytes
from minilora.classroom.evidence import expect_bug
from minilora.classroom.exercises import check, examine, find_exercise, overview
from minilora.classroom.exercises import hint  # noqa: F401  for you: hint("02.1")
from minilora.classroom.explorer import explorer, show
from minilora.classroom.lessons import lesson_module
from minilora.classroom.pictures.copies import copies, copy_errors
from minilora.classroom.pictures.energy import energy_curves, energy_held
from minilora.classroom.pictures.low_rank import Cut, low_rank, planted_change
from minilora.llm import smollm2
from minilora.numpy_lora import rank as layer1

lesson = lesson_module("02")
np.set_printoptions(precision=4, suppress=True)

# %% [markdown]
# ## 1 · Warm-up
#
# <!-- quiz: warm-up -->

# %% [markdown] tags=["slide"]
# ## 2 · The problem
#
# A hundred customers, one model, and each has it fine-tuned on their own texts. What you keep for a customer is the
# difference: `ΔW`, the weight after training less the weight before. It has as many numbers as the weight, and next to
# none of them is zero, so no zip file makes it much smaller. Yet the customers asked for little: another tone, a form
# to be filled in. If what was learned is little, a hundred full matrices are the wrong way to write it down.
#
# The number that hurts: for **one** 4096 × 4096 weight the hundred differences take **3.12 GiB** in 16 bits. Each
# written as the product of two thin matrices, 4096 × 8 and 8 × 4096, they take 12.5 MiB.

# %%
d, r, customers, bytes_each = 4096, 8, 100, 2
whole, thin = (customers * bytes_each * numbers for numbers in (d * d, d * r + r * d))
print(f"100 changes of one {d} × {d} weight: {human_bytes(whole)}; as two thin factors: {human_bytes(thin)}")
assert whole == 256 * thin

# %% [markdown]
# When is that allowed? It depends on one property of the change, its *spectrum*, and this lesson is about how to see
# it. Two ideas: **a matrix is a sum of pieces, and the best short copy keeps the largest**; and **a weight uses all its
# pieces, but a change need not**.
#
# ## 3 · Predict
#
# Place a bet before you read on: put your answer in `bet=`. It is settled in section 7, nobody else sees it, and a
# wrong one teaches more than a right one. Leave `None` to skip. "Pieces" are what section 4 shows: every matrix is a
# sum of simple pieces at right angles, as many as its shorter side, sorted by size. "Size" is the norm, the root of the
# sum of all squared entries.

# %%
predict(
    "02.error",
    "A matrix consists of three pieces of the sizes 4, 2 and 1. We keep the largest piece only. How large is the "
    "error, as a share of the size of the matrix (0 to 1)?",
    bet=None,
)
predict(
    "02.weight",
    "A weight of a real language model is 576 × 576: 576 pieces. How many of them, the largest, hold 90 % of the sum "
    "of its squared entries?",
    bet=None,
)
predict(
    "02.change",
    "A small network with a 64 × 64 weight is fine-tuned to answer one new question, all weights free to move. How "
    "many of the 64 pieces of the *change* hold 90 % of the sum of its squared entries?",
    bet=None,
)

# %% [markdown] tags=["slide"]
# ## 4 · The one picture
#
# Above: a change ΔW, a copy of it made of r pieces (its *rank* is r), and what is left over. Blue is negative, white
# zero, orange positive. Below: the first three *pieces*. A piece is a column times a row, so all its rows are multiples
# of one row: you see stripes. The copy is the sum of the first r pieces. To the right: the sizes of all pieces, largest
# first, called *singular values*, with the cut at r; and the *energy*, the sum of all squared entries, cut at the same
# place. What lies behind the cut is the *tail*.
#
# Run the cell and drag. `r` moves the cut. `decay` is how much smaller each piece is than the one before it. `noise`
# lays a carpet over everything. Three questions: with `decay` at 0.3, how many pieces do you need until you cannot see
# the rest? Where does the row of sizes bend when you turn `noise` up, and what are you copying to the right of the
# bend? With `decay` at 0.98, is there a good place to cut?


# %%
def draw(r, decay, noise):
    return low_rank(Cut(planted_change(decay, noise), r))


def finding(r, decay, noise):
    cut = Cut(planted_change(decay, noise), r)
    return (
        f"r = {r}: {cut.numbers:,} numbers instead of {cut.M.size:,}; the tail holds {cut.tail:.2%} of the energy, "
        f"so the error is √{cut.tail:.4f} = {cut.error:.3f} of ‖ΔW‖."
    )


def in_words(r, decay, noise):
    cut = Cut(planted_change(decay, noise), r)
    first = ", ".join(f"{value:.2g}" for value in cut.sigma[:5])
    return (
        f"Heat maps of a 24 × 36 change, of its copy of rank {r}, which shows its large features, and of the rest, "
        f"whose norm is {cut.error:.2g} of the change's. Below, three striped pieces, those beyond r crossed out. "
        f"Right: 24 singular values on a log scale, beginning {first} and ending at {cut.sigma[-1]:.1g}, discs up to "
        f"{r}, crosses behind. A bar of the energy: {1 - cut.tail:.1%} kept, {cut.tail:.1%} tail, the error squared."
    )


# %%
picture = explorer(
    draw,
    alt=in_words,
    finding=finding,
    start={"r": 3, "decay": 0.5, "noise": 0.05},
    r=(1, 24),
    decay=[0.3, 0.5, 0.7, 0.9, 0.98],
    noise=[0.0, 0.05, 0.2, 1.0],
)

# %%
picture.strip(r=[1, 2, 4, 8])

# %% [markdown]
# Two things to take from it. The error is known **before** the copy is made: it is the root of the tail. And the row
# of sizes, the *spectrum*, says where the message ends and the noise begins, if it falls fast and then bends into a
# flat carpet.

# %% [markdown] tags=["slide"]
# ## 5 · Derivation
#
# | letter | shape | what it is |
# |---|---|---|
# | `M` | (out, in) | any matrix; soon a change `ΔW` |
# | `n = min(out, in)` | a number | the shorter side |
# | `uᵢ`, `vᵢ` | (out,), (in,) | directions: length 1, all `uᵢ` at right angles, all `vᵢ` too |
# | `σ₁ ≥ σ₂ ≥ … ≥ σₙ ≥ 0` | n numbers | the *singular values*: the spectrum |
# | `B`, `A` | (out, r), (r, in) | two factors, `B A` is a copy of `M` |
#
# **An outer product** is a column times a row, `u vᵀ`: a whole matrix from `out + in` numbers. All its rows are
# multiples of `v`, all its columns multiples of `u`. Its *rank* is 1.
#
# **Rank.** A matrix has rank r if it is a sum of r outer products, and not of fewer. `B A` is such a sum: column i of
# `B` times row i of `A`, for i = 1 … r. So the rank of `B A` is at most r, whatever stands in the factors.
#
# **The SVD** (singular value decomposition) writes any matrix as such a sum, with pieces at right angles:
#
# ```
# M = σ₁ u₁v₁ᵀ + σ₂ u₂v₂ᵀ + … + σₙ uₙvₙᵀ       NumPy: U, sigma, Vt = np.linalg.svd(M)
#                                             uᵢ = U[:, i-1],  vᵢ = Vt[i-1], a row
# ```
#
# **Energy.** Pieces at right angles obey Pythagoras, so squares add up:
#
# ```
# ‖M‖² = σ₁² + σ₂² + … + σₙ²                  the energy: the sum of all squared entries
# ```
#
# **The cut.** Keep the first r pieces. What you left out is a sum of pieces at right angles too, so
#
# ```
# ‖M − copy‖² = σᵣ₊₁² + … + σₙ²               error squared = energy of the tail
# ```
#
# **Why nothing of rank r is nearer.** Take *any* `B A` of rank r. The r + 1 directions v₁ … vᵣ₊₁ span a space with one
# dimension more than `A` has rows, so some direction x of length 1 in it is sent to zero by `A`. There the copy gives
# 0, while `M` gives something at least σᵣ₊₁ long. So every copy of rank r misses at least σᵣ₊₁ in some direction, and
# the cut misses exactly that. Eckart and Young proved in 1936 that the cut is best for the sum of squares as well: no
# matrix of rank r has a smaller error than the tail.
#
# **How much rank is used?** After any training every σᵢ is a little above zero: the rank is n and says nothing. Ask for
# the energy instead. The *effective rank* is the smallest k whose first k pieces hold a given share of it, such as
# 99 %.
#
# **When it pays.** Two factors hold `r (out + in)` numbers, the matrix `out · in`. Where are they equal? That is
# exercise 02.3.

# %% [markdown]
# **By hand**: out = 2, in = 3. Take a pencil before you run it.
#
# ```
# M = [4 5 2]      u₁ = [1  1]/√2     v₁ = [1 2  2]/3      σ₁ = 6√2,  σ₁² = 72
#     [0 3 6]      u₂ = [1 -1]/√2     v₂ = [2 1 -2]/3      σ₂ = 3√2,  σ₂² = 18
#
# piece 1 = [2 4 4]      piece 2 = [ 2  1 -2]      their sum is M
#           [2 4 4]                [-2 -1  2]
#
# energy     4² + 5² + 2² + 0² + 3² + 6² = 90 = 72 + 18
# copy of rank 1: piece 1, as B = [2 2]ᵀ, A = [1 2 2]; it keeps 72/90 = 80 % of the energy
# error² = 2² + 1² + 2² + 2² + 1² + 2² = 18 = σ₂²
# ```

# %%
M1 = np.array([[4.0, 5, 2], [0, 3, 6]])
piece1, piece2 = np.outer([2, 2], [1, 2, 2]), np.outer([1, -1], [2, 1, -2])
U, sigma, Vt = np.linalg.svd(M1, full_matrices=False)
assert np.array_equal(piece1 + piece2, M1)
assert np.allclose(sigma**2, [72, 18]) and np.isclose(np.linalg.norm(M1) ** 2, 90)
assert np.allclose(sigma[0] * np.outer(U[:, 0], Vt[0]), piece1)
print("squares of the singular values:", sigma**2, "  energy:", np.sum(M1**2))
print(f"share of the first piece: {energy_held(M1)[0]:.2f}   error squared:", np.sum((M1 - piece1) ** 2))

# %% [markdown]
# (NumPy may give u₁ and v₁ both with the opposite sign. Their product is the same.)
#
# **Where the pieces of a change come from.** A layer computes `h = x Wᵀ`. For one row x the gradient of the loss with
# respect to `W` is `dyᵀ x`, where `dy` is how the loss reacts to h: *a column times a row*. Lesson 03 derives it. So
# training writes a change as a sum of outer products, one for every row it has seen:
#
# ```
# ΔW = −lr · (dy₁ᵀ x₁ + dy₂ᵀ x₂ + …)       one row: rank 1.  a thousand rows: up to n
# ```
#
# If all rows ask for the same thing, their `dy` point the same way, and a thousand pieces are nearly one. If every row
# asks for something else, the sum fills all n directions. **Mathematics does not make a change low-rank: the task does,
# or does not.** (This is SGD. Adam divides every entry by a size of its own, so its changes are no such sum.)

# %%
rng = np.random.default_rng(0)
x, W = rng.normal(size=(200, 20)), rng.normal(size=(30, 20))
same = np.outer(x @ rng.normal(size=20), rng.normal(size=30))  # every row asks for one direction, more or less of it
own = rng.normal(size=(200, 30))  # every row asks for a direction of its own
for name, dy in {"one row": same[:1], "200 rows, one wish": same, "200 rows, 200 wishes": own}.items():
    gradient = dy.T @ x[: len(dy)]
    print(f"{name:<21} rank of the gradient: {np.linalg.matrix_rank(gradient):>2} of {min(W.shape)}")
assert np.linalg.matrix_rank(same.T @ x) == 1 and np.linalg.matrix_rank(own.T @ x) == 20

# %% [markdown]
# ## 6 · Build it
#
# Three functions. `check` tries yours on random inputs and on properties that any right answer has; it says what came
# back and, if it knows the mistake, its name. What follows uses *your* function where it passes, else the reference,
# and says which. Stuck? Run `hint("02.1")` in a new cell, as often as there are steps.
#
# **02.1 · The best copy of rank r**, as two factors: the product would be as large as `M` again. How the sizes σ are
# shared between the two is yours to choose. The check lets two hundred competitors loose on your copy.


# %%
def best_rank_r(M, r):
    """B (out, r) and A (r, in), so that B A is the matrix of rank r nearest to M."""
    # BEGIN SOLUTION
    U, sigma, Vt = np.linalg.svd(M, full_matrices=False)
    root = np.sqrt(sigma[:r])
    return U[:, :r] * root, root[:, None] * Vt[:r]
    # END SOLUTION


cut = check("02.1", best_rank_r).function

# %% [markdown]
# **02.2 · How much rank is used.** The smallest number of pieces, the largest first, whose energy is at least this
# share of the whole.


# %%
def effective_rank(M, energy):
    """The smallest k with σ₁² + … + σₖ² ≥ energy · ‖M‖²."""
    # BEGIN SOLUTION
    squares = np.linalg.svd(M, compute_uv=False) ** 2
    held = np.cumsum(squares) / squares.sum()
    return int(np.argmax(held >= energy)) + 1
    # END SOLUTION


used = check("02.2", effective_rank).function

# %% [markdown]
# **02.3 · Where factors stop paying.** One line. It is the r at which `B` (d, r) and `A` (r, k) together hold exactly
# as many numbers as a d × k matrix; do not round it.


# %%
def break_even_rank(d, k):
    """The r with r d + r k = d k."""
    # BEGIN SOLUTION
    return d * k / (d + k)
    # END SOLUTION


even = check("02.3", break_even_rank).function

# %%
print("shape             a layer with it                  break-even r   of the shorter side")
shapes = {"q_proj of Llama-2-7B": (4096, 4096), "up_proj of Llama-2-7B": (11008, 4096)}
shapes |= {"k_proj of Llama-3-8B": (1024, 4096), "q_proj of SmolLM2-135M": (576, 576)}
for name, (d, k) in shapes.items():
    print(f"{d:>6,} × {k:<7,}  {name:<30} {even(d, k):>13,.1f} {even(d, k) / min(d, k):>20.0%}")
assert even(4096, 4096) == 2048

# %% [markdown]
# Never more than the shorter side, never less than half of it. A square breaks even at half its width; at full width
# the factors hold twice the matrix. The ranks that people use, 4 to 64, are far from there.
#
# ## 7 · Run it, then settle the bets
#
# **The first bet**: three pieces, of the sizes 4, 2 and 1, in random directions.

# %%
M = lesson.with_spectrum(np.random.default_rng(1), 5, 7, np.array([4.0, 2.0, 1.0]))
B, A = cut(M, 1)
error = np.linalg.norm(M - B @ A) / np.linalg.norm(M)
print(f"error {error:.4f}; from the sizes alone √(2² + 1²) / √(4² + 2² + 1²) = {np.sqrt(5 / 21):.4f}")
assert np.isclose(error, np.sqrt(5 / 21))
settle("02.error", float(error))

# %% [markdown]
# **The weights of a real model.** SmolLM2 has 135 million parameters in 30 layers. Three weights of the layer in the
# middle are read from its file, without the rest, and beside them stands a matrix of random numbers.

# %%
weights = {}
with safe_open(smollm2.fetch() / "model.safetensors", framework="numpy") as file:
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
        weights[name.split(".")[1]] = file.get_tensor(f"model.layers.15.{name}.weight").astype(np.float64)
weights["random"] = np.random.default_rng(0).normal(size=(576, 576))


def row_of(name, M, shares=(0.5, 0.9, 0.99)):
    """One line of the table: how many pieces hold half, 90 % and 99 % of the energy."""
    found = [used(M, share) for share in shares]
    size = f"{M.shape[0]} × {M.shape[1]}"
    print(f"{name:<22} {size:<11} {np.linalg.matrix_rank(M):>5}" + "".join(f"{k:>9}" for k in found))
    return found


print("                       shape        rank   50 % in   90 % in   99 % in, pieces")
table = {name: row_of(name, W) for name, W in weights.items()}
settle("02.weight", table["q_proj"][1])
assert all(table[name][1] > 0.3 * min(W.shape) for name, W in weights.items())

# %% [markdown]
# Every weight has full rank, and not as a formality: 90 % of the energy takes a third of the pieces in the kindest case
# and two thirds in the others. Random numbers, as a weight is before its training, take half. Nothing here can be cut
# out cheaply.
#
# **A change that was trained.** The network of `minilora/classroom/small_network.py` has two layers, 64 → 64 → 16, and
# NumPy trains it in a second. It is pretrained on one function, then fine-tuned twice, **every weight free**, no
# adapter anywhere. *Narrow*: answer one new question in addition to what you do. *Wide*: do something else altogether.
# The change is `W` after less `W` before.

# %%
before = small.pretrained()[0]
changes = {"weight before": before, "change, wide task": small.change("wide")}
changes["change, narrow task"] = small.change("narrow")
for task, target in small.TASKS.items():
    old, new = (small.loss_of(W, target, small.unseen()) for W in (small.pretrained(), small.fine_tuned(task)))
    print(f"{task:<7} loss on unseen rows {old:.3f} → {new:.3f}")
    assert new < 0.05 * old
print("\n                       shape        rank   50 % in   90 % in   99 % in, pieces")
table = {name: row_of(name, M) for name, M in changes.items()}
longer = small.train(small.pretrained(), small.narrow, steps=2000, rng=np.random.default_rng(3))[0] - before
table["longer"] = row_of("narrow, 4 × the steps", longer)
settle("02.change", table["change, narrow task"][1])
assert table["change, narrow task"][1] <= 5 and table["change, wide task"][1] > 20
assert 2 * table["longer"][2] <= table["change, narrow task"][2]

# %%
show(
    energy_curves(
        {
            "weights of SmolLM2, layer 15": {name: energy_held(W) for name, W in weights.items()},
            "the small network": {name: energy_held(M) for name, M in changes.items()},
        }
    ),
    alt="Two panels: share of the energy against the share of pieces that is kept. Left: three weights of SmolLM2 and "
    "a random matrix rise slowly; q_proj passes 90 % at a third, the random matrix at half, down_proj and v_proj at "
    "about two thirds. Right: the small network's weight and its change by the wide task rise as slowly, to 90 % at "
    f"nearly half; the change by the narrow task jumps to 90 % with {table['change, narrow task'][1]} of 64 pieces.",
    finding="Weights use all their pieces, and so does a change that redoes everything; a narrow change uses a few.",
)

# %% [markdown]
# Read the table's columns from left to right. The *rank* is full in every line: it tells nothing. At 90 % the narrow
# change stands apart. At 99 % it needs several times as many pieces. Most of those are what SGD's random batches have
# left behind, a carpet as in the picture: train four times as long, so that the noise averages out, and they are gone.
# **An effective rank without its share is half a sentence.**
#
# **Is the copy good for anything?** Energy counts entries; we want behaviour. Put the network back as it was before,
# add to both layers the rank-r copy of their change, made with *your* function, and see how much of what training took
# off the loss is still there.

# %%
rebuilt, full = {}, small.fine_tuned("narrow")
for r in (1, 2, 4, 8):
    pairs = [cut(after - W, r) for W, after in zip(small.pretrained(), full, strict=True)]
    rebuilt[r] = tuple(W + B @ A for W, (B, A) in zip(small.pretrained(), pairs, strict=True))
    numbers = sum(B.size + A.size for B, A in pairs)
    print(f"r = {r}: {numbers:>5,} numbers for {small.N_WEIGHTS:,}", end="; ")
    print(f"of the improvement {small.improvement(rebuilt[r]):.1%} is left")
assert small.improvement(rebuilt[1]) > 0.85 and small.improvement(rebuilt[4]) > 0.95

# %% [markdown]
# 208 numbers instead of 5,120 carry nine tenths of what was learned. And the weight itself? Cut `W`, before any
# training, to a rank that saves anything at all, and look at what it computes. A layer 64 × 64 breaks even at 32.

# %%
x = small.unseen()
said = small.outputs(small.pretrained(), x)
for r in (4, 16, 32):
    B, A = cut(before, r)
    away = np.linalg.norm(small.outputs((B @ A, small.pretrained()[1]), x) - said) / np.linalg.norm(said)
    print(f"first weight cut to r = {r:>2}: the outputs are off by {away:.0%}")
assert away > 0.15  # even at break-even

# %% [markdown]
# That is why LoRA leaves `W` alone and writes only the *change* in factors. Whether the change of your task is narrow
# enough nobody can tell you beforehand; lesson 08 finds out by trying ranks.

# %% [markdown] tags=["slide"]
# ## 8 · Break it
#
# Four functions that were meant to copy the picture's change (transposed, 36 × 24), at every rank. Broad grey is the
# best that can be done, the tail. At 1, dotted, a copy is as good as none. Before you open the diagnosis: *which bug is
# this?*

# %%
M = planted_change(0.7, 0.2).T
best, patients = copy_errors(layer1.truncated_svd, M), lesson.patients()
show(
    copies(best, {name: copy_errors(recipe, M) for name, recipe in patients.items()}),
    alt="Four panels of error against the rank, 1 to 24, each over the best error, which falls from 0.74 quickly and "
    "then slowly to 0. Patient 1 stays at 1 and drops to 0 in the last few ranks. Patient 2 falls slowly in an arc and "
    "reaches 0 at the end. Patient 3 lies flat at about 1.4. Patient 4 begins at the best one's and rises beyond 3.",
    finding="One learns at the very end, one dawdles, one is worse than nothing, and one grows worse with every piece.",
)

# %% [markdown]
# <details><summary><b>Patient 1</b>, who learns at the very end</summary>
#
# It keeps the *smallest* pieces. Until the last few ranks there is nothing in them. Seen with `np.linalg.eigh`, which
# sorts from small to large, while `np.linalg.svd` sorts from large to small.
# </details>
#
# <details><summary><b>Patient 2</b>, who dawdles</summary>
#
# It keeps r columns of `M` as they are. That is a matrix of rank r, and at full rank it is exact, so a test at full
# rank passes. But a few columns are not a few *directions*: the SVD may mix all columns to find the best ones.
# </details>
#
# <details><summary><b>Patient 3</b>, who is worse than nothing</summary>
#
# `Vt` was taken for `V`. NumPy returns V already transposed: the directions are its rows. Columns of it are directions
# too, all at right angles, only wrong ones, so the error is about √2: a copy of the right size that points elsewhere.
# On a matrix with more columns than rows a shape stops you. This one has more rows than columns, and nothing does.
# </details>
#
# <details><summary><b>Patient 4</b>, who grows worse with every piece</summary>
#
# The singular values were left out, so every piece counts 1. The first pieces are nearly right here by luck: the sizes
# begin near 1. Then each piece adds noise at full volume.
# </details>

# %%
for name in lesson.PATIENTS.values():
    exercise = find_exercise("02.1")
    diagnosis = examine(exercise, exercise.bug(name)).failure.bug
    assert diagnosis.name == name
    print(f"02.1  {diagnosis.name}: {diagnosis.why}")

# %% [markdown]
# And three that do not need a plot. The first stops you at once: without `full_matrices=False` NumPy pads `U` to a
# square. The second is a float that misses 1 by a hair: `argmax` of a row in which nothing is true is 0, so a
# 10-dimensional matrix has effective rank 1. The package sums the tail from its small end and allows for rounding. The
# third: the plain rank of a trained change is always full.

# %%
with expect_bug(ValueError, match="could not be broadcast"):
    U, sigma, Vt = np.linalg.svd(np.ones((9, 6)))
    U * sigma

held = np.cumsum(np.full(10, 0.1))  # ten pieces, a tenth of the energy each: held[-1] should be 1
print("the last share is 1 −", 1 - held[-1])
with expect_bug(AssertionError, match="rank 1"):
    k = int(np.argmax(held >= 1.0)) + 1
    assert k == 10, f"rank {k}"
assert layer1.effective_rank(np.sqrt(0.1) * np.eye(10), energy=1.0) == 10

every = find_exercise("02.2").bug("every piece")
print(
    "rank of the narrow change:", every(small.change("narrow"), 0.9), " effective:", used(small.change("narrow"), 0.9)
)
assert every(small.change("narrow"), 0.9) == 64

# %% [markdown]
# ## 9 · Check the claims
#
# Sentences from articles about LoRA that you are likely to meet, each with the code that decides it. The last three use
# the small network: it is no language model, but it can refute an *always*.

# %%
show_claims("02")

# %% [markdown]
# Three things to learn from the last three.
#
# **Which 90 %?** Along 800 random directions the small network gives nine tenths of the right answers, because guessing
# gives half of them; of the *loss* it recovers less. The paper behind the sentence
# ([Aghajanyan et al. 2020](https://arxiv.org/abs/2012.13255)) measured scores: 200 directions for RoBERTa on one task,
# MRPC. Its models have a hundred million weights and more, and it found that larger ones need fewer. Nobody can carry
# such a number to another model, another task or another measure.
#
# **Few directions are not low rank.** A random direction moves *all* weights, and the change of every matrix has full
# rank. The paper's finding says that few numbers are enough; LoRA makes another guess about which: those of two thin
# factors. In the small network 208 numbers as factors, found by SVD after the fact, did more than 800 along random
# directions.
#
# **Low rank is of the task.** One network, one training, two tasks: one change is of low rank, the other is not.

# %%
print(f"rank-1 factors, 208 numbers: {small.improvement(rebuilt[1]):.0%} of the improvement", end="; ")
print(f"800 random directions: {small.improvement(small.in_random_directions(800)):.0%}")
assert small.improvement(rebuilt[1]) > small.improvement(small.in_random_directions(800))

# %% [markdown]
# ## 10 · Exercises
#
# **Core** (checked, in section 6):

# %%
overview("02")

# %% [markdown]
# **Stretch: the copy from a few looks.** An SVD reads the whole matrix and works on all of it. Suppose you may only ask
# for products: `looks.times(X)` is `M X`, `looks.times_transposed(Y)` is `Mᵀ Y`, and every column of X or Y counts as
# one look. Here is the idea: the columns of `M X`, for a random X, are random mixtures of M's columns, in which the
# large pieces are the loudest. Make them orthonormal (`np.linalg.qr`), call them Q, and `Q (Qᵀ M)` is close to M. Take
# a few columns more than r, then cut the small `Qᵀ M` down to r with your own function.
#
# The target is not pass or fail: for a 300 × 200 matrix and r = 8 stay within **2 % of the best error**, with **as few
# looks as you can**. Reading all of M would take 200.


# %%
def from_looks(looks, in_features, r, rng):
    """B and A of rank r, from products with M alone."""
    # BEGIN SOLUTION
    X = rng.normal(size=(in_features, r + 12))
    Q = np.linalg.qr(looks.times(X))[0]  # (out, r + 12): directions in which M is loud
    small_B, A = cut(looks.times_transposed(Q).T, r)
    return Q @ small_B, A
    # END SOLUTION


M = lesson.with_spectrum(np.random.default_rng(3), 300, 200, 0.8 ** np.arange(200))
looks = lesson.Looks(M)
yours = from_looks(looks, 200, 8, np.random.default_rng(4))
if yours is not None:
    error, tail = np.linalg.norm(M - yours[0] @ yours[1]), np.linalg.norm(M - np.matmul(*cut(M, 8)))
    print(f"error / best error: {error / tail:.4f} (target: at most 1.02), with {looks.columns} looks")

# %% [markdown]
# **Explain** (a few sentences each; the instructor's notes have a rubric with sample answers):
#
# 1. A colleague writes: "I fine-tuned all weights and computed the rank of ΔW: it is 576 of 576. So LoRA cannot work
#    here." What do you answer, and what do you ask for?
# 2. Two adapters of rank 4 are added. Which ranks can the sum have? How do you store it with the numbers of one of
#    them, and what do you tell its users?
# 3. "If changes have low rank, why not cut W itself and save memory for everybody?" Answer with this lesson's numbers.
#
# ## 11 · The same in PEFT
#
# PEFT is the library that most people use. It has the cut as a way to *begin* an adapter, called PiSSA: `A` and `B`
# start as the best copy of `W` of rank r, and `W` is replaced by the rest. If PEFT is installed, the next cell compares
# its `A`, `B` and rest with your function's, and with the package's `PiSSALinear`.

# %%
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT loads it, and it remarks on the processor
has_peft = all(importlib.util.find_spec(name) for name in ("peft", "torch"))
if has_peft:
    import torch
    from peft import LoraConfig, get_peft_model

    from minilora.methods import PiSSALinear

    W = weights["v_proj"]
    model = torch.nn.Sequential(torch.nn.Linear(576, 192, bias=False))
    model[0].weight.data = torch.from_numpy(W).float()
    ours = PiSSALinear(model[0], r=8, alpha=8)  # alpha = r: the scaling is 1
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["0"], init_lora_weights="pissa")
    theirs = get_peft_model(model, config).base_model.model[0]
else:
    print("PEFT is not installed: pip install peft, and run this cell again")

# %%
if has_peft:
    B, A = cut(W, 8)
    products = {"PEFT": theirs.lora_B.default.weight @ theirs.lora_A.default.weight, "minilora": ours.B @ ours.A}
    for name, product in products.items():
        away = np.linalg.norm(product.detach().numpy() - B @ A) / np.linalg.norm(B @ A)
        assert away < 1e-4  # theirs and ours are float32
        print(f"{name:<9} B A differs from yours by less than 1e-4 of its norm")
    rest = float(theirs.base_layer.weight.norm())
    tail = float(np.linalg.norm(np.linalg.svd(W, compute_uv=False)[8:]))
    print(f"PEFT's rest has the norm {rest:.3f}; your tail says {tail:.3f}: {rest / np.linalg.norm(W):.0%} of W")
    assert abs(rest - tail) < 1e-4 * tail

# %% [markdown]
# The best eight pieces of this weight hold little of it: the rest is nearly all of `W`. PiSSA does not claim otherwise:
# it wants the loudest directions as a *start*, and keeps the rest.
#
# ## 12 · Interview questions
#
# <details><summary>What does the SVD say about the best low-rank copy of a matrix?</summary>
#
# Keep the r largest pieces. The error, in the sum of squares, is the root of the sum of the squared singular values
# left out, and no matrix of rank r does better (Eckart and Young). *A weak answer* says "SVD compresses" and cannot
# say how large the error is.
# </details>
#
# <details><summary>Rank, effective rank: what is the difference, and which do you report?</summary>
#
# Rank counts pieces that are not exactly zero; after training with random batches that is all of them. Effective rank
# counts pieces until a share of the energy is reached; report it with the share, and beside that of a random matrix of
# the same shape. *A weak answer* runs `matrix_rank` on floats.
# </details>
#
# <details><summary>Why is LoRA's rank put on the change and not on the weight?</summary>
#
# Weights spread over their directions: three of SmolLM2's take a third to two thirds of their pieces for 90 % of
# the energy. A change that asks for little can be a few pieces. *A weak answer* says "because matrices are low-rank".
# </details>
#
# <details><summary>When would you expect a change not to have low rank?</summary>
#
# When the task redoes much of what the layer does: another language, continued pretraining, many tasks at once. Then a
# small r leaves a floor that no training passes. *A weak answer*: "never, it has been shown".
# </details>
#
# <details><summary>Two factors of rank r replace a d × k matrix. When does it stop paying?</summary>
#
# At r = d k / (d + k): half the width of a square, nearly the whole shorter side of a thin matrix. *A weak answer* is
# "r = d".
# </details>

# %% [markdown]
# ## 13 · Recap
#
# `M = Σ σᵢ uᵢvᵢᵀ`, largest first · copy of rank r: the first r pieces, `B` (out, r), `A` (r, in) · energy `‖M‖² = Σ
# σᵢ²` · tail = error² · effective rank: pieces until a share of the energy
#
# Five lines to carry forward:
#
# 1. `B A` is a sum of r outer products: its rank is at most r, whatever stands in it.
# 2. The best copy keeps the largest pieces, and its error is the root of the tail: known before it is made.
# 3. After training the rank is always full; ask for the effective rank, and name the share.
# 4. Weights use their room. A change need not: how much it uses is a property of the task.
# 5. Factors pay below d k / (d + k); few numbers can also mean few random directions, and that is not low rank.
#
# Further reading: [LoRA, section 7](https://arxiv.org/abs/2106.09685), which asks how small r may be and how ΔW
# compares with W; [Halko, Martinsson and Tropp](https://arxiv.org/abs/0909.4061), for the stretch with a
# proof; [LoRA Learns Less and Forgets Less](https://arxiv.org/abs/2405.09673), which finds the changes of full
# fine-tuning to have 10 to 100 times the rank of usual adapters.
#
# ### Before you go
#
# <!-- quiz: exit -->
