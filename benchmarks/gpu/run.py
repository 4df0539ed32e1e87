"""Check and time on a GPU: ``python -m benchmarks.gpu.run FOLDER OUT``; called by ``benchmarks/gpu.sh run``."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import tvm_ternary as tt
from benchmarks.gpu import peers
from benchmarks.gpu.cases import ARCH, Cases, cache_name, chunk_name, cpu_name, name_of, prompt_name
from benchmarks.gpu.models import inputs_of, random_sentences
from benchmarks.gpu.phases import AGAIN, WRONG
from benchmarks.gpu.reference import bound, random_activations, random_matrix, rounded
from benchmarks.gpu.results import FACTS, Results, known_cases, known_facts
from benchmarks.gpu.sanitizer import sanitize
from benchmarks.gpu.table import render
from tvm_ternary.runtime.driver import read_devices

LIBRARIES = ("libtvm_runtime.so", "libtvm_runtime_cuda.so", "libcudart.so.13")
_CHECK_SECONDS = 100.0
_GRACE_SECONDS = 30.0
# What times leave for the sanitizer and the peers.
_KEPT_SECONDS = 150.0
_PEER_SECONDS = 120.0
# They do what earlier processes have not begun.
_GOES_ON = ("times",)


def main() -> int:
    """The exit status: 2 where there is no GPU, 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--budget", type=float, default=540.0, help="seconds after which nothing new is begun")
    parser.add_argument("--checks-only", action="store_true", help="no times, so that torch is not needed")
    args = parser.parse_args()
    started = time.monotonic()
    missing = [name for name in (*LIBRARIES, "kernels.so", FACTS) if not (args.folder / name).is_file()]
    if missing:
        print(f"{args.folder}: lacks {', '.join(missing)}; run 'benchmarks/gpu.sh build' anew", file=sys.stderr)
        return 1
    for name, variable in zip(LIBRARIES, ("RUNTIME", "RUNTIME_CUDA", "CUDART"), strict=True):
        os.environ.setdefault(f"TVM_TERNARY_{variable}", str(args.folder / name))
    found = read_devices()
    if not found.gpus or found.gpus[0].arch != ARCH:
        why = found.library or found.initialization or ", ".join(map(str, found.gpus[:1])) or "none listed"
        without_gpu(args.folder)
        print(f"no GPU of {ARCH} here ({why}): nothing was checked on one and nothing was measured", file=sys.stderr)
        return 2
    timed_too = not args.checks_only
    if timed_too and importlib.util.find_spec("torch") is None:
        print("there is no torch: nothing will be timed", file=sys.stderr)
        timed_too = False
    return Visit(args.folder, args.out, started + args.budget, found.gpus[0].name).all(timed_too)


def without_gpu(folder: Path) -> None:
    """Try what needs no GPU, and say so: files, packages, kernels by name, references, the models for the CPU."""
    cases = known_cases(folder)
    names = [f"{kind}_{name_of(*case)}" for case in (*cases.timed, *cases.checked) for kind in ("rows", "matmul")]
    names += [f"{kind}_{cache_name(cache)}" for cache in cases.caches for kind in ("append", "step")]
    names += [f"prompt_{prompt_name(prompt)}" for prompt in cases.prompts]
    names += [f"prompt_{chunk_name(chunk)}" for chunk in cases.chunks]
    content = (folder / "kernels.so").read_bytes()
    absent = [name for name in names if name.encode() not in content]
    assert not absent, f"kernels.so lacks {', '.join(absent)}"
    print(f"kernels.so has its {len(set(names))} functions")
    there = [name for name in ("tvm_ffi", "torch", "triton", "gemlite", "bitblas") if importlib.util.find_spec(name)]
    print(f"Python {sys.version.split()[0]} finds {', '.join(there) or 'no package'}")
    print(f"references: {_try_references(cases)} matrices, two ways to each product agree")
    for scheme in dict.fromkeys(scheme for *_, scheme in cases.models):
        module = tt.load(folder / f"{cpu_name(scheme)}.so")
        sentences = random_sentences(*cases.free_sizes[-1], cases.words)
        outputs = module.run(None, inputs_of(module, sentences))
        assert all(np.isfinite(output).all() for output in outputs)
        print(f"{cpu_name(scheme)}: ran on the CPU with the runtime that travels")


