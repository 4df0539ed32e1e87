"""Calls of the kernel that turns the last axis of a tensor by a Hadamard matrix."""

from __future__ import annotations

import tvm
from tvm import relax

from tvm_ternary.kernels.hadamard import hadamard_rows


class Rotations:
    """The functions that a builder's module has for it, one for each width and block.

    Parameters
    ----------
    builder : relax.BlockBuilder
    """

    def __init__(self, builder: relax.BlockBuilder) -> None:
        self.builder = builder
        self.functions: dict[tuple[int, int], tvm.ir.GlobalVar] = {}

    def rotate(self, x: relax.Expr, block: int) -> relax.Var:
        """Emit the rotation, in blocks of a power of two; what is behind the last whole one stays."""
        emit, shape, k = self.builder.emit, x.ty.shape, int(x.ty.shape.values[-1])
        if (k, block) not in self.functions:
            function = hadamard_rows(k, block).without_attr("global_symbol")
            self.functions[k, block] = self.builder.add_func(function, "hadamard_rows")
        rows = emit(relax.op.reshape(x, (-1, k)))
        rotated = emit(relax.call_tir(self.functions[k, block], [rows], rows.ty))
        return emit(relax.op.reshape(rotated, shape))

    def rotate_heads(self, x: relax.Expr, layout: str) -> relax.Expr:
        """Rotate every head, in blocks of `block_of`."""
        block = block_of(layout, int(x.ty.shape.values[layout.index("d")]))
        return self.rotate(x, block) if block > 1 else x


def block_of(layout: str, size: int) -> int:
    """How many elements of a head are rotated together: the largest power of two that divides its size.

    1, for none, where they do not lie together.
    """
    return size & -size if layout.endswith("d") else 1


def can_rotate(*layouts: str) -> bool:
    """Whether `Rotations.rotate_heads` does something with each of these layouts, or for all of them nothing."""
    return all(layout.endswith("d") for layout in layouts)
