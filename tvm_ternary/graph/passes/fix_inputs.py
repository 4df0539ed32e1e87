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
from tvm_ternary.graph.onnx.given_dimensions import resolve_dimensions
from tvm_ternary.runtime.linear import Linear
from tvm_ternary.runtime.manifest import TensorSpec


def fix_inputs(
    model: ImportedModel, dims: Mapping[str, int | str] | None = None, constants: Mapping[str, Any] | None = None
) -> ImportedModel:
    """Give symbolic dimensions a value, or say what they are equal to, and make constants of inputs.

    Parameters
    ----------
    model : ImportedModel
        Whose dimensions are numbers and names.
    dims : mapping of str to int or str, optional
        By name, as `resolve_dimensions` takes it.
    constants : mapping, optional
        By input, a single number, which fills it whatever its shape, or an array, which fixes its dimensions.

    Raises
    ------
    OptionError
        If there is no such dimension or input, or a size is not positive or larger than the model allows; or what is
        said of a dimension makes no size.
    InputError
        If a constant does not have the input's dtype and shape.
    """
    known = {spec.name: spec for spec in model.inputs}
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, value in (constants or {}).items():
        if name not in known:
            raise OptionError(f"constant {name}", "the model has no such input", f"it has {', '.join(known)}")
        arrays[name] = _array(known[name], value)
    sizes = _sizes(model, dims or {}, [(known[name], array) for name, array in arrays.items()])
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
    model: ImportedModel, dims: Mapping[str, int | str], arrays: list[tuple[TensorSpec, npt.NDArray[Any]]]
) -> dict[str, int | Linear]:
    """What each named dimension is to be: a number, or arithmetic over those that stay."""
    known = list(dict.fromkeys(dim for spec in model.inputs for dim in spec.shape if isinstance(dim, str)))
    sizes: dict[str, int | Linear] = {name: Linear({name: 1}) for name in known}
    sizes |= resolve_dimensions(dims, known)
    for spec, array in arrays:
        for dim, size in zip(spec.shape, array.shape, strict=False):
            wanted = sizes[dim] if isinstance(dim, str) else dim
            if isinstance(wanted, Linear) and (solved := wanted.solve(size)) is not None:
                (name,) = wanted.factors
                sizes = {key: one.put({name: solved}) if isinstance(one, Linear) else one for key, one in sizes.items()}
            elif wanted != size:
                raise InputError(spec.name, f"its constant has {size} elements along {dim}, expected {wanted}")
    for name, size in sizes.items():
        most = model.bounds.get(name)
        if isinstance(size, int) and not 1 <= size <= (most or size):
            raise OptionError(f"dimension {name}", f"got {size}, expected {f'1 to {most}' if most else 'at least 1'}")
    return {name: size for name, size in sizes.items() if not isinstance(size, Linear) or size.name != name}


def _bounds(bounds: Mapping[str, int], sizes: Mapping[str, int | Linear]) -> dict[str, int]:
    """A bound of a dimension is one of what it is equal to, or a multiple of."""
    result: dict[str, int] = {}
    for name, most in bounds.items():
        size = sizes.get(name, Linear({name: 1}))
        if isinstance(size, int):
            continue
        ((end, factor), *others) = size.factors.items()
        largest = (most - size.offset) // factor
        if others or factor < 1 or largest < 1:
            problem = f"is given as {size}, expected at most {most} for all sizes from 1 on"
            raise OptionError(f"dimension {name}", problem, "give a number, or a multiple of one dimension")
        result[end] = min(largest, result.get(end, largest))
    return result


def _with_sizes(module: tvm.IRModule, sizes: Mapping[str, int | Linear]) -> tvm.IRModule:
    if not sizes:
        return module
    main = module["main"]
    variables = {var.name: var for param in main.params for var in relax.analysis.defined_symbolic_vars(_only(param))}
    named = [part for size in sizes.values() if isinstance(size, Linear) for part in size.factors]
    ends = {name: variables[name] if name in variables else tirx.Var(name, "int64") for name in {*named}}
    values = {
        variables[name]: size.value(ends) if isinstance(size, Linear) else tirx.const(size, "int64")
        for name, size in sizes.items()
    }
    result = module.clone()
    # TVM binds to names that a parameter defines only, if it is one that goes again.
    new = relax.Var("new", relax.ShapeType([ends[name] for name in sorted(ends.keys() - variables.keys())]))
    bound = relax.Function([*main.params, new], main.body, main.ret_ty, main.is_pure, main.attrs)
    bound = bound.bind_symbolic_vars(values)
    result["main"] = relax.Function(bound.params[:-1], bound.body, bound.ret_ty, bound.is_pure, bound.attrs)
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
