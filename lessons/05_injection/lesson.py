# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 05 · Injection, and which layers
#
# * **You will be able to** *put* adapters into any model by name, in one call that changes all or nothing; *count* what
#   a set of layers costs before a model is loaded; *choose* the layers under a budget, and say what the choice rests
#   on.
# * **You need** lesson 04 (the layer, and what trains). A transformer block you can name the parts of.
# * **Minutes**: read 30 · exercises 47 · stretch and explain 30.
# * **Runs on** any CPU in under a minute. No GPU.

# %% [markdown] tags=["solution"]
# This is the full notebook, with every answer. The one with blanks for you is `student/05_injection.ipynb`.

# %% [markdown] tags=["student"]
# This is your notebook: fill in the lines that say `...  # your code`. Building the course again never writes over a
# notebook that somebody has edited. The answers are in `05_injection.ipynb`, one folder up.

# %% tags=["setup"]
import copy
import importlib.util
import itertools
import logging
import warnings

import torch
from torch import nn

# %% tags=["setup"]
from minilora.classroom.bets import predict, settle
from minilora.classroom.claims import show_claims
from minilora.classroom.evidence import expect_bug
from minilora.classroom.exercises import check, examine, find_exercise, is_stub, overview
from minilora.classroom.exercises import hint  # noqa: F401  for you: hint("05.1")
from minilora.classroom.explorer import explorer, show
from minilora.classroom.lessons import lesson_module
from minilora.classroom.pictures.adapter_map import adapter_map, draw_maps, linear_names
from minilora.classroom.pictures.block_map import LETTERS, block_map, draw_block
from minilora.classroom.pictures.first_step import by_kind, draw_first_step, gradients_of
from minilora.llm.architectures import ARCHITECTURES
from minilora.torch_lora import LoRALinear, count_parameters, default_targets
from minilora.torch_lora.inject import adapter_layers, freeze_all_but_adapters
from minilora.torch_lora.layers import is_linear
from minilora.torch_lora.wrap import lora_layer

torch.manual_seed(0)
lesson = lesson_module("05")

# %% [markdown]
# ## 1 · Warm-up
#
# <!-- quiz: warm-up -->

# %% [markdown] tags=["slide"]
# ## 2 · The problem
#
# You have a layer. A model has hundreds of places for it, and you name them by a few words: `q_proj`, `v_proj`. Between
# those words and the places stands a loop of ten lines that nearly everybody writes once, and nobody tests. One letter
# is wrong, and a third of the layers get no adapter. The cell is run twice, and every adapter has another one inside.
# Training works all the same: the loss falls, and a report says how many parameters train.
#
# The number that hurts is a printed one. Three articles print what r = 16 on all seven matrices of a 7B or 8B Llama
# trains, and not one of the three numbers is right (section 9). A word that is misspelt costs as much:

# %% tags=["slide"]
llama_3 = ARCHITECTURES["llama-3-8b"]
meant = block_map(llama_3, LETTERS, r=16).trained
misspelt = block_map(llama_3, set(LETTERS) - {"gate", "up", "down"}, r=16).trained
print(f"Llama-3-8B, r = 16, all seven:          {meant:>12,}   an article prints 83,886,080")
print(f"the last three misspelt, and no error:  {misspelt:>12,}   {1 - misspelt / meant:.0%} of the adapter is missing")
assert meant == 41_943_040 == 83_886_080 // 2

# %% [markdown]
# ## 3 · Predict
#
# Place your bets (or leave `None` to skip): they are settled in section 7.

# %%
predict(
    "05.gqa",
    "r = 16 on q and v. Llama-2-7B and Llama-3-8B both have 32 layers and hidden size 4096. Whose adapter is larger?",
    choices=["Llama-2-7B's", "Llama-3-8B's", "they are equal"],
    bet=None,
)
predict(
    "05.all",
    "Llama-2-7B, the same rank on q and v, or on all seven matrices of a layer: how many times as many parameters?",
    bet=None,
)
predict(
    "05.first",
    "SmolLM2-135M sees four sentences and the JSON that it should answer. Add up the squares of the gradient's "
    "entries, by kind of matrix. Which holds most for each parameter that its adapter would have?",
    choices=["q", "k", "v", "o", "gate", "up", "down"],
    bet=None,
)
predict(
    "05.budget",
    "Five million parameters for adapters on SmolLM2-135M. Which of these can hold most of that sum?",
    choices=["two kinds with r = 64", "three or four with r = 32", "all seven with r = 16"],
    bet=None,
)

# %% [markdown] tags=["slide"]
# ## 4 · The one picture
#
# One decoder layer, drawn to scale: each matrix as high as its inputs and as wide as its outputs. An adapter is two
# orange strips, A at the left and B below. On the right, what that adds up to in all layers; dashed is what a matrix
# would cost if you chose it. Run the cell, then:
#
# * Switch `model` from Llama-2-7B to Llama-3-8B. Which matrices shrink, which grow?
# * Tick all seven. Which three cost more than the other four together?
# * Go to SmolLM2-135M and r = 128. Is that still low rank?

