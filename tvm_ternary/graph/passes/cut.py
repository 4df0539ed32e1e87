"""Cut ``main`` into segments that run one after the other, each with the matrices that multiply one value.

Before: ``main(ids, W1, W2, W3)`` with ``x = ...; a = x @ W1; b = x @ W2; y = f(a, b); z = y @ W3; ...``. After:
``... -> x`` without a matrix, ``(x, W1, W2) -> y``, ``(y, W3) -> ...``. So the input of a segment's matrices is there
before the segment runs, and one segment's matrices are in memory at a time.

What differs between the equal blocks of a model, names and constants, is no part of a segment's module: its constants
are parameters, too, and it calls everything by position. Equal blocks are structurally equal modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import tvm
from tvm import relax
from tvm.relax import transform
from tvm_ffi import structural_equal

from tvm_ternary.graph.passes.define_dimensions import Place, find_places

_PARTS = ("strided_slice", "split", "squeeze", "reshape")


@dataclass(frozen=True, eq=False)
class Segment:
    """A part of ``main``.

    Attributes
    ----------
    module : tvm.IRModule
        One Relax function ``main``; parameters: all symbolic dimensions of the model as one shape, then ``inputs``,
        ``matrices`` and ``constants``. Gives a tuple of ``outputs``.
    x : str or None
        The one of ``inputs`` that all matrices multiply, some reshaped perhaps; its last dimension is K. None where
        there is no matrix, which only the first segment may be without.
    matrices : tuple of str
        Their names, in the order of their use.
    inputs, outputs : tuple of str
        Values that live before it and are used here; values made here that live behind it.
    dead : tuple of str
        Those of ``inputs`` that nobody needs any more.
    constants : tuple of tvm.runtime.Tensor
    """

    module: tvm.IRModule
    x: str | None
    matrices: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dead: tuple[str, ...]
    constants: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Segments:
    """A function that was cut.

    Attributes
    ----------
    segments : tuple of Segment
        In order.
    inputs : tuple of str
        Values that live before the first: the model's inputs, in order.
    result : str
        The value that the function returned: a tuple.
    dimensions : tuple of Place
        For each symbolic dimension, the number of an input and of its axis that it is read off.
    """

    segments: tuple[Segment, ...]
    inputs: tuple[str, ...]
    result: str
    dimensions: tuple[Place, ...]


def cut(module: tvm.IRModule) -> Segments:
    """Cut ``main`` before every product by a parameter, unless the segment multiplies the same value already.

    Parts of a value are taken where it is made. So the slices that differ from step to step of an unrolled loop stand
    before it, and the steps are equal.

    Parameters
    ----------
    module : tvm.IRModule
        As the importers make it: ``main`` carries ``num_input``, and matrices are used as ``matmul(x, W)`` only.

    Returns
    -------
    Segments
    """
    # Values that are computed twice, as masks are in every layer of an exported model, would be two values to multiply.
    passes = [transform.CanonicalizeBindings(), transform.EliminateCommonSubexpr(), transform.DeadCodeElimination()]
    return _Cutter(tvm.ir.transform.Sequential(passes)(module)).run()


class _Cutter:
    def __init__(self, module: tvm.IRModule) -> None:
        main = module["main"]
        count = int(main.attrs["num_input"])
        self.functions = module.clone()
        del self.functions["main"]
        self.inputs, self.matrices = list(main.params[:count]), set(main.params[count:])
        # A function of several blocks is pure, too: its bindings are one list.
        self.bindings = [binding for block in main.body.blocks for binding in block.bindings]
        self.values = {binding.var: binding.value for binding in self.bindings}
        self.returned = main.body.body
        self.names = _unique([*self.inputs, *self.values])
        self.dimensions = find_places(self.inputs)
        assert isinstance(self.returned, relax.Var), "the result of main is a variable"

    def run(self) -> Segments:
        parts = self._parts()
        last = {var: number for number, part in enumerate(parts) for var in self._used(part.bindings)}
        last[self.returned] = len(parts)
        return Segments(
            tuple(self._segment(number, part, last) for number, part in enumerate(parts)),
            tuple(self.names[var] for var in self.inputs),
            self.names[self.returned],
            tuple(self.dimensions.values()),
        )

    def _parts(self) -> list[_Part]:
        """The bindings of each segment."""
        parts, root, home = [_Part(None)], None, dict.fromkeys(self.inputs, 0)
        for binding in self.bindings:
            x = self._multiplied(binding.value)
            if x is not None and self._root(x) != root:
                parts.append(_Part(x))
                root = self._root(x)
            operands = [home[var] for var in self._used([binding]) if var in home]
            home[binding.var] = max(operands, default=0) if _takes_part(binding.value) else len(parts) - 1
            parts[home[binding.var]].bindings.append(binding)
        return [part for part in parts if part.bindings]

    def _multiplied(self, value: relax.Expr) -> relax.Var | None:
        """What a product by a matrix multiplies; None if this is none."""
        used = [arg for arg in value.args if arg in self.matrices] if isinstance(value, relax.Call) else []
        if not used:
            return None
        assert value.op == _op("matmul"), f"a matrix is used by {value.op}"
        assert value.args[1] in self.matrices, "a matrix stands on the right"
        assert isinstance(value.args[0], relax.Var), "a matrix multiplies no constant"
        return value.args[0]

    def _root(self, x: relax.Var) -> relax.Var:
        """The value before reshapes that leave its rows what they were."""
        while x in self.values and (before := _reshaped(self.values[x])) is not None:
            x = before
        return x

    def _used(self, bindings: Sequence[Any]) -> dict[relax.Var, None]:
        """Variables read, in the order of their first use."""
        used: dict[relax.Var, None] = {}

        def visit(part: relax.Expr) -> None:
            if part in self.names or part in self.matrices:  # not a symbolic dimension
                used[part] = None

        for binding in bindings:
            relax.analysis.post_order_visit(binding.value, visit)
        return used

    def _segment(self, number: int, part: _Part, last: dict[relax.Var, int]) -> Segment:
        made = {binding.var: None for binding in part.bindings}
        read = [var for var in self._used(part.bindings) if var not in made]
        matrices = [var for var in read if var in self.matrices]
        inputs = [var for var in read if var not in self.matrices]
        outputs = [var for var in made if last.get(var, -1) > number]
        shape = relax.Var("dimensions", relax.ShapeType(list(self.dimensions)))
        module, constants = _Copier(self.functions).run(part.bindings, shape, [*inputs, *matrices], outputs)
        return Segment(
            module,
            None if part.x is None else self.names[part.x],
            tuple(var.name for var in matrices),
            tuple(self.names[var] for var in inputs),
            tuple(self.names[var] for var in outputs),
            tuple(self.names[var] for var in inputs if last[var] <= number),
            constants,
        )


@dataclass
class _Part:
    """The bindings of a segment, and what its first product by a matrix multiplies."""

    x: relax.Var | None
    bindings: list[Any] = field(default_factory=list)


@relax.expr_functor.mutator
class _Copier(relax.PyExprMutator):
    """Makes a function of some bindings, with new variables and its constants as parameters."""

    def __init__(self, functions: tvm.IRModule) -> None:
        super().__init__(functions)
        self.lifted: dict[Any, relax.Var] = {}

    def run(
        self, bindings: Sequence[Any], shape: relax.Var, read: Sequence[relax.Var], made: Sequence[relax.Var]
    ) -> tuple[tvm.IRModule, tuple[Any, ...]]:
        params = [relax.Var(f"value_{index}", var.ty) for index, var in enumerate(read)]
        for var, param in zip(read, params, strict=True):
            self.set_var_remap(var, param)
        with self.builder_.function("main", [shape, *params]):
            with self.builder_.dataflow():
                for binding in bindings:
                    self.set_var_remap(binding.var, self._emitted(binding))
                results = [self.builder_.emit_output(self.visit_expr(var)) for var in made]
            self.builder_.emit_func_output(relax.Tuple(results))
        result = self.builder_.get()
        main = result["main"]
        result["main"] = relax.Function([*main.params, *self.lifted.values()], main.body, main.ret_ty, main.is_pure)
        result["main"] = result["main"].with_attr("global_symbol", "main")
        return transform.DeadCodeElimination()(result), tuple(constant.value for constant in self.lifted)

    def _emitted(self, binding: Any) -> relax.Var:
        value = self.visit_expr(binding.value)
        if isinstance(binding, relax.MatchCast):
            return self.builder_.match_cast(value, binding.ty)
        return self.builder_.emit(value)

    def visit_generic_const_(self, op: relax.Expr) -> relax.Expr:
        """Whole numbers may decide shapes, and single numbers are part of an operator; weights of norms are neither."""
        if op.ty.dtype != "float32" or op.ty.ndim == 0:
            return op
        if op not in self.lifted:
            self.lifted[op] = relax.Var(f"constant_{len(self.lifted)}", op.ty)
        return self.lifted[op]


def _takes_part(value: relax.Expr) -> bool:
    """Whether it gives elements of its operand, none of them twice; then it costs no memory to do it early."""
    return isinstance(value, relax.TupleGetItem) or (isinstance(value, relax.Call) and value.op in map(_op, _PARTS))


def _reshaped(value: relax.Expr) -> relax.Var | None:
    """What a reshape that keeps the last dimension reshapes."""
    if not isinstance(value, relax.Call) or value.op != _op("reshape") or not isinstance(value.args[0], relax.Var):
        return None
    before, after = value.args[0].ty.shape, value.ty.shape
    if before is None or after is None or not len(before.values) or not len(after.values):
        return None
    return value.args[0] if structural_equal(before.values[-1], after.values[-1]) else None


def _unique(values: Sequence[relax.Var]) -> dict[relax.Var, str]:
    """A name for each value; two that have one name get a number."""
    names: dict[relax.Var, str] = {}
    taken: set[str] = set()
    for number, var in enumerate(values):
        name = var.name if var.name not in taken else f"{var.name}.{number}"
        taken.add(name)
        names[var] = name
    return names


def _op(name: str) -> Any:
    return tvm.ir.Op.get(f"relax.{name}")
