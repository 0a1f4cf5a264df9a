# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 09 · Merge, unmerge, and how to know that nothing was lost
#
# * **You will be able to** *merge* an adapter into its weight and *take it out* again to the last bit; *measure* what a
#   merge lost, relative to what the adapter does; *recognise* a broken merge by the shape of one scatter plot.
# * **You need** lesson 03 (`W + s B A`), `LoRALinear` from lesson 04, and the idea that a float has only so many
#   digits.
# * **Minutes**: read 30 · exercises 32 · stretch and explain 30.
# * **Runs on** any CPU in about half a minute. The end uses the small language model that the set-up has fetched.

# %% [markdown] tags=["solution"]
# This is the full notebook, with every answer. The one with blanks for you is `student/09_merge.ipynb`.

# %% [markdown] tags=["student"]
# This is your notebook: fill in the lines that say `...  # your code`. Building the course again never writes over a
# notebook that somebody has edited. The answers are in `09_merge.ipynb`, one folder up.

# %% tags=["setup"]
import contextlib
import importlib.util
import inspect
import logging
import re
import warnings

import numpy as np
import torch
from torch import nn

from minilora.classroom.evidence import expect_bug
from minilora.classroom.bets import predict, settle
from minilora.classroom.claims import show_claims
from minilora.classroom.exercises import check, examine, find_exercise, overview, hint  # noqa: F401  hint("09.1")
from minilora.classroom.lessons import lesson_module
from minilora.classroom.explorer import explorer, show
from minilora.classroom.merging import ANY_INPUT, FORMATS, OWN_INPUT, RATIOS, drift, merge_as, merge_errors
from minilora.classroom.merging import random_layer, share_that_moves, to_bfloat16
from minilora.classroom.plots import arrivals, drifts, merge_error, real_merges
from minilora.numpy_lora.forward import delta_weight, lora_forward
from minilora.torch_lora import LoRALinear, count_parameters, inject, merged, remove

lesson = lesson_module("09")
np.set_printoptions(precision=4, suppress=True)

# %% [markdown]
# ## 1 · Warm-up
#
# <!-- quiz: warm-up -->

# %% [markdown] tags=["slide"]
# ## 2 · The problem
#
# Your adapter works. For deployment you fold it into the weight, `W′ = W + s B A`: one addition, and the layer is a
# plain matrix again, with nothing extra to compute, to store, or to explain to the serving team. You even test it:
# merged and unmerged outputs agree to 0.001. You ship, and users say that the model has forgotten its training.
#
# The number that hurts is how much a young adapter moves an output **at the most**. Compare it with the tolerance.

# %% tags=["slide"]
W, A, B = random_layer(d=256, r=8)
B = 8e-4 * B  # ‖ΔW‖ is now 0.08 % of ‖W‖: an adapter after its first few steps
x = np.random.default_rng(1).normal(size=(4, 256))
live, base = lora_forward(x, W, A, B, alpha=8.0), x @ W.T
print(f"outputs reach {np.abs(base).max():.2f}; the adapter moves them by {np.abs(live - base).max():.5f} at the most")
print("agree to 0.001 with the adapter at work and with the adapter thrown away:", np.allclose(live, base, atol=1e-3))
assert np.allclose(live, base, rtol=0, atol=1e-3)

# %% [markdown]
# ## 3 · Predict
#
# Two formats, in a line each. **bfloat16**: a float in 16 bits, 8 of which are significant, 2 to 3 decimal digits.
# **NF4**: 4 bits a weight, so one of 16 levels, in units of the largest weight in its block of 64.
#
# Place a bet before you read on: put your answer in `bet=`. All are settled in section 7. Leave `None` to skip.

# %%
predict(
    "09.share",
    "W is 1024 × 1024 in bfloat16, ‖ΔW‖ is 0.08 % of ‖W‖. We merge. Which share of the weights changes (0 to 1)?",
    bet=None,
)
predict(
    "09.nf4",
    "W is in NF4, ‖ΔW‖ is 1 % of ‖W‖. We merge and round to NF4 again. How large is the error beside the effect of "
    "the adapter?",
    choices=["1 %", "10 %", "50 %", "100 %"],
    bet=None,
)
predict(
    "09.cycles",
    "W is in bfloat16. We merge an adapter and subtract it again, the same one 100 times. How many times the damage of "
    "one cycle?",
    bet=None,
)

# %% [markdown] tags=["slide"]
# ## 4 · The one picture
#
# The error of a merge, measured in the only unit that matters: **the effect of the adapter**. At 1 the merge is as
# good as none. From left to right the adapter grows. Three ways to store the weight, and on the right, for one of
# them, what became of single weights: how far each was meant to move, and how far it did.
#
# Drag `ratio`, and switch `stored_as`. Then try `d` and `r`: what do they change? And `inputs`: an adapter reacts
# only to the directions in the rows of `A`. On inputs from just there its effect is at its strongest. Which of the
# three lines does that save?


