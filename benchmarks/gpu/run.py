"""Check and time on a GPU: ``python -m benchmarks.gpu.run FOLDER OUT``; called by ``benchmarks/gpu.sh run``."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.gpu.cases import ARCH, CHECKED, CHECKED_ROWS, MODELS, name_of
from benchmarks.gpu.kernels import Kernels
from benchmarks.gpu.reference import bound, random_matrix, rounded
from benchmarks.gpu.table import render
from tvm_ternary.errors import TernaryError
from tvm_ternary.runtime.driver import read_devices

if TYPE_CHECKING:
    from benchmarks.gpu.device import Device

LIBRARIES = ("libtvm_runtime.so", "libtvm_runtime_cuda.so", "libcudart.so.13")
MODEL_ERROR = {"a8": 2e-2, "a16": 1e-2}
"""Relative in norm, against the CPU's outputs: int8 may round another way, 16 bits round at all."""


def main() -> int:
    """The exit status: 2 where there is no GPU, 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--budget", type=float, default=540.0, help="seconds after which nothing new is begun")
    parser.add_argument("--checks-only", action="store_true", help="no times, so that torch is not needed")
    parser.add_argument("--sanitized", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    started = time.monotonic()
    missing = [name for name in (*LIBRARIES, "kernels.so", "facts.json") if not (args.folder / name).is_file()]
    if missing:
        print(f"{args.folder}: lacks {', '.join(missing)}; run 'benchmarks/gpu.sh build' anew", file=sys.stderr)
        return 1
    for name, variable in zip(LIBRARIES, ("RUNTIME", "RUNTIME_CUDA", "CUDART"), strict=True):
        os.environ.setdefault(f"TVM_TERNARY_{variable}", str(args.folder / name))
    found = read_devices()
    gpu = next((gpu for gpu in found.gpus if gpu.arch == ARCH), None)
    if gpu is None:
        why = found.library or found.initialization or ", ".join(map(str, found.gpus)) or "none listed"
        print(f"{args.folder}: whole, its references work: {_try_references()}")
        print(f"no GPU of {ARCH} here ({why}): nothing was checked on one and nothing was measured", file=sys.stderr)
        return 2
    bench = Run(args.folder, args.out, started + args.budget, gpu.name, args.checks_only)
    if args.sanitized:
        return bench.small()
    return bench.all()


def _try_references() -> str:
    """Prove the references' arithmetic where there is no GPU to compare with: two ways to one product."""
    generator = np.random.default_rng(0)
    for n, k, text in CHECKED:
        matrix = random_matrix(n, k, text, generator)
        x = generator.standard_normal((3, k)).astype(np.float32)
        exact = rounded(x, matrix.scheme)
        single = exact.astype(np.float32) @ matrix.dense.T.astype(np.float32)
        assert (np.abs(single - exact @ matrix.dense.T) <= 4 * bound(exact, matrix)).all(), text
    return f"{len(CHECKED)} matrices"


