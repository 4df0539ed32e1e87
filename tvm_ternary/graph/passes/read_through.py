"""Let the matrix products of a GPU read factors where they lay before something only moved them.

Before: ``matmul(transpose(q), transpose(k))``, a function each, since operators that move data are not fused into those
that read them. After: one function, in which the product's own reads follow the moves. Attention has three such moves a
layer, of which each is a kernel and two ways through memory.

It is for GPUs only: there a factor goes through shared memory anyway, in slices that are filled by whatever order of
reads suits the source.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm import relax, tirx
from tvm.ir import GlobalVar, IRModule, Op, TensorLoad

from tvm_ternary.graph.fuse import SCHEDULED
from tvm_ternary.schedule.cpu.inline import read_program
from tvm_ternary.schedule.cuda.graph_matmul import reads_side_by_side

CALL_TIR = Op.get("relax.call_tir")


def read_through(mod: IRModule) -> IRModule:
    """Merge functions that only move data into the matrix products that read the result.

    Parameters
    ----------
    mod : IRModule
        As `lower_graph_ops` leaves it.

    Returns
    -------
    IRModule
        With a move merged where neighbouring threads of the product still read neighbouring elements.
    """
    merger = _Merger(mod)
    main = merger.visit_expr(mod["main"])
    # The builder still holds the module that it was given.
    result = merger.builder_.get().clone()
    result[result.get_global_var("main")] = main
    return relax.transform.DeadCodeElimination()(result)


@relax.expr_functor.mutator
class _Merger(relax.PyExprMutator):
    """Rewrites ``main``; equal products share one function."""

    def __init__(self, mod: IRModule) -> None:
        super().__init__(mod)
        self.merged: dict[tuple[GlobalVar | None, ...], tuple[GlobalVar, tuple[int, ...]]] = {}

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        product = self._called(call)
        if product is None or not _is_product(product):
            return call
        arguments = list(call.args[1].fields)
        moves = [self._move(argument) for argument in arguments]
        key = (call.args[0], *(None if move is None else move.args[0] for move in moves))
        if key not in self.merged:
            self.merged[key] = self._merge(call, product, moves)
        function, positions = self.merged[key]
        if not positions:
            return call
        for position in positions:
            move = moves[position]
            assert move is not None
            arguments[position] = move.args[1].fields[0]
        return relax.call_tir(function, arguments, call.ty_args[0])

    def _move(self, argument: relax.Expr) -> relax.Call | None:
        """The call that made an argument, if all it does is to store elements of its one input as they are."""
        value = self.lookup_binding(argument) if isinstance(argument, relax.Var) else None
        func = self._called(value)
        # One input and one output.
        program = None if func is None or len(func.params) != 2 else read_program(func)
        if program is None or len(program.stages) != 1:
            return None
        stage = program.stages[0]
        return value if stage.is_map and isinstance(stage.body.value, TensorLoad) else None

    def _called(self, value: relax.Expr | None) -> tirx.PrimFunc | None:
        """The function that is called, if it can still be merged with another one."""
        # A third argument holds sizes that the shapes of the tensors do not tell.
        if not isinstance(value, relax.Call) or value.op != CALL_TIR or len(value.args) != 2:
            return None
        func = self.builder_.get()[value.args[0]]
        return None if func.attrs.get(SCHEDULED, False) else func

    def _merge(
        self, call: relax.Call, product: tirx.PrimFunc, moves: Sequence[relax.Call | None]
    ) -> tuple[GlobalVar, tuple[int, ...]]:
        """The product with as many of the moves in it as do good, and at which arguments they were."""
        arguments, positions = list(call.args[1].fields), list[int]()
        for position, move in enumerate(moves):
            if move is None:
                continue
            read = [*arguments[:position], move.args[1].fields[0], *arguments[position + 1 :]]
            func = _fuse(product, self.builder_.get()[move.args[0]], position, read, (call, move))
            if reads_side_by_side(func):
                product, arguments = func, read
                positions.append(position)
        if not positions:
            return call.args[0], ()
        return self.builder_.add_func(product, f"{call.args[0].name_hint}_moved"), tuple(positions)


def _is_product(func: tirx.PrimFunc) -> bool:
    program = read_program(func)
    return program is not None and bool(program.stages[0].reduced)


def _fuse(
    product: tirx.PrimFunc,
    mover: tirx.PrimFunc,
    position: int,
    arguments: Sequence[relax.Expr],
    calls: tuple[relax.Call, relax.Call],
) -> tirx.PrimFunc:
    """One function of a product and the move that makes its argument at one position, as two calls say their types."""
    builder = relax.BlockBuilder()
    multiply, move = builder.add_func(product, "product"), builder.add_func(mover, "move")
    result_type, moved_type = (call.ty_args[0] for call in calls)
    params = [relax.Var(f"x{number}", argument.ty) for number, argument in enumerate(arguments)]
    with builder.function("both", params, attrs={"Primitive": True}, private=True):
        with builder.dataflow():
            moved = builder.emit(relax.call_tir(move, [params[position]], moved_type))
            inputs = [*params[:position], moved, *params[position + 1 :]]
            result = builder.emit_output(relax.call_tir(multiply, inputs, result_type))
        builder.emit_func_output(result)
    both = builder.get().get_global_var("both")
    params = [relax.Var(f"x{number}", argument.ty) for number, argument in enumerate(arguments)]
    with builder.function("main", params):
        with builder.dataflow():
            result = builder.emit_output(relax.Call(both, params))
        builder.emit_func_output(result)
    return relax.transform.FuseTIR()(builder.get())["both"].without_attr("global_symbol")
