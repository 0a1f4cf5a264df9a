# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 06 · Init, alpha, scaling: rsLoRA and LoRA+
#
# * **You will be able to** *say* what alpha does, and to which optimizer; *predict* how the first step grows with r,
#   alpha and the learning rate; *sort* parameters into the two rates of LoRA+, and *judge* whether that was a gain.
# * **You need** lessons 03 (B = 0, so only B moves at first), 04 (the layer) and 05 (injection).
# * **Minutes**: read 30 · exercises 36 · stretch and explain 30.
# * **Runs on** any CPU in under a minute. No GPU.

# %% [markdown] tags=["solution"]
# This is the full notebook, with every answer. The one with blanks for you is `student/06_init_and_scaling.ipynb`.

# %% [markdown] tags=["student"]
# This is your notebook: fill in the lines that say `...  # your code`. Building the course again never writes over a
# notebook that somebody has edited. The answers are in `06_init_and_scaling.ipynb`, one folder up.

# %% tags=["setup"]
import importlib.util
import logging
import math

import numpy as np
import torch
from torch import nn

# %% tags=["setup"]
from minilora.classroom.bets import predict, settle
from minilora.classroom.claims import show_claims
from minilora.classroom.comparison import best_rate, by_seed
from minilora.classroom.evidence import expect_bug
from minilora.classroom.exercises import check, examine, find_exercise, overview
from minilora.classroom.exercises import hint  # noqa: F401  for you: hint("06.1")
from minilora.classroom.explorer import explorer, show
from minilora.classroom.lessons import lesson_module
from minilora.classroom.pictures import two_rates as race
from minilora.classroom.pictures import update_size as size
from minilora.classroom.plots import symptoms
from minilora.methods import OLoRALinear, PiSSALinear
from minilora.torch_lora import inject, lora_layer
from minilora.torch_lora.layers import LoRALinear

lesson = lesson_module("06")

# %% [markdown]
# ## 1 · Warm-up
#
# <!-- quiz: warm-up -->

# %% [markdown] tags=["slide"]
# ## 2 · The problem
#
# "What is LoRA alpha?" is asked again and again in issue trackers (bitsandbytes #762, unsloth #1304, and
# mlx-examples #982). The usual answer is "a learning rate for the adapter, set it to 2 r". It is half right. The other
# half is why people raise r, keep alpha, and see the larger adapter learn *less*. Then they look for the bug in the
# data.
#
# Two remedies have names. **rsLoRA** divides alpha by √r instead of r: s = alpha / √r stands in front of B A. **LoRA+**
# gives B a larger learning rate than A, `ratio` times as large. This lesson measures both, and the plain LoRA beside
# them.
#
# The number that hurts: with SGD, s = alpha / r and alpha kept at 8, the first step of r = 64 is worth

# %% tags=["slide"]
small, large = (size.expected_first_step(r, 8.0, False, "sgd") for r in (1, 64))
print(f"1 / {small / large:.0f} of the first step of r = 1, although it has 64 times as many parameters")
assert round(small / large) == 64

# %% [markdown]
# ## 3 · Predict
#
# Place your bets (or leave `None` to skip): they are settled in section 7.

# %%
predict(
    "06.sgd",
    "A is random, B = 0. You double alpha. One step of SGD: how many times as long is the first ΔW?",
    bet=None,
)
predict("06.adam", "The same with Adam: how many times as long?", bet=None)
predict(
    "06.race",
    "LoRA+ (B's rate is 16 times A's) against LoRA (one rate), each at the best rate for A that it can have, on a "
    "small problem. LoRA's steps to a tenth of the loss, divided by LoRA+'s: above 1 means that LoRA+ wins.",
    bet=None,
)

# %% [markdown] tags=["slide"]
# ## 4 · The one picture
#
# A change of rank 1 is planted in a layer, and LoRA learns it, with s = alpha / r and with s = alpha / √r. How much of
# it has been learned, after one step and after many, at every rank from 1 to 64? One learning rate for all ranks. Both
# axes are logarithmic, so a power of r is a straight line. Run the cell, then:
#
# * One step of SGD: which of the two scalings does not care about r? Drag `optimizer` to `adam`. Which one now?
# * Drag `steps`. Where do all of them end, and which are late?
# * Drag `alpha` up under SGD, with `steps` at 10. Which ranks run away first, and why these?


