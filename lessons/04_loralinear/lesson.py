# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 04 · `LoRALinear` in PyTorch
#
# * **You will be able to** *write* a LoRA layer that registers, trains and saves exactly A and B; *freeze* the rest
#   of a network, and *prove* it by counting; *test* gradients so that a wrong one cannot pass.
# * **You need** lesson 03 (forward, backward, who learns first), and one training loop in PyTorch that you
#   understood.
# * **Minutes**: read 30 · exercises 35 · stretch and explain 30.
# * **Runs on** any CPU in under a minute. No GPU.

# %% [markdown] tags=["solution"]
# This is the full notebook, with every answer. The one with blanks for you is `student/04_loralinear.ipynb`.

# %% [markdown] tags=["student"]
# This is your notebook: fill in the lines that say `...  # your code`. Building the course again never writes over a
# notebook that somebody has edited. The answers are in `04_loralinear.ipynb`, one folder up.

# %% tags=["setup"]
import copy
import importlib.util
import logging
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck

from minilora.classroom.costs import human_bytes
from minilora.classroom.evidence import expect_bug
from minilora.classroom.bets import predict, settle
from minilora.classroom.claims import show_claims
from minilora.classroom.exercises import check, examine, find_exercise, is_stub, overview
from minilora.classroom.exercises import hint  # noqa: F401  for you: hint("04.1")
from minilora.classroom.lessons import lesson_module
from minilora.classroom.explorer import explorer, show
from minilora.classroom.parameter_tree import EVERYTHING, parameter_tree as tree_of
from minilora.classroom.plots import parameter_tree, patients, spectra, starts
from minilora.llm.architectures import ARCHITECTURES

lesson = lesson_module("04")
SimpleAttention, adapt = lesson.SimpleAttention, lesson.adapt

# %% [markdown]
# ## 1 · Warm-up
#
# <!-- quiz: warm-up -->

# %% [markdown] tags=["slide"]
# ## 2 · The problem
#
# In NumPy nothing trained unless you wrote the line that moved it. In PyTorch it is the other way round: whatever is
# registered as a parameter trains, unless somebody forbids it; and what is *not* registered never trains, whatever
# you do with its gradient. So a LoRA of forty lines can compute the right numbers and still train far too much, or
# nothing at all, or save an empty file. No error is raised, and the loss may even look better than it should. You
# find out by counting, or when the memory runs out.
#
# The number that hurts, for a model as small as SmolLM2-135M with r = 8 on two projections a layer:

# %% tags=["slide"]
smol = ARCHITECTURES["smollm2-135m"]
setting = {"r": 8, "targets": ["q_proj", "v_proj"], "optimizer": "adamw"}
for name, freezes_rest in {"all else frozen": True, "only the adapted weights frozen": False}.items():
    state = tree_of(smol, **setting, freezes_rest=freezes_rest).state_bytes
    print(f"AdamW's state, {name:<32} {human_bytes(state):>9}")

# %% [markdown]
# ## 3 · Predict
#
# Place your bets (or leave `None` to skip): they are settled in section 7.

# %%
predict(
    "04.count",
    "Four 512 × 512 projections, LoRA with r = 8 on q_proj and v_proj. Each adapter freezes the weight it wraps, and "
    "nothing else is done. How many times as many parameters train as A and B have?",
    bet=None,
)
predict(
    "04.state",
    "Now all but A and B is frozen, but AdamW is given every parameter. What does it keep after a step?",
    choices=["two numbers for every parameter", "two for each that trains", "nothing: it raises an error"],
    bet=None,
)
predict(
    "04.kept",
    "A linear layer in the middle of a network: its input needs a gradient. When must autograd keep that input?",
    choices=["when the weight trains", "when it is frozen", "in both cases", "in neither"],
    bet=None,
)

# %% [markdown] tags=["slide"]
# ## 4 · The one picture
#
# Here are all parameters of SmolLM2-135M, by their names in the checkpoint, 30 layers on one line each. A grey square
# is frozen, an orange circle trains, and the bar is what the optimizer keeps for it between two steps. Run the cell,
# then:
#
# * Turn `freeze` off. Which bars appear, and which do *not*? Read the sum.
# * Drag `targets` to `everything`, which is full fine-tuning. Where does most of the memory go?
# * Turn `optimizer` to `sgd`, and ask yourself what LoRA still saves then.

# %%
TARGETS = {
    "q v": ["q_proj", "v_proj"],
    "q k v o": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "all linear": "all-linear",
    "everything": EVERYTHING,
}


def numbers(r, targets, optimizer, freeze):
    return tree_of(smol, r=r, targets=TARGETS[targets], optimizer=optimizer, freezes_rest=freeze)


def draw(**values):
    return parameter_tree(numbers(**values))


def finding(**values):
    tree, lean = numbers(**values), numbers(**values | {"freeze": True})
    times = f", {tree.trained / lean.trained:,.0f} times A and B" if tree.trained > lean.trained else ""
    state = human_bytes(tree.state_bytes)
    return f"{tree.trained / tree.total:.2%} of the parameters train{times}; the optimizer keeps {state}."


