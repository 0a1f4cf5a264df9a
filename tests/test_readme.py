"""What the README says is what happens: commands, code, output and links."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (*ROOT.glob("*.md"), *ROOT.glob("lessons/*.md"))}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", blocks("console"), ids=lambda block: block.splitlines()[0])
def test_a_command_prints_what_the_readme_shows(block):
    command, _, shown = block.partition("\n")
    program, *arguments = shlex.split(command.removeprefix("$ "))
    assert program == "minilora"
    run = subprocess.run(
        [sys.executable, "-m", "minilora.cli", *arguments], capture_output=True, text=True, check=True, cwd=ROOT
    )

    assert run.stdout == shown


def test_the_table_of_training_steps_is_made_from_the_results():
    command = [sys.executable, "benchmarks/training_step.py", "--table", "benchmarks/results.json"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)

    assert run.stdout.count("\n") > 2
    assert run.stdout in README


def test_the_table_of_methods_is_made_from_the_results():
    command = [sys.executable, "benchmarks/methods.py", "--table"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)

    assert run.stdout.count("\n") == 2 + 15  # a title, a line, and every method with all its seeds
    assert run.stdout in README


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.splitlines()[0])
def test_the_code_runs_as_it_stands(block, tmp_path):
    run = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=False, cwd=tmp_path)

    assert run.returncode == 0, run.stderr
    assert (tmp_path / "runs/adapter/adapter_model.safetensors").exists()


@pytest.mark.parametrize("page", PAGES)
def test_every_make_target_that_is_named_exists(page):
    named = set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", PAGES[page], re.MULTILINE))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))

    assert named <= targets


def test_every_file_that_is_linked_or_listed_exists():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    listed = re.findall(r"^([\w/]+/)(?= )", README, re.MULTILINE)

    assert links
    assert listed
    assert [path for path in (*links, *listed) if not (ROOT / path).exists()] == []


def test_the_help_of_make_names_what_there_is():
    help_text = subprocess.run(
        ["make", "-s", "help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "MAKEFLAGS": ""},
    ).stdout
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))

    assert set(re.findall(r"^make ([a-z-]+)", help_text, re.MULTILINE)) <= targets
    assert {"lab", "test", "test-all", "demo", "bench", "build", "lint"} <= targets