class Run:
    """A visit to a GPU."""

    def __init__(self, folder: Path, out: Path, end: float, gpu: str, checks_only: bool) -> None:
        self.folder, self.end, self.kernels = folder, end, Kernels(folder)
        short = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
        self.lines = out / f"cuda-{short}.jsonl"
        self.facts = {"gpu": gpu, **json.loads((folder / "facts.json").read_text())}
        self.lines.write_text("")
        self.failed, self.checks_only = 0, checks_only

    @cached_property
    def timing(self) -> Device:
        """What needs torch."""
        from benchmarks.gpu.device import Device

        device = Device(self.folder)
        self.facts |= device.facts()
        return device

    def line(self, kind: str, **values: Any) -> None:
        """Add a line of results; it counts even if the next step brings the process down."""
        with self.lines.open("a") as stream:
            stream.write(json.dumps({"kind": kind, **values, **self.facts}) + "\n")

    def all(self) -> int:
        """Everything, the most important first."""
        print(f"checks on {self.facts['gpu']}", flush=True)
        for n, k, text in CHECKED:
            self.check(n, k, text, CHECKED_ROWS)
        self.models()
        if not self.failed and not self.checks_only:
            self.sanitize()
            self.time()
        self.lines.with_suffix(".md").write_text(render(self.lines))
        print(self.lines.with_suffix(".md").read_text())
        print(f"{self.lines}: {self.failed} checks failed")
        return 1 if self.failed else 0

    def small(self) -> int:
        """What runs under compute-sanitizer: each kind of kernel on a few rows."""
        for n, k, text in CHECKED[:6]:
            self.check(n, k, text, (3, 33))
        return 1 if self.failed else 0

    def check(self, n: int, k: int, text: str, rows: tuple[int, ...]) -> None:
        """Compare with the reference, each number of rows on fresh data and over poison."""
        generator = np.random.default_rng()
        matrix = random_matrix(n, k, text, generator)
        call = self.kernels.matmul(name_of(n, k, text), matrix.scheme, n, k, matrix.packed)
        for m in rows:
            x = generator.standard_normal((m, k)).astype(np.float32)
            exact = rounded(x, matrix.scheme)
            got = call(x)
            wrong = ~(np.abs(got - exact @ matrix.dense.T) <= bound(exact, matrix))
            self.line("check", case=name_of(n, k, text), m=m, wrong=int(wrong.sum()))
            if wrong.any():
                self.failed += 1
                print(f"WRONG {name_of(n, k, text)}, {m} rows: {wrong.sum()} of {wrong.size}", flush=True)

    def models(self) -> None:
        """The demo models against what a CPU made of the same inputs, and their times."""
        import tvm_ternary as tt

        for batch, length, scheme in MODELS:
            name = f"demo_{batch}x{length}_{scheme}"
            try:
                module = tt.load(self.folder / f"{name}.so", device="cuda")
            except TernaryError as error:
                self.failed += 1
                print(f"WRONG {error}", flush=True)
                continue
            with np.load(self.folder / f"{name}.npz") as saved:
                inputs = {spec.name: saved[spec.name] for spec in module.inputs}
                wanted = [saved[f"out:{spec.name}"] for spec in module.outputs]
            worst = 0.0
            for _ in range(3):
                for got, want in zip(module.run(None, inputs), wanted, strict=True):
                    worst = max(worst, float(np.linalg.norm(got.astype(float) - want) / max(np.linalg.norm(want), 1)))
            most = MODEL_ERROR["a16" if "a16" in scheme else "a8"]
            self.line("model check", case=name, error=worst, most=most)
            print(f"{name}: error {worst:.1e}", flush=True)
            if not worst <= most:
                self.failed += 1
            elif not self.checks_only:
                seconds = module.time(inputs, repeat=50, number=10).median
                eager = self.timing.bert(batch, length)
                self.line("model", case=name, seconds=seconds, torch_bf16_eager=eager)
                print(f"{name}: {1e6 * seconds:.0f} us, torch bf16 eager {1e6 * eager:.0f}", flush=True)

    def sanitize(self) -> None:
        """compute-sanitizer over each kind of kernel, where it is installed."""
        tool = shutil.which("compute-sanitizer")
        if tool is None:
            self.line("sanitizer", tool=None, status="not installed")
            return
        for check in ("memcheck", "racecheck"):
            command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu.run"]
            command += [str(self.folder), str(self.lines.parent / "sanitized"), "--sanitized"]
            (self.lines.parent / "sanitized").mkdir(exist_ok=True)
            try:
                status = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            except subprocess.TimeoutExpired:
                self.line("sanitizer", tool=check, status="not finished in 120 s")
                continue
            self.line("sanitizer", tool=check, status=status.returncode, said=status.stdout[-400:])
            self.failed += status.returncode == 9
        shutil.rmtree(self.lines.parent / "sanitized", ignore_errors=True)

    def time(self) -> None:
        """Every timed matrix and number of rows beside torch, in turns; what the budget does not reach is named."""
        self.line("copy", bytes_per_second=self.timing.copy_bandwidth())
        for case in self.timing.timed():
            if time.monotonic() > self.end:
                self.line("left out", case=case.name, m=case.m)
                continue
            self.line("time", **case.measure())
            print(case.told, flush=True)


if __name__ == "__main__":
    sys.exit(main())
