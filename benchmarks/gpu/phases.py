"""What is done on a GPU, by ``python -m benchmarks.gpu.phases PHASE FOLDER OUT SECONDS``: a process for each phase.

After an error of CUDA nothing works in its process; what the other phases find out must not depend on it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.gpu.attention import CheckedCache
from benchmarks.gpu.cases import (
    TIMED_PROMPT_TOKENS,
    TIMED_TOKENS,
    Cache,
    Chunk,
    Prompt,
    cache_name,
    chunk_name,
    model_name,
    name_of,
    prompt_name,
)
from benchmarks.gpu.kernels import Kernels
from benchmarks.gpu.models import SAME, DemoModel, most_error
from benchmarks.gpu.prompts import wrong_results
from benchmarks.gpu.reference import bound, random_activations, random_matrix, rounded
from benchmarks.gpu.results import Results, known_cases, known_facts
from tvm_ternary.runtime.driver import read_devices

if TYPE_CHECKING:
    from benchmarks.gpu.device import Device

SANITIZED_ROWS = (3, 33)
WRONG, AGAIN = 4, 3
"""Exit statuses: something is wrong; an error of CUDA, but what is left can be tried in a new process."""


class Phases:
    """The phases of a visit.

    Parameters
    ----------
    folder : Path
        What was built.
    results : Results
    seconds : float
        After so many nothing new is begun.
    """

    def __init__(self, folder: Path, results: Results, seconds: float) -> None:
        self.folder, self.results, self._end = folder, results, time.monotonic() + seconds
        self.cases, self.wrong = known_cases(folder), 0

    @cached_property
    def device(self) -> Device:
        """What needs torch."""
        from benchmarks.gpu.device import Device, settings

        device = Device(self.folder)
        self.results.facts |= {**device.facts(), "card": settings()}
        return device

    def do(self, phase: str) -> None:
        """A phase, by name."""
        if phase in NEED_TORCH:
            # Before our own runtime, so that both share one CUDA runtime library.
            _ = self.device
        PHASES[phase](self)

    def late(self) -> bool:
        """Whether nothing new should be begun."""
        return time.monotonic() > self._end

    def kernels(self) -> None:
        """Compare small kernels of every kind with their references, each number of rows on fresh data over poison."""
        self._kernels(self.cases.checked_rows)
        self._attention(self.cases.caches, self.cases.prompts, self.cases.chunks)

    def small_kernels(self) -> None:
        """What runs under compute-sanitizer."""
        self._kernels(SANITIZED_ROWS)
        self._attention(
            [cache for cache in self.cases.caches if cache[-1] < TIMED_TOKENS],
            [prompt for prompt in self.cases.prompts if prompt[3] < TIMED_PROMPT_TOKENS],
            self.cases.chunks,
        )

    def _kernels(self, rows: Sequence[int]) -> None:
        kernels, generator = Kernels(self.folder), np.random.default_rng()
        for n, k, text in self.cases.checked:
            matrix, name = random_matrix(n, k, text, generator), name_of(n, k, text)
            call = kernels.matmul(name, matrix.scheme, n, k, matrix.packed)
            for m in rows:
                x = random_activations(m, k, matrix.scheme, generator)
                exact = rounded(x, matrix.scheme)
                off = ~(np.abs(call(x) - exact @ matrix.dense.T) <= bound(exact, matrix))
                self._checked(name, m, int(off.sum()))

    def _attention(self, caches: Sequence[Cache], prompts: Sequence[Prompt], chunks: Sequence[Chunk]) -> None:
        kernels, generator = Kernels(self.folder), np.random.default_rng()
        for cache in caches:
            checked = CheckedCache(kernels, cache, generator)
            for kind, wrong in checked.wrong().items():
                self._checked(f"{kind}_{cache_name(cache)}", 1, wrong)
            for chunk in chunks:
                if chunk[:5] == cache:
                    wrong = checked.wrong_behind(chunk[5], generator)
                    self._checked(f"prompt_{chunk_name(chunk)}", chunk[5], wrong)
        for prompt in prompts:
            self._checked(f"prompt_{prompt_name(prompt)}", prompt[3], wrong_results(kernels, prompt, generator))

    def _checked(self, name: str, m: int, wrong: int) -> None:
        self.results.add("check", case=name, m=m, wrong=wrong)
        if wrong:
            self._fail(f"{name}, {m} rows: {wrong} results")

    def _fail(self, what: str) -> None:
        self.wrong += 1
        print(f"WRONG {what}", flush=True)

    def models(self) -> None:
        """The demo models, by Python and by the C++ program."""
        for batch, length, scheme in self.cases.models:
            self.guarded(model_name(batch, length, scheme), self._model, batch, length, scheme)

    def _model(self, batch: int, length: int, scheme: str) -> None:
        model = DemoModel(self.folder, self.cases, batch, length, scheme)
        error, most = model.error(), most_error(scheme)
        self.results.add("model check", case=model.name, error=error if np.isfinite(error) else None, most=most)
        if not error <= most:
            self._fail(f"{model.name}: relative error {error:.1e}, expected {most:.0e} at most")
            return
        runner = model.by_runner()
        self.results.add("runner", case=model.name, **runner)
        if runner["error"] is None or not runner["error"] <= SAME:
            self._fail(f"{model.name} by the C++ program: error {runner['error']}, {runner['said']}")
        print(f"{model.name}: relative error {error:.1e}; C++: {runner['said']}", flush=True)

    def model_times(self) -> None:
        """The demo models beside their network in torch."""
        from benchmarks.gpu.network import network

        for batch, length, scheme in self.cases.models:
            model = DemoModel(self.folder, self.cases, batch, length, scheme)
            run = network(self.device.torch, *model.sizes[0])
            eager = self.device.pipelined(run)
            (graph,) = self.device.seconds([[run]])
            line = {"seconds": model.seconds(), "torch_bf16_eager": eager, "torch_bf16_graph": graph.seconds}
            self.results.add("model", case=model.name, fixed=batch > 0, **line)
            print(f"{model.name}: {told(line)}", flush=True)

    def ceilings(self) -> None:
        """What the card can do at best."""
        copied, peak = self.device.copy_bandwidth(), self.device.peak()
        self.results.add("ceilings", copy_bytes_per_second=copied, torch_bf16_operations_per_second=peak)
        print(f"copies {copied / 1e12:.2f} TB/s, torch bf16 {peak / 1e12:.0f} T operations/s", flush=True)

    def times(self) -> None:
        """Check each timed matrix, then time it; what time does not reach is named."""
        begun = {row["case"] for row in self.results.rows("begin")}
        caches = [cache for cache in self.cases.caches if cache[-1] >= TIMED_TOKENS]
        prompts = [prompt for prompt in self.cases.prompts if prompt[3] >= TIMED_PROMPT_TOKENS]
        steps = [(cache_name(cache), self._time_cache, cache) for cache in caches]
        steps += [(f"prompt_{prompt_name(prompt)}", self._time_prompt, prompt) for prompt in prompts]
        chunks = [chunk for chunk in self.cases.chunks if chunk[4] >= TIMED_TOKENS]
        steps += [(f"prompt_{chunk_name(chunk)}", self._time_chunk, chunk) for chunk in chunks]
        for name, step, case in steps:
            if name not in begun:
                self.results.add("begin", case=name)
                self.guarded(name, step, case)
                self.device.torch.cuda.empty_cache()
        for n, k, text in self.cases.timed:
            name = name_of(n, k, text)
            if name in begun:
                continue
            if self.late():
                self.results.add("left out", case=name, m="all")
                continue
            self.results.add("begin", case=name)
            self.guarded(name, self._time_matrix, n, k, text)
            self.device.torch.cuda.empty_cache()

    def _time_cache(self, cache: Cache) -> None:
        from benchmarks.gpu.attention import TimedCache

        line = TimedCache(self.device, cache).times()
        self.results.add("attention", **line)
        print(f"{line['case']}: {told(line)}", flush=True)

    def _time_prompt(self, prompt: Prompt) -> None:
        from benchmarks.gpu.prompts import TimedPrompt

        line = TimedPrompt(self.device, prompt).times()
        self.results.add("prompt", **line)
        print(f"{line['case']}: {told(line)}", flush=True)

    def _time_chunk(self, chunk: Chunk) -> None:
        from benchmarks.gpu.attention import TimedCache

        line = TimedCache(self.device, chunk[:5]).prompt_times(chunk[5])
        self.results.add("prompt", **line)
        print(f"{line['case']}: {told(line)}", flush=True)

    def _time_matrix(self, n: int, k: int, text: str) -> None:
        from benchmarks.gpu.timing import TimedMatrix

        matrix, before = TimedMatrix(self.device, n, k, text), self.wrong
        for m, wrong in matrix.wrong(sorted({*self.cases.checked_rows, *self.cases.timed_rows})).items():
            self._checked(matrix.name, m, wrong)
        if self.wrong > before:
            return
        floors = known_facts(self.folder)["floors"][matrix.name]
        for m in self.cases.timed_rows:
            if self.late():
                self.results.add("left out", case=matrix.name, m=m)
                continue
            line = matrix.times(m, floors)
            self.results.add("time", **line)
            print(f"{matrix.name} M={m}: {told(line)}", flush=True)

    def guarded(self, name: str, step: Callable[..., None], *arguments: Any) -> None:
        """Do a step. What it raises is a failed check; an error of CUDA ends the process."""
        try:
            step(*arguments)
        except Exception as error:
            text = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:300]}"
            self.results.add("error", step=name, error=text)
            self._fail(f"{name}: {text}")
            if "CUDA" in text:
                sys.exit(AGAIN)


def told(line: dict[str, Any]) -> str:
    """Times for people."""
    found = {key: value for key, value in line.items() if key.startswith(("seconds", "torch"))}
    return ", ".join(f"{key.removeprefix('seconds_') or key} {1e6 * value:.1f} us" for key, value in found.items())


PHASES: dict[str, Callable[[Phases], None]] = {
    "kernels": Phases.kernels,
    "small-kernels": Phases.small_kernels,
    "models": Phases.models,
    "ceilings": Phases.ceilings,
    "times": Phases.times,
    "model-times": Phases.model_times,
}
NEED_TORCH = ("ceilings", "times", "model-times")


def main(phase: str, folder: Path, out: Path, seconds: float) -> int:
    """Do a phase; the exit status."""
    # Whatever GPU it is: that it is the right one was looked at before.
    results = Results(out, read_devices().gpus[0].name, known_facts(folder))
    phases = Phases(folder, results, seconds)
    phases.guarded(phase, phases.do, phase)
    return WRONG if phases.wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4])))
