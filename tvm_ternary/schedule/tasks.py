"""Ternary matmuls as tuning tasks: the workload, its space, and the code that a set of decisions stands for.

The workload is the plain definition for one M. Its space is read from ``schedules/<tier>/<kernel>.toml``; a
MetaSchedule trace samples each decision and writes it to the root block, and `realize` makes the scheduled function of
such a module. So a record depends on what is computed, and not on how the schedule is written.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, cached_property

import tvm

from tvm_ternary.kernels.matmul import MatmulKernel, define_matmul
from tvm_ternary.kernels.shape import MatmulShape, Tile, Variant, ceil_div
from tvm_ternary.kernels.table import kernel_for
from tvm_ternary.schedule.intrinsics.amx import AmxTile
from tvm_ternary.schedule.records import ANNOTATION, TuningLog, find_tuned, workload_hash
from tvm_ternary.schedule.ternary import matmul_function
from tvm_ternary.schedule.tiles import DECISIONS, load_tiles

ROWS = (1, 2, 4, 8, 16, 32, 128, 512)
"""The M's that tuning logs hold records of."""

IDENTITY = "ternary.task"
"""Attribute of a workload that says which task it is."""

_THREADS = ("n", "m", "one")
_FEW_TILES = 8
_MANY_ROWS = 64
# Waking a thread takes some microseconds, in which a core multiplies this often.
_SERIAL = 1 << 21


@dataclass(frozen=True)
class MatmulTask:
    """One ternary matmul of one M on one tier.

    Attributes
    ----------
    activation_bits : int
        Key of the kernel table.
    shape : MatmulShape
    rows : int
        M.
    tier : str
    packing : str
        A key of `formats.PACKINGS`.
    """

    activation_bits: int
    shape: MatmulShape
    rows: int
    tier: str
    packing: str = "fast"

    @property
    def name(self) -> str:
        """For people; unique among tasks of a tier."""
        shape = self.shape
        group = f"g{shape.group_size}" if shape.groups > 1 else ""
        packing = "" if self.packing == "fast" else f"/{self.packing}"
        return f"t{shape.planes}a{self.activation_bits}{group}{packing} {shape.n}x{shape.k} m{self.rows}"

    @property
    def kernel(self) -> MatmulKernel:
        """What it runs."""
        return kernel_for(self.activation_bits, self.packing).matmul

    def workload(self) -> tvm.IRModule:
        """The unscheduled module, one function ``main``; structurally equal each time."""
        function = define_matmul(self.kernel, self.shape, (Variant(Tile(1, 1), None, threads="one"),), rows=self.rows)
        return tvm.IRModule({"main": function.with_attr({"global_symbol": "main", IDENTITY: self._identity()})})

    def _identity(self) -> str:
        """The fields that are not at their defaults: a new field leaves the records of old tasks valid."""
        changed = {field.name for field in fields(self) if getattr(self, field.name) != field.default}
        return json.dumps({name: value for name, value in asdict(self).items() if name in changed})

    @cached_property
    def space(self) -> Mapping[str, tuple[int, ...]]:
        """The candidates of each decision: those of the file that make sense for M, and the default."""
        table = load_tiles(self.kernel.name, self.tier).space
        candidates = dict(table)
        candidates["rows"] = tuple(rows for rows in table["rows"] if rows <= self.rows)
        if self.rows < 32 or not AmxTile.fits(self.shape.segment_blocks(16)):
            candidates["panel"] = tuple(panel for panel in table["panel"] if panel < 2)
        if self.kernel.panel is None or self.rows == 1:
            candidates["panel"] = (0,)
        return {name: tuple(sorted({*values, self.default[name]})) for name, values in candidates.items()}

    @cached_property
    def default(self) -> Mapping[str, int]:
        """The hand-chosen decisions."""
        tiles = load_tiles(self.kernel.name, self.tier)
        (variant,) = spread(tiles.of(self.shape.planes), self.shape, self.rows)
        return {
            "rows": variant.tile.rows,
            "blocks": variant.tile.blocks,
            "panel": int(variant.panel) + int(variant.tiles),
            "threads": _THREADS.index(variant.threads),
        }

    def variant(self, decisions: Mapping[str, int]) -> Variant:
        """What decisions mean, for any M."""
        tile = Tile(decisions["rows"], decisions["blocks"])
        panel = decisions["panel"]
        return Variant(tile, None, panel > 0, panel > 1, _THREADS[decisions["threads"]])


def realize(module: tvm.IRModule) -> tvm.IRModule:
    """Make the scheduled module of a workload whose root block carries decisions.

    Parameters
    ----------
    module : tvm.IRModule
        A workload of `MatmulTask`, annotated.

    Returns
    -------
    tvm.IRModule
        With one function ``main`` of the same parameters.
    """
    main = module["main"]
    identity = json.loads(main.attrs[IDENTITY])
    task = MatmulTask(**(identity | {"shape": MatmulShape(**identity["shape"])}))
    annotations = main.body.block.annotations
    decisions = {name: int(annotations[ANNOTATION + name]) for name in DECISIONS}
    function = matmul_function(task.kernel, task.shape, (task.variant(decisions),), task.tier, rows=task.rows)
    return tvm.IRModule({"main": function.with_attr("global_symbol", "main")})