# %%
def in_words(**values):
    tree = numbers(**values)
    trains = [part.name.split(".*.")[-1] for part in tree.parts if part.trains]
    adapters = [part.name.split(".")[-1] for part in tree.parts if part.adapter]
    largest = max(tree.parts, key=lambda part: part.state_bytes)
    longest = (
        f"the longest is {largest.name} with {human_bytes(largest.state_bytes)}" if largest.state_bytes else "all empty"
    )
    return (
        "A list of the model's parameters by name, each with its shape, marked as frozen or trained. "
        f"Adapters: {', '.join(adapters) or 'none'}. Other parameters that train: {', '.join(trains) or 'none'}. "
        f"Beside each line a bar with the bytes of optimizer state; {longest}. "
        f"In all {tree.trained:,} of {tree.total:,} train, with {human_bytes(tree.state_bytes)} of optimizer state."
    )


# %%
picture = explorer(
    draw,
    alt=in_words,
    finding=finding,
    start={"r": 8, "targets": "q v"},
    r=[1, 2, 4, 8, 16, 32, 64, 128],
    targets=list(TARGETS),
    optimizer=["adamw", "adamw-8bit", "sgd"],
    freeze=True,
)

# %%
picture.strip(targets=list(TARGETS))

# %% [markdown] tags=["slide"]
# ## 5 · Derivation
#
# **What a module is.** The arithmetic is lesson 03's, and autograd does the backward pass. New is the bookkeeping.
# When you write `self.A = …` inside an `nn.Module`, PyTorch looks at *what* you assign, and four questions are
# answered at once:
#
# | you write | the optimizer gets it | the file holds it | `.to()` moves it | it gets a gradient |
# |---|---|---|---|---|
# | `self.A = torch.zeros(…)` | no | no | no | no |
# | `self.register_buffer("A", …)` | no | yes | yes | no |
# | `self.A = nn.Parameter(…)` | yes | yes | yes | yes |
# | `self.A = nn.Parameter(…, requires_grad=False)` | yes, and skips it | yes | yes | no |
#
# A LoRA layer needs rows three (A and B) and four (the frozen base). The table is not to be believed but run:

# %%
print("            optimizer   file   .to()   gradient")
for kind in ("tensor", "buffer", "parameter", "frozen"):
    module, zeros = nn.Module(), torch.zeros(2, 3)
    if kind == "tensor":
        module.A = zeros
    elif kind == "buffer":
        module.register_buffer("A", zeros)
    else:
        module.A = nn.Parameter(zeros, requires_grad=kind == "parameter")
    listed, saved = "A" in dict(module.named_parameters()), "A" in module.state_dict()
    gets_gradient, moves = module.A.requires_grad, module.double().A.dtype == torch.float64
    yes_no = ["yes" if answer else "no" for answer in (listed, saved, moves, gets_gradient)]
    print(f"{kind:<12}{yes_no[0]:<12}{yes_no[1]:<7}{yes_no[2]:<8}{yes_no[3]}")

# %% [markdown]
# **Where A's first numbers come from.** Nearly all LoRA code has the line `nn.init.kaiming_uniform_(A,
# a=math.sqrt(5))`. Its rule, [Kaiming]:
#
# ```
# entries ~ U(−bound, bound)      bound = gain · √(3 / fan_in)      gain = √(2 / (1 + a²))
# a = √5:                         gain = √(2/6) = √(1/3)            bound = 1 / √fan_in
# ```
#
# And `fan_in` is *the size of the second axis*. For A of shape (r, in) that is `in`. An entry of A then has the
# variance 1/(3 in), and an entry of `u = x Aᵀ`, a sum of `in` products, comes out at √(in · 1/(3 in)) = 0.58 times
# the size of one of `x`, whatever the width. Remember the second axis. It returns in section 8.
#
# **What it costs.** A has r · in numbers, B has out · r. Each that trains has a gradient (4 bytes in float32), and
# Adam's two averages (8 bytes).
#
# **One example by hand**: lesson 03's numbers with a bias, and one step of SGD with lr = 0.1. Take a pencil before
# you run it.
#
# ```
# x = [1 2 3]    W = [1 0 0]   b = [10 20]   A = [1 0 1]   B = [ 1]   dy = [1 2]
#                    [0 1 0]                                   [-1]
# alpha = 2, r = 1, so s = 2
#
# trains:    A 3 + B 2 = 5 numbers, for which Adam would keep 5 · 8 = 40 bytes
# frozen:    W 6 + b 2 = 8 numbers
# before:    u = 1 + 3 = 4             h = [1 2] + [10 20] + 2 · 4 · [1 -1] = [19 14]
# gradient:  dA = [-2 -4 -6]           dB = [8 16]ᵀ      as in lesson 03, bias or not
# step:      A = [1.2 0.4 1.6]         B = [0.2 -2.6]ᵀ   W and b stay
# after:     u = 1.2 + 0.8 + 4.8 = 6.8
#            h = [1 2] + [10 20] + 2 · 6.8 · [0.2 -2.6] = [13.72 -13.36]
# ```