# %%
def draw(alpha, optimizer, steps):
    return size.update_size(alpha, optimizer, steps)


def finding(alpha, optimizer, steps):
    values = size.by_rank(alpha, optimizer, steps)
    ends = [f"{name} {values[rs][0]:.2g} → {values[rs][-1]:.2g}" for rs, (name, _, _) in size.LOOK.items()]
    said = ", ".join(ends).replace("nan", "ran away")
    return f"{optimizer}, alpha = {alpha}, {steps} steps; learned at r = 1 → r = 64: {said}."


def in_words(alpha, optimizer, steps):
    rows = []
    for title, step in (("After one step", 1), (f"After {steps} steps", steps)):
        for rs, values in size.by_rank(alpha, optimizer, step).items():
            shown = ", ".join("ran away" if math.isnan(v) else f"{v:.2g}" for v in values)
            rows.append(f"{title}, with {size.LOOK[rs][0]}: {shown}.")
    return "Two log-log panels: the share learned against r = 1, 2, 4 … 64, a line for each scaling. " + " ".join(rows)


# %%
picture = explorer(
    draw,
    alt=in_words,
    finding=finding,
    start={"alpha": 8, "steps": 100},
    alpha=[4, 8, 16, 32],
    optimizer=["sgd", "adam"],
    steps=[10, 30, 100, 300],
)

# %%
picture.strip(steps=[10, 30, 100, 300])

# %%
picture.strip(optimizer=["sgd", "adam"])

# %% [markdown] tags=["slide"]
# ## 5 · Derivation
#
# **The first step.** Let `G` (out, in) be the gradient that W would get. The update is ΔW = s · B A, so the chain rule
# gives each factor an s: dB = s · G Aᵀ (out, r) and dA = s · Bᵀ G (r, in). At B = 0 the second is zero: A stays, B
# moves, and the first update is s times B's step times A.
#
# ```
# SGD     B = −lr · s · G Aᵀ          ΔW = s · B A = −lr · s² · G AᵀA
# Adam    B = −lr · sign(G Aᵀ)        ΔW = s · B A = −lr · s · sign(G Aᵀ) A
# ```
#
# With SGD there are two s, one from the gradient and one from s · B A. The first step of Adam divides each entry of the
# gradient by its own size, so that its sign is left: that takes the first s away.
#
# That is the answer to "what is alpha?": **alpha is a volume, s = alpha / r, in front of the update.** To the first
# step of Adam it is a factor of the learning rate. To SGD it is one squared. To the forward pass it is neither: change
# alpha of a trained adapter, and its output changes at once.
#
# **How it grows with r.** The planted change is u v, a column u (out, 1) times a row v (1, in), both of length 1, and
# the loss is ½ ‖ΔW − u v‖². At the start ΔW = 0, so the gradient is G = −u v. Put it into the two lines above, and ask
# what ΔW does to an input in the direction v: it is ΔW vᵀ that should become u.
#
# ```
# SGD     ΔW vᵀ = lr · s² · u · (v AᵀA vᵀ)                v AᵀA vᵀ        = Σ (A vᵀ)ᵢ²
# Adam    ΔW vᵀ = lr · s · sign(u) · (sign(v Aᵀ) A vᵀ)    sign(v Aᵀ) A vᵀ = Σ |(A vᵀ)ᵢ|
# ```
#
# The entries of A are from U(±1/√in), with variance 1/(3 in). As v has length 1, each entry of A vᵀ has this variance
# too, and both sums have r terms. So the first is about r / (3 in) and the second goes as r / √in:
#
# ```
# SGD     learned ~ lr · s² · r
# Adam    learned ~ lr · s · r
# ```
#
# | | SGD: lr · s² r | Adam: lr · s r |
# |---|---|---|
# | s = alpha / r, [LoRA] | alpha² / r: falls | alpha: **keeps** |
# | s = alpha / √r, [rsLoRA] | alpha²: **keeps** | alpha √r: grows |
#
# Each scaling keeps the first step of *one* optimizer. The theorem of [rsLoRA] (arXiv 2312.03732) is about steps along
# the gradient, the left column. What later steps make of it is measured in section 7.
#
# **By hand.** r = 1, lr = 0.1, and the gradient of x = [1 2 3] and dy = [1 2]:
#
# ```
# A = [1 0 1]      G = dyᵀ x = [1 2 3]      G Aᵀ = [4]
#                              [2 4 6]             [8]
#
# alpha = 2, s = 2
#     SGD    B = −0.1 · 2 · [4 8]ᵀ = [-0.8 -1.6]ᵀ     ΔW = 2 B A = [-1.6 0 -1.6]
#                                                                  [-3.2 0 -3.2]
#     Adam   B = −0.1 · [1 1]ᵀ                        ΔW = 2 B A = [-0.2 0 -0.2], both rows
#
# alpha = 4, s = 4
#     SGD    B = −0.1 · 4 · [4 8]ᵀ = [-1.6 -3.2]ᵀ     ΔW = 4 B A = [ -6.4 0  -6.4]   4 times
#                                                                  [-12.8 0 -12.8]
#     Adam   B = −0.1 · [1 1]ᵀ                        ΔW = 4 B A = [-0.4 0 -0.4]     2 times
# ```

