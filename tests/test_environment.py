"""One set of versions: pyproject.toml's ranges, constraints.txt's pins, environment.yml's, and what is installed."""

import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    canonicalize_name(line.split("==")[0]): line.split("==")[1]
    for line in (ROOT / "constraints.txt").read_text().splitlines()
}
REQUIREMENTS = [
    Requirement(text)
    for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for text in group
]
NEEDED_HERE = [r for r in REQUIREMENTS if r.marker is None or r.marker.evaluate()]


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda r: r.name)
def test_every_requirement_has_a_pin_inside_its_range(requirement):
    assert Version(PINS[canonicalize_name(requirement.name)]) in requirement.specifier


@pytest.mark.parametrize("requirement", NEEDED_HERE, ids=lambda r: r.name)
def test_what_is_installed_is_what_is_pinned(requirement):
    assert Version(version(requirement.name)).public == PINS[canonicalize_name(requirement.name)]


def test_no_pin_names_a_local_build():
    assert [name for name, pin in PINS.items() if Version(pin).local] == []


def test_torch_and_nbval_are_pinned_as_decided():
    assert (PINS["torch"], PINS["nbval"]) == ("2.13.0", "0.11.0")


def test_the_conda_environment_installs_the_same_pins_and_a_python_that_the_project_allows():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, of_pip = environment["dependencies"]
    required = Requirement(f"python{PROJECT['requires-python']}")

    assert Version(python.removeprefix("python=")) in required.specifier
    assert pip == "pip"
    assert of_pip["pip"] == ["--constraint constraints.txt", "--editable .[course,dev,grading]"]
    assert set(PROJECT["optional-dependencies"]) == {"course", "dev", "grading"}
