"""The loop nest of a convolution: blocks of lines, panels of channels, tiles of pixels, taps, input channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import tvm_ffi
from tvm import tirx
from tvm.ir import Expr, TensorLoad
from tvm.sym import Analyzer, detect_linear_equation
from tvm.tirx import BufferLoad, BufferStore, FloorDiv, IfThenElse, Stmt, Var

from .epilogue import Writer
from .nest import INDEX, fit_lanes, index, loop, product, scope, sequence, space, static, strips, substitute, vector
from .program import Axis
from .simd import Simd

# Bytes of data that one task reads: they stay in the second-level cache while all its panels go over them.
BLOCK_BYTES = 1 << 17

# A task of fewer tiles would read its weights for too little work, unless there were too few tasks.
BLOCK_TILES = 16
ENOUGH_TASKS = 8

# Vectors and pixels of a tile that are tried. A sum takes four cycles and two start in each, so a step has no fewer
# than eight in flight.
MOST_VECTORS = 8
MOST_PIXELS = 14
FEWEST_SUMS = 8

# A tile multiplies and adds two vectors a cycle, four times what element-wise code does.
WORK_SHARE = 4

ZERO = tirx.const(0.0, "float32")


@dataclass(frozen=True)
class Padding:
    """The map that pads the data of a convolution.

    Parameters
    ----------
    indices : tuple of Expr
        Where it stores an element: a variable for each dimension, or zero.
    condition, inside, outside : Expr
        ``inside`` where the condition holds, else ``outside``.
    """

    indices: tuple[Expr, ...]
    condition: Expr
    inside: Expr
    outside: Expr


@dataclass(frozen=True)
class Convolution:
    """A convolution as found in a PrimFunc.

    Parameters
    ----------
    lines : tuple of Axis
        All axes of the result but the last two.
    pixel : Axis or None
        The axis before the last; None where there is a single pixel.
    channel : Axis
        The last axis of the result.
    reduced : tuple of Axis
        Taps and input channels.
    data, weight : TensorLoad
        One element of each factor.
    write : callable (indices, Expr) -> Stmt
        Stores one sum at the given indices of the result, epilogue included.
    padding : Padding or None
        How the data are padded.
    group : int or None
        Output channels of a group, None where there is one group, or one of each channel.
    """

    lines: tuple[Axis, ...]
    pixel: Axis | None
    channel: Axis
    reduced: tuple[Axis, ...]
    data: TensorLoad
    weight: TensorLoad
    write: Writer
    padding: Padding | None
    group: int | None


@dataclass(frozen=True)
class _Shape:
    """Vectors and pixels of a tile."""

    vectors: int
    pixels: int


@dataclass(frozen=True)
class _Block:
    """What one task does.

    Parameters
    ----------
    lines : tuple of Expr
        All axes of the result before the blocked one.
    start, count : Expr
        Where the block is on the blocked axis.
    data : callable (TensorLoad) -> Expr
        Reads an element of the data.
    """

    lines: tuple[Expr, ...]
    start: Expr
    count: Expr
    data: Callable[[TensorLoad], Expr]


class ConvKernel:
    """Writes the nest of a convolution.

    Parameters
    ----------
    conv : Convolution
    simd : Simd
    """

    def __init__(self, conv: Convolution, simd: Simd) -> None:
        self.conv = conv
        self.pixel = conv.pixel or Axis(Var("pixel", INDEX), index(1), reduce=False)
        self.features = conv.group or conv.channel.extent
        self.groups = product([tirx.floordiv(conv.channel.extent, conv.group)]) if conv.group else index(1)
        self.group = Var("group", INDEX)
        self.full, self.registers = simd.lanes("float32"), simd.registers
        self.lanes = fit_lanes(self.features, self.full)
        self.reader = self._by_group(conv.data)

    def nest(self) -> Stmt:
        """All of it; two versions where the number of pixels is known only at run time."""
        shape = self._choose()
        if static(self.pixel.extent) is not None:
            return self._blocks(shape)
        single = self._blocks(_Shape(shape.vectors, 1))
        return IfThenElse(self.pixel.extent >= shape.pixels, self._blocks(shape), single)

    def _by_group(self, data: TensorLoad) -> TensorLoad:
        """The data of a group, whichever of its channels is computed."""

        def group(node: FloorDiv) -> Expr:
            return self.group if node.a.same_as(self.conv.channel.var) else node

        return tvm_ffi.structural_map(data, (FloorDiv, group)) if self.conv.group else data

    def _choose(self) -> _Shape:
        """The tile that takes the fewest cycles: sums, or loads where those are more, and a step of the loop."""
        features, pixels = static(self.features), static(self.pixel.extent)

        def cycles(shape: _Shape) -> float:
            sums = shape.vectors * shape.pixels
            step = max(sums, shape.vectors + shape.pixels, FEWEST_SUMS) + 1
            panels = 1 / shape.vectors if features is None else -(-features // (self.lanes * shape.vectors))
            tiles = 1 / shape.pixels if pixels is None else -(-pixels // shape.pixels)
            return panels * tiles * step

        shapes = [
            _Shape(vectors, pixels)
            for vectors in range(1, MOST_VECTORS + 1)
            for pixels in range(1, MOST_PIXELS + 1)
            # Beside the sums there are a vector of each column and one of the data.
            if vectors * pixels + vectors + 1 <= self.registers
        ]
        fitting = [s for s in shapes if (pixels is None or s.pixels <= pixels) and self._fits(s.vectors)]
        return min(fitting, key=cycles)

    def _fits(self, vectors: int) -> bool:
        features = static(self.features)
        return vectors == 1 or (features is not None and (vectors - 1) * self.lanes < features)

    def _blocks(self, shape: _Shape) -> Stmt:
        """Tasks: blocks of lines, or of pixels where all lines are one; panels, too, if nothing is padded for them."""
        *outer, blocked = (*self.conv.lines, self.pixel)[: max(len(self.conv.lines), 1)]
        by_pixel = not self.conv.lines
        size = self._block_size(blocked.extent, shape, by_pixel)
        last = product([tirx.max(self.pixel.extent - shape.pixels, index(0))])
        panels = product([tirx.ceildiv(self.features, self.lanes * shape.vectors)])
        inner = [self.groups, panels]
        extents = [*(axis.extent for axis in outer), product([tirx.ceildiv(blocked.extent, size)])]
        depth = product([axis.extent for axis in self.conv.reduced])
        pixels = product([size if by_pixel else size * self.pixel.extent])
        work = product([pixels, depth, max(self.lanes * shape.vectors // WORK_SHARE, 1)])

        def block(at: Sequence[Expr], data: Callable[[TensorLoad], Expr]) -> _Block:
            start = at[-1] * size
            if by_pixel:
                start = tirx.min(start, last)
            return _Block(tuple(at[:-1]), start, tirx.min(index(size), blocked.extent - start), data)

        def panel(one: _Block, group: Expr, number: Expr) -> Stmt:
            return substitute(self._panel(one, number, shape, by_pixel), {self.group: group})

        if self.conv.padding is None:
            return space([*extents, *inner], work, lambda at: panel(block(at[:-2], lambda load: load), at[-2], at[-1]))

        def padded(at: list[Expr]) -> Stmt:
            copy, fill, read = self._padded(block(at, lambda load: load), outer, blocked, size)
            one = block(at, read)
            panels_of = loop(inner[0], lambda g: loop(inner[1], partial(panel, one, g), name="panel"), name="group")
            return scope("padded", sequence(fill, panels_of), [copy])

        return space(extents, product([work, *inner]), padded)

    def _block_size(self, extent: Expr, shape: _Shape, by_pixel: bool) -> int:
        """Lines, or pixels, of one task."""
        known = static(extent)
        if by_pixel:
            tiles = BLOCK_TILES if known is None else max(-(-known // (shape.pixels * ENOUGH_TASKS)), 1)
            return min(tiles, BLOCK_TILES) * shape.pixels
        line = static(product(list(self.conv.data.source.shape[len(self.conv.data.source.shape) - 2 :])))
        most = BLOCK_BYTES // (4 * line) if line else BLOCK_TILES
        size = max(min(most, BLOCK_TILES), 1)
        if known is None:
            return size
        blocks = max(-(-known // size), min(known, ENOUGH_TASKS // 2))
        return -(-known // blocks)

    def _padded(
        self, block: _Block, outer: Sequence[Axis], blocked: Axis, size: int
    ) -> tuple[Var, Stmt, Callable[[TensorLoad], Expr]]:
        """A buffer with the data of a block, padded; what fills it; and how an element of the data is read from it."""
        padding = self.conv.padding
        assert padding is not None
        data = self.conv.data
        starts = {axis.var: i for axis, i in zip(outer, block.lines, strict=True)} | {blocked.var: block.start}
        lengths = {axis.var: index(1) for axis in outer} | {blocked.var: index(size)}
        real = {axis.var: index(1) for axis in outer} | {blocked.var: block.count}
        offsets, extents, filled = [], [], []
        for place in data.indices[:-1]:
            offset, extent, used = self._reach(place, starts, lengths, real)
            offsets.append(offset)
            extents.append(extent)
            filled.append(used)
        channels = data.source.shape[-1]
        copy = tirx.decl_buffer([*extents, channels], "float32", "padded")

        def element(at: Sequence[Expr], channel: Expr, value: Expr) -> Expr:
            places = [*(o + i for o, i in zip(offsets, at, strict=True)), channel]
            names = {v: i for v, i in zip(padding.indices, places, strict=True) if isinstance(v, Var)}
            return substitute(value, names)

        def fill(at: list[Expr]) -> Stmt:
            if len(at) < len(filled):
                return loop(filled[len(at)], lambda i: fill([*at, i]), name="pad")

            def copied(value: Expr) -> Stmt:
                def strip(base: Expr, width: int, _stale: Expr | None) -> Stmt:
                    return vector(
                        width, lambda lane: BufferStore(copy, element(at, base + lane, value), [*at, base + lane])
                    )

                return sequence(strips(channels, self.full, strip))

            inside = element(at, index(0), padding.condition)
            return IfThenElse(inside, copied(padding.inside), copied(padding.outside))

        def read(load: TensorLoad) -> Expr:
            places = [Analyzer().simplify(i - o) for i, o in zip(load.indices[:-1], offsets, strict=True)]
            return BufferLoad(copy, [*places, load.indices[-1]])

        return copy, fill([]), read

    def _reach(
        self, place: Expr, starts: dict[Var, Expr], lengths: dict[Var, Expr], real: dict[Var, Expr]
    ) -> tuple[Expr, Expr, Expr]:
        """Of an index of the data: its least value in a block, and how many it takes, at most and really."""
        axes = [*self.conv.lines, self.pixel, *self.conv.reduced]
        parts = detect_linear_equation(place, [axis.var for axis in axes])
        offset, extent, filled = parts[-1], index(1), index(1)
        for axis, factor in zip(axes, parts[:-1], strict=True):
            if axis.var in starts:
                offset = offset + factor * starts[axis.var]
            extent = extent + factor * (lengths.get(axis.var, axis.extent) - 1)
            filled = filled + factor * (real.get(axis.var, axis.extent) - 1)
        simplify = Analyzer().simplify
        return simplify(offset), simplify(extent), simplify(filled)

    def _panel(self, block: _Block, number: Expr, shape: _Shape, by_pixel: bool) -> Stmt:
        """All tiles of a block and one panel of channels."""
        columns = [
            self.group * self.features
            + tirx.min((number * shape.vectors + v) * self.lanes, index(self.features) - self.lanes)
            for v in range(shape.vectors)
        ]
        first, count = (block.start, block.count) if by_pixel else (index(0), self.pixel.extent)

        def tile(line: Sequence[Expr], step: Expr) -> Stmt:
            start = first + tirx.min(step * shape.pixels, count - shape.pixels)
            return self._tile(block, [*block.lines, *line], Analyzer().simplify(start), columns, shape.pixels)

        def tiles(line: Sequence[Expr]) -> Stmt:
            return loop(product([tirx.ceildiv(count, shape.pixels)]), partial(tile, line), name="tile")

        return tiles([]) if by_pixel else loop(block.count, lambda i: tiles([block.start + i]), name="line")

    def _tile(self, block: _Block, lines: Sequence[Expr], start: Expr, columns: Sequence[Expr], pixels: int) -> Stmt:
        """Sums of a few pixels and vectors of channels, from the first tap to the stores."""
        width = self.lanes * len(columns)
        sums = [tirx.decl_buffer((index(width),), "float32", f"sum{pixel}") for pixel in range(pixels)]
        at = {axis.var: i for axis, i in zip(self.conv.lines, lines, strict=True)}
        channel = self.conv.channel.var

        def vectors(write: Callable[[Expr, Expr], Stmt]) -> Stmt:
            """One statement for each vector; `write` gets the place among the sums and the channel."""

            def one(v: int, column: Expr) -> Stmt:
                return vector(self.lanes, lambda lane: write(lane + v * self.lanes, column + lane))

            return sequence([one(v, column) for v, column in enumerate(columns)])

        def multiply_add(folded: dict[Var, Expr], pixel: int) -> Stmt:
            here = {**at, **folded, self.pixel.var: start + pixel}
            data = block.data(substitute(self.reader, here))

            def write(place: Expr, column: Expr) -> Stmt:
                weight = substitute(self.conv.weight, {**folded, channel: column})
                value = substitute(data, {channel: column}) * weight
                return BufferStore(sums[pixel], sums[pixel][place] + value, [place])

            return vectors(write)

        def fold(folded: dict[Var, Expr]) -> Stmt:
            if len(folded) == len(self.conv.reduced):
                return sequence([multiply_add(folded, pixel) for pixel in range(pixels)])
            axis = self.conv.reduced[len(folded)]
            return loop(axis.extent, lambda k: fold({**folded, axis.var: k}), name="k")

        def zero(acc: Var) -> Stmt:
            return vectors(lambda place, _column: BufferStore(acc, ZERO, [place]))

        def store(pixel: int) -> Stmt:
            where = [*lines] if self.conv.pixel is None else [*lines, start + pixel]
            return vectors(lambda place, column: self.conv.write([*where, column], sums[pixel][place]))

        write = [store(pixel) for pixel in range(pixels)]
        return scope("tile", sequence([zero(acc) for acc in sums], fold({}), write), sums)
