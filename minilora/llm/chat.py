"""Chat templates: a Jinja program that comes with a model, run where it can neither reach out nor run away.

Jinja's immutable sandbox keeps a template away from Python's inside and from changing what it is given. It does not
keep it from costing: three lines can loop for a year or ask for a terabyte of spaces. So here

    every turn of a loop and every call costs STEP, every text or list costs its size whenever it is written, joined,
        compared or changed, and it is measured before that is done; BUDGET is for one conversation;
    what makes a large text out of a small number is not offered at all: "a" * 9, center(9), "%9d" % 1, lipsum(9);
    there is no clock: the same messages give the same text.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_SOURCE = 1 << 16  # characters
BUDGET = 10_000_000  # characters handled
STEP = 500  # what a turn of a loop or a call is counted as: 20,000 of them use up the budget
ITEM = 50  # what a number, a list, an entry in a dictionary is counted as

# What is offered of jinja's filters and of Python's methods. The first look at the outside of a value only.
STRUCTURE_FILTERS = "abs count d default first float int items last length list map reverse round safe"
PAID_FILTERS = """
    capitalize dictsort e escape join lower max min reject rejectattr replace select selectattr sort string title tojson
    trim unique upper
"""
STRING_METHODS = """
    capitalize count endswith find index isalnum isalpha isdigit islower isnumeric isspace isupper join lower lstrip
    partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip
    title upper
"""
METHODS: tuple[tuple[type | tuple[type, ...], list[str]], ...] = (
    (str, STRING_METHODS.split()),
    ((list, tuple), ["index", "count"]),
    (Mapping, ["get", "items", "keys", "values"]),
    ((bool, int, float), []),  # (1).to_bytes(10**9) is a large text, too
)


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
            program = _Metering().visit(self._sandbox.parse(source))
            code = self._sandbox.compile(program, filename="<chat template>")
        except (TemplateError, RecursionError, SyntaxError, ValueError, MemoryError) as error:
            raise ValueError(f"the chat template cannot be read: {error}") from error
        self._template = Template.from_code(self._sandbox, code, self._sandbox.globals)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        special_tokens: Mapping[str, str] | None = None,
    ) -> str:
        """The text of a conversation. `special_tokens` are names, such as bos_token, that the template may print.

        Raises:
            ValueError: if the template refuses these messages, fails on them, or exceeds its budget.
        """
        self._sandbox.left = BUDGET
        values = {**(special_tokens or {}), "messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return self._sandbox.concat(self._template.generate(values))
        except (
            TemplateError, RecursionError, ArithmeticError, LookupError, MemoryError, TypeError, ValueError
        ) as error:  # fmt: skip
            raise ValueError(f"the chat template failed: {error}") from error


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with what is left of a budget. The methods without underscore are hooks that jinja calls."""

    intercepted_binops = frozenset(("+", "*", "%", "**"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # computing nothing before the meter runs
            extensions=["jinja2.ext.loopcontrols"],
            finalize=self._paid,  # whatever is printed
        )
        self.left = BUDGET
        ours = {"join": self._join, "replace": self._replace, "tojson": _to_json}
        offered = self.filters | ours
        self.filters = {name: offered[name] for name in STRUCTURE_FILTERS.split()}
        self.filters |= {name: self._paid_filter(offered[name]) for name in PAID_FILTERS.split()}
        self.filters |= {"_paid": self._paid, "_paid_turns": self._paid_turns, "_text": self._paid_filter(self._join)}
        self.globals = {"namespace": Namespace, "range": self.globals["range"], "raise_exception": _raise_exception}

    def spend(self, cost: int) -> None:
        self.left -= cost
        if self.left < 0:
            raise SecurityError(f"it does more than a conversation needs (a budget of {BUDGET:,} characters handled)")

    def concat(self, pieces: Iterable[str]) -> str:
        """Join the output of the template, of a macro, of a `set` block."""
        kept = []
        for piece in pieces:
            self.spend(len(piece))
            kept.append(piece)
        return "".join(kept)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        offered = next((names for kind, names in METHODS if isinstance(obj, kind)), None)
        return (offered is None or attr in offered) and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """str.format is not offered: '{:>9999999999}' is a large text in a small one. Jinja would allow it."""

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.spend(STEP)
        text = getattr(function, "__self__", None)
        if isinstance(text, str | list | tuple):  # what searches a list compares all that is in it
            self._paid((text, args))
        if isinstance(text, str):
            if function.__name__ == "join":
                return self._join(list(args[0]), text)
            if function.__name__ == "replace":
                return self._replace(text, *args)
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Numbers may do anything but grow without end; texts and lists may only be added."""
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "**" or (operator != "+" and not numbers):
            raise SecurityError(
                f"{type(left).__name__} {operator} {type(right).__name__} is not offered to chat templates"
            )
        if numbers and operator == "*" and abs(left * right) >= 2**63:
            raise SecurityError("it multiplies to numbers above 2⁶³")
        for value in (left, right):
            self.spend(len(value) if isinstance(value, str) else ITEM * _length(value))
        return super().call_binop(context, operator, left, right)

    def _paid(self, value: Any) -> Any:
        """The value itself, after its size is paid."""
        self.spend(_size(value, self.left))
        return value

    def _paid_turns(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.spend(STEP)
            yield item

    def _paid_filter(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)  # jinja looks at the function's attributes to see what else it wants to be passed
        def paid(*args: Any, **kwargs: Any) -> Any:
            values = [list(value) if isinstance(value, Iterator) else value for value in args]
            self._paid(([value for value in values if not isinstance(value, Context)], kwargs))
            return function(*values, **kwargs)

        return paid

    def _join(self, items: Sequence[Any], separator: Any = "") -> str:
        self.spend(len(items) * len(str(separator)))
        return str(separator).join(map(str, items))

    def _replace(self, text: Any, old: Any, new: Any, count: int = -1) -> str:
        text, old, new = str(text), str(old), str(new)
        self.spend(text.count(old) * len(new))
        return text.replace(old, new, count)


class _Metering(NodeTransformer):
    """Put the meter into a template, where jinja has no hook for it."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_paid_turns")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """a ~ b ~ c"""
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "_text")

    def visit_Test(self, node: nodes.Test) -> nodes.Node:
        """a is eq b"""
        self.generic_visit(node)
        node.node = _filtered(node.node, "_paid")
        node.args = [_filtered(argument, "_paid") for argument in node.args or ()]
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _filtered(node.expr, "_paid")
        for operand in node.ops:
            operand.expr = _filtered(operand.expr, "_paid")
        return node


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _size(value: Any, most: int) -> int:
    """At most about as many characters as a value is printed with; counting ends soon after `most`."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Namespace):
        raise SecurityError("a namespace is for keeping values, it is not one")
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if not isinstance(value, list | tuple):
        return ITEM
    size = ITEM
    for item in value:
        if size > most:
            break
        size += _size(item, most - size)
    return size


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list | tuple) else 1


def _to_json(value: Any, indent: int | None = None) -> str:
    """As in Hugging Face's templates: not escaped for HTML as jinja's own is."""
    if indent is not None and not 0 <= indent <= 8:
        raise SecurityError(f"tojson(indent={indent}) is not offered: use 0 to 8")
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
