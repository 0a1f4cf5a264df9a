"""The demo's report: one HTML file that needs nothing beside itself, and reads on a light and on a dark screen.

Everything that a model wrote is escaped before it enters the page. Figures carry a text that says what they show, for
those who do not see them, and under each stands what is to be found in it.
"""

import base64
import difflib
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from minilora.classroom.plots import BLUE, COLOURS, GREY, MARKERS, ORANGE, new_figure, png, styled
from minilora.train.evaluate import exact_match, explain_miss, parse_object, valid_json
from minilora.train.extraction import Example
from minilora.train.trainer import Step, Training

MAX_MISSES, N_HITS = 20, 3  # rows of the table of samples
SMOOTHING = 9  # steps
KIND_COLOURS = (*COLOURS, GREY)  # a Llama layer has seven kinds of linear layer


@dataclass(frozen=True)
class Perplexities:
    """On plain English that has nothing to do with the task; the same tokens each time."""

    base: float  # the model as published
    nf4: float  # the same with its linear layers rounded to NF4, untrained
    after: float  # with the trained adapter, over what it was trained on
    n_tokens: int


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """All that one run of the demo found. Answers stand in the order of the examples."""

    method: str
    steps: int
    r: int
    alpha: float
    lr: float
    seed: int
    batch_size: int
    examples: list[Example]
    before: list[str]
    after: list[str]
    training: Training
    trainable: int
    total: int
    peak_gib: float  # of the whole process, up to the end of training
    perplexities: Perplexities
    merge_relative_error: float  # in float32
    merge_relative_error_bf16: float
    spectrum: Mapping[str, Sequence[float]]  # singular values of every layer's update
    adapter_path: Path
    base_name: str
    base_license: str
    base_attribution: str

    @property
    def seconds(self) -> float:
        """Of training alone."""
        return sum(step.seconds for step in self.training.steps)

    @property
    def misses(self) -> list[tuple[int, list[str]]]:
        """Numbers of the examples that were missed after training, each with what is wrong."""
        problems = [explain_miss(answer, ex) for answer, ex in zip(self.after, self.examples, strict=True)]
        return [(i, problem) for i, problem in enumerate(problems) if problem]

    def numbers(self) -> dict[str, object]:
        """What `--json` writes. Shares are from 0 to 1, times in seconds, memory in GiB."""
        references = [example.answer for example in self.examples]
        return {
            "method": self.method,
            "steps": self.steps,
            "interrupted": self.training.interrupted,
            "r": self.r,
            "alpha": self.alpha,
            "lr": self.lr,
            "seed": self.seed,
            "n_eval": len(self.examples),
            "unit_of_exact_and_valid": "share of n_eval, from 0 to 1",
            "exact_before": exact_match(self.before, references),
            "exact_after": exact_match(self.after, references),
            "valid_json_before": valid_json(self.before),
            "valid_json_after": valid_json(self.after),
            "misses": dict(Counter(problem for _, problems in self.misses for problem in problems)),
            "trainable": self.trainable,
            "total": self.total,
            "seconds": self.seconds,
            "peak_gib": self.peak_gib,
            "merge_relative_error": self.merge_relative_error,
            "merge_relative_error_bf16": self.merge_relative_error_bf16,
            "perplexity_base": self.perplexities.base,
            "perplexity_nf4": self.perplexities.nf4,
            "perplexity_after": self.perplexities.after,
            "adapter_path": str(self.adapter_path),
        }

    def summary(self) -> str:
        """The same in a few lines, for a terminal."""
        n = self.numbers()
        return (
            f"exact    {n['exact_before']:.1%} → {n['exact_after']:.1%} of {n['n_eval']} unseen sentences; "
            f"valid JSON {n['valid_json_after']:.1%}\n"
            f"trained  {self.trainable:,} of {self.total:,} parameters ({self.trainable / self.total:.2%}) "
            f"in {self.seconds:.0f} s, at most {self.peak_gib:.2f} GiB\n"
            f"merged   differs from the live model by {self.merge_relative_error:.1e} of what the adapter does "
            f"(float32; {self.merge_relative_error_bf16:.3f} in bfloat16)\n"
            f"English  perplexity {self.perplexities.base:.1f}, rounded to NF4 {self.perplexities.nf4:.1f}, "
            f"after training {self.perplexities.after:.1f}"
        )


