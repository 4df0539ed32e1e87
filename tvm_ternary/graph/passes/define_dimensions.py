"""Find the dimensions that inputs are only multiples of.

Before: ``main(x: [batch, 3, rows * 32, columns * 32])``, as importers make it. After::

    main(x: [batch, 3, n, m]):
        [rows, columns] = tensor_to_shape(shape_to_tensor([n // 32, m // 32]))
        x = match_cast(x, [batch, 3, rows * 32, columns * 32])

TVM's virtual machine reads a dimension off a tensor only where it stands alone. Where 32 does not divide, the cast
fails.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.relax import op as R
from tvm.sym import Analyzer, detect_linear_equation
from tvm.tirx.analysis import undefined_vars

from tvm_ternary.graph.passes.dataflow import dims_of


@dataclass(frozen=True)
class Place:
    """Where a dimension is read off: an axis of an input, of length ``factor`` times it plus ``offset``."""

    input: int
    axis: int
    factor: int = 1
    offset: int = 0

    def size(self, length: Any) -> Any:
        """The dimension for an axis of this length, a number or an expression."""
        return (length - self.offset) // self.factor


def find_places(inputs: Sequence[relax.Var]) -> dict[tirx.Var, Place]:
    """Each symbolic dimension of some inputs and where it is read off, alone if it stands so anywhere."""
    alone: dict[tirx.Var, Place] = {}
    multiples: dict[tirx.Var, Place] = {}
    for number, var in enumerate(inputs):
        for axis, dim in enumerate(dims_of(var) or []):
            names = undefined_vars(dim)
            if isinstance(dim, tirx.Var):
                alone.setdefault(dim, Place(number, axis))
            elif len(names) == 1 and (parts := detect_linear_equation(dim, names)):
                multiples.setdefault(names[0], Place(number, axis, *map(int, parts)))
    return multiples | alone


def define_dimensions(module: tvm.IRModule) -> tvm.IRModule:
    """Compute the dimensions of ``main`` that no input has alone.

    Parameters
    ----------
    module : tvm.IRModule
        Whose ``main`` carries ``num_input``.

    Returns
    -------
    tvm.IRModule
        The same where there is no such dimension.
    """
    main = module["main"]
    inputs = list(main.params[: int(main.attrs["num_input"])])
    places = {symbol: place for symbol, place in find_places(inputs).items() if place.factor != 1 or place.offset}
    if not places:
        return module
    opened = {var: _opened(var, places) for var in inputs if any(_has(dim, places) for dim in dims_of(var) or [])}
    lengths = [opened[inputs[place.input]].ty.shape.values[place.axis] for place in places.values()]
    sizes = [Analyzer().simplify(place.size(n)) for place, n in zip(places.values(), lengths, strict=True)]
    # What was a parameter is bound in the body, which stays as it is.
    casts = [relax.MatchCast(var, param, var.ty) for var, param in opened.items()]
    first, *others = main.body.blocks
    block = relax.DataflowBlock([*_found(list(places), sizes), *casts, *first.bindings])
    body = relax.SeqExpr([block, *others], main.body.body)
    params = [opened.get(var, var) for var in main.params]
    result = module.clone()
    defined = {symbol: symbol for var in params for symbol in relax.analysis.definable_tir_vars_in_type(var.ty)}
    returned = relax.analysis.erase_to_well_defined(main.ret_ty, defined)
    result["main"] = relax.Function(params, body, returned, main.is_pure, main.attrs)
    return result


def _found(symbols: Sequence[tirx.Var], sizes: Sequence[Any]) -> list[relax.Binding]:
    """Bind dimensions to their sizes, by way of a tensor: TVM would put ``n // 32`` back in the place of ``rows``."""
    count = len(symbols)
    tensor = relax.DataflowVar("sizes", relax.TensorType([count], "int64"))
    shape = relax.DataflowVar("dimensions", relax.ShapeType(ndim=count))
    named = relax.ShapeType(list(symbols))
    return [
        relax.VarBinding(tensor, R.shape_to_tensor(relax.ShapeExpr(sizes))),
        relax.VarBinding(shape, R.tensor_to_shape(tensor)),
        relax.MatchCast(relax.DataflowVar("named", named), shape, named),
    ]


def _has(dim: Any, symbols: Container[tirx.Var]) -> bool:
    return any(symbol in symbols for symbol in undefined_vars(dim))


def _opened(var: relax.Var, symbols: Container[tirx.Var]) -> relax.Var:
    """An input with a variable for every length that depends on what is looked for."""
    dims = [
        tirx.Var(f"{var.name}_dim_{axis}", "int64") if _has(dim, symbols) else dim
        for axis, dim in enumerate(var.ty.shape.values)
    ]
    return relax.Var(var.name, relax.TensorType(dims, var.ty.dtype))
