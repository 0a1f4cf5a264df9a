"""Patterns are compared as text; nothing of them is run. (tests/compat compares them with PEFT's own function.)"""

import re

import pytest

from minilora.torch_lora.peft_patterns import describe, parse_pattern, resolve

Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("pattern", "hits", "misses"),
    [
        ("q_proj", ["q_proj", Q], ["xq_proj", "q_proj.x"]),
        (Q, [Q, f"base.{Q}"], [f"x{Q}", "layers.0.self_attn.q_proj"]),
        (f"^{Q}", [Q], [f"base.{Q}"]),
        ("^q_proj$", ["q_proj"], ["a.q_proj"]),
        ("layers.0.x", ["layers.0.x", "layers-0-x", "a.layers.0.x"], ["layers.00.x"]),
        (r"layers\.0\.x", ["layers.0.x", "a.layers.0.x"], ["layers-0.x"]),
        (r".*\.q_proj", [Q, "a.q_proj"], ["q_proj", "a.xq_proj"]),
        (".*q_proj", [Q, "q_proj", "xq_proj"], ["q_projx"]),
        (r"self\-attn", ["self-attn"], ["self_attn"]),
        (".*", ["", "a", Q], []),
    ],
)
def test_the_forms_that_are_read(pattern, hits, misses):
    parsed = parse_pattern(pattern)
    for name in hits + misses:
        assert parsed.hits(name) is (name in hits), name
        assert bool(re.match(rf"(.*\.)?({pattern})$", name)) is (name in hits), name


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "it is empty"),
        ("^", "it is empty"),
        ("^$", "it is empty"),
        ("q|v", "'|' is not read here"),
        ("(a+)+$", "'(' is not read here"),
        ("a*", "'*' is not read here"),
        (r"layers\.\d+", "a \\ before 'd' means more than the character"),
        ("a\\", "a \\ before '' means more"),
        ("a^b", "'^' is not read here"),
        ("a.*b", "'*' is not read here"),
        ("[0-9]", "'[' is not read here"),
        ("a{9}", "'{' is not read here"),
    ],
)
def test_more_of_a_regular_expression_is_refused(pattern, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_pattern(pattern)


def test_long_patterns_and_names_are_compared_once():
    # a regular expression that begins with .* twice tries every pair of beginnings: 10¹⁰ of them here
    assert not parse_pattern(".*" + "." * 50_000 + "b").hits("a" * 100_000)


def test_the_first_pattern_that_hits_decides():
    patterns = {parse_pattern("^a.q"): 1, parse_pattern("q"): 2, parse_pattern("b.q"): 3}

    assert [resolve(patterns, name, 0) for name in ("a.q", "b.q", "x.v")] == [1, 2, 0]


@pytest.mark.parametrize(
    ("values", "default", "patterns"),
    [
        ({"a.q": 8}, 8, {}),
        ({"a.q": 8, "b.q": 8, "a.v": 4}, 8, {"v": 4}),
        ({"a.q": 8, "b.q": 4, "c.q": 8}, 8, {"b.q": 4}),
        ({"lin": 2, "block.lin": 8, "x": 8}, 8, {"^lin": 2}),
        ({"block.lin": 2, "lin": 8, "x": 8}, 8, {"block.lin": 2}),
        ({"a.b.lin": 2, "b.lin": 4, "x": 8, "y": 8}, 8, {"a.b.lin": 2, r"^b\.lin": 4}),
        ({"a.x+y": 2, "q": 8, "k": 8}, 8, {r"^a\.x\+y": 2}),
    ],
)
def test_what_is_written_hits_what_it_is_for_and_nothing_else(values, default, patterns):
    assert describe(values) == (default, patterns)
    parsed = {parse_pattern(text): value for text, value in patterns.items()}
    assert {name: resolve(parsed, name, default) for name in values} == values