# %%
base = nn.Linear(3, 2)
base.load_state_dict({"weight": torch.eye(2, 3), "bias": torch.tensor([10.0, 20.0])})
layer = find_exercise("04.1").reference(base, r=1, alpha=2.0)
with torch.no_grad():
    layer.A[:] = torch.tensor([[1.0, 0, 1]])
    layer.B[:] = torch.tensor([[1.0], [-1]])
x, dy = torch.tensor([[1.0, 2, 3]]), torch.tensor([[1.0, 2]])

h = layer(x)
h.backward(dy)
assert h.tolist() == [[19, 14]] and layer.A.grad.tolist() == [[-2, -4, -6]] and layer.B.grad.tolist() == [[8], [16]]
assert base.weight.grad is None and base.bias.grad is None
torch.optim.SGD(layer.parameters(), lr=0.1).step()
assert torch.allclose(layer(x), torch.tensor([[13.72, -13.36]])) and torch.equal(base.weight, torch.eye(2, 3))
print(
    "before:", h.tolist(), "  after:", [[round(value, 2) for value in layer(x)[0].tolist()]], "  as by hand; W stayed"
)

# %% [markdown]
# ## 6 · Build it
#
# **04.1 · The module.** It *wraps* a layer that exists already, and keeps it as `self.base`: the pretrained weight
# stays the object it was.
#
# * `A` (r, in) drawn as above and `B` (out, r) of zeros are its parameters; the base is frozen
# * `forward`: what the base returns, plus the bypass. Dropout acts on the bypass's input only, and in training only
# * `delta_weight()`: the update `(alpha / r) · B A`, for those who want to look at it or to merge it
#
# `check` draws a portrait of your class: numbers, shapes, what trains, what a file would hold, how it starts, where
# it drops.


# %%
class LoRALinear(nn.Module):
    """base(x) + (alpha / r) · (dropout(x) Aᵀ) Bᵀ, of which only A and B train."""

    def __init__(self, base, *, r, alpha, dropout=0.0):
        # BEGIN SOLUTION
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.empty(r, base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, r))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.scaling, self.dropout = alpha / r, dropout
        # END SOLUTION

    def forward(self, x):
        # BEGIN SOLUTION
        u = F.dropout(x, self.dropout, self.training) @ self.A.T  # (…, r)
        return self.base(x) + self.scaling * (u @ self.B.T)
        # END SOLUTION

    def delta_weight(self):
        # BEGIN SOLUTION
        return self.scaling * self.B @ self.A
        # END SOLUTION


# %%
Layer = check("04.1", LoRALinear).function

# %% [markdown]
# **04.2 · Freeze all but LoRA.** Your layer freezes what it wraps. The rest of the network knows nothing of it. The
# class of the adapter layers comes as an argument, so that your function serves any.


# %%
def freeze_all_but_lora(model, lora_class):
    """Let only A and B of the adapter layers train, in place; return how many parameters (train, there are)."""
    # BEGIN SOLUTION
    model.requires_grad_(False)
    for layer in model.modules():
        if isinstance(layer, lora_class):
            layer.A.requires_grad_(True)
            layer.B.requires_grad_(True)
    counts = [(each.numel(), each.requires_grad) for each in model.parameters()]
    return sum(count for count, trains in counts if trains), sum(count for count, _ in counts)
    # END SOLUTION


freeze = check("04.2", freeze_all_but_lora).function

# %% [markdown]
# **04.3 · A test of gradients.** Autograd derives the backward pass from the forward pass, so why test it? Because
# somebody will rewrite the layer to be faster or leaner, by hand (you will, in the stretch exercise).
# `torch.autograd.gradcheck` compares gradients with differences. Wrapped around a new LoRA layer as it is, it lets
# almost everything pass. Write a function that does not: `check` gives it three right layers and five wrong ones, all
# of them as they come: new, in float32, in training mode.


# %%
def gradients_are_right(layer, x):
    """True if the gradients of x, A and B agree with differences, else False. The layer itself is left as it was."""
    # BEGIN SOLUTION
    layer = copy.deepcopy(layer).double().eval()
    x = x.detach().double().requires_grad_()
    nn.init.normal_(layer.B, generator=torch.Generator().manual_seed(0))
    return gradcheck(lambda x, A, B: layer(x), (x, layer.A, layer.B), raise_exception=False)
    # END SOLUTION


gradients_agree = check("04.3", gradients_are_right).function

# %% [markdown]
# ## 7 · Run it, then settle the bets
#
# **Counts.** A block of four 512 × 512 projections: the example of an article that we come back to in section 9.


# %%
def adapted(block, r, layer_class=Layer, **settings):
    """A copy of the block with an adapter on q_proj and v_proj."""

    def wrap(base):
        return layer_class(base, r=r, alpha=2.0 * r, **settings)

    return adapt(copy.deepcopy(block), ("q_proj", "v_proj"), wrap)


def trainable(model):
    return sum(each.numel() for each in model.parameters() if each.requires_grad)


torch.manual_seed(0)
block = adapted(SimpleAttention(512), r=8)
forgotten = trainable(block)
train, total = freeze(block, Layer)
print(f"only the wrapped weights frozen: {forgotten:>9,} train")
print(f"all but A and B frozen:          {train:>9,} train, of {total:,}")
assert (forgotten, train, total) == (540_672, 16_384, 1_064_960)
settle("04.count", forgotten / train)