# %%
def draw(ratio, stored_as, inputs, d, r):
    W, A, B = random_layer(d, r)
    one = merge_as(stored_as, W, ratio * B @ A)
    some = np.random.default_rng(0).choice(W.size, 600, replace=False)
    typical = np.sqrt(np.mean(one.meant**2))
    sample = one.meant.flat[some] / typical, one.arrived.flat[some] / typical
    return merge_error(RATIOS, merge_errors(d, r, inputs), stored_as, ratio, sample)


def finding(ratio, stored_as, inputs, d, r):
    error = merge_errors(d, r, inputs)[stored_as][RATIOS.index(ratio)]
    size = f"{stored_as}, ‖ΔW‖ = {100 * ratio:.3g} % of ‖W‖"
    return f"{size}: the merge is off by {100 * error:.2g} % of the adapter's effect."


def in_words(ratio, stored_as, inputs, d, r):
    lines = {name: merge_errors(d, r, inputs)[name] for name in FORMATS}
    ends = "; ".join(f"{name} from {line[0]:.2g} to {line[-1]:.2g}" for name, line in lines.items())
    return (
        f"Left: error of the merge over effect of the adapter, on inputs from {inputs}, against the adapter's size, "
        f"from 0.01 % to 100 % of W, both on log scales, for d = {d} and r = {r}: {ends}. The line of NF4 is flat at 1 "
        f"up to 3 % and then falls, that of bfloat16 bends at about 0.1 %, that of float32 is straight and far below. "
        f"Right: for {stored_as} at {100 * ratio:.3g} %, 600 weights, how far each was meant to move and how far it "
        f"moved; a right merge lies on the diagonal."
    )


# %%
picture = explorer(
    draw,
    alt=in_words,
    finding=finding,
    start={"ratio": 8e-4, "stored_as": "bfloat16", "d": 256, "r": 16},
    ratio=list(RATIOS),
    stored_as=list(FORMATS),
    inputs=[ANY_INPUT, OWN_INPUT],
    d=[64, 128, 256, 512],
    r=[1, 4, 16, 64],
)

# %%
picture.strip(ratio=[3e-4, 3e-3, 0.03, 0.3])

# %% [markdown] tags=["slide"]
# ## 5 · Derivation
#
# **On paper a merge is exact.**
#
# | letter | shape | what it is |
# |---|---|---|
# | `x` | (n, in) | the rows that come in |
# | `W`, `W′` | (out, in) | the weight before and after: the same shape, the same bytes |
# | `A`, `B` | (r, in), (out, r) | the adapter |
# | `ΔW = s B A` | (out, in) | the update; `s = alpha / r`, and its rank is at most r |
#
# ```
# x W′ᵀ = x (W + s B A)ᵀ = x Wᵀ + s (x Aᵀ) Bᵀ        the layer with the adapter
# ```
#
# Two places for mistakes are in that line already: the `s`, and the transpose. The third is not in it: **numbers are
# rounded**.
#
# **The grid.** A bfloat16 has 8 significant bits. Between two powers of two, 2ᵉ and 2ᵉ⁺¹, there are 128 of them, 2ᵉ⁻⁷
# apart. `W` lies on that grid. A weight moves only if its change is more than half a step, otherwise the sum is
# rounded back to where it was:
#
# ```
# w moves   if   |δ| > ½ step
# ½ step    is between 2⁻⁹ |w| and 2⁻⁸ |w|: about 0.3 % of the weight
# ```
#
# **How many move?** If the entries of `W` and `ΔW` are two bell curves, the quotient δ/w has a Cauchy distribution,
# whose tail is an arctangent:
#
# ```
# share that moves = P(|δ/w| > t) = 1 − (2/π) · arctan(t / ρ)
#
# t = 2^−8.5 ≈ 0.28 %,   ρ = ‖ΔW‖ / ‖W‖
# ```
#
# **How large is the error?** For ρ far above t every weight moves, and each is off by something within ± half a step:
# typically step/√12, about 0.17 % of the weight. So error / effect ≈ 0.0017 / ρ: a line with slope −1 in the picture.
# A float32 has 16 bits more, and its line lies 2¹⁶ lower. For ρ far below t nothing moves, and the error *is* the
# effect: 1.
#
# **NF4** has 16 levels for a whole block of 64 weights, in units of the block's largest. The nearest level next to
# the one a weight is on is a fifth of a typical weight away, or more, and half of that is what it takes to get there:
# at ρ = 1 % almost no weight does. One does move: the largest itself, because it *is* the unit. And it takes the
# other 63 with it, all by the same factor, which is not what was asked of them. What arrives is one weight in 64,
# plus that:
#
# ```
# error ≈ √(1 + 1/p²), more than 1        p = largest / typical weight in a block, about 2.5
# ```

# %%
W, A, B = random_layer(256, 16)
for ratio in (8e-4, 8e-3, 8e-2):
    one = merge_as("bfloat16", W, ratio * B @ A)
    print(f"ρ = {ratio:.2%}  moved: formula {share_that_moves(ratio):.3f}, measured {one.changed:.3f}", end="   ")
    print(f"error: 0.0017 / ρ = {0.0017 / ratio:.3f}, measured {one.error:.3f}")
    assert abs(share_that_moves(ratio) - one.changed) < 0.02

