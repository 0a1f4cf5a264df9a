"""`minilora check`: look at training data before it costs an hour.

    cannot be learnt       lines of another form, with an empty answer, without a label
    too long               for the model, or for --max-tokens
    written-out controls   "<|im_end|>" in an answer is learnt as the letters it is written with
    twice                  the same tokens in several lines; or the same question with another answer (a note)
    not asked              an empty question
    leaked                 a question of the training data that is asked in the test data too, in any turn

The view of a line shows each token, and which of them carry loss.

Read before: train/jsonl.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

from minilora.llm.load import model_folder
from minilora.llm.tokenizer import Tokenizer, load_tokenizer
from minilora.train.adapted import longest_text
from minilora.train.data import IGNORED, Sample
from minilora.train.jsonl import Problem, lines_of, messages_of, parsed, read_lines

LONG_QUESTION = 20  # characters
MOST_TOLD = 10  # lines of one kind
PROBLEMS_FOUND = 1  # exit code
MASKED, LEARNT, PLAIN = "\x1b[2m", "\x1b[30;42m", "\x1b[0m"


class Asked(NamedTuple):
    """A question, and the line that it stands in."""

    question: str
    line: int


@dataclass(frozen=True)
class DataReport:
    """What was found in a file. str() is what `minilora check` prints."""

    samples: Sequence[Sample]
    problems: Sequence[Problem]  # of lines, by their number
    notes: Sequence[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.samples):,} samples"]
        if self.samples:
            lengths = [len(sample.tokens) for sample in self.samples]
            learnt = sum(label != IGNORED for sample in self.samples for label in sample.labels)
            p95 = quantiles(lengths, n=20, method="inclusive")[-1] if len(lengths) > 1 else lengths[0]
            longest = max(self.samples, key=lambda sample: len(sample.tokens))
            lines.append(
                f"tokens    {sum(lengths):,}: {min(lengths):,} to {max(lengths):,} ({longest.name}) a sample, "
                f"median {median(lengths):,.0f}, 95 of 100 below {p95:,.0f}"
            )
            lines.append(f"learnt    {learnt:,} of them, {learnt / sum(lengths):.0%}: the answers and their ends")
        lines += [f"note      {note}" for note in self.notes]
        told = sorted(self.problems, key=lambda problem: problem.line)
        by_text = defaultdict(list)
        for problem in told:
            by_text[problem.text].append(f"{problem.line} ({problem.other})" if problem.other else str(problem.line))
        lines += [f"problem   {_lines(numbers)}: {text}" for text, numbers in by_text.items()]
        found = "no problem" if not told else f"{len(told):,} problem{'s' * (len(told) > 1)}"
        return "\n".join([*lines, f"{found} found"])


def check_data(
    path: Path, tokenizer: Tokenizer, template: str, max_tokens: int, against: Path | None = None
) -> DataReport:
    """Look at every line of a file, and at those of the test data that it should not contain.

    Raises:
        ValueError: if the tokenizer cannot encode any line.
    """
    samples, problems = read_lines(path, tokenizer, template)
    found = [*problems, *_too_long(samples, max_tokens), *_written_out(samples, tokenizer), *_twice(samples)]
    notes = []
    if tokenizer.pad == tokenizer.eos:
        notes.append("padding is the token that ends an answer; the mask goes by length, so that the end is learnt")
    found += _unasked(path, samples)
    notes += _answered_otherwise(path, samples)
    if not samples and not problems:
        found.append(Problem(1, "the file holds no sample"))
    if against is not None:
        test, problems_there = read_lines(against, tokenizer, template)
        if problems_there:
            notes.append(f"{len(problems_there):,} lines of {against} cannot be read")
        found += _leaked(_questions(path, samples), _questions(against, test), against)
    return DataReport(samples, found, notes)


def view(sample: Sample, tokenizer: Tokenizer, *, color: bool) -> str:
    """A sample token by token: what is masked is dim and what is learnt stands out, or between ⟦ ⟧ without colour.

    Control characters are written as escapes: text from a file does not reach the terminal as commands.
    """
    pieces, was_learnt = list[str](), False
    for place, (token, label) in enumerate(zip(sample.tokens, sample.labels, strict=True)):
        learnt = label != IGNORED and place > 0
        text = visible(tokenizer.decode([token], skip_special=False))
        if color:
            pieces.append(f"{LEARNT if learnt else MASKED}{text}{PLAIN}")
        else:
            pieces.append(("⟦" if learnt > was_learnt else "⟧" if learnt < was_learnt else "|") + text)
        was_learnt = learnt
    return "".join(pieces).lstrip("|") + ("⟧" if was_learnt and not color else "")


def visible(text: str) -> str:
    """Text with its line ends shown, and all else that is no character as an escape."""
    shown = (c if c.isprintable() else "⏎\n" if c == "\n" else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown)


def run(args: argparse.Namespace, *, color: bool) -> int:
    """Print the report on a file, or the view of its lines; exit code 1 where there are problems."""
    folder = model_folder(args.base, weights=False)
    tokenizer = load_tokenizer(folder)
    most = longest_text(folder)
    max_tokens = most if args.max_tokens is None else min(args.max_tokens, most)
    against = None if args.against is None else Path(args.against)
    report = check_data(Path(args.data), tokenizer, args.template, max_tokens, against)
    wanted = {f"line {number}" for number in args.show or ()}
    for sample in report.samples:
        if sample.name in wanted:
            print(f"{sample.name}, {len(sample.tokens):,} tokens\n{view(sample, tokenizer, color=color)}\n")
    missing = sorted(wanted - {sample.name for sample in report.samples})
    if missing:
        print(f"no sample is in {', '.join(missing)}\n")
    print(report)
    return PROBLEMS_FOUND if report.problems else 0


def number_of(sample: Sample) -> int:
    """The line that a sample of a file stands in."""
    return int(sample.name.removeprefix("line "))


def _too_long(samples: Iterable[Sample], max_tokens: int) -> list[Problem]:
    return [
        Problem(number_of(sample), f"it has more than {max_tokens:,} tokens: shorten it, or drop it by --max-tokens")
        for sample in samples
        if len(sample.tokens) > max_tokens
    ]


def _written_out(samples: Iterable[Sample], tokenizer: Tokenizer) -> list[Problem]:
    problems = []
    for sample in samples:
        answer = tokenizer.decode([label for label in sample.labels if label != IGNORED])
        found = [text for text in tokenizer.control_tokens if text in answer]
        problems += [
            Problem(number_of(sample), f"its answer has the letters {text}: learnt as text, not as the control token")
            for text in found
        ]
    return problems


def _twice(samples: Iterable[Sample]) -> list[Problem]:
    first: dict[tuple[int, ...], Sample] = {}
    problems = []
    for sample in samples:
        before = first.setdefault(tuple(sample.tokens), sample)
        if before is not sample:
            text = "the same as an earlier line (its number in brackets), whose weight in training grows"
            problems.append(Problem(number_of(sample), text, number_of(before)))
    return problems


def _unasked(path: Path, samples: Iterable[Sample]) -> list[Problem]:
    empty = [asked for asked in _questions(path, samples) if not asked.question]
    return [Problem(asked.line, "its question is empty: nothing but the answer would be learnt") for asked in empty]


def _answered_otherwise(path: Path, samples: Sequence[Sample]) -> list[str]:
    """Questions that are answered in two ways: no mistake where any answer will do, and one where one is right."""
    asked, by_line = _questions(path, samples), {number_of(sample): sample for sample in samples}
    turns = Counter(line for _, line in asked)
    first: dict[str, Sample] = {}
    lines = []
    for question, line in asked:
        before = first.setdefault(question, by_line[line])
        if question and turns[line] == 1 and before.tokens != by_line[line].tokens:
            lines.append(f"{line} ({number_of(before)})")
    return [f"{_lines(lines)}: asked in an earlier line too (in brackets), with another answer"] if lines else []


def _leaked(trained: Sequence[Asked], tested: Sequence[Asked], against: Path) -> list[Problem]:
    text = f"its question is asked in {against} too (there: number in brackets)"
    there = {asked.question: asked.line for asked in reversed(tested)}
    lines = {asked.line: there[asked.question] for asked in reversed(trained) if asked.question in there}
    return [Problem(line, text, other) for line, other in lines.items()]


def _questions(path: Path, samples: Iterable[Sample]) -> list[Asked]:
    """What is asked in a file: case and spaces aside, whatever the system prompt says.

    Of a conversation all questions count, but short ones ("Why?") only where they are the first.
    """
    readable = {number_of(sample) for sample in samples}
    found = []
    for number, line in enumerate(lines_of(path), start=1):
        if number in readable:
            turns = [m for m in messages_of(parsed(line)) if m["role"] == "user"]
            questions = [" ".join(f"{m['content']} {m.get('input', '')}".casefold().split()) for m in turns]
            counted = questions[:1] + [question for question in questions[1:] if len(question) >= LONG_QUESTION]
            found += [Asked(question, number) for question in counted]
    return found


def _lines(numbers: Sequence[str]) -> str:
    told = ", ".join(numbers[:MOST_TOLD])
    more = f" and {len(numbers) - MOST_TOLD:,} more" if len(numbers) > MOST_TOLD else ""
    return f"line{'s' * (len(numbers) > 1)} {told}{more}"
