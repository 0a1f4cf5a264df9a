"""Bets: the learner says what a number will be before it is measured, and sees both side by side afterwards.

Read by the lessons; what was bet is kept by progress.
"""

import textwrap
from collections.abc import Sequence
from numbers import Real
from typing import Any

from minilora.classroom.progress import record

_bets: dict[str, Any] = {}


def predict(name: str, question: str, *, choices: Sequence[str] = (), bet: str | float | None = None) -> None:
    """Ask for a bet before any number is on the page. Skipping it (`bet=None`) costs nothing.

    Raises:
        ValueError: if the bet is not among the choices, or where there are none, if it is not a number.
    """
    if choices and bet is not None and bet not in choices:
        raise ValueError(f"cannot bet {bet!r} on {name}: the choices are {list(choices)}")
    if not choices and not isinstance(bet, (Real, type(None))):
        raise ValueError(f"cannot bet {bet!r} on {name}: write a number, such as bet=2304, without quotes")
    _bets[name] = bet
    if bet is not None:
        record("bets", name, bet=bet)
    among = "  Choices: " + " · ".join(choices) if choices else "  A number."
    placed = f"Your bet: {bet}" if bet is not None else "No bet yet: write it as bet=… above and run the cell again."
    print(textwrap.fill(f"Bet “{name}”: {question}", width=100, subsequent_indent="  "))
    print(f"{among}\n  {placed}")


def settle(name: str, measured: str | float) -> None:
    """Print the bet beside what was measured.

    Raises:
        KeyError: if nothing was asked under that name (names what was).
    """
    if name not in _bets:
        raise KeyError(f"no bet is called {name!r}; the bets of this lesson are {sorted(_bets)}")
    bet = _bets[name]
    shown = f"{measured:,.6g}" if isinstance(measured, Real) else measured
    if bet is None:
        print(f"Bet “{name}”: measured {shown}; no bet was placed.")
        return
    record("bets", name, bet=bet, measured=measured)
    if isinstance(measured, Real) and isinstance(bet, Real) and bet > 0 and measured > 0:
        factor = max(bet / measured, measured / bet)
        verdict = "right" if factor < 1.1 else "close" if factor < 2 else f"off by a factor of {factor:,.3g}"
    else:
        verdict = "right" if bet == measured else "surprised?"
    print(f"Bet “{name}”: you said {bet}, measured {shown}: {verdict}")