def report_html(result: DemoResult) -> str:
    """The whole page."""
    sections = [
        headline(result),
        loss_section(result.training.steps),
        sample_section(result),
        spectrum_section(result.spectrum),
        perplexity_section(result),
        merge_section(result),
        adapter_section(result),
    ]
    title = f"minilora demo: {METHOD_TITLE[result.method]}"
    return PAGE.format(title=escape(title), style=STYLE, body="\n".join(sections))


METHOD_TITLE = {
    "qlora": "QLoRA, an adapter over weights in 4 bits",
    "lora": "LoRA, an adapter over frozen weights",
}


def headline(result: DemoResult) -> str:
    """What was done and what came of it, in one look."""
    n = result.numbers()
    stopped = f"<p class='note'>{escape(str(result.training))}.</p>" if result.training.interrupted else ""
    tiles = [
        (f"{n['exact_before']:.1%} → {n['exact_after']:.1%}", f"of {n['n_eval']} unseen answers right to the letter"),
        (f"{n['valid_json_before']:.1%} → {n['valid_json_after']:.1%}", "of them valid JSON"),
        (f"{result.trainable / result.total:.2%}", f"trained: {result.trainable:,} of {result.total:,} parameters"),
        (f"{result.seconds:.0f} s", f"of training: {result.steps} steps of {result.batch_size} sentences"),
        (f"{result.peak_gib:.2f} GiB", "of memory at most, by the whole process, until training ended"),
    ]
    cells = "".join(f"<div class='tile'><b>{value}</b><span>{text}</span></div>" for value, text in tiles)
    return (
        f"<p>{escape(result.base_name)}, a model of {(result.total - result.trainable) / 1e6:.0f} million parameters, "
        "is taught to turn a sentence into JSON. "
        "First names, last names and sentence shapes of the test occur nowhere in training. "
        f"Settings: r = {result.r}, alpha = {result.alpha:g}, learning rate {result.lr:g}, seed {result.seed}.</p>"
        f"{stopped}<div class='tiles'>{cells}</div>"
    )


# ------------------------------------------------------------------------------------------------------ figures


def figure_html(figure: Figure, alt: str, finding: str) -> str:
    """A figure with its text for those who do not see it, and what it shows under it."""
    data = base64.b64encode(png(figure)).decode("ascii")
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{escape(alt, quote=True)}">'
        f"<figcaption>{escape(finding)}</figcaption></figure>"
    )


def loss_section(steps: Sequence[Step]) -> str:
    """How the loss fell."""
    losses = smoothed(steps) or [step.loss for step in steps]
    peak = max(range(len(steps)), key=lambda place: steps[place].lr) + 1
    first, last = steps[0].loss, losses[-1]
    tenth = next((step.number for step, loss in zip(steps, losses, strict=True) if loss < first / 10), None)
    soon = f" Step {tenth} is the first with less than a tenth of the first loss." if tenth else ""
    return "<h2>Training</h2>" + figure_html(
        loss_figure(steps),
        alt=f"Loss over {len(steps)} steps on a logarithmic scale, falling from {first:.2f} to {last:.3f} nats per "
        f"token; below it the learning rate, largest at step {peak} and {steps[-1].lr:.1e} at the end.",
        finding=f"From {first:.2f} to {last:.3f} nats per token of the answer (a loss of x nats: the right token got a "
        f"probability of e to the −x, on a geometric average).{soon}",
    )


def smoothed(steps: Sequence[Step]) -> list[float]:
    """The running median of the losses; none where the steps are too few for one to mean anything."""
    return running_median([step.loss for step in steps], SMOOTHING) if len(steps) >= 2 * SMOOTHING else []


@styled
def loss_figure(steps: Sequence[Step]) -> Figure:
    """Loss of every step and its running median, over the learning rate."""
    figure = new_figure(9.0, 4.2)
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    numbers, losses = [step.number for step in steps], [step.loss for step in steps]
    loss.plot(numbers, losses, "o", color=BLUE, markersize=3, alpha=0.55, label="one step")
    if medians := smoothed(steps):
        loss.plot(numbers, medians, color=ORANGE, linewidth=2, label=f"median of {SMOOTHING}")
    loss.set_yscale("log")
    loss.set_ylabel("loss, nats per token")
    loss.grid(True)
    loss.legend(loc="upper right")
    rate.xaxis.set_major_locator(MaxNLocator(integer=True))
    rate.plot(numbers, [step.lr for step in steps], color=GREY, linewidth=2)
    rate.set_ylim(bottom=0)
    rate.set_ylabel("rate")
    rate.set_xlabel("step")
    return figure


