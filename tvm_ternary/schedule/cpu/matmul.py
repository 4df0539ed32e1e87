"""Float matrix multiplication: ``out[b, i, j] = epilogue(sum over k of A[b, i, k] * B[b, k, j])``.

The product is cut into tiles whose sums stay in vector registers while k runs. A panel of B, as wide as a tile, is
copied once into contiguous memory and serves every tile of rows. A ragged end is one more tile that overlaps the one
before it, so no tile needs a predicate; only matrices narrower than a panel are padded.

References
----------
Goto and van de Geijn, "Anatomy of high-performance matrix multiplication", ACM TOMS 34(3), 2008.
"""

from __future__ import annotations

from tvm.ir import TensorLoad
from tvm.tirx import Add, IfThenElse, Mul, PrimFunc, Stmt

from .epilogue import read_writer
from .fold import read_fold
from .nest import product, static
from .program import Program, uses
from .simd import Simd
from .tiles import Kernel, Matmul, runs_along

# Rows and vectors of a tile, for a vector unit of so many registers. As many sums as the latency of a multiply-add
# needs are under way; the tallest tile takes 24 (12) registers for them and leaves the rest for the panel and a
# broadcast of the first factor. With fewer rows a panel is read where it lies, in runs of its width: the wider the
# better.
TILES = {32: ((12, 2), (4, 4), (1, 8)), 16: ((6, 2), (3, 4), (1, 8))}


def read_matmul(program: Program) -> Matmul | None:
    """Find a float32 matrix product and at most one element-wise stage behind it.

    Parameters
    ----------
    program : Program

    Returns
    -------
    Matmul or None
    """
    product_stage = program.stages[0]
    fold = read_fold(product_stage)
    if fold is None or len(product_stage.reduced) != 1 or not product_stage.spatial:
        return None
    if str(fold.target.dtype) != "float32" or not isinstance(product_stage.body.value, Add):
        return None
    if not isinstance(fold.value, Mul):
        return None
    (inner,), (*lead, column) = product_stage.reduced, product_stage.spatial
    left, right = fold.value.a, fold.value.b
    if uses(left, column.var):
        left, right = right, left
    if uses(left, column.var) or not uses(right, column.var) or not isinstance(left, TensorLoad):
        return None
    if not uses(left, inner.var) or not uses(right, inner.var):
        return None
    write = read_writer(product_stage, program.stages[1:])
    if write is None:
        return None
    first_row = len(lead)
    while first_row > 0 and not uses(right, lead[first_row - 1].var):
        first_row -= 1
    if first_row == len(lead) and (lead or not runs_along(right, column)):
        # Nothing is used twice: many vectors each with a matrix of their own, or a matrix and a vector.
        return None
    return Matmul(tuple(lead[:first_row]), tuple(lead[first_row:]), column, inner, left, right, write)


def schedule_matmul(program: Program, simd: Simd) -> PrimFunc | None:
    """Tile a float32 matrix product for the vector registers of a CPU.

    Parameters
    ----------
    program : Program
    simd : Simd

    Returns
    -------
    PrimFunc or None
        None if the function is not a matrix product.
    """
    found = read_matmul(program)
    if found is None:
        return None
    height = product([axis.extent for axis in found.rows])
    tallest, middle, lowest = TILES[simd.registers]

    def nest(tile: tuple[int, int]) -> Stmt:
        copies = tile == tallest
        rows, vectors = tile
        return _by_width(found, simd.lanes("float32"), vectors, rows, middle[0] if copies else 0, copies=copies)

    known = static(height)
    choices = ((tallest[0], tallest), (middle[0], middle), (0, lowest))
    if known is not None:
        return program.with_nest(nest(next(tile for least, tile in choices if known >= least)))
    result = nest(lowest)
    for least, tile in reversed(choices[:-1]):
        result = IfThenElse(height >= least, nest(tile), result)
    return program.with_nest(result)


def _by_width(found: Matmul, lanes: int, vectors: int, rows: int, short: int, *, copies: bool) -> Stmt:
    """Panels of at most so many vectors, such that the last one overlaps little."""
    columns = found.column.extent
    known = static(columns)
    if known is None:
        kernel = Kernel(found, lanes, lanes * min(vectors, 2), rows, short, copies)
        return IfThenElse(columns >= kernel.width, kernel.wide(), kernel.narrow())
    widths = [count * lanes for count in range(1, vectors + 1) if count * lanes <= known] or [lanes]
    width = min(widths, key=lambda width: (-(-known // width) * width, -width))
    kernel = Kernel(found, lanes, width, rows, short, copies)
    return kernel.wide() if known >= width else kernel.narrow()
