"""Text that is safe to print, and printing it."""

from __future__ import annotations

import os
import sys

from tvm_ternary.errors import OutputError


def printable(text: str) -> str:
    """Escape what is no visible character, so that a name in a file cannot move the cursor or break the line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def write_out(text: str) -> None:
    """Write to standard output, to the end.

    Raises
    ------
    BrokenPipeError
        If who reads it has had enough.
    OutputError
        If it cannot be written: the disk is full, for one.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # Python flushes once more at exit, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise OutputError("standard output", f"cannot be written ({error.strerror})") from error