# %%
by_hand = {("SGD", 2): [-1.6, -3.2], ("Adam", 2): [-0.2, -0.2], ("SGD", 4): [-6.4, -12.8], ("Adam", 4): [-0.4, -0.4]}
for (name, alpha), column in by_hand.items():
    layer = LoRALinear(nn.Linear(3, 2, bias=False), r=1, alpha=alpha)
    layer.A.data = torch.tensor([[1.0, 0, 1]])
    optimizer = getattr(torch.optim, name)([layer.A, layer.B], lr=0.1)
    layer(torch.tensor([[1.0, 2, 3]])).backward(torch.tensor([[1.0, 2]]))
    optimizer.step()
    update = layer.delta_weight().detach()
    assert torch.allclose(update, torch.tensor([[c, 0, c] for c in column]))
    print(f"{name:<5} alpha = {alpha}: first column of ΔW", [round(value, 4) for value in update[:, 0].tolist()])

# %% [markdown]
# **Two rates.** B begins at 0 and A does not. [LoRAPlus] (arXiv 2402.12354) argues from layers of growing width that
# one rate cannot suit both, and gives B a multiple of A's: `lr_B = ratio · lr_A`, with ratio 16. Nothing in the layer
# changes; it is a matter of the optimizer's groups (06.2).
#
# **Other beginnings, in brief.** [PiSSA] and [OLoRA] begin A and B not at random and zero, but in directions of W
# itself: the largest singular vectors, or a QR decomposition. The layer still changes nothing at first, because what
# they begin at is taken off again. But both factors are nonzero, so *both* move at the first step.

# %%
torch.manual_seed(0)
base, x = nn.Linear(24, 16, bias=False), torch.randn(8, 24)
for kind in (LoRALinear, PiSSALinear, OLoRALinear):
    layer = kind(base, r=4, alpha=4)
    changed = not torch.equal(layer(x), base(x))
    layer(x).square().sum().backward()
    moves = [name for name in "AB" if getattr(layer, name).grad.any()]
    print(f"{kind.__name__:<12} changes the layer at first: {changed!s:<6} first to move: {' and '.join(moves)}")
    assert not changed and moves == (["B"] if kind is LoRALinear else ["A", "B"])

# %% [markdown]
# ## 6 · Build it
#
# **06.1 · The scaling.** The s of section 5, of two kinds: `"lora"` is alpha / r, `"rslora"` alpha / √r. Any other kind
# raises a `ValueError` that names it.


# %%
def scaling(r, alpha, kind):
    """The factor in front of B A."""
    # BEGIN SOLUTION
    if kind == "lora":
        return alpha / r
    if kind == "rslora":
        return alpha / math.sqrt(r)
    raise ValueError(f"no scaling is called {kind!r}")
    # END SOLUTION


scale = check("06.1", scaling).function

# %% [markdown]
# **06.2 · Groups for LoRA+.** An optimizer of torch takes a list of groups, each a dict with `params`, `lr` and
# `weight_decay`. Sort all that trains, each parameter into exactly one group:
#
# * A at `lr`, B at `lr * ratio`, and vectors (`p.ndim == 1`: biases, norms) as B
# * A and B of an embedding both at `embedding_lr`: there it is A that begins at zero
# * vectors do not decay; A and B do, by `weight_decay`
# * frozen parameters are in no group
#
# The model of the check is this one:

