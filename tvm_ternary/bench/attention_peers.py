"""Others' fused attention: onnxruntime's in float32, torch's in float32 and bfloat16. A new peer is a row of the table.

All get queries, keys and values as they want them: where a kernel has no groups of heads, keys are repeated for it
beforehand, and what it takes in bfloat16 is rounded beforehand. That is not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.bench.attention_case import AttentionEngine, Case, Floats, Operands
from tvm_ternary.bench.memory import aligned
from tvm_ternary.bench.model_peers import open_session
from tvm_ternary.bench.peers.base import needs

if TYPE_CHECKING:
    from onnx import ModelProto

Arrays = dict[str, npt.NDArray[Any]]

_OUTPUT = "output"
_MICROSOFT = "com.microsoft"
_OPSET = 17
_IR_VERSION = 9
_FLOAT_BOUND = 1e-4
_BFLOAT_BOUND = 3e-2


def _fits_any(case: Case) -> str | None:
    return None


@dataclass(frozen=True)
class AttentionPeer:
    """A row of the table.

    Attributes
    ----------
    make : callable
        (its name, operands, threads) -> engine. Called on the thread that will call the engine.
    missing : callable
        -> what this host lacks for it; None if nothing.
    refuses : callable
        Case -> why it cannot compute that, None if it can.
    """

    make: Callable[[str, Operands, int], AttentionEngine]
    missing: Callable[[], str | None]
    refuses: Callable[[Case], str | None] = _fits_any


def _grouped_query(name: str, operands: Operands, threads: int) -> AttentionEngine:
    """GroupQueryAttention, whose cache is one buffer as past and present: a step writes its token into it.

    A prompt's buffer is as long as the prompt, and written, too: the operator cannot leave that out.
    """
    case, shape = operands.case, operands.case.shape
    cache, new = [operands.k, operands.v], [operands.k, operands.v]
    if case.step:
        new = [one[:, :, -1:] for one in cache]
    else:
        cache = [aligned((1, shape.kv_heads, case.keys, shape.size), np.float32) for _ in range(2)]
    inputs: Arrays = {
        "query": operands.q.reshape(1, case.queries, -1),
        "key": np.ascontiguousarray(new[0]).reshape(1, case.queries, -1),
        "value": np.ascontiguousarray(new[1]).reshape(1, case.queries, -1),
        "past_key": cache[0],
        "past_value": cache[1],
        "seqlens_k": np.array([case.keys - 1], np.int32),
        "total_sequence_length": np.array([case.keys], np.int32),
    }
    outputs: Arrays = {_OUTPUT: _like(operands), "present_key": cache[0], "present_value": cache[1]}
    attributes = {"num_heads": shape.heads, "kv_num_heads": shape.kv_heads, "scale": shape.scale}
    return _engine(name, "GroupQueryAttention", operands, threads, attributes, inputs, outputs)


def _multi_head(name: str, operands: Operands, threads: int) -> AttentionEngine:
    """MultiHeadAttention on a prompt; every head needs keys of its own."""
    case, shape = operands.case, operands.case.shape
    k, v = (np.repeat(one, shape.group, 2).reshape(1, case.keys, -1) for one in (operands.k, operands.v))
    inputs: Arrays = {"query": operands.q.reshape(1, case.queries, -1), "key": k, "value": v}
    outputs: Arrays = {_OUTPUT: _like(operands)}
    attributes = {"num_heads": shape.heads, "unidirectional": int(case.causal), "scale": shape.scale}
    return _engine(name, "MultiHeadAttention", operands, threads, attributes, inputs, outputs)


def _like(operands: Operands) -> Floats:
    """Where a result of (1, queries, heads * size) goes."""
    result: Floats = aligned((1, operands.case.queries, operands.q[0, 0].size), np.float32)
    return result


def _model(operator: str, inputs: Arrays, outputs: Arrays, attributes: dict[str, Any]) -> ModelProto:
    """One node."""
    from onnx import helper

    def values(arrays: Arrays) -> list[Any]:
        return [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in arrays.items()
        ]

    node = helper.make_node(operator, list(inputs), list(outputs), domain=_MICROSOFT, **attributes)
    graph = helper.make_graph([node], "attention", values(inputs), values(outputs))
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(_MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)


class _Bound:
    """A session that reads and writes arrays where they lie: nothing is copied or allocated for a call."""

    def __init__(self, model: ModelProto, threads: int, inputs: Arrays, outputs: Arrays) -> None:
        self._session = open_session(model.SerializeToString(), threads)
        self._binding = self._session.io_binding()
        # The binding knows addresses alone.
        self._arrays = inputs, outputs
        for bind, arrays in ((self._binding.bind_input, inputs), (self._binding.bind_output, outputs)):
            for name, array in arrays.items():
                bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def __call__(self) -> Any:
        self._session.run_with_iobinding(self._binding)
        return self._arrays[1][_OUTPUT]


def _engine(
    name: str,
    operator: str,
    operands: Operands,
    threads: int,
    attributes: dict[str, Any],
    inputs: Arrays,
    outputs: Arrays,
) -> AttentionEngine:
    call = _Bound(_model(operator, inputs, outputs, attributes), threads, inputs, outputs)
    return AttentionEngine(name, call, lambda got: got.reshape(operands.q.shape), operands.exact, _FLOAT_BOUND)


def _torch(name: str, operands: Operands, threads: int, dtype: str) -> AttentionEngine:
    """`scaled_dot_product_attention`. In a step, the heads that share keys are its queries: none is read twice."""
    import torch

    torch.set_num_threads(threads)
    case, shape = operands.case, operands.case.shape
    k, v = operands.by_head
    if case.step:
        q = operands.q.reshape(1, shape.kv_heads, shape.group, shape.size)
    else:
        q, k, v = operands.q.swapaxes(1, 2), np.repeat(k, shape.group, 1), np.repeat(v, shape.group, 1)
    tensors = [torch.from_numpy(one).to(getattr(torch, dtype)) for one in (q, k, v)]
    attend = torch.nn.functional.scaled_dot_product_attention

    def call() -> Any:
        with torch.inference_mode():
            return attend(*tensors, is_causal=case.causal, scale=shape.scale)

    def result(got: Any) -> Floats:
        array: Floats = got.float().numpy()
        return (array if case.step else array.swapaxes(1, 2)).reshape(operands.q.shape)

    bound = _FLOAT_BOUND if dtype == "float32" else _BFLOAT_BOUND
    return AttentionEngine(name, call, result, operands.exact, bound)


def _grouped_refuses(case: Case) -> str | None:
    if case.shape.size % 8:
        return "needs a head size divisible by 8"
    return None if case.step or case.causal else "is always causal"


def _multi_head_refuses(case: Case) -> str | None:
    # With a past it copies the cache in every step.
    return "has no cache that it does not copy" if case.step else None


_ONNXRUNTIME, _TORCH = needs("onnxruntime"), needs("torch")
ATTENTION_PEERS: dict[str, AttentionPeer] = {
    "ort-gqa": AttentionPeer(_grouped_query, _ONNXRUNTIME, _grouped_refuses),
    "ort-mha": AttentionPeer(_multi_head, _ONNXRUNTIME, _multi_head_refuses),
    "torch-float32": AttentionPeer(partial(_torch, dtype="float32"), _TORCH),
    "torch-bf16": AttentionPeer(partial(_torch, dtype="bfloat16"), _TORCH),
}
"""Name to peer, in the order of the columns."""


def peers_for(case: Case, names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Those that can compute a case, and why the others cannot."""
    refusals = {name: why for name in names if (why := ATTENTION_PEERS[name].refuses(case)) is not None}
    return [name for name in names if name not in refusals], refusals
