"""Lesson 07: the labels of a batch, the loss on them, and what counts as a right answer, with the usual mistakes.

The inputs are those that make mistakes show: pad is the same token as eos, as in SmolLM2, and eos stands inside the
prompts too, for the chat template ends every turn with it. No two rows of a batch are equally long.
"""

import ast
import functools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.classroom.exercises import Bug, Case, Exercise, Property
from minilora.classroom.demo import encode
from minilora.llm import Decoder, ModelConfig, generate, load_model
from minilora.torch_lora import LoRALinear, inject
from minilora.train.data import IGNORED, Batch, collate, mask_prompt
from minilora.train.evaluate import exact_match, generate_answers, parse_object, valid_json
from minilora.train.extraction import KEYS, make_extraction
from minilora.train.finetune import Recipe, fine_tune
from minilora.train.trainer import train

Tokens = Sequence[Sequence[int]]

# -------------------------------------------------------------------------------------------------------- 07.1 labels

EOS = 2  # of SmolLM2, which is its pad as well
N_WORDS = 40  # tokens of the exercises' vocabulary


def build_labels(prompts: Tokens, answers: Tokens, eos: int, pad: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels of a batch, as the package makes them."""
    samples = [mask_prompt(list(p), list(a), eos) for p, a in zip(prompts, answers, strict=True)]
    batch = collate(samples, pad)
    return batch.tokens, batch.labels


def label_inputs(rng: np.random.Generator) -> Case:
    """Four samples whose prompts hold eos in the middle; lengths all differ, and pad is eos."""
    lengths = rng.permutation(4)

    def words(n: int) -> list[int]:
        return [int(token) for token in rng.integers(3, N_WORDS, size=n)]

    prompts = [[*words(2), EOS, *words(1 + int(n))] for n in lengths]
    answers = [words(2 + int(n) + i) for i, n in enumerate(lengths)]
    return {"prompts": prompts, "answers": answers, "eos": EOS, "pad": EOS}


def ends_are_learnt(function: Callable, case: Case) -> str | None:
    """In every row the last label that carries loss is eos."""
    _, labels = (torch.as_tensor(part) for part in function(*case.values()))
    for row, line in enumerate(labels):
        carried = line[line != IGNORED]
        if len(carried) == 0 or int(carried[-1]) != case["eos"]:
            return f"in row {row} the end of the answer carries no loss: the model would never learn to stop"
    return None


def another_pad_changes_only_padding(function: Callable, case: Case) -> str | None:
    """With a pad that is not eos the same places carry loss."""
    _, labels = (torch.as_tensor(part) for part in function(*case.values()))
    _, other = (torch.as_tensor(part) for part in function(*{**case, "pad": 1}.values()))
    return None if torch.equal(labels, other) else "the labels change when pad is another token; they must not"


def _wrong_labels(change: Callable[[Tensor, Tensor, Case], tuple[Tensor, Tensor]]) -> Callable:
    """A wrong build_labels: `change` gets the right tokens and labels, and the inputs."""

    def wrong(prompts: Tokens, answers: Tokens, eos: int, pad: int) -> tuple[Tensor, Tensor]:
        tokens, labels = build_labels(prompts, answers, eos, pad)
        case = {"prompts": prompts, "answers": answers, "eos": eos, "pad": pad}
        return change(tokens, labels, case)

    return wrong


def _end_masked(tokens: Tensor, labels: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    return tokens, labels.masked_fill(tokens == case["pad"], IGNORED)


def _lengths(case: Case) -> list[int]:
    return [len(p) + len(a) + 1 for p, a in zip(case["prompts"], case["answers"], strict=True)]


def _prompt_too(tokens: Tensor, labels: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    labels = labels.clone()
    for row, prompt in enumerate(case["prompts"]):
        labels[row, : len(prompt)] = tokens[row, : len(prompt)]
    return tokens, labels


def _padding_too(tokens: Tensor, labels: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    labels = labels.clone()
    for row, length in enumerate(_lengths(case)):
        labels[row, length:] = case["pad"]
    return tokens, labels


def _shifted(tokens: Tensor, labels: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    return tokens, F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def _late(tokens: Tensor, labels: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    labels = labels.clone()
    for row, prompt in enumerate(case["prompts"]):
        labels[row, len(prompt)] = IGNORED
    return tokens, labels


def _no_end(tokens: Tensor, labels: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    tokens, labels = tokens.clone(), labels.clone()
    for row, length in enumerate(_lengths(case)):
        tokens[row, length - 1], labels[row, length - 1] = case["pad"], IGNORED
    return tokens[:, :-1], labels[:, :-1]


def _padded_left(tokens: Tensor, labels: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    turns = [tokens.shape[1] - length for length in _lengths(case)]
    return tuple(
        torch.stack([row.roll(turn) for row, turn in zip(part, turns, strict=True)]) for part in (tokens, labels)
    )


LABELS = Exercise(
    id="07.1",
    title="The labels of a batch",
    asks="build_labels(prompts, answers, eos, pad) returns tokens and labels, (batch, longest), padded on the right",
    points=3,
    minutes=12,
    difficulty=2,
    importance=3,
    reference=build_labels,
    generate=label_inputs,
    outputs=("tokens", "labels"),
    tolerance=0.0,
    properties=(
        Property(name="every answer's end carries loss", test=ends_are_learnt),
        Property(name="the labels do not depend on which token pads", test=another_pad_changes_only_padding),
    ),
    hints=(
        "A row is prompt + answer + [eos], then pad up to the longest row. Its labels are as long as its tokens.",
        "A label stands at the position of its own token. −100 over the prompt, then answer and eos, then −100.",
        "Never decide by the id of a token what carries loss: eos is in the prompt, at the end, and is the padding. "
        "Decide by position: len(prompt), len(answer) + 1, and the rest.",
    ),
    bugs=(
        Bug(
            name="the end is masked",
            function=_wrong_labels(_end_masked),
            why="You masked every label whose token is pad; here that is eos too, and so the end is never learnt.",
            link="8 · Break it",
        ),
        Bug(
            name="no end",
            function=_wrong_labels(_no_end),
            why="You did not put eos after the answer: the model sees no answer end, and so it never ends one.",
        ),
        Bug(
            name="the prompt carries loss",
            function=_wrong_labels(_prompt_too),
            why="The prompt's tokens carry loss: the model spends its steps on learning to write your questions.",
            link="8 · Break it",
        ),
        Bug(
            name="padding carries loss",
            function=_wrong_labels(_padding_too),
            why="The padding carries loss: easy tokens that nobody asked for make the mean look small.",
            link="8 · Break it",
        ),
        Bug(
            name="shifted twice",
            function=_wrong_labels(_shifted),
            why="You moved the labels one to the left. The loss does that already: together the model learns the token "
            "after the next.",
            link="8 · Break it",
        ),
        Bug(
            name="the answer begins too late",
            function=_wrong_labels(_late),
            why="The first token of the answer carries no loss: it is one off. Nothing teaches the model how to begin.",
        ),
        Bug(
            name="padded on the left",
            function=_wrong_labels(_padded_left),
            why="You padded on the left: then the text's own positions depend on its neighbours in the batch.",
        ),
    ),
)

# ---------------------------------------------------------------------------------------------------------- 07.2 loss


def answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean of −log p over the labels that carry loss; the logits at i − 1 are for the label at i.

    What train/loss computes without ever holding the logits; a test says so.
    """
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def loss_inputs(rng: np.random.Generator) -> Case:
    """Logits over 11 tokens for 4 rows of 9, whose answers are of other lengths, and padded."""
    labels = torch.full((4, 9), IGNORED)
    for row, n in enumerate(rng.permutation(4)):
        start = 2 + row % 2
        labels[row, start : start + 2 + int(n)] = torch.from_numpy(rng.integers(1, 11, size=2 + int(n)))
    return {"logits": torch.from_numpy(2 * rng.normal(size=(4, 9, 11))), "labels": labels}


def padding_changes_nothing(function: Callable, case: Case) -> str | None:
    """Three more columns that carry no loss leave it as it is."""
    logits = torch.cat([case["logits"], torch.ones(4, 3, 11, dtype=torch.float64)], dim=1)
    wider = float(function(logits, F.pad(case["labels"], (0, 3), value=IGNORED)))
    loss = float(function(*case.values()))
    return (
        None
        if abs(wider - loss) < 1e-9
        else f"with three columns of padding more the loss is {wider:.4f}, not {loss:.4f}"
    )


def knows_nothing_at_uniform(function: Callable, case: Case) -> str | None:
    """Where all logits are equal, the loss is log(vocabulary)."""
    loss = float(function(torch.zeros_like(case["logits"]), case["labels"]))
    return (
        None
        if abs(loss - np.log(11)) < 1e-9
        else f"with equal logits over 11 tokens it is {loss:.4f}, not log 11 = {np.log(11):.4f}"
    )


def pulls_where_it_is_labelled(function: Callable, case: Case) -> str | None:
    """Its gradient is zero for every position whose next label carries no loss."""
    logits = case["logits"].clone().requires_grad_()
    loss = function(logits, case["labels"])
    if not (isinstance(loss, Tensor) and loss.requires_grad):
        return "the result has no gradient: compute it with torch's functions, and return the tensor itself"
    (gradient,) = torch.autograd.grad(loss, logits)
    idle = F.pad(case["labels"][:, 1:] == IGNORED, (0, 1), value=True)
    at = idle & gradient.abs().sum(-1).gt(0)
    return f"{int(at.sum())} positions get a gradient although what follows them carries no loss" if at.any() else None


def _picked(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """−log p of every label, 0 where it carries no loss; and which carry loss."""
    carries = labels != IGNORED
    logp = logits.log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    return -logp * carries, carries


def _not_shifted(logits: Tensor, labels: Tensor) -> Tensor:
    lost, carries = _picked(logits, labels)
    return lost.sum() / carries.sum()


def _shifted_back(logits: Tensor, labels: Tensor) -> Tensor:
    lost, carries = _picked(logits[:, 1:], labels[:, :-1])
    return lost.sum() / carries.sum()


def _over_all(logits: Tensor, labels: Tensor) -> Tensor:
    lost, _ = _picked(logits[:, :-1], labels[:, 1:])
    return lost.mean()


def _by_rows(logits: Tensor, labels: Tensor) -> Tensor:
    lost, carries = _picked(logits[:, :-1], labels[:, 1:])
    return (lost.sum(1) / carries.sum(1)).mean()


def _summed(logits: Tensor, labels: Tensor) -> Tensor:
    return _picked(logits[:, :-1], labels[:, 1:])[0].sum()


def _mask_forgotten(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].clamp_min(0).flatten())


def _no_log(logits: Tensor, labels: Tensor) -> Tensor:
    lost, carries = _picked(logits[:, :-1], labels[:, 1:])
    return ((1 - (-lost).exp()) * carries).sum() / carries.sum()


def _in_bits(logits: Tensor, labels: Tensor) -> Tensor:
    return answer_loss(logits, labels) / np.log(2)


LOSS = Exercise(
    id="07.2",
    title="The loss on the answer",
    asks="answer_loss(logits, labels) returns one number: the mean of −log p over the labels that are not −100",
    points=2,
    minutes=10,
    difficulty=2,
    importance=3,
    reference=answer_loss,
    generate=loss_inputs,
    tolerance=1e-5,
    properties=(
        Property(name="more padding changes nothing", test=padding_changes_nothing),
        Property(name="equal logits lose log(vocabulary)", test=knows_nothing_at_uniform),
        Property(name="its gradient is zero where nothing is to be learnt", test=pulls_where_it_is_labelled),
    ),
    hints=(
        "logits[:, i] says what the model expects at i + 1. The first label has no logits, the last logits no label.",
        "logits[:, :-1] stand beside labels[:, 1:]. Flatten both and let F.cross_entropy do the rest.",
        "F.cross_entropy(…, ignore_index=-100) leaves out what carries no loss, in the sum and in the count.",
    ),
    bugs=(
        Bug(
            name="not shifted",
            function=_not_shifted,
            why="You compared the logits at i with the label at i: which was read already: the model learns to repeat.",
            link="5 · Derivation",
        ),
        Bug(
            name="shifted the wrong way",
            function=_shifted_back,
            why="You compared the logits at i + 1 with the label at i: the model would tell what it has read.",
            link="5 · Derivation",
        ),
        Bug(
            name="divided by all positions",
            function=_over_all,
            why="You divided by all positions, also those without loss: longer prompts would make smaller losses.",
        ),
        Bug(
            name="a mean of means",
            function=_by_rows,
            why="You took the mean in each row and then of the rows: tokens of short answers count more.",
        ),
        Bug(
            name="a sum",
            function=_summed,
            why="You summed and did not divide: the loss and the step grow with the number of tokens in the batch.",
        ),
        Bug(
            name="the mask is forgotten",
            function=_mask_forgotten,
            why="You set −100 to 0 and learnt it: every prompt token and all padding is taught to be token 0.",
        ),
        Bug(
            name="no logarithm",
            function=_no_log,
            why="You averaged 1 − p instead of −log p: where the model is surely wrong it hardly pulls.",
        ),
        Bug(
            name="in bits",
            function=_in_bits,
            why="You took the logarithm to base 2: bits instead of nats, 1.44 times as many.",
        ),
    ),
)

# --------------------------------------------------------------------------------------------------------- 07.3 score


def json_score(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Shares, from 0 to 1: one JSON object and nothing else; with exactly the four keys; right to the letter."""
    found = [parse_object(answer) for answer in answers]
    keys = sum(facts is not None and set(facts) == set(KEYS) for facts in found) / len(answers)
    return {"json": valid_json(answers), "keys": keys, "exact": exact_match(answers, references)}


WAYS: dict[str, Callable[[dict[str, Any], str], str]] = {
    "right": lambda facts, text: text,
    "spaces around": lambda facts, text: f" {text}\n",
    "spaces inside": lambda facts, text: json.dumps(facts),
    "keys in another order": lambda facts, text: json.dumps(dict(reversed(facts.items())), separators=(",", ":")),
    "single quotes": lambda facts, text: str(facts),
    "words around": lambda facts, text: f"Here you are: {text}",
    "a list": lambda facts, text: f"[{text}]",
    "a key too few": lambda facts, text: json.dumps({k: v for k, v in facts.items() if k != "city"}),
    "a key too many": lambda facts, text: json.dumps({**facts, "country": None}),
    "a wrong name": lambda facts, text: text.replace(facts["name"], facts["name"][:-1]),
    "cut off": lambda facts, text: text[:-1],
}


def score_inputs(rng: np.random.Generator) -> Case:
    """Answers that are right, or wrong in each of eleven ways, each way another number of times."""
    counts = dict(zip(WAYS, rng.permutation(np.arange(1, len(WAYS) + 1)), strict=True))
    ways = [way for way, count in counts.items() for _ in range(int(count))]
    examples = make_extraction(int(rng.integers(1000)), len(ways), 0).train
    references = [example.answer for example in examples]
    answers = [WAYS[way](json.loads(text), text) for way, text in zip(ways, references, strict=True)]
    return {"answers": answers, "references": references}


def no_answer_is_run(function: Callable, case: Case) -> str | None:
    """An answer is text that a model wrote: it is read, and never run."""
    ran: list[str] = []
    text = "(lambda: __import__('builtins').minilora_ran.append('answer'))()"
    import builtins

    builtins.minilora_ran = ran  # type: ignore[attr-defined]
    try:
        function([text, *case["answers"]], [text, *case["references"]])
    finally:
        del builtins.minilora_ran  # type: ignore[attr-defined]
    return "an answer was run as Python: whoever writes the model's input could run anything" if ran else None


def _scored(
    parse: Callable[[str], Any] = parse_object,
    fits: Callable[[Any], bool] = lambda facts: set(facts) == set(KEYS),
    exact: Callable[[Sequence[str], Sequence[str]], float] = exact_match,
) -> Callable:
    """A json_score of which one part is done otherwise."""

    def score(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        found = [parse(answer) for answer in answers]
        n = len(answers)
        return {
            "json": sum(facts is not None for facts in found) / n,
            "keys": sum(facts is not None and fits(facts) for facts in found) / n,
            "exact": exact(answers, references),
        }

    return score


def _or_none(read: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(answer: str) -> Any:
        try:
            return read(answer)
        except (ValueError, SyntaxError):
            return None

    return parse


def _braces(answer: str) -> Any:
    found = re.search(r"\{.*\}", answer, flags=re.DOTALL)
    return parse_object(found[0]) if found else None


def _literal(answer: str) -> Any:
    facts = _or_none(lambda text: ast.literal_eval(text.strip()))(answer)
    return facts if isinstance(facts, dict) else parse_object(answer)


def _as_facts(answers: Sequence[str], references: Sequence[str]) -> float:
    return sum(parse_object(a) == parse_object(b) for a, b in zip(answers, references, strict=True)) / len(answers)


def _with_spaces(answers: Sequence[str], references: Sequence[str]) -> float:
    return sum(a == b for a, b in zip(answers, references, strict=True)) / len(answers)


def _of_the_valid(answers: Sequence[str], references: Sequence[str]) -> float:
    return exact_match(answers, references) / valid_json(answers)


SCORE = Exercise(
    id="07.3",
    title="What counts as right",
    asks="json_score(answers, references) returns {'json': …, 'keys': …, 'exact': …}, shares from 0 to 1",
    points=2,
    minutes=12,
    difficulty=1,
    importance=2,
    reference=json_score,
    generate=score_inputs,
    tolerance=1e-9,
    properties=(Property(name="no answer is run", test=no_answer_is_run),),
    hints=(
        "Three questions to each answer. Count, and divide each count by the number of answers.",
        "json: json.loads accepts it, whole, and gives a dict. A list or a number is JSON too, but no object.",
        "keys: the set of its keys is {'name', 'city', 'quantity', 'date'}. exact: the two are equal after strip().",
    ),
    bugs=(
        Bug(
            name="words around are forgiven",
            function=_scored(parse=_braces),
            why="You looked for braces inside the answer: a program that calls json.loads on it will not.",
        ),
        Bug(
            name="single quotes are forgiven",
            function=_scored(parse=_literal),
            why="You read it as Python: {'a': 1} is no JSON, and null, true and false are no Python.",
        ),
        Bug(
            name="anything that parses",
            function=lambda answers, references: {
                **json_score(answers, references),
                "json": sum(_or_none(json.loads)(answer) is not None for answer in answers) / len(answers),
            },
            why="You counted whatever parses: a list is JSON, but it is not the object that was asked for.",
        ),
        Bug(
            name="missing keys are forgiven",
            function=_scored(fits=lambda facts: set(facts) <= set(KEYS)),
            why="You accepted objects that lack a key: ask for the same set, not for a subset.",
        ),
        Bug(
            name="extra keys are forgiven",
            function=_scored(fits=lambda facts: set(facts) >= set(KEYS)),
            why="You accepted objects with more keys: the model invented one, and that is to be seen.",
        ),
        Bug(
            name="the same facts are exact",
            function=_scored(exact=_as_facts),
            why="You compared what was parsed: spaces and the order of keys are lost then. Exact is to the letter.",
        ),
        Bug(
            name="spaces around count",
            function=_scored(exact=_with_spaces),
            why="You compared without strip(): a newline at the end of an answer is no mistake.",
        ),
        Bug(
            name="exact among the valid",
            function=_scored(exact=_of_the_valid),
            why="You divided by the number of valid answers: a model that answers one in a hundred would score 100 %.",
        ),
        Bug(
            name="in per cent",
            function=lambda answers, references: {k: 100 * v for k, v in json_score(answers, references).items()},
            why="You returned per cent; a share goes from 0 to 1.",
        ),
    ),
)

EXERCISES = [LABELS, LOSS, SCORE]

# --------------------------------------------------------------------------------- section 8: a dictionary of 12 words

N_ENTRIES, LONGEST, TOY_STEPS = 12, 5, 120
START, ASK = 1, 3  # the tokens around a prompt's word; words are 4 … 15, letters 16 … 23
MOST = 12  # tokens that an answer may have before it is cut off


@dataclass(frozen=True)
class Course:
    """How a training went: its losses, and what the model answers after it."""

    losses: list[float]
    exact: float  # share of the words that it spells right
    mean_tokens: float  # of an answer, at most MOST


def dictionary() -> tuple[list[list[int]], list[list[int]]]:
    """Twelve words and how each is spelled, in 1 to 5 letters: prompts and answers."""
    rng = np.random.default_rng(0)
    spelled = [[int(token) for token in rng.integers(16, 24, size=1 + entry % LONGEST)] for entry in range(N_ENTRIES)]
    return [[START, 4 + entry, ASK] for entry in range(N_ENTRIES)], spelled


@functools.cache
def toy_course(bug: str | None) -> Course:
    """Teach the dictionary to a decoder of two layers, with right labels or with those of a bug of exercise 07.1."""
    config = ModelConfig(
        vocab_size=24,
        hidden_size=48,
        intermediate_size=96,
        n_layers=2,
        n_heads=4,
        n_kv_heads=4,
        head_dim=12,
        max_seq_len=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Decoder(config)
    prompts, spelled = dictionary()
    tokens, labels = (LABELS.bug(bug) if bug else build_labels)(prompts, spelled, EOS, EOS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    training = train(model, [Batch(tokens, labels)] * TOY_STEPS, optimizer)
    answers = generate(model, prompts, max_new_tokens=MOST, stop_tokens=[EOS])
    exact = sum(a == b for a, b in zip(answers, spelled, strict=True)) / len(spelled)
    return Course([step.loss for step in training.steps], exact, sum(map(len, answers)) / len(answers))


# ------------------------------------------------------------------------------------------ section 10: on a budget

MOST_STEPS, MOST_TRAINED, TARGET, BATCH_SIZE = 36, 2_500_000, 0.95, 8


def run_recipe(*, targets: str | list[str], r: int, alpha: float, lr: float, shape: str, steps: int) -> float:
    """Train SmolLM2 by a recipe, print its budget and what it reached; give the share that is right to the letter.

    Raises:
        ValueError: if it takes more steps, or trains more numbers, than the budget has.
    """
    if not 2 <= steps <= MOST_STEPS:
        raise ValueError(f"{steps} steps: the budget is {MOST_STEPS}, and two are the least")
    model, tokenizer = load_model("smollm2-135m", dtype=torch.bfloat16)
    start = torch.Generator().manual_seed(0)
    trained = inject(model, targets, lambda base: LoRALinear(base, r=r, alpha=alpha, generator=start)).count.trainable
    if trained > MOST_TRAINED:
        raise ValueError(f"{trained:,} numbers would train: the budget is {MOST_TRAINED:,}; choose a smaller r")
    assert tokenizer.pad is not None
    data = make_extraction(1, steps * BATCH_SIZE, 100)  # other sentences than the lesson's
    samples = [encode(tokenizer, example) for example in data.train]
    fine_tune(model, samples, Recipe(lr=lr, batch_size=BATCH_SIZE, shape=shape), pad=tokenizer.pad)
    references = [example.answer for example in data.test]
    longest = max(len(tokenizer.encode(answer)) for answer in references) + 8
    prompts = [tokenizer.encode_chat(example.messages) for example in data.test]
    exact = exact_match(generate_answers(model, tokenizer, prompts, longest), references)
    print(f"{trained:,} trained, {steps} steps: {exact:.0%} right to the letter; the target is {TARGET:.0%}")
    return exact