def running_median(values: Sequence[float], width: int) -> list[float]:
    """Median of each value and its neighbours; at the ends, of those there are.

    >>> running_median([1.0, 9.0, 2.0, 3.0], width=3)
    [5.0, 2.0, 3.0, 2.5]
    """
    half = width // 2
    return [statistics.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def spectrum_section(spectrum: Mapping[str, Sequence[float]]) -> str:
    """What was learnt, as singular values."""
    by_kind = group_by_kind(spectrum)
    used = {kind: statistics.mean(directions_used(values) for values in layers) for kind, layers in by_kind.items()}
    r = max(len(values) for layers in by_kind.values() for values in layers)
    most, least = max(used, key=used.__getitem__), min(used, key=used.__getitem__)
    largest = {kind: max(values[0] for values in layers) for kind, layers in by_kind.items()}
    strongest = max(largest, key=largest.__getitem__)
    finding = (
        f"The largest single change is in {strongest} ({largest[strongest]:.2g}). Of {r} directions, {used[least]:.1f} "
        f"hold 99 % of the update's square in {least}, and {used[most]:.1f} in {most}, averaged over the layers."
    )
    return "<h2>What was learnt: the update ΔW = scaling · B A, layer by layer</h2>" + figure_html(
        spectrum_figure(by_kind),
        alt=f"Singular values of the update for {len(by_kind)} kinds of linear layer, a panel each, over the number "
        "of the layer, on a logarithmic scale; a last panel counts how many directions hold 99 % of it. " + finding,
        finding=finding,
    )


def group_by_kind(spectrum: Mapping[str, Sequence[float]]) -> dict[str, list[Sequence[float]]]:
    """Singular values by the last part of the layers' names, in the order of the layers."""
    by_kind: dict[str, list[Sequence[float]]] = {}
    for name, values in spectrum.items():
        by_kind.setdefault(name.rpartition(".")[2], []).append(values)
    return by_kind


def directions_used(values: Sequence[float], energy: float = 0.99) -> int:
    """How many of the largest singular values hold a share `energy` of the sum of squares.

    >>> directions_used([3.0, 1.0, 0.1])
    2
    """
    squares = np.square(values)
    return int(np.searchsorted(np.cumsum(squares), energy * squares.sum()) + 1)


@styled
def spectrum_figure(by_kind: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """A panel for each kind of layer: every singular value a dot, the largest joined; and how many directions count."""
    figure = new_figure(9.5, 5.2)
    columns = 4
    panels = figure.subplots(-(-(len(by_kind) + 1) // columns), columns, squeeze=False).flat
    largest = max(values[0] for layers in by_kind.values() for values in layers)
    for i, (kind, layers) in enumerate(by_kind.items()):
        axes, colour, marker = panels[i], KIND_COLOURS[i % len(KIND_COLOURS)], MARKERS[i % len(MARKERS)]
        for layer, values in enumerate(layers):
            axes.plot([layer] * len(values), values, ".", color=colour, markersize=2.5, alpha=0.6)
        axes.plot([values[0] for values in layers], color=colour, marker=marker, markersize=3, linewidth=1)
        axes.set_yscale("log")
        axes.set_ylim(largest * 2e-3, largest * 1.5)
        axes.set_title(kind)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.grid(True)
        if i % columns == 0:
            axes.set_ylabel("singular values")
        axes.set_xlabel("layer")
    counts = panels[len(by_kind)]
    used = [statistics.mean(directions_used(values) for values in layers) for layers in by_kind.values()]
    colours = [KIND_COLOURS[i % len(KIND_COLOURS)] for i in range(len(by_kind))]
    counts.barh(range(len(by_kind)), used, color=colours)
    counts.set_yticks(range(len(by_kind)), list(by_kind))
    counts.invert_yaxis()
    counts.set_title("directions for 99 %")
    counts.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for axes in list(panels)[len(by_kind) + 1 :]:
        axes.set_axis_off()
    return figure


# ------------------------------------------------------------------------------------------------------ samples


def sample_section(result: DemoResult) -> str:
    """Answers before and after, side by side: a few that are right, and those that are not with the reason."""
    misses = result.misses
    missed = {i for i, _ in misses}
    hits = [i for i in range(len(result.examples)) if i not in missed][:N_HITS]
    rows = [sample_row(result, i, []) for i in hits]
    rows += [sample_row(result, i, problems) for i, problems in misses[:MAX_MISSES]]
    more = f" {len(misses) - MAX_MISSES} more are not shown." if len(misses) > MAX_MISSES else ""
    return (
        f"<h2>Answers</h2><p>{explain_misses(misses, len(result.examples))}{more}</p>"
        "<table class='samples'><thead><tr><th>sentence</th><th>before</th><th>after</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def explain_misses(misses: Sequence[tuple[int, Sequence[str]]], n: int) -> str:
    """One paragraph: how many were missed, in which ways, and what that means."""
    if not misses:
        return f"All {n} answers are right; here are the first."
    kinds = Counter(problem for _, problems in misses for problem in problems)
    listed = ", ".join(f"{escape(kind)} {count}×" for kind, count in kinds.most_common())
    copied = sum(1 for _, problems in misses if all(problem.startswith("miscopied") for problem in problems))
    why = (
        f"In {copied} of them nothing is wrong but a copy. After a quotation mark the tokenizer often cuts a name into "
        "other pieces than after a space (“ Ti”, “ago” but “T”, “iago”), so it cannot be copied token by token: it has "
        "to be spelt, and the model slips into a spelling that it knows better. "
    )
    return (
        f"{len(misses)} of {n} answers are missed: {listed}. {why if copied else ''}"
        "What differs is <mark>marked</mark>; a piece that is missing is shown <del>so</del>."
    )


def sample_row(result: DemoResult, i: int, problems: Sequence[str]) -> str:
    """One sentence with both answers, and what is wrong with the second."""
    example = result.examples[i]
    verdict = "<span class='hit'>✓ exact</span>"
    if problems:
        verdict = f"<span class='miss'>✗ {escape(', '.join(problems))}</span>"
    is_near = parse_object(result.after[i]) is not None  # else nearly everything is a difference
    after = marked_difference(result.after[i], example.answer) if is_near else escape(result.after[i])
    return (
        f"<tr><td>{escape(example.sentence)}</td><td><code>{escape(result.before[i])}</code></td>"
        f"<td><code>{after}</code>{verdict}</td></tr>"
    )


def marked_difference(answer: str, reference: str) -> str:
    """The answer as HTML: what is not in the reference marked, what is missing from it struck through.

    >>> marked_difference("Tob <1>", "Tobias <1>")
    'Tob<del>ias</del> &lt;1&gt;'
    """
    pieces = []
    for kind, i1, i2, j1, j2 in difflib.SequenceMatcher(None, answer, reference, autojunk=False).get_opcodes():
        if kind == "equal":
            pieces.append(escape(answer[i1:i2]))
            continue
        pieces.append(f"<mark>{escape(answer[i1:i2])}</mark>" if i2 > i1 else "")
        pieces.append(f"<del>{escape(reference[j1:j2])}</del>" if j2 > j1 else "")
    return "".join(pieces)


# ------------------------------------------------------------------------------------------------------ prices


def perplexity_section(result: DemoResult) -> str:
    """What quantization and training cost on text that has nothing to do with the task."""
    p = result.perplexities
    over = "NF4 weights" if result.method == "qlora" else "the published weights"
    rows = [
        ("the base as published", p.base),
        ("its linear layers rounded to NF4, untrained", p.nf4),
        (f"after training: the adapter over {over}", p.after),
    ]
    body = "".join(f"<tr><td>{escape(name)}</td><td class='number'>{value:.2f}</td></tr>" for name, value in rows)
    return (
        "<h2>The price on plain English</h2>"
        f"<table><thead><tr><th>model</th><th>perplexity</th></tr></thead><tbody>{body}</tbody></table>"
        f"<p>Perplexity on {p.n_tokens:,} tokens of Python's own manual: among how many tokens the model hesitates. "
        "The base is published in Q4_1, which is 4 bits already: in each block of 32, its weights take 16 values. NF4 "
        "has other values and other blocks, so it rounds <em>a second time</em>, and costs more here than on a model "
        "that is published in 16 bits. The last row is what one task, trained with nothing to hold the rest in place, "
        "costs elsewhere.</p>"
    )


def merge_section(result: DemoResult) -> str:
    """Whether the adapter can become part of the weights."""
    base = "the dequantized base" if result.method == "qlora" else "the base"
    return (
        "<h2>Merging</h2>"
        f"<p>The update is added to {base} and the model answers unseen prompts with plain linear layers. "
        "The difference to the live adapter, in units of what the adapter does at all:</p>"
        "<p class='formula'>‖logits merged − logits live‖ / ‖logits live − logits base‖</p>"
        "<table><thead><tr><th>weights in</th><th>relative error</th></tr></thead><tbody>"
        f"<tr><td>float32</td><td class='number'>{result.merge_relative_error:.1e}</td></tr>"
        f"<tr><td>bfloat16</td><td class='number'>{result.merge_relative_error_bf16:.3f}</td></tr></tbody></table>"
        "<p>In float32 merging is exact but for rounding. In bfloat16 a weight has 8 significant bits: the part of the "
        "update that is smaller than half of the last one is lost.</p>"
    )


def adapter_section(result: DemoResult) -> str:
    """Where the adapter is and how to use it elsewhere."""
    code = (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({result.base_name!r})\n"
        f"model = PeftModel.from_pretrained(base, {str(result.adapter_path)!r})"
    )
    return (
        f"<h2>The adapter</h2><p>It lies in <code>{escape(str(result.adapter_path))}</code> in PEFT's layout:</p>"
        f"<pre>{escape(code)}</pre>"
        "<p>The hub's weights of this name are not rounded to 4 bits. The adapter was trained over the Q4_1 ones: "
        "over the hub's it works too, but not to the same letter.</p>"
        f"<p class='note'>Base model: {escape(result.base_attribution)}; licence {escape(result.base_license)}.</p>"
    )


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
</body>
</html>
"""

# Okabe and Ito's colours, darker on a light page and lighter on a dark one.
STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --text: #1c1c1c; --soft: #5c5c5c; --line: #d8d8d8; --tile: #f4f4f2;
  --good: #00694d; --bad: #a84300; --mark: #ffd9b8; --del: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --page: #16181b; --text: #e6e6e6; --soft: #a6a6a6; --line: #3a3d42;
  --tile: #212429; --good: #3fcf9f; --bad: #ff9a57; --mark: #6b3a12; --del: #7cc7f2; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
p { max-width: 46rem; }
.note, figcaption { color: var(--soft); font-size: .92rem; }
.formula { font-family: "DejaVu Serif", Georgia, serif; margin-left: 2rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; margin-top: 1.25rem; }
.tile { flex: 1 1 11rem; background: var(--tile); border-radius: .5rem; padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.25rem; white-space: nowrap; }
.tile span { color: var(--soft); font-size: .85rem; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; display: block; }
table { border-collapse: collapse; } th, td { text-align: left; vertical-align: top; padding: .45rem .9rem .45rem 0;
  border-bottom: 1px solid var(--line); } th { color: var(--soft); font-weight: 600; font-size: .85rem; }
.number { font-variant-numeric: tabular-nums; text-align: right; padding-left: 1.5rem; }
.samples { width: 100%; table-layout: fixed; font-size: .88rem; } .samples th:nth-child(1) { width: 30%; }
.samples th:nth-child(2) { width: 32%; }
code, pre { font: .82rem/1.45 ui-monospace, "DejaVu Sans Mono", monospace; }
code, pre { overflow-wrap: anywhere; white-space: pre-wrap; }
pre { background: var(--tile); padding: .8rem 1rem; border-radius: .5rem; }
mark { background: var(--mark); color: inherit; border-radius: .15rem; }
del { color: var(--del); }
.hit, .miss { display: block; margin-top: .2rem; font-size: .82rem; }
.hit { color: var(--good); } .miss { color: var(--bad); }
"""
