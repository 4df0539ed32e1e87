"""The attention benchmark: ours and fused attentions of others in turns in one run, every answer looked at first."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import tvm_ffi

from tvm_ternary.bench.attention_case import AttentionEngine, Case, Exact, HeadShape, Operands
from tvm_ternary.bench.attention_engines import CacheScheme, Engines
from tvm_ternary.bench.attention_peers import ATTENTION_PEERS, peers_for
from tvm_ternary.bench.model import relative_error
from tvm_ternary.bench.model_peers import SPIN
from tvm_ternary.bench.roofline import Roofline
from tvm_ternary.bench.timing import Spread, pace_of, time_turns, turn_ratio
from tvm_ternary.errors import OptionError
from tvm_ternary.kernels.ternary_keys import BLOCK
from tvm_ternary.runtime.threads import ComputeThread, thread_count
from tvm_ternary.schedule.intrinsics import PAIR_DOTS
from tvm_ternary.target import Target, resolve

TURNS = 9
# numpy's workers, which checked, and onnxruntime's go on spinning.
_PAUSE = max(SPIN, 0.15)
_RATES = {"bandwidth": "bandwidth_gbs", "peak": "peak_gops"}


@dataclass(frozen=True)
class AttentionMeasurement:
    """One way to hold keys and values on one case, beside the peers of the same turns.

    Attributes
    ----------
    case : Case
    scheme : CacheScheme
    window : int
        Last tokens of a cache that stay float32 in any case.
    threads : int
        Of every engine.
    target : str
        Of our kernels.
    time : Spread
        Microseconds.
    error : float
        Relative (2-norm), against the definition in float64 on what the keys and values stand for.
    loss : float
        That definition's, against itself on the keys and values before they were quantized.
    bytes : int
        What is read and written.
    token_bytes, cache_bytes : float
        Of a packed token's keys and values of all heads, and of all tokens.
    bandwidth : float
        Bytes a second that a buffer as large as what is read is read with.
    peak : float
        Operations a second at most, in the kernel's arithmetic.
    peers : dict of str to Spread
    ratios : dict of str to float
        Median over the turns of a peer's time over ours in the same turn: above 1 we are faster.
    peer_errors : dict of str to float
        Against the definition on the keys and values before they were quantized.
    causal_share : float, optional
        Of a causal prompt that was timed in turns with the same one that is not: median over the turns of its time
        over the other's in the same turn.
    left_out : dict of str to str
        Peers that cannot compute this, and why.
    """

    case: Case
    scheme: CacheScheme
    window: int
    threads: int
    target: str
    time: Spread
    error: float
    loss: float
    bytes: int
    token_bytes: float
    cache_bytes: float
    bandwidth: float
    peak: float
    peers: dict[str, Spread] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    peer_errors: dict[str, float] = field(default_factory=dict)
    causal_share: float | None = None
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def floor(self) -> float:
        """Microseconds that reading or computing takes at least."""
        return max(self.bytes / self.bandwidth, self.case.operations / self.peak) * 1e6

    @property
    def reached(self) -> float:
        """Floor over median: 1 is all that the machine can do."""
        return self.floor / self.time.median

    def as_json(self) -> dict[str, Any]:
        """A line: times in microseconds, rates in units of 10^9 a second."""
        plain = {key: value for key, value in asdict(self).items() if key not in _RATES}
        return {
            **plain,
            "scheme": str(self.scheme),
            **{name: getattr(self, key) / 1e9 for key, name in _RATES.items()},
            "gbs": self.bytes / self.time.median / 1e3,
            "gops": self.case.operations / self.time.median / 1e3,
            "floor_us": self.floor,
            "floor_percent": 100 * self.reached,
        }

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> AttentionMeasurement:
        """Read what `as_json` gives.

        Raises
        ------
        KeyError, TypeError
            If something is missing or of another type.
        """
        plain = {key: line[key] for key in cls.__dataclass_fields__ if key not in _RATES}
        case = line["case"]
        plain["case"] = Case(**{**case, "shape": HeadShape(**case["shape"])})
        plain["scheme"] = CacheScheme.parse(line["scheme"])
        plain["time"] = Spread(**line["time"])
        plain["peers"] = {name: Spread(**spread) for name, spread in line["peers"].items()}
        plain |= {key: line[name] * 1e9 for key, name in _RATES.items()}
        return cls(**plain)


def cases_of(
    shapes: Sequence[HeadShape], cached: Sequence[int], prompts: Sequence[int], *, window: int
) -> Iterator[Case]:
    """For each shape the steps with so many tokens, then the prompts, causal and not.

    Raises
    ------
    OptionError
        If a length or the window is none.
    """
    if window < BLOCK or window % BLOCK:
        raise OptionError("window", f"is {window}; expected a multiple of {BLOCK}, from {BLOCK} on")
    if cached and min(cached) < window + BLOCK:
        problem = f"is {min(cached)}; of up to {window + BLOCK - 1} tokens none is packed"
        raise OptionError("cached", problem, "give more, or a smaller window")
    if prompts and min(prompts) < 2:
        raise OptionError("prompts", f"is {min(prompts)}; expected at least 2 tokens")
    for shape in shapes:
        yield from (Case(shape, 1, keys) for keys in cached)
        yield from (Case(shape, length, length, causal) for length in prompts for causal in (True, False))


def measure_attention(
    cases: Sequence[Case],
    schemes: Sequence[CacheScheme],
    *,
    prompt_schemes: Sequence[CacheScheme] = (CacheScheme(),),
    peers: Sequence[str] = (),
    window: int = 128,
    threads: int = 1,
    turns: int = TURNS,
    target: str | Target = "native",
) -> Iterator[AttentionMeasurement]:
    """Check and measure every case.

    Parameters
    ----------
    cases : sequence of Case
        As `cases_of` gives them.
    schemes : sequence of CacheScheme
        Of steps.
    prompt_schemes : sequence of CacheScheme
        Of a prompt's keys, which are packed in every call; its values are given in float32.
    peers : sequence of str
        Keys of `tvm_ternary.bench.attention_peers.ATTENTION_PEERS`.
    window : int
        Last tokens of a cache that stay float32, a multiple of 64.
    threads : int
        Of every engine.
    turns : int
        Of each engine; in a turn it is called once or several times, by how long a call takes.
    target : str or Target
        For our kernels and the peak they are held against; it must be one that this host can run.

    Yields
    ------
    AttentionMeasurement
        As soon as it is there.

    Raises
    ------
    OptionError
        If an option has no meaning.
    WrongAnswerError
        If what is to be timed computes something else.
    HostError
        If this host cannot run the target's code, or has no C compiler.
    """
    if turns < 1:
        raise OptionError("turns", f"is {turns}; expected at least 1")
    resolved = resolve(target)
    compute = ComputeThread(tvm_ffi, thread_count(threads))
    roofline, engines = Roofline(resolved, threads), Engines(resolved, window)

    def ready(case: Case) -> _Ready:
        operands = Operands(case)
        own = engines.make(operands, schemes if case.step else prompt_schemes)
        names, refusals = peers_for(case, peers)
        others = [compute.call(ATTENTION_PEERS[name].make, name, operands, threads) for name in names]
        errors = {one.name: compute.call(one.check, case) for one in (*own.values(), *others)}
        return _Ready(case, own, others, errors, operands.exact, refusals)

    for _, twins in itertools.groupby(cases, _but_for_causal):
        both = [ready(case) for case in twins]
        samples = _time(both, compute, turns)
        for one in both:
            spread = {name: Spread.of_turns(samples[one.case, name]) for name in one.errors}
            for scheme, engine in one.own.items():
                times = samples[one.case, engine.name]
                yield AttentionMeasurement(
                    case=one.case,
                    scheme=scheme,
                    window=window,
                    threads=threads,
                    target=resolved.name,
                    time=spread[engine.name],
                    error=one.errors[engine.name],
                    loss=relative_error(engine.want, one.exact),
                    bytes=engine.bytes,
                    token_bytes=scheme.token_bytes(one.case.shape, values=one.case.step),
                    cache_bytes=scheme.cache_bytes(one.case.shape, one.case.keys, window, values=one.case.step),
                    bandwidth=roofline.bandwidth(engine.bytes),
                    peak=_peak(roofline, one.case, scheme, pairs=resolved.tier in PAIR_DOTS),
                    peers={peer.name: spread[peer.name] for peer in one.others},
                    ratios={peer.name: turn_ratio(samples[one.case, peer.name], times) for peer in one.others},
                    peer_errors={peer.name: one.errors[peer.name] for peer in one.others},
                    causal_share=_causal_share(one.case, engine.name, samples),
                    left_out=one.refusals,
                )


@dataclass(frozen=True)
class _Ready:
    """A case whose engines have been made and checked.

    Attributes
    ----------
    case : Case
    own : mapping of CacheScheme to AttentionEngine
    others : sequence of AttentionEngine
        The peers.
    errors : mapping of str to float
        By engine.
    exact : array
        The definition on the keys and values before they were quantized.
    refusals : mapping of str to str
        Peers that cannot compute the case, and why.
    """

    case: Case
    own: Mapping[CacheScheme, AttentionEngine]
    others: Sequence[AttentionEngine]
    errors: Mapping[str, float]
    exact: Exact
    refusals: dict[str, str]


Samples = Mapping[tuple[Case, str], Sequence[Sequence[float]]]


def _but_for_causal(case: Case) -> Case:
    return replace(case, causal=False)


def _causal_share(case: Case, engine: str, samples: Samples) -> float | None:
    whole = samples.get((_but_for_causal(case), engine))
    return turn_ratio(samples[case, engine], whole) if case.causal and whole else None


def _peak(roofline: Roofline, case: Case, scheme: CacheScheme, *, pairs: bool) -> float:
    """Of both products: with ``pairs`` a prompt's values are 16-bit numbers, half as many at once as bytes."""
    if not scheme.rounded:
        return roofline.float32_peak
    if case.step:
        return roofline.int8_peak
    values = roofline.int8_peak / 2 if pairs else roofline.float32_peak
    return 2 / (1 / roofline.int8_peak + 1 / values)


def _time(group: Sequence[_Ready], compute: ComputeThread, turns: int) -> Samples:
    """Microseconds of every call, by case and engine and turn, on the thread whose pool has the right size."""
    # Ours first: what is compared with each other lies close together in a turn.
    engines = [(one.case, engine) for one in group for engine in one.own.values()]
    engines += [(one.case, engine) for one in group for engine in one.others]
    calls = {(case, engine.name): [engine.call] for case, engine in engines}
    # Workers of one engine spin for a while on the cores that the next one needs.
    rests = dict.fromkeys(calls, SPIN) if compute.count > 1 else None
    time.sleep(_PAUSE)
    return compute.call(time_turns, calls, turns, pace_of(compute.count), rests)