one = merge_as("NF4", W, 0.01 * B @ A)
blocks = np.abs(one.W).reshape(-1, 64)
one_over_p = np.sqrt(np.mean(blocks**2) * np.mean(1 / blocks.max(axis=1) ** 2))
along = np.sum(one.arrived * one.meant) / np.sum(one.meant**2)
print(f"NF4 at 1 %: p = {1 / one_over_p:.2f}; √(1 + 1/p²) = {np.sqrt(1 + one_over_p**2):.3f}, measured {one.error:.3f}")
print(f"           of ΔW itself {along:.4f} arrives; one in 64 is {1 / 64:.4f}")
assert abs(np.sqrt(1 + one_over_p**2) - one.error) < 0.02

# %% [markdown]
# (At 0.08 % the second law is out of its depth: it promises more than the whole effect. It counts on every weight to
# move, and here 18 % do. The others stay where they were and lose their whole change, so the error is 0.83.)
#
# **By hand**: out = 2, in = 3, r = 1, alpha = 2, so s = 2. Above 1 the steps of bfloat16 are 4/512, just below ¼ they
# are ½/512.
#
# ```
# W = [1   2  1 ]     A = [1 0 5]     B = [ 1]/1024       ΔW = [ 1 0  5]/512
#     [¼   2  ¼ ]                         [-1]                 [-1 0 -5]
#
# 1 + 1/512   less than half a step: stays 1              lost
# 1 + 5/512   the next numbers are 4/512 and 8/512: 4     a fifth lost
# ¼ − 1/512, ¼ − 5/512   both on the grid                 exact
#
# error / effect = √(1² + 1²) / √(1² + 5² + 1² + 5²) = √2 / √52 = 0.196
# ```
#
# The same ΔW is lost on a weight of 1 and exact on a weight of ¼: **what arrives depends on the weight, not on the
# adapter.**
#
# **And back, by hand.** Take w = 255/256, just below 1, and δ = 7/1024. In units of 1/1024: 1020 + 7 = 1027, but
# above 1 the steps are 8, so it becomes 1024. Back: 1024 − 7 = 1017; below 1 the steps are 4: 1016. We started from
# 1020. A sum that crosses a power of two lands on a coarser grid, and subtraction does not know what was there. Do it
# again: 1016 + 7 = 1023, becomes 1024, and back to 1016. The same adapter does its damage once.

# %%
W1 = np.array([[1, 2, 1], [1 / 4, 2, 1 / 4]])
A1, B1 = np.array([[1.0, 0, 5]]), np.array([[1.0], [-1]]) / 1024
one = merge_as("bfloat16", W1, delta_weight(A1, B1, alpha=2.0))
print("meant, in 1/512:  ", (512 * one.meant).tolist(), "\narrived, in 1/512:", (512 * one.arrived).tolist())
assert np.array_equal(512 * one.arrived, [[0, 0, 4], [-1, 0, -5]]) and np.isclose(one.error, np.sqrt(2 / 52))

w, delta = np.array([255 / 256]), 7 / 1024
for cycle in (1, 2):
    w = to_bfloat16(to_bfloat16(w + delta) - delta)
    print(f"255/256 after cycle {cycle}: {float(w[0]) * 256:.0f}/256")

# %% [markdown]
# ## 6 · Build it
#
# Two exercises in NumPy and one in PyTorch. `check` tries yours, says what came back and, if it knows the mistake,
# its name. What follows uses *your* code where it passes, else the reference. Stuck? Run `hint("09.1")` in a new
# cell, as often as there are steps.
#
# **09.1 · Merge and unmerge, with a guard.** Fill in two methods. A second merge is not a detail: a server that
# merges on every reload does it. The check's layer is square, as attention's are, so that a wrong shape will not save
# you.


# %%
class AdaptedLayer:
    def __init__(self, W, A, B, alpha):
        self.W, self.A, self.B, self.alpha = W, A, B, alpha
        self.is_merged = False

    def forward(self, x):
        return x @ self.W.T if self.is_merged else lora_forward(x, self.W, self.A, self.B, self.alpha)

    def merge(self):
        """W ← W + ΔW, once; a second time RuntimeError, and nothing has changed."""
        # BEGIN SOLUTION
        if self.is_merged:
            raise RuntimeError("merged already: a second merge would add the update twice")
        self.W = self.W + self.alpha / len(self.A) * self.B @ self.A
        self.is_merged = True
        # END SOLUTION

    def unmerge(self):
        """W ← W − ΔW, once; a second time RuntimeError."""
        # BEGIN SOLUTION
        if not self.is_merged:
            raise RuntimeError("not merged: there is nothing to take out")
        self.W = self.W - self.alpha / len(self.A) * self.B @ self.A
        self.is_merged = False
        # END SOLUTION


# %%
Layer = check("09.1", AdaptedLayer).function

# %% [markdown]
# **09.2 · A check that can fail.** Three outputs for the same inputs: of the merged model, of the live one (base and
# adapter side by side) and of the base alone. Answer whether the merge keeps the adapter, up to a part `tolerance` of
# its effect. If there is no effect, refuse to answer.


