"""Build candidates to be measured elsewhere: a folder with libraries, what they are, and what measures them."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tvm

from tvm_ternary.build.link import find_linker
from tvm_ternary.build.nvcc import find_nvcc
from tvm_ternary.build.package_files import copy_python, package_folder
from tvm_ternary.errors import HostError, OptionError, OutputError
from tvm_ternary.runtime.cuda import RUNTIME_CUDA
from tvm_ternary.runtime.library import CUDART, VARIABLE_CUDART, find_cudart, find_runtime, find_runtime_cuda
from tvm_ternary.schedule.records import ABOUT, About, read_log
from tvm_ternary.target import Target
from tvm_ternary.tuning.batch.measure import CANDIDATES, FORMAT, RESULTS
from tvm_ternary.tuning.kernels import build_kernels
from tvm_ternary.tuning.task import Decisions, Realize, Task
from tvm_ternary.tuning.tuner import Job, Options, open_jobs, require_packages
from tvm_ternary.tuning.workers import BUILD_SECONDS, Argument, Failure, Workers

# A library is a run of nvcc, which compiles one kernel after another; several keep all CPUs busy.
_OF_LIBRARY = 8
# What is measured takes whole factors of a weight's planes to sum to no more than 63, as quantizing does.
_RANGES: Mapping[str, tuple[float, float]] = {"factor": (-15, 15), "x_half": (-1.0, 1.0), "scale": (0.01, 0.02)}
_PACKAGE = Path(__file__).resolve().parents[2]
_NEEDED = ("files.py", "tuning/__init__.py", "tuning/batch/__init__.py", "tuning/batch/gpu.py")
_README = """\
{count} candidates of {tasks} ternary matmuls for {target}, to be measured on such a GPU.

    python3 measure.py

needs numpy, Python {python} and an NVIDIA driver for CUDA {cuda} or later; no CUDA toolkit and no compiler. For
another Python remove python/tvm_ffi and python/apache_tvm_ffi-*, and run
    pip install apache-tvm-ffi=={ffi}
It writes results.jsonl into this folder, task by task; called again, it goes on. Bring that file back to where the
candidates were exported, into the same folder, and run there
    tvm-ternary tune --import-results {folder}/results.jsonl --work-dir LOG