# %%
PRESETS = {"Llama-2-7B": "llama-2-7b", "Llama-3-8B": "llama-3-8b", "SmolLM2-135M": "smollm2-135m"}


def numbers(model, r, **ticked):
    return block_map(ARCHITECTURES[PRESETS[model]], {letter for letter in LETTERS if ticked[letter]}, r)


def draw(**values):
    return draw_block(values["model"], numbers(**values))


def finding(**values):
    block = numbers(**values)
    chosen = " ".join(matrix.letter for matrix in block.matrices if matrix.is_adapted) or "nothing"
    full = sum(matrix.adapter_params for matrix in block.matrices)
    return (
        f"{values['model']}, r = {values['r']} on {chosen}: {block.trained:,}, {block.trained / full:.0%} of all seven."
    )


# %%
def in_words(**values):
    block = numbers(**values)
    sizes = "; ".join(
        f"{each.letter} {each.linear.in_features:,} × {each.linear.out_features:,}, "
        f"{'adapter of' if each.is_adapted else 'no adapter, it would have'} {each.adapter_params:,}"
        for each in block.matrices
    )
    return f"The seven matrices of a layer of {values['model']} to scale, with inputs and outputs: {sizes}."


# %%
picture = explorer(
    draw,
    alt=in_words,
    finding=finding,
    start={"r": 16},
    model=list(PRESETS),
    r=[1, 2, 4, 8, 16, 32, 64, 128],
    q=True,
    k=False,
    v=True,
    o=False,
    gate=False,
    up=False,
    down=False,
)

# %%
picture.strip(model=list(PRESETS))

# %% [markdown] tags=["slide"]
# ## 5 · Derivation
#
# **What a set of layers costs.** A is (r, in), B is (out, r). So a matrix costs `r · (in + out)`, and a set of them in
# a model of L equal layers
#
# ```
# parameters = L · r · Σ (in + out)      the sum goes over the chosen matrices of one layer
# ```
#
# What is left to know are seven pairs of numbers. With h the hidden size, i the intermediate size, d the width of a
# head, n heads of queries and m heads of keys and values:
#
# ```
#            in    out     Llama-2-7B       in + out     Llama-3-8B       in + out
# q          h     n d     4096 → 4096        8,192      4096 → 4096        8,192
# k          h     m d     4096 → 4096        8,192      4096 → 1024        5,120
# v          h     m d     4096 → 4096        8,192      4096 → 1024        5,120
# o          n d   h       4096 → 4096        8,192      4096 → 4096        8,192
# gate, up   h     i       4096 → 11008      15,104      4096 → 14336      18,432
# down       i     h       11008 → 4096      15,104      14336 → 4096      18,432
#                          Σ of the seven    78,080      Σ of the seven    81,920
# ```
#
# Llama-3 has 32 heads of queries and 8 of keys and values: four query heads share a key and a value. That is
# grouped-query attention [GQA], and its k and v are four times narrower. So q and v at r = 16 are by hand
#
# ```
# Llama-2-7B    32 · 16 · (8,192 + 8,192)  =  512 · 16,384  =  8,388,608
# Llama-3-8B    32 · 16 · (8,192 + 5,120)  =  512 · 13,312  =  6,815,744
# ```
#
# and all seven are 512 · 78,080 = 39,976,960 and 512 · 81,920 = 41,943,040.

# %%
for name, sizes in {"llama-2-7b": (8192, 8192, 15104), "llama-3-8b": (8192, 5120, 18432)}.items():
    q, v, gate = sizes
    seven = 2 * q + 2 * v + 3 * gate
    for letters, ends in (({"q", "v"}, q + v), (LETTERS, seven)):
        assert block_map(ARCHITECTURES[name], letters, r=16).trained == 32 * 16 * ends
    print(f"{name}   q v: 512 · {q + v:,} = {512 * (q + v):,}   all seven: 512 · {seven:,} = {512 * seven:,}")

# %% [markdown]
# **What a word hits.** A model is a tree, and each module has a name that is its path, such as
# `model.layers.7.self_attn.q_proj`. A target is *the end of a path, at a dot*, or all of it:
#
# ```
# hit  ⇔  name == target  or  name.endswith("." + target)
# ```
#
# That is PEFT's rule and the package's. By hand, on five names:
#
# ```
#                        q_proj    attn.c_proj    c_proj
# layers.0.attn.q_proj     hit          -            -
# q_proj                   hit          -            -      the whole name
# layers.0.q_proj_norm      -           -            -      a substring is not enough
# h.0.attn.c_proj           -          hit          hit
# h.0.cross_attn.c_proj     -           -           hit     no dot before attn.c_proj
# ```
#
# The third kind of target is no name: `"all-linear"` stands for every linear layer but the output head.