# %%
def equivalent(merged, live, base, tolerance):
    """‖merged − live‖ ≤ tolerance · ‖live − base‖; ValueError where the adapter has no effect."""
    # BEGIN SOLUTION
    effect = np.linalg.norm(live - base)
    if effect == 0:
        raise ValueError("live and base are equal: nothing could be lost, so nothing can be checked")
    return np.linalg.norm(merged - live) <= tolerance * effect
    # END SOLUTION


same = check("09.2", equivalent).function

# %% [markdown]
# **09.3 · Back to the last bit.** A sampler needs the merged weight for a moment, between two steps of training,
# thousands of times. Write what it enters with `with`: inside, `linear.weight` is `W + ΔW`, summed in float32 and
# rounded once; after it, `W`, exactly, whatever happened inside. `delta` is float32, the weight may be bfloat16.


# %%
@contextlib.contextmanager
def folded_in(linear, delta):
    """Compute with W + ΔW inside the block; W is back after it, bit for bit."""
    # BEGIN SOLUTION
    kept = linear.weight.data
    linear.weight.data = (kept.float() + delta).to(kept.dtype)
    try:
        yield
    finally:
        linear.weight.data = kept
    # END SOLUTION


fold = check("09.3", folded_in).function

# %% [markdown]
# ## 7 · Run it, then settle the bets
#
# **Equivalence, rank and parameters**, with your layer and your check: adapters of 3 % of `W`, on a 512 × 512 layer,
# merged in float64 and in bfloat16. Each merged weight holds as many numbers as `W`: the adapter's are gone. The
# *rank* of what arrived is another matter.


# %%
def rank_of(update):
    """How many singular values are above a millionth of the first."""
    values = np.linalg.svd(update, compute_uv=False)
    return int(np.sum(values > 1e-6 * values[0]))


x = np.random.default_rng(5).normal(size=(32, 512))
print("                                      merged in float64      merged in bfloat16")
print("  r   adapter  share of W   merged    error      rank        error   rank   same to 10 %?")
for r in (1, 4, 16):
    W, A, B = random_layer(512, r)
    W = to_bfloat16(W).astype(np.float64)  # on the grid, like most weights that you can download
    layer = Layer(W, A, 0.03 * B, alpha=float(r))
    live, base = layer.forward(x), x @ W.T
    layer.merge()
    exact, rounded = layer.W, to_bfloat16(layer.W)
    off = [np.linalg.norm(x @ stored.T - live) / np.linalg.norm(live - base) for stored in (exact, rounded)]
    print(f"{r:>3} {A.size + B.size:>9,} {(A.size + B.size) / W.size:>11.2%} {exact.size:>8,}", end="")
    print(f"{off[0]:>9.0e} {rank_of(exact - W):>9} {off[1]:>12.1%} {rank_of(rounded - W):>6}", end="   ")
    print(same(x @ rounded.T, live, base, 0.1))
    assert same(x @ exact.T, live, base, 1e-10) and rank_of(exact - W) == r and exact.shape == W.shape

# %% [markdown]
# In bfloat16 the update that arrived has full rank: the low-rank one, and a carpet of rounding over all 512
# directions. From the merged model and its base you can guess the adapter, but never have it back. **Keep the adapter's
# file.**
#
# **The first two bets**, at the size they asked for.

# %%
W, A, B = random_layer(1024, 16)
young, trained = merge_as("bfloat16", W, 8e-4 * B @ A), merge_as("NF4", W, 0.01 * B @ A)
print(f"bfloat16, ρ = 0.08 %: {young.changed:.1%} of the weights change, the error is {young.error:.0%} of the effect")
settle("09.share", young.changed)
print(f"NF4, ρ = 1 %: {trained.changed:.0%} of the weights change, the error is {trained.error:.0%} of the effect")
settle("09.nf4", min(["1 %", "10 %", "50 %", "100 %"], key=lambda text: abs(float(text[:-2]) / 100 - trained.error)))
assert 0.15 < young.changed < 0.2 and young.error > 0.8 and trained.error > 1

# %% [markdown]
# In NF4 nine weights in ten change and nothing of the adapter arrives: that is the block's unit moving, and all 64
# with it.
#
# **The third bet**, and two cases it did not ask about: a new adapter each time, as when training goes on between two
# merges, and a cycle whose halves do not fit, because ΔW is added as it is and rounded before it is subtracted.

# %%
W, A, B = random_layer(256, 16)
again = [0.3 * B @ A] * 100
others = [0.3 * b @ a for _, a, b in (random_layer(256, 16, seed) for seed in range(1, 101))]
curves = {
    "same adapter": drift(W, again),
    "a new one each time": drift(W, others),
    "same, subtracted rounded": drift(W, again, round_first=True),
}
show(
    drifts(curves),
    alt="Distance of W from where it was against the number of cycles, 1 to 100, log scales. With the same adapter a "
    "flat line at 0.1 %. With a new adapter each time a straight rise with slope one half, to ten times that. Where a "
    "rounded update is subtracted it starts flat and then rises even more steeply, past the other.",
    finding="The same adapter does its damage once; new ones walk away at random; halves that do not fit march.",
)
settle("09.cycles", curves["same adapter"][-1] / curves["same adapter"][0])