# %%
model = lesson.adapted_model()
for name, p in model.named_parameters():
    print(f"{name:<18} {tuple(p.shape)!s:<9} {'trains' if p.requires_grad else 'frozen'}")


# %%
def groups(model, *, lr, ratio=16.0, embedding_lr=1e-6, weight_decay=0.0):
    """What trains, as groups for an optimizer."""
    # BEGIN SOLUTION
    found = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        fast = name.endswith(".B") or p.ndim == 1
        rate = embedding_lr if name.startswith("embed.") else lr * ratio if fast else lr
        decay = 0.0 if p.ndim == 1 else weight_decay
        found.setdefault((rate, decay), []).append(p)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in found.items()]
    # END SOLUTION


plus_groups = check("06.2", groups).function

# %% [markdown]
# **06.3 · The same first step.** Here are six settings, each `(optimizer, lr, alpha, r, kind)`. Which of them make one
# and the same first ΔW? Take a pencil, then write the rule. For each setting, return the index of the first setting
# that is like it: `[0, 0, 2, …]` says that 1 is like 0, and 2 like none before it. `check` runs the six with torch.

# %%
for i, setting in enumerate(lesson.six_settings(np.random.default_rng(0))["settings"]):
    optimizer, lr, alpha, r, kind = setting
    print(f"{i}  {optimizer:<5} lr = {lr:.5f}   alpha = {alpha:7.4f}   r = {r}   {kind}")


# %%
def same_first_step(settings):
    """For each (optimizer, lr, alpha, r, kind) the index of the first one with the same first ΔW."""
    # BEGIN SOLUTION
    answer, seen = [], []
    for i, (optimizer, lr, alpha, r, kind) in enumerate(settings):
        length = lr * scale(r, alpha, kind) ** (2 if optimizer == "sgd" else 1)
        like = [j for j, name, other in seen if name == optimizer and math.isclose(other, length, rel_tol=1e-6)]
        answer.append(like[0] if like else i)
        seen.append((i, optimizer, length))
    return answer
    # END SOLUTION


same = check("06.3", same_first_step).function

# %% [markdown] tags=["slide"]
# ## 7 · Run it, then settle the bets
#
# A real `LoRALinear`, torch's own optimizers, one step, alpha and then twice alpha.

# %%
longer = {}
for name in ("sgd", "adam"):
    one, two = (lesson.first_update((name, 0.01, alpha, 4, "lora")).norm().item() for alpha in (8.0, 16.0))
    longer[name] = two / one
    print(f"{name:<5} twice alpha: ΔW is {longer[name]:.3f} times as long")
assert abs(longer["sgd"] - 4) < 1e-4 and abs(longer["adam"] - 2) < 1e-4
settle("06.sgd", longer["sgd"])
settle("06.adam", longer["adam"])

# %% [markdown]
# **The powers of r**, fitted through the points of the picture's left panel (16 draws of A at each rank):

# %%
for name, expected in {"sgd": (-1, 0), "adam": (0, 0.5)}.items():
    fitted = [size.slope(values) for values in size.by_rank(8, name, 1).values()]
    print(f"{name:<5} alpha / r: r^{fitted[0]:.2f}   alpha / √r: r^{fitted[1]:.2f}   by derivation {expected}")
    assert all(abs(one - other) < 0.15 for one, other in zip(fitted, expected, strict=True))  # r = 1 has 16 numbers

# %% [markdown]
# **And after the first step?** What people want is a rate that stays right when r changes. So: at each rank, of all
# powers of two, the rate with the lowest loss after 30 steps.

# %%
print("best rate, as a power of two, at r =", *(f"{r:>4}" for r in size.RANKS), "  largest / smallest")
spreads = {}
for name in ("sgd", "adam"):
    for rs, (kind, _, _) in size.LOOK.items():
        best = [size.best_rate(r, rs, name, 30) for r in size.RANKS]
        spreads[name, rs] = max(best) / min(best)
        powers = " ".join(f"{int(np.log2(rate)):>4}" for rate in best)
        print(f"{name:<5} {kind:<29} {powers}   {spreads[name, rs]:>10.0f}")
assert spreads["sgd", False] > 4 * spreads["sgd", True]
assert spreads["adam", True] <= spreads["adam", False] <= 8

