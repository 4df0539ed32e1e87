"""A float matrix to a ternary tensor."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.errors import LayoutError, ModelError, OptionError
from tvm_ternary.formats.factors import with_shared_scales
from tvm_ternary.formats.granularity import Granularity, PerTensor, row_blocks
from tvm_ternary.formats.planes import pack_planes, plane_words
from tvm_ternary.formats.scheme import SHARED_SCALES, Scheme
from tvm_ternary.formats.ternary import TernaryTensor
from tvm_ternary.quantize.exact import recognise
from tvm_ternary.quantize.methods import Floats, Result, find_method
from tvm_ternary.quantize.stack import stack_planes


def quantize(
    array: npt.ArrayLike, scheme: str | Scheme, method: str = "twn", *, name: str = "array", **options: float
) -> TernaryTensor:
    """Turn a float matrix into trit planes and scales.

    A matrix that is ternary at the scheme's granularity already (or at a coarser one, which implies it) comes back
    bit-exact with one plane, whatever the method. Any other is split greedily: each plane is the method applied to what
    the planes before it left over. With two planes or more, the scales of each group are then fitted together, where
    that lowers the squared error; a single plane keeps the scale that its method defines.

    Works on blocks of rows, so that temporaries stay within tens of MiB; with `PerTensor`, whose one group is the
    matrix, they take about 9 bytes a weight and 3 more for each further plane.

    Parameters
    ----------
    array : (N, K) array_like, float or integer
        Rounded to float32 first.
    scheme : str or Scheme
        For example ``"t2a8g128"``. With int8 activations, the scales of several planes are moved to the nearest ones
        with whole ratios (`formats.share_scales`), which the kernels multiply as integers.
    method : str
        A key of `METHODS`.
    name : str
        What errors call the matrix.
    **options
        The method's own, for example ``fraction`` of `absmax`.

    Returns
    -------
    TernaryTensor
        With the scheme's granularity, and its number of planes or one.

    Raises
    ------
    OptionError
        If the scheme, the method or an option does not exist, or an option's value is out of range.
    ModelError
        If the array is not a numeric matrix, or an element is NaN, infinite or beyond float32; the first is named.

    References
    ----------
    Kundu et al., "Ternary Residual Networks", arXiv:1707.04679, for planes that ternarize the residual; Guo et al.,
    "Network Sketching", arXiv:1706.02021, for the joint fit.
    """
    scheme = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    ternarize = _bind(method, options)
    matrix = np.asarray(array)
    check_matrix(matrix, name)
    weight = recognise(matrix, (scheme.granularity,)) or _quantize_blocks(matrix, scheme, ternarize)
    return with_shared_scales(weight) if scheme.activation_bits in SHARED_SCALES else weight


def quantization_error(w: npt.NDArray[Any], tensor: TernaryTensor) -> float:
    """Compute the relative error of a ternary tensor, ||w - dequantize()|| / ||w|| in the Frobenius norm.

    Parameters
    ----------
    w : (N, K) float
        The matrix it was made from.
    tensor : TernaryTensor

    Returns
    -------
    float
        Summed in float64. 0 where both are zero or empty, infinite where only ``w`` is zero.

    Raises
    ------
    LayoutError
        If the shapes differ.
    """
    if w.shape != tensor.shape:
        raise LayoutError("w", f"shape {w.shape}, expected {tensor.shape} as the tensor has")
    error = norm = 0.0
    for rows in row_blocks(*tensor.shape):
        block = w[rows].astype(np.float64)
        norm += float(np.vdot(block, block))
        block -= tensor.dequantize(rows)
        error += float(np.vdot(block, block))
    if error == 0:
        return 0.0
    return math.sqrt(error / norm) if norm else math.inf


def _bind(method: str, options: dict[str, float]) -> Callable[[Floats], Result]:
    """Look a method up and give it its options."""
    function = find_method(method)
    known = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            wanted = f"expected {' or '.join(known)}" if known else "it has none"
            raise OptionError(f"option {option!r}", f"unknown to method {method}, {wanted}", "leave it out")
    return partial(function, **options)


def check_matrix(array: npt.NDArray[Any], name: str) -> None:
    """Refuse what is no matrix of finite numbers.

    Raises
    ------
    ModelError
        The first element that is not finite is named.
    """
    if array.ndim != 2:
        raise ModelError(name, f"shape {array.shape}, expected a matrix (N, K)", "reshape it or leave it in float")
    if array.dtype.kind not in "fiu":
        raise ModelError(name, f"dtype {array.dtype}, expected floats or integers", "convert it to float32")
    for rows in row_blocks(*array.shape):
        finite = np.isfinite(_float32(array[rows]))
        if not finite.all():
            row, column = np.argwhere(~finite)[0]
            value = array[rows][row, column]
            problem = f"value {value} at [{rows.start + row}, {column}], expected finite float32 values"
            raise ModelError(name, problem, "mend the model or leave this matrix in float")


def _float32(block: npt.NDArray[Any]) -> Floats:
    """Round to float32; what is beyond becomes infinite, and `check_matrix` refuses it."""
    with np.errstate(over="ignore"):
        return block.astype(np.float32, copy=False)


def _quantize_blocks(array: npt.NDArray[Any], scheme: Scheme, ternarize: Callable[[Floats], Result]) -> TernaryTensor:
    n, k = array.shape
    granularity = scheme.granularity
    planes = np.empty((scheme.planes, 2, n, plane_words(k)), dtype=np.uint64)
    scale = np.zeros((scheme.planes, *granularity.scale_shape(n, k)), dtype=np.float32)
    # A group must lie in one block, and the only group of PerTensor is the matrix.
    for rows in [slice(0, n)] if isinstance(granularity, PerTensor) else row_blocks(n, k):
        block = _float32(array[rows])
        trits = np.empty((scheme.planes, *block.shape), dtype=np.int8)
        for columns, units, groups in _groups(block, granularity):
            part, part_scale = stack_planes(groups, scheme.planes, ternarize)
            trits[:, :, columns] = part.reshape(scheme.planes, len(block), columns.stop - columns.start)
            count = units.stop - units.start
            scale[:, rows, units] = part_scale.reshape(scheme.planes, -1, count)
        planes[:, :, rows] = pack_planes(trits > 0, trits < 0)
    return TernaryTensor(planes, scale, (n, k), granularity)


def _groups(block: Floats, granularity: Granularity) -> Iterator[tuple[slice, slice, Floats]]:
    """Cut rows into equally long groups: first all whole ones, then the shorter last one of each row, if there is one.

    Yields
    ------
    columns, units : slice
        Of the block and of its scale.
    groups : (R, L) float32
        A group a row.
    """
    rows, k = block.shape
    if isinstance(granularity, PerTensor):
        yield slice(0, k), slice(0, 1), block.reshape(1, rows * k)
        return
    size = granularity.group_size(k)
    whole = k // size
    if whole:
        yield slice(0, whole * size), slice(0, whole), block[:, : whole * size].reshape(rows * whole, size)
    if whole * size < k:
        yield slice(whole * size, k), slice(whole, whole + 1), block[:, whole * size :]
