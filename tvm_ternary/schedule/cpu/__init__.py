"""CPU schedules for everything in a graph that is not a ternary matmul."""

from __future__ import annotations

from .rules import schedule_function, schedule_module

__all__ = ["schedule_function", "schedule_module"]
