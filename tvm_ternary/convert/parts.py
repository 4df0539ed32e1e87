"""Work that outlives the process: what a job has finished lies in a folder beside its output until all of it has.

``OUT.partial`` holds ``job.json``, which says what job it is, and a file for every group of matrices that is done. A
killed job that is started again goes on from there; another job does not mix with it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tvm_ternary.errors import OutputError
from tvm_ternary.files import atomic_path
from tvm_ternary.formats import TernaryTensor, save_tensors
from tvm_ternary.formats.checkpoint import CheckpointFile

_JOB, _RESULTS = "job.json", "results"


Part = tuple[CheckpointFile, dict[str, Any]]


class Parts:
    """The finished parts of a job.

    Parameters
    ----------
    folder : path
        ``OUT.partial``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def finished(self) -> Iterator[Part]:
        """The parts there are, each with its matrices and what was measured."""
        for path in sorted(self.folder.glob("part-*.safetensors")):
            yield _part(path)

    def save(self, number: int, weights: Mapping[str, TernaryTensor], results: Mapping[str, Any]) -> Part:
        """Finish a part; it appears whole or not at all, and is read from there."""
        path = self.folder / f"part-{number:05d}.safetensors"
        save_tensors(path, weights, {_RESULTS: json.dumps(results, sort_keys=True)})
        return _part(path)


def _part(path: Path) -> Part:
    content = CheckpointFile(path)
    return content, json.loads(content.metadata[_RESULTS])


@contextmanager
def open_parts(output: Path, job: Mapping[str, Any], *, resume: bool) -> Iterator[Parts]:
    """Begin a job or go on with it; nobody else can meanwhile.

    Parameters
    ----------
    output : path
        What the job is to make.
    job : mapping
        All that its result depends on, as JSON has it.
    resume : bool
        Whether to go on with what there is; otherwise it is thrown away.

    Raises
    ------
    OutputError
        If there are parts of another job, another process works on it, or the folder cannot be written.
    """
    folder = output.with_name(f"{output.name}.partial")
    try:
        folder.mkdir(exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise OutputError(str(folder), f"cannot be made ({error.strerror})", "check the folder above it") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(str(folder), "is being worked on by another process", "wait for it") from None
        if not resume:
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        _claim(folder, json.loads(json.dumps(job)))
        yield Parts(folder)
    finally:
        os.close(handle)


def _claim(folder: Path, job: dict[str, Any]) -> None:
    path = folder / _JOB
    if not path.exists():
        if any(folder.glob("*.safetensors")):
            raise OutputError(str(folder), f"holds parts, but no {_JOB} that says what of", _AGAIN)
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(job, indent=2, sort_keys=True) + "\n", "utf-8")
        return
    try:
        other = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        raise OutputError(str(path), "cannot be read", _AGAIN) from None
    if other != job:
        keys = sorted(key for key in {**job, **other} if job.get(key) != other.get(key))
        was, now = (_short(source.get(keys[0])) for source in (other, job))
        raise OutputError(str(folder), f"holds an unfinished job whose {keys[0]} is {was}, not {now}", _AGAIN)


_AGAIN = "go on with the same options, or begin again with --no-resume"


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 60 else f"{hashlib.sha256(text.encode()).hexdigest()[:12]} (a digest)"
