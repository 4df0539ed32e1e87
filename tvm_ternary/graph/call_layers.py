"""Whose weights each call of a compiled model reads, so that a profile can tell the layers apart.

Equal layers share a function, and a library's constants have no names. But calls of one function keep their order from
here to the virtual machine: the n-th call of a run is the n-th one of ``main``.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import tvm
from tvm import relax


def call_layers(
    module: tvm.IRModule, constants: Mapping[int, str], layers: Container[str]
) -> dict[str, tuple[str, ...]]:
    """Name the layers of the calls.

    Parameters
    ----------
    module : tvm.IRModule
        Scheduled: ``main`` calls TensorIR functions.
    constants : mapping of int to str
        Where the data of a bound parameter lie, and its name.
    layers : container of str
        Matrices and tables that became several parameters, ``NAME.codes``, ``NAME.scale`` and so on.

    Returns
    -------
    dict of str to tuple of str
        For each function, the layer of its first call, of its second, and so on; empty where a call reads no weight
        that has a name. A function that is also called in a branch is left out: whether it is, is not known here.
    """
    main = module["main"]
    parameters = {var: var.name for var in main.params[int(main.attrs["num_input"]) :]}
    found: dict[str, list[str]] = {}
    branched: set[str] = set()

    def layer_of(argument: Any) -> str:
        if isinstance(argument, tvm.ir.GenericConst):
            name = constants.get(argument.value.data_ptr(), "")
        else:
            name = parameters.get(argument, "") if isinstance(argument, relax.Var) else ""
        owner = name.rpartition(".")[0]
        return owner if owner in layers else name

    for block in main.body.blocks:
        for binding in block.bindings:
            if isinstance(binding.value, relax.If):
                branched.update(_called(binding.value))
            elif (name := _function(binding.value)) is not None:
                arguments = binding.value.args[1]
                names = map(layer_of, arguments.fields if isinstance(arguments, relax.Tuple) else [arguments])
                found.setdefault(name, []).append(next(filter(None, names), ""))
    return {name: tuple(layers) for name, layers in found.items() if name not in branched}


def _function(expr: Any) -> str | None:
    """The TensorIR function that an expression calls."""
    if isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op) and expr.op.name.startswith("relax.call_tir"):
        return str(expr.args[0].name_hint)
    return None


def _called(expr: Any) -> set[str]:
    names: set[str | None] = set()
    relax.analysis.post_order_visit(expr, lambda part: names.add(_function(part)))
    return {name for name in names if name is not None}