# %% [markdown]
# Now yours, from 09.3: a hundred adapters through one bfloat16 layer. It keeps `W`, which costs as much memory as `W`
# while the adapter is in. `LoRALinear.merge()` does the same, so its `unmerge()` is exact, and the `with
# merged(model):` of the package is this for every layer of a model.

# %%
linear = nn.Linear(256, 256, bias=False).bfloat16().requires_grad_(False)
linear.weight.copy_(torch.from_numpy(W))
before = linear.weight.clone()
for seed in range(1, 101):
    _, a, b = random_layer(256, 16, seed)
    with fold(linear, torch.from_numpy(0.3 * b @ a).float()):
        assert not torch.equal(linear.weight, before)
print("weights that differ after 100 adapters:", int((linear.weight != before).sum()))
assert torch.equal(linear.weight, before)

# %% [markdown]
# ### A real model
#
# SmolLM2 has 135 million parameters in 30 layers. To be quick we adapt two projections in each of the last ten, and
# let them learn a single sentence in four steps. That is enough for an adapter with a direction, which the random
# ones above did not have.

# %%
from minilora.llm import load_model

model, tokenizer = load_model("smollm2-135m")
texts = "The dragon paid for his library card with a song.", "Our train to the coast was late because of the snow."
learned, unseen = (torch.tensor([tokenizer.encode(text)[:11]]) for text in texts)
last_ten = re.compile(r"model\.layers\.2\d\.self_attn\.[qv]_proj")
start = torch.Generator().manual_seed(9)
report = inject(model, last_ten, lambda base: LoRALinear(base, r=8, alpha=16, generator=start))
print(report)
adapted = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}
trainable = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trainable, lr=3e-3, weight_decay=0.0)
for step in range(1, 5):
    loss = nn.functional.cross_entropy(model(learned)[0, :-1], learned[0, 1:])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.1f}")


# %% [markdown]
# **Merged against live, in float32**, on both sentences; then the adapters are removed and the model is what it was.


# %%
def logits():
    with torch.no_grad():
        return model(torch.cat([learned, unseen])).numpy()


live, updates = logits(), {name: layer.delta_weight().detach().numpy() for name, layer in adapted.items()}
W0 = {name: layer.base.weight.numpy().copy() for name, layer in adapted.items()}
with merged(model):
    folded = logits()
parameters = count_parameters(model)
remove(model)
base = logits()
outputs = {"float32": (folded, live, base)}
print("parameters: with adapters", f"{parameters.total:,}", " merged or removed", f"{count_parameters(model).total:,}")
print(f"error / effect in float32: {np.linalg.norm(folded - live) / np.linalg.norm(live - base):.0e}")
assert same(folded, live, base, 1e-3) and not np.array_equal(folded, live)
assert all(np.array_equal(model.get_submodule(name).weight.numpy(), w) for name, w in W0.items())

# %% [markdown]
# **And in the other two formats.** For each we store the weights so, and take the logits of the base, of the base
# with the update added in float32 (which does what the live model does, as we just saw), and of the merged one.


# %%
def logits_with(weights):
    for name, weight in weights.items():
        model.get_submodule(name).weight.data = torch.from_numpy(weight.astype(np.float32))
    return logits()


merges = {kind: {name: merge_as(kind, w, updates[name]) for name, w in W0.items()} for kind in FORMATS}
for kind in ("bfloat16", "NF4"):
    layers = merges[kind].items()
    base = logits_with({name: one.W for name, one in layers})
    live = logits_with({name: one.W + one.meant for name, one in layers})
    folded = logits_with({name: one.merged for name, one in layers})
    outputs[kind] = folded, live, base

ratios = [float(np.linalg.norm(updates[name]) / np.linalg.norm(w)) for name, w in W0.items()]
points, stars = {}, {}
print("error / effect   of the weights   of the logits: learned sentence   unseen sentence")
for kind, (folded, live, base) in outputs.items():
    off = [float(np.linalg.norm((folded - live)[row]) / np.linalg.norm((live - base)[row])) for row in (0, 1)]
    points[kind] = [(ratio, one.error) for ratio, one in zip(ratios, merges[kind].values(), strict=True)]
    stars[kind] = [(float(np.median(ratios)), off[1])]
    print(f"{kind:<14} {np.median([error for _, error in points[kind]]):>17.2g} {off[0]:>33.1g} {off[1]:>17.1g}")

# %%
show(
    real_merges(RATIOS, merge_errors(512, 8), points, stars),
    alt="The three lines of the first picture, and on them twenty layers of SmolLM2 for each format, with adapters of "
    "about 1 % of W. They lie on the lines. A star for each format is the error of the logits on an unseen sentence: "
    "for NF4 near 1, as its layers; for bfloat16 well below them.",
    finding="Real layers lie on the lines. Logits forgive noise without direction, but not what never arrived.",
)
assert not same(*outputs["NF4"], 0.5) and same(*outputs["bfloat16"], 0.3)

