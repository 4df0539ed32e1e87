"""Put an artifact into a folder with all that its target needs beside the driver."""

from __future__ import annotations

import json
import os
import platform
import secrets
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tvm_ternary.build.package_files import (
    copy_headers,
    copy_licences,
    copy_model,
    copy_python,
    runtime_libraries,
    write_texts,
)
from tvm_ternary.build.runner import BINARY, build_command, build_runner, find_compiler
from tvm_ternary.errors import HostError, OutputError
from tvm_ternary.runtime.artifact import Artifact, read_artifact

FORMAT = "tvm-ternary package"
INDEX = "package.json"
# What a file is to a reader, by the first part of its path in the folder; other files are model and libraries.
_PARTS = {
    BINARY: "C++ runner",
    "runner.cpp": "C++ runner",
    "include": "C++ headers",
    "python": "Python",
    "run.py": "Python",
    "licenses": "licences, README",
    "README.txt": "licences, README",
    INDEX: "licences, README",
}


@dataclass(frozen=True)
class Part:
    """Files of a package that belong together.

    Parameters
    ----------
    name : str
        ``model``, ``weights``, ``runtime libraries``, ``C++ runner``, ``C++ headers``, ``Python`` or
        ``licences, README``.
    files : int
        How many.
    bytes : int
        Their size.
    """

    name: str
    files: int
    bytes: int


@dataclass(frozen=True)
class Package:
    """A folder that runs on its own.

    Parameters
    ----------
    folder : Path
        Absolute.
    parts : tuple of Part
        Every file counts in one of them.
    bytes : int
        Of all files.
    bytes_without_weights : int
        The same less the weights, be they inside the model or beside it.
    runner : bool
        Whether the C++ runner was built; without a C++ compiler only its source is there.
    command : str
        Builds it, in the folder.
    """

    folder: Path
    parts: tuple[Part, ...]
    bytes: int
    bytes_without_weights: int
    runner: bool
    command: str


def package(path: str | os.PathLike[str], output: str | os.PathLike[str], force: bool = False) -> Package:
    """Copy an artifact, the runtime libraries and examples of how to run it into a folder, whole or not at all.

    Parameters
    ----------
    path : path
        A ``.so`` made by `tvm_ternary.compile`.
    output : path
        The folder to make. Where there is one it must be empty, or an earlier package and ``force`` be given.
    force : bool
        Replace an earlier package.

    Raises
    ------
    ArtifactError
        If the artifact or its weights are missing or damaged.
    HostError
        If the artifact is for another architecture than this host, a runtime library is not found, or a C++ compiler
        is there and fails.
    OutputError
        If something is in the way or the folder cannot be written. What was there before stays.
    """
    artifact = read_artifact(path)
    if artifact.architecture != platform.machine():
        problem = f"is built for {artifact.architecture}; the runtime libraries here are for {platform.machine()}"
        raise HostError(str(artifact.path), problem, f"package it on a host of {artifact.architecture}")
    folder = Path(os.path.abspath(output))
    _check_replaceable(folder, force)
    compiler, libraries = find_compiler(), runtime_libraries(artifact)
    command = shlex.join(build_command([Path(compiler[0]).name, *compiler[1:]] if compiler else ["g++"]))
    with _put_in_place(folder) as staged:
        copy_model(artifact, staged)
        for library in libraries:
            shutil.copyfile(library, staged / library.name)
        copy_python(staged / "python")
        copy_headers(staged / "include")
        copy_licences(staged / "licenses", libraries)
        write_texts(staged, artifact, command, built=compiler is not None)
        if compiler:
            build_runner(staged, compiler)
        index = {"format": FORMAT, "version": 1, "model": artifact.path.name}
        (staged / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        parts = _parts(staged, artifact)
    total = sum(part.bytes for part in parts)
    beside = sum(part.bytes for part in parts if part.name == "weights")
    rest = total - (beside or artifact.manifest.weights.bytes)
    return Package(folder, parts, total, rest, compiler is not None, command)


def _parts(folder: Path, artifact: Artifact) -> tuple[Part, ...]:
    names = {artifact.path.name: "model", artifact.manifest.weights.file or "": "weights", **_PARTS}
    found: dict[str, list[int]] = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = names.get(file.relative_to(folder).parts[0], "runtime libraries")
        found.setdefault(name, []).append(file.stat().st_size)
    order = dict.fromkeys(("model", "weights", "runtime libraries", *_PARTS.values()))
    return tuple(Part(name, len(found[name]), sum(found[name])) for name in order if name in found)


def _check_replaceable(folder: Path, force: bool) -> None:
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise OutputError(str(folder), "is a file; expected a folder to make", "name another")
    try:
        if not any(folder.iterdir()):
            return
        ours = json.loads((folder / INDEX).read_bytes())["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise OutputError(str(folder), "holds files that are no package of ours", "name another folder")
    if not force:
        raise OutputError(str(folder), "is a package already", "give --force to replace it, or name another folder")


@contextmanager
def _put_in_place(folder: Path) -> Iterator[Path]:
    """Give a folder beside ``folder`` that takes its place when the block ends well, and is removed otherwise."""
    token = secrets.token_hex(6)
    staged, old = (folder.with_name(f".{folder.name[:40]}.{token}{suffix}") for suffix in ("", ".old"))
    try:
        try:
            staged.mkdir()
            yield staged
            if folder.exists():
                os.rename(folder, old)
            try:
                os.rename(staged, folder)
            except BaseException:
                # An interrupt included: the old package must not be lost.
                if old.exists() and not folder.exists():
                    os.rename(old, folder)
                raise
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    except OSError as error:
        # copytree collects what went wrong in a list.
        first = error.args[0][0][2] if isinstance(error, shutil.Error) else error.strerror or str(error)
        raise OutputError(
            str(folder), f"cannot be written ({first})", "check the folder, permissions and space"
        ) from error
