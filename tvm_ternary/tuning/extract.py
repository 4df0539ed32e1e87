"""The ternary matmuls of a model, or of shapes given by hand, as tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import relax

from tvm_ternary.errors import OptionError
from tvm_ternary.formats import Scheme
from tvm_ternary.graph.passes.fuse_epilogues import fuse_epilogues
from tvm_ternary.graph.source import import_model
from tvm_ternary.kernels.shape import MatmulShape
from tvm_ternary.kernels.table import require_device
from tvm_ternary.quantize.exact import recognise
from tvm_ternary.quantize.plan import make_plan, named_by
from tvm_ternary.schedule.cuda import tasks as cuda
from tvm_ternary.schedule.tasks import MatmulTask, realize
from tvm_ternary.target import Target
from tvm_ternary.tuning.task import Pinned, Realize, Task


def linear_tasks(shapes: Sequence[tuple[int, int]], target: Target, rows: Sequence[int], *, scheme: str) -> list[Task]:
    """Give a task for each shape and M.

    Parameters
    ----------
    shapes : sequence of (N, K)
    target : Target
    rows : sequence of int
        M's.
    scheme : str
        As in `tvm_ternary.compile`.

    Raises
    ------
    OptionError
        If there is no such scheme, or the target has no kernel for it, or is of several GPU architectures.
    """
    parsed = Scheme.parse(scheme)
    sizes = dict.fromkeys(_shape(n, k, parsed, parsed.planes) for n, k in shapes)
    return [_task(parsed, size, m, target) for size in sizes for m in dict.fromkeys(rows)]


def model_tasks(
    model: str | Path,
    target: Target,
    rows: Sequence[int],
    *,
    scheme: str,
    layers: str | Sequence[str] | Mapping[str, str] = "all",
    dims: Mapping[str, int | str] | None = None,
    constants: Mapping[str, Any] | None = None,
) -> list[Task]:
    """Give a task for each shape that a model's matrices have, and each M.

    Parameters
    ----------
    model : path
        An ``.onnx`` file or a checkpoint folder.
    target : Target
    rows : sequence of int
        M's where the model leaves the number of rows open; elsewhere its own counts.
    scheme, layers, dims, constants
        As in `tvm_ternary.compile`.

    Raises
    ------
    ModelError, UnsupportedOperatorError
        If the model cannot be read or imported.
    OptionError
        If an option names something that does not exist, no matrix becomes ternary, or the target has no kernel for
        a scheme or is of several GPU architectures.
    """
    imported = import_model(model, dims, constants, named_by(layers))
    plan = make_plan(imported.shapes, scheme, layers)
    schemes = {row.name: row.scheme for row in plan if row.scheme is not None}
    tasks: dict[Task, None] = {}
    sizes = {name: _matrix_shape(imported.params[name].T, own) for name, own in schemes.items()}
    for product in fuse_epilogues(imported.module["main"], schemes):
        fixed = _fixed_rows(product.x)
        for m in dict.fromkeys(rows) if fixed is None else (fixed,):
            tasks[_task(schemes[product.matrix], sizes[product.matrix], m, target)] = None
    if not tasks:
        raise OptionError(str(model), "has no matrix that becomes ternary", "see what 'tvm-ternary compile' says of it")
    return list(tasks)


def realize_for(target: Target) -> Realize:
    """Give what makes code of the candidates of a target's tasks."""
    return cuda.realize if target.kind == "cuda" else realize


def for_threads(tasks: Sequence[Task], threads: int) -> Sequence[Task]:
    """Give what can be tuned by measuring on so many threads.

    On one thread, code that spreads nothing is always the fastest; what is spread over threads stays as it is by
    default, or the record would keep every other number of threads from working.
    """
    return tasks if threads > 1 else [Pinned(task, ("threads",)) for task in tasks]


def _task(scheme: Scheme, shape: MatmulShape, rows: int, target: Target) -> Task:
    require_device(scheme.activation_bits, target.kind)
    if target.kind == "cpu":
        return MatmulTask(scheme.activation_bits, shape, rows, target.tier)
    if len(target.archs) > 1:
        problem = f"is of {len(target.archs)} architectures; expected one"
        raise OptionError(f"target {target.name}", problem, f"tune for each by itself: cuda-{target.archs[0]} first")
    return cuda.CudaTask(scheme.activation_bits, shape, rows, target.tier, scheme.bfloat)


def _shape(n: int, k: int, scheme: Scheme, planes: int) -> MatmulShape:
    granularity = scheme.granularity
    return MatmulShape(n, k, planes, granularity.groups(k), granularity.group_size(k))


def _matrix_shape(matrix: npt.NDArray[np.float32], scheme: Scheme) -> MatmulShape:
    """What `quantize` makes of a matrix: one that is ternary already gets one plane."""
    planes = scheme.planes if recognise(matrix, (scheme.granularity,)) is None else 1
    n, k = matrix.shape
    return _shape(n, k, scheme, planes)


def _fixed_rows(x: relax.Expr) -> int | None:
    """Rows of x (..., K), None where a dimension is open."""
    leading = list(x.ty.shape.values)[:-1]
    if not all(isinstance(dim, int) or hasattr(dim, "value") for dim in leading):
        return None
    return math.prod(int(dim) for dim in leading)
