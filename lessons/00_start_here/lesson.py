# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 00 · Start here: the course, how checking works, and what you will make
#
# * **You will be able to** *choose* where to begin; *read* what `check` says; *see* a model learn before you know how.
# * **You need** Python, and nothing of LoRA.
# * **Minutes**: read 6 · exercises 3.
# * **Runs on** any CPU. No GPU. The end trains a small language model for eight steps.

# %% [markdown] tags=["solution"]
# This is the full notebook, with every answer. The one with blanks for you is `student/00_start_here.ipynb`.

# %% [markdown] tags=["student"]
# This is your notebook: fill in the line that says `...  # your code`. Building the course again never writes over a
# notebook that somebody has edited. The answer is in `00_start_here.ipynb`, one folder up.

# %% tags=["setup"]
import torch

from minilora import doctor
from minilora.classroom.demo import encode
from minilora.classroom.exercises import check, examine, find_exercise, hint  # noqa: F401
from minilora.classroom.explorer import show
from minilora.classroom.lessons import lesson_module, lessons_folder
from minilora.classroom.pictures.course_map import course_map, read_course
from minilora.classroom.pictures.json_training import Look, learning
from minilora.llm import load_model
from minilora.qlora import PagedAdamW
from minilora.torch_lora import LoRALinear, inject
from minilora.train.evaluate import exact_match, generate_answers, valid_json
from minilora.train.extraction import make_extraction
from minilora.train.finetune import Recipe
from minilora.train.trainer import train

# %% [markdown] tags=["slide"]
# ## 1 · The map
#
# Each lesson answers one question:
#
# | | the question |
# |---|---|
# | 01 | Why does training a model take so many times the memory of its weights? |
# | 02 | How much of a matrix is there: what is rank, and what is lost by cutting it? |
# | 03 | What does LoRA compute, forward and backward, and which of A and B learns first? |
# | 04 | What is a LoRA layer in PyTorch: what trains, what is frozen, what is saved? |
# | 05 | Which layers of a model get one, and what does that cost? |
# | 06 | What do alpha, the rank and the learning rate do to the first step? |
# | 07 | Can a real model learn to answer in JSON, and how is that measured? |
# | 08 | How much rank does a task need, and how sure can you be? |
# | 09 | How does the adapter become part of the weights, and what can be lost? |

# %% tags=["slide"]
stops = read_course(lessons_folder())
show(
    course_map(stops),
    alt="The lessons one under the other, each with its minutes; arrows on the left lead to a lesson from those that "
    "it needs. " + " ".join(f"{stop.number} needs {', '.join(stop.needs) or 'none'}." for stop in stops),
    finding=f"{len(stops)} lessons, {sum(stop.minutes for stop in stops)} minutes to read and to do the exercises. "
    "An arrow comes from a lesson that the card of another names.",
)

# %% [markdown] tags=["slide"]
# ## 2 · How checking works
#
# LoRA leaves a weight W (out, in) as it is, and trains two thin matrices beside it: A (r, in) and B (out, r). How many
# numbers is that? By hand, for out = 3, in = 2 and r = 1: A holds 2, B holds 3, together 5.
#
# Fill in the body, run the cell, then run `check`. It calls *your* function on sizes of its own. `hint("00.1")` gives
# one step at a time.


# %%
def adapter_numbers(out_features, in_features, r):
    # BEGIN SOLUTION
    numbers_in_A = r * in_features
    numbers_in_B = out_features * r
    return numbers_in_A + numbers_in_B
    # END SOLUTION


# %% tags=["slide"]
count = check("00.1", adapter_numbers).function
assert count(3, 2, 1) == 5

# %% [markdown]
# A wrong answer is more useful than it looks. This one forgets B. `check` compares it with mistakes that it knows, and
# names the one that gives the same numbers. (`examine` is `check` that writes nothing into your progress.)

# %%
forgets_B = examine(find_exercise("00.1"), lambda out_features, in_features, r: r * in_features)
print(forgets_B.message)
assert forgets_B.failure.bug.name == "A alone"

# %% [markdown] tags=["slide"]
# ## 3 · The doctor
#
# `minilora doctor` in a terminal says what your machine has, and what to do about what it has not. Here are its marks:
# `ok` is there, `–` is optional and not there, `!` is needed and missing.

# %% tags=["slide"]
found = [doctor.examine_safely(examine_it) for examine_it in doctor.CHECKS if examine_it is not doctor.speed_check]
checks = [each for each in found if each is not None]
for each in checks:
    print(f"{each.mark:<3} {each.name}")
print(doctor.verdict(checks))

# %% [markdown] tags=["slide"]
# ## 4 · What you will make
#
# SmolLM2 has 135 million parameters. A program wants four facts of a sentence, as JSON. `minilora demo` teaches it that
# in 64 steps and writes a report. Here is the same task, with LoRA, in 8 steps. First the published model:

# %%
torch.manual_seed(0)
model, tokenizer = load_model("smollm2-135m", dtype=torch.bfloat16)
STEPS, BATCH_SIZE = 8, 8
data = make_extraction(seed=0, n_train=STEPS * BATCH_SIZE, n_test=8)
questions = [tokenizer.encode_chat(example.messages) for example in data.test]
references = [example.answer for example in data.test]
longest = max(len(tokenizer.encode(answer)) for answer in references) + 8
before = generate_answers(model, tokenizer, questions, longest)
print(data.test[0].sentence)
print("before:", before[0])

# %%
start = torch.Generator().manual_seed(0)
report = inject(model, "all-linear", lambda base: LoRALinear(base, r=8, alpha=16, generator=start))
print(report.count)
samples = [encode(tokenizer, example) for example in data.train]
recipe = Recipe(lr=5e-3, batch_size=BATCH_SIZE, seed=0)
optimizer = PagedAdamW([p for p in model.parameters() if p.requires_grad], lr=recipe.lr)
training = train(model, recipe.batches(samples, tokenizer.pad), optimizer, recipe.schedule(STEPS))
after = generate_answers(model, tokenizer, questions, longest)
print("after: ", after[0])
print("right: ", references[0])
losses = [step.loss for step in training.steps]
assert losses[-1] < losses[0] / 2 and valid_json(after) > valid_json(before)

# %% tags=["slide"]
looks = [
    Look(step=step, answer=told[0], **lesson_module("07").json_score(told, references))
    for step, told in ((0, before), (STEPS, after))
]
show(
    learning(losses, looks, data.test[0].sentence, references[0]),
    alt=f"Left: the shares of {len(references)} unseen answers that are valid JSON and right to the letter, before and "
    f"after {STEPS} steps, and under it the loss of each step. Right: one sentence with both of its answers.",
    finding=f"After {STEPS} steps {valid_json(after):.0%} of {len(references)} unseen answers are valid JSON, and "
    f"{exact_match(after, references):.0%} are right to the letter. Before: {valid_json(before):.0%} and "
    f"{exact_match(before, references):.0%}.",
)

# %% [markdown]
# Few sentences and few steps: that is a glimpse, no measurement. `make demo` trains 64 steps, asks 200 unseen sentences
# and writes `runs/demo/report.html`; lesson 07 builds it with you.
#
# **Go on with** `01_the_bill.ipynb`, beside this notebook.