# %%
names = ["layers.0.attn.q_proj", "q_proj", "layers.0.q_proj_norm", "h.0.attn.c_proj", "h.0.cross_attn.c_proj"]
table = {target: [lesson.ends_in(name, target) for name in names] for target in ("q_proj", "attn.c_proj", "c_proj")}
assert list(table.values()) == [[1, 1, 0, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
print("as by hand:", {target: sum(hits) for target, hits in table.items()})

# %% [markdown]
# **Where a module hangs.** A module knows neither its name nor its parent. It is an attribute of its parent, and there
# it is replaced: cut the name at its last dot, walk to the parent, and set the last part. `setattr(model,
# "layers.0.q_proj", …)` does something else: it makes a new module with dots in its name.

# %%
block = nn.ModuleDict({"attn": lesson.a_block()})
parent, _, leaf = "attn.q_proj".rpartition(".")
setattr(block.get_submodule(parent), leaf, lora_layer(block.attn.q_proj, r=1, alpha=1.0))
print([f"{name}: {type(module).__name__}" for name, module in block.attn.named_children()])
assert isinstance(block.attn.q_proj, LoRALinear)

# %% [markdown]
# ## 6 · Build it
#
# **05.1 · Which modules a target hits.** `targets` is a list of words: names as above, or `"all-linear"`. Give back a
# dict with a list of names for each word. A word that hits nothing is a mistake of the caller's: raise a `ValueError`
# with the word in its text. `is_linear(module)` is there for you; it knows GPT-2's `Conv1D`, which is a linear layer
# and no `nn.Linear`. The output head is the module whose last part is `lm_head`.


# %%
def match_targets(model, targets):
    """{target: names of the modules that it hits}; ValueError with the targets that hit nothing."""
    # BEGIN SOLUTION
    modules = {name: module for name, module in model.named_modules() if name}
    hits = {}
    for target in targets:
        if target == "all-linear":
            linear = [name for name, module in modules.items() if is_linear(module)]
            hits[target] = [name for name in linear if name.rpartition(".")[2] != "lm_head"]
        else:
            hits[target] = [name for name in modules if name == target or name.endswith("." + target)]
    missed = [target for target, names in hits.items() if not names]
    if missed:
        raise ValueError(f"no module is named {missed}")
    return hits
    # END SOLUTION


# %%
match = check("05.1", match_targets).function

# %% [markdown]
# **05.2 · Inject.** Put `wrap(module)` in the place of each module that is hit, in the model that you are given. `wrap`
# makes the adapter, so your function knows nothing of LoRA. Its promise: **all or nothing**. A `ValueError` comes
# before anything is changed if a target hits nothing, or if a module *is* an adapter already, or *lies inside* one. And
# `wrap` itself may refuse the third module; then the first two must not have been replaced.
#
# `adapter_layers(model)` gives the adapters that are there, by name. `freeze_all_but_adapters(model)` is lesson 04's
# exercise, and knows adapters of earlier calls. What you return is up to you.


# %%
def inject(model, targets, wrap):
    """Put wrap(module) in the place of every module that a target hits, in place; only adapters train."""
    # BEGIN SOLUTION
    names = dict.fromkeys(name for hits in match(model, targets).values() for name in hits)
    for there in adapter_layers(model):
        if any(name == there or name.startswith(f"{there}.") for name in names):
            raise ValueError(f"{there} has an adapter already")
    wrapped = {name: wrap(model.get_submodule(name)) for name in names}
    for name, module in wrapped.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)
    freeze_all_but_adapters(model)
    # END SOLUTION


# %%
put_in = check("05.2", inject).function

# %% [markdown]
# **05.3 · What a set of targets counts**, before any model is made. `arch` holds `n_layers`, `hidden`, `intermediate`,
# `n_heads`, `n_kv_heads` and `head_dim`; `targets` is a list of the seven names, or the string `"all-linear"`. The
# check makes a real model of that shape, on the device `meta` that has shapes and no memory, injects, and counts.


# %%
def count(arch, r, targets):
    """Parameters of all A and B."""
    # BEGIN SOLUTION
    q, kv = arch.n_heads * arch.head_dim, arch.n_kv_heads * arch.head_dim
    ends = {"q_proj": arch.hidden + q, "o_proj": q + arch.hidden}
    ends |= dict.fromkeys(("k_proj", "v_proj"), arch.hidden + kv)
    ends |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), arch.hidden + arch.intermediate)
    chosen = ends if targets == "all-linear" else targets
    return arch.n_layers * r * sum(ends[name] for name in chosen)
    # END SOLUTION


count_of = check("05.3", count).function

# %% [markdown]
# **05.4 · The best set under a budget.** Suppose that somebody tells you what an adapter on each kind of matrix gains.
# Section 7 will measure it. Gains and costs add up; the budget is a sum of costs that may be reached and not exceeded.
# Rules of thumb fail here ("the best per parameter first"), and seven things have only 128 sets.


# %%
def best_targets(gains, costs, budget):
    """The set of names with the largest sum of gains among those whose costs are at most the budget."""
    # BEGIN SOLUTION
    sets = [names for size in range(len(gains) + 1) for names in itertools.combinations(gains, size)]
    within = [names for names in sets if sum(costs[name] for name in names) <= budget]
    return set(max(within, key=lambda names: sum(gains[name] for name in names)))
    # END SOLUTION


