"""Write a file so that it appears whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tvm_ternary.errors import OutputError


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside ``path`` and rename it into place when the block ends well.

    The temporary file exists (empty) from the start, so that a folder that cannot be written is found before the work
    is done, and keeps the suffix of ``path``, because some writers choose the format by it. A link is followed: the
    file it points to is replaced, not the link.

    Parameters
    ----------
    path : path
        The file to write. Its folder must exist.

    Yields
    ------
    pathlib.Path
        Write the content here, in as many steps as needed, and close it before the block ends.

    Raises
    ------
    OutputError
        If ``path`` is not a regular file, its folder is missing or cannot be written, or the block raises an `OSError`
        (no space, for one). Whatever ends the block early, an interrupt included, ``path`` stays as it was and the
        temporary file is removed.
    """
    target = Path(os.path.realpath(path))
    # Cut, because a name that is legal for the target may be too long once the token is added.
    temporary = target.with_name(f".{target.stem[:40]}.{secrets.token_hex(6)}{target.suffix[:20]}")
    try:
        # Without this a device such as /dev/null would be replaced by a plain file when run by root.
        if target.exists() and not target.is_file():
            raise _not_a_file(path)
        # Not tempfile.mkstemp: that makes mode 0600, and the finished file must have what the umask gives.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        raise _output_error(path, error) from error
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)
        # The file is whole and in place by now: a file system that cannot sync a folder is no reason to report failure.
        with suppress(OSError):
            _sync(target.parent)
    except OSError as error:
        raise _output_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def require_writable(path: str | os.PathLike[str]) -> None:
    """Fail now rather than after minutes of work, if `atomic_path` could not write ``path``.

    Raises
    ------
    OutputError
        If ``path`` is a folder or a device, or its folder is missing or may not be written.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise _not_a_file(path)
    folder = target.parent
    if not folder.is_dir():
        raise OutputError(os.fspath(path), f"its folder {folder} does not exist", "make it, or name another")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(os.fspath(path), f"its folder {folder} may not be written", "name another")


def _not_a_file(path: str | os.PathLike[str]) -> OutputError:
    return OutputError(os.fspath(path), "is a folder or a device, expected a file", "name a file to write")


def _sync(path: Path) -> None:
    """Bring a file, or the entries of a folder, to the disk, so that a crash cannot leave a renamed but empty file."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _output_error(path: str | os.PathLike[str], error: OSError) -> OutputError:
    reason = error.strerror or str(error) or type(error).__name__
    return OutputError(os.fspath(path), f"cannot be written ({reason})", "check the folder, permissions and space")
