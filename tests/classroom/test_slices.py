"""The part of a notebook that a name needs."""

import pytest

from minilora.classroom.slices import Program


def needed(name: str, *cells: str) -> list[str]:
    """The texts of the statements that a name needs."""
    return [statement.text for statement in Program.of_cells(cells).needed_by(name)]


def test_what_a_function_does_not_use_is_left_out():
    cells = "import numpy as np, torch", "figure = slow()", "def f(x):\n    return np.sum(x)", "print(f(figure))"

    assert needed("f", *cells) == ["import numpy as np", "def f(x):\n    return np.sum(x)"]


def test_a_cell_that_is_not_python_is_set_aside_with_its_error():
    program = Program.of_cells(["x = (", "def f():\n    return 1"])

    assert [each.text for each in program.needed_by("f")] == ["def f():\n    return 1"]
    assert [(cell, error.lineno) for cell, error in program.unreadable] == [("x = (", 1)]


def test_half_of_a_broken_cell_is_not_taken():
    assert Program.of_cells(["def f():\n    return 1\nx = ("]).statements == ()


@pytest.mark.parametrize("magic", ["%matplotlib inline", "!pip install x", "?print", "np.sum??", "%%time"])
def test_lines_of_ipython_do_not_spoil_a_cell(magic: str):
    assert needed("f", f"{magic}\ndef f():\n    return 1") == ["def f():\n    return 1"]


def test_a_line_that_begins_with_an_operator_is_python():
    cell = "def f(a, b):\n    return (\n        a\n        % b\n    )"

    assert needed("f", cell) == [cell]


def test_the_last_definition_wins_also_of_what_it_uses():
    cells = "def f():\n    return g()", "def g():\n    return 1", "def g():\n    return 2", "f()"

    assert needed("f", *cells) == ["def f():\n    return g()", "def g():\n    return 2"]


def test_an_import_does_not_hide_a_definition_of_the_same_name():
    assert needed("f", "def f():\n    return 1", "from somewhere import f") == ["def f():\n    return 1"]


def test_of_a_value_the_last_before_it_is_used_counts():
    cells = "n = 1", "n = 2", "def f():\n    return n", "n = slow()"

    assert needed("f", *cells) == ["n = 2", "def f():\n    return n"]


def test_a_value_that_is_set_only_later_is_found_too():
    assert needed("f", "def f():\n    return n", "n = 2") == ["def f():\n    return n", "n = 2"]


def test_names_of_its_own_do_not_reach_for_those_of_other_cells():
    cells = "x = slow()", "def f(x):\n    y = [x for x in x]\n    return y", "y = slow()"

    assert needed("f", *cells) == [cells[1]]


@pytest.mark.parametrize(
    "definition",
    [
        "class C(Base): pass",
        "@Base\ndef C(): pass",
        "def C(x=Base): pass",
        "class C:\n    size = Base",
        "class C:\n    def f(self):\n        return lambda: Base",
        "C = [Base for _ in range(3)]",
        "if Base:\n    def C(): pass",
    ],
)
def test_bases_decorators_defaults_and_bodies_are_needed(definition: str):
    assert needed("C", "Base = 3", definition) == ["Base = 3", definition]


def test_a_method_that_is_added_in_another_cell_belongs_to_the_class():
    cells = "class C:\n    pass", "def fold(self): ...", "C.merge = fold"

    assert needed("C", *cells) == list(cells)


def test_a_table_that_is_filled_afterwards_is_filled():
    assert needed("f", "t = {}", "t['a'] = 1", "def f():\n    return t", "t['b'] = slow()") == [
        "t = {}",
        "t['a'] = 1",
        "def f():\n    return t",
    ]


def test_a_value_made_of_its_own_former_value_needs_both():
    assert needed("f", "n = 1", "n += 1", "def f():\n    return n") == ["n = 1", "n += 1", "def f():\n    return n"]


def test_a_definition_that_is_wrapped_afterwards_needs_both():
    assert needed("f", "def f():\n    return 1", "f = cached(f)") == ["def f():\n    return 1", "f = cached(f)"]


def test_statements_that_share_a_line_are_taken_apart():
    assert needed("b", "a = 1; b = 2") == ["b = 2"]


def test_a_name_that_is_nowhere_needs_nothing():
    assert Program.of_cells(["x = 1"]).definition("f") is None and needed("f", "x = 1") == []