# %% [markdown]
# Why are logits kinder than weights? The rounding noise of bfloat16 has no direction; a trained adapter has: its `A`
# looks at the inputs that occur. That is the switch `inputs` of the first picture. It helps where all of the update
# arrives, with noise. It cannot help where the update does not arrive: in NF4 nothing is there to be amplified.
#
# What to do instead: merge into the **dequantized** weight and keep 16 or 32 bits, or leave the adapter beside the
# 4-bit weight, as it was trained. `QLoRALinear` refuses the other way, and says which:

# %%
from minilora.qlora import QLoRALinear

torch.manual_seed(0)
layer = QLoRALinear(nn.Linear(256, 256, bias=False), r=8, alpha=16)
nn.init.normal_(layer.B, std=0.01)
x = torch.randn(32, 256)
with expect_bug(TypeError, match="does not store floats"):
    layer.merge()
with torch.no_grad():
    live, base, fused = layer(x).numpy(), layer.base(x).numpy(), layer.fused()(x).numpy()
kind = type(layer.fused()).__name__
print(f"fused() is an nn.{kind} in float32; the same as the live layer to 0.01 %:", same(fused, live, base, 1e-4))
assert same(fused, live, base, 1e-4)

# %% [markdown] tags=["slide"]
# ## 8 · Break it
#
# Five merges, all with a mistake that real code had. A dot is one output: to the right the effect that the adapter
# was meant to have, upwards the effect that arrived. A right merge lies on the diagonal. Before you open the
# diagnosis: *which bug is this?*

# %%
patients = lesson.gallery()  # of each: merged, live and base, as the author of the merge had them to compare
_, live, base = patients["1"]
typical = float(np.std(live - base))
show(
    arrivals({f"Patient {n}": ((l - b) / typical, (m - b) / typical) for n, (m, l, b) in patients.items()}),
    alt="Five scatter plots of arrived against meant effect with a dashed diagonal. Patient 1: a sharp straight line, "
    "flatter than the diagonal. Patient 2: a round cloud. Patient 3: a sharp line, twice as steep as the diagonal. "
    "Patient 4: a line exactly on the diagonal, shorter than it. Patient 5: a flat cloud around zero.",
    finding="A wrong slope, no relation at all, twice too steep, too good to be true, and flat.",
)
print("patient   error / effect   allclose(atol=1e-3)   yours, at 5 %")
for n, (m, l, b) in patients.items():
    off, usual, yours = np.linalg.norm(m - l) / np.linalg.norm(l - b), np.allclose(m, l, atol=1e-3), same(m, l, b, 0.05)
    print(f"{n:>4} {off:>17.3f} {usual!s:>17} {yours!s:>19}")
    assert usual and yours == (n == "4")

# %% [markdown]
# <details><summary><b>Patient 1</b>, the wrong slope</summary>
#
# Merged without `alpha / r`: every effect is there, in the right direction, and too small by one factor, here 3/8.
# The same picture, with a slope of 1/√r, comes from an rsLoRA adapter, which is scaled by `alpha / √r`, in the hands of
# a tool that reads `alpha` and `r` and divides.
# </details>
#
# <details><summary><b>Patient 2</b>, no relation at all</summary>
#
# ΔW was added transposed. On a square weight no shape objects, and an error of about √2 times the effect is what two
# unrelated updates of one size make. GPT-2 stores its weights as (in, out), and its attention's output projection is
# square: there this bug waits.
# </details>
#
# <details><summary><b>Patient 3</b>, twice too steep</summary>
#
# Merged twice: a reload that merges again, or the adapter left active on top of the merged weight. Nothing crashes;
# the model is "a bit overtrained".
# </details>
#
# <details><summary><b>Patient 4</b>, too good to be true</summary>
#
# The merge is patient 1's, without `alpha / r`. But it was made in place, and the output to compare with was taken
# *afterwards*, from the same object: a model was compared with itself. The error is exactly 0. **An honest merge is
# never exactly 0 off**: rounding alone would show. Take the live output before you merge, and be suspicious of
# perfection.
# </details>
#
# <details><summary><b>Patient 5</b>, flat</summary>
#
# Merged into NF4 and rounded to NF4 again. Whatever was meant, next to nothing arrives, and what does arrive is
# unrelated. It is the only one of the five without a mistake in the code, and the most reported: PEFT's issues 1035,
# 1043 and 2321, transformers' 31293.
# </details>
#
# All five pass `allclose(atol=1e-3)`. Yours stops four of them, and patient 4 as soon as the live output is one from
# before the merge. And where everything was taken after an in-place merge, base included, it refuses to answer:

# %%
with expect_bug(ValueError):
    same(patients["4"][0], patients["4"][0], patients["4"][0], 0.05)
print("patient 4 with the live output taken before the merge:", same(patients["4"][0], live, base, 0.05))
for name in ("no scaling", "ΔW transposed", "merged twice", "in place"):
    diagnosis = examine(find_exercise("09.1"), find_exercise("09.1").bug(name)).failure.bug
    assert diagnosis.name == name
    print(f"09.1  {diagnosis.name}: {diagnosis.why}")