# %% [markdown]
# With SGD alpha / r must be tuned again at every rank, as the table of section 5 says: its best rate grows as r. The
# best rate of alpha / √r moves far less, but it does move: the table is about the first step, and these are 30. With
# Adam neither scaling moves the best rate by much here. The first step would have favoured alpha / r, the best rate
# after 30 steps favours alpha / √r slightly. So the first step alone does not tell which rate is best. One planted
# change of rank 1 in one layer is a small experiment. What it does show is that a sentence on "the" right scaling that
# names no optimizer is incomplete.
#
# **The race of LoRA+**, with Adam. On the left all ratios have the same rate for A. On the right each has the rate that
# suits it best.

# %%
panels = race.races()
took = {
    title: {ratio: race.steps_to_goal(curve) for ratio, curve in curves.items()} for title, curves in panels.items()
}
same_rate, best = took.values()
show(
    race.two_rates(panels),
    alt="Two panels of loss against steps of Adam on a log scale, four lines for ratios 1, 4, 16 and 64. Left, with "
    f"the same rate for A: ratio 1 is last, at a tenth of the loss after {same_rate[1]:.0f} steps, ratio 16 first, "
    f"after {same_rate[16]:.0f}. Right, each at its best rate: ratio 1 after {best[1]:.0f} steps, "
    f"4 after {best[4]:.0f}, 16 after {best[16]:.0f}, 64 after {best[64]:.0f}.",
    finding=f"At one rate for A ratio 16 beats ratio 1, {same_rate[16]:.0f} steps to {same_rate[1]:.0f}; each at its "
    f"best rate it is {best[16]:.0f} to {best[1]:.0f}.",
)
assert same_rate[16] < same_rate[1] and best[1] <= best[4] < best[16] < best[64]
settle("06.race", best[1] / best[16])

# %% [markdown]
# The left panel is how the gain of LoRA+ is often shown, and it shows that a larger rate for B helps *where the rate
# was too small*. On the right LoRA alone may have the larger rate too, and here it needs no ratio: 4 is no sooner
# than 1, 16 and 64 are later. This is a small problem and a narrow layer, while the argument of [LoRAPlus] is about
# wide ones, so it does not refute the paper. It teaches how to compare: each side at its own best rate.
#
# **On a real model** that takes hours, so it is a benchmark: in `python benchmarks/methods.py` SmolLM2 learns to write
# orders as nested JSON: 32 steps of 8, r = 16, alpha = 32, ratio 16, three seeds, each at the best of several rates for
# A that are a factor 3 apart. What it left:

# %%
lost = {}
for case, s in {"lora": 32 / 16, "rslora": 32 / math.sqrt(16), "lora+": 32 / 16}.items():
    lr = best_rate(case)
    lost[case] = [run["validation_loss"] for run in by_seed(case, lr)]
    right = [run["exact"] for run in by_seed(case, lr)]
    print(f"{case:<6} lr {lr:<6g} s · lr {s * lr:.4f}   loss {min(lost[case]):.3f} to {max(lost[case]):.3f}", end="   ")
    print(f"right to the letter {min(right):.0%} to {max(right):.0%}")
assert max(map(min, lost.values())) < min(map(max, lost.values()))  # the three ranges overlap

# %% [markdown]
# With three seeds none of the three is ahead: their ranges overlap. At one r rsLoRA *is* LoRA with another alpha, here
# 4 times as large, and its best rate is a third. So s · lr, by which Adam's first step goes, is the same as far as
# rates a factor 3 apart can tell.

# %% [markdown] tags=["slide"]
# ## 8 · Break it
#
# Four patients: rsLoRA with r = 64 and alpha = 16, AdamW with two rates, one mistake each. Broad grey is a healthy run.
# *Which bug is this?*

# %%
setting = {"lr": 1e-3, "ratio": 4.0, "steps": 120}
begin = size.start(64, draws=1)


def losses(exercise_id=None, name=None):
    """The losses with the reference's scaling and groups, or with one catalogued bug in their place."""
    parts = {"06.1": lesson.scaling, "06.2": find_exercise("06.2").reference}
    if exercise_id:
        parts[exercise_id] = find_exercise(exercise_id).bug(name)
    torch.manual_seed(0)
    return lesson.imitation(begin, parts["06.1"], parts["06.2"], **setting)