best_set = check("05.4", best_targets).function

# %% [markdown]
# ## 7 · Run it, then settle the bets
#
# **The formula against models of full size.** In float32 the larger two take more memory than most computers have. On
# `meta` they take none, and `inject` does not notice: names and shapes are all it needs.

# %%
SETS = {"q v": ["q_proj", "v_proj"], "q k v o": list(lesson.ATTENTION), "all seven": "all-linear"}
print("r = 16           " + "".join(f"{name:>14}" for name in SETS) + "         share   float32")
for title, name in PRESETS.items():
    arch, row = ARCHITECTURES[name], []
    for targets in SETS.values():
        model = lesson.of_shape(arch)
        put_in(model, [targets] if targets == "all-linear" else targets, lambda base: LoRALinear(base, r=16, alpha=16))
        counted = count_parameters(model)
        assert counted.trainable == count_of(arch, 16, targets)
        row.append(counted.trainable)
    gigabytes = 4e-9 * (counted.total - counted.trainable)
    print(
        f"{title:<17}"
        + "".join(f"{trained:>14,}" for trained in row)
        + f"{counted.trainable_share:>14.3%}{gigabytes:>7.1f} GB"
    )
    if title == "Llama-2-7B":
        two, _, seven = row
        assert row == [8_388_608, 16_777_216, 39_976_960]

# %%
on_llama_3 = count_of(ARCHITECTURES["llama-3-8b"], 16, ["q_proj", "v_proj"])
settle("05.gqa", "Llama-2-7B's" if two > on_llama_3 else "Llama-3-8B's" if two < on_llama_3 else "they are equal")
settle("05.all", seven / two)

# %% [markdown]
# On Llama-3 the feed-forward matrices grew and v shrank, so "q and v" got cheaper, and "all seven" dearer. A count that
# is copied from one model to the other is wrong in both directions.
#
# **The package's `inject`** makes the same changes and tells what it did. It takes compiled patterns for whole names as
# well, restores the flags that a refused `wrap` has frozen, and wraps a module that is used in two places once. And it
# knows what to take where nobody says: `default_targets` is PEFT's table of architectures.

# %%
from minilora.torch_lora import inject as package_inject
from minilora.torch_lora.inject import match_targets as package_match

model = lesson.tiny_llama(n_layers=3)
print(package_inject(model, ["q_proj", "down_proj"], lambda base: lora_layer(base, r=2, alpha=4.0)))
gpt2 = lesson.GPT2(n_layers=2)
gpt2.config = type("Config", (), {"model_type": "gpt2"})  # as a transformers model says what it is
print("GPT-2's default targets:", default_targets(gpt2))
print(package_match(gpt2, ["attn.c_proj"]))
with expect_bug(ValueError, match="did you mean"):
    package_match(gpt2, ["c_atn"])
with expect_bug(ValueError, match="no default targets"):
    default_targets(lesson.a_block())

# %% [markdown]
# **Which layers?** The count says what a set costs. What is it worth? Only training tells; but how a training *begins*
# can be measured. Take the gradient G of the loss for a matrix W. A step `W ← W − lr · Gᵣ`, where Gᵣ is the best
# approximation of rank r, lowers the loss by
#
# ```
# lr · (σ₁² + … + σᵣ²)                                       to first order in lr
# ```
#
# with σ the singular values of G (lesson 02). Different matrices have gradients of their own, so for several of them
# these numbers *add up*. That makes them gains for your exercise 05.4. We measure them on the real SmolLM2-135M: four
# sentences, the JSON that it should answer, one backward pass.

# %%
from minilora.llm import load_model
from minilora.train.data import collate, mask_prompt
from minilora.train.extraction import make_extraction
from minilora.train.loss import loss_of

smol = ARCHITECTURES["smollm2-135m"]
model, tokenizer = load_model("smollm2-135m")
examples = make_extraction(seed=0, n_train=4, n_test=1).train
print(examples[0].sentence, "→", examples[0].answer)
prompts = [tokenizer.encode(f"{example.sentence}\nJSON: ") for example in examples]
answers = [tokenizer.encode(example.answer) for example in examples]
samples = [mask_prompt(prompt, answer, tokenizer.eos) for prompt, answer in zip(prompts, answers, strict=True)]
batch = collate(samples, tokenizer.eos)

names = match(model, ["all-linear"])["all-linear"]
model.requires_grad_(False)
for name in names:
    model.get_submodule(name).weight.requires_grad_(True)
loss = loss_of(model, batch)
loss.backward()

# %%
gradients = gradients_of(model, names, k=64)
model.zero_grad(set_to_none=True)
energy = sum(gradient.energy for gradient in gradients.values())  # Σ ‖G‖² over the 210 matrices
shares = {r: {kind: gain / energy for kind, gain in by_kind(gradients, r).items()} for r in (1, 16, 32, 64)}
costs = {r: {kind: count_of(smol, r, [kind]) for kind in shares[r]} for r in shares}
print(f"{len(names)} matrices; rank 1 in each captures {sum(shares[1].values()):.0%} of the squared gradient, ", end="")
print(f"rank 16 {sum(shares[16].values()):.0%}")
for kind, share in sorted(shares[16].items(), key=lambda item: -item[1]):
    print(
        f"{kind:<10} {share:>4.0%} of the gradient for {costs[16][kind] / sum(costs[16].values()):>4.0%} of the price"
    )
