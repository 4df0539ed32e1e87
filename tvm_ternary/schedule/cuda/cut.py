"""How a CUDA matmul cuts K into steps, and what of a step lies where in shared memory: numbers only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from tvm_ternary.kernels.matmul import MatmulKernel
from tvm_ternary.kernels.shape import MatmulShape, ceil_div
from tvm_ternary.schedule.cuda.operands import Operands, operands_of
from tvm_ternary.schedule.cuda.variant import CudaVariant

WHOLE_K = 1 << 16
"""Up to this K, sums over a whole row are at most 127 * 127 * 2^16 < 2^31."""


@dataclass(frozen=True)
class Cut:
    """A kernel for weights of a shape in a variant.

    Warps along K take turns with *units*: segments of K, or single steps where a row's sums are scaled once. An
    *iteration* is a step of all warps. A stage of shared memory holds an iteration's operands: weights, their scales
    and factors, activations, and sums and scales of activations.
    """

    kernel: MatmulKernel
    shape: MatmulShape
    variant: CudaVariant

    @cached_property
    def operands(self) -> Operands:
        """The kernel's operands of a tensor core."""
        return operands_of(self.kernel, self.shape)

    @property
    def planes(self) -> int:
        """Planes that are multiplied one after another."""
        return self.shape.planes if self.operands.planes_apart else 1

    @property
    def blocks(self) -> int:
        """Blocks of k in a segment."""
        return self.shape.segment_blocks(self.kernel.block)

    @property
    def segments(self) -> int:
        """Segments of a row."""
        return self.shape.segments(self.kernel.block)

    @property
    def splits(self) -> int:
        """Segments of a group."""
        return self.shape.splits(self.kernel.block)

    @property
    def steps(self) -> int:
        """Steps of a segment."""
        return ceil_div(self.blocks, self.operands.blocks)

    @property
    def whole(self) -> bool:
        """Whether a row's sums are scaled once: where there is one scale a row and they fit into the accumulators."""
        return self.shape.groups == 1 and self.planes == 1 and self.shape.padded_k(self.kernel.block) <= WHOLE_K

    @property
    def units(self) -> int:
        """What warps along K take turns with."""
        return self.segments * self.steps if self.whole else self.planes * self.segments

    @property
    def unit_steps(self) -> int:
        """Steps of a unit."""
        return 1 if self.whole else self.steps

    @property
    def iterations(self) -> int:
        """Steps of the warp that has most."""
        return ceil_div(self.units, self.variant.warps_k) * self.unit_steps

    @property
    def repeats(self) -> int:
        """Times 32 outputs of a warp."""
        return self.variant.columns // 32

    @property
    def row_tiles(self) -> int:
        """Times 8 rows of a warp."""
        return self.variant.rows // 8

    @property
    def sums(self) -> int:
        """Results of a thread."""
        return self.repeats * self.variant.rows

    @property
    def planes_scaled_apart(self) -> bool:
        """Whether scales have an axis of planes."""
        return self.operands.planes_apart

    @property
    def has_factors(self) -> bool:
        """Whether planes have factors, which decoding needs."""
        return self.shape.planes > 1 and not self.operands.planes_apart

    @property
    def changing_factors(self) -> bool:
        """Whether they change along K."""
        return self.has_factors and self.shape.groups > 1

    @property
    def shared_terms(self) -> bool:
        """Whether sums and scales of activations pass through shared memory: of many rows, segment by segment."""
        return self.variant.shared and not self.whole and any(o.name == "x_sum" for o in self.kernel.activations)

    @property
    def scales_start(self) -> int:
        """Where in a stage the weights' scales begin, behind the weights: bytes."""
        return self.repeats * self.operands.words * 4 * self.variant.threads

    @property
    def factors_start(self) -> int:
        """Where the factors begin."""
        return self.scales_start + (0 if self.whole else self.repeats * 16 * self.variant.threads)

    @property
    def rows_start(self) -> int:
        """Where the activations begin."""
        words = self.repeats * self.shape.planes if self.changing_factors else 0
        return self.factors_start + words * 4 * self.variant.threads

    @property
    def terms_start(self) -> int:
        """Where their sums and scales begin."""
        v, o = self.variant, self.operands
        if v.shared:
            return self.rows_start + v.warps_k * v.rows * o.row_bytes
        return self.rows_start + self.row_tiles * o.row_registers * 4 * v.threads

    @property
    def stage_bytes(self) -> int:
        """All of a stage."""
        return self.terms_start + (self.variant.warps_k * self.variant.rows * 8 if self.shared_terms else 0)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block of threads: the stages, or later the sums that warps along K exchange."""
        exchanged = self.variant.threads * self.sums * 4 if self.variant.warps_k > 1 else 0
        return max(self.variant.stages * self.stage_bytes, exchanged)

    @property
    def registers(self) -> int:
        """Registers of a thread, roughly."""
        o = self.operands
        scaled = 0 if self.whole else self.sums
        return 40 + o.sums * self.sums + scaled + self.repeats * (o.words + 4 * o.word_registers) + o.row_registers
