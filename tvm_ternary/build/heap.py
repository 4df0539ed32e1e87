"""The C library's heap."""

from __future__ import annotations

import ctypes


def return_freed_memory() -> None:
    """Give memory that was freed back to the system.

    The C library keeps what lies below a block that is still used; once a model has been imported and bound, that can
    be as much as its weights. Where it is not glibc, it is left to do as it does.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
