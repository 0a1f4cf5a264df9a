# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 08 · How much rank? Sweep, elbow, overfitting
#
# * **You will be able to** *find* the rank of a task by a sweep and *say* how sure you are; *recognise* a sweep that
#   measured something else; *compare* what two adapters of different rank have learnt.
# * **You need** lesson 02 (singular values, Eckart and Young), lesson 03 (LoRA by hand), lesson 07 (a real training).
# * **Minutes**: read 25 · exercises 34 · stretch and explain 25.
# * **Runs on** any CPU in a minute or two. Near the end a real language model is trained twice, for eight steps each.

# %% [markdown] tags=["solution"]
# This is the full notebook, with every answer. The one with blanks for you is `student/08_how_much_rank.ipynb`.

# %% [markdown] tags=["student"]
# This is your notebook: fill in the lines that say `...  # your code`. Building the course again never writes over a
# notebook that somebody has edited. The answers are in `08_how_much_rank.ipynb`, one folder up.

# %% tags=["setup"]
import importlib.util
import logging
import statistics

import numpy as np
import torch

from minilora.classroom.bets import predict, settle
from minilora.classroom.claims import show_claims
from minilora.classroom.demo import encode
from minilora.classroom.evidence import expect_bug
from minilora.classroom.exercises import check, examine, find_exercise, hint, overview  # noqa: F401
from minilora.classroom.explorer import explorer, show
from minilora.classroom.lessons import lesson_module
from minilora.classroom.pictures import rank_sweep as picture
from minilora.llm import load_model
from minilora.qlora import PagedAdamW
from minilora.torch_lora import LoRALinear, inject, remove
from minilora.train.data import make_batches
from minilora.train.evaluate import mean_loss
from minilora.train.extraction import make_extraction
from minilora.train.finetune import Recipe
from minilora.train.trainer import train

# %% tags=["setup"]
lesson = lesson_module("08")
SOME = (1, 2, 3, 4, 6, 9, 12)  # ranks

# %% [markdown]
# ## 1 · Warm-up
#
# <!-- quiz: warm-up -->

# %% [markdown] tags=["slide"]
# ## 2 · The problem
#
# Every recipe has an `r`, and nobody can tell you why it is 16. Too little, and the adapter cannot say what there is to
# learn. Too much costs memory and time, and an adapter that can say more can also learn what is *not* there: the noise
# in your examples. You find the rank by trying: the same training with several ranks and several seeds. That is dear.
#
# The number that hurts: seven ranks, three learning rates, three seeds are **63 trainings** for one number.
#
# So before you pay for that, look at a task whose answer is known. We plant a change `ΔW` of rank k in one layer, show
# an adapter n rows of what the changed layer answers, with noise, and sweep.

# %% [markdown]
# ## 3 · Predict
#
# Place a bet before you read on: put your answer in `bet=`. Leave `None` to skip.

# %%
predict(
    "08.more",
    "The change has rank 3. There are 60 rows with noise. On unseen rows, how does r = 12 do beside r = 3?",
    choices=["better", "as good", "worse"],
    bet=None,
)
predict(
    "08.overlap",
    "Two adapters, r = 3 and r = 8, start from different random A and learn the same rows. How much of the three "
    "directions that the first reads lies in the top three of the second (0 to 1)?",
    bet=None,
)
predict(
    "08.real",
    "A real task, SmolLM2 learns to write JSON. After eight steps, how many times as large is the loss with r = 1 as "
    "with r = 16, on unseen sentences?",
    bet=None,
)

# %% [markdown] tags=["slide"]
# ## 4 · The one picture
#
# One layer, 24 → 16. Left, the loss by rank: blue on the rows that the adapter learnt from, orange on rows it never
# saw, the bands are five seeds. The dotted line is the noise: nothing can be below it on unseen rows. Right, the
# singular values: green what was planted, blue what the data say, noise and all.
#
# Drag `n`, the number of rows. Where does the orange line turn up? Then set the noise to 0. Then give it a k of 6 and
# few rows: which rank is best now, and why is it not 6?


# %%
def draw(k, n, noise, r):
    found = picture.sweep(k, n, noise)
    return picture.rank_sweep(found, k, r, lesson.elbow(found.unseen), noise)


def finding(k, n, noise, r):
    found = picture.sweep(k, n, noise)
    mean = lesson.means(found.unseen)
    return (
        f"Planted k = {k}, {n} rows, noise {noise}: the elbow is at r = {lesson.elbow(found.unseen)}; "
        f"r = {r} leaves {mean[r]:.2f} on unseen rows, r = {picture.RANKS[-1]} leaves {mean[picture.RANKS[-1]]:.2f}."
    )


