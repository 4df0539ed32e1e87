"""Which rule schedules what: the first that answers wins."""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.ir import IRModule
from tvm.target import Target

from .columns import schedule_columns
from .conv import schedule_convolution
from .fallback import schedule_loops
from .injective import schedule_injective
from .inline import read_program
from .mask_words import schedule_mask_words
from .matmul import schedule_matmul
from .program import Program
from .recurrence import schedule_recurrence
from .rows import schedule_rows
from .simd import Simd, simd_of
from .vector_math import expand_vector_math

Rule = Callable[[Program, Simd], tirx.PrimFunc | None]

RULES: tuple[tuple[str, Rule], ...] = (
    ("rule:convolution", schedule_convolution),
    ("rule:matmul", schedule_matmul),
    ("rule:mask", schedule_mask_words),
    ("rule:columns", schedule_columns),
    ("rule:rows", schedule_rows),
    ("rule:injective", schedule_injective),
    ("fallback:loops", schedule_loops),
)
# A function that is not read, for it says what it is.
RECURRENT = "rule:recurrence"
# A function that none of them reads: opaque calls, or loops whose order matters.
AS_WRITTEN = "fallback:as-written"
SCHEDULED = "tirx.is_scheduled"


def schedule_function(func: tirx.PrimFunc, simd: Simd) -> tuple[tirx.PrimFunc, str]:
    """Schedule one PrimFunc.

    Parameters
    ----------
    func : PrimFunc
        As ``LegalizeOps`` and ``FuseTIR`` leave it.
    simd : Simd

    Returns
    -------
    func : PrimFunc
        Marked ``tirx.is_scheduled``.
    source : str
        Who scheduled it.
    """
    whole = schedule_recurrence(func, simd)
    if whole is not None:
        return whole.with_attr(SCHEDULED, True), RECURRENT
    scheduled, source = _first_answer(read_program(func), simd) or (func, AS_WRITTEN)
    return expand_vector_math(scheduled).with_attr(SCHEDULED, True), source


def _first_answer(program: Program | None, simd: Simd) -> tuple[tirx.PrimFunc, str] | None:
    if program is None:
        return None
    for source, rule in RULES:
        scheduled = rule(program, simd)
        if scheduled is not None:
            return scheduled, source
    return None


def schedule_module(mod: IRModule, target: Target) -> tuple[IRModule, dict[str, str]]:
    """Give every PrimFunc not yet marked ``tirx.is_scheduled`` a CPU schedule.

    Parameters
    ----------
    mod : IRModule
        Left as it is.
    target : tvm.target.Target
        Of kind ``llvm``; its features choose the vector width.

    Returns
    -------
    mod : IRModule
    sources : dict of str to str
        For every function scheduled here, by name, who did it: ``"rule:matmul"``, ..., ``"fallback:loops"``.
    """
    simd = simd_of(target)
    scheduled = mod.clone()
    sources: dict[str, str] = {}
    for var, func in mod.functions_items():
        if isinstance(func, tirx.PrimFunc) and not func.attrs.get(SCHEDULED, False):
            scheduled[var], sources[var.name_hint] = schedule_function(func, simd)
    return scheduled, sources
