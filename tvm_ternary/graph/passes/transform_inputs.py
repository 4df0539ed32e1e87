"""Scale and rotate the inputs of matrices that were fitted for such inputs.

Before: ``matmul(x, W)``. After: ``matmul(rotate(x * scale), W)``; matrices that read the same x by the same transform
share it. Where everything that reads a normalized x has the same scale, the scale goes into the constants of the norm
and costs nothing; it may also be spelled as a product with a constant, with a constant added behind it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Op

from tvm_ternary.errors import LayoutError
from tvm_ternary.formats.hadamard import hadamard_matrix
from tvm_ternary.formats.transform import InputTransform
from tvm_ternary.graph.passes.dataflow import Dataflow, with_main
from tvm_ternary.graph.passes.rotate import Rotations
from tvm_ternary.target import Target

MATMUL, RESHAPE, MULTIPLY, ADD = (Op.get(f"relax.{name}") for name in ("matmul", "reshape", "multiply", "add"))
NORMS = (Op.get("relax.nn.layer_norm"), Op.get("relax.nn.rms_norm"))


def transform_inputs(module: tvm.IRModule, transforms: Mapping[str, InputTransform], target: Target) -> tvm.IRModule:
    """Insert the transforms.

    Parameters
    ----------
    module : tvm.IRModule
        As the importer made it: every multiplication by a matrix is ``matmul`` by a parameter of ``main``.
    transforms : mapping of matrix name to InputTransform
        The values of these matrices have to be for transformed inputs (`InputTransform.weight`).
    target : Target
        On CPUs a rotation is a kernel of its own; on GPUs a product or two with small constant matrices.

    Raises
    ------
    LayoutError
        If a scale is not as long as its matrix is deep.
    """
    transforms = {name: transform for name, transform in transforms.items() if not transform.is_identity}
    for var in module["main"].params:
        scale = transforms[var.name].scale if var.name in transforms else None
        if scale is not None and len(scale) != int(var.ty.shape.values[0]):
            problem = f"input scale has {len(scale)} elements, in_features is {int(var.ty.shape.values[0])}"
            raise LayoutError(var.name, problem)
    return _Rewriter(module, transforms, target).run() if transforms else module


class _Folding(Dataflow):
    """Finds the constants that can take scales along.

    Attributes
    ----------
    constants : dict of relax.Var to (K,) float32
        For each variable, what the constants of the operator that makes it are to be multiplied by.
    scaled : set of relax.Var
        Inputs of matrices that are scaled by then.
    """

    def __init__(self, main: relax.Function, transforms: Mapping[str, InputTransform]) -> None:
        super().__init__(main)
        self.transforms, self.params = transforms, set(main.params)
        self.constants: dict[relax.Var, np.ndarray] = {}
        self.scaled: set[relax.Var] = set()
        for call in self.calls.values():
            transform = self.transform_of(call)
            if transform is not None and transform.scale is not None and self._fold(call.args[0], transform.scale):
                self.scaled.add(call.args[0])

    def transform_of(self, call: relax.Call) -> InputTransform | None:
        """The transform of what a product multiplies by its matrix; None for anything else."""
        if call.op != MATMUL or call.args[1] not in self.params:
            return None
        return self.transforms.get(call.args[1].name)

    def _fold(self, x: relax.Expr, scale: np.ndarray) -> bool:
        """Note what has to change for x to come scaled; whether that can be."""
        if x not in self.calls or not self._all_want(x, scale):
            return False
        call = self.calls[x]
        if _keeps_last(call):
            return self._fold(call.args[0], scale)
        if call.op not in (MULTIPLY, ADD, *NORMS) or not _has_constants(call, len(scale)):
            return False
        if call.op == ADD:
            (product,) = (part for part in call.args if not isinstance(part, tvm.ir.GenericConst))
            made = self.calls.get(product)
            if made is None or made.op not in (MULTIPLY, *NORMS) or self.readers[product] != {x}:
                return False
            if not _has_constants(made, len(scale)):
                return False
            self.constants[product] = scale
        self.constants[x] = scale
        return True

    def _all_want(self, x: relax.Var, scale: np.ndarray) -> bool:
        """Whether all that reads x are products that want it scaled so."""

        def wants(reader: relax.Var) -> bool:
            call = self.calls.get(reader)
            if call is None:
                return False
            if _keeps_last(call):
                return self._all_want(reader, scale)
            transform = self.transform_of(call)
            return transform is not None and transform.scale is not None and np.array_equal(transform.scale, scale)

        return all(map(wants, self.readers[x]))


def _has_constants(call: relax.Call, k: int) -> bool:
    """Whether a vector of K along its last axis is an operator's one constant, or a norm's only ones."""
    vectors = [_is_vector(part, k) for part in call.args]
    if call.op in NORMS:
        last = [int(axis) % call.ty.ndim for axis in call.attrs.axes] == [call.ty.ndim - 1]
        return last and all(vectors[1:])
    return sum(vectors) == 1


def _is_vector(part: relax.Expr, k: int) -> bool:
    shape = tuple(map(int, part.value.shape)) if isinstance(part, tvm.ir.GenericConst) else ()
    return bool(shape) and shape[-1] == k and set(shape[:-1]) <= {1}


def _keeps_last(call: relax.Call) -> bool:
    """Whether it is a reshape that leaves the last axis as it is."""
    if call.op != RESHAPE:
        return False
    before, after = call.args[0].ty.shape.values, call.ty.shape.values
    return bool(before) and bool(after) and tvm.sym.Analyzer().can_prove_equal(before[-1], after[-1])


@relax.expr_functor.mutator
class _Rewriter(relax.PyExprMutator):
    def __init__(self, module: tvm.IRModule, transforms: Mapping[str, InputTransform], target: Target) -> None:
        super().__init__(module)
        self.main, self.on_gpu = module["main"], target.kind == "cuda"
        self.folding = _Folding(self.main, transforms)
        self.transformed: dict[tuple[relax.Expr, object], relax.Expr] = {}
        self.rotations = Rotations(self.builder_)

    def run(self) -> tvm.IRModule:
        return with_main(self.builder_, self.visit_expr(self.main))

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        scale = self.folding.constants.get(binding.var)
        if scale is None:
            super().visit_var_binding_(binding)
            return
        call = binding.value
        arguments = [
            relax.const(part.value.numpy() * scale) if isinstance(part, tvm.ir.GenericConst) else self.visit_expr(part)
            for part in call.args
        ]
        self.set_var_remap(binding.var, self.builder_.emit(relax.Call(call.op, arguments, call.attrs)))

    def visit_call_(self, op: relax.Call) -> relax.Expr:
        transform = self.folding.transform_of(op)
        if transform is None:
            return super().visit_call_(op)
        x, matrix = (self.visit_expr(part) for part in op.args)
        key = (x, transform.key)
        if key not in self.transformed:
            scale = None if op.args[0] in self.folding.scaled else transform.scale
            self.transformed[key] = self._transform(x, scale, transform.rotation)
        return relax.Call(op.op, [self.transformed[key], matrix], op.attrs)

    def _transform(self, x: relax.Expr, scale: np.ndarray | None, rotation: int | None) -> relax.Expr:
        if scale is not None:
            x = self.builder_.emit(relax.op.multiply(x, relax.const(scale)))
        if rotation is None or int(x.ty.shape.values[-1]) < rotation:
            return x
        return self._by_products(x, rotation) if self.on_gpu else self.rotations.rotate(x, rotation)

    def _by_products(self, x: relax.Expr, block: int) -> relax.Expr:
        """A block as a matrix whose columns and rows are rotated; H of b c is the Kronecker product of H of b and c."""
        emit, shape, last = self.builder_.emit, x.ty.shape, x.ty.ndim - 1
        k = int(shape.values[last])
        whole = k - k % block
        columns = 1 << (block.bit_length() // 2)
        head = x if whole == k else emit(relax.op.strided_slice(x, [last], [0], [whole]))
        blocks = emit(relax.op.reshape(head, (-1, block // columns, columns)))
        blocks = emit(relax.op.matmul(blocks, _constant(columns)))
        if columns < block:
            blocks = emit(relax.op.matmul(_constant(block // columns), blocks))
        head = emit(relax.op.reshape(blocks, [*list(shape.values)[:last], whole]))
        if whole == k:
            return head
        return emit(relax.op.concat([head, emit(relax.op.strided_slice(x, [last], [whole], [k]))], last))


def _constant(size: int) -> relax.Expr:
    return relax.const(hadamard_matrix(size).astype(np.float32))
