"""`minilora doctor` on this machine, and on machines that lack something."""

import tomllib
from pathlib import Path

import pytest

from minilora import doctor
from minilora.doctor import CHECKS, NEEDED, OK, OPTIONAL, Check
from minilora.llm import smollm2

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def names(requirements: list[str]) -> set[str]:
    return {
        requirement.replace(";", ">").replace("=", ">").split(">")[0].strip().lower() for requirement in requirements
    }


def test_every_line_has_a_mark_and_fits_the_terminal(capsys):
    doctor.run()
    facts = [line for line in capsys.readouterr().out.splitlines()[2:-2] if not line.startswith(" " * 19)]
    assert len(facts) == len(CHECKS)
    for line in facts:
        assert line[2:5].strip() in (OK, OPTIONAL, NEEDED)
        assert line[5] == line[18] == " "
        assert line[19] != " "
        assert len(line) <= doctor.WIDTH


def test_the_packages_are_those_of_the_project():
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert set(doctor.CORE) == names(project["dependencies"])
    assert set(doctor.COURSE) == names(extras["course"])
    assert {*doctor.PEERS, *doctor.TOOLS} <= names(extras["dev"])


@pytest.mark.parametrize(
    ("checks", "code", "verdict"),
    [
        ([Check("a", OK, "there")], 0, "Ready."),
        ([Check("a", OPTIONAL, "not there", "get it")], 0, "Ready."),
        ([Check("a", OK, "there"), Check("b", NEEDED, "not there", "get it")], 1, "Not ready: see b"),
    ],
    ids=["all there", "optional missing", "needed missing"],
)
def test_only_what_is_needed_fails_the_doctor(monkeypatch, capsys, checks, code, verdict):
    monkeypatch.setattr(doctor, "CHECKS", [lambda check=check: check for check in checks])
    assert doctor.run() == code
    assert verdict in capsys.readouterr().out


def test_what_is_missing_comes_with_what_to_do():
    check = doctor.packages_check("course", ["numpy", "no-such-package"], OPTIONAL, "pip install it")
    assert check == Check("course", OPTIONAL, "without no-such-package", "pip install it")
    assert str(check).splitlines()[1] == f"{'':19}→ pip install it"


def test_a_check_that_breaks_is_a_finding(monkeypatch):
    def torch_check() -> Check:
        raise ImportError("libtorch.so: cannot open shared object file")

    found = doctor.examine_safely(torch_check)
    assert found == Check(
        "torch", NEEDED, "could not be examined: ImportError: libtorch.so: cannot open shared object file"
    )


def test_a_machine_without_torch_has_a_doctor(monkeypatch, capsys):
    version = doctor.package_version
    monkeypatch.setattr(doctor, "package_version", lambda package: None if package == "torch" else version(package))
    assert doctor.run() == 1
    assert "without torch" in capsys.readouterr().out


def test_a_long_remedy_goes_on_below_itself():
    lines = str(Check("base model", NEEDED, "damaged", "delete " + "the folder " * 20)).splitlines()
    assert all(len(line) <= doctor.WIDTH for line in lines)
    assert all(line.startswith(" " * 21) for line in lines[2:])


def test_an_absent_base_model_is_optional_and_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path))
    check = doctor.base_model_check()
    assert check.mark == OPTIONAL
    assert "python -m minilora.llm.smollm2" in check.remedy


def test_a_damaged_base_model_is_a_finding(monkeypatch, tmp_path):
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path))
    smollm2.model_folder().mkdir()
    check = doctor.base_model_check()
    assert (check.mark, check.fact) == (NEEDED, "smollm2-135m is damaged")
    assert "run `python -m minilora.llm.smollm2`" in check.remedy


def test_a_verified_base_model_is_there(monkeypatch, tmp_path):
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path))
    smollm2.model_folder().mkdir()
    for name in smollm2.FILES:
        (smollm2.model_folder() / name).write_text("whole")
    smollm2._seal(smollm2.model_folder())
    assert doctor.base_model_check().mark == OK


def test_a_full_disk_is_a_finding_until_the_model_is_there(monkeypatch, tmp_path):
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor, "MODEL_BYTES", 10**18)
    assert doctor.disk_check().mark == NEEDED
    smollm2.model_folder().mkdir(parents=True)
    assert doctor.disk_check().mark == OK


def test_little_memory_is_told(monkeypatch):
    monkeypatch.setattr(doctor, "memory_bytes", lambda: (8 * 2**30, 2 * 2**30))
    check = doctor.memory_check()
    assert (check.mark, check.fact) == (OPTIONAL, "8.0 GiB, 2.0 free")


def test_free_memory_is_not_more_than_there_is():
    total, free = doctor.memory_bytes()
    assert 0 < free <= total


def test_a_containers_limit_counts_without_what_it_uses(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "CONTAINER", tmp_path)
    for name, text in (
        ("memory.max", "1000\n"),
        ("memory.current", "700\n"),
        ("memory.stat", "anon 1\ninactive_file 50\n"),
    ):
        (tmp_path / name).write_text(text)
    assert doctor.memory_bytes() == (1000, 350)

    (tmp_path / "memory.max").write_text("max\n")
    total, free = doctor.memory_bytes()
    assert 1000 < free <= total


def test_slow_bf16_comes_with_advice(monkeypatch):
    monkeypatch.setattr(doctor, "matmul_tflops", {"float32": 0.2, "bfloat16": 0.01}.get)
    check = doctor.speed_check()
    assert check is not None
    assert (check.mark, check.remedy) == (OPTIONAL, "bf16 is slower here: minilora stores it, and multiplies in fp32")


def test_a_speed_is_measured():
    assert doctor.matmul_tflops("float32", n=64) > 0


def test_a_browser_without_its_driver_is_not_enough(monkeypatch):
    monkeypatch.setattr(doctor, "first_program", lambda *names: None if "chromedriver" in names else "/bin/chromium")
    assert doctor.browser_check().fact == "no chromedriver"


def test_a_program_that_does_not_answer_is_named():
    assert doctor.program_version("/nowhere/chromium") == "/nowhere/chromium, which does not tell its version"
