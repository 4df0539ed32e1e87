"""Which rule schedules what of the rest of a graph on a GPU: the first that answers wins.

What no rule reads is tried by TVM's dlight, and refused if that leaves a statement to no thread.
"""

from __future__ import annotations

from collections.abc import Callable

import tvm
from tvm import tirx
from tvm.ir import IRModule
from tvm.s_tir import Schedule, dlight
from tvm.target import Target

from tvm_ternary.errors import UnsupportedOperatorError
from tvm_ternary.kernels.recurrence import RECURRENCE
from tvm_ternary.schedule.cpu.inline import read_program
from tvm_ternary.schedule.cpu.program import Program

from .graph_check import is_alone, is_bound, is_serial
from .graph_columns import schedule_columns, schedule_fold
from .graph_matmul import schedule_matmul
from .graph_points import schedule_points
from .graph_rows import schedule_rows

Rule = Callable[[Program], tirx.PrimFunc | None]

RULES: tuple[tuple[str, Rule], ...] = (
    ("rule:matmul", schedule_matmul),
    # Before rows, which would take a sum over tokens too, and have the lanes of a warp read a whole row apart.
    ("rule:columns", schedule_columns),
    ("rule:rows", schedule_rows),
    ("rule:fold", schedule_fold),
    ("rule:points", schedule_points),
)
DLIGHT = (
    ("dlight:reduction", dlight.gpu.GeneralReduction),
    ("dlight:fallback", dlight.gpu.Fallback),
)
SCHEDULED = "tirx.is_scheduled"


def schedule_module(mod: IRModule, target: Target) -> tuple[IRModule, dict[str, str]]:
    """Give every PrimFunc not yet marked ``tirx.is_scheduled`` a schedule for a GPU.

    Parameters
    ----------
    mod : IRModule
        Left as it is.
    target : tvm.target.Target
        Of kind ``cuda``.

    Returns
    -------
    mod : IRModule
    sources : dict of str to str
        For every function scheduled here, by name, who did it: ``"rule:matmul"``, ..., ``"dlight:fallback"``.

    Raises
    ------
    UnsupportedOperatorError
        If nothing binds a function to threads; its name tells the operators that it was made of.
    """
    scheduled = mod.clone()
    sources: dict[str, str] = {}
    for var, func in mod.functions_items():
        if isinstance(func, tirx.PrimFunc) and not func.attrs.get(SCHEDULED, False):
            made, sources[var.name_hint] = schedule_function(func, target, var.name_hint)
            scheduled[var] = made.with_attr(SCHEDULED, True)
    return scheduled, sources


def schedule_function(func: tirx.PrimFunc, target: Target, name: str) -> tuple[tirx.PrimFunc, str]:
    """Schedule one PrimFunc, as ``LegalizeOps`` and ``FuseTIR`` leave it: the function and who scheduled it.

    Raises
    ------
    UnsupportedOperatorError
        If nothing binds it to threads, or it is a recurrence.
    """
    if RECURRENCE in func.attrs:
        problem = "is a loop over its steps in one function, for which there is no schedule for a GPU"
        hint = "fix the number of steps with --dim, at most 1024, or compile for a CPU"
        raise UnsupportedOperatorError(f"function {name}", problem, hint)
    program = read_program(func)
    if program is not None and any(map(is_serial, program.stages)):
        raise _refused(name)
    for source, rule in RULES:
        made = None if program is None else rule(program)
        if made is not None:
            assert is_bound(made), (name, source)
            return made, source
    for source, kind in DLIGHT:
        made = _by_dlight(func, target, kind())
        if made is not None and is_bound(made) and not is_alone(made):
            return made, source
    raise _refused(name)


def _refused(name: str) -> UnsupportedOperatorError:
    problem = "is left to no thread, or to one alone, by every schedule for a GPU"
    return UnsupportedOperatorError(f"function {name}", problem, "compile for a CPU, or rewrite that part of the model")


def _by_dlight(func: tirx.PrimFunc, target: Target, rule: dlight.ScheduleRule) -> tirx.PrimFunc | None:
    try:
        with target:
            found = rule.apply(func, target, False)
    except (tvm.error.TVMError, AssertionError, ValueError, IndexError, AttributeError):
        # These rules were written for functions of the shapes that they know, and break on others.
        return None
    schedule = found[0] if isinstance(found, list) and found else found
    return schedule.mod["main"] if isinstance(schedule, Schedule) else None
