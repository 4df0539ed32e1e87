"""onnxruntime's matmuls: MatMulNBits of 2 and 4 bits, dynamic int8, float32.

Called as its users call it, `InferenceSession.run` with an input made beforehand: the time holds the allocation of the
result and what the Python binding costs (some microseconds).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.bench.engines import Calls, Engine, Floats, Workers
from tvm_ternary.bench.memory import copies_beyond
from tvm_ternary.bench.peers.base import Peer, Problem, needs
from tvm_ternary.errors import OptionError

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_BLOCK = 128
_MICROSOFT = "com.microsoft"
_OPSET = 17
_IR_VERSION = 9
# They spin for some 70 ms.
_WORKERS = Workers("onnxruntime", 0.1)


def pack_blocks(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Pack codes as MatMulNBits wants them.

    Parameters
    ----------
    codes : (N, K) uint8
        Below 2**bits. Past K the last block is filled with the code for zero, 2**(bits - 1).
    bits : int
        2 or 4.

    Returns
    -------
    (N, ceil(K / 128), 128 * bits / 8) uint8
        Consecutive k from the low bits up.

    References
    ----------
    onnxruntime's ContribOperators.md, com.microsoft.MatMulNBits, input B.
    """
    n, k = codes.shape
    blocks, per_byte = -(-k // _BLOCK), 8 // bits
    padded = np.full((n, blocks * _BLOCK), 1 << (bits - 1), np.uint8)
    padded[:, :k] = codes
    parts = padded.reshape(n, blocks, _BLOCK // per_byte, per_byte)
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
    packed: npt.NDArray[np.uint8] = np.bitwise_or.reduce(parts << shifts, axis=3)
    return packed


def _matmul_nbits(name: str, problem: Problem, bits: int) -> Engine:
    """Weights of 2 or 4 bits in blocks of 128; activations rounded to int8 by the block (accuracy_level 4)."""
    from onnx import helper

    n, k = problem.trits.shape
    codes = (problem.trits + np.int8(1 << (bits - 1))).view(np.uint8)
    weight = pack_blocks(codes, bits)
    scales = np.repeat(problem.scale[:, None], weight.shape[1], axis=1)
    attributes = {"K": k, "N": n, "bits": bits, "block_size": _BLOCK, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["x", "w", "scales"], ["y"], domain=_MICROSOFT, **attributes)
    return _engine(name, problem, [node], {"w": weight, "scales": scales}, 1e-2)


def _dynamic_int8(name: str, problem: Problem) -> Engine:
    """Weights of 8 bits; activations rounded to 8 bits by one scale for all rows, as the dynamic quantizer makes it."""
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
        helper.make_node("MatMulInteger", ["xq", "w", "xz", "wz"], ["acc"]),
        helper.make_node("Cast", ["acc"], ["sum"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["xs", "ws"], ["scale"]),
        helper.make_node("Mul", ["sum", "scale"], ["y"]),
    ]
    weights: dict[str, npt.NDArray[Any]] = {
        "w": np.ascontiguousarray(problem.trits.T),
        "wz": np.zeros(len(problem.scale), np.int8),
        "ws": problem.scale,
    }
    return _engine(name, problem, nodes, weights, 2e-2)


def _float32(name: str, problem: Problem) -> Engine:
    from onnx import helper

    weights = {"w": np.ascontiguousarray(problem.dense.T)}
    return _engine(name, problem, [helper.make_node("MatMul", ["x", "w"], ["y"])], weights, 1e-5)


def _engine(
    name: str, problem: Problem, nodes: Sequence[NodeProto], weights: dict[str, npt.NDArray[Any]], error_bound: float
) -> Engine:
    """An onnxruntime session for each copy of the weight: a session packs its own."""
    import onnxruntime as ort

    n, k = problem.trits.shape
    model = _model(nodes, weights, n, k).SerializeToString()
    options = ort.SessionOptions()
    if problem.threads == 1:
        options.intra_op_num_threads = 1
    else:
        _make_shared_pool(problem.threads)
        options.use_per_session_threads = False
    size = sum(array.nbytes for array in weights.values())
    providers = ["CPUExecutionProvider"]
    count = copies_beyond(problem.cache, size)
    sessions = [ort.InferenceSession(model, options, providers=providers) for _ in range(count)]

    def calls(x: Floats) -> Calls:
        feed = {"x": x}
        return [lambda session=session: session.run(None, feed)[0] for session in sessions]  # type: ignore[misc]

    return Engine(name, size, problem.dense, error_bound, calls, _WORKERS)


@cache
def _make_shared_pool(threads: int) -> None:
    """Make the pool that all sessions share: workers of their own would spin on, after a run, beside the next session.

    onnxruntime makes one such pool in a process, whose size stays.
    """
    import onnxruntime as ort

    try:
        ort.set_global_thread_pool_sizes(threads, 1)
    except ort.capi.onnxruntime_pybind11_state.Fail as error:
        raise OptionError(
            "threads", f"onnxruntime already has a pool of another size than {threads}", "measure in a new process"
        ) from error


def _model(nodes: Sequence[NodeProto], weights: dict[str, npt.NDArray[Any]], n: int, k: int) -> ModelProto:
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        nodes,
        "matmul",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(_MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)


_HERE = needs("onnxruntime")
PEERS: dict[str, Peer] = {
    "ort-2bit": Peer(partial(_matmul_nbits, bits=2), _HERE),
    "ort-4bit": Peer(partial(_matmul_nbits, bits=4), _HERE),
    "ort-int8": Peer(_dynamic_int8, _HERE),
    "ort-float32": Peer(_float32, _HERE),
}