"""


@dataclass(frozen=True)
class ExportReport:
    """What was exported.

    Attributes
    ----------
    path : str
    candidates : dict of str to int
        Of each task, by name.
    errors : tuple of (str, int)
        Why candidates could not be built, and how many; these are left out.
    bytes : int
        Of all files.
    """

    path: str
    candidates: dict[str, int]
    errors: tuple[tuple[str, int], ...]
    bytes: int

    def as_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        errors = [{"reason": reason, "candidates": count} for reason, count in self.errors]
        return {**asdict(self), "errors": errors}


@dataclass
class _Candidate:
    """A candidate on its way to a library."""

    job: Job
    point: Decisions
    name: str
    library: str = ""
    arguments: tuple[Argument, ...] = ()


def export_candidates(
    tasks: Sequence[Task],
    folder: str | Path,
    target: Target,
    realize: Realize,
    options: Options,
    *,
    work_dir: str | Path | None = None,
    progress: Callable[[str, int, int], None] = lambda name, done, count: None,
) -> ExportReport:
    """Build candidates of each task, the default first, for `measure.py` to measure them on a machine with a GPU.

    Parameters
    ----------
    tasks : sequence of Task
        Those of `tvm_ternary.schedule.cuda.tasks`.
    folder : path
        New, or empty. It appears whole or not at all.
    target : Target
        Of one GPU architecture.
    realize : callable
    options : Options
        ``trials`` counts candidates of a task, those in the log of ``work_dir`` included. Time limit, threads and
        tracker mean nothing here.
    work_dir : path, optional
        A log. What it holds guides the search, is not exported again, except for the best and the default.
    progress : callable
        Told of a task, and how many libraries of how many are built.

    Returns
    -------
    ExportReport

    Raises
    ------
    OptionError
        If the folder is not empty, the target is none of a GPU, or the log is of another target.
    HostError
        If this host lacks nvcc, a linker or a package, or all candidates of a task cannot be built.
    OutputError
        If the folder cannot be written.
    """
    if target.kind != "cuda":
        raise OptionError(
            f"target {target.name}", "is for a CPU; candidates are exported for GPUs", "use --rpc-tracker"
        )
    if not tasks:
        raise OptionError("tune", "got nothing to tune; expected at least one ternary matrix")
    require_packages(options)
    find_nvcc(target.archs)
    find_linker(str(target.host_tvm["mtriple"]))
    jobs = open_jobs(tasks, tvm.target.Target(target.tvm), options, _records(work_dir, target))
    with _fresh_folder(Path(folder)) as temporary:
        wanted = [
            _Candidate(job, point, f"t{number}_c{index}")
            for number, job in enumerate(jobs)
            for index, point in enumerate(_sample(job, options.trials))
        ]
        built, errors = _build(wanted, temporary, target, realize, progress)
        for job in jobs:
            if not any(c.job is job and c.point == job.default() for c in built):
                cause = f" ({errors.most_common(1)[0][0]})" if errors else ""
                raise HostError(job.task.name, f"its default schedule cannot be built{cause}")
        _write_candidates(built, temporary, target)
        _copy_runtime(temporary)
        _write_readme(built, temporary, target, Path(folder))
        size = sum(file.stat().st_size for file in temporary.rglob("*") if file.is_file())
    counts = Counter(candidate.job.task.name for candidate in built)
    return ExportReport(str(folder), dict(counts), tuple(errors.most_common()), size)


def _records(work_dir: str | Path | None, target: Target) -> Sequence[Any]:
    if work_dir is None or not (Path(work_dir) / ABOUT).is_file():
        return ()
    return read_log(work_dir, target=target.name).records


def _sample(job: Job, trials: int) -> list[Decisions]:
    """The default, the best so far, and new candidates up to the number of trials."""
    count = trials - len(job.costs)
    points: list[Decisions] = []
    while len(points) < count and (new := job.search.propose(count - len(points))):
        points += new
        # Nothing is known of them; the search goes on to others.
        job.search.tell({})
    return list(dict.fromkeys([*job.finalists(), *points]))


def _build(
    wanted: Sequence[_Candidate],
    folder: Path,
    target: Target,
    realize: Realize,
    progress: Callable[[str, int, int], None],
) -> tuple[list[_Candidate], Counter[str]]:
    """Build libraries of some candidates each; where one fails, its candidates one by one."""
    workers = Workers(len(os.sched_getaffinity(0)), BUILD_SECONDS, 1)
    built: list[_Candidate] = []
    errors: Counter[str] = Counter()
    try:
        groups = list(_groups(wanted))
        started = [(group, _start(workers, group, folder, target, realize)) for group in groups]
        for done, (group, future) in enumerate(started, 1):
            result = workers.outcome(future)
            alone = [[c] for c in group] if isinstance(result, Failure) and len(group) > 1 else []
            for part, outcome in [
                *([(group, result)] if not alone else []),
                *((part, workers.outcome(_start(workers, part, folder, target, realize))) for part in alone),
            ]:
                if isinstance(outcome, Failure):
                    errors[outcome.reason] += len(part)
                    continue
                for candidate in part:
                    candidate.library, candidate.arguments = f"{part[0].name}.so", outcome
                built += part
            progress(group[0].job.task.name, done, len(started))
    finally:
        workers.close()
    return built, errors


def _groups(wanted: Sequence[_Candidate]) -> Iterator[list[_Candidate]]:
    for job in dict.fromkeys(candidate.job for candidate in wanted):
        own = [candidate for candidate in wanted if candidate.job is job]
        yield from (own[start : start + _OF_LIBRARY] for start in range(0, len(own), _OF_LIBRARY))


def _start(workers: Workers, group: Sequence[_Candidate], folder: Path, target: Target, realize: Realize) -> Any:
    modules, names = [c.job.decided(c.point).mod for c in group], [c.name for c in group]
    return workers.submit(build_kernels, realize, modules, names, target, str(folder / f"{group[0].name}.so"))


def _write_candidates(built: Sequence[_Candidate], folder: Path, target: Target) -> None:
    rows: list[dict[str, Any]] = [{"format": FORMAT, "target": target.name, "tvm": About(target.name, 1).tvm}]
    for candidate in built:
        job = candidate.job
        # By the workload's parameters, in whose order the candidates take them.
        names = [str(param.name) for param in job.module["main"].params]
        inputs = [_input(name, *argument) for name, argument in zip(names, candidate.arguments, strict=True)]
        rows.append(
            {
                "id": candidate.name,
                "task": job.task.name,
                "workload": job.key,
                "decisions": dict(zip(job.task.space, candidate.point, strict=True)),
                "library": candidate.library,
                "inputs": inputs,
                "trace": job.trace(candidate.point),
            }
        )
    (folder / CANDIDATES).write_text("".join(json.dumps(row) + "\n" for row in rows))


def _input(name: str, shape: tuple[int, ...], dtype: str) -> dict[str, Any]:
    limits = dict(zip(("low", "high"), _RANGES[name], strict=True)) if name in _RANGES else {}
    return {"name": name, "dtype": dtype, "shape": list(shape), **limits}


def _copy_runtime(folder: Path) -> None:
    """Copy what `measure.py` loads, the driver's library left out."""
    nowhere = folder / "python"
    cudart = find_cudart(nowhere)
    if isinstance(cudart, str):
        hint = f"install nvidia-cuda-runtime, or name the file in {VARIABLE_CUDART}"
        raise HostError(CUDART, "CUDA's runtime library was not found", hint)
    ffi = package_folder("tvm_ffi") / "lib" / "libtvm_ffi.so"
    for library in (ffi, find_runtime(nowhere), find_runtime_cuda(nowhere), cudart):
        shutil.copyfile(library, folder / (CUDART if library is cudart else library.name))
    copy_python(nowhere)
    for name in _NEEDED:
        (nowhere / "tvm_ternary" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(_PACKAGE / name, nowhere / "tvm_ternary" / name)
    shutil.copyfile(Path(__file__).with_name("measure.py"), folder / "measure.py")


def _write_readme(built: Sequence[_Candidate], folder: Path, target: Target, final: Path) -> None:
    text = _README.format(
        count=len(built),
        tasks=len({candidate.job.key for candidate in built}),
        target=target.name,
        python=".".join(map(str, sys.version_info[:2])),
        cuda=".".join(map(str, RUNTIME_CUDA)),
        ffi=version("apache-tvm-ffi"),
        folder=final.name,
    )
    (folder / "README.txt").write_text(text)


@contextmanager
def _fresh_folder(folder: Path) -> Iterator[Path]:
    """A folder beside, which takes the name in the end."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        problem = f"is not empty; expected a new folder, or an empty one (its {RESULTS} may not be imported yet)"
        raise OptionError(str(folder), problem, "name another")
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise OutputError(str(folder), f"cannot be made ({error.strerror})", "name another") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        os.replace(temporary, folder)
    except OSError as error:
        raise OutputError(
            str(folder), f"cannot be written ({error.strerror})", "check permissions and space"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
