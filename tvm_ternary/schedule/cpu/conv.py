"""Convolutions over images with their channels last: ``out[.., x, o] = epilogue(sum of data[.., x', i] w[.., i, o])``.

A vector lane is an output channel, a tile is a few neighbouring pixels of a line times a few vectors, and its sums stay
in registers while the taps and input channels run. One of depth only is the same with data that have lanes, too. A
padded image is never written: each task pads what its lines read in a buffer of its own, which stays in cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import tvm_ffi
from tvm.ir import Expr, TensorLoad
from tvm.tirx import Add, BufferLoad, BufferStore, FloorDiv, Mul, PrimFunc, Stmt, Var

from .conv_tiles import ConvKernel, Convolution, Padding
from .epilogue import read_writer
from .fold import read_fold
from .injective import map_stage
from .nest import INDEX, index, product, sequence, static
from .program import CHOICE, Axis, Program, Stage, calls, innermost, loads, uses
from .simd import Simd


def schedule_convolution(program: Program, simd: Simd) -> PrimFunc | None:
    """Tile a float32 convolution for the vector registers of a CPU.

    Parameters
    ----------
    program : Program
        Perhaps a padding, a sum of products, at most one map behind it.
    simd : Simd

    Returns
    -------
    PrimFunc or None
        None if the function is not a convolution with its channels last.
    """
    before = program.leading_maps()
    stages = program.stages[len(before) :]
    if not stages:
        return None
    # What follows may have another shape, as the gate of a pixel is spread over an image: it reads the results from
    # memory. A map of the same shape goes with the sums.
    for count in dict.fromkeys((len(stages), min(len(stages), 2), 1)):
        found, rest = read_convolution(before, stages[:count]), stages[count:]
        if found is not None and all(stage.is_map for stage in rest):
            maps = [map_stage(stage, simd, program.temporaries) for stage in rest]
            return program.with_nest(
                sequence(ConvKernel(found, simd).nest(), maps), _kept(program, stages[count - 1 :])
            )
    return None


def _kept(program: Program, stages: Sequence[Stage]) -> list[Var]:
    """The temporaries between a convolution, the first of these, and what follows."""
    return program.written_by(stages) if len(stages) > 1 else []


def read_convolution(before: Sequence[Stage], stages: Sequence[Stage]) -> Convolution | None:
    """Find a convolution, its padding and what happens to its results.

    Parameters
    ----------
    before : sequence of Stage
        Maps in front of it.
    stages : sequence of Stage
        The convolution and what follows.

    Returns
    -------
    Convolution or None
    """
    fold = read_fold(stages[0])
    if fold is None or not stages[0].spatial or not isinstance(stages[0].body.value, Add):
        return None
    if str(fold.target.dtype) != "float32" or not isinstance(fold.value, Mul):
        return None
    factors = _factors(fold.value, stages[0])
    padding = _read_padding(before, factors[0]) if factors is not None else None
    if factors is None or (before and padding is None):
        return None
    if len(stages[0].reduced) == 1 and padding is None and len(factors[1].source.shape) < 3:
        # A matrix product as it is written for vectors and matrices.
        return None
    stages = _merge_all(stages)
    write = read_writer(stages[0], stages[1:])
    merged = read_fold(stages[0])
    factors = None if merged is None else _factors(merged.value, stages[0])
    if write is None or factors is None:
        return None
    data, weight = factors
    *lines, channel = stages[0].spatial
    pixel = lines.pop() if lines else None
    group = _find_groups(data, channel)
    if group is None and uses(data, channel.var) and not _has_lanes(data, channel, pixel):
        return None
    return Convolution(tuple(lines), pixel, channel, stages[0].reduced, data, weight, write, padding, group)


def _factors(value: Expr, stage: Stage) -> tuple[TensorLoad, TensorLoad] | None:
    """The data and the weight of a product: the weight has the lanes of the result and is the same for all pixels."""
    if not isinstance(value, Mul):
        return None
    *others, channel = stage.spatial
    for data, weight in ((value.a, value.b), (value.b, value.a)):
        if not isinstance(data, TensorLoad) or not isinstance(weight, TensorLoad):
            return None
        same = not any(uses(weight, axis.var) for axis in others)
        if same and tvm_ffi.structural_equal(innermost(weight), channel.var):
            return data, weight
    return None


def _has_lanes(data: TensorLoad, channel: Axis, pixel: Axis | None) -> bool:
    """Whether the data of neighbouring channels are neighbours, and the weight serves several pixels."""
    return pixel is not None and tvm_ffi.structural_equal(innermost(data), channel.var)


def _find_groups(data: TensorLoad, channel: Axis) -> int | None:
    """Output channels of one group, None where the data do not depend on the group."""
    sizes: list[int] = []

    def visit(node: FloorDiv) -> None:
        size = static(node.b)
        if node.a.same_as(channel.var) and size is not None:
            sizes.append(size)

    for place in data.indices:
        tvm_ffi.structural_walk(place, (FloorDiv, visit))
    return sizes[0] if sizes else None


def _read_padding(before: Sequence[Stage], data: TensorLoad) -> Padding | None:
    """A map that fills what the convolution reads with data or a constant, all channels of a pixel alike."""
    if len(before) != 1 or not before[0].writes(data.source):
        return None
    stage = before[0]
    store = stage.body
    if CHOICE not in calls(store.value) or getattr(store.value.op, "name", None) != CHOICE:
        return None
    condition, inside, outside = store.value.args
    last = store.indices[-1]
    if (isinstance(last, Var) and uses(condition, last)) or loads(outside):
        return None
    return Padding(tuple(store.indices), condition, inside, outside)


def _merge_all(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Make one axis of neighbouring ones, as long as every stage reads and writes them side by side."""
    merged = tuple(stages)
    while len(merged[0].spatial) > 2:
        shorter = [_merge(stage) for stage in merged]
        if any(stage is None for stage in shorter):
            break
        merged = tuple(stage for stage in shorter if stage is not None)
    return merged


