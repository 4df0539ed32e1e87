"""What can be tuned of a ternary matmul on a GPU, and the choice of its variants.

The workload is the plain definition of `kernels.matmul`, as on a CPU; decisions are the fields of a `CudaVariant`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property

import tvm

from tvm_ternary.kernels.matmul import MatmulKernel, define_matmul
from tvm_ternary.kernels.shape import MatmulShape, Tile, Variant
from tvm_ternary.kernels.table import kernel_for
from tvm_ternary.schedule.cuda.matmul import matmul_function
from tvm_ternary.schedule.cuda.tiles import DECISIONS, REPRESENTATIVES, best, choose, fits, load_cuda_tiles
from tvm_ternary.schedule.cuda.variant import CudaVariant
from tvm_ternary.schedule.records import ANNOTATION, TuningLog, find_tuned, workload_hash
from tvm_ternary.target.cuda import CUDA_ARCHS, CudaArch

IDENTITY = "tvm_ternary.cuda_task"
"""Attribute of a workload that says which task it is, as JSON."""


@dataclass(frozen=True)
class CudaTask:
    """One ternary matmul of one M on one architecture.

    Attributes
    ----------
    activation_bits : int
        16, 8 or 1.
    shape : MatmulShape
    rows : int
        M.
    tier : str
        ``cuda-`` and the architecture.
    bfloat : bool
        Whether 16 bits are bfloat16.
    """

    activation_bits: int
    shape: MatmulShape
    rows: int
    tier: str
    bfloat: bool = False

    @property
    def name(self) -> str:
        """For people; unique among tasks of a tier."""
        shape, kind = self.shape, "bf" if self.bfloat else ""
        group = f"g{shape.group_size}" if shape.groups > 1 else ""
        return f"t{shape.planes}a{kind}{self.activation_bits}{group} {shape.n}x{shape.k} m{self.rows}"

    @property
    def kernel(self) -> MatmulKernel:
        """What it runs."""
        return kernel_for(self.activation_bits, bfloat=self.bfloat).matmul

    @property
    def arch(self) -> CudaArch:
        """What it runs on."""
        return CUDA_ARCHS[self.tier.removeprefix("cuda-")]

    def workload(self) -> tvm.IRModule:
        """The unscheduled module, one function ``main``; structurally equal each time."""
        function = define_matmul(self.kernel, self.shape, (Variant(Tile(1, 1), None, threads="one"),), rows=self.rows)
        identity = json.dumps(asdict(self), sort_keys=True)
        return tvm.IRModule({"main": function.with_attr({"global_symbol": "main", IDENTITY: identity})})

    @cached_property
    def space(self) -> Mapping[str, tuple[int, ...]]:
        """The candidates of each decision: those of the file that make sense for M, and the default."""
        table = dict(load_cuda_tiles(self.kernel.name, self.tier).space)
        # A tile of rows twice as high as M is half empty.
        table["rows"] = tuple(rows for rows in table["rows"] if rows < 2 * max(self.rows, 8))
        return {name: tuple(sorted({*table[name], self.default[name]})) for name in DECISIONS}

    @cached_property
    def default(self) -> Mapping[str, int]:
        """The decisions taken without tuning."""
        tiles = load_cuda_tiles(self.kernel.name, self.tier)
        variant = best(tiles, self.kernel, self.shape, self.arch, self.rows)
        return {name: int(getattr(variant, name)) for name in DECISIONS}

    def variant(self, decisions: Mapping[str, int]) -> CudaVariant:
        """What decisions mean, for any M."""
        return CudaVariant(
            **{name: decisions[name] for name in DECISIONS if name != "shared"}, shared=bool(decisions["shared"])
        )

    def fits(self, decisions: Mapping[str, int]) -> bool:
        """Whether the architecture has the shared memory, registers and threads that decisions ask for."""
        variant = self.variant(decisions)
        return variant.threads <= 1024 and fits(self.kernel, self.shape, variant, self.arch)


def realize(module: tvm.IRModule) -> tvm.IRModule:
    """Make the scheduled module of a workload whose root block carries decisions.

    Parameters
    ----------
    module : tvm.IRModule
        A workload of `CudaTask`, annotated.

    Returns
    -------
    tvm.IRModule
        With one function ``main`` of the same parameters.

    Raises
    ------
    ValueError
        If the decisions ask for more than the architecture has.
    """
    main = module["main"]
    identity = json.loads(main.attrs[IDENTITY])
    task = CudaTask(**(identity | {"shape": MatmulShape(**identity["shape"])}))
    annotations = main.body.block.annotations
    decisions = {name: int(annotations[ANNOTATION + name]) for name in DECISIONS}
    if not task.fits(decisions):
        raise ValueError(f"{decisions} do not fit {task.tier}")
    function = matmul_function(task.kernel, task.shape, (task.variant(decisions),), rows=task.rows)
    return tvm.IRModule({"main": function.with_attr("global_symbol", "main")})


@dataclass(frozen=True)
class CudaChoice:
    """The variants that a matmul is built with, and where they come from, for the manifest."""

    variants: tuple[CudaVariant, ...]
    source: str


def choose_cuda_variants(
    activation_bits: int,
    shape: MatmulShape,
    tier: str,
    logs: Sequence[TuningLog] = (),
    rows: int | None = None,
    bfloat: bool = False,
) -> CudaChoice:
    """Choose how a ternary matmul runs: as tuning logs say, else the candidate that would cost least.

    Parameters
    ----------
    activation_bits : int
    shape : MatmulShape
    tier : str
        ``cuda-`` and the architecture.
    logs : sequence of TuningLog
        In order of precedence.
    rows : int, optional
        M where it is known. Otherwise a record of one M stands for the M's between the representative ones around it.
    bfloat : bool
        Whether 16 bits are bfloat16.
    """
    kernel = kernel_for(activation_bits, bfloat=bfloat).matmul
    source = f"rule:{load_cuda_tiles(kernel.name, tier).source}"
    tasks = [
        CudaTask(activation_bits, shape, m, tier, bfloat) for m in ((rows,) if rows is not None else REPRESENTATIVES)
    ]
    found = {task.rows: find_tuned(_key(task), task.space, logs) for task in tasks} if logs else {}
    tuned = {task.rows: (task.variant(r.decisions), r.source) for task in tasks if (r := found.get(task.rows))}
    if not tuned:
        return CudaChoice(choose(kernel, shape, tier, rows), source)
    if rows is not None:
        return CudaChoice((tuned[rows][0],), tuned[rows][1])
    variants: list[CudaVariant] = []
    sources: dict[str, None] = {}
    for m in REPRESENTATIVES:
        (variant,), origin = choose(kernel, shape, tier, m), source
        if m in tuned:
            variant, origin = tuned[m]
        variant = replace(variant, max_rows=m)
        if variants and replace(variants[-1], max_rows=m) == variant:
            variants.pop()
        variants.append(variant)
        sources[origin] = None
    return CudaChoice((*variants[:-1], replace(variants[-1], max_rows=None)), ", ".join(sources))


@cache
def _key(task: CudaTask) -> str:
    return workload_hash(task.workload())
