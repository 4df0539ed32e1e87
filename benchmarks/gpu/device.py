"""Times on a GPU: our functions on torch's tensors, torch's own products beside them, by CUDA graphs and events."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.cases import TIMED_ROWS, name_of, timed
from benchmarks.gpu.kernels import activation_arrays
from tvm_ternary.formats import BITS_BLOCK, CODES_BLOCK, LANES, Scheme, padded_k
from tvm_ternary.runtime.library import load_cuda_runtime, load_runtime

CACHE_BYTES = 128 << 20
"""More than a second-level cache: sets of operands are used in turns until they are as large together."""
PLACE = "cuda"
ROUNDS = 5
_SECONDS = 0.02
_MOST_SETS = 32


class Device:
    """torch's current GPU and the library of kernels."""

    def __init__(self, folder: Path) -> None:
        import torch

        self.torch = torch
        self.ffi = load_runtime(folder)
        load_cuda_runtime(folder)
        self.library = self.ffi.load_module(str(folder / "kernels.so"))

    def facts(self) -> dict[str, Any]:
        """What else a line should say."""
        properties = self.torch.cuda.get_device_properties(0)
        return {
            "torch": self.torch.__version__,
            "cuda_of_torch": self.torch.version.cuda,
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
        }

    def activations(self, scheme: Scheme, m: int, k: int) -> list[Any]:
        """Arrays for what a kernel reads of M rows."""
        torch, made = self.torch, []
        for shape, dtype in activation_arrays(scheme, m, k):
            array = torch.zeros(shape, dtype=getattr(torch, dtype.replace("uint32", "int32")), device=PLACE)
            made.append(array.view(torch.uint32) if dtype == "uint32" else array)
        return made

    def seconds(self, calls: Sequence[Sequence[Callable[[], None]]]) -> list[float]:
        """Seconds of each contestant's call: its calls, one a set of operands, are a graph; graphs run in turns."""
        graphs = [self._graph(each) for each in calls]
        repeats = [max(1, round(_SECONDS / max(self._replay(graph, 2) / 2, 1e-6))) for graph in graphs]
        times: list[list[float]] = [[] for _ in graphs]
        for _ in range(ROUNDS):
            for graph, count, found in zip(graphs, repeats, times, strict=True):
                found.append(self._replay(graph, count) / count)
        return [statistics.median(found) / len(each) for found, each in zip(times, calls, strict=True)]

    def _graph(self, calls: Sequence[Callable[[], None]]) -> Any:
        with self.ffi.use_torch_stream():
            for call in calls:
                call()
        self.torch.cuda.synchronize()
        graph = self.torch.cuda.CUDAGraph()
        with self.ffi.use_torch_stream(self.torch.cuda.graph(graph)):
            for call in calls:
                call()
        return graph

    def _replay(self, graph: Any, count: int) -> float:
        start, stop = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        start.record()
        for _ in range(count):
            graph.replay()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) * 1e-3

    def copy_bandwidth(self) -> float:
        """Bytes a second that a copy of 1 GiB reads and writes."""
        source = self.torch.empty(1 << 30, dtype=self.torch.uint8, device=PLACE)
        target = self.torch.empty_like(source)
        (seconds,) = self.seconds([[lambda: target.copy_(source)]])
        return 2 * source.numel() / seconds

    def bert(self, batch: int, length: int) -> float:
        """Seconds of the demo's network in torch, bfloat16, eager, random weights of its sizes: median of a run."""
        torch, width, heads = self.torch, 384, 12

        def weight(*shape: int) -> Any:
            return torch.randn(*shape, device=PLACE, dtype=torch.bfloat16) * 0.05

        linear = torch.nn.functional.linear
        layers = [
            [weight(width, width) for _ in range(4)] + [weight(4 * width, width), weight(width, 4 * width)]
            for _ in range(3)
        ]
        bias, wide, table = weight(width), weight(4 * width), weight(4096, width)
        ids = torch.randint(0, 4096, (batch, length), device=PLACE)
        mask = torch.zeros(batch, 1, 1, length, device=PLACE, dtype=torch.bfloat16)

        def norm(x: Any) -> Any:
            return torch.nn.functional.layer_norm(x, (width,), bias, bias)

        def split(x: Any) -> Any:
            return x.view(batch, length, heads, width // heads).transpose(1, 2)

        def run() -> Any:
            x = norm(table[ids])
            for q, k, v, o, up, down in layers:
                parts = [split(linear(x, w, bias)) for w in (q, k, v)]
                mixed = torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask)
                x = norm(x + linear(mixed.transpose(1, 2).reshape(batch, length, width), o, bias))
                x = norm(x + linear(torch.nn.functional.gelu(linear(x, up, wide)), down, bias))
            return x.mean(dim=1)

        times = []
        with torch.inference_mode():
            for _ in range(60):
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                stop.record()
                stop.synchronize()
                times.append(float(start.elapsed_time(stop)) * 1e-3)
        return statistics.median(times[10:])

    def timed(self) -> Iterator[Case]:
        """Every matrix with each number of rows."""
        for n, k, text in timed():
            yield from (Case(self, n, k, text, m) for m in TIMED_ROWS)


