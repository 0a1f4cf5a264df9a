"""Claims and bugs that are run."""

import pytest

from minilora.classroom.claims import Claim, Finding, settled
from minilora.classroom.evidence import expect_bug, print_claim


def claim(fact: str, *, source: str, cases, found: str, verdict: str) -> None:
    """Settle a claim and print it, as a lesson's section 9 does."""
    one = Claim(id="00.x", fact=fact, source=source, settle=lambda: Finding(cases=cases, found=found), verdict=verdict)
    print_claim(fact, source, settled(one).found, verdict, settled(one).when)


@pytest.mark.parametrize(
    ("cases", "verdict"),
    [(True, "holds"), (False, "does not hold"), ({"r = alpha": True, "r ≠ alpha": False}, "holds when")],
)
def test_a_verdict_follows_from_the_cases(cases, verdict: str, capsys: pytest.CaptureFixture[str]):
    claim("It is so.", source="an article", cases=cases, found="numbers", verdict=verdict)

    assert verdict.upper() in capsys.readouterr().out


def test_a_conditional_claim_names_its_cases(capsys: pytest.CaptureFixture[str]):
    claim("It is so.", source="a", cases={"r = alpha": True, "r ≠ alpha": False}, found="n", verdict="holds when")

    assert "HOLDS WHEN r = alpha; not when r ≠ alpha" in capsys.readouterr().out


def test_a_long_line_is_broken_under_its_beginning(capsys: pytest.CaptureFixture[str]):
    claim("It is so.", source="an article", cases=True, found="number " * 20, verdict="holds")

    lines = capsys.readouterr().out.splitlines()
    assert lines[3].startswith(" " * 9 + "number") and lines[4] == "Verdict  HOLDS"
    assert max(map(len, lines)) <= 100


def test_a_verdict_that_no_longer_follows_fails():
    with pytest.raises(AssertionError, match="was 'holds'; the code now says 'does not hold'"):
        claim("It is so.", source="a", cases=False, found="n", verdict="holds")


def test_an_unknown_verdict_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no verdict is called 'true': choose one of \['holds', "):
        claim("It is so.", source="a", cases=True, found="n", verdict="true")


def test_a_bug_that_bites_is_shown_by_its_first_line(capsys: pytest.CaptureFixture[str]):
    with expect_bug(ValueError, match="wrong"):
        raise ValueError("\nit is wrong\nand more")

    assert capsys.readouterr().out == "ValueError, as announced: it is wrong\n"


def test_a_bug_that_stopped_biting_fails():
    with pytest.raises(AssertionError, match="but nothing was raised"), expect_bug(ValueError):
        pass


def test_another_message_fails():
    with pytest.raises(AssertionError, match="that matches 'wrong', got: fine"), expect_bug(ValueError, match="wrong"):
        raise ValueError("fine")


def test_another_error_passes_through():
    with pytest.raises(KeyError), expect_bug(ValueError):
        raise KeyError("x")
