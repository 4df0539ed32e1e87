"""PyTorch's linear layers on a CPU: int8 through oneDNN and through FBGEMM, prepacked, and bfloat16.

Activations are float32 and are rounded inside the timed call: to 8 bits by one scale for all rows (`linear_dynamic`),
or to bfloat16.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

from tvm_ternary.bench.engines import Calls, Engine, Floats, Workers
from tvm_ternary.bench.memory import copies_beyond
from tvm_ternary.bench.peers.base import Peer, Problem, needs

# libgomp's spin for some 10 ms.
_WORKERS = Workers("torch", 0.02)


def _int8(name: str, problem: Problem, backend: str) -> Engine:
    """Weights of 8 bits, packed by ``backend`` for each M: oneDNN caches what it made for the first M it meets."""
    import torch

    n, k = problem.trits.shape
    scales, zeros = torch.from_numpy(problem.scale).double(), torch.zeros(n, dtype=torch.int64)
    with warnings.catch_warnings():
        # Quantized tensors are deprecated, and still the only way to these two linear layers.
        warnings.simplefilter("ignore", UserWarning)
        weight = torch.quantize_per_channel(torch.from_numpy(problem.dense), scales, zeros, 0, torch.qint8)

    def calls(x: Floats) -> Calls:
        torch.set_num_threads(problem.threads)
        torch.backends.quantized.engine = backend
        linear, rows = torch.ops.quantized.linear_dynamic, torch.from_numpy(x)
        packed = [torch.ops.quantized.linear_prepack(weight, None) for _ in range(copies_beyond(problem.cache, n * k))]
        return [lambda p=p: linear(rows, p, False).numpy() for p in packed]  # type: ignore[misc]

    return Engine(name, n * k, problem.dense, 2e-2, calls, _WORKERS)


def _bfloat16(name: str, problem: Problem) -> Engine:
    """Weights and activations of 16 bits; the results are rounded to as many before they become float32 again."""
    import torch

    weight = torch.from_numpy(problem.dense).bfloat16()
    size = weight.numel() * 2
    copies: list[Any] = [weight.clone() for _ in range(copies_beyond(problem.cache, size))]

    def calls(x: Floats) -> Calls:
        torch.set_num_threads(problem.threads)
        linear, rows = torch.nn.functional.linear, torch.from_numpy(x)
        return [lambda w=w: linear(rows.bfloat16(), w).float().numpy() for w in copies]  # type: ignore[misc]

    return Engine(name, size, problem.dense, 5e-3, calls, _WORKERS)


def _missing(backend: str) -> str | None:
    """Whether torch is here and was built with this engine."""
    absent = needs("torch")()
    if absent is not None:
        return absent
    import torch

    found = torch.backends.quantized.supported_engines
    return None if backend in found else f"needs a torch with the engine {backend}; this one has {', '.join(found)}"


PEERS: dict[str, Peer] = {
    "torch-int8": Peer(partial(_int8, backend="onednn"), partial(_missing, "onednn")),
    "torch-fbgemm": Peer(partial(_int8, backend="fbgemm"), partial(_missing, "fbgemm")),
    "torch-bf16": Peer(_bfloat16, needs("torch")),
}
