"""Byte dot products of AArch64."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from tvm_ternary.schedule.intrinsics.common import ByteDot, llvm


def _dot(acc: Any, a: Any, b: Any) -> Any:
    """sdot multiplies signed bytes by signed ones; those of a are at most 127 and so the same."""
    return llvm("llvm.aarch64.neon.sdot.v4i32.v16i8", "int32x4", acc, T.reinterpret(a, dtype="int8x16"), b)


DOT = ByteDot(4, _dot)
