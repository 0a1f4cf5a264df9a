"""Chat templates: a Jinja program that comes with a model, run where it can neither reach out nor run away.

Jinja's immutable sandbox keeps a template away from Python's inside and from changing what it is given. It does not keep it
from costing: three lines can loop for a year or ask for a terabyte of spaces. Here it also has a budget:

    source            at most MAX_SOURCE characters
    steps             turns of loops and calls, at most MAX_STEPS together
    size of a value   at most MAX_SIZE: its characters, counted as often as they would be printed

No value above MAX_SIZE comes into being: what can make a large value out of small ones (joining, replacing, adding, lists) is
measured first, and what makes text out of a number (`"a" * 9`, `center(9)`, `"%9d" % 1`) is not there at all. There is no
clock either: the same messages give the same text.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_SOURCE = 1 << 16  # characters
MAX_STEPS = 100_000
MAX_SIZE = 1 << 21  # characters

# Python's own, in jinja's sandbox, that make no large text out of small things. `join` and `replace` are measured first.
FILTERS = (
    "abs capitalize count d default dictsort e escape first float int items last length list lower map max min reject "
    "rejectattr reverse round safe select selectattr sort string sum title trim unique upper"
).split()
STRING_METHODS = (
    "capitalize count endswith find index isalnum isalpha isdigit islower isnumeric isspace isupper join lower lstrip "
    "partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip "
    "title upper"
).split()


class ChatTemplate:
    """One template, compiled once.

    >>> template = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    >>> template.render([{"role": "user", "content": "Hello"}])
    '<user>Hello'
    """

    def __init__(self, source: str) -> None:
        """
        Raises:
            ValueError: if it is too long or not a template.
        """
        if len(source) > MAX_SOURCE:
            raise ValueError(f"the chat template has {len(source)} characters; at most {MAX_SOURCE} are read")
        self._sandbox = _Sandbox()
        try:
            program = _Measured().visit(self._sandbox.parse(source))
            code = self._sandbox.compile(program)
        except (TemplateError, RecursionError) as error:
            raise ValueError(f"the chat template cannot be read: {error}") from error
        self._template = Template.from_code(self._sandbox, code, self._sandbox.globals)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        special_tokens: Mapping[str, str] | None = None,
    ) -> str:
        """The text of a conversation. `special_tokens` are the names (such as bos_token) that the template may print.

        Raises:
            ValueError: if the template refuses these messages, fails on them, or exceeds its budget.
        """
        self._sandbox.steps = 0
        pieces = self._template.generate(
            **(special_tokens or {}), messages=messages, add_generation_prompt=add_generation_prompt
        )
        try:
            return self._sandbox.concat(pieces)
        except (TemplateError, RecursionError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"the chat template failed: {error}") from error


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a budget of steps (`steps` counts them) and a largest size of a value."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))  # these go through call_binop

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=["jinja2.ext.loopcontrols"])
        self.steps = 0
        self.filters = {name: self.filters[name] for name in FILTERS}
        self.filters |= {"join": _join, "replace": _replace, "tojson": _to_json}
        self.filters |= {"counted turns": self._count_turns, "measured": _measured, "concatenated": _concatenated}
        self.globals = {"namespace": Namespace, "range": self._range, "raise_exception": _raise_exception}

    def step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise SecurityError(f"it takes more than {MAX_STEPS} steps")

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr not in STRING_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 (jinja's names)
        __self.step()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", None)
        if isinstance(owner, str) and name in ("join", "replace"):
            return _join(args[0], owner) if name == "join" else _replace(owner, *args)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Add within the largest size; multiply, raise and take remainders of numbers only."""
        if operator == "+":
            _measured((left, right))
        elif operator == "**" or not all(isinstance(value, int | float) for value in (left, right)):
            raise SecurityError(f"{type(left).__name__} {operator} {type(right).__name__} is not offered to chat templates")
        elif operator == "*" and abs(left * right) > 2**63:
            raise SecurityError("it multiplies to numbers above 2⁶³")
        return super().call_binop(context, operator, left, right)

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """How jinja puts its output, and that of macros and `set` blocks, together."""
        kept, size = [], 0
        for piece in pieces:
            kept.append(piece)
            size += len(piece)
            if size > MAX_SIZE:
                raise SecurityError(f"it writes more than {MAX_SIZE} characters")
        return "".join(kept)

    def _count_turns(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.step()
            yield item

    def _range(self, *bounds: int) -> range:
        return range(*bounds)
