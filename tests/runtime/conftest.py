"""Artifacts to load, built once in a process of their own: the tests of the runtime must not need ``tvm`` in theirs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tvm_ternary

ROOT = Path(tvm_ternary.__file__).parents[1]
BUILDER = Path(__file__).parents[1] / "build" / "small_model.py"
FOOTER_BYTES = 64


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what small_model.py builds. Do not write here."""
    folder = tmp_path_factory.mktemp("built")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, BUILDER, folder, "native"], check=True, env=environment, timeout=120)
    return folder


@pytest.fixture
def copies(built: Path, tmp_path: Path) -> Path:
    """The same in a folder that a test may spoil."""
    return Path(shutil.copytree(built, tmp_path / "copies"))


def reseal(
    path: Path, change: Callable[[dict[str, Any]], object], elf_change: Callable[[bytearray], object] = len
) -> None:
    """Change an artifact's manifest or ELF part and put a right digest under it, by the documented layout alone."""
    content = path.read_bytes()
    elf_bytes, manifest_bytes, weights_bytes = (
        int.from_bytes(content[start : start + 8], "little") for start in range(len(content) - 56, len(content) - 32, 8)
    )
    start = len(content) - FOOTER_BYTES - manifest_bytes
    elf, weights, manifest = bytearray(content[:elf_bytes]), content[elf_bytes:start], content[start:-FOOTER_BYTES]
    document = json.loads(manifest)
    change(document)
    elf_change(elf)
    text = json.dumps(document).encode()
    sizes = b"".join(number.to_bytes(8, "little") for number in (elf_bytes, len(text), weights_bytes))
    body = bytes(elf) + weights + text + b"TVMTERN1" + sizes
    path.write_bytes(body + hashlib.sha256(body).digest())
