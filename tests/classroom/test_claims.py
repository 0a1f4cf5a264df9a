"""Every claim of the ledger is settled again, and CLAIMS.md is what they give."""

import inspect
import re

import pytest

from minilora.classroom import ledger as module
from minilora.classroom.claims import ARTICLES, Claim, Finding, all_claims, all_unsettled, settled, show_claims
from minilora.classroom.ledger import ledger, out_of_step
from minilora.classroom.lessons import claim_files, lessons_folder, load

CLAIMS = all_claims()
BOTH = [*CLAIMS, *all_unsettled()]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)
def test_the_verdict_of_a_claim_follows_from_its_code(claim: Claim):
    assert settled(claim).found


@pytest.mark.parametrize("one", BOTH, ids=lambda one: one.id)
def test_a_claim_names_an_article_by_its_title_and_ends_as_a_sentence(one):
    title = next((title for title in ARTICLES if one.source.startswith(title)), None)

    assert title, f"{one.source!r} begins with no title of {ARTICLES}"
    assert re.match(r"$|, |; | \(", one.source.removeprefix(title))
    assert one.fact.endswith((".", "?"))


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)
def test_the_figures_of_a_fact_are_in_the_code_that_settles_it_or_in_what_it_found(claim: Claim):
    one = settled(claim)
    told = without_commas(inspect.getsource(claim.settle) + one.found + one.when)
    figures = re.findall(r"\d+(?:\.\d+)?", without_commas(claim.fact))
    missed = [figure for figure in figures if not re.search(rf"(?<![\d.]){re.escape(figure)}(?!\.?\d)", told)]

    assert not missed, f"{claim.id} speaks of {missed}, which neither its code nor its finding mentions"


def without_commas(text: str) -> str:
    """1,064,960 and 1_064_960 as 1064960."""
    return re.sub(r"(?<=\d)[,_](?=\d)", "", text)


def test_ids_are_unique_and_begin_with_the_number_of_their_lesson():
    ids = [one.id for one in BOTH]
    assert not [each for each in set(ids) if ids.count(each) > 1]
    for path in claim_files():
        number = (path.name if path.parent.name == "claims" else path.parent.name)[:2]
        module = load(path)
        assert all(
            re.fullmatch(rf"{number}\.[A-Za-z0-9-]+", one.id)
            for one in [*getattr(module, "CLAIMS", []), *getattr(module, "UNSETTLED", [])]
        )


def test_every_article_is_read():
    assert all(any(claim.source.startswith(title) for claim in CLAIMS) for title in ARTICLES)


def test_the_ledger_is_what_the_claims_give():
    problem = out_of_step(lessons_folder().parent / "CLAIMS.md", ledger())
    assert not problem, problem


def made(verdict: str, cases: bool | dict[str, bool]) -> Claim:
    return Claim(
        id="99.made-up",
        fact="2 + 2 = 5.",
        source=ARTICLES[0],
        settle=lambda: Finding(cases=cases, found="2 + 2 = 4"),
        verdict=verdict,
    )


def test_a_verdict_that_does_not_follow_is_reported_with_the_claim_and_what_was_found():
    with pytest.raises(AssertionError, match=r"99\.made-up, “2 \+ 2 = 5\.”.*'holds'.*'does not hold'.*2 \+ 2 = 4"):
        settled(made("holds", False))


def test_a_claim_that_holds_in_some_cases_names_them():
    assert settled(made("holds when", {"modulo 1": True, "in the integers": False})).when == (
        "modulo 1; not when in the integers"
    )


def test_a_ledger_out_of_step_is_reported_with_the_line(tmp_path):
    path = tmp_path / "CLAIMS.md"
    path.write_text("a\nb\nc\n", encoding="utf-8")

    assert out_of_step(path, "a\nb\nc\n") == ""
    assert "Line 2 is\n  b\nand should be\n  B" in out_of_step(path, "a\nB\nc\n")
    assert "Line 4 is" in out_of_step(path, "a\nb\nc\nd\n")
    assert "Line 1 is" in out_of_step(tmp_path / "missing.md", "a\n")


def test_the_command_writes_the_ledger_and_checks_it(tmp_path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(module, "lessons_folder", lambda: tmp_path / "lessons")
    monkeypatch.setattr(module, "ledger", lambda: "a\nb\n")
    monkeypatch.setattr(module, "all_claims", list)
    page = tmp_path / "CLAIMS.md"

    assert module.main(["--check"]) == 1 and not page.exists()
    assert module.main([]) == 0 and page.read_text(encoding="utf-8") == "a\nb\n"
    assert module.main(["--check"]) == 0
    page.write_text("a\nc\n", encoding="utf-8")
    capsys.readouterr()
    assert module.main(["--check"]) == 1 and "Line 2 is\n  c\n" in capsys.readouterr().out


def test_claims_are_shown_by_the_beginning_of_their_ids(capsys: pytest.CaptureFixture[str]):
    show_claims("03.rank-64")

    assert "Verdict  DOES NOT HOLD" in (said := capsys.readouterr().out) and said.count("Claim") == 1
    with pytest.raises(KeyError, match=r"no claim of this lesson has an id that begins with '03\.nothing'"):
        show_claims("03.nothing")
