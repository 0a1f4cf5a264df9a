"""Sentences that are run: a claim with its verdict, and a bug that still bites.

A lesson that quotes a fact or shows a failure keeps the code that proves it. When the code stops proving it,
the notebook fails: neither a verdict nor a bug can go stale unseen.
"""

import contextlib
import re
import textwrap
from collections.abc import Iterator, Mapping

VERDICTS = ("holds", "holds when", "does not hold")


def judge(cases: bool | Mapping[str, bool]) -> tuple[str, str]:
    """The verdict that follows from the cases; and, where it holds in some of them, in which.

    >>> judge({"r = 8": True, "r = 64": False})
    ('holds when', 'r = 8; not when r = 64')
    """
    named = dict(cases) if isinstance(cases, Mapping) else {"": bool(cases)}
    true = [name for name, is_true in named.items() if is_true]
    false = [name for name, is_true in named.items() if not is_true]
    if true and false:
        return "holds when", f"{_or_when(true)}; not when {_or_when(false)}"
    return ("holds" if true else "does not hold"), ""


def _or_when(names: list[str]) -> str:
    return ", or when ".join(names)


def print_claim(fact: str, source: str, found: str, verdict: str, when: str = "") -> None:
    """Print a claim in a notebook, its lines broken under their own beginning."""
    told = f"{verdict.upper()} {when}".rstrip()
    for name, text in (("Claim", fact), ("", f"({source})"), ("Found", found), ("Verdict", told)):
        begin, below = f"{name:<9}", " " * 9
        print(textwrap.fill(text, width=100, initial_indent=begin, subsequent_indent=below, break_on_hyphens=False))
    print()


@contextlib.contextmanager
def expect_bug(error: type[Exception], match: str = "") -> Iterator[None]:
    """Run code that must fail, and print how; fail if it does not.

    Raises:
        AssertionError: if nothing is raised, or the message does not match: the bug no longer bites.

    >>> with expect_bug(ZeroDivisionError, match="division"):
    ...     1 / 0
    ZeroDivisionError, as announced: division by zero
    """
    try:
        yield
    except error as caught:
        if not re.search(match, str(caught)):
            raise AssertionError(f"expected a {error.__name__} that matches {match!r}, got: {caught}") from caught
        first_line = (str(caught).strip().splitlines() or [""])[0]
        print(f"{type(caught).__name__}, as announced: {first_line}")
    else:
        raise AssertionError(f"expected a {error.__name__} that matches {match!r}, but nothing was raised")
