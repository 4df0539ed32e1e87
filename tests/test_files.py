"""Files appear whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from tvm_ternary.errors import OutputError
from tvm_ternary.files import atomic_path, require_writable


def test_writes_a_new_file_with_the_mode_of_the_umask(tmp_path: Path) -> None:
    target = tmp_path / "model.so"
    old = os.umask(0o027)
    try:
        with atomic_path(target) as temporary:
            assert temporary.parent == tmp_path
            assert temporary.suffix == ".so"
            assert temporary.exists()
            assert not target.exists()
            temporary.write_bytes(b"new")
    finally:
        os.umask(old)
    assert target.read_bytes() == b"new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["model.so"]


def test_keeps_what_the_writer_put_in_place_of_the_temporary_file(tmp_path: Path) -> None:
    # Linkers remove their output first and create it anew, executable.
    with atomic_path(str(tmp_path / "model.so")) as temporary:
        temporary.unlink()
        temporary.write_bytes(b"linked")
        temporary.chmod(0o755)
    assert (tmp_path / "model.so").read_bytes() == b"linked"
    assert (tmp_path / "model.so").stat().st_mode & stat.S_IXUSR


def test_the_content_is_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(handle: int) -> None:
        steps.append("sync folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "sync file")
        real_sync(handle)

    def replace(source: Path, target: Path) -> None:
        steps.append("replace")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    with atomic_path(tmp_path / "model.so") as temporary:
        temporary.write_bytes(b"new")
    assert steps == ["sync file", "replace", "sync folder"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("bad"), OutputError("a", "b"), SystemExit(1)])
def test_leaves_the_old_file_when_the_block_fails(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "model.so"
    target.write_bytes(b"old")
    with pytest.raises(type(error)) as caught, atomic_path(target) as temporary:  # noqa: PT012
        temporary.write_bytes(b"half")
        raise error
    assert caught.value is error
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.so"]


def test_a_full_disk_is_an_output_error(tmp_path: Path) -> None:
    problem = r"model\.so: cannot be written \(No space left on device\)"
    with pytest.raises(OutputError, match=problem), atomic_path(tmp_path / "model.so") as temporary:  # noqa: PT012
        temporary.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert os.listdir(tmp_path) == []


def test_a_failing_rename_is_an_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OutputError, match="Permission denied"), atomic_path(tmp_path / "model.so"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_synced_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def refuse_folders(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    with atomic_path(tmp_path / "model.so") as temporary:
        temporary.write_bytes(b"new")
    assert (tmp_path / "model.so").read_bytes() == b"new"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("missing/model.so", "No such file or directory"),
        ("plain/model.so", "Not a directory"),
        ("folder", "is a folder"),
        ("n" * 300, "File name too long"),
    ],
)
def test_a_path_that_cannot_be_written_is_found_before_the_block(tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / "plain").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=problem), atomic_path(tmp_path / name):
        pytest.fail("the block must not run")
    assert sorted(os.listdir(tmp_path)) == ["folder", "plain"]


def test_a_device_is_not_replaced() -> None:
    with pytest.raises(OutputError, match="device"), atomic_path(os.devnull):
        pytest.fail("the block must not run")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    with atomic_path(tmp_path / "link") as temporary:
        temporary.write_bytes(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_a_long_name_leaves_room_for_the_token(tmp_path: Path) -> None:
    target = tmp_path / ("n" * 252 + ".so")
    with atomic_path(target) as temporary:
        temporary.write_bytes(b"new")
    assert target.read_bytes() == b"new"


def test_require_writable_says_what_is_wrong_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_writable(tmp_path / "new.so")
    (tmp_path / "old.so").write_text("old")
    require_writable(tmp_path / "old.so")
    for path, problem in (
        (tmp_path, "is a folder"),
        (Path("/dev/null"), "is a folder or a device"),
        (tmp_path / "none" / "new.so", "does not exist"),
    ):
        with pytest.raises(OutputError, match=problem):
            require_writable(path)
    # Root may write anywhere, so the answer is made up here.
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(OutputError, match="may not be written"):
        require_writable(tmp_path / "new.so")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old.so"]
