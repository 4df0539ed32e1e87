"""What is said about the machine."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tvm_ternary.bench.machine import cache_sizes, commit, cpu_name, last_level_cache, machine_facts
from tvm_ternary.errors import HostError


def _cache(folder: Path, index: int, kind: str, level: int, size: str) -> None:
    path = folder / f"index{index}"
    path.mkdir()
    for name, text in (("type", kind), ("level", str(level)), ("size", size)):
        (path / name).write_text(f"{text}\n")


def test_caches_are_read_without_those_of_instructions(tmp_path: Path) -> None:
    _cache(tmp_path, 0, "Data", 1, "48K")
    _cache(tmp_path, 1, "Instruction", 1, "32K")
    _cache(tmp_path, 2, "Unified", 2, "2M")
    (tmp_path / "index3").mkdir()
    assert cache_sizes(tmp_path) == {1: 48 * 2**10, 2: 2 * 2**20}
    assert last_level_cache(tmp_path) == 2 * 2**20


def test_unknown_caches_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="does not say how large the caches are; measure without --cold"):
        last_level_cache(tmp_path)


def test_cpu_name(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Fast CPU\n")
    assert cpu_name(cpuinfo) == "Fast CPU"
    assert cpu_name(tmp_path / "missing")


def test_commit_is_that_of_a_checkout(tmp_path: Path) -> None:
    assert commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.invalid"]
    (tmp_path / "file").write_text("1")
    for arguments in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *arguments], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    clean = commit(tmp_path)
    assert clean is not None
    assert head.startswith(clean)
    (tmp_path / "file").write_text("2")
    assert commit(tmp_path) == f"{clean}-dirty"


def test_facts_are_json_and_name_the_versions() -> None:
    facts = json.loads(json.dumps(machine_facts()))
    assert facts["cpu"]
    assert facts["load"] >= 0
    assert {"tvm-ternary", "apache-tvm", "numpy"} <= facts["versions"].keys()