class Case:
    """A matrix and a number of rows, to be timed beside torch's product in bfloat16."""

    def __init__(self, device: Device, n: int, k: int, text: str, m: int) -> None:
        self.device, self.n, self.k, self.m, self.scheme = device, n, k, m, Scheme.parse(text)
        self.name, self.told = name_of(n, k, text), ""

    def measure(self) -> dict[str, Any]:
        """Seconds of our matmul, of it with its rows' preparation, and of torch."""
        torch, library = self.device.torch, self.device.library
        sizes = self._constants()
        weight_bytes = sum(array.numel() * array.element_size() for array in sizes)
        count = min(_MOST_SETS, -(-CACHE_BYTES // weight_bytes), max(1, (8 << 30) // (4 * self.m * self.n)))
        multiply, both = [], []
        for _ in range(count):
            x = torch.randn(self.m, self.k, device=PLACE)
            held, y = self.device.activations(self.scheme, self.m, self.k), torch.empty(self.m, self.n, device=PLACE)
            constants = self._constants()
            library[f"rows_{self.name}"](x, *held)
            multiply.append(_bound(library[f"matmul_{self.name}"], *held, *constants, y))
            both.append(_both(_bound(library[f"rows_{self.name}"], x, *held), multiply[-1]))
        theirs = []
        for _ in range(min(4, max(1, -(-CACHE_BYTES // (2 * self.n * self.k))))):
            x, w = (
                torch.randn(*shape, device=PLACE, dtype=torch.bfloat16)
                for shape in ((self.m, self.k), (self.n, self.k))
            )
            y = torch.empty(self.m, self.n, device=PLACE, dtype=torch.bfloat16)
            theirs.append(_product(torch, x, w, y))
        ours, whole, other = self.device.seconds([multiply, both, theirs])
        self.told = f"{self.name} M={self.m}: {1e6 * ours:.1f} us, with rows {1e6 * whole:.1f}, torch {1e6 * other:.1f}"
        peers = {
            name: "installed, no comparison written"
            for name in ("gemlite", "bitblas")
            if importlib.util.find_spec(name)
        }
        return {
            "case": self.name,
            "m": self.m,
            "seconds": ours,
            "seconds_with_rows": whole,
            "torch_bf16": other,
            "weight_bytes": weight_bytes,
            "peers": peers,
        }

    def _constants(self) -> list[Any]:
        """Random packed weights, made where they are used: what they are does not matter for the time."""
        torch, scheme = self.device.torch, self.scheme
        blocks, one_bit = -(-self.n // LANES), scheme.activation_bits == 1
        block = BITS_BLOCK if one_bit else CODES_BLOCK
        groups, width = padded_k(self.k, scheme.granularity, block)
        words = (scheme.planes, blocks, groups * width // block, *((2,) if one_bit else ()), LANES)
        bits = torch.randint(-(2**31), 2**31 - 1, words, device=PLACE, dtype=torch.int32)
        # Codes 0 and 1; of bits, the minus ones are among those that are not zero.
        bits = (
            bits & 0x55555555
            if not one_bit
            else torch.stack([bits[:, :, :, 0], bits[:, :, :, 0] & bits[:, :, :, 1]], 3)
        )
        scale = torch.rand((*((scheme.planes,) if one_bit else ()), groups, blocks * LANES), device=PLACE)
        factor = torch.randint(-15, 16, (scheme.planes, groups, blocks * LANES), device=PLACE, dtype=torch.int8)
        return [bits.contiguous().view(torch.uint32), *([factor] if scheme.planes > 1 and not one_bit else []), scale]


def _bound(function: Callable[..., None], *arguments: Any) -> Callable[[], None]:
    return lambda: function(*arguments)


def _both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        first()
        second()

    return run


def _product(torch: Any, x: Any, w: Any, y: Any) -> Callable[[], None]:
    return lambda: torch.matmul(x, w.t(), out=y)