# %% [markdown]
# **Optimizer state**, weighed in the real optimizer. It is made at the first step, for tensors that have a gradient.
# A frozen parameter has none, so it may stand in the list. (A plain tensor does not stand in it, which is worse.)


# %%
def state_after_a_step(model, parameters):
    """Bytes that AdamW keeps after a step on these parameters of the model; its counters of steps aside."""
    optimizer = torch.optim.AdamW(parameters)
    model(torch.ones(1, 4, 512)).sum().backward()
    optimizer.step()
    tensors = [value for state in optimizer.state.values() for value in state.values() if value.dim() > 0]
    return sum(each.numel() * each.element_size() for each in tensors)


kept = {"only A and B": state_after_a_step(block, [p for p in block.parameters() if p.requires_grad])}
kept["every parameter"] = state_after_a_step(block, block.parameters())
for given, state in kept.items():
    print(f"AdamW was given {given:<16} and keeps {human_bytes(state)}")
assert set(kept.values()) == {8 * train}
is_lazy = kept["every parameter"] == 8 * train
settle("04.state", "two for each that trains" if is_lazy else "two numbers for every parameter")

# %% [markdown]
# **What autograd keeps.** Gradients and optimizer state are one half of training's memory, activations the other. We
# hook in where autograd stores tensors for the backward pass, and count what one 512 → 512 layer keeps of 256 rows.

# %%
x = torch.randn(256, 512, requires_grad=True)
layers = {
    "trained": nn.Linear(512, 512),
    "frozen": nn.Linear(512, 512).requires_grad_(False),
    "LoRA, r = 8": Layer(nn.Linear(512, 512), r=8, alpha=16.0),
    "LoRA with dropout": Layer(nn.Linear(512, 512), r=8, alpha=16.0, dropout=0.1),
}
held = {name: lesson.kept_bytes(layer, x) / (4 * x.numel()) for name, layer in layers.items()}
for name, share in held.items():
    print(f"{name:<18} keeps {share:.2f} times the bytes of x")
assert held["trained"] == 1 and held["frozen"] == 0 and 1 < held["LoRA, r = 8"] < 1.1 and held["LoRA with dropout"] > 2
settle("04.kept", "when the weight trains" if held["trained"] and not held["frozen"] else "in both cases")

# %% [markdown]
# A frozen layer keeps nothing: `dx = dy W` needs no `x`. The adapter brings `x` back, because `dA = duᵀ x`, and a
# thin `u` with it. So lesson 03 was right that LoRA saves no activations where there *is* an adapter; where there is
# none, a frozen layer saves its own. With dropout the bypass keeps a copy of what was left of `x`, and the mask.
# Three projections that read the same `x` share one `x`; with dropout they share nothing. The stretch exercise is
# about that.

# %% [markdown]
# **Lesson 03 as the oracle.** Its NumPy, forward and backward, against your module, in two precisions.

# %%
from minilora.numpy_lora.forward import lora_backward, lora_forward

case = lesson.layer_inputs(np.random.default_rng(3))
W, b, x, A, B, dy = (case[k].detach().double().numpy() for k in ("W", "b", "x", "A", "B", "dy"))
oracle = [lora_forward(x, W, A, B, 8.0) + b, *lora_backward(dy, x, W, A, B, 8.0)]
for dtype, allowed in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
    layer = lesson.put(lesson.built(Layer, case), case["A"], case["B"]).to(dtype)
    rows = torch.tensor(x, dtype=dtype, requires_grad=True)
    h = layer(rows)
    h.backward(case["dy"].to(dtype))
    ours = [each.detach().double().numpy() for each in (h, rows.grad, layer.A.grad, layer.B.grad)]
    away = max(np.max(np.abs(one - other)) / np.max(np.abs(other)) for one, other in zip(ours, oracle, strict=True))
    print(f"{dtype!s:<14} h, dx, dA and dB are lesson 03's to {allowed:.0e} of the largest entry: {away < allowed}")
    assert away < allowed
assert gradients_agree(Layer(nn.Linear(5, 4), r=2, alpha=6.0), torch.ones(2, 5))

# %% [markdown]
# **A network that learns.** A teacher is a copy of a small attention block in which `q_proj` and `v_proj` got a
# planted update of rank 3 (singular values 3, 2, 1). The student is the block as it was, with adapters of r = 4, and
# sees what the teacher makes of random sequences.


