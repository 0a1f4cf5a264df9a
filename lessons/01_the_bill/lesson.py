# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 01 · The bill: what training a model takes
#
# * **You will be able to** *add up* what a training holds in memory, part by part; *turn the sum round* to the largest
#   model for a card; *tell* whether a figure that somebody prints can be true.
# * **You need** bytes and data types, and to know that Adam keeps two running means. No calculus, no PyTorch.
# * **Minutes**: read 20 · exercises 28 · stretch and explain 20.
# * **Runs on** any CPU in a few seconds. No GPU.

# %% [markdown] tags=["solution"]
# This is the full notebook, with every answer. The one with blanks for you is `student/01_the_bill.ipynb`.

# %% [markdown] tags=["student"]
# This is your notebook: fill in the lines that say `...  # your code`. Building the course again never writes over a
# notebook that somebody has edited. The answers are in `01_the_bill.ipynb`, one folder up.

# %% tags=["setup"]
import importlib.util
import warnings
from dataclasses import replace

from minilora.classroom.bets import predict, settle
from minilora.classroom.claims import show_claims
from minilora.classroom.evidence import expect_bug
from minilora.classroom.exercises import check, examine, find_exercise, hint, overview  # noqa: F401
from minilora.classroom.explorer import explorer, show
from minilora.classroom.lessons import lesson_module
from minilora.classroom.pictures.bill import GB, METHODS, bill, bills, by_length, stacked
from minilora.llm.architectures import ARCHITECTURES
from minilora.llm.setup import Setup
from minilora.llm.size_report import size_report
from minilora.llm.sizes import base_params, lora_params
from minilora.llm.training_memory import training_bytes

lesson = lesson_module("01")

# %% [markdown]
# ## 1 · Warm-up
#
# <!-- quiz: warm-up -->

# %% [markdown] tags=["slide"]
# ## 2 · The problem
#
# You have a model of seven billion parameters that answers well, on a card of 24 GB. Answering takes its weights and a
# little more: 13.5 GB in 16 bits, it fits. Now you want to teach it something. The first step of the optimizer ends
# with *out of memory*, and no smaller batch helps. What needs so much?
#
# Training keeps, for every number that it trains: the number, its gradient, two running means, and mostly a copy in
# float32. The number that hurts: **16 bytes** for each parameter that was 2 bytes wide while it only answered.

# %%
arch = ARCHITECTURES["llama-2-7b"]
answering = base_params(arch) * 2
training = training_bytes(arch, Setup(method="full", dtype="bf16", batch=1, seq=512))
print(f"Llama-2-7B has {base_params(arch):,} parameters")
print(f"weights in bfloat16    {answering / GB:7.1f} GB")
print(f"a training of all      {training.total / GB:7.1f} GB, {training.total / answering:.1f} times as much")
assert training.total > 8 * answering

# %% [markdown]
# ## 3 · Predict
#
# Place a bet before you read on: put your answer in `bet=`. It is settled in section 7, nobody else sees it. Leave
# `None` to skip.

# %%
predict("01.adam", "A 7B model in float32, all of it trained with Adam. How many GB, without activations?", bet=None)
predict(
    "01.lora",
    "The same model in bfloat16. With LoRA, r = 16 on all linear layers, 0.6 % of the numbers train. "
    "Which part of the full training's memory is left (0 to 1)?",
    bet=None,
)
predict(
    "01.left",
    "With LoRA, what takes the most memory?",
    choices=["the frozen weights", "gradients", "Adam's moments", "activations"],
    bet=None,
)

# %% [markdown] tags=["slide"]
# ## 4 · The one picture
#
# A bar for each way of training, its parts on each other, and your card as a dashed line. Everything to the right of
# the line does not fit. *full* trains all parameters; *lora* leaves the weights as they are and trains small factors
# beside them (lesson 03); *qlora* stores the frozen weights in 4 bits besides (lessons 12 and 13).
#
# Drag `card`, then `model`. Which is the largest model that your own card trains in each way? Then let `tokens` grow:
# which parts grow with it, and which do not?


