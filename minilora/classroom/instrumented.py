"""An array that remembers what was computed with it: every new array's shape, every multiplication.

    (x, W, A, B), log = watch(x, W, A, B)       views of the same numbers, and the one log they all write to
    h = my_function(x, W, A, B)
    log.allocated                               [("matmul", (5, 3)), …]

A promise such as "never forms the out × in product" cannot be seen in a result, which is the same either way.
It can be seen here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy import ndarray


@dataclass
class Log:
    """What was computed from the watched arrays, in order."""

    allocated: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)  # (operation, shape of its result)
    multiplications: int = 0  # of scalars, in matmul, dot, inner and outer; einsum is not counted

    def forms(self, rows: int, columns: int) -> str | None:
        """The first operation that made an array with as many rows and columns, either way round; or None."""
        for operation, shape in self.allocated:
            if sorted(shape[-2:]) == sorted((rows, columns)):
                return operation
        return None

    @property
    def largest(self) -> tuple[int, ...]:
        """The shape of the largest array that was made; () if none was."""
        return max((shape for _, shape in self.allocated), key=math.prod, default=())


def _of_a_product(left: Any, right: Any) -> int:
    """One multiplication for each entry of the result and each term of its sum."""
    columns = np.shape(right)[-1] if np.ndim(right) > 1 else 1
    return math.prod(np.shape(left)) * columns


MULTIPLICATIONS: dict[Callable, Callable[[Any, Any], int]] = {
    np.matmul: _of_a_product,
    np.dot: _of_a_product,
    np.inner: lambda left, right: np.size(left) * math.prod(np.shape(right)[:-1]),
    np.outer: lambda left, right: np.size(left) * np.size(right),
}


class InstrumentedArray(ndarray):
    """A NumPy array that writes what is computed with it into a `Log`; results are instrumented too.

    It sees ufuncs (`@`, `*`, `np.add`, …) and NumPy's functions (`np.dot`, `np.einsum`, …), but nothing that
    happens after `np.asarray` has taken a plain array out of it.
    """

    log: Log | None

    def __array_finalize__(self, source: object) -> None:
        self.log = getattr(source, "log", None)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = None, **options: Any) -> Any:
        log = _log_of(inputs)
        if out is not None:
            options["out"] = tuple(_plain(array) for array in out)
        result = getattr(ufunc, method)(*(_plain(value) for value in inputs), **options)
        if log is not None and ufunc is np.matmul and method == "__call__":
            log.multiplications += MULTIPLICATIONS[np.matmul](*inputs)
        if out is not None:
            return out[0]
        return _watched(result, log, ufunc.__name__)

    def __array_function__(self, function: Callable, types: Any, args: Any, kwargs: Any) -> Any:
        log = _log_of(_leaves(args))
        result = super().__array_function__(function, types, args, kwargs)
        if log is not None and function in MULTIPLICATIONS:
            log.multiplications += MULTIPLICATIONS[function](*args[:2])
        if isinstance(result, ndarray) and log is not None:
            inputs = [leaf for leaf in _leaves(args) if isinstance(leaf, ndarray)]
            if not any(np.may_share_memory(result, array) for array in inputs):
                log.allocated.append((getattr(function, "__name__", "?"), result.shape))
        return _watched(result, log, None)

    def dot(self, other: Any, out: Any = None) -> Any:
        """`x.dot(y)` as `np.dot(x, y)`: the method alone would pass unseen."""
        return np.dot(self, other, out=out)


def watch(*arrays: ndarray) -> tuple[list[InstrumentedArray], Log]:
    """Views of the arrays that all write to one log, and the log.

    >>> (x, A), log = watch(np.ones((5, 12)), np.ones((3, 12)))
    >>> _ = x @ A.T
    >>> log.allocated, log.multiplications
    ([('matmul', (5, 3))], 180)
    """
    log = Log()
    views = [np.asarray(array).view(InstrumentedArray) for array in arrays]
    for view in views:
        view.log = log
    return views, log


def _plain(value: Any) -> Any:
    return value.view(ndarray) if isinstance(value, InstrumentedArray) else value


def _leaves(value: Any) -> list[Any]:
    return [leaf for item in value for leaf in _leaves(item)] if isinstance(value, (tuple, list)) else [value]


def _log_of(values: Any) -> Log | None:
    return next((value.log for value in values if isinstance(value, InstrumentedArray) and value.log is not None), None)


def _watched(result: Any, log: Log | None, operation: str | None) -> Any:
    """The result as an instrumented array; logged, if the operation is named and it is no view."""
    if isinstance(result, tuple):
        return tuple(_watched(item, log, operation) for item in result)
    if not isinstance(result, ndarray):
        return result
    if log is not None and operation is not None and result.base is None:
        log.allocated.append((operation, result.shape))
    view = result.view(InstrumentedArray)
    view.log = log
    return view
