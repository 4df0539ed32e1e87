"""What the attention benchmark computes: heads and lengths, random operands, and what is right for them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.bench.engines import FAULT, WrongAnswerError
from tvm_ternary.bench.memory import aligned_copy
from tvm_ternary.bench.model import relative_error
from tvm_ternary.errors import OptionError
from tvm_ternary.kernels.attention import reference_attention
from tvm_ternary.kernels.ternary_queries import ternary_scores

Floats = npt.NDArray[np.float32]
Exact = npt.NDArray[np.float64]

_EXAMPLE = "for example 32/8x128: 32 heads, 8 of keys and values, 128 elements each; or 12x64"


@dataclass(frozen=True)
class HeadShape:
    """Heads of the queries, heads of the keys and values, and elements of each."""

    heads: int
    kv_heads: int
    size: int

    @classmethod
    def parse(cls, text: str) -> HeadShape:
        """Read ``32/8x128``, or ``12x64`` where every head has its own keys.

        Raises
        ------
        OptionError
            If it is none, or keys cannot be shared out evenly.
        """
        match = re.fullmatch(r"([0-9]{1,4})(?:/([0-9]{1,4}))?x([0-9]{1,4})", text)
        if match is None:
            raise OptionError("shapes", f"got {text!r}; expected HEADS/KVxSIZE", _EXAMPLE)
        heads, kv_heads, size = int(match[1]), int(match[2] or match[1]), int(match[3])
        if not (size and kv_heads and heads) or heads % kv_heads:
            problem = f"got {text!r}; expected numbers from 1, the second a divisor of the first"
            raise OptionError("shapes", problem, _EXAMPLE)
        return cls(heads, kv_heads, size)

    @property
    def group(self) -> int:
        """Heads of queries that share one of keys."""
        return self.heads // self.kv_heads

    @property
    def scale(self) -> float:
        """What scores are multiplied by."""
        return float(self.size**-0.5)

    def __str__(self) -> str:
        return f"{self.heads}{'' if self.group == 1 else f'/{self.kv_heads}'}x{self.size}"


@dataclass(frozen=True)
class Case:
    """One attention of a batch of one.

    Attributes
    ----------
    shape : HeadShape
    queries, keys : int
        One query is a step of decoding, whose keys are those of the cache and its own.
    causal : bool
        Whether a query sees no key behind its own.
    """

    shape: HeadShape
    queries: int
    keys: int
    causal: bool = False

    @property
    def step(self) -> bool:
        """Whether keys come from a cache."""
        return self.queries == 1

    @property
    def operations(self) -> int:
        """Multiplications and additions of both products, of the keys that are seen."""
        hidden = self.queries * (self.queries - 1) // 2 if self.causal else 0
        return 4 * self.shape.heads * self.shape.size * (self.queries * self.keys - hidden)

    @property
    def kind(self) -> str:
        """As the tables name it."""
        return "step" if self.step else "prompt, causal" if self.causal else "prompt"

    def __str__(self) -> str:
        return f"{self.shape}, {self.kind} of {self.keys}"


class Operands:
    """Queries, keys and values that every engine is given: normal, the same for the same case.

    Attributes
    ----------
    q : (1, queries, heads, size) float32
        As a projection gives it.
    k, v : float32
        A prompt's (1, keys, kv heads, size), as projections give them; a step's (1, kv heads, keys, size), as a cache
        holds them. A step's are an engine's to write its own token's into, which are there already.
    """

    def __init__(self, case: Case) -> None:
        self.case, shape, rng = case, case.shape, np.random.default_rng(0)
        cached = (1, shape.kv_heads, case.keys, shape.size)
        projected = (1, case.keys, shape.kv_heads, shape.size)

        def normal(dims: tuple[int, ...]) -> Floats:
            return aligned_copy(rng.standard_normal(dims, dtype=np.float32))

        self.q = normal((1, case.queries, shape.heads, shape.size))
        self.k, self.v = (normal(cached if case.step else projected) for _ in range(2))

    @property
    def by_head(self) -> tuple[Floats, Floats]:
        """Keys and values, (1, kv heads, keys, size), where they lie."""
        return (self.k, self.v) if self.case.step else (self.k.swapaxes(1, 2), self.v.swapaxes(1, 2))

    @cached_property
    def exact(self) -> Exact:
        """`attend` on the keys and values themselves."""
        return self.attend(*self.by_head)

    def attend(self, k: npt.NDArray[np.floating], v: npt.NDArray[np.floating]) -> Exact:
        """The definition in float64, for the first, middle and last query.

        Parameters
        ----------
        k, v : (1, kv heads, keys, size)

        Returns
        -------
        (1, up to 3, heads, size)
        """
        return self._by_query(reference_attention(self._asked, k, v, self.case.shape.scale, self._mask))

    def attend_trits(self, codes: npt.NDArray[np.int8], key_scale: Floats, v: npt.NDArray[np.floating]) -> Exact:
        """The same for queries that become trits, anew for each packed block of keys; the keys behind are exact.

        Parameters
        ----------
        codes : (1, kv heads, blocks, `BLOCK`, size) int8
        key_scale : (1, kv heads, blocks, size)
        v : (1, kv heads, keys, size)
        """
        scale, packed = self.case.shape.scale, codes.shape[2] * codes.shape[3]
        last = scale * self._asked.astype(np.float64) @ self.by_head[0][:, :, packed:].swapaxes(-1, -2)
        scores = np.concatenate([ternary_scores(self._asked, codes, key_scale, scale), last], axis=-1)
        scores += 0.0 if self._mask is None else self._mask
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return self._by_query(weights / weights.sum(axis=-1, keepdims=True) @ v.astype(np.float64))

    @property
    def _asked(self) -> Floats:
        """The queries that are looked at; heads that share keys are rows of one, so that no key is repeated."""
        shape, rows = self.case.shape, checked(self.case.queries)
        asked: Floats = self.q[:, rows].swapaxes(1, 2).reshape(1, shape.kv_heads, shape.group * len(rows), shape.size)
        return asked

    @property
    def _mask(self) -> Exact | None:
        case, rows = self.case, checked(self.case.queries)
        if not case.causal:
            return None
        seen = np.arange(case.keys) <= (case.keys - case.queries + np.array(rows))[:, None]
        return np.tile(np.where(seen, 0.0, -np.inf), (case.shape.group, 1))

    def _by_query(self, found: Exact) -> Exact:
        rows = len(checked(self.case.queries))
        return found.reshape(1, self.case.shape.heads, rows, self.case.shape.size).swapaxes(1, 2)


def checked(queries: int) -> list[int]:
    """Which queries' results are looked at."""
    return sorted({0, queries // 2, queries - 1})


@dataclass(frozen=True)
class AttentionEngine:
    """One way of computing a case.

    Attributes
    ----------
    name : str
    call : callable
        Computes, and gives what `result` understands.
    result : callable
        What a call gave -> (1, queries, heads, size) float32.
    want : (1, up to 3, heads, size) float64
        What is right for the keys and values that it holds, as `Operands.attend` gives it.
    error_bound : float
        Largest relative error (2-norm) that its arithmetic explains.
    bytes : int
        What a call reads and writes.
    """

    name: str
    call: Callable[[], Any]
    result: Callable[[Any], Floats]
    want: Exact
    error_bound: float
    bytes: int = 0

    def check(self, case: Case) -> float:
        """Call it, and give its relative error.

        Raises
        ------
        WrongAnswerError
            If that is beyond the bound.
        """
        got = self.result(self.call())
        expected = (1, case.queries, case.shape.heads, case.shape.size)
        if got.shape != expected:
            problem = f"the result is {got.shape}; expected {expected}"
            raise WrongAnswerError(f"{self.name}, {case}", problem, FAULT)
        error = relative_error(got[:, checked(case.queries)], self.want)
        if not error <= self.error_bound:
            problem = f"relative error is {error:.1e}; expected at most {self.error_bound:.0e}"
            raise WrongAnswerError(f"{self.name}, {case}", problem, FAULT)
        return error
