"""The claims of the articles that learners come from, each with the code that settles it.

`lessons/NN_…/claims.py` holds a list CLAIMS: `show_claims("03")` prints those of lesson 03 in its notebook, each with
what its code finds and the verdict that follows, and fails if that is no longer the verdict which is written down. The
files of `lessons/claims/` hold those that no notebook shows: its lesson is not written yet, or the code needs libraries
that the course does not. A list UNSETTLED holds what no computation settles, with what would. `classroom/ledger` makes
CLAIMS.md of all of them.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from minilora.classroom.evidence import VERDICTS, judge, print_claim
from minilora.classroom.lessons import claim_files, lesson_module, load

REVOLUTION = "LoRA and the Efficiency Revolution"
FAMILY = "an article on parameter-efficient fine-tuning with LoRA, QLoRA and adapters"  # the copy at hand has no title
EXPLAINER = "LoRA — Low-Rank Adaptation"
STICKY_NOTE = "LoRA: Low-rank adapters — fine-tune 0.1% of the parameters"
MATHEMATICS = "LoRA Mathematics and Implementation"
ARTICLES = (REVOLUTION, FAMILY, EXPLAINER, STICKY_NOTE, MATHEMATICS)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What the code of a claim found: whether the fact is so, or in which of the named cases; and it in one line."""

    cases: bool | Mapping[str, bool]
    found: str


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A fact as an article states it, what settles it, and the verdict: holds, holds when, does not hold.

    Raises:
        ValueError: if `verdict` is not one of the three.
    """

    id: str  # "01.adam-moments"
    fact: str
    source: str  # the article's title, and where in it: f"{REVOLUTION}, “Rank Selection”"
    settle: Callable[[], Finding]
    verdict: str

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"no verdict is called {self.verdict!r}: choose one of {list(VERDICTS)}")


@dataclass(frozen=True, kw_only=True)
class Unsettled:
    """A fact that no computation here settles, and what would."""

    id: str
    fact: str
    source: str
    needs: str


@dataclass(frozen=True, kw_only=True)
class Settled:
    """A claim, what its code found, and in which cases it holds, in words: empty unless it "holds when"."""

    claim: Claim
    found: str
    when: str


@cache
def settled(claim: Claim) -> Settled:
    """Run a claim's code.

    Raises:
        AssertionError: if the verdict is no longer what the code finds (names the claim).
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # importing PEFT makes it remark on the processor
    finding = claim.settle()
    verdict, when = judge(finding.cases)
    if verdict != claim.verdict:
        raise AssertionError(
            f"claim {claim.id}, “{claim.fact}”: the verdict was {claim.verdict!r}; the code now says {verdict!r}: "
            f"{finding.cases}; {finding.found}"
        )
    return Settled(claim=claim, found=finding.found, when=when)


def all_claims() -> list[Claim]:
    """Every claim that is settled, by lesson."""
    return [one for path in claim_files() for one in getattr(load(path), "CLAIMS", [])]


def all_unsettled() -> list[Unsettled]:
    """Every claim that is not, by lesson."""
    return [one for path in claim_files() for one in getattr(load(path), "UNSETTLED", [])]


def show_claims(prefix: str) -> None:
    """Settle a lesson's claims whose id begins so, and print them: "03" for all of them, "09.peft" for some.

    Raises:
        KeyError: if there are none.
        AssertionError: if a verdict is no longer what the code finds.
    """
    shown = [one for one in lesson_module(prefix[:2], "claims").CLAIMS if one.id.startswith(prefix)]
    if not shown:
        raise KeyError(f"no claim of this lesson has an id that begins with {prefix!r}")
    for one in map(settled, shown):
        print_claim(one.claim.fact, one.claim.source, one.found, one.claim.verdict, one.when)