healthy = losses()
curves = {patient: losses(*bug) for patient, bug in lesson.PATIENTS.items()}
show(
    symptoms(healthy, curves, every=1),
    alt="Four panels of loss against steps on a log scale, each over the healthy run in grey. Patient 1 falls more "
    "slowly than the healthy run, patient 2 more slowly still. Patient 3 is nearly on it, and patient 4 exactly.",
    finding=f"Loss after 40 steps, healthy {healthy[40]:.2g}; patients "
    + ", ".join(f"{patient}: {curve[40]:.2g}" for patient, curve in curves.items()),
)
assert curves["4"] == healthy and all(curves[patient] != healthy for patient in "123")

# %% [markdown]
# <details><summary><b>Patient 1</b>, whose volume is wrong</summary>
#
# `√r / alpha`, here √64 / 16 = ½ where 16 / √64 = 2 was meant. It hides where the scaling is 1. The sign of it: raising
# alpha makes the training *slower*.
# </details>
#
# <details><summary><b>Patient 2</b>, who is too soft</summary>
#
# alpha / r where alpha / √r was meant: √64 = 8 times too soft. Adam repairs much of it, because B then grows larger. A
# *trained* file that is read so is worse off: nothing repairs it. llama.cpp's converter reads alpha and knows no
# rsLoRA, so an export must write alpha · √r.
# </details>
#
# <details><summary><b>Patient 3</b>, who has it the wrong way round</summary>
#
# A got B's rate, and B A's. The curve is close to the healthy one: in this problem the two rates matter little, as the
# race showed. A loss curve does not tell whether LoRA+ is switched on, or which way round. The groups do: print the
# shapes of what is in each.
# </details>
#
# <details><summary><b>Patient 4</b>, who looks healthy</summary>
#
# Frozen parameters are in the groups. They have no gradient, so the optimizer skips them, and the curve is the healthy
# one to the bit. It shows when somebody unfreezes a layer for a moment: then it trains, unasked. Count the parameters
# in the groups; no curve shows it.
# </details>

# %%
for exercise_id, name in lesson.PATIENTS.values():
    exercise = find_exercise(exercise_id)
    diagnosis = examine(exercise, exercise.bug(name)).failure.bug
    assert diagnosis.name == name
    print(f"{exercise_id}  {name}: {diagnosis.why}")

# %% [markdown]
# And one that torch catches for you, if you let it:

# %%
twice = find_exercise("06.2").bug("in two groups")(lesson.adapted_model(), lr=0.01)
with expect_bug(ValueError, match="more than one parameter group"):
    torch.optim.AdamW(twice)

# %% [markdown]
# ## 9 · Check the claims
#
# Sentences on alpha, rsLoRA and LoRA+, each with the code that decides it, in `claims.py` beside this lesson.

# %%
show_claims("06")

# %% [markdown]
# Read the *when* of each verdict. Most of these sentences are true of one optimizer and were written as if there were
# only one. That is what to learn from them: ask "for SGD or for Adam?", and "each at its best rate?".
#
# ## 10 · Exercises
#
# **Core** (checked, in section 6):

# %%
overview("06")

# %% [markdown]
# **Stretch: a third scaling.** Under Adam alpha / √r grows as √r at the first step, under SGD alpha / r falls as 1 / r.
# Is there a power p, s = alpha / r^p, that treats both badly, but equally? The target is not pass or fail: choose p so
# that the first steps of r = 1 and r = 64 differ by the same factor under both, as small as you can.


# %%
def power():
    """The p of s = alpha / r^p."""
    # BEGIN SOLUTION
    # SGD goes with r^(1 − 2 p), Adam with r^(1 − p): one falls as the other grows where 2 p − 1 = 1 − p
    return 2 / 3
    # END SOLUTION


p = power()
if p is not None:
    print(f"r = 64 against r = 1: SGD {64 ** (1 - 2 * p):.2f} times, Adam {64 ** (1 - p):.2f} times")

# %% [markdown]
# **Explain** (a few sentences each; the instructor's notes have a rubric with sample answers):
#
# 1. "Doubling alpha is the same as doubling the learning rate." For whom is it true, for how long, and for whom not?
# 2. You go from r = 8 to r = 64 and keep alpha = 16, with SGD. What happens to the first step under either scaling?
# 3. A paper shows that its method reaches a loss in half the steps of LoRA "with the same hyperparameters". What do you
#    ask?

