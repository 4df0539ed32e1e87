"""A transposed convolution as an ordinary one: each phase of the output is a convolution of its own.

Output ``o`` of a transposed convolution with stride s sums ``x[i] * w[k]`` over ``o + padding = s * i + k``. With
``o + padding = s * q + r`` and ``k = s * t + r`` that is ``i = q - t``: for each phase r a convolution by every s-th
tap, turned around. The s * s phases are the channels of one convolution, which then take their places in the image.
Nothing is multiplied by the zeros that a definition by dilation would put between the pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import relax
from tvm.ir import GenericConst
from tvm.relax import op as R


def can_be_convolution(call: relax.Call) -> bool:
    """Whether a ``conv2d_transpose`` has one group, no dilation and a constant float32 weight."""
    attrs = call.attrs
    return (
        isinstance(call.args[1], GenericConst)
        and attrs.data_layout == "NCHW"
        and int(attrs.groups) == 1
        and all(int(d) == 1 for d in attrs.dilation)
        and call.ty.dtype == "float32"
        and call.args[0].ty.shape is not None
    )


def as_convolution(emit: Callable[[relax.Expr], relax.Expr], call: relax.Call, data: relax.Expr) -> relax.Expr:
    """Compute a transposed convolution with channels last.

    Parameters
    ----------
    emit : callable
        Binds an expression.
    call : relax.Call
        The ``conv2d_transpose``, channels first; see `can_be_convolution`.
    data : relax.Expr
        Its input, (N, H, W, C).

    Returns
    -------
    relax.Expr
        (N, OH, OW, O)
    """
    strides = [int(s) for s in call.attrs.strides]
    padding = [int(p) for p in call.attrs.padding]
    # Taps of zeros make room for every output pixel: those of the padding at the end, too.
    kernel = call.args[1].value.numpy()
    extra = [int(o) - p for o, p in zip(call.attrs.output_padding, padding[2:], strict=True)]
    taps = [-(-(k + max(e, 0)) // s) for k, e, s in zip(kernel.shape[2:], extra, strides, strict=True)]
    weight = phases(kernel, strides, taps)
    reach = [taps[0] - 1, taps[1] - 1]
    parts = emit(
        R.nn.conv2d(data, relax.const(weight), padding=reach + reach, data_layout="NHWC", kernel_layout="HWIO")
    )
    batch, height, width, _ = parts.ty.shape.values
    features = kernel.shape[1]
    split = emit(R.reshape(parts, [batch, height, width, *strides, features]))
    placed = emit(R.permute_dims(split, [0, 1, 3, 2, 4, 5]))
    image = emit(R.reshape(placed, [batch, height * strides[0], width * strides[1], features]))
    wanted = call.ty.shape.values[2:]
    ends = [padding[0] + wanted[0], padding[1] + wanted[1]]
    return R.strided_slice(image, [1, 2], padding[:2], ends, assume_inbound=True)


def phases(kernel: NDArray[Any], strides: list[int], taps: list[int]) -> NDArray[Any]:
    """The weight of the ordinary convolution.

    Parameters
    ----------
    kernel : (I, O, KH, KW)
    strides, taps : two ints each
        ``taps * strides`` covers the kernel.

    Returns
    -------
    (TH, TW, I, SH * SW * O)
    """
    inputs, outputs, height, width = kernel.shape
    full = np.zeros((inputs, outputs, taps[0] * strides[0], taps[1] * strides[1]), kernel.dtype)
    full[:, :, :height, :width] = kernel
    split = full.reshape(inputs, outputs, taps[0], strides[0], taps[1], strides[1])[:, :, ::-1, :, ::-1]
    return np.ascontiguousarray(split.transpose(2, 4, 0, 3, 5, 1).reshape(*taps, inputs, -1))