# %% [markdown]
# And two that stop by themselves: the transposed update where the weight is not square, and the package's guard.

# %%
narrow = np.zeros((40, 64))
with expect_bug(ValueError, match="could not be broadcast"):
    narrow + (np.zeros((40, 3)) @ np.zeros((3, 64))).T
layer = LoRALinear(nn.Linear(64, 64), r=3, alpha=8)
layer.merge()
with expect_bug(RuntimeError, match="a second merge would add the update twice"):
    layer.merge()

# %% [markdown]
# ## 9 · Check the claims
#
# Sentences about merging that you are likely to meet, each with the code that decides it (`claims.py`, beside this
# lesson). Note how often the answer is *holds when*: a sentence about merging says too little as long as it does not
# say in which number format, and against what it is measured.

# %%
show_claims("09.merge")

# %% [markdown]
# The last one is about weights: quantizing after the merge rounds no less. Whether a whole model answers better is a
# question for a benchmark.
#
# ## 10 · Exercises
#
# **Core** (checked, in section 6):

# %%
overview("09")

# %% [markdown]
# **Stretch: an exact way back for less than a copy.** Keeping `W` costs 2 bytes a weight. But subtraction brings
# almost all weights back right, and what was merged is known. Write `keep`, which looks at everything while `W` is
# still there, and `restore`, which gets the merged weight, ΔW and what `keep` returned. The result must be `W`, every
# bit; the target is not pass or fail: **as few bytes a weight as you can.**


# %%
def keep(W, merged, delta):
    """What restore will need: a tuple of arrays."""
    # BEGIN SOLUTION
    wrong = np.flatnonzero(to_bfloat16(merged - delta) != W)
    return wrong.astype(np.uint32), (W.flat[wrong].view(np.uint32) >> 16).astype(np.uint16)
    # END SOLUTION


def restore(merged, delta, kept):
    """W, to the last bit."""
    # BEGIN SOLUTION
    wrong, upper_halves = kept
    W = to_bfloat16(merged - delta)
    W.flat[wrong] = (upper_halves.astype(np.uint32) << 16).view(np.float32)
    return W
    # END SOLUTION


# %%
for ratio in (0.003, 0.03, 0.3):
    W, A, B = random_layer(256, 16)
    one = merge_as("bfloat16", W, ratio * B @ A)
    kept = keep(one.W, one.merged, one.meant)
    if kept is not None:
        exact = np.array_equal(restore(one.merged, one.meant, kept), one.W)
        size = sum(array.nbytes for array in kept) / W.size
        print(f"ρ = {ratio:.1%}: exact: {exact}, {size:.3f} bytes a weight; a copy of W takes 2")

# %% [markdown]
# Can you do better? Most of the wrong ones are off by a single step, up or down: that is one bit, not sixteen; and
# the distances between their places are small numbers.
#
# **Explain** (a few sentences each; the instructor's notes have a rubric with sample answers):
#
# 1. A colleague reports: "I merged in bfloat16, the largest difference of any output is 0.0004, so we are fine."
#    Which two numbers do you ask for, and what would worry you?
# 2. Merging into NF4 gives an error of more than 100 % of the effect. How can a merge be worse than none? What would
#    the error be if the blocks kept their old unit?
# 3. You are given a merged bfloat16 model and its base, and asked for the adapter. What can you recover, how, and
#    what not?

# %% [markdown]
# ## 11 · The same in PEFT
#
# PEFT is the library that most people use. If it is installed, the next cells give its layer our `A` and `B` and
# compare: the merged weight, bit for bit, and then a hundred cycles.

# %%
has_peft = importlib.util.find_spec("peft") is not None
if has_peft:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT loads it, and it remarks on the processor
    import peft

    def beside_peft(dtype):
        """Our layer and PEFT's, with the same W, A and B."""
        torch.manual_seed(1)
        ours = LoRALinear(nn.Linear(256, 256, bias=False).to(dtype), r=8, alpha=16)
        nn.init.normal_(ours.B, std=0.3)
        model = nn.Sequential(nn.Linear(256, 256, bias=False)).to(dtype)
        model.load_state_dict({"0.weight": ours.base.weight})
        theirs = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=["0"]))
        layer = theirs.base_model.model[0]
        layer.lora_A.default.weight.data, layer.lora_B.default.weight.data = ours.A.data.clone(), ours.B.data.clone()
        return ours, theirs, layer.base_layer

    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs, layer = beside_peft(dtype)
        ours.merge(), theirs.merge_adapter()
        equal = torch.equal(ours.base.weight, layer.weight)
        print(f"{dtype}: merged weights equal to the bit: {equal}")
        assert equal
else:
    print("PEFT is not installed: pip install peft, and run this cell again")