def in_words(k, n, noise, r):
    found = picture.sweep(k, n, noise)
    seen, unseen = ([round(v, 2) for v in lesson.means(losses).values()] for losses in (found.trained, found.unseen))
    return (
        f"Left: mean square error against the rank from 1 to 12, means of five seeds. On the {n} rows learnt from: "
        f"{seen}. On unseen rows: {unseen}. The noise alone is {noise**2:.2f}. Right: the planted singular values, "
        f"{k} of them equal and the rest 0, beside those of the best fit to the data, with a cut after r = {r}."
    )


# %%
shown = explorer(
    draw,
    alt=in_words,
    finding=finding,
    start={"k": 3, "n": 60, "noise": 0.5, "r": 3},
    k=[1, 2, 3, 4, 6, 8],
    n=[30, 60, 120, 400, 2000],
    noise=[0.0, 0.25, 0.5, 1.0],
    r=[1, 3, 6, 12],
)

# %%
shown.strip(n=[30, 60, 120, 400])

# %% [markdown] tags=["slide"]
# ## 5 · Derivation
#
# **What an adapter of rank r can reach.** `x` (n, in), `R = y − x Wᵀ` (n, out) what the change has to explain, and
# ΔW (out, in) of rank r at most. With `G` (in, out) the least-squares solution of `x G = R`:
#
# ```
# ‖R − x ΔWᵀ‖² = ‖R − x G‖² + ‖x G − x ΔWᵀ‖²       (what G leaves is at right angles to x)
# ```
#
# The first term is out of anybody's reach. The second is Eckart and Young's problem of lesson 02: the best rank-r copy
# of `x G`. Keep its top r right singular vectors `V_r` (r, out), and `ΔW_r = (G V_rᵀ V_r)ᵀ`. So the blue line falls
# with every rank, by the square of the next singular value.
#
# **What is in those singular values.** Noise of size σ per entry has no direction that it prefers. In every direction
# of R's out, it pretends to a bit of signal, about `σ² · in / n` a direction, and least squares believes it. The first
# k directions of G are signal and some noise; all others are noise only. Each rank beyond k therefore explains rows it
# has seen and makes unseen ones worse:
#
# ```
# unseen loss(r)  ≈  σ²  +  what r leaves out of ΔW  +  the noise that r lets in
#                           Σ of planted σᵢ² / out      σ² · r (in + out − r) / (n · out)
# ```
#
# **What an elbow is.** Two seeds differ, and differences smaller than that say nothing. *Band*: largest less least loss
# of a rank's seeds, the mean over all ranks. *Elbow*: the smallest r with `mean loss(r) ≤ least mean loss + band`.
#
# **One example by hand**: two seeds, losses by rank
#
# ```
# r = 1: 0.70 0.80     r = 2: 0.41 0.45     r = 4: 0.10 0.11     r = 8: 0.09 0.10
#
# means 0.75  0.43  0.105  0.095     ranges 0.10  0.04  0.01  0.01  →  band 0.04
# least mean + band = 0.135          the smallest r at or below it: 4
# ```

# %%
by_hand = {1: [0.70, 0.80], 2: [0.41, 0.45], 4: [0.10, 0.11], 8: [0.09, 0.10]}
mean = " ".join(f"{value:.3g}" for value in lesson.means(by_hand).values())
print(f"means {mean}, band {lesson.mean_range(by_hand):.2f}, elbow {lesson.elbow(by_hand)}")
assert lesson.elbow(by_hand) == 4

k, n, noise = 3, 400, 0.5
mean = lesson.means(picture.sweep(k, n, noise).unseen)
for r in (3, 6, 12):
    let_in = noise**2 * r * (picture.IN + picture.OUT - r) / (n * picture.OUT)
    print(f"r = {r:>2}: unseen loss {mean[r]:.4f};  σ² + σ² r (in + out − r) / (n out) = {noise**2 + let_in:.4f}")
    assert abs(mean[r] / (noise**2 + let_in) - 1) < 0.1  # the formula counts parameters; the noise picks its directions

# %% [markdown]
# ## 6 · Build it
#
# Three functions: the elbow, the overlap of two adapters, and the whole search. Stuck? Run `hint("08.1")` in a new
# cell.
#
# **08.1 · The elbow.** `losses` is `{rank: [a loss for each seed]}`, in any order of the ranks.


