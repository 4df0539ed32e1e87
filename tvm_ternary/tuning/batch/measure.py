"""Measure the candidates in this folder on a GPU of this machine; see README.txt.

Each task has a process of its own, in which its candidates are checked against the default schedule and then timed in
turns. One that takes its process with it is noted, and the others are measured in another one. What is measured is in
results.jsonl as soon as its task is done, and not measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
if (FOLDER / "python").is_dir():
    sys.path.insert(0, str(FOLDER / "python"))

import numpy as np  # noqa: E402

from tvm_ternary.errors import HostError, OptionError, TernaryError  # noqa: E402
from tvm_ternary.files import atomic_path  # noqa: E402
from tvm_ternary.runtime.driver import read_devices  # noqa: E402
from tvm_ternary.tuning.batch.gpu import Gpu, find_gpu, random_sets, random_values, time_in_turns  # noqa: E402

FORMAT = 1
CANDIDATES = "candidates.jsonl"
RESULTS = "results.jsonl"
# Sums of the same products in another order, in float32, beside the largest of all results.
_TOLERANCE = 1e-4
_REASON_LENGTH = 300

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and return the exit status: 2 after one line about what is missing."""
    args = _parser().parse_args(arguments)
    try:
        if args.child is not None:
            _child(args)
        else:
            _measure(args)
    except TernaryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", type=int, default=0, metavar="N", help="number of the GPU (default: 0)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="times of each candidate (default: 7)")
    parser.add_argument("--milliseconds", type=float, default=5.0, help="of each time, about (default: 5)")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds a candidate may take (default: 120)")
    parser.add_argument("--sets", type=int, default=64, metavar="N", help="of inputs in turns, at most (default: 64)")
    parser.add_argument("--child", metavar="TASK", help=argparse.SUPPRESS)
    parser.add_argument("--skip", nargs="*", default=[], help=argparse.SUPPRESS)
    return parser


def _measure(args: argparse.Namespace) -> None:
    header, candidates = read_rows(FOLDER / CANDIDATES)
    gpu = find_gpu(read_devices(), header["target"].removeprefix("cuda-"), args.device)
    about = {
        "format": FORMAT,
        "candidates": digest(FOLDER / CANDIDATES),
        "target": header["target"],
        "tvm": header["tvm"],
        "machine": platform.node(),
        "device": gpu.name,
    }
    results = _known(about)
    tasks: dict[str, list[Row]] = {}
    for candidate in candidates:
        tasks.setdefault(candidate["workload"], []).append(candidate)
    for number, (workload, rows) in enumerate(tasks.items(), 1):
        if all(row["id"] in results for row in rows):
            continue
        results.update(_measure_task(args, workload, rows))
        _write(about, list(results.values()))
        failed = sum("error" in results[row["id"]] for row in rows)
        print(f"{number} of {len(tasks)}: {rows[0]['task']}, {len(rows)} candidates, {failed} failed", flush=True)
    print(f"{FOLDER / RESULTS}: {len(results)} candidates on {gpu.name}")


def read_rows(path: Path) -> tuple[Row, list[Row]]:
    """Read a header and the rows behind it.

    Raises
    ------
    OptionError
        If it is no such file, or one of another format.
    """
    try:
        header, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not all(isinstance(row, dict) for row in (header, *rows)):
            raise ValueError("a line is no object")
    except (OSError, ValueError) as error:
        raise OptionError(str(path), f"cannot be read ({error})", "export the candidates again") from error
    if header.get("format") != FORMAT:
        raise OptionError(str(path), f"has format {header.get('format')}; expected {FORMAT}", "export them again")
    return header, rows