# %%
if has_peft:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        theirs.merge_adapter()
    print("a second merge in PEFT:", f"a warning, “{said[0].message}”" if said else "nothing is said")
    W0, update = ours.unmerged_weight.float().numpy(), ours.delta_weight().detach().numpy()
    ours.unmerge(), theirs.unmerge_adapter()
    after = {1: layer.weight.detach().float().numpy().copy()}
    for _ in range(99):
        ours.merge(), ours.unmerge()
        theirs.merge_adapter(), theirs.unmerge_adapter()
    after[100] = layer.weight.detach().float().numpy()
    march = drift(W0, [update] * 100, round_first=True)
    for cycles, weight in after.items():
        away = np.linalg.norm(weight - W0) / np.linalg.norm(W0)
        print(
            f"PEFT, {cycles:>3} cycles: W is {away:.3%} away; our march of section 7 predicts {march[cycles - 1]:.3%}"
        )
    print("ours, 100 cycles: equal to the bit:", np.array_equal(ours.base.weight.float().numpy(), W0))
    assert np.array_equal(ours.base.weight.float().numpy(), W0)

# %% [markdown]
# The marching line of section 7 was PEFT's (seen in version 0.21): `merge` adds the float32 update, `unmerge`
# subtracts it **after rounding it** to the weight's dtype. The difference between the two is small, and always the
# same, and always in the same direction. Somebody who merged and unmerged between the steps of a reinforcement
# learning run asked whether that is safe; a contributor measured 1000 cycles and found single weights off by two
# thirds of a mean weight (TRL issue 6688).
#
# **The vacuous check**, as an article prints it: `merge_and_unload()`, then compare the outputs of the merged model
# and of the adapter model. Let us make the merge wrong on purpose, as wrong as can be.

# %%
if has_peft:
    print(inspect.getsource(lesson_module("09", "claims").vacuous_check))

# %%
if has_peft:
    show_claims("09.peft")

# %% [markdown]
# ## 12 · Interview questions
#
# <details><summary>How do you test that a merge is right?</summary>
#
# Take outputs of the live model *before* anything is changed, and of the base; merge; compare ‖merged − live‖ with
# ‖live − base‖, on inputs like those it will meet. *A weak answer* is "allclose with some tolerance", without saying
# relative to what; or compares after an in-place merge, a model with itself.
# </details>
#
# <details><summary>You trained with QLoRA and want one model to ship. What do you merge into?</summary>
#
# Into the dequantized weight the adapter was trained on, kept in 16 bits; or not at all. Not back into NF4: its
# levels are a fifth of a weight apart or more, and the adapter moves weights by 1 %. And not into the original 16-bit
# weight without a test: the adapter has learned to make up for the rounding of *its* base. *A weak answer* says "call
# merge_and_unload" and knows no base it could go wrong on.
# </details>
#
# <details><summary>Can a merge be undone?</summary>
#
# With the adapter at hand: on paper by subtracting (alpha / r) · B A, in 16 bits only nearly; exactly by keeping W or
# its differences. Without the adapter: no. *A weak answer* is yes or no.
# </details>
#
# <details><summary>You merge and unmerge in bfloat16 for every batch of a run: what happens to the base?</summary>
#
# The adapter changes from time to time, so each cycle leaves another rounding behind: a random walk, growing with the
# square root of the number of cycles; with a systematic mismatch, in proportion to it. Keep W, or a float32 master
# copy, or do not merge. *A weak answer* says that errors average out: their mean does, their size does not.
# </details>
#
# <details><summary>Why merge at all?</summary>
#
# One product instead of three, each of which has to be started and reads or writes all rows; any runtime can load the
# result. Against it: one copy of the model for each adapter, no switching, and everything in this lesson. *A weak
# answer* quotes a speed-up without saying for which batch size.
# </details>
#
# ## 13 · Recap
#
# `W′ = W + s B A` · `s = alpha / r` · ρ = ‖ΔW‖ / ‖W‖ · error / effect = ‖merged − live‖ / ‖live − base‖
#
# Five lines to carry forward:
#
# 1. Measure a merge in units of the adapter's effect; 0 is suspicious, 1 is as good as none.
# 2. On a grid, what moves less than half a step does not move: error / effect ≈ 0.0017 / ρ in bfloat16, 2¹⁶ less in
#    float32.
# 3. Do not merge into NF4: one weight in 64 arrives. Dequantize first and keep 16 bits, or leave the adapter beside it.
# 4. Subtraction does not bring back what was rounded away. Keep W, and keep the adapter's file.
# 5. One scatter plot, effect arrived against effect meant, tells the common bugs apart: wrong slope, cloud, twice as
#    steep, flat.
#
# Further reading: [LoRA, section 4.1](https://arxiv.org/abs/2106.09685), for the paragraph that promises to merge and
# to switch by subtraction; [QLoRA, section 3](https://arxiv.org/abs/2305.14314), for the levels that a merge has to
# land on; [TRL issue 6688](https://github.com/huggingface/trl/issues/6688), for a drift that was found, measured and
# explained in public; PEFT's issues [1043](https://github.com/huggingface/peft/issues/1043) and
# [2321](https://github.com/huggingface/peft/issues/2321), for patient 5 as its owners described it, and
# [1388](https://github.com/huggingface/peft/issues/1388), for the rounding of a bfloat16 merge.
#
# ### Before you go
#
# <!-- quiz: exit -->
