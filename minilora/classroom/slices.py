"""The part of a program that one name needs: its definition and, in turn, what that uses.

    program = Program.of_cells(["import numpy as np", "figure = slow()", "def f(x):\n    return np.sum(x)"])
    program.needed_by("f")        the import and the function; the figure is left out

A notebook is such a program, cut into cells. So a broken or slow cell touches only what is made from it.
"""

import ast
import copy
import re
import symtable
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MAGIC = re.compile(r"^(\s*)(?:[%!?].*|[\w.]+\?\??)$", re.MULTILINE)  # IPython's own: `%time`, `!pip`, `?help`, `help?`


@dataclass(frozen=True)
class Statement:
    """One statement at the top of a program, or one name of an import."""

    node: ast.stmt
    text: str
    binds: frozenset[str]  # the names it gives a value
    changes: frozenset[str]  # the names whose objects it changes: `x[0] = …`, `x.y = …`
    reads: frozenset[str]  # the names it needs when it is executed
    reads_later: frozenset[str]  # those that its functions need when they are called

    @property
    def is_import(self) -> bool:
        """Whether it is an import."""
        return isinstance(self.node, (ast.Import, ast.ImportFrom))

    @property
    def is_definition(self) -> bool:
        """Whether it is a function or a class."""
        return isinstance(self.node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))


@dataclass(frozen=True)
class Program:
    """Statements in order, and the cells that are not Python, each with its error."""

    statements: tuple[Statement, ...]
    unreadable: tuple[tuple[str, SyntaxError], ...] = ()

    @classmethod
    def of_cells(cls, cells: Iterable[str]) -> "Program":
        """Read the cells of a notebook; a cell that is not Python is set aside."""
        statements: list[Statement] = []
        unreadable: list[tuple[str, SyntaxError]] = []
        for cell in cells:
            try:
                statements += list(_statements(_python(cell)))
            except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
                problem = error if isinstance(error, SyntaxError) else SyntaxError(str(error))
                unreadable.append((cell, problem))
        return cls(tuple(statements), tuple(unreadable))

    def rewritten(self, transformer: ast.NodeTransformer) -> "Program":
        """The same program with every statement passed through a transformer."""
        return Program(tuple(_rewritten(each, transformer) for each in self.statements), self.unreadable)

    def definition(self, name: str) -> Statement | None:
        """The last statement that gives this name a value; an import only if there is nothing else."""
        at = self._binding(name, len(self.statements), is_later=True)
        return None if at is None else self.statements[at]

    def needed_by(self, *names: str) -> list[Statement]:
        """The statements that these names need, in order.

        Of a function or class the last definition counts, of any other value the last before it is used.
        """
        found: set[int] = set()
        open_names = [(name, len(self.statements), True) for name in names]
        seen: set[tuple[str, int | None]] = set()
        while open_names:
            name, at, is_later = open_names.pop()
            binding = self._binding(name, at, is_later)
            if binding is None or (name, binding) in seen:
                continue
            seen.add((name, binding))
            for index in [binding, *self._changes(name, binding, at)]:
                if index not in found:
                    found.add(index)
                    statement = self.statements[index]
                    open_names += [(read, index, False) for read in statement.reads]
                    open_names += [(read, index, True) for read in statement.reads_later]
        return [self.statements[index] for index in sorted(found)]

    def _binding(self, name: str, at: int, is_later: bool) -> int | None:
        """Which statement gives the name its value, for a use in statement `at`."""
        everywhere = [index for index, each in enumerate(self.statements) if name in each.binds]
        binding = [index for index in everywhere if not self.statements[index].is_import] or everywhere
        before = [index for index in binding if index < at]
        if is_later and any(self.statements[index].is_definition for index in binding):
            return binding[-1]
        return before[-1] if before else binding[-1] if binding else None

    def _changes(self, name: str, binding: int, at: int) -> Iterator[int]:
        """The statements that change the object: of a function or class all, of others those before its use."""
        end = len(self.statements) if self.statements[binding].is_definition else at
        return (index for index in range(binding + 1, end) if name in self.statements[index].changes)


def _python(cell: str) -> str:
    """A cell without IPython's own lines. Where it is Python already, a line that begins with % is an operator's."""
    try:
        ast.parse(cell)
    except SyntaxError:
        return MAGIC.sub(r"\1pass", cell)
    return cell


def _statements(text: str) -> Iterator[Statement]:
    lines = text.splitlines()
    for node in ast.parse(text).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                one = ast.Import([alias]) if isinstance(node, ast.Import) else _only(node, alias)
                yield _statement(one, ast.unparse(one))
        else:
            first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])
            own = "\n".join(lines[first - 1 : node.end_lineno])
            try:
                is_alone = ast.dump(ast.parse(own)) == ast.dump(ast.Module([node], []))
            except SyntaxError:
                is_alone = False  # it shares its line with another
            yield _statement(node, own if is_alone else ast.unparse(node))


def _rewritten(statement: Statement, transformer: ast.NodeTransformer) -> Statement:
    before = ast.dump(statement.node)
    node = transformer.visit(copy.deepcopy(statement.node))
    if ast.dump(node) == before:
        return statement
    return _statement(node, ast.unparse(ast.fix_missing_locations(node)))


def _only(node: ast.ImportFrom, alias: ast.alias) -> ast.ImportFrom:
    return ast.ImportFrom(node.module, [alias], node.level)


def _statement(node: ast.stmt, text: str) -> Statement:
    table = symtable.symtable(ast.unparse(node), "?", "exec")
    symbols = table.get_symbols()
    targets = [each.target for each in ast.walk(node) if isinstance(each, ast.AugAssign)]
    counted = {each.id for each in targets if isinstance(each, ast.Name)}
    binds = {each.get_name() for each in symbols if each.is_assigned() or each.is_imported() or each.is_namespace()}
    read = {each.get_name() for each in symbols if each.is_referenced()} | (counted & binds)  # `n += 1` reads n
    return Statement(
        node=node,
        text=text,
        binds=frozenset(binds),
        changes=frozenset(_changed(node)),
        reads=frozenset(read) | frozenset(_read_at_once(table)),
        reads_later=frozenset(_read_later(table)),
    )


def _read_at_once(table: symtable.SymbolTable) -> Iterator[str]:
    """The global names that the bodies of classes read while they are made."""
    for inner in table.get_children():
        if inner.get_type() == "class":
            yield from (each.get_name() for each in inner.get_symbols() if each.is_global() and each.is_referenced())
            yield from _read_at_once(inner)


def _read_later(table: symtable.SymbolTable) -> Iterator[str]:
    """The global names that functions read, at any depth."""
    for inner in table.get_children():
        if inner.get_type() != "class":
            yield from (each.get_name() for each in inner.get_symbols() if each.is_global() and each.is_referenced())
        yield from _read_later(inner)


def _changed(node: ast.AST) -> Iterator[str]:
    """The names at the left of `x.y = …`, `x[0] = …` and `del x[0]`, functions' bodies aside."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
        return
    if isinstance(node, (ast.Attribute, ast.Subscript)) and isinstance(node.ctx, (ast.Store, ast.Del)):
        base: ast.AST = node
        while isinstance(base, (ast.Attribute, ast.Subscript)):
            base = base.value
        if isinstance(base, ast.Name):
            yield base.id
    for child in ast.iter_child_nodes(node):
        yield from _changed(child)
