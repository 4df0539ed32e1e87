"""Other kernels for ternary weights on the same shapes: ``python -m benchmarks.gpu.peers gemlite | bitblas``.

Each is a process of its own, since they compile and tune as they go and bring runtimes of their own; `run` limits its
time and keeps what it has printed until then: a line of JSON for each product.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from benchmarks.gpu.cases import ASKED_SCHEMES, TIMED_ROWS, TIMED_SHAPES, name_of
from benchmarks.gpu.device import CACHE_BYTES, Call, Clock

_MOST_SETS = 16
_ERRORS = {"t1a16": 1e-2, "t1a8": 5e-2}
"""Relative in norm; int8 rounds activations."""

Layer = Callable[[Any], Any]
Maker = Callable[[Any, str, Any, int], Layer]
"""torch, scheme, (N, K) int8 trits, M -> a layer of scale 1 for float16 (M, K), or int8 where it takes those."""


def gemlite_layer(torch: Any, scheme: str, trits: Any, m: int) -> Layer:
    """gemlite's BitNet layers; those of 8 bits quantize their activations themselves, as ours do."""
    from gemlite.helper import A16W158_INT, A8W158_INT_dynamic

    maker = {"t1a16": A16W158_INT, "t1a8": A8W158_INT_dynamic}[scheme]
    made: Layer = maker(device=str(trits.device), dtype=torch.float16).from_weights(
        trits.half(), torch.ones((), device=trits.device)
    )
    return made


def bitblas_layer(torch: Any, scheme: str, trits: Any, m: int) -> Layer:
    """bitblas' product of one M; that of 8 bits takes int8 and gives int32, neither quantized nor scaled."""
    import bitblas

    n, k = trits.shape
    kinds = {"t1a16": ("float16", "float16", "float16"), "t1a8": ("int8", "int32", "int32")}[scheme]
    names = dict(zip(("A_dtype", "accum_dtype", "out_dtype"), kinds, strict=True))
    config = bitblas.MatmulConfig(M=m, N=n, K=k, W_dtype="int2", layout="nt", with_bias=False, **names)
    product = bitblas.Matmul(config=config, enable_tuning=False)
    weight = product.transform_weight(trits)
    return lambda x: product(x, weight)


MAKERS: dict[str, Maker] = {"gemlite": gemlite_layer, "bitblas": bitblas_layer}
_TAKES_INT8 = {("bitblas", "t1a8")}


def measure(name: str, clock: Clock) -> Iterator[dict[str, Any]]:
    """A line for every shape, scheme and number of rows: seconds, or why not."""
    for n, k in TIMED_SHAPES:
        for scheme in ASKED_SCHEMES:
            for m in TIMED_ROWS:
                line = {"peer": name, "case": name_of(n, k, scheme), "m": m}
                try:
                    yield line | _times(name, scheme, n, k, m, clock)
                except Exception as error:
                    yield line | {"reason": (str(error).strip() or type(error).__name__).splitlines()[0][:200]}


def _times(name: str, scheme: str, n: int, k: int, m: int, clock: Clock) -> dict[str, Any]:
    torch, place = clock.torch, clock.place
    count = max(1, min(_MOST_SETS, -(-CACHE_BYTES // (n * k // 4))))
    calls: list[Call] = []
    for _ in range(count):
        trits = torch.randint(-1, 2, (n, k), dtype=torch.int8, device=place)
        layer = MAKERS[name](torch, scheme, trits, m)
        x = torch.randn((m, k), dtype=torch.float16, device=place)
        if (name, scheme) in _TAKES_INT8:
            x = torch.randint(-127, 128, (m, k), dtype=torch.int8, device=place)
        if not calls:
            want = x.double() @ trits.double().t()
            error = float((layer(x).double() - want).norm() / want.norm())
            if not error <= _ERRORS[scheme]:
                return {"reason": f"its answer is wrong: relative error {error:.1e}"}
        calls.append(_call(layer, x))
    (found,) = clock.seconds([calls])
    return {"seconds": found.seconds, "spread": found.spread}


def _call(layer: Layer, x: Any) -> Call:
    return lambda: layer(x)


def collect(name: str, seconds: float) -> list[dict[str, Any]]:
    """What a peer's process says within its time; a line that tells why, where it says nothing."""
    if importlib.util.find_spec(name) is None:
        return [{"peer": name, "reason": "not installed"}]
    command = [sys.executable, "-m", "benchmarks.gpu.peers", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        text, why = done.stdout, (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        ended = "" if done.returncode == 0 else why[:200]
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        text, ended = output.decode() if isinstance(output, bytes) else output, f"stopped after {seconds:.0f} s"
    return [*lines_of(text), *([{"peer": name, "reason": ended}] if ended else [])]


def lines_of(text: str) -> list[dict[str, Any]]:
    """Our lines in what a process printed: the last may have been cut off, and packages print what is none of ours."""
    lines = []
    for line in text.splitlines():
        with suppress(ValueError):
            found = json.loads(line)
            lines += [found] if isinstance(found, dict) and "peer" in found else []
    return lines


if __name__ == "__main__":
    for found in measure(sys.argv[1], Clock()):
        print(json.dumps(found), flush=True)