assert sum(shares[1].values()) > 0.6 and sum(shares[16].values()) > 0.95
assert shares[16]["v_proj"] > 4 * shares[16]["q_proj"]

# %%
BUDGET = 5_000_000
best = {}
for r in (16, 32, 64):
    found = best_set(shares[r], costs[r], BUDGET)
    best[r] = ([kind for kind in shares[r] if kind in found], sum(shares[r][kind] for kind in found))
show(
    draw_first_step(shares[16], costs[16], best, r=16),
    alt="Left: the seven kinds of matrices, by what their adapters cost at r = 16 and by their share of the squared "
    "gradient. v_proj and down_proj are far above the others; v_proj is among the cheapest, down_proj among the "
    "dearest. q_proj, k_proj, o_proj and gate_proj lie low. Right: three bars, for the best set under five million "
    f"parameters at r = 16, 32 and 64: all seven at 16 capture nearly everything, {len(best[32][0])} of them at 32 "
    f"about three quarters, and {len(best[64][0])} at 64 less than a half.",
    finding="Under one budget, a small rank everywhere holds more of the gradient than a large rank in a few places.",
)
assert len(best[16][0]) == 7 > len(best[32][0]) > len(best[64][0])
assert best[16][1] > best[32][1] > best[64][1]

# %%
per_parameter = {kind: shares[16][kind] / costs[16][kind] for kind in shares[16]}
settle("05.first", max(per_parameter, key=per_parameter.get).removesuffix("_proj"))
winner = max(best, key=lambda r: best[r][1])
settle("05.budget", {16: "all seven with r = 16", 32: "three or four with r = 32", 64: "two kinds with r = 64"}[winner])

# %% [markdown]
# Is the arithmetic true? Put adapters of rank 16 into the real model, write the step into them (`B = −lr · U diag(σ)`,
# `A = Vᵀ`), and look at the loss.

# %%
model.requires_grad_(False)
put_in(model, ["all-linear"], lambda base: LoRALinear(base, r=16, alpha=16))
print(count_parameters(model))
lr = 3e-4
lesson.fill_with_gradient(model, gradients, lr)
with torch.no_grad():
    fell = float(loss - loss_of(model, batch))
told = lr * sum(by_kind(gradients, 16).values())
print(f"the loss fell by {fell / told:.2f} times what the formula says")
assert abs(fell / told - 1) < 0.1  # the rest is of second order in lr

# %% [markdown]
# **What it shows, and what not.** Under a fixed budget, spread the rank: all seven with r = 16 hold more than the best
# set with 32. The LoRA paper finds the same in trained models: in its Table 5 four matrices with r = 2 do at least as
# well as any single one with r = 8, which costs the same. And v holds much for its price, q little, in this model on
# this task.
#
# It is one step, of plain gradient descent, on four sentences. Adam steps differently, and later gradients point
# elsewhere. So take it as a reason to try a set, not as a result. A result is a training with several seeds: lesson 08.

# %% [markdown] tags=["slide"]
# ## 8 · Break it
#
# Four patients, in a small Llama of twelve layers. Each was to get adapters somewhere, and each map shows where they
# are. *Which bug is this?* The number of trained parameters stands above each, beside the one that was meant.

# %%
bug = find_exercise("05.2").bug
by_substring, with_head = (find_exercise("05.1").bug(name) for name in ("substring", "the head too"))


def wrap(base):
    return lora_layer(base, r=2, alpha=4.0)


def patient_1():
    hits = by_substring(model := lesson.tiny_llama(12), ["1.self_attn.q_proj", "1.self_attn.v_proj"])
    package_inject(model, [name for names in hits.values() for name in names], wrap)
    return model


def patient_2():
    bug("adapters inside adapters")(model := lesson.tiny_llama(12), ["q_proj", "v_proj"], wrap)
    bug("adapters inside adapters")(model, ["all-linear"], wrap)
    return model


# %%
def patient_3():
    hits = with_head(model := lesson.tiny_llama(12), ["all-linear"])
    package_inject(model, hits["all-linear"], wrap)
    return model


def patient_4():
    bug("the whole name as an attribute")(model := lesson.tiny_llama(12), ["q_proj", "v_proj"], wrap)
    return model


meant = {
    "1": count_of(lesson.TINY, 2, ["q_proj", "v_proj"]) // 12,  # in one layer of twelve
    "2": count_of(lesson.TINY, 2, "all-linear"),
    "3": count_of(lesson.TINY, 2, "all-linear"),
    "4": count_of(lesson.TINY, 2, ["q_proj", "v_proj"]),
}
sick = {"1": patient_1(), "2": patient_2(), "3": patient_3(), "4": patient_4()}
train = {number: count_parameters(patient).trainable for number, patient in sick.items()}

