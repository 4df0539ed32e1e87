"""Which converter an operator of the ``com.microsoft`` set gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.relax import op as R

from tvm_ternary.graph.onnx.emitter import Emitter
from tvm_ternary.graph.onnx.node import Node
from tvm_ternary.graph.onnx.operators.contrib import (
    activation,
    attention,
    convolution,
    embedding,
    grouped,
    normalization,
    products,
    qlinear,
    quantized,
    recurrent,
    rotary,
)
from tvm_ternary.graph.onnx.operators.quantized import dequantize_linear, quantize_linear

CONTRIB: dict[str, Callable[[Emitter, Node], Any]] = {
    "Attention": attention.attention,
    "BiasGelu": activation.bias_gelu,
    "DynamicQuantizeMatMul": quantized.dynamic_quantize_matmul,
    "DequantizeLinear": dequantize_linear,
    "DynamicQuantizeLSTM": recurrent.dynamic_quantize_lstm,
    "EmbedLayerNormalization": embedding.embed_layer_normalization,
    "FastGelu": activation.fast_gelu,
    "FusedConv": convolution.fused_conv,
    "FusedGemm": products.fused_gemm,
    "FusedMatMul": products.fused_matmul,
    "GatherBlockQuantized": embedding.gather_block_quantized,
    "Gelu": activation.gelu,
    "GroupQueryAttention": grouped.group_query_attention,
    "MatMulIntegerToFloat": quantized.matmul_integer_to_float,
    "MatMulNBits": products.matmul_nbits,
    "MultiHeadAttention": attention.multi_head_attention,
    "QGemm": qlinear.qgemm,
    "QLinearAdd": qlinear.binary(R.add),
    "QLinearConcat": qlinear.concat,
    "QLinearGlobalAveragePool": qlinear.global_average_pool,
    "QLinearLeakyRelu": qlinear.leaky_relu,
    "QLinearMul": qlinear.binary(R.multiply),
    "QLinearSigmoid": qlinear.sigmoid,
    "QAttention": attention.quantized_attention,
    "QuantizeLinear": quantize_linear,
    "QuickGelu": activation.quick_gelu,
    "RotaryEmbedding": rotary.rotary_embedding,
    "SimplifiedLayerNormalization": normalization.simplified_layer_normalization,
    "SkipLayerNormalization": normalization.skip_layer_normalization,
    "SkipSimplifiedLayerNormalization": normalization.skip_simplified_layer_normalization,
    "TransposeMatMul": products.fused_matmul,
}
