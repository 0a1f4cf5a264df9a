"""PEFT's rank_pattern and alpha_pattern: which layers of an adapter have an r or an alpha of their own.

A pattern file entry is `pattern: value`; the first pattern, in the file's order, that hits a layer's name decides.
PEFT runs `(.*\\.)?(pattern)$` as a regular expression over the name. Here nothing from a file is run as one: the forms
below are read and compared as text, in time proportional to the name, and everything else is refused.

    q_proj                        every layer whose name is that or ends in "." and that
    layers.0.self_attn.q_proj     the same; an unescaped dot is any one character, as in a regular expression
    layers\\.0\\.self_attn\\.q_proj  the same; an escaped character is itself
    ^model.layers.0.q_proj        the whole name and nothing else
    .*\\.q_proj   .*proj           something and a dot before it; anything before it

Read before this file: nothing.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

Value = TypeVar("Value")
SPECIAL = frozenset("\\.^$*+?{}[]|()")


@dataclass(frozen=True)
class NamePattern:
    """A pattern in parts: what may stand before its characters, and the characters, None for any one."""

    text: str
    whole: bool  # begins with ^: nothing stands before it
    before: str  # "": nothing, or all up to a dot; ".*": anything; ".*\\.": all up to a dot
    characters: tuple[str | None, ...]

    @cached_property
    def ending(self) -> str:
        """The characters behind the last that may be any: with them nearly all names are told at once."""
        return "".join("\0" if c is None else c for c in self.characters).rpartition("\0")[2]

    def hits(self, name: str) -> bool:
        """Whether PEFT's `re.match(rf"(.*\\.)?({pattern})$", name)` finds something."""
        if not name.endswith(self.ending):
            return False
        start = len(name) - len(self.characters)
        if start < 0 or any(c not in (None, n) for c, n in zip(self.characters, name[start:], strict=True)):
            return False
        if self.before:
            return self.before == ".*" or name[:start].endswith(".")
        return start == 0 or (not self.whole and name[start - 1] == ".")


def parse_pattern(text: str) -> NamePattern:
    """Take a pattern apart.

    Raises:
        ValueError: if it is empty, or more of a regular expression than the forms above (says what).

    >>> parse_pattern(r"layers\\.0\\.q_proj").hits("model.layers.0.q_proj")
    True
    """
    rest = text.removeprefix("^")
    if rest.endswith("$") and not rest.endswith("\\$"):
        rest = rest[:-1]
    before = next((start for start in (".*\\.", ".*") if rest.startswith(start)), "")
    characters: list[str | None] = []
    pieces = iter(rest.removeprefix(before))
    for piece in pieces:
        if piece == "\\":
            piece = next(pieces, "")
            if not piece or piece.isalnum() or not piece.isascii():
                raise ValueError(f"a \\ before {piece!r} means more than the character")
            characters.append(piece)
        elif piece == ".":
            characters.append(None)
        elif piece in SPECIAL:
            raise ValueError(f"{piece!r} is not read here: nothing from a file is run as a regular expression")
        else:
            characters.append(piece)
    if not characters and not before:
        raise ValueError("it is empty")
    return NamePattern(text, text.startswith("^"), before, tuple(characters))


def resolve(patterns: Mapping[NamePattern, Value], name: str, default: Value) -> Value:
    """Give a layer's value: that of the first pattern that hits its name, or the default."""
    return next((value for pattern, value in patterns.items() if pattern.hits(name)), default)


def describe(values: Mapping[str, Value]) -> tuple[Value, dict[str, Value]]:
    """Write layers' values as a default, the most common one, and patterns for the others.

    Each pattern hits the layers that it is for and no other, so their order does not matter. A last part of names
    stands for its layers where they all agree; otherwise each has its whole name, with a ^ and escapes where the bare
    name is also the end of another's.

    >>> describe({"a.q": 8, "b.q": 8, "a.v": 4, "b.v": 4, "c.k": 8, "d.k": 2})
    (8, {'v': 4, 'd.k': 2})
    """
    default = Counter(values.values()).most_common(1)[0][0]
    patterns: dict[str, Value] = {}
    for name, value in values.items():
        leaf = name.rpartition(".")[2]
        alike = {other for other in values if other.rpartition(".")[2] == leaf}
        if value == default:
            continue
        if all(values[other] == value for other in alike) and _hits(leaf, values) == alike:
            patterns[leaf] = value
        else:
            patterns[name if _hits(name, values) == {name} else f"^{re.escape(name)}"] = value
    return default, patterns


def _hits(text: str, names: Mapping[str, Value]) -> set[str]:
    try:
        pattern = parse_pattern(text)
    except ValueError:  # a name with characters that are special in a pattern
        return set()
    return {name for name in names if pattern.hits(name)}