# %%
asked = {"1": "q, v of layer 1", "2": "all-linear, after q, v", "3": "all-linear", "4": "q, v"}
places = linear_names(lesson.tiny_llama(12))
maps = {number: adapter_map(patient, places) for number, patient in sick.items()}
show(
    draw_maps(
        {
            f"Patient {number}: {asked[number]}\n{train[number]:,} train, meant were {meant[number]:,}": cells
            for number, cells in maps.items()
        }
    ),
    alt="Four maps of a model, its twelve layers from left to right and its eight kinds of linear layers downwards. "
    "Patient 1 has adapters on q_proj and v_proj of layers 1 and 11. Patient 2 has one adapter everywhere but on "
    "lm_head, and a second inside it on q_proj and v_proj. Patient 3 has one everywhere and one on lm_head. Patient 4 "
    "has none at all, although as many parameters train as were meant.",
    finding="A layer too many, adapters in adapters, a head, and nothing at all: none of them raised an error.",
)

# %%
depths = {number: [cell.depth for cell in cells] for number, cells in maps.items()}
assert {cell.column for cell in maps["1"] if cell.depth} == {1, 11} and train["1"] == 2 * meant["1"]
assert depths["2"].count(2) == 24 and train["2"] > meant["2"]
assert [cell.row for cell in maps["3"] if cell.depth].count("lm_head") == 1 and train["3"] > meant["3"]
assert not any(depths["4"]) and train["4"] == meant["4"]
tokens = torch.arange(18).reshape(2, 9) % 19
patient = sick["4"]
optimizer = torch.optim.AdamW([p for p in patient.parameters() if p.requires_grad], lr=0.01)
said = patient(tokens)
for _ in range(5):
    optimizer.zero_grad()
    output = patient(tokens)
    assert not output.requires_grad  # nothing that trains took part
    optimizer.step()
print("patient 4 after 5 steps says the same, bit for bit:", torch.equal(said, output))
assert torch.equal(said, output)

# %% [markdown]
# <details><summary><b>Patient 1</b>, a layer too many</summary>
#
# The target was compared as a substring: `1.self_attn.q_proj` is in `layers.11.self_attn.q_proj` too. In a model of ten
# layers nobody would have noticed. It is how the code of an article matches; section 9 has it.
# </details>
#
# <details><summary><b>Patient 2</b>, adapters in adapters</summary>
#
# A second call, over a model that had adapters on q and v. The loop refuses what *is* an adapter, and finds the linear
# layer inside it, whose name is `….q_proj.base`. Two bypasses now lie side by side on one matrix. It trains. A file of
# it fits no model but one that was made by the same mistake.
# </details>
#
# <details><summary><b>Patient 3</b>, the head</summary>
#
# `lm_head` is an `nn.Linear`, so "all linear layers" has it. Here it costs little. In Llama-3-8B it is 4096 × 128,256,
# and an adapter of r = 16 beside it has 2,117,632 parameters, 16 times as many as beside the q of a layer. Where head
# and embedding are one tensor, as in SmolLM2, a merge would change both, or part them.
# </details>
#
# <details><summary><b>Patient 4</b>, nothing at all</summary>
#
# The count is right to the last digit and nothing is adapted: `setattr(model, "model.layers.0.self_attn.q_proj", …)`
# made new children of the model, with dots in their names. `parameters()` finds them, the optimizer gets them, and the
# forward pass goes where it always went. Here `backward()` would raise, for nothing that trains took part. In a model
# in which anything else trains, nothing is raised. *A count is no proof; a gradient is.*
# </details>

# %%
head = 16 * (4096 + llama_3.vocab)
print(f"r = 16 beside Llama-3-8B's head: {head:,} parameters; beside the q of one layer: {16 * 8192:,}")
assert head == 2_117_632 and round(head / (16 * 8192)) == 16

for exercise_id, name in (
    ("05.1", "substring"),
    ("05.2", "adapters inside adapters"),
    ("05.1", "the head too"),
    ("05.2", "the whole name as an attribute"),
):
    exercise = find_exercise(exercise_id)
    diagnosis = examine(exercise, exercise.bug(name), seeds=[0]).failure.bug
    assert diagnosis.name == name
    print(f"{exercise_id}  {diagnosis.name}\n      {diagnosis.why}")

# %% [markdown]
# Two that stop you, and leave something behind. A loop that replaces as it goes has replaced two modules when `wrap`
# refuses the third. And a walk that goes down into what it has just put in finds a linear layer there, wraps it, goes
# down, and so on.

# %%
half = lesson.tiny_llama(4)
with expect_bug(TypeError, match="cannot be wrapped"):
    bug("one by one")(half, ["v_proj"], lesson.Refusing())
print(f"{len(adapter_layers(half))} of 4 are replaced; the next call will say that they are wrapped already")
with expect_bug(RecursionError):
    bug("walks into what it put in")(lesson.tiny_llama(1), ["all-linear"], wrap)
