"""Find what a ternary matmul can do to its result before storing it: add a bias, apply an activation, add a residual.

Before: ``reshape(add(reshape(gelu(add(matmul(x, W), bias))), residual))`` as separate operators, perhaps with fewer of
them, and with reshapes between. After: one `Product` that stands for all of it, which `ternarize` turns into one call.

An operator joins only if nothing but the operators that join after it reads what it reads: no value is computed twice
and none that somebody else needs is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

import tvm
from tvm import relax
from tvm_ffi import structural_equal

from tvm_ternary.graph.activations import VARIABLE, activation_of, formula_of
from tvm_ternary.graph.passes.dataflow import Dataflow
from tvm_ternary.kernels.matmul import Epilogue


@dataclass(frozen=True)
class Product:
    """A multiplication by a matrix and what is done to its result: activation(x W + bias) + residual.

    Attributes
    ----------
    matrix : str
        Name of the parameter W (K, N).
    x : relax.Expr
        (..., K).
    result : relax.Var
        The variable that holds all of it; its elements are those of (..., N) in order, in any shape.
    bias : relax.Expr, optional
        A constant (N,) float32.
    activation : str, optional
        A key of `kernels.matmul.EPILOGUES`.
    residual : relax.Expr, optional
        Of the result's shape.
    inner : frozenset of relax.Var
        The variables on the way, which nobody else reads.
    """

    matrix: str
    x: relax.Expr
    result: relax.Var
    bias: relax.Expr | None = None
    activation: str | None = None
    residual: relax.Expr | None = None
    inner: frozenset[relax.Var] = field(default=frozenset())

    @property
    def epilogue(self) -> Epilogue:
        """What the kernel is asked for."""
        return Epilogue(self.bias is not None, self.activation, self.residual is not None)

    def grown(self, result: relax.Var, between: Collection[relax.Var]) -> Product:
        """The same up to a later result."""
        return replace(self, result=result, inner=self.inner | {self.result, *between})


def fuse_epilogues(main: relax.Function, matrices: Collection[str]) -> list[Product]:
    """Find the products by some matrices, each with as much of its epilogue as is there.

    Parameters
    ----------
    main : relax.Function
    matrices : collection of str
        Names of parameters of ``main``.

    Returns
    -------
    list of Product
        In the order of their multiplications. No variable is a result or inner variable of two.
    """
    return _Finder(main).find(matrices)


class _Finder(Dataflow):
    """What is spoken for, beside who computes and who reads it."""

    def __init__(self, main: relax.Function) -> None:
        super().__init__(main)
        self.params = set(main.params)
        self.order = {var: number for number, var in enumerate(self.calls)}
        self.taken: set[relax.Var] = set()

    def find(self, matrices: Collection[str]) -> list[Product]:
        products = []
        for var, call in self.calls.items():
            if call.op != _op("matmul") or call.args[1] not in self.params or call.args[1].name not in matrices:
                continue
            product = Product(call.args[1].name, call.args[0], var)
            steps: tuple[Callable[[Product], Product | None], ...] = (self._bias, self._activation, self._residual)
            for step in steps:
                product = step(product) or product
            self.taken |= product.inner | {product.result}
            products.append(product)
        return products

    def _bias(self, product: Product) -> Product | None:
        views = self._views(product.result)
        total, other = self._addition(views[-1])
        if total is None or not isinstance(other, tvm.ir.GenericConst) or other.ty.dtype != "float32":
            return None
        # A vector of another length is added to something that a reshape made of the columns.
        columns = _dims(views[0])[-1:]
        if not _has_shape(other, columns) or not structural_equal(_dims(views[-1])[-1:], columns):
            return None
        return replace(product.grown(total, views), bias=other)

    def _residual(self, product: Product) -> Product | None:
        views = self._views(product.result)
        total, other = self._addition(views[-1])
        if total is None or total in self.taken or not _has_shape(other, _dims(views[-1])):
            return None
        return replace(product.grown(total, views), residual=other)

    def _activation(self, product: Product) -> Product | None:
        """Follow all readers in the program's order until one is left through which everything goes."""
        views = self._views(product.result)
        formulas = {views[-1]: VARIABLE}
        ahead = set(self.readers[views[-1]])
        while ahead:
            var = min(ahead, key=lambda var: self.order.get(var, len(self.order)))
            ahead.remove(var)
            formula = formula_of(self.calls[var], formulas) if var in self.calls else None
            if formula is None:
                return None
            name = activation_of(formula)
            if name is not None and not ahead and _has_shape(var, _dims(views[-1])):
                return replace(product.grown(var, [*views, *formulas]), activation=name)
            formulas[var] = formula
            ahead |= self.readers[var]
        return None

    def _views(self, var: relax.Var) -> list[relax.Var]:
        """The variable, and reshapes of it as long as each is all that becomes of the one before."""
        views = [var]
        while (reader := self.only_reader(views[-1])) is not None and self._is_view(reader):
            views.append(reader)
        return views

    def _is_view(self, var: relax.Var) -> bool:
        return self.calls[var].op == _op("reshape") and isinstance(var.ty.shape, relax.ShapeExpr)

    def _addition(self, var: relax.Var) -> tuple[relax.Var | None, relax.Expr | None]:
        """The sum of a variable and another value, if that is all that becomes of it, and the other value."""
        total = self.only_reader(var)
        if total is None or self.calls[total].op != _op("add"):
            return None, None
        left, right = self.calls[total].args
        # Twice itself is a sum whose other value is gone once this one is.
        return (None, None) if left == right else (total, right if left == var else left)


def _dims(var: relax.Var) -> list[Any]:
    return list(var.ty.shape.values)


def _has_shape(expr: relax.Expr, dims: list[Any]) -> bool:
    """Whether its shape is known, and that one, symbols included."""
    return isinstance(expr.ty.shape, relax.ShapeExpr) and structural_equal(_dims(expr), dims)


def _op(name: str) -> tvm.ir.Op:
    return tvm.ir.Op.get(f"relax.{name}")