# %% [markdown]
# ## 11 · The same in PEFT
#
# If PEFT is installed, the next cells compare its `use_rslora` and its `create_loraplus_optimizer` with your functions:
# the same scaling, and the same parameters after five steps.

# %%
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT loads it, and it remarks on the processor
has_peft = importlib.util.find_spec("peft") is not None
if has_peft:
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    for rs, kind in ((False, "lora"), (True, "rslora")):
        config = LoraConfig(r=5, lora_alpha=16, target_modules=["up"], use_rslora=rs)
        theirs = get_peft_model(lesson.Model(), config)
        assert math.isclose(theirs.base_model.model.up.scaling["default"], scale(5, 16, kind))
        print(f"{kind:<7} PEFT's scaling is yours: {scale(5, 16, kind):.4f}")
else:
    print("PEFT is not installed: pip install peft, and run this cell again")

# %%
if has_peft:
    torch.manual_seed(0)
    ours = lesson.Model()
    theirs = lesson.Model()
    theirs.load_state_dict(ours.state_dict())
    theirs = get_peft_model(theirs, config)
    inject(ours, ["up"], lambda base: lora_layer(base, r=5, alpha=16, use_rslora=True))
    other = theirs.base_model.model.up
    ours.up.A.data.copy_(other.lora_A.default.weight)
    optimizers = [
        torch.optim.AdamW(plus_groups(ours, lr=0.01, ratio=8.0)),
        create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=8.0),
    ]
    tokens = torch.arange(10)
    for _ in range(5):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(tokens), tokens.flip(0)).backward()
            optimizer.step()
    for mine, its in ((ours.up.A, other.lora_A.default.weight), (ours.up.B, other.lora_B.default.weight)):
        assert (mine - its).abs().max() < 1e-4 * mine.abs().max()  # float32, and Adam's division by small numbers
    print("five steps of LoRA+: A and B agree with PEFT's to 1e-4 of the largest entry")

# %% [markdown]
# ## 12 · Interview questions
#
# <details><summary>What is LoRA alpha?</summary>
#
# The numerator of the factor s in front of B A. It sets the volume of the update in the forward pass. In training it
# multiplies Adam's first step by s and SGD's by s². *A weak answer*: "a learning rate", without saying of which
# optimizer, and that the forward pass has it too.
# </details>
#
# <details><summary>You raise r from 8 to 64 and the model learns less. Why?</summary>
#
# With alpha kept, s = alpha / r fell 8-fold. Under SGD the first step goes as s² r and is 8 times shorter. Under Adam
# it is as long as before, so look elsewhere too. *A weak answer* blames overfitting.
# </details>
#
# <details><summary>Can one turn a rsLoRA adapter into a LoRA one?</summary>
#
# Yes, exactly: A and B stay, and alpha becomes alpha · √r. The update is the same. *A weak answer* trains it again.
# </details>
#
# <details><summary>Would you use LoRA+?</summary>
#
# It costs nothing but a choice, the ratio. I would try it against LoRA at LoRA's own best rate. *A weak answer* quotes
# a speed-up without that condition.
# </details>

# %% [markdown]
# ## 13 · Recap
#
# `s = alpha / r` or `alpha / √r` · `ΔW = s · B A` · `dB = s · G Aᵀ` · `lr_B = ratio · lr_A`
#
# Five lines to carry forward:
#
# 1. alpha is a volume: it acts on the forward pass at once, and on training through s.
# 2. First step from B = 0: SGD lr · s², Adam lr · s. Doubling alpha is lr · 4 or lr · 2.
# 3. With r: s² r for SGD, s r for Adam. alpha / √r keeps the first, alpha / r the second.
# 4. LoRA+ is groups of an optimizer: each parameter that trains in exactly one.
# 5. Compare methods each at its own best rate; the same rate for both is a race with one runner.
#
# Further reading: [rsLoRA](https://arxiv.org/abs/2312.03732), for the theorem and its condition;
# [LoRA+](https://arxiv.org/abs/2402.12354), for the argument from width; [PiSSA](https://arxiv.org/abs/2404.02948), for
# a start that is not random.
#
# ### Before you go
#
# <!-- quiz: exit -->