# %%
def elbow(losses):
    """The smallest rank whose mean loss is within the band of the least mean loss."""
    # BEGIN SOLUTION
    mean = {r: sum(found) / len(found) for r, found in losses.items()}
    band = sum(max(found) - min(found) for found in losses.values()) / len(losses)
    return min(r for r in mean if mean[r] <= min(mean.values()) + band)
    # END SOLUTION


your_elbow = check("08.1", elbow).function

# %% [markdown]
# **08.2 · Do two adapters mean the same?** Their numbers differ, for any mixing of A's rows can be undone in B. Compare
# the *spaces*: with the top i right singular vectors of A1 in the rows of `V1` (i, in), and the top j of A2 in `V2`,
#
# ```
# φ = ‖V1 V2ᵀ‖²_F / min(i, j)     [LoRA] eq. 4; 0: at right angles, 1: one lies in the other
# ```


# %%
def subspace_similarity(A1, A2, i, j):
    """φ of the top i directions of A1 and the top j of A2."""
    # BEGIN SOLUTION
    V1 = np.linalg.svd(A1, full_matrices=False)[2][:i]
    V2 = np.linalg.svd(A2, full_matrices=False)[2][:j]
    return float(np.sum((V1 @ V2.T) ** 2) / min(i, j))
    # END SOLUTION


similarity = check("08.2", subspace_similarity).function

# %% [markdown]
# **08.3 · Find the rank.** `measure(r, seed)` trains an adapter of rank r, 1 to 12, with a seed from 0 to 4, and gives
# two losses: on the rows it learnt from, and on unseen ones. At most 60 trainings. `check` tries your function on ten
# tasks whose planted ranks it knows.


# %%
def find_rank(measure):
    """The smallest rank that is as good as the best, as far as seeds can tell."""
    # BEGIN SOLUTION
    losses = {r: [measure(r, seed)[1] for seed in range(3)] for r in range(1, 13)}
    return your_elbow(losses)
    # END SOLUTION


search = check("08.3", find_rank).function

# %% [markdown]
# ## 7 · Run it, then settle the bets
#
# **Does LoRA get there?** The picture computed the best that any adapter can do. Here lesson 03's LoRA is trained, by
# plain gradient descent, on the same 60 rows.

# %%
given = picture.task(k=3, n=60, noise=0.5, seed=0)
best = picture.best_updates(given.x, given.R)
for r in SOME:
    A, B = lesson.trained_lora(3, 60, 0.5, r, seed=0)
    trained, unseen = (picture.loss(x, R, B @ A) for x, R in ((given.x, given.R), (given.unseen_x, given.unseen_R)))
    floor = picture.loss(given.x, given.R, best[r])
    print(f"r = {r:>2}: trained rows {trained:.4f} (the best possible: {floor:.4f})   unseen rows {unseen:.4f}")
    assert floor <= trained * (1 + 1e-9) and trained < 1.01 * floor  # long enough to be within a hundredth

# %%
mean = lesson.means(picture.sweep(3, 60, 0.5).unseen)
ratio = mean[12] / mean[3]
settle("08.more", "as good" if 0.95 < ratio < 1.05 else "worse" if ratio > 1 else "better")
print(f"r = 12 leaves {ratio:.2f} times the loss of r = 3; your elbow: {your_elbow(picture.sweep(3, 60, 0.5).unseen)}")
assert your_elbow(picture.sweep(3, 60, 0.5).unseen) == 3

# %% [markdown]
# **What have they learnt?** An adapter with r = 3 and one with r = 8, from different starts, on the same rows. Compare
# the directions that their A read, one by one: φ of the top i of the first with the top j of the second.

# %%
narrow, _ = lesson.trained_lora(3, 400, 0.5, 3, seed=1)
wide, _ = lesson.trained_lora(3, 400, 0.5, 8, seed=2)
start = [lesson.lora_init(r, picture.IN, picture.OUT, np.random.default_rng(seed))[0] for r, seed in ((3, 1), (8, 2))]
grid = np.array([[similarity(narrow, wide, i, j) for j in range(1, 9)] for i in range(1, 4)])
show(
    picture.overlap(grid, (3, 8)),
    alt="A grid of shades: rows are the top 1, 2, 3 directions of the adapter of rank 3, columns the top 1 to 8 of the "
    f"one of rank 8, the number in each is φ. With i = 3 and j = 3 it is {grid[2, 2]:.2f}; a random pair has about "
    f"{similarity(*start, 3, 3):.2f}.",
    finding=f"Three directions of three: φ = {grid[2, 2]:.2f}. Before training it was {similarity(*start, 3, 3):.2f}.",
)
settle("08.overlap", round(float(grid[2, 2]), 2))
assert grid[2, 2] > 0.6 > 2 * similarity(*start, 3, 3)

