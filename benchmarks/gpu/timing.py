"""One matrix: its answers checked on the GPU, then its times beside torch's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from benchmarks.gpu.cases import name_of
from benchmarks.gpu.device import CACHE_BYTES, Call, Device
from benchmarks.gpu.operands import empty_activations, random_packed, spelled_out
from benchmarks.gpu.reference import TINY, random_activations, rounded, roundings, scale_roundings
from tvm_ternary.formats import Scheme

_MOST_SETS = 32
_MOST_BYTES = 8 << 30
_INT8_ROWS = 17  # torch's int8 product takes no fewer


class TimedMatrix:
    """A matrix of random trits on a GPU.

    Parameters
    ----------
    device : Device
    n, k : int
    text : str
        The scheme.
    """

    def __init__(self, device: Device, n: int, k: int, text: str) -> None:
        self.device, self.n, self.k, self.scheme = device, n, k, Scheme.parse(text)
        self.name = name_of(n, k, text)
        self._rows, self._matmul = (device.library[f"{kind}_{self.name}"] for kind in ("rows", "matmul"))

    def wrong(self, rows: Iterable[int]) -> dict[int, int]:
        """How many results are not within the bound, for each number of rows; fresh operands, poisoned results."""
        torch, place, k = self.device.torch, self.device.place, self.k
        packed = random_packed(torch, self.scheme, self.n, k, place)
        dense, sizes = spelled_out(torch, packed, self.scheme, self.n, k)
        generator, found = np.random.default_rng(), {}
        for m in rows:
            x = random_activations(m, k, self.scheme, generator)
            exact = torch.from_numpy(rounded(x, self.scheme)).to(place)
            y = torch.full((m, self.n), float("nan"), device=place)
            held = empty_activations(torch, self.scheme, m, k, place)
            with self.device.stream():
                self._rows(torch.from_numpy(x).to(place), *held)
                self._matmul(*held, *packed, y)
            want = exact @ dense.t()
            limit = roundings(k, self.scheme) * (exact.abs() @ sizes.t()) + TINY
            limit += scale_roundings(k, self.scheme) * want.abs()
            found[m] = int((~((y.double() - want).abs() <= limit)).sum())
        return found

    def times(self, m: int, floors: Mapping[str, float]) -> dict[str, Any]:
        """A line of results: seconds of our matmul, of it with its rows' preparation, and of torch's products.

        Parameters
        ----------
        m : int
            Rows.
        floors : mapping of str to float
            Seconds that nothing can be below, by number of rows.
        """
        multiply, both, weight_bytes = self._ours(m)
        contestants = {"seconds": multiply, "seconds_with_rows": both, "torch_bf16": self._bfloat16(m)}
        if m >= _INT8_ROWS:
            contestants["torch_int8"] = self._int8(m)
        found = dict(zip(contestants, self.device.seconds(list(contestants.values())), strict=True))
        return {
            "case": self.name,
            "m": m,
            **{key: value.seconds for key, value in found.items()},
            "spread": max(value.spread for value in found.values()),
            "weight_bytes": weight_bytes,
            "floor": floors.get(str(m)),
        }

    def _ours(self, m: int) -> tuple[list[Call], list[Call], int]:
        torch, place = self.device.torch, self.device.place
        multiply: list[Call] = []
        both: list[Call] = []
        count, weight_bytes = 1, 0
        while len(multiply) < count:
            packed = random_packed(torch, self.scheme, self.n, self.k, place)
            weight_bytes = sum(array.numel() * array.element_size() for array in packed)
            count = self._sets(weight_bytes, 4 * m * self.n)
            x, y = torch.randn(m, self.k, device=place), torch.empty(m, self.n, device=place)
            held = empty_activations(torch, self.scheme, m, self.k, place)
            prepare = _call(self._rows, x, *held)
            prepare()
            multiply.append(_call(self._matmul, *held, *packed, y))
            both.append(_call(_in_turn, prepare, multiply[-1]))
        return multiply, both, weight_bytes

    def _bfloat16(self, m: int) -> list[Call]:
        torch, calls = self.device.torch, list[Call]()
        for _ in range(self._sets(2 * self.n * self.k, 2 * m * self.n)):
            x, w, y = self._arrays(torch.bfloat16, torch.bfloat16, m)
            calls.append(_call(torch.matmul, x, w.t(), out=y))
        return calls

    def _int8(self, m: int) -> list[Call]:
        """torch's product of int8 to int32, neither quantized nor scaled."""
        torch, calls = self.device.torch, list[Call]()
        for _ in range(self._sets(self.n * self.k, 4 * m * self.n)):
            x, w, y = self._arrays(torch.int8, torch.int32, m)
            calls.append(_call(torch._int_mm, x, w.t(), out=y))
        return calls

    def _arrays(self, dtype: Any, results: Any, m: int) -> tuple[Any, Any, Any]:
        torch, place = self.device.torch, self.device.place

        def made(*shape: int) -> Any:
            if dtype.is_floating_point:
                return torch.randn(shape, device=place, dtype=dtype)
            return torch.randint(-127, 128, shape, device=place, dtype=dtype)

        return made(m, self.k), made(self.n, self.k), torch.empty(m, self.n, device=place, dtype=results)

    @staticmethod
    def _sets(weight_bytes: int, result_bytes: int) -> int:
        """How many sets of operands: more than the cache holds, and no more than memory does."""
        return max(1, min(_MOST_SETS, -(-CACHE_BYTES // weight_bytes), _MOST_BYTES // result_bytes))


def _call(function: Callable[..., object], *arguments: Any, **options: Any) -> Call:
    return lambda: function(*arguments, **options)


def _in_turn(first: Call, second: Call) -> None:
    first()
    second()