def digest(path: Path) -> str:
    """What tells a file of candidates from others."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _known(about: Row) -> dict[str, Row]:
    """What was measured before; only of these candidates and on this GPU."""
    if not (FOLDER / RESULTS).exists():
        return {}
    header, rows = read_rows(FOLDER / RESULTS)
    if header != about:
        other = ", ".join(f"{key} {header.get(key)}" for key in about if header.get(key) != about[key])
        raise OptionError(str(FOLDER / RESULTS), f"is of another run ({other})", "move it away to measure anew")
    return {row["id"]: row for row in rows}


def _write(about: Row, rows: Sequence[Row]) -> None:
    with atomic_path(FOLDER / RESULTS) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in (about, *rows)))


def _measure_task(args: argparse.Namespace, workload: str, rows: Sequence[Row]) -> dict[str, Row]:
    """Start processes until one comes to its end; each candidate that ended one is left out of the next."""
    found: dict[str, Row] = {}
    default = rows[0]["id"]
    while default not in found or "seconds" in found[default]:
        begun, done = None, False
        with _started(args, workload, found) as (messages, cause):
            for message in messages:
                begun = message.get("begin", begun)
                if "id" in message:
                    found[message["id"]] = message
                done = done or "done" in message
            ending = cause()
        if done:
            break
        if begun is None:
            raise HostError("measure.py", f"cannot measure {rows[0]['task']} ({ending})", "check nvidia-smi")
        if begun not in found:
            found[begun] = {"id": begun, "error": ending}
        # What was timed before counts for nothing: it was not in turns with all others.
        found = {key: row for key, row in found.items() if "error" in row}
    missing = {row["id"] for row in rows} - found.keys()
    return {**found, **{key: {"id": key, "error": "its task's default schedule failed"} for key in missing}}


@contextlib.contextmanager
def _started(args: argparse.Namespace, workload: str, found: Mapping[str, Row]) -> Iterator[Any]:
    """A process that measures a task: its messages, and what is said of its end. Silence ends it."""
    options = [f"--{name}={getattr(args, name)}" for name in ("device", "rounds", "milliseconds", "sets")]
    command = [sys.executable, str(FOLDER / "measure.py"), f"--child={workload}", *options, "--skip", *found]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        def messages() -> Iterator[Row]:
            assert process.stdout is not None
            while True:
                timer = threading.Timer(args.timeout, end)
                timer.start()
                line = process.stdout.readline()
                timer.cancel()
                if not line:
                    process.wait()
                    return
                with contextlib.suppress(ValueError):
                    yield json.loads(line)

        def cause() -> str:
            if late.is_set():
                return f"took more than {args.timeout:g} s"
            log.seek(0)
            lines = [line for line in log.read().splitlines() if line.strip()] or [""]
            return f"ended its process (status {process.returncode}): {lines[-1]}"[:_REASON_LENGTH]

        try:
            yield messages(), cause
        finally:
            process.kill()
            process.wait()


def _child(args: argparse.Namespace) -> None:
    """Check and time what is left of a task, and tell of each step; the first thing that goes wrong is the end."""
    _, candidates = read_rows(FOLDER / CANDIDATES)
    rows = [row for row in candidates if row["workload"] == args.child and row["id"] not in args.skip]
    # What libraries print must not come between.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(**message: Any) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    gpu = Gpu(FOLDER, args.device)
    sets = random_sets(gpu, rows[0]["inputs"], args.sets)
    expected, functions, right = None, [], []
    for row in rows:
        tell(begin=row["id"])
        try:
            function = gpu.function(FOLDER / row["library"], row["id"])
            result = _result(gpu, function, row["inputs"])
        except Exception as error:
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
            tell(id=row["id"], error=text[:_REASON_LENGTH])
            # After an error of CUDA nothing works in this process.
            return
        wrong = _difference(result, result if expected is None else expected)
        if wrong is not None:
            tell(id=row["id"], error=wrong)
            if expected is None:
                return
            continue
        expected = result if expected is None else expected
        functions.append(function)
        right.append(row["id"])
    times = time_in_turns(
        gpu, functions, sets, args.rounds, args.milliseconds, begin=lambda index: tell(begin=right[index])
    )
    for name, seconds in zip(right, times, strict=True):
        tell(id=name, seconds=seconds)
    tell(done=True)


def _result(gpu: Gpu, function: Any, inputs: Sequence[Mapping[str, Any]]) -> Any:
    """What a candidate makes of random inputs; its last array is poisoned before."""
    generator = np.random.default_rng(1)
    arrays = [gpu.array(random_values(given, generator), given["dtype"]) for given in inputs[:-1]]
    y = gpu.array(np.full(tuple(inputs[-1]["shape"]), np.nan, np.float32), "float32")
    function(*arrays, y)
    return gpu.read(y)


def _difference(result: Any, expected: Any) -> str | None:
    """Tell what is wrong with a result, None if nothing is."""
    if not np.isfinite(result).all():
        return f"{int((~np.isfinite(result)).sum())} of {result.size} results are not finite"
    error, size = float(np.abs(result - expected).max()), float(np.abs(expected).max())
    return f"results differ by {error:.3g} of {size:.3g}" if error > _TOLERANCE * size else None


if __name__ == "__main__":
    sys.exit(main())