whole = lesson.tiny_llama(4)
with expect_bug(TypeError, match="cannot be wrapped"):
    put_in(whole, ["v_proj"], lesson.Refusing())
assert len(adapter_layers(half)) == 2 and not adapter_layers(whole)

# %% [markdown]
# ## 9 · Check the claims
#
# A printed count can be checked in a line, with the formula of section 5. Four articles print four of them for r = 16.
# Before you run the cell: how many of the four do you trust?

# %%
show_claims("05")

# %% [markdown]
# What to learn from them:
#
# * A printed count is a claim about *three* things, the model, the targets and the rank. Where it is wrong, it is
#   mostly right for another three: 41,943,040 and 83,886,080 are both Llama-3-8B's, at r = 16 and 32.
# * The table by rank says "queries and values" and has the numbers of q, k, v and o: a factor of two in each row.
# * "PEFT's default" is a table by architecture, not a rule. Ask it: `default_targets(model)`.
# * Lists of names go stale. Mixtral's experts were modules once; in transformers 5 they are parameters of three axes,
#   and no name hits them. Ask the model what it has, or let an error tell you.

# %% [markdown]
# ## 10 · Exercises
#
# **Core** (checked, in section 6):

# %%
overview("05")

# %% [markdown]
# **Stretch: a rank for every matrix.** So far one rank for all. Now give each of SmolLM2's 210 matrices its own, 0 if
# you like, and capture **90 %** of the squared gradient of section 7 with as few parameters as you can. A matrix of
# rank r captures `gradients[name].captured(r)` and costs `r · (in + out)`. One rank for all needs the number that the
# cell prints. Below 1.0 M is good, below 0.8 M very good. (What do AdaLoRA, lesson 15, and PEFT's `rank_pattern` have
# to do with it?)


# %%
def ranks_for(gradients, ends, wanted):
    """{name: r} that captures at least `wanted`; ends[name] is in + out, and no r is above 64."""
    # BEGIN SOLUTION
    each = [(float(s) ** 2, name) for name, gradient in gradients.items() for s in gradient.S]
    each.sort(key=lambda pair: pair[0] / ends[pair[1]], reverse=True)  # singular values, the best per parameter first
    ranks, captured = dict.fromkeys(gradients, 0), 0.0
    for gain, name in each:
        if captured >= wanted:
            break
        ranks[name], captured = ranks[name] + 1, captured + gain
    return ranks
    # END SOLUTION


# %%
ends = {name: gradient.U.shape[0] + gradient.V.shape[0] for name, gradient in gradients.items()}
wanted = 0.9 * energy
uniform = next(r for r in range(1, 65) if sum(by_kind(gradients, r).values()) >= wanted)
print(f"one rank for all: r = {uniform}, {uniform * sum(ends.values()):,} parameters")
if is_stub(ranks_for):
    print("not started")
else:
    ranks = ranks_for(gradients, ends, wanted)
    held = sum(gradients[name].captured(r) for name, r in ranks.items())
    price = sum(r * ends[name] for name, r in ranks.items())
    print(
        f"yours: {held / energy:.1%} with {price:,} parameters; the ranks go from {min(ranks.values())} to "
        f"{max(ranks.values())}"
    )

# %% [markdown]
# **Explain** (a few sentences each; the instructor's notes have a rubric with sample answers):
#
# 1. A report says that 8,388,608 parameters train, which is right, and the loss does not move. Name two causes that
#    keep the count right, and the test that tells them apart.
# 2. Why must `inject` refuse a second call on the same layers, instead of skipping what is wrapped? And why is a second
#    call on *other* layers fine?
# 3. On Llama-3-8B, k and v cost less than q and o. Does that make them better targets? What would you have to measure?

# %% [markdown]
# ## 11 · The same in PEFT
#
# If PEFT and transformers are installed, two tiny models with random weights are made from configs, and both libraries
# put adapters in: with default targets, by name, and on all linear layers. Compared are the names of the layers and
# the counts.

