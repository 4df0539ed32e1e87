"""Which converter an operator gets: ours where symbolic shapes or weights matter, else TVM's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.relax import op as R

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.node import Node
from tvm_ternary.graph.onnx.operators import (
    activation,
    arithmetic,
    attention,
    bits,
    convolution,
    detection,
    fourier,
    indexing,
    matrix,
    normalization,
    padding,
    patches,
    pooling,
    quantized,
    recurrent,
    reduction,
    resize,
    shaping,
)
from tvm_ternary.graph.onnx.operators.contrib.table import CONTRIB
from tvm_ternary.graph.onnx.operators.fallback import tvm_converter, tvm_operators

Converter = Callable[[Emitter, Node], Any]
"""Takes the emitter and a node; gives the value of the only output or a list of all, None for one not computed."""

_OURS: dict[str, Converter] = {
    "MatMul": matrix.matmul,
    "Gemm": matrix.gemm,
    "Conv": convolution.conv,
    "MaxPool": pooling.pool,
    "AveragePool": pooling.pool,
    "Attention": attention.attention,
    "RotaryEmbedding": attention.rotary_embedding,
    "MatMulInteger": quantized.matmul_integer,
    "QLinearMatMul": quantized.qlinear_matmul,
    "ConvInteger": quantized.conv_integer,
    "QLinearConv": quantized.qlinear_conv,
    "QuantizeLinear": quantized.quantize_linear,
    "DequantizeLinear": quantized.dequantize_linear,
    "LSTM": recurrent.lstm,
    "GRU": recurrent.gru,
    "RNN": recurrent.rnn,
    "Add": arithmetic.binary(R.add, commutes=True),
    "Sub": arithmetic.binary(R.subtract),
    "Mul": arithmetic.binary(R.multiply, commutes=True),
    "Div": arithmetic.binary(R.divide),
    "Mod": arithmetic.modulo,
    "Pow": arithmetic.power,
    "And": arithmetic.binary(R.logical_and),
    "Or": arithmetic.binary(R.logical_or),
    "Xor": arithmetic.binary(R.logical_xor),
    "Equal": arithmetic.equal,
    "Less": arithmetic.binary(R.less),
    "LessOrEqual": arithmetic.binary(R.less_equal),
    "Greater": arithmetic.binary(R.greater),
    "GreaterOrEqual": arithmetic.binary(R.greater_equal),
    "Min": arithmetic.variadic(R.minimum),
    "Max": arithmetic.variadic(R.maximum),
    "Sum": arithmetic.variadic(R.add),
    "Mean": arithmetic.variadic(R.add, mean=True),
    "Where": arithmetic.where,
    "Cast": arithmetic.cast,
    "Clip": arithmetic.clip,
    "ReduceMax": reduction.extreme(largest=True),
    "ReduceMin": reduction.extreme(largest=False),
    "IsInf": arithmetic.is_inf,
    "CastLike": arithmetic.cast_like,
    "BitShift": bits.bit_shift,
    "BitCast": bits.bit_cast,
    "Mish": activation.mish,
    "Softplus": activation.softplus,
    "Elu": activation.elu,
    "Celu": activation.celu,
    "CumProd": reduction.cumulative_product,
    "LayerNormalization": normalization.layer_normalization,
    "RMSNormalization": normalization.rms_normalization,
    "LpNormalization": normalization.lp_normalization,
    "BatchNormalization": normalization.batch_normalization,
    "Identity": arithmetic.identity,
    "Dropout": arithmetic.dropout,
    "Shape": shaping.shape,
    "Size": shaping.size,
    "Reshape": shaping.reshape,
    "Flatten": shaping.flatten,
    "Squeeze": shaping.squeeze,
    "Unsqueeze": shaping.unsqueeze,
    "Expand": shaping.expand,
    "Concat": shaping.concat,
    "Split": shaping.split,
    "Slice": shaping.strided,
    "Tile": shaping.tile,
    "Transpose": shaping.transpose,
    "Trilu": shaping.triangle,
    "ConstantOfShape": shaping.constant_of_shape,
    "Range": shaping.sequence,
    "Gather": indexing.gather,
    "GatherElements": indexing.gather_elements,
    "GatherND": indexing.gather_nd,
    "OneHot": indexing.one_hot,
    "EyeLike": indexing.eye_like,
    "ReverseSequence": indexing.reverse_sequence,
    "TensorScatter": indexing.tensor_scatter,
    "ConvTranspose": patches.conv_transpose,
    "Col2Im": patches.col2im,
    "DFT": fourier.dft,
    "STFT": fourier.stft,
    "NonMaxSuppression": detection.non_max_suppression,
    "Pad": padding.pad,
    "Resize": resize.resize,
    "Upsample": resize.resize,
    "SpaceToDepth": shaping.space_to_depth,
}


_WITHOUT_DOMAIN = frozenset({"SimplifiedLayerNormalization"})
"""Operators of onnxruntime that it puts into the standard set."""

_BY_THE_WALK = frozenset({"Constant", "If", "Loop", "Scan"})


def own_operators() -> list[str]:
    """The standard operators that the importer converts itself."""
    return sorted(_OURS)


def known_operators() -> list[str]:
    """The standard operators that the importer converts, itself or with TVM's converters."""
    return sorted({*_OURS, *_BY_THE_WALK, *tvm_operators()})


def is_known(domain: str, op: str) -> bool:
    """Whether the importer knows an operator."""
    return (domain == "" and op in _BY_THE_WALK) or find_converter(domain, op) is not None


def find_converter(domain: str, op: str) -> Converter | None:
    """The converter of an operator, None where there is none."""
    if domain == "" and op in _OURS:
        return _OURS[op]
    if op in CONTRIB and (domain == "com.microsoft" or (domain == "" and op in _WITHOUT_DOMAIN)):
        return CONTRIB[op]
    return tvm_converter(domain, op)
