"""onnxruntime on whole models: as they are, with dynamic int8, and with weights of four bits.

A peer is a way to change the model file; its session has all optimizations and as many threads as ours.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.bench.peers.base import needs
from tvm_ternary.errors import ModelError, OptionError

if TYPE_CHECKING:
    import onnx

FLOAT = "ort-float32"
INT8 = "ort-int8"
INT4 = "ort-int4"

SPIN = 0.1
"""Seconds in which onnxruntime's workers, and TVM's, fall asleep after a call."""

_BLOCK = 128
_BITS = 4
_LEVELS = 7
# What onnx holds in one file.
_LARGEST_FILE = 2**31
_MICROSOFT = "com.microsoft"
_missing = needs("onnxruntime")


def _as_it_is(model: Path, folder: Path) -> Path:
    return model


def _dynamic_int8(model: Path, folder: Path) -> Path:
    """By onnxruntime's own `quantize_dynamic`, with its defaults, after its basic optimizations."""
    from onnxruntime.quantization import quantize_dynamic

    output = folder / "int8.onnx"
    basic = _optimized(model, folder)
    # It advises a preparation that has just been made.
    logging.disable(logging.WARNING)
    try:
        quantize_dynamic(basic, output, use_external_data_format=basic.stat().st_size > _LARGEST_FILE // 2)
    finally:
        logging.disable(logging.NOTSET)
    return output


def _four_bits(model: Path, folder: Path) -> Path:
    """Every product with a constant matrix becomes MatMulNBits: blocks of 128, symmetric, accuracy_level 4 (int8)."""
    import onnx

    graph = onnx.load(_optimized(model, folder)).graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes = [_four_bit_node(node, weights) or node for node in graph.node]
    if not any(node.op_type == "MatMulNBits" for node in nodes):
        raise OptionError(INT4, "the model has no product with a constant matrix", "leave it out")
    used = {name for node in nodes for name in node.input} | {value.name for value in graph.output}
    kept = [weights[name] for name in weights if name in used]
    changed = onnx.helper.make_graph(nodes, graph.name, graph.input, graph.output, kept)
    source = onnx.load(model, load_external_data=False)
    opsets = [one for one in source.opset_import if one.domain != _MICROSOFT]
    opsets.append(onnx.helper.make_opsetid(_MICROSOFT, 1))
    output = folder / "int4.onnx"
    onnx.save(onnx.helper.make_model(changed, opset_imports=opsets, ir_version=source.ir_version), output)
    return output


def _four_bit_node(node: onnx.NodeProto, weights: dict[str, onnx.TensorProto]) -> onnx.NodeProto | None:
    """The node over a matrix of four bits, which is added to ``weights``; None where it is no such product."""
    from onnx import helper, numpy_helper

    if node.op_type not in ("MatMul", "Gemm") or node.input[1] not in weights:
        return None
    attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    plain = not attributes.get("transA") and attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0
    name, bias = node.input[1], list(node.input[2:])
    dense = numpy_helper.to_array(weights[name])
    if not plain or dense.ndim != 2 or any(one not in weights or len(weights[one].dims) != 1 for one in bias):
        return None
    rows = dense if attributes.get("transB") else dense.T
    packed, scales = f"{name}_int4", f"{name}_int4_scales"
    if packed not in weights:
        codes, factors = quantize_blocks(rows)
        weights[packed] = numpy_helper.from_array(codes, packed)
        weights[scales] = numpy_helper.from_array(factors, scales)
    n, k = rows.shape
    settings = {"N": n, "K": k, "bits": _BITS, "block_size": _BLOCK, "accuracy_level": 4}
    inputs = [node.input[0], packed, scales, *(["", "", *bias] if bias else [])]
    return helper.make_node("MatMulNBits", inputs, node.output, node.name, domain=_MICROSOFT, **settings)


def quantize_blocks(weight: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Round a matrix to four bits, -7 to 7 with a scale for each 128 of a row, as MatMulNBits takes it.

    Parameters
    ----------
    weight : (N, K) float32

    Returns
    -------
    (N, ceil(K / 128), 64) uint8, (N * ceil(K / 128),) float32
    """
    from tvm_ternary.bench.peers.onnxruntime import pack_blocks

    n, k = weight.shape
    blocks = -(-k // _BLOCK)
    padded = np.zeros((n, blocks, _BLOCK), np.float32)
    padded.reshape(n, -1)[:, :k] = weight
    scale = np.abs(padded).max(axis=2) / np.float32(_LEVELS)
    codes = np.rint(padded / np.where(scale == 0, 1, scale)[..., None]) + (1 << (_BITS - 1))
    return pack_blocks(codes.reshape(n, -1)[:, :k].astype(np.uint8), _BITS), scale.reshape(-1)


PEERS: dict[str, Callable[[Path, Path], Path]] = {FLOAT: _as_it_is, INT8: _dynamic_int8, INT4: _four_bits}
"""Name to the function that writes the changed model into a folder and gives its path."""


def require_onnxruntime() -> None:
    """Check that the peers can be made at all.

    Raises
    ------
    OptionError
        If onnxruntime is not installed.
    """
    if (missing := _missing()) is not None:
        raise OptionError("onnxruntime", missing, "install tvm-ternary[demo], or leave the peers out")


def open_session(model: Path | bytes, threads: int, *, optimize: bool = True) -> Any:
    """Load a model into onnxruntime.

    Parameters
    ----------
    model : Path or bytes
        A file, or what would be in it.
    threads : int
    optimize : bool
        All optimizations; otherwise the basic ones, which keep every number.

    Raises
    ------
    ModelError
        If onnxruntime refuses it.
    """
    import onnxruntime as ort

    level = ort.GraphOptimizationLevel
    options = _options(level.ORT_ENABLE_ALL if optimize else level.ORT_ENABLE_BASIC, threads)
    source, name = (model, "the model") if isinstance(model, bytes) else (str(model), str(model))
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ModelError(name, f"onnxruntime refuses it ({str(error).splitlines()[0]})") from error


def feeds_of(session: Any, inputs: Mapping[str, npt.NDArray[Any]], constants: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs that a session asks for, constants of ours among them.

    Raises
    ------
    OptionError
        If it asks for one that is not given.
    """
    feeds = {}
    for value in session.get_inputs():
        if value.name in inputs:
            feeds[value.name] = inputs[value.name]
        elif value.name in constants:
            feeds[value.name] = np.asarray(constants[value.name], _DTYPES.get(value.type, np.float32))
        else:
            raise OptionError("reference", f"asks for an input {value.name!r}, which the model does not have")
    return feeds


_DTYPES = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_}


def _optimized(model: Path, folder: Path) -> Path:
    """The model after onnxruntime's basic optimizations, which fold the constants that weights are computed from."""
    import onnxruntime as ort

    output = folder / "basic.onnx"
    if not output.exists():
        options = _options(ort.GraphOptimizationLevel.ORT_ENABLE_BASIC, 1)
        options.optimized_model_filepath = str(output)
        if model.stat().st_size > _LARGEST_FILE // 2:
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", f"{output.name}.data"
            )
        ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return output


def _options(level: Any, threads: int) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return options


def choose_model_peers(names: Sequence[str]) -> tuple[str, ...]:
    """Check names of peers.

    Raises
    ------
    OptionError
        If one does not exist, or onnxruntime is not here.
    """
    for name in names:
        if name not in PEERS:
            raise OptionError(f"peer {name!r}", f"does not exist; expected none or of {', '.join(PEERS)}")
    if names:
        require_onnxruntime()
    return tuple(dict.fromkeys(names))
