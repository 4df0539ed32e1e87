"""What processes share is built once."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.cuda_emulator import toolchain


def test_others_wait_for_the_one_that_builds(tmp_path: Path) -> None:
    """Locks are of open files, so that threads stand for processes."""
    built = list[Path]()

    def build(made: Path) -> None:
        built.append(made)
        made.mkdir()
        time.sleep(0.2)
        (made / "content").touch()

    def content(_: int) -> bool:
        return (toolchain._built(tmp_path / "place", build) / "content").exists()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(content, range(4))) == [True] * 4
    assert built == [tmp_path / "place.building"]


def test_all_processes_of_a_run_have_one_folder() -> None:
    assert toolchain.folder() == Path(os.environ[toolchain.FOLDER])
