"""Imports point one way: the table of the design, held against the source of every module."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

import minilora

PACKAGE = Path(minilora.__file__).parent
MODULES = {
    "minilora." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if path != PACKAGE / "__init__.py"
}

# What each room may import of ours, beside itself. cli and doctor may import anything, inside their functions.
ALLOWED: dict[str, set[str]] = {
    "files": set(),
    "numpy_lora": set(),
    "cpu": set(),
    "torch_lora": {"files", "cpu"},
    "llm": {"files", "cpu"},
    "qlora": {"torch_lora", "cpu", "numpy_lora.nf4"},
    "methods": {"torch_lora", "qlora", "llm"},
    "train": {"files", "torch_lora", "methods", "qlora", "llm", "cpu"},
    "classroom": {"files", "numpy_lora", "torch_lora", "llm", "qlora", "methods", "train"},
    "train_options": {"llm"},
    "cli": set(),
    "doctor": set(),
}


def imports_of(path: Path, *, at_import_only: bool = False) -> set[str]:
    """The modules of ours that a file imports: `from a import b` counts as a.b where that is a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if at_import_only and id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            source = node.module or ""
            names = {f"{source}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else source for name in names}
    return {name for name in found if name.split(".")[0] == "minilora" and name != "minilora"}


def room(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_what_its_room_may(module):
    may = {room(module), *ALLOWED[room(module)]}
    at_import_only = room(module) in ("cli", "doctor")
    wrong = {
        name
        for name in imports_of(MODULES[module], at_import_only=at_import_only)
        if not any(name == f"minilora.{m}" or name.startswith(f"minilora.{m}.") for m in may)
    }

    assert wrong == set()


def test_there_is_no_cycle():
    graph = {module: imports_of(path, at_import_only=True) & MODULES.keys() for module, path in MODULES.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail("these modules import each other: " + " → ".join(error.args[1]))


def test_the_package_itself_imports_nothing():
    assert imports_of(PACKAGE / "__init__.py") == set()
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    assert [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)] == []


def test_matplotlib_and_widgets_live_in_the_classroom_only():
    for module, path in MODULES.items():
        text = path.read_text(encoding="utf-8")
        if room(module) not in ("classroom", "doctor"):
            assert "import matplotlib" not in text, module
            assert "import ipywidgets" not in text, module


def test_pefts_spellings_stand_in_the_files_about_other_peoples_files():
    theirs = ("peft_", "consumers", "import_layouts")
    for module, path in MODULES.items():
        if not module.rpartition(".")[2].startswith(theirs) and room(module) != "classroom":
            text = path.read_text(encoding="utf-8")
            assert [w for w in ("lora_alpha", "target_modules", "lora_A.weight") if w in text] == [], module


def test_every_paper_tag_resolves_in_the_glossary():
    known = set(re.findall(r"\[(\w+)\]", minilora.__doc__ or ""))
    for module, path in MODULES.items():
        docstrings = [
            ast.get_docstring(node) or ""
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        ]
        used = set(re.findall(r"\[([A-Za-z0-9]+)\] (?:eq|section|table|algorithm|appendix)", "\n".join(docstrings)))
        assert used <= known, f"{module}: {used - known}"
