"""The claims of the articles that learners come from, each with the code that settles it.

`lessons/NN_…/claims.py` holds a list CLAIMS; `show_claims("03")` prints those of lesson 03 in its notebook, each with
what its code finds and the verdict that follows, and fails if that is no longer the verdict which is written down.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from minilora.classroom.evidence import claim
from minilora.classroom.lessons import lesson_module


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What the code of a claim found: whether the fact is so, or in which of the named cases; and it in one line."""

    cases: bool | Mapping[str, bool]
    found: str


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A fact as an article states it, what settles it, and the verdict: holds, holds when, does not hold."""

    id: str  # "01.adam-moments"
    fact: str
    source: str  # the article's title
    settle: Callable[[], Finding]
    verdict: str


def show_claims(lesson: str) -> None:
    """Settle the claims of a lesson and print them.

    Raises:
        KeyError: if the lesson has none.
        AssertionError: if a verdict is no longer what the code finds.
    """
    for one in lesson_module(lesson, "claims").CLAIMS:
        finding = one.settle()
        claim(one.fact, source=one.source, cases=finding.cases, found=finding.found, verdict=one.verdict)