# %%
def setup_of(dtype, optimizer, tokens, checkpointing):
    return Setup(dtype=dtype, optimizer=optimizer, batch=max(1, tokens // 512), seq=512, checkpointing=checkpointing)


def draw(model, dtype, optimizer, tokens, checkpointing, card):
    return stacked(bills(model, setup_of(dtype, optimizer, tokens, checkpointing)), card)


def finding(model, dtype, optimizer, tokens, checkpointing, card):
    totals = {
        method: sum(parts.values())
        for method, parts in bills(model, setup_of(dtype, optimizer, tokens, checkpointing)).items()
    }
    fits = [method for method, total in totals.items() if total <= card]
    told = ", ".join(f"{method} {total:,.1f} GB" for method, total in totals.items())
    return f"{model}, {dtype}, {optimizer}, {tokens:,} tokens: {told}; into {card} GB fit {', '.join(fits) or 'none'}."


def in_words(model, dtype, optimizer, tokens, checkpointing, card):
    found = bills(model, setup_of(dtype, optimizer, tokens, checkpointing))
    told = [
        f"{method}: " + ", ".join(f"{part} {size:.1f}" for part, size in parts.items() if size >= 0.05)
        for method, parts in found.items()
    ]
    return f"Stacked bars in GB for {model}, and a line at {card} GB. {'. '.join(told)}."


# %%
picture = explorer(
    draw,
    alt=in_words,
    finding=finding,
    start={"model": "llama-2-7b", "dtype": "bf16", "tokens": 2048, "card": 24},
    model=["smollm2-135m", "llama-3.2-1b", "llama-3.2-3b", "llama-2-7b", "llama-3-8b", "llama-2-13b", "llama-2-70b"],
    dtype=["bf16", "fp32"],
    optimizer=["adamw", "adamw-8bit", "sgd"],
    tokens=[512, 2048, 8192, 32768],
    checkpointing=False,
    card=[8, 16, 24, 48, 80, 640],
)

# %%
picture.strip(tokens=[512, 2048, 8192, 32768])

# %% [markdown] tags=["slide"]
# ## 5 · Derivation
#
# For n parameters that train with Adam, with so many bytes a number:
#
# | part | one for each | bytes | why it is there |
# |---|---|---|---|
# | weights | parameter | 2 or 4 | to compute with |
# | gradients | trained parameter | as the weights | the optimizer reads all of them at once |
# | moments m, v | trained parameter | 4 + 4 | means of the gradient and of its square |
# | master copy | trained parameter, in 16 bits | 4 | a step smaller than a part in 256 of a weight would be lost |
# | activations | token and layer | some | the backward pass reads what the forward pass computed |
#
# ```
# float32:   4 + 4 + 8          = 16 bytes a parameter
# bfloat16:  2 + 2 + 8 + 4      = 16 bytes a parameter: no better!     answering: 2
# LoRA:      2 a frozen one  +  16 for each of the few that train
# QLoRA:     0.516 a frozen one in a linear layer  +  16 for each of the few that train
# ```
#
# **16 bits do not save training memory** as long as the moments and the master copy are float32. What saves is to train
# fewer numbers: three of the five lines are "one for each *trained* parameter".
#
# **Why 0.516?** 4 bits a weight, and for every block of 64 weights its largest, stored in 8 bits, and for 256 of these
# a float32: 4 + 8 / 64 + 32 / (64 · 256) = 4.127 bits.
#
# **Activations** count tokens, not parameters. They are there for full training and for LoRA alike: frozen layers are
# computed too, and the gradient passes through them. Checkpointing keeps the input of each layer alone and computes the
# layer again.
#
# **GB and GiB.** 1 GB is 10⁹ bytes, 1 GiB is 2³⁰, 7.4 % more. Makers and articles print GB, tools often GiB, and many
# call both "GB".
#
# **One example by hand**: a model of two matrices, 2 × 3 and 3 × 2, in float32 with Adam.
#
# ```
# n = 6 + 6 = 12        weights 48    gradients 48    moments 96        192 bytes
#
# LoRA with r = 1 beside the first: A has 3 numbers, B has 2
# weights 48 (frozen)   factors 20    gradients 20    moments 40        128 bytes
# ```

# %%
n, trained = 2 * 3 + 3 * 2, 1 * 3 + 2 * 1
full = lesson.train_bytes(n, weight=4, gradient=4, moment=4, master=0)
lora = 4 * n + lesson.train_bytes(trained, weight=4, gradient=4, moment=4, master=0)
print(f"full {full} bytes, LoRA {lora} bytes: as by hand")
assert (full, lora) == (192, 128)
bits = 4 + 8 / 64 + 32 / (64 * 256)
print(f"4-bit weights take {bits:.3f} bits, {bits / 8:.3f} bytes")

# %% [markdown]
# ## 6 · Build it
#
# Three functions of a line or two. `check` tries yours on random inputs and names the mistake if it knows it. Stuck?
# Run `hint("01.1")` in a new cell.
#
# **01.1 · The bill.** `weight`, `gradient`, `moment`, `master` are the bytes of *one* number of each; `master` is 0
# where there is no such copy.


# %%
def train_bytes(n, weight, gradient, moment, master):
    """Bytes that training all of n parameters with Adam holds, activations aside."""
    # BEGIN SOLUTION
    return n * (weight + gradient + 2 * moment + master)
    # END SOLUTION


yours = check("01.1", train_bytes).function

# %% [markdown]
# **01.2 · The largest model for a card.** The same sum, turned round. `reserve` is the share of the card that is kept
# for activations, the driver, and what the allocator wastes.


# %%
def largest_trainable(card_gb, bytes_per_param, reserve):
    """The most parameters, a whole number, whose bytes fit into (1 − reserve) of card_gb GB."""
    # BEGIN SOLUTION
    import math

    return math.floor((1 - reserve) * card_gb * 10**9 / bytes_per_param)
    # END SOLUTION


largest = check("01.2", largest_trainable).function

# %% [markdown]
# **01.3 · Can this table be true?** A row says how many parameters, which parts at how many bytes each, and a figure
# in GB:
#
# ```
# {"n": 70e9, "widths": {"weights": 2, "moments": 8}, "gb": 280}
# ```
#
# Say for each row whether its figure is enough for its own parts. Figures are rounded, so let 98 % pass.


# %%
def audit(rows):
    """A truth value for each row: its gb is at least 0.98 of what its parts add up to."""
    # BEGIN SOLUTION
    return [row["gb"] * 1e9 >= 0.98 * row["n"] * sum(row["widths"].values()) for row in rows]
    # END SOLUTION


auditor = check("01.3", audit).function

# %% [markdown]
# ## 7 · Run it, then settle the bets

# %%
adam = yours(7 * 10**9, weight=4, gradient=4, moment=4, master=0)
print(f"7B, float32, Adam: {adam / GB:.0f} GB;  70B: {10 * adam / GB:,.0f} GB")
settle("01.adam", adam / GB)
assert adam == 112 * GB

# %%
setup = Setup(dtype="bf16", r=16, batch=4, seq=512)
found = bills("llama-2-7b", setup)
for method, parts in found.items():
    print(
        f"{method:<6}",
        "  ".join(f"{part} {size:6.2f}" for part, size in parts.items()),
        f" = {sum(parts.values()):.1f} GB",
    )
left = sum(found["lora"].values()) / sum(found["full"].values())
settle("01.lora", round(left, 3))
largest_part = max(found["lora"], key=lambda part: found["lora"][part])
settle("01.left", {"weights": "the frozen weights", "optimizer": "Adam's moments"}.get(largest_part, largest_part))
share = lora_params(arch, 16) / base_params(arch)
print(f"LoRA trains {share:.2%} of the parameters, and takes {left:.0%} of the memory: what is frozen is still there")
assert largest_part == "weights" and 0.005 < share < 0.007

# %% [markdown]
# **The largest model for your card**, by your function, at 16 bytes a parameter, at 2 (LoRA, its own few aside) and at
# 0.516 (QLoRA), with a fifth in reserve:

# %%
for card in (8, 16, 24, 48, 80):
    told = "   ".join(f"{name} {largest(card, width, 0.2) / 1e9:6.1f} B" for name, width in
                      {"full": 16, "LoRA": 2, "QLoRA": bits / 8}.items())  # fmt: skip
    print(f"{card:>3} GB   {told}")
n = largest(24, 16, 0.2)
assert yours(n, 4, 4, 4, 0) <= 0.8 * 24 * GB < yours(n + 1, 4, 4, 4, 0)  # there and back

# %% [markdown]
# **What grows with the text.** The same 7B model, with more and more tokens in a batch:

# %%
lengths = [512, 2048, 8192, 32768]
ways = {
    "full": Setup(method="full", dtype="bf16"),
    "LoRA": Setup(method="lora", dtype="bf16"),
    "LoRA, checkpointing": Setup(method="lora", dtype="bf16", checkpointing=True),
    "QLoRA, checkpointing": Setup(method="qlora", dtype="bf16", checkpointing=True),
}
lines = {
    name: [sum(bill("llama-2-7b", replace(way, batch=n // 512, seq=512)).values()) for n in lengths]
    for name, way in ways.items()
}
show(
    by_length(lengths, lines, 24),
    alt="Memory against tokens in a batch, both on log scales, for a 7B model. "
    + " ".join(f"{name}: from {values[0]:.0f} to {values[-1]:.0f} GB." for name, values in lines.items())
    + " A dashed line at 24 GB.",
    finding="With many tokens activations are the bill, for LoRA too; checkpointing is what takes them away.",
)
assert lines["LoRA"][-1] > 4 * lines["LoRA"][0] and lines["LoRA, checkpointing"][-1] < 0.3 * lines["LoRA"][-1]

# %% [markdown]
# `minilora size` prints this bill for any model without loading it:

# %%
print(size_report("llama-2-7b", arch, [Setup(method=method, r=16) for method in METHODS]))

# %% [markdown] tags=["slide"]
# ## 8 · Break it
#
# Four people made the bill of 7B in bfloat16 with a master copy, and one thing went wrong in each. Look at the bars:
# which is which?
#
# (a) one moment instead of two · (b) the weights alone · (c) no gradients · (d) GiB printed as GB

# %%
PATIENTS = {
    "Patient 1": "the weights alone",
    "Patient 2": "in GiB",
    "Patient 3": "no gradients",
    "Patient 4": "one moment",
}
exercise, case = find_exercise("01.1"), {"n": 7 * 10**9, "weight": 2, "gradient": 2, "moment": 4, "master": 4}
said = {name: exercise.bug(bug)(**case) / GB for name, bug in PATIENTS.items()}
empty = dict.fromkeys(found["full"], 0.0)
show(
    stacked({name: {**empty, "weights": total} for name, total in {"right": yours(**case) / GB, **said}.items()}, 80),
    alt="Five bars and a line at 80 GB: "
    + ", ".join(f"{name} {total:.0f} GB" for name, total in said.items())
    + f"; right is {yours(**case) / GB:.0f} GB. Only patient 1 is below the line.",
    finding="All four are too small. That is the usual direction: what is forgotten is never too much.",
)
assert all(total < yours(**case) / GB for total in said.values())

# %% [markdown]
# <details><summary><b>Patient 1</b>, who sees the weights alone</summary>
#
# (b) 14 GB: what answering takes. This is the figure in most tables that promise training on one card.
# </details>
#
# <details><summary><b>Patient 2</b>, who mixes units</summary>
#
# (d) 104: 112 GB are 104.3 GiB. A tool printed GiB, somebody wrote GB. On the edge of a card it is the whole
# difference.
# </details>
#
# <details><summary><b>Patient 3</b>, without gradients</summary>
#
# (c) 98 GB: 2 bytes a parameter less. Some optimizers do step layer by layer and free each gradient; Adam in a plain
# loop does not.
# </details>
#
# <details><summary><b>Patient 4</b>, with one moment</summary>
#
# (a) 84 GB: 4 bytes a parameter less. That is SGD with momentum.
# </details>
#
# The check knows all four by name:

# %%
for bug in PATIENTS.values():
    diagnosis = examine(exercise, exercise.bug(bug)).failure.bug
    assert diagnosis.name == bug
    print(f"{diagnosis.name}: {diagnosis.why}")

# %% [markdown]
# And two that stop you at once: `minilora size` refuses what it does not know, and a text that is longer than the model
# can read.

# %%
with expect_bug(ValueError, match="no method is named"):
    Setup(method="laura")
with expect_bug(ValueError, match="too long"):
    training_bytes(ARCHITECTURES["gpt2"], Setup(seq=8192))

# %% [markdown]
# ## 9 · Check the claims
#
# First by your own audit: six figures as articles print them, with the parts that they name.

# %%
for (name, row), possible in zip(lesson.QUOTED.items(), auditor(list(lesson.QUOTED.values())), strict=True):
    least = row["n"] * sum(row["widths"].values()) / GB
    print(f"{'possible  ' if possible else 'impossible'}  {name:<46} its parts: {least:7,.0f} GB")
assert auditor(list(lesson.QUOTED.values())) == [True, False, False, False, True, False]

# %% [markdown]
# And the claims of those articles, each with the code that decides it.

# %%
show_claims("01")

# %% [markdown]
# ## 10 · Exercises
#
# **Core** (checked, in section 6):

# %%
overview("01")

# %% [markdown]
# **Stretch: a run for 24 GB.** Find the setup that trains Llama-2-7B on as many tokens a step as possible within 24 GB,
# a tenth in reserve. Any method, rank, optimizer; with or without checkpointing. Not pass or fail: the target is the
# number of tokens.


# %%
def my_setup():
    """A Setup whose total is at most 21.6 GB."""
    # BEGIN SOLUTION
    return Setup(method="qlora", r=8, dtype="bf16", optimizer="adamw-8bit", batch=22, seq=2048, checkpointing=True)
    # END SOLUTION


mine = my_setup()
if mine is not None:
    total = training_bytes(arch, mine).total / GB
    verdict = "fits" if total <= 0.9 * 24 else "does not fit"
    print(f"{mine.batch * mine.seq:,} tokens a step, {total:.1f} GB: it {verdict} into nine tenths of 24 GB")

# %% [markdown]
# **Explain** (a few sentences each; the instructor's notes have a rubric with sample answers):
#
# 1. "We switched from float32 to bfloat16, so training takes half the memory." When is that true, when not?
# 2. LoRA trains 0.6 % of the parameters. Why does it not take 0.6 % of the memory? Name the parts that stay.
# 3. Your run fits with 512 tokens and fails with 2,048. Which two changes do you try first, and what does each cost?

# %% [markdown]
# ## 11 · The same in PyTorch and PEFT
#
# If torch is installed, the next cell trains a small network for one step with Adam and counts the bytes of everything
# that stays: not by our formula, but by asking the tensors. PEFT's count of what trains is compared as well.

# %%
if importlib.util.find_spec("torch"):
    import torch

    net = torch.nn.Sequential(torch.nn.Linear(300, 200, bias=False), torch.nn.Linear(200, 100, bias=False))
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(4, 300)).sum().backward()
    optimizer.step()
    held = [tensor for p in net.parameters() for tensor in (p, p.grad)]
    held += [t for state in optimizer.state.values() for name, t in state.items() if name.startswith("exp_avg")]
    counted = sum(t.numel() * t.element_size() for t in held)
    n = sum(p.numel() for p in net.parameters())
    print(f"{n:,} parameters; torch holds {counted:,} bytes; yours says {yours(n, 4, 4, 4, 0):,}")
    assert counted == yours(n, 4, 4, 4, 0)
else:
    print("torch is not installed: pip install torch, and run this cell again")

# %%
if all(importlib.util.find_spec(name) for name in ("torch", "peft", "transformers")):
    import logging

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT loads it, and it remarks on the processor
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": arch.hidden, "intermediate_size": arch.intermediate, "num_hidden_layers": arch.n_layers}
    with torch.device("meta"), warnings.catch_warnings():  # shapes without numbers: 13 GB that take none
        warnings.simplefilter("ignore", FutureWarning)  # transformers', about its own next version
        llama = LlamaForCausalLM(LlamaConfig(vocab_size=arch.vocab, num_attention_heads=arch.n_heads, **sizes))
        peft_model = get_peft_model(llama, LoraConfig(r=16, target_modules="all-linear"))
    trained, everything = peft_model.get_nb_trainable_parameters()
    print(
        f"PEFT: {trained:,} of {everything:,} train; minilora: {lora_params(arch, 16):,} beside {base_params(arch):,}"
    )
    assert (trained, everything) == (lora_params(arch, 16), base_params(arch) + lora_params(arch, 16))
else:
    print("PEFT is not installed: pip install peft transformers, and run this cell again")

# %% [markdown]
# ## 12 · Interview questions
#
# <details><summary>How much memory does training a 7B model take?</summary>
#
# All of it, with Adam: 16 bytes a parameter, 112 GB, and the activations of a batch. With LoRA in 16 bits: 14 GB of
# frozen weights and well under a GB of the rest, and the same activations. *A weak answer* is one number without saying
# what trains.
# </details>
#
# <details><summary>Why is mixed precision no cheaper in memory?</summary>
#
# 2 + 2 + 8 + 4 is 16, as 4 + 4 + 8 is. It is faster, and its activations are half as large. *A weak answer* says that
# everything is halved.
# </details>
#
# <details><summary>What does an 8-bit optimizer save?</summary>
#
# Of 16 bytes the moments are 8; in 8 bits they are 2, and a little for the scales: 10 bytes are left. With LoRA it
# saves next to nothing, for there are hardly any moments. *A weak answer* says "half".
# </details>
#
# <details><summary>Where does a model of 70B go, if a card has 80 GB?</summary>
#
# In 4 bits its linear weights take 35 GB, and the embeddings 1 GB in 16 bits; adapters and activations come on top. In
# 16 bits it is 138 GB, two cards for the weights alone. *A weak answer* forgets what stays in 16 bits.
# </details>
#
# <details><summary>A tool says 14.9, an article 16. Who is wrong?</summary>
#
# Perhaps nobody: 16 GB are 14.9 GiB. *A weak answer* trusts the smaller one.
# </details>

# %% [markdown]
# ## 13 · Recap
#
# n parameters · weights + gradients + 2 moments + master copy, for each that *trains*; weights alone for each that is
# frozen · activations for each *token* · GB = 10⁹, GiB = 2³⁰
#
# Five lines to carry forward:
#
# 1. 16 bytes a trained parameter, in float32 and in mixed precision alike.
# 2. What is frozen costs its weights, and nothing else.
# 3. Train fewer numbers, and the frozen weights are the bill; store them in 4 bits, and the activations are.
# 4. Activations belong to tokens, not to parameters; LoRA does not take them away.
# 5. A figure is possible only if its own parts fit into it: add them up.
#
# Further reading: [ZeRO](https://arxiv.org/abs/1910.02054), section 3, where the 16 bytes are counted;
# [Mixed precision training](https://arxiv.org/abs/1710.03740), for why there is a master copy;
# [QLoRA](https://arxiv.org/abs/2305.14314), for how the last of the weights' bill was paid.
#
# ### Before you go
#
# <!-- quiz: exit -->