def _try_references(cases: Cases) -> int:
    """Prove the references' arithmetic where there is no GPU to compare with: two ways to one product."""
    generator = np.random.default_rng(0)
    for n, k, text in cases.checked:
        matrix = random_matrix(n, k, text, generator)
        x = random_activations(3, k, matrix.scheme, generator)
        exact = rounded(x, matrix.scheme)
        want = (exact[:, None, :] * matrix.dense).sum(axis=-1)
        assert (np.abs(exact @ matrix.dense.T - want) <= bound(exact, matrix)).all(), text
    return len(cases.checked)


class Visit:
    """A visit to a GPU.

    Parameters
    ----------
    folder : Path
        What was built.
    out : Path
        Where lines and the table go.
    end : float
        On the monotonic clock: nothing new is begun after it.
    gpu : str
        Its name.
    """

    def __init__(self, folder: Path, out: Path, end: float, gpu: str) -> None:
        self.folder, self.out, self.end = folder, out, end
        self.results = Results(out, gpu, known_facts(folder))
        self.results.begin()
        self.failed: list[str] = []

    def all(self, timed_too: bool) -> int:
        """Everything, the most important first; the exit status."""
        print(f"{self.results.facts['gpu']}, built from {self.results.facts['commit']}", flush=True)
        right = self._phase("kernels", _CHECK_SECONDS)
        models_right = self._phase("models", _CHECK_SECONDS)
        if timed_too and right:
            self._phase("ceilings", _CHECK_SECONDS)
            if models_right:
                self._phase("model-times", _CHECK_SECONDS)
            self._phase("times", self.left() - _KEPT_SECONDS)
        if right:
            self._sanitize()
        if timed_too and right:
            self._peers()
        self.results.table.write_text(render(self.results.path))
        print(self.results.table.read_text())
        print(f"{self.results.path}: {', '.join(self.failed) or 'nothing'} failed")
        return 1 if self.failed else 0

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def _phase(self, name: str, seconds: float) -> bool:
        """Do a phase in a process of its own; again, where it says that what is left can be tried."""
        end, right = time.monotonic() + min(seconds, self.left()), True
        while True:
            left = max(end - time.monotonic(), 0.0)
            command = [sys.executable, "-m", "benchmarks.gpu.phases", name, str(self.folder), str(self.out), str(left)]
            try:
                status = subprocess.run(command, timeout=left + _GRACE_SECONDS, check=False).returncode
            except subprocess.TimeoutExpired:
                self.results.add("error", step=name, error="did not come to its end in time")
                status = WRONG
            if status not in (0, WRONG, AGAIN):
                self.results.add("error", step=name, error=f"its process ended with status {status}")
            right = right and status == 0
            if status in (0, WRONG) or name not in _GOES_ON or left == 0:
                break
        if not right:
            self.failed.append(name)
        return right

    def _sanitize(self) -> None:
        for line in sanitize(self.folder, self.out, self.left()):
            self.results.add("sanitizer", **line)
            print(f"compute-sanitizer {line['tool']}: {line['status']}", flush=True)
            if line["wrong"]:
                self.failed.append(f"compute-sanitizer {line['tool']}")

    def _peers(self) -> None:
        for name in peers.MAKERS:
            seconds = min(_PEER_SECONDS, self.left())
            lines = peers.collect(name, seconds) if seconds > 0 else [{"peer": name, "reason": "no time was left"}]
            for line in lines:
                self.results.add("peer", **line)
            told = sorted({line["reason"] for line in lines if "reason" in line})
            print(f"{name}: {sum('seconds' in line for line in lines)} times; {'; '.join(told)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