# %% [markdown]
# The two have found the same space, though no number of their A agrees. One by one their directions need not agree:
# the three planted values are equal, so that within the space every direction is as good as another. The other five
# directions of the wide one are what it started with, and noise. That is what [LoRA] section 7.2 found between r = 8
# and r = 64 in GPT-3: the top direction is shared, most of the others are not.
#
# **A real task.** SmolLM2 and the sentences of lesson 07, eight steps of eight, with r = 1 and with r = 16, alpha = 2
# r.

# %%
model, tokenizer = load_model("smollm2-135m", dtype=torch.bfloat16)
data = make_extraction(seed=0, n_train=64, n_test=24)
samples, unseen = ([encode(tokenizer, example) for example in some] for some in (data.train, data.test))
recipe = Recipe(lr=3e-3, batch_size=8)
batches, held_out = recipe.batches(samples, tokenizer.pad), make_batches(unseen, 8, tokenizer.pad, seed=0)


def loss_after(r):
    """The loss on unseen sentences after eight steps with rank r; the model is left as it was."""
    start = torch.Generator().manual_seed(0)
    inject(model, "all-linear", lambda base: LoRALinear(base, r=r, alpha=2 * r, generator=start))
    optimizer = PagedAdamW([p for p in model.parameters() if p.requires_grad], lr=recipe.lr)
    train(model, batches, optimizer, recipe.schedule(len(batches)))
    found = mean_loss(model, held_out)
    remove(model)
    return found


before = mean_loss(model, held_out)
real = {1: loss_after(1)}
print(f"before {before:.3f}   r = 1: {real[1]:.3f}   nats per token")

# %%
real[16] = loss_after(16)
print(f"r = 16: {real[16]:.3f} nats per token")
assert max(real.values()) < before / 3 and mean_loss(model, held_out) == before
settle("08.real", real[1] / real[16])

# %% [markdown]
# Careful with what this says. Both had eight steps at one rate, and the narrow one is slower: this measures who learns
# *faster*, and not what rank 1 can say in the end. A sweep that is worth its name takes more steps, and has more than
# one seed. That takes hours, so it is a benchmark: `python benchmarks/methods.py` trains LoRA with r from 1 to 64 on a
# harder task (orders: fields within fields, and what is not said), three seeds each; `python
# benchmarks/planted_rank.py` plants ranks in a decoder. What they left:

# %%
planted, orders = lesson.planted_in_a_decoder(), lesson.real_sweep()
elbows = {k: your_elbow(losses) for k, losses in planted.items()}
print("planted rank and elbow:", elbows)
assert all(k == found for k, found in elbows.items())
for r, found in orders.items():
    print(f"orders, r = {r:>2}: {statistics.mean(found):.4f} nats, seeds {', '.join(f'{v:.4f}' for v in found)}")
elbow_of_orders = your_elbow(orders)
show(
    picture.planted_and_real({k: planted[k] for k in (1, 4, 8)}, orders),
    alt="Left: for updates of rank 1, 4 and 8 planted in a decoder, the share of the loss that LoRA of rank r leaves: "
    "each line falls to zero at its own planted rank and stays there. Right: the loss on unseen orders of SmolLM2 with "
    f"LoRA of rank {', '.join(map(str, orders))}: {', '.join(f'{statistics.mean(f):.3f}' for f in orders.values())}.",
    finding=f"Where the rank is planted, the elbow finds it; on the real task it is at r = {elbow_of_orders}: there "
    "more rank gains less than the seeds differ by.",
)

# %% [markdown]
# The right-hand elbow is one of 32 steps at one rate, the best one for r = 16. With more steps, or a rate of its own
# for every rank, the small ranks may catch up: an elbow belongs to a task *and* a budget.

# %% [markdown] tags=["slide"]
# ## 8 · Break it
#
# Four people were asked for the rank of thirty tasks. On the x-axis what was planted, on the y-axis what they said. Who
# did what?
#
# (a) judged by the rows that were learnt from · (b) took the best of one seed · (c) stopped at the first rise ·
# (d) took the largest, "more rank cannot hurt"

