"""CPU schedules for everything in a graph that is not a ternary matmul."""

from __future__ import annotations

from .attention import attention
from .recurrence import recurrence
from .rules import schedule_function, schedule_module
from .simd import simd_of

__all__ = ["attention", "recurrence", "schedule_function", "schedule_module", "simd_of"]
