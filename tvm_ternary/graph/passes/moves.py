"""Where the elements of a tensor go: what moves them, as views of an array of their numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax
from tvm.tirx.analysis import undefined_vars

from tvm_ternary.graph.passes.dataflow import Dataflow, dims_of
from tvm_ternary.graph.passes.find_attention import as_index, known_extent
from tvm_ternary.schedule.cpu.nest import substitute

Ids = npt.NDArray[np.int64]
"""The number of each element of a tensor, of those that are told apart: a view, with steps of zero along the others."""

_RESHAPES = ("reshape", "squeeze", "expand_dims")
_MOVES = (*_RESHAPES, "permute_dims", "strided_slice")


class Moves(Dataflow):
    """A function's moves of elements; with them a factor for all, and a constant that is added to each.

    Open dimensions are taken to be different primes: what is a view for them mixes no axes.
    """

    def __init__(self, main: relax.Function) -> None:
        super().__init__(main)
        bindings = [binding for block in main.body.blocks for binding in block.bindings]
        self.numbers = {b.var: b.value.index for b in bindings if isinstance(b.value, relax.TupleGetItem)}
        self._sizes: dict[tvm.tirx.Var, tvm.tirx.IntImm] = {}

    def extents(self, var: relax.Var) -> list[int] | None:
        """Dimensions of a tensor in numbers; None where they are not known."""
        dims = dims_of(var)
        numbers = None if dims is None else [self._extent(as_index(dim)) for dim in dims]
        return None if numbers is None or None in numbers else [n for n in numbers if n is not None]

    def _extent(self, dim: Any) -> int | None:
        for var in undefined_vars(dim):
            if var not in self._sizes:
                self._sizes[var] = tvm.tirx.IntImm("int64", _prime(len(self._sizes)))
        return known_extent(tvm.sym.Analyzer().simplify(substitute(dim, self._sizes)))

    def source(self, expr: relax.Expr) -> relax.Expr | None:
        """The value whose elements another one has, moved, scaled or shifted; None where it is made otherwise."""
        if expr in self.numbers:
            return self.source(self.fields[expr]) if self.call_of(self.fields[expr], "split") is not None else None
        if (call := self.call_of(expr, *_MOVES, "split")) is not None:
            return call.args[0]
        if (call := self.call_of(expr, "add", "multiply", "divide")) is not None:
            return self._kept(call)
        return None

    def moved(self, var: relax.Var, reader: relax.Var, ids: Ids) -> Iterator[tuple[relax.Var, Ids]]:
        """Where a reader has which elements of a variable; nothing where it makes others of them.

        What splits a tensor gives the fields that are read.
        """
        call = self.call_of(reader, *_MOVES, "split", "add", "multiply", "divide")
        if call is None or self.source(reader) != var:
            return
        if call.op.name == "relax.split":
            parts = _split(call, ids)
            if all(one in self.numbers for one in self.readers[reader]):
                yield from ((one, parts[self.numbers[one]]) for one in self.readers[reader])
            return
        dims = self.extents(reader)
        places = None if dims is None else _place(call, ids, dims)
        if places is not None:
            yield reader, places

    def shift(self, var: relax.Var) -> npt.NDArray[Any] | None:
        """The constant of a sum."""
        call = self.call_of(var, "add")
        if call is None or (kept := self._kept(call)) is None:
            return None
        return self.constant(call.args[1] if call.args[0] == kept else call.args[0])

    def constant(self, expr: relax.Expr) -> npt.NDArray[Any] | None:
        """The value of a constant, or of a part of one."""
        if isinstance(expr, tvm.ir.GenericConst):
            return np.asarray(expr.value.numpy())
        call = self.call_of(expr, *_MOVES)
        value, dims = (None, None) if call is None else (self.constant(call.args[0]), self.extents(expr))
        return None if call is None or value is None or dims is None else _place(call, value, dims, copies=True)

    def _kept(self, call: relax.Call) -> relax.Expr | None:
        """The operand whose elements a sum or a product has."""
        left, right = call.args
        constants = [self.constant(one) for one in (left, right)]
        if (constants[0] is None) == (constants[1] is None):
            return None
        kept, constant = (left, constants[1]) if constants[0] is None else (right, constants[0])
        if call.op.name == "relax.divide" and kept == right:
            return None
        assert constant is not None
        return kept if call.op.name == "relax.add" or constant.size == 1 else None


def axes_of(ids: Ids) -> list[bool]:
    """Whether there are other elements along each axis; along the others they repeat."""
    return [n > 1 and step != 0 for n, step in zip(ids.shape, ids.strides, strict=True)]


def without_copies(ids: Ids) -> Ids:
    """The same without axes along which elements repeat."""
    return np.asarray(ids[tuple(slice(None) if varies else 0 for varies in axes_of(ids))])


def _place(call: relax.Call, ids: npt.NDArray[Any], dims: list[int], *, copies: bool = False) -> Any:
    """What a move, or an element-wise operator, makes of an array; None where it is no view and may be no copy."""
    name = call.op.name.removeprefix("relax.")
    placed: npt.NDArray[Any] | None = ids
    if name in _RESHAPES:
        if ids.size != np.prod(dims):
            return None
        placed = ids.reshape(dims)
        if not copies and not np.may_share_memory(placed, ids):
            return None
    elif name == "permute_dims":
        placed = ids.transpose([int(axis) for axis in call.attrs.axes] if call.attrs.axes else None)
    elif name == "strided_slice":
        placed = _sliced(call, ids)
    return placed if placed is not None and list(placed.shape) == dims else None


def _sliced(call: relax.Call, ids: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
    """A window whose bounds are numbers."""
    bounds = [[known_extent(one) for one in part.fields] for part in call.args[1:]]
    axes, starts, ends, *steps = bounds
    where = [slice(None)] * ids.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps[0] if steps else [1] * len(axes), strict=True):
        if axis is None or start is None or end is None or step is None:
            return None
        where[axis] = slice(start, end, step)
    return np.asarray(ids[tuple(where)])


def _split(call: relax.Call, ids: Ids) -> list[Ids]:
    into, axis = call.attrs.indices_or_sections, int(call.attrs.axis)
    if not isinstance(into, int | tvm.tirx.IntImm):
        return np.split(ids, [int(end) for end in into], axis)
    size = -(-ids.shape[axis] // int(into))
    return np.split(ids, range(size, ids.shape[axis], size), axis)


def _prime(number: int) -> int:
    """Primes above 30, so that few sizes of heads are multiples of one."""
    primes = (n for n in itertools.count(31, 2) if all(n % factor for factor in range(3, n, 2)))
    return next(itertools.islice(primes, number, None))