# %%
PATIENTS = {
    "Patient 1": "the largest",
    "Patient 2": "stops at the first rise",
    "Patient 3": "the best of one seed",
    "Patient 4": "judged by the trained rows",
}
exercise = find_exercise("08.3")
tasks = [task for seed in range(3) for task in lesson.rank_inputs(np.random.default_rng(seed))["tasks"]]
said = {name: [exercise.bug(bug)(task) for task in tasks] for name, bug in PATIENTS.items()}
known = [task.k for task in tasks]
show(
    picture.choices(known, {"healthy": [lesson.find_rank(task) for task in tasks], **said}),
    alt="Five panels, the chosen rank against the planted one. Healthy: on the diagonal. Patient 1: all at 12. Patient "
    "2: on the diagonal and above it. Patient 3: on it and well above it. Patient 4: above it where the rank is small.",
    finding="Only one way stays on the diagonal: unseen rows, several seeds, the smallest within the band.",
)

# %%
off = {name: statistics.mean(abs(a - b) for a, b in zip(ranks, known, strict=True)) for name, ranks in said.items()}
for name, distance in off.items():
    print(f"{name}: off by {distance:.1f} ranks on average")
assert all(distance > 0 for distance in off.values())

# %% [markdown]
# <details><summary><b>Patient 1</b>, who takes the largest</summary>
#
# (d) Twelve, always. On unseen rows it is worse wherever rows are few, and it costs four times the memory of three.
# </details>
#
# <details><summary><b>Patient 2</b>, who stops early</summary>
#
# (c) One seed, and the first rank after which the loss rises. Once the line is flat a rise comes soon, so the answer
# is often nearly right; with more noise the first rise comes before the elbow. Being right by luck is what makes it
# live on.
# </details>
#
# <details><summary><b>Patient 3</b>, who trusts one seed</summary>
#
# (b) Beyond the elbow all ranks are alike, and the least of equal losses is a draw of the lot. Three seeds show a band,
# and the band says: these are the same.
# </details>
#
# <details><summary><b>Patient 4</b>, who never looks at unseen rows</summary>
#
# (a) On the rows that were learnt from every rank helps. The sweep has no elbow at all, only an end.
# </details>
#
# The check knows all four by name:

# %%
for bug in PATIENTS.values():
    diagnosis = examine(exercise, exercise.bug(bug)).failure.bug
    assert diagnosis.name == bug
    print(f"{diagnosis.name}: {diagnosis.why}")

# %% [markdown]
# And two that stop you at once: a single seed has no band, and a rank that the layer does not have.

# %%
with expect_bug(ValueError, match="told from noise by seeds"):
    lesson.elbow({1: [0.3], 2: [0.2], 4: [0.1]})
with expect_bug(ValueError, match="choose k from 1 to 16"):
    picture.task(k=17, n=60, noise=0.5, seed=0)

# %% [markdown]
# ## 9 · Check the claims
#
# What articles say about rank, each with the code that decides it.

# %%
show_claims("08")

# %% [markdown]
# ## 10 · Exercises
#
# **Core** (checked, in section 6):

# %%
overview("08")

# %% [markdown]
# **Stretch: fewer trainings.** Your search may take 60 trainings; a sweep of twelve ranks with three seeds takes 36.
# How few do you need to be right on at least 27 of the 30 tasks of section 8? Not pass or fail: write down trainings
# per task and how many were right. (Is every rank worth a seed? Is every seed worth a rank? And what has to be known
# beforehand for one seed to be enough?)


# %%
def frugal(measure):
    """Find the rank with as few trainings as you can."""
    # BEGIN SOLUTION
    low, high = 1, 12  # the elbow is between them: before it one rank more earns its 5 %, from it on none does
    while low < high:
        r = (low + high) // 2
        if measure(r + 1, 0)[1] < 0.95 * measure(r, 0)[1]:
            low = r + 1
        else:
            high = r
    return low
    # END SOLUTION


if frugal(tasks[0]) is not None:
    for task in tasks:
        task.calls = 0
    right = sum(frugal(task) == task.k for task in tasks)
    print(f"{right} of {len(tasks)} right, {sum(task.calls for task in tasks) / len(tasks):.1f} trainings a task")

# %% [markdown]
# **Explain** (a few sentences each; the instructor's notes have a rubric with sample answers):
#
# 1. A blog sweeps r = 4, 8, 16, 32 with `alpha = 16` throughout and one learning rate, and finds r = 8 best. What did
#    it measure besides the rank?
# 2. The singular values of a learnt update are 5, 3, 1, 0.9, 0.9, 0.8, … Which rank would you try, and what would you
#    like to know before you believe it?
# 3. On your task all ranks from 4 to 64 are within the band. Which do you ship, and what would change your mind?

