"""Rotary position embedding, and how it is stretched for long contexts.

Su et al., "RoFormer", arXiv:2104.09864, equation 34: at position p, the pair (x_i, x_{i + d/2}) of a head of d features
is turned by the angle p f_i, with f_i = theta ** (-2 i / d).

The cosines and sines of a position are not computed, and not kept for every position either: with p = 256 h + l they
follow from those of 256 h and of l by the addition theorem. So two small tables made in double precision serve any
length, where a product of float32 numbers p f_i has lost eight bits at position 100,000.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tvm import relax
from tvm.relax import op as R

from tvm_ternary.errors import ModelError
from tvm_ternary.graph.models.builder import GraphBuilder
from tvm_ternary.graph.models.settings import FILE, Settings

Frequencies = npt.NDArray[np.float64]

STEP = 256
"""Positions that share a row of the far table."""


@dataclass(frozen=True)
class Rope:
    """The rotation of one model.

    Attributes
    ----------
    frequencies : (size / 2,) float64
        Radians a position.
    gain : float
        What the rotated vectors are multiplied by.
    positions : int
        The longest sequence.
    """

    frequencies: Frequencies
    gain: float
    positions: int


def read_rope(settings: Settings, size: int, theta: float = 10000.0) -> Rope:
    """Read ``rope_theta``, ``rope_scaling`` or ``rope_parameters``, and ``max_position_embeddings``.

    Parameters
    ----------
    settings : Settings
    size : int
        Features of a head.
    theta : float
        Where the configuration has none.

    Raises
    ------
    ModelError
        If a head cannot be halved, or the kind of scaling is not known; lists those that are.
    """
    if size % 2:
        raise ModelError(FILE, f"heads have {size} features; a rotation needs an even number")
    settings.require("partial_rotary_factor", 1, 1.0, None)
    positions = settings.count("max_position_embeddings")
    found = settings.values.get("rope_parameters") or settings.values.get("rope_scaling") or {}
    if not isinstance(found, Mapping):
        raise ModelError(FILE, f"rope_scaling is {found!r}, expected an object or null")
    scaling = Settings({"rope_theta": settings.values.get("rope_theta"), **found})
    kind = scaling.text("rope_type", "type", default="default")
    if kind not in _KINDS:
        known = ", ".join(_KINDS)
        raise ModelError(FILE, f"rope_scaling is of type {kind!r}, expected one of {known}", "export the model to ONNX")
    base = scaling.number("rope_theta", default=theta)
    frequencies = base ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    return _KINDS[kind](frequencies, scaling, positions, base)


def _default(frequencies: Frequencies, scaling: Settings, positions: int, base: float) -> Rope:
    return Rope(frequencies, 1.0, positions)


def _linear(frequencies: Frequencies, scaling: Settings, positions: int, base: float) -> Rope:
    """Chen et al., "Extending Context Window of Large Language Models via Positional Interpolation", section 2.3."""
    return Rope(frequencies / scaling.number("factor"), 1.0, positions)


def _llama3(frequencies: Frequencies, scaling: Settings, positions: int, base: float) -> Rope:
    """Slow frequencies are divided by a factor, fast ones kept, those between interpolated, as Llama 3.1 does.

    How many times a frequency turns within the original context decides.
    """
    factor = scaling.number("factor")
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    turns = frequencies * scaling.count("original_max_position_embeddings") / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return Rope(frequencies * (kept + (1 - kept) / factor), 1.0, positions)


def _yarn(frequencies: Frequencies, scaling: Settings, positions: int, base: float) -> Rope:
    """Peng et al., "YaRN", arXiv:2309.00071, equations 18 to 23, with the ramp over whole dimensions as in its code."""
    for name in ("mscale", "mscale_all_dim", "truncate"):
        scaling.require(name, None)
    factor = scaling.number("factor")
    original = scaling.count("original_max_position_embeddings", default=positions)
    fast, slow = scaling.number("beta_fast", default=32.0), scaling.number("beta_slow", default=1.0)
    size = 2 * len(frequencies)

    def dimension(turns: float) -> float:
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = max(math.floor(dimension(fast)), 0), min(math.ceil(dimension(slow)), size - 1)
    divided = np.clip((np.arange(size // 2) - first) / max(last - first, 0.001), 0, 1)
    gain = scaling.number("attention_factor", default=0.1 * math.log(factor) + 1 if factor > 1 else 1.0)
    return Rope(frequencies * (1 - divided + divided / factor), gain, max(positions, int(factor * original)))


def _longrope(frequencies: Frequencies, scaling: Settings, positions: int, base: float) -> Rope:
    """Ding et al., "LongRoPE", arXiv:2402.13753: a factor for each frequency, the same for short and long sequences.

    Two sets of factors would make what a token is depend on the length of what follows it.
    """
    short, long = scaling.values.get("short_factor"), scaling.values.get("long_factor")
    if short != long or not isinstance(short, list) or len(short) != len(frequencies):
        problem = "short_factor and long_factor of rope_scaling have to be one list of a number for each two features"
        raise ModelError(FILE, problem, "export the model to ONNX")
    factors = np.array([Settings({"short_factor": value}).number("short_factor") for value in short])
    return Rope(frequencies / factors, scaling.number("attention_factor"), positions)


_KINDS: dict[str, Callable[[Frequencies, Settings, int, float], Rope]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "longrope": _longrope,
    "yarn": _yarn,
}
"""How each ``rope_type`` changes the frequencies."""


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of every position of a sequence, as `rotate` takes them.

    Attributes
    ----------
    cosine : (sequence, 1, 1, size / 2)
    sine : (sequence, 1, 2, size / 2)
        The negative sines, then the sines.
    """

    cosine: relax.Var
    sine: relax.Var


