"""The demo models on a GPU: by Python and by the C++ program, against what a CPU makes of the same fresh inputs."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import tvm_ternary as tt
from benchmarks.gpu.cases import Cases, cpu_name, model_name
from tvm_ternary.runtime.module import Module

ERRORS = {"a8": 2e-2, "a16": 1e-2}
"""Relative in norm, against the CPU's outputs: int8 may round another way, 16 bits round at all."""
SAME = 1e-4
"""Of the C++ program against Python, which run the same kernels."""
TRIALS = 3
RUNNER = "runner"
_RUNS = 200


def random_sentences(batch: int, length: int, words: int) -> dict[str, npt.NDArray[np.int64]]:
    """Words and a mask, each row of another length."""
    generator = np.random.default_rng()
    lengths = generator.integers(1, length + 1, (batch, 1))
    mask = (np.arange(length) < lengths).astype(np.int64)
    return {"input_ids": generator.integers(0, words, (batch, length)), "attention_mask": mask}


def most_error(scheme: str) -> float:
    """What is allowed."""
    return ERRORS["a16" if "a16" in scheme else "a8"]


def error_of(found: Iterable[npt.NDArray[Any]], wanted: Iterable[npt.NDArray[Any]]) -> float:
    """The largest relative error in norm; infinite where something is not a number."""
    worst = 0.0
    for got, want in zip(found, wanted, strict=True):
        error = np.linalg.norm(got.astype(np.float64) - want) / max(float(np.linalg.norm(want)), 1.0)
        worst = max(worst, float(error)) if np.isfinite(error) else np.inf
    return worst


class DemoModel:
    """A demo model of a folder, on a GPU, and the one that computes the same on the CPU.

    Parameters
    ----------
    folder : Path
    cases : Cases
        Of the folder.
    batch, length : int
        Zeros: they are chosen at every run.
    scheme : str
    device : str
        ``cpu`` is for tests.

    Raises
    ------
    TernaryError
        If either cannot be loaded.
    """

    def __init__(self, folder: Path, cases: Cases, batch: int, length: int, scheme: str, device: str = "cuda") -> None:
        self.name, self.scheme, self._words = model_name(batch, length, scheme), scheme, cases.words
        self.sizes = ((batch, length),) if batch else cases.free_sizes
        self.path = folder / f"{self.name}.so"
        self.module = tt.load(self.path, device=device)
        self.cpu = tt.load(folder / f"{cpu_name(scheme)}.so", device="cpu")

    def error(self) -> float:
        """Of fresh inputs, several times."""
        worst = 0.0
        for batch, length in self.sizes * TRIALS:
            inputs = self._inputs(batch, length)
            worst = max(worst, error_of(self.module.run(None, inputs), self.cpu.run(None, inputs)))
        return worst

    def seconds(self) -> float:
        """Median time of a run of the first size, arrays on the GPU, ten runs in a row."""
        inputs = self._inputs(*self.sizes[0])
        return self.module.time(inputs, repeat=50, number=10).median

    def by_runner(self, device: str = "cuda:0") -> dict[str, Any]:
        """Run the C++ program on the same inputs: its error against Python, and what it says of its time."""
        inputs = self._inputs(*self.sizes[0])
        wanted = self.module.run(None, inputs)
        with tempfile.TemporaryDirectory() as temporary:
            files = []
            for number, array in enumerate(inputs.values()):
                files.append(f"{temporary}/{number}.npy")
                np.save(files[-1], array)
            command = [str(self.path.parent / RUNNER), "--device", device, "--repeat", str(_RUNS)]
            command += ["--output", temporary, str(self.path), *files]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            if done.returncode:
                return {"error": None, "said": (done.stderr or done.stdout)[-400:]}
            found = [np.load(f"{temporary}/output_{number}.npy") for number in range(len(wanted))]
        return {"error": error_of(found, wanted), "said": done.stdout.strip().splitlines()[-1]}

    def _inputs(self, batch: int, length: int) -> dict[str, npt.NDArray[Any]]:
        return inputs_of(self.module, random_sentences(batch, length, self._words))


def inputs_of(module: Module, arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """Those that a model has, in its order."""
    return {spec.name: arrays[spec.name] for spec in module.inputs}