# %% [markdown]
# ## 11 · The same in PEFT
#
# PEFT's LoRA on the same 60 rows, trained by torch, beside the best that is possible; and PEFT's way of giving layers
# ranks of their own.

# %%
has_peft = importlib.util.find_spec("peft") is not None
if has_peft:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT loads it, and it remarks on the processor
    from peft import LoraConfig, get_peft_model

    def peft_loss(r):
        """What PEFT's LoRA of rank r leaves on the 60 rows after a long training."""
        torch.manual_seed(0)
        base = torch.nn.Sequential(torch.nn.Linear(picture.IN, picture.OUT, bias=False)).double()
        base[0].weight.data.zero_()  # x Wᵀ = 0, so that R is what is to be said
        model = get_peft_model(base, LoraConfig(r=r, lora_alpha=r, target_modules=["0"])).double()
        x, R = torch.from_numpy(given.x), torch.from_numpy(given.R)
        optimizer = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad], max_iter=400)

        def closure():
            optimizer.zero_grad()
            left = (model(x) - R).square().mean()
            left.backward()
            return left

        optimizer.step(closure)
        return closure().item()
else:
    print("PEFT is not installed: pip install peft, and run this cell again")

# %%
if has_peft:
    for r in (1, 3, 6):
        found, floor = peft_loss(r), picture.loss(given.x, given.R, best[r])
        print(f"r = {r}: PEFT {found:.4f}, the best possible {floor:.4f}")
        assert floor * (1 - 1e-9) <= found < 1.05 * floor

    two = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    mixed = get_peft_model(two, LoraConfig(r=2, target_modules=["0", "1"], rank_pattern={"1": 5}))
    ranks = {name: p.shape[0] for name, p in mixed.named_parameters() if "lora_A" in name}
    print("ranks by layer:", sorted(ranks.values()), "from r=2 and rank_pattern={'1': 5}")
    assert sorted(ranks.values()) == [2, 5]

# %% [markdown]
# ## 12 · Interview questions
#
# <details><summary>How do you choose r?</summary>
#
# By a sweep over powers of two, each rank at its own good learning rate, several seeds, on held-out data; the smallest
# within the seeds' band. *A weak answer* is a number.
# </details>
#
# <details><summary>Can more rank hurt?</summary>
#
# On unseen data yes, where examples are few and noisy: about σ² r (in + out − r) / (n · out) of noise is let in. In a
# short training it may also just learn otherwise, because alpha / r or the rate did not follow. *A weak answer* says
# no, since the small adapter is a special case of the large one.
# </details>
#
# <details><summary>What does the spectrum of a learnt update tell, and what not?</summary>
#
# How many directions stand out from the rest. Not whether they help: noise has singular values too, and they never end.
# *A weak answer* counts all values above a threshold somebody chose.
# </details>
#
# <details><summary>Two adapters of one task have quite different weights. Is one of them wrong?</summary>
#
# B A counts, and within it A and B can be mixed by any r × r matrix and its inverse. Compare the updates, or the spaces
# they read and write. *A weak answer* compares A with A.
# </details>
#
# <details><summary>Your sweep says r = 64 is best by 0.3 %. What do you do?</summary>
#
# Ask for the band. If the seeds differ by more, it is a draw, and the smaller rank wins. *A weak answer* ships r = 64.
# </details>

# %% [markdown]
# ## 13 · Recap
#
# k planted rank · r of the adapter · n rows · σ noise · band = mean range of the seeds · elbow = the smallest r within
# the band · φ = ‖V1 V2ᵀ‖² / min(i, j)
#
# Five lines to carry forward:
#
# 1. On the rows that were learnt from, more rank is always better. It proves nothing.
# 2. Below the task's rank you leave signal, above it you let in noise; how much depends on n.
# 3. An elbow without a band is a matter of luck; a band takes seeds.
# 4. Two adapters are compared by their spaces, not by their numbers.
# 5. On real tasks the curve is often flat: then the smallest rank on it is the answer.
#
# Further reading: [LoRA, sections 7.1 and 7.2](https://arxiv.org/abs/2106.09685), the first sweep and the first φ;
# [Intrinsic dimensionality](https://arxiv.org/abs/2012.13255), for how few directions may be enough;
# [AdaLoRA](https://arxiv.org/abs/2303.10512), for letting the layers compete for rank.
#
# ### Before you go
#
# <!-- quiz: exit -->