def rotation(graph: GraphBuilder, rope: Rope) -> Rotation:
    """Compute the rotation of the sequence's positions, which begin behind the past."""
    positions = graph.emit(R.arange(graph.past, graph.total, 1, "int64"))
    step = relax.const(STEP, "int64")
    far = graph.emit(R.floor_divide(positions, step))
    near = graph.emit(R.subtract(positions, graph.emit(R.multiply(far, step))))
    starts = np.arange(0, rope.positions, STEP)
    far_cosine, far_sine = _rows(graph, starts, rope.frequencies, far, rope.gain)
    near_cosine, near_sine = _rows(graph, np.arange(STEP), rope.frequencies, near, 1.0)

    def product(a: relax.Var, b: relax.Var) -> relax.Var:
        return graph.emit(R.multiply(a, b))

    cosine = graph.emit(R.subtract(product(far_cosine, near_cosine), product(far_sine, near_sine)))
    sine = graph.emit(R.add(product(far_sine, near_cosine), product(far_cosine, near_sine)))
    half = len(rope.frequencies)
    signs = relax.const(np.array([[-1], [1]], dtype=np.float32))
    sine = graph.reshape(sine, graph.sequence, 1, 1, half)
    return Rotation(graph.reshape(cosine, graph.sequence, 1, 1, half), graph.emit(R.multiply(sine, signs)))


def rotate(graph: GraphBuilder, x: relax.Expr, by: Rotation) -> relax.Var:
    """Turn the heads (batch, sequence, heads, size) of queries or keys by their positions.

    The halves of a head are an axis of their own and change places along it: one expression for both, without a branch,
    whose innermost axis is as contiguous as the tables'.
    """
    heads, size = (int(dim) for dim in x.ty.shape.values[2:])
    halves = graph.reshape(x, graph.batch, graph.sequence, heads, 2, size // 2)
    turned = graph.emit(R.multiply(graph.emit(R.flip(halves, 3)), by.sine))
    turned = graph.emit(R.add(graph.emit(R.multiply(halves, by.cosine)), turned))
    return graph.reshape(turned, graph.batch, graph.sequence, heads, size)


def _rows(
    graph: GraphBuilder, positions: npt.NDArray[np.int64], frequencies: Frequencies, which: relax.Var, gain: float
) -> tuple[relax.Var, relax.Var]:
    """Cosines and sines of some of the positions, each (sequence, size / 2)."""
    angles = positions[:, None] * frequencies
    tables = (relax.const((gain * values).astype(np.float32)) for values in (np.cos(angles), np.sin(angles)))
    cosine, sine = (graph.emit(R.take(table, which, 0, "clip")) for table in tables)
    return cosine, sine