def _merge(stage: Stage) -> Stage | None:
    """Lines and their pixels as one long line, if the memory of every operand is one."""
    if len(stage.spatial) < 3:
        return None
    line, pixel = stage.spatial[-3:-1]
    flat = Axis(Var("pixel", INDEX), product([line.extent, pixel.extent]), reduce=False)
    split = False

    def along(buffer: Var, indices: Sequence[Expr]) -> list[Expr]:
        nonlocal split
        used = [n for n, i in enumerate(indices) if uses(i, line.var) or uses(i, pixel.var)]
        if not used:
            return list(indices)
        first, second = used[0], used[-1]
        plain = len(used) == 2 and indices[first].same_as(line.var) and indices[second].same_as(pixel.var)
        if not plain or second != first + 1 or not tvm_ffi.structural_equal(buffer.shape[second], pixel.extent):
            split = True
            return list(indices)
        # Memory is in row order: an index may run on into the next line.
        return [*indices[:first], index(0), flat.var, *indices[second + 1 :]]

    def load(node: TensorLoad) -> Expr:
        return BufferLoad(node.source, along(node.source, node.indices))

    def store(node: BufferStore) -> Stmt:
        return BufferStore(node.buffer, node.value, along(node.buffer, node.indices))

    changed = stage.mapped(lambda node: tvm_ffi.structural_map(node, [(TensorLoad, load), (BufferStore, store)]))
    bare = any(uses(changed.body, axis.var) for axis in (line, pixel))
    if split or bare:
        return None
    axes = [axis for axis in stage.axes if axis not in (line, pixel)]
    axes.insert(len(stage.spatial) - 3, flat)
    return Stage(stage.name, tuple(axes), changed.body, changed.init)