# %%
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT loads it, and it remarks on the processor
has_peft = all(importlib.util.find_spec(name) is not None for name in ("peft", "transformers"))
if has_peft:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    ends_of_text = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 12}
    llama = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, **heads, **ends_of_text))
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=12, n_head=4, **ends_of_text))

    def in_peft(model, targets, r=4):
        """A copy of the model, with PEFT's adapters in it."""
        config = LoraConfig(r=r, target_modules=targets, fan_in_fan_out=model is gpt2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT 0.21 warns of a name in transformers 6
            return get_peft_model(copy.deepcopy(model), config)

else:
    print("PEFT is not installed: pip install peft transformers, and run this cell again")

# %%
if has_peft:
    asked = [
        (llama, None),
        (llama, ["q_proj", "v_proj"]),
        (llama, ["1.self_attn.q_proj"]),
        (llama, "all-linear"),
        (gpt2, None),
        (gpt2, ["attn.c_proj", "c_fc"]),
        (gpt2, "all-linear"),
    ]
    for model, targets in asked:
        theirs, ours = in_peft(model, targets), copy.deepcopy(model)
        chosen = default_targets(model) if targets is None else targets
        put_in(ours, [chosen] if isinstance(chosen, str) else chosen, lambda base: lora_layer(base, r=4, alpha=8.0))
        layers = {name for name, module in theirs.named_modules() if isinstance(module, LoraLayer)}
        same = {f"base_model.model.{name}" for name in adapter_layers(ours)} == layers
        counted = count_parameters(ours)
        assert same and (counted.trainable, counted.total) == theirs.get_nb_trainable_parameters()
        label = f"{type(model).__name__:<17} {'default' if targets is None else targets!s:<26}"
        print(f"{label} {len(layers):>3} layers, {counted.trainable:>6,} parameters: the same")

# %% [markdown]
# The rule for names is one and the same, `fan_in_fan_out=True` is PEFT's word for GPT-2's `Conv1D`, and the default is
# a table in both. Two things are different, and both are about mistakes:

# %%
if has_peft:
    half = in_peft(llama, ["q_proj", "v_porj"])
    found = {name.rpartition(".")[2] for name, module in half.named_modules() if isinstance(module, LoraLayer)}
    print("PEFT, asked for q_proj and v_porj, adapts", found, "and says nothing")
    with expect_bug(ValueError, match="v_porj"):
        put_in(copy.deepcopy(llama), ["q_proj", "v_porj"], wrap)

    trained = in_peft(llama, ["q_proj"])
    B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"
    nn.init.ones_(trained.get_parameter(B))  # as if it had learned something
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        again = get_peft_model(trained.base_model.model, LoraConfig(r=4, target_modules=["q_proj"]))
    is_lost = not again.get_parameter(B).any()
    print("PEFT, asked a second time, warns:", any("second time" in str(warning.message) for warning in told))
    print("and what the first adapter had learned is gone:", is_lost)
    assert found == {"q_proj"} and is_lost

# %% [markdown]
# ## 12 · Interview questions
#
# <details><summary>How many parameters does r = 16 train on all linear layers of a 7B Llama?</summary>
#
# 32 · 16 · Σ (in + out). For Llama-2-7B the sum is 78,080, which gives 39,976,960, 0.59 %. *A weak answer* is a
# percentage that was read somewhere, or 2 · 16 · 4096 for every matrix: gate, up and down are wider.
# </details>
#
# <details><summary>What does grouped-query attention change for LoRA?</summary>
#
# k and v have fewer outputs, so their adapters are smaller: r · (4096 + 1024) in Llama-3-8B. A count that was made for
# Llama-2 is wrong. And at r near the width of k there is nothing low-rank left. *A weak answer* says "nothing".
# </details>
#
# <details><summary>Which layers would you adapt, and why?</summary>
#
# All linear ones, at the smallest rank that the task takes, unless a budget or a serving engine forbids: under a fixed
# budget spreading beats stacking, in the LoRA paper's Table 5 and in the first gradient of section 7. Then say what it
# rests on, and measure it on the task. *A weak answer* is "q and v, as in the paper": the paper chose among attention
# matrices only.
# </details>
#
# <details><summary>The right number of parameters trains, and nothing is learned. Where do you look?</summary>
#
# At gradients of B after one backward pass. None at all: the adapters are not in the forward pass, or the graph is cut
# above them. Zero: both factors start at zero. *A weak answer* changes the learning rate first.
# </details>
#
# <details><summary>Why does inject take a function instead of r and alpha?</summary>
#
# So that it knows names and nothing else. LoRA, DoRA, a LoRA over four bits are other functions; refusing, replacing
# and freezing stay one piece of code. *A weak answer*: "for flexibility".
# </details>

# %% [markdown]
# ## 13 · Recap
#
# `inject(model, targets, wrap)` · hit ⇔ `name == target` or `name.endswith("." + target)` · `"all-linear"`: all but the
# head · `parameters = L · r · Σ (in + out)` · k, v: `n_kv_heads · head_dim` outputs
#
# Five lines to carry forward:
#
# 1. A target is the end of a path, at a dot. A substring hits what you did not mean.
# 2. Find, refuse, wrap, and only then replace: all or nothing.
# 3. A count needs the model, the targets and the rank. Do it before you load anything.
# 4. The right count is no proof that an adapter is in the forward pass. Its gradient is.
# 5. Under a budget: a small rank everywhere before a large rank somewhere. Then measure.
#
# Further reading: [LoRA](https://arxiv.org/abs/2106.09685), section 7.1 and its Table 5, for which attention matrices
# at equal budget; [QLoRA](https://arxiv.org/abs/2305.14314), Figure 2, for why all layers;
# [GQA](https://arxiv.org/abs/2305.13245), for where the narrow k and v come from.
#
# And read `minilora/torch_lora/inject.py`: you know its `match_targets` and its `inject` now. Look at what it does with
# a module that is used in two places. Lesson 06 turns to the numbers in front of B A.
#
# ### Before you go
#
# <!-- quiz: exit -->
