"""Fix dimensions and inputs of an imported model.

Before: ``main(input_ids: [batch, sequence], token_type_ids: [batch, sequence], ...)``. After, with ``batch`` 1 and
``token_type_ids`` 0: ``main(input_ids: [1, sequence], ...)``, which fills the other input itself. ONNX models do not
come here: their importer decides more when it knows before it walks the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax, tirx
from tvm.relax import op as R

from tvm_ternary.errors import InputError, OptionError
from tvm_ternary.graph.importer import ImportedModel, tensor_spec
from tvm_ternary.runtime.manifest import TensorSpec


def fix_inputs(
    model: ImportedModel, dims: Mapping[str, int | str] | None = None, constants: Mapping[str, Any] | None = None
) -> ImportedModel:
    """Give symbolic dimensions a value, or say that two are the same, and make constants of inputs.

    Parameters
    ----------
    model : ImportedModel
        Whose dimensions are numbers and names.
    dims : mapping of str to int or str, optional
        By name, a value of at least 1 or the name of the dimension it is equal to.
    constants : mapping, optional
        By input, a single number, which fills it whatever its shape, or an array, which fixes its dimensions.

    Raises
    ------
    OptionError
        If there is no such dimension or input, or a size is not positive or larger than the model allows.
    InputError
        If a constant does not have the input's dtype and shape.
    """
    known = {spec.name: spec for spec in model.inputs}
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, value in (constants or {}).items():
        if name not in known:
            raise OptionError(f"constant {name}", "the model has no such input", f"it has {', '.join(known)}")
        arrays[name] = _array(known[name], value)
    sizes = _sizes(model, {**(dims or {})}, [(known[name], array) for name, array in arrays.items()])
    if not sizes and not arrays:
        return model
    module = _without(_with_sizes(model.module, sizes), arrays)
    main = module["main"]
    count = int(main.attrs["num_input"])
    returned = main.body.body.ty.fields
    outputs = [
        tensor_spec(spec.name, relax.Var(spec.name, ty)) for spec, ty in zip(model.outputs, returned, strict=True)
    ]
    return replace(
        model,
        module=module,
        inputs=tuple(tensor_spec(var.name, var) for var in main.params[:count]),
        outputs=tuple(outputs),
        bounds=_bounds(model.bounds, sizes),
    )


def _array(spec: TensorSpec, value: Any) -> npt.NDArray[Any]:
    try:
        given = np.asarray(value)
        array = given.astype(spec.dtype)
        fits = spec.dtype.startswith("float") or np.array_equal(array, given)
    except (ValueError, TypeError, OverflowError):
        fits = False
    if not fits:
        raise InputError(spec.name, f"got a constant {value!r}, expected {spec.dtype}")
    if array.ndim not in (0, len(spec.shape)):
        expected = f"a number or {list(spec.shape)}"
        raise InputError(spec.name, f"got a constant of shape {list(array.shape)}, expected {expected}")
    return array


def _sizes(
    model: ImportedModel, dims: dict[str, int | str], arrays: list[tuple[TensorSpec, npt.NDArray[Any]]]
) -> dict[str, int | str]:
    """What each named dimension is to be: a number, or the name of one that stays."""
    known = list(dict.fromkeys(dim for spec in model.inputs for dim in spec.shape if isinstance(dim, str)))
    for name in [*dims, *(size for size in dims.values() if isinstance(size, str))]:
        if name not in known:
            hint = f"it has {', '.join(known) or 'none'}"
            raise OptionError(f"dimension {name}", "the model has no such symbolic dimension", hint)
    sizes = {name: _end_of(name, dims) for name in dims}
    for spec, array in arrays:
        for dim, size in zip(spec.shape, array.shape, strict=False):
            wanted = sizes.get(dim, dim) if isinstance(dim, str) else dim
            if isinstance(wanted, int) and wanted != size:
                raise InputError(spec.name, f"its constant has {size} elements along {dim}, expected {wanted}")
            if isinstance(wanted, str):
                sizes |= dict.fromkeys([wanted, *(name for name, end in sizes.items() if end == wanted)], size)
    for name, size in sizes.items():
        most = model.bounds.get(name)
        if isinstance(size, int) and not 1 <= size <= (most or size):
            raise OptionError(f"dimension {name}", f"got {size}, expected {f'1 to {most}' if most else 'at least 1'}")
    return {name: size for name, size in sizes.items() if size != name}


def _end_of(name: str, dims: Mapping[str, int | str]) -> int | str:
    """Follow names to a number or to a dimension that stays; one of a circle stays."""
    seen, size = [name], dims[name]
    while isinstance(size, str) and size in dims and size not in seen:
        seen.append(size)
        size = dims[size]
    return min(seen[seen.index(size) :]) if isinstance(size, str) and size in seen else size


def _bounds(bounds: Mapping[str, int], sizes: Mapping[str, int | str]) -> dict[str, int]:
    """A bound of a dimension is one of the dimension it is equal to."""
    result: dict[str, int] = {}
    for name, most in bounds.items():
        end = sizes.get(name, name)
        if isinstance(end, str):
            result[end] = min(most, result.get(end, most))
    return result


def _with_sizes(module: tvm.IRModule, sizes: Mapping[str, int | str]) -> tvm.IRModule:
    if not sizes:
        return module
    main = module["main"]
    variables = {var.name: var for param in main.params for var in relax.analysis.defined_symbolic_vars(_only(param))}
    values = {name: variables[end] if isinstance(end, str) else tirx.const(end, "int64") for name, end in sizes.items()}
    result = module.clone()
    result["main"] = main.bind_symbolic_vars({variables[name]: value for name, value in values.items()})
    return result


def _only(param: relax.Var) -> relax.Function:
    return relax.Function([param], param, param.ty)


def _without(module: tvm.IRModule, arrays: Mapping[str, npt.NDArray[Any]]) -> tvm.IRModule:
    return _Filler(module, arrays).run() if arrays else module


@relax.expr_functor.mutator
class _Filler(relax.PyExprMutator):
    """Puts constants in the place of inputs."""

    def __init__(self, module: tvm.IRModule, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        super().__init__(module)
        self.module, self.main = module, module["main"]
        self.arrays = {var: arrays[var.name] for var in self.main.params if var.name in arrays}
        self.filled: dict[relax.Var, relax.Expr] = {}

    def run(self) -> tvm.IRModule:
        body = self.visit_expr(self.main.body)
        params = [var for var in self.main.params if var not in self.arrays]
        count = int(self.main.attrs["num_input"]) - len(self.arrays)
        function = relax.Function(params, body, self.main.ret_ty, self.main.is_pure, self.main.attrs)
        result = self.module.clone()
        result["main"] = function.with_attr("num_input", count)
        return result

    def visit_var_(self, op: relax.Var) -> relax.Expr:
        if op not in self.arrays:
            return super().visit_var_(op)
        if op not in self.filled:
            array = self.arrays[op]
            value = relax.const(array, str(array.dtype))
            self.filled[op] = value if array.ndim else self.builder_.emit(R.full(op.ty.shape, value, str(array.dtype)))
        return self.filled[op]