# %%
def fine_tune(model, batches, lr=0.01):
    """AdamW on whatever may train; the loss before each step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    losses = []
    for x, y in batches:
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


block, planted, batches = lesson.imitation(np.random.default_rng(4), dim=24, steps=400)
student = adapted(block, r=4)
train, total = freeze(student, Layer)
losses = fine_tune(student, batches, lr=0.02)
print(f"{train:,} of {total:,} parameters train; the loss falls to a thousandth: {losses[-1] < losses[0] / 1000}")
assert losses[0] > 1000 * losses[-1]

# %%
updates = {name: getattr(student, name).delta_weight().detach() for name in planted}
values = {f"ΔW of {name}": torch.linalg.svdvals(update)[:8].tolist() for name, update in updates.items()}
show(
    spectra([3, 2, 1], values, r=4, floor=1e-6),
    alt="Two panels, for the updates of q_proj and v_proj: their first eight singular values on a log scale. The first "
    "three lie on the planted 3, 2 and 1, the fourth is below 0.2, and all others are below a millionth: rounding.",
    finding="Three singular values are learned, a fourth is left over, and beyond r = 4 there is only rounding.",
)
for name, found in values.items():
    rank = sum(value > 1e-5 * found[0] for value in found)
    print(f"{name}: rank {rank}, singular values {', '.join(f'{value:.1f}' for value in found[:3])}, and one below 0.2")
    assert rank == 4 and np.allclose(found[:3], [3, 2, 1], atol=0.2) and found[3] < 0.2

# %% [markdown]
# **What an adapter counts.** r · (in + out) = 4 · 48 = 192 numbers here, a third of the 576 in its weight: at width
# 24 a rank of 4 is not small. The share is r · (1/in + 1/out), so it falls as layers grow.

# %%
for width in (24, 512, 4096):
    with torch.device("meta"):  # shapes without numbers: no memory at all
        layer = Layer(nn.Linear(width, width, bias=False), r=4, alpha=8.0)
    count = layer.A.numel() + layer.B.numel()
    print(f"{width:>5} × {width:<5} r = 4: {count:>7,} numbers, {count / layer.base.weight.numel():.2%} of the weight")

# %% [markdown]
# **Merging.** After training the update can be put into the weight, and the adapter taken off. What comes out is a
# plain `nn.Linear`, and the block is a plain block again: as fast as before, and no program needs to know of LoRA to
# run it.


# %%
def fused(layer):
    """A plain nn.Linear with the update in its weight."""
    linear = copy.deepcopy(layer.base)
    with torch.no_grad():
        linear.weight += layer.delta_weight()
    return linear


merged_block = adapt(copy.deepcopy(student), ("q_proj", "v_proj"), fused)
x, y = batches[0]
with torch.no_grad():
    before, live, folded = block(x), student.eval()(x), merged_block(x)
effect = (live - before).norm()
print(f"merged against live: within {1e-5:.0e} of the adapter's effect: {bool((folded - live).norm() < 1e-5 * effect)}")
kinds, count = (
    {type(each).__name__ for each in merged_block.children()},
    sum(p.numel() for p in merged_block.parameters()),
)
print(f"its layers are {kinds}, its parameters {count:,}: as many as before there was an adapter")
assert (folded - live).norm() < 1e-5 * effect and count == sum(p.numel() for p in block.parameters())

# %% [markdown]
# Note the yardstick: *relative to the adapter's effect*. Relative to the output, an adapter that was forgotten
# altogether may pass as a small error. Lesson 09 is about that. In training mode with dropout, live and merged
# differ, and should.
#
# **The package's layer** is the same class with more around it: it refuses impossible settings, merges in place and
# gives the weight back bit for bit. Your state_dict fits it, because the names are the same.

# %%
from minilora.torch_lora import LoRALinear as PackageLoRALinear, inject, merged

package = adapted(block, r=4, layer_class=PackageLoRALinear)
package.load_state_dict(student.state_dict())
weight = package.q_proj.base.weight.clone()
with torch.no_grad():
    print("same output as yours:", torch.allclose(package.eval()(x), live, atol=1e-6))
    with merged(package):
        assert package.q_proj.is_merged and (package(x) - live).norm() < 1e-5 * effect
print("after `with merged(model)` every bit is back:", torch.equal(package.q_proj.base.weight, weight))
with expect_bug(RuntimeError, match="second merge would add the update twice"):
    package.q_proj.merge()
    package.q_proj.merge()
package.q_proj.unmerge()

# wrapping by name, freezing and counting in one call (lesson 05)
print(inject(SimpleAttention(512), ["q_proj", "v_proj"], lambda base: PackageLoRALinear(base, r=8, alpha=16)))

# %% [markdown] tags=["slide"]
# ## 8 · Break it
#
# Four patients, with r = 2 on the same task. Two of three planted directions can be learned; the dotted line is the
# loss that remains if the planted updates are cut to rank 2. A healthy run (broad grey) goes down to that line and
# stays. *Which bug is this?*

# %%
bug, frozen_by = find_exercise("04.1").bug, find_exercise("04.2").bug
cases = {
    "1": (bug("both zero"), freeze, 0.0),
    "2": (bug("A stored as (in, r)"), freeze, 0.0),
    "3": (bug("dropout on the layer's output"), freeze, 0.1),
    "4": (Layer, frozen_by("only the wrapped layers"), 0.0),
}
curves, sick = {}, {}
for name, (layer_class, freezing, dropout) in {"healthy": (Layer, freeze, 0.0), **cases}.items():
    torch.manual_seed(1)
    sick[name] = adapted(block, r=2, layer_class=layer_class, dropout=dropout)
    freezing(sick[name], layer_class)
    curves[name] = fine_tune(sick[name].train(), batches[:300])
healthy = curves.pop("healthy")

U, S, Vh = torch.linalg.svd(torch.stack(list(planted.values())))
cut = lesson.moved(block, dict(zip(planted, (U[:, :, :2] * S[:, None, :2]) @ Vh[:, :2], strict=True)))
with torch.no_grad():
    floor = float(np.mean([F.mse_loss(cut(x), y).item() for x, y in batches[:100]]))

# %%
show(
    patients(healthy, curves, floor),
    alt="Four panels of loss against step on a log scale, each with the healthy run in grey, which falls in 100 steps "
    "to a dotted line and stays there. Patient 1 stays where it began. Patient 2 takes more than twice as long to the "
    "line. Patient 3 stops well above it. Patient 4 goes far below it.",
    finding="One never starts, one dawdles, one stops too early, and one is better than it can be.",
)
end = {name: float(np.mean(curve[-50:])) for name, curve in {"healthy": healthy, **curves}.items()}
assert (
    end["1"] > 8 * floor and end["3"] > 2 * floor and end["4"] < 0.2 * floor and abs(end["healthy"] / floor - 1) < 0.2
)
arrival = [next(step for step, loss in enumerate(curve) if loss < 2 * floor) for curve in (healthy, curves["2"])]
assert arrival[1] > 2 * arrival[0]

# %% [markdown]
# <details><summary><b>Patient 1</b>, who never starts</summary>
#
# A and B both start at zero. Then both gradients are exactly zero, at every step. The loss of each batch is that of
# the base.
# </details>
#
# <details><summary><b>Patient 2</b>, who dawdles</summary>
#
# A is stored as (in, r) and the forward pass says `x @ A`: the same product, and the same line `kaiming_uniform_(A,
# a=√5)`. But the second axis is r now, so A starts √(in / r) = 3.5 times too loud, and Adam turns a large A with
# small steps. At real widths it is worse, as the next figure shows.
# </details>
#
# <details><summary><b>Patient 3</b>, who stops too early</summary>
#
# Dropout on the layer's output, frozen part included: noise on what the model knew, in training. The curve is the
# noise's, not the adapter's. On the bypass's input alone, dropout does less harm, and none at the start, where B = 0
# silences it.
# </details>
#
# <details><summary><b>Patient 4</b>, who is better than it can be</summary>
#
# Nothing but the wrapped weights is frozen: `k_proj` and `o_proj` train in full. Two directions cannot come below the
# dotted line, so *a loss that good is a symptom*. The proof is one comparison away:
# </details>

# %%
for name in ("healthy", "4"):
    then, now = block.state_dict(), sick[name].state_dict()
    moved = [part for part in ("k_proj.weight", "o_proj.weight") if not torch.equal(then[part], now[part])]
    print(f"{name:<8} trains {trainable(sick[name]):>5,} parameters; weights that moved: {', '.join(moved) or 'none'}")
    assert bool(moved) == (name == "4")

# %% [markdown]
# **Patient 2 at real size**: what one line of initialisation draws for A at in = 768 and r = 16, as in GPT-2 small,
# depending on how A is stored.

# %%
torch.manual_seed(0)
by_rows, by_columns = (nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5)) for shape in ((16, 768), (768, 16)))
gaussian = torch.randn(100, 768) * by_rows.std()
samples = {"A (r, in)": by_rows, "A (in, r)": by_columns, "Gaussian": gaussian}
show(
    starts(
        {name: entries.flatten().tolist() for name, entries in samples.items()},
        bounds={"1/√in": 1 / math.sqrt(768), "1/√r": 1 / math.sqrt(16)},
    ),
    alt="Three histograms of the entries of A. Stored as (r, in) they fill the narrow band between ±0.036 "
    "evenly. Stored as (in, r) they spread evenly between plus and minus 0.25. Gaussian numbers with the spread of the "
    "first make a bell.",
    finding="The same line of code, another shape: A starts 6.9 times as loud. And neither is Gaussian.",
)
assert abs(by_columns.abs().max() / by_rows.abs().max() / math.sqrt(768 / 16) - 1) < 0.01
for in_features, r in ((24, 2), (768, 16), (4096, 16)):
    print(
        f"in = {in_features:>4}, r = {r:>2}: stored as (in, r), A starts {math.sqrt(in_features / r):.1f} times as loud"
    )

# %% [markdown]
# Three more that stop you at once, if you are lucky. Under `no_grad` there is nothing to go back through. Plain
# tensors are not found by anybody, and stay behind when the model moves. In a larger model, in which other things
# train, the first two are silent.

# %%
x = torch.ones(2, 12)
under_no_grad, plain = (bug(name)(nn.Linear(12, 7), r=3, alpha=8.0) for name in ("under no_grad", "plain tensors"))
with expect_bug(RuntimeError, match="does not require grad"):
    under_no_grad(x).sum().backward()
with expect_bug(ValueError, match="empty parameter list"):
    torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad])
with expect_bug(RuntimeError, match="dtype"):
    plain.bfloat16()(x.bfloat16())
print("in its file:", sorted(plain.state_dict()))

# %% [markdown]
# And one that no loss curve shows. A layer with a backward pass by hand, whose bypass gives nothing to the layers
# below. `gradcheck` itself finds nothing as long as B is zero; your test does, and the check knows all of these by
# name:

# %%
case = lesson.gradient_inputs(np.random.default_rng(0))
broken = lesson.specimen("dx without the bypass", case)
x = case["x"].double().requires_grad_()
assert gradcheck(copy.deepcopy(broken).double(), (x,)) and not gradients_agree(broken, case["x"])
print("a wrong dx: gradcheck on the new layer finds nothing; yours finds it")

gallery = [("04.1", "both zero"), ("04.1", "A stored as (in, r)"), ("04.1", "dropout on the layer's output")]
gallery += [
    ("04.2", "only the wrapped layers"),
    ("04.1", "plain tensors"),
    ("04.1", "under no_grad"),
    ("04.3", "B left at zero"),
]
for exercise_id, name in gallery:
    exercise = find_exercise(exercise_id)
    diagnosis = examine(exercise, exercise.bug(name), seeds=[0]).failure.bug
    assert diagnosis.name == name
    print(f"{exercise_id}  {diagnosis.name}\n      {diagnosis.why}")

# %% [markdown]
# ## 9 · Check the claims
#
# Printed outputs are quoted from text to text. Each of these can be computed, and most of them by hand; the code is in
# `claims.py`, beside this lesson.
#
# One needs three lines of arithmetic. An article prints a first loss of 1.2418, for inputs and targets from N(0, 1) and
# a layer as PyTorch makes it. Can that be? A weight from U(±1/√in) has variance 1/(3 in), so an output has variance ⅓,
# a target 1, and their difference 4/3. The loss is the mean of 8 · 4096 squares of it, with a standard error of 4/3 ·
# √(2 / 32,768).

# %%
show_claims("04")

# %% [markdown]
# The first of them is the bug of exercise 04.2: the article's own code does not freeze what it does not wrap, and the
# output beside it was not printed by that code.
#
# ## 10 · Exercises
#
# **Core** (checked, in section 6):

# %%
overview("04")

# %% [markdown]
# **Stretch: dropout on a diet.** Section 7 found that a LoRA layer with dropout keeps two copies of `x` and more: the
# dropped one, and a mask of floats. Write the bypass as a `torch.autograd.Function` that keeps less. `x` itself is
# free when another layer keeps it anyway; a mask needs one bit an entry. The judges are `kept_bytes` and your own
# `gradients_are_right`. Targets: below 1.6 times x is good, 1.3 is very good. (And 1.1? What if nobody keeps the
# mask?)


# %%
class LeanBypass(torch.autograd.Function):
    """scaling · (dropout(x) Aᵀ) Bᵀ, with a backward pass by hand."""

    @staticmethod
    def forward(ctx, x, A, B, scaling, p):
        # BEGIN SOLUTION
        mask = torch.rand_like(x) >= p
        u = (x * mask / (1 - p)) @ A.T
        ctx.save_for_backward(x, A, B, u, mask)
        ctx.scaling, ctx.p = scaling, p
        return scaling * u @ B.T
        # END SOLUTION

    @staticmethod
    def backward(ctx, dy):
        # BEGIN SOLUTION
        x, A, B, u, mask = ctx.saved_tensors
        keep = mask / (1 - ctx.p)
        du = ctx.scaling * dy @ B
        return du @ A * keep, du.T @ (x * keep), ctx.scaling * dy.T @ u, None, None
        # END SOLUTION


# %%
class LeanLayer(lesson.RightLayer):
    def forward(self, x):
        return self.base(x) + LeanBypass.apply(x, self.A, self.B, self.scaling, self.p if self.training else 0.0)


if is_stub(LeanBypass.forward):
    print("not started: the plain layer keeps", f"{held['LoRA with dropout']:.2f} times the bytes of x")
else:
    lean = LeanLayer(nn.Linear(512, 512), r=8, alpha=16.0, dropout=0.1)
    x = torch.randn(256, 512, requires_grad=True)
    share = lesson.kept_bytes(lean, x) / (4 * x.numel())
    print(f"plain {held['LoRA with dropout']:.2f}, yours {share:.2f} times the bytes of x")
    small = LeanLayer(nn.Linear(5, 4), r=2, alpha=6.0, dropout=0.1)
    print("gradients are right:", gradients_agree(small, torch.ones(2, 5)))

# %% [markdown]
# **Explain** (a few sentences each; the instructor's notes have a rubric with sample answers):
#
# 1. A colleague freezes nothing, but gives the optimizer only A and B: "The rest is not in the list, so it does not
#    train." What is right, what does it cost, and what happens to the `.grad` of the rest over many steps?
# 2. The package keeps A and B in float32 even over a bfloat16 base. What would go wrong with a B in bfloat16 that
#    stands at 1.0 and is moved by 0.001?
# 3. Your test of gradients prepares the layer in four ways: float64, a copy, no dropout, B filled. For each, say
#    which mistake would pass, or which right layer would fail, without it.

# %% [markdown]
# ## 11 · The same in PEFT
#
# If PEFT is installed, the next cells let it wrap the same block, start it from our A and B, and train both on the
# same batches with AdamW.

# %%
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT loads it, and it remarks on the processor
has_peft = importlib.util.find_spec("peft") is not None
if has_peft:
    from peft import LoraConfig, get_peft_model

    config = {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0}
    wide = get_peft_model(SimpleAttention(512), LoraConfig(r=8, lora_alpha=16, **config))
    print("PEFT on the article's block: {:,} of {:,} train".format(*wide.get_nb_trainable_parameters()))
    assert wide.get_nb_trainable_parameters() == (16_384, 1_064_960)

    torch.manual_seed(2)
    ours = adapted(block, r=4)
    freeze(ours, Layer)
    theirs = get_peft_model(copy.deepcopy(block), LoraConfig(r=4, lora_alpha=8, **config))
    pairs = [(getattr(ours, name), getattr(theirs.base_model.model, name)) for name in planted]
    with torch.no_grad():
        for mine, other in pairs:
            other.lora_A.default.weight.copy_(mine.A)
            other.lora_B.default.weight.copy_(mine.B)
else:
    print("PEFT is not installed: pip install peft, and run this cell again")

# %%
if has_peft:
    curves = [fine_tune(model, batches[:100], lr=0.01) for model in (ours, theirs)]
    away = max(abs(one - other) / other for one, other in zip(*curves, strict=True))
    print(f"100 steps of AdamW: the losses agree to 0.1 %: {away < 1e-3}")
    for mine, other in pairs:
        update = other.get_delta_weight("default").detach()
        assert (mine.delta_weight() - update).norm() < 1e-3 * update.norm()
    plain = theirs.merge_and_unload()
    for name in planted:
        mine, other = fused(getattr(ours, name)).weight, getattr(plain, name).weight
        assert (mine - other).norm() < 1e-3 * (other - getattr(block, name).weight).norm()
    print("the updates agree, and so do the merged weights, to 0.1 % of the update")
    assert away < 1e-3

# %% [markdown]
# ## 12 · Interview questions
#
# <details><summary>Parameter, buffer, plain tensor: where does each belong in a LoRA layer?</summary>
#
# A and B are parameters: found by the optimizer, saved, moved. A weight that was set aside by a merge is a buffer:
# moved, not trained (and not saved, if `persistent=False`). A plain tensor is a bug, unless it may be lost. *A weak
# answer* says "parameters have requires_grad" and stops: a plain tensor can have it too.
# </details>
#
# <details><summary>model.eval(), torch.no_grad(), requires_grad_(False): what is the difference?</summary>
#
# The first changes what dropout and norms *do*; the second stops recording for the length of a block; the third says
# of one tensor that it gets no gradient, while gradients still pass *through* it. Only the third freezes. *A weak
# answer* uses eval() to freeze, or no_grad() around the frozen layer, which cuts off all layers below.
# </details>
#
# <details><summary>How do you verify that only the adapter trains?</summary>
#
# Count against the formula, Σ r · (in + out); and compare the frozen weights before and after a step, bit for bit. *A
# weak answer* looks at the loss: patient 4's was better than the healthy one's.
# </details>
#
# <details><summary>Does LoRA reduce activation memory?</summary>
#
# Against full fine-tuning, little: each adapted layer must still keep its input, for dA. Layers that are frozen and
# not adapted keep none of theirs. Dropout in the bypass adds a copy and a mask. *A weak answer* is a plain yes, or a
# plain no.
# </details>
#
# <details><summary>Why wrap the base and call it, instead of reading its weight?</summary>
#
# Because a base may store its weight in 4 bits, be sharded, or have hooks. `base(x) + bypass(x)` works with all of
# them; that is why QLoRA is a LoRALinear over another base, and nothing else. *A weak answer* finds `F.linear(x, W +
# delta_weight)` equivalent: it makes a matrix as large as W at every step.
# </details>

# %% [markdown]
# ## 13 · Recap
#
# `LoRALinear(base, r=…, alpha=…, dropout=…)` · parameters `A` (r, in), `B` (out, r) · `h = base(x) + (alpha / r) ·
# (dropout(x) Aᵀ) Bᵀ` · `delta_weight()` = `(alpha / r) · B A`
#
# Five lines to carry forward:
#
# 1. What is not registered does not train, is not saved and does not move; what is registered trains until you freeze
#    it.
# 2. Freeze everything, then switch on A and B: in this order nothing is forgotten. Then count.
# 3. `kaiming_uniform_` looks at the second axis: store A as (r, in).
# 4. A frozen layer keeps no input for the backward pass; an adapted one does, and with dropout it keeps two.
# 5. A test must be able to fail: float64, B ≠ 0, all inputs, and a wrong layer that it rejects.
#
# Further reading: [PyTorch on modules](https://docs.pytorch.org/docs/stable/notes/modules.html), for what registering
# means; [gradcheck's mechanics](https://docs.pytorch.org/docs/stable/notes/gradcheck.html), for what it can and
# cannot see; [loralib](https://github.com/microsoft/LoRA), the authors' own layer, which merges when you call
# `eval()`: compare with section 7.
#
# And read `minilora/torch_lora/layers.py`: you know every line of its `LoRALinear` now, and of `merged`, in
# `adapter_layer.py` beside it. Lesson 05 puts it into a whole model by name.
#
# ### Before you go
#
# <!-- quiz: exit -->