@dataclass(frozen=True)
class Choice:
    """The variants that a matmul is built with, and where they come from, for the manifest.

    Attributes
    ----------
    variants : tuple of Variant
    source : str
        ``rule:TIER/KERNEL.toml``, or the records: ``shipped:tuning_logs/TARGET#HASH,HASH``.
    """

    variants: tuple[Variant, ...]
    source: str


def choose_variants(
    activation_bits: int,
    shape: MatmulShape,
    tier: str,
    logs: Sequence[TuningLog] = (),
    rows: int | None = None,
    packing: str = "fast",
) -> Choice:
    """Choose how a ternary matmul runs: as tuning logs say, else by the tile table.

    Parameters
    ----------
    activation_bits : int
        Key of the kernel table.
    shape : MatmulShape
    tier : str
    logs : sequence of TuningLog
        In order of precedence.
    rows : int, optional
        M where it is known.
    packing : str
        A key of `formats.PACKINGS`.

    Returns
    -------
    Choice
        A record of one M stands for those M's that the table serves by the same variant: for the ones up to it, and
        where it is the largest, for the ones beyond. All others are the table's.
    """
    table = load_tiles(kernel_for(activation_bits, packing).matmul.name, tier)
    tasks = [MatmulTask(activation_bits, shape, m, tier, packing) for m in {*ROWS, *([] if rows is None else [rows])}]
    tuned = _records(tasks, logs)
    base = spread(table.of(shape.planes), shape, rows)
    ends = {variant.max_rows for variant in base[:-1]} | set(tuned if rows is None else ())
    variants: list[Variant] = []
    sources: list[str] = []
    least = 1 if rows is None else rows
    for end in (*sorted(end for end in ends if end is not None), None):
        variant, source = _serving(base, least), f"rule:{table.source}"
        record = _record_for(least, tuned, table.of(shape.planes))
        if record is not None:
            # What is spread over threads depends on M too, and the record knows it of its own M alone.
            alike = _serving(base, record).threads == variant.threads
            threads = tuned[record][0].threads if alike else variant.threads
            variant, source = replace(tuned[record][0], threads=threads), tuned[record][1]
        part = replace(variant, max_rows=end)
        if variants and _same(variants[-1], part):
            variants.pop()
        variants.append(part)
        sources.append(source)
        least = least if end is None else end + 1
    return Choice(tuple(variants), _join(sources))


def _records(tasks: Sequence[MatmulTask], logs: Sequence[TuningLog]) -> dict[int, tuple[Variant, str]]:
    """For each M that has a record, its variant and which record it is."""
    found = {task: find_tuned(_key(task), task.space, logs) for task in tasks} if logs else {}
    return {
        task.rows: (task.variant(record.decisions), record.source)
        for task, record in found.items()
        if record is not None
    }


def _serving(variants: Sequence[Variant], rows: int) -> Variant:
    return next(variant for variant in variants if variant.serves(rows))


def _record_for(rows: int, tuned: Collection[int], table: Sequence[Variant]) -> int | None:
    """The M of the record that stands for ``rows``."""
    known = sorted(m for m in tuned if _serving(table, m) is _serving(table, rows))
    return next((m for m in known if m >= rows), known[-1] if known else None)


@cache
def _key(task: MatmulTask) -> str:
    """A model has many matrices of one shape."""
    return workload_hash(task.workload())


def _join(sources: list[str]) -> str:
    """Name each log once, with the records that are used of it."""
    tags: dict[str, dict[str, None]] = {}
    for source in sources:
        log, _, tag = source.partition("#") if source.startswith("rule:") else source.rpartition("#")
        tags.setdefault(log, {})[tag] = None
    return ", ".join(log + ("#" + ",".join(found) if any(found) else "") for log, found in tags.items())


def _same(variant: Variant, after: Variant | None) -> bool:
    return after is not None and replace(after, max_rows=variant.max_rows) == variant


def spread(variants: tuple[Variant, ...], shape: MatmulShape, rows: int | None) -> tuple[Variant, ...]:
    """Decide what of each variant is spread over threads.

    Small products stay on one thread: a variant that serves both small and large M is divided where it pays. Few tiles
    of out_features are too few for many threads, so that chunks of rows are spread instead where there are many. Where
    segments do not fall into AMX tiles, the variant before those with tiles serves their M's too.
    """
    if not AmxTile.fits(shape.segment_blocks(16)):
        variants = tuple(variant for variant in variants if not variant.tiles)
        variants = (*variants[:-1], replace(variants[-1], max_rows=None))
    if rows is not None:
        variant = next(v for v in variants if v.serves(rows))
        return (replace(variant, max_rows=None, threads=_threads(variant, shape, rows)),)
    changes = (_SERIAL // (shape.n * shape.k * shape.planes), _MANY_ROWS - 1)
    divided: list[Variant] = []
    least = 1
    for variant in variants:
        most = variant.max_rows
        ends = [end for end in sorted(changes) if least <= end and (most is None or end < most)]
        for end in (*ends, most):
            part = replace(variant, max_rows=end, threads=_threads(variant, shape, least))
            if divided and _same(divided[-1], part):
                divided.pop()
            divided.append(part)
            least = end + 1 if end is not None else least
    return tuple(divided)


def _threads(variant: Variant, shape: MatmulShape, rows: int) -> str:
    if rows * shape.n * shape.k * shape.planes <= _SERIAL:
        return "one"
    few = ceil_div(shape.blocks, variant.tile.blocks) < _FEW_TILES
    return "m" if few and rows >= _MANY_ROWS else "n"
