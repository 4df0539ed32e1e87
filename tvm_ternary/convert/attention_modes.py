"""Which attentions of a model keep ternary keys and values inside the library, and with how many planes."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import tvm

from tvm_ternary.convert.attention import Errors, choose_planes
from tvm_ternary.errors import OptionError
from tvm_ternary.graph.importer import ImportedModel
from tvm_ternary.graph.passes.cache_attention import CacheChoice, Choices, cache_attention
from tvm_ternary.graph.passes.find_attention import as_index, known_extent
from tvm_ternary.graph.passes.find_pasts import NO_PAST, find_caches, named_attentions
from tvm_ternary.graph.passes.round_keys import Outputs, round_keys
from tvm_ternary.graph.passes.unstack_pasts import unstack_pasts
from tvm_ternary.graph.passes.without_past import without_past
from tvm_ternary.kernels.attention import Attention
from tvm_ternary.kernels.ternary_keys import STEPS
from tvm_ternary.runtime.kv_cache import BLOCK
from tvm_ternary.schedule.cpu import simd_of
from tvm_ternary.schedule.cpu.attention.cached import cached_attention
from tvm_ternary.schedule.cpu.attention.packed import Packed
from tvm_ternary.schedule.cpu.attention.rounded import pack_keys, rounded_attention, words_of
from tvm_ternary.schedule.cuda.attention.prompt import attention_packed, pack_operands, why_not
from tvm_ternary.schedule.intrinsics import BYTE_DOTS, PAIR_DOTS
from tvm_ternary.target import Target

FULL, KEYS, KEYS_VALUES, ADAPTIVE = "full", "ternary-keys", "ternary-keys-values", "adaptive"
MODES = (FULL, KEYS, KEYS_VALUES, ADAPTIVE)
"""What `AttentionMode` names: float; keys ternary; both; chosen for each attention by what it costs in accuracy."""


HeadErrors = dict[int, dict[int, float]]
"""Of an attention: head of keys -> planes -> relative error."""
Measure = Callable[[ImportedModel, bool], Errors]
"""Gives the errors of a model of whole texts, of keys or of values too (`convert.attention.attention_errors`)."""


def read_modes(attention: str | Sequence[str] | Mapping[str, str] | None) -> dict[str, str]:
    """Patterns over names and the mode of what they match, first match first.

    Parameters
    ----------
    attention : str, sequence or mapping, optional
        One mode for all, or ``PATTERN=MODE`` each; None: full.

    Raises
    ------
    OptionError
        If a mode does not exist or a pattern is no regular expression.
    """
    if attention is None:
        return {}
    given = [attention] if isinstance(attention, str) else attention
    pairs = list(given.items()) if isinstance(given, Mapping) else [_pair(text) for text in given]
    for pattern, mode in pairs:
        if mode not in MODES:
            raise OptionError(f"attention {mode!r}", "does not exist", f"choose one of {', '.join(MODES)}")
        try:
            re.compile(pattern)
        except re.error as error:
            raise OptionError(f"attention {pattern!r}", f"is no regular expression ({error})") from error
    return dict(pairs)


def keeps_past(modes: Mapping[str, str]) -> bool:
    """Whether keys and values are kept inside, of any attention and so of all."""
    return any(mode != FULL for mode in modes.values())


def read_planes(planes: int | str | tuple[int, int]) -> tuple[int, int]:
    """Planes of keys and of values: one number for both, or two.

    Raises
    ------
    OptionError
        If that is not 1 to 3, once or twice.
    """
    parts = list(map(str, planes)) if isinstance(planes, tuple | list) else str(planes).split(",")
    if len(parts) not in (1, 2) or not all(part.strip() in map(str, STEPS) for part in parts):
        raise OptionError(f"kv_planes {planes}", "is no number of planes; expected 1 to 3, or two of them: 2,1")
    return int(parts[0]), int(parts[-1])


def choose_caches(
    model: ImportedModel,
    modes: Mapping[str, str],
    planes: tuple[int, int],
    window: int,
    measure: Measure | None = None,
    budget: float = 0.0,
    rotation: bool = True,
) -> dict[str, tuple[CacheChoice, ...]]:
    """What each attention is to keep.

    Parameters
    ----------
    model : ImportedModel
    modes : mapping of str to str
        As `read_modes` gives them. A pattern is searched in ``NAME#HEAD``, where ``HEAD`` is one of keys and values.
    planes : (int, int)
        Of keys and values, where they are not chosen by their errors.
    window : int
        Last tokens that stay in float, a multiple of 64.
    measure : callable, optional
        For ``adaptive``.
    budget : float
        The largest error that ``adaptive`` allows.
    rotation : bool
        Whether heads are turned by a Hadamard matrix before they are rounded.

    Returns
    -------
    dict of str to tuple of CacheChoice
        One for all heads, or one for each run of them. Empty where all stay as they are. As soon as one attention is
        not ``full``, all that have a past keep it inside: those that are keep it in float.

    Raises
    ------
    OptionError
        If a pattern matches nothing, an attention cannot be what it is to be, or adaptive is asked for without
        calibration.
    """
    if not keeps_past(modes):
        return {}
    if window < 0 or window % BLOCK:
        raise OptionError(f"kv_window {window}", f"is no multiple of {BLOCK}")
    model = unstack_pasts(model)
    found = find_caches(model)
    if not found:
        raise OptionError("attention", f"{model.name} has none that is known as such", "compile with --attention full")
    kept = any(reason is None for reason in found.values())
    counts = {name: match.shape("").kv_heads if kept else 1 for name, match in named_attentions(model).items()}
    heads = {name: [f"{name}#{head}" for head in range(count)] for name, count in counts.items()}
    for pattern in modes:
        if not any(re.search(pattern, head) for names in heads.values() for head in names):
            raise OptionError(f"attention {pattern!r}", "matches none", f"there are {', '.join(found)}")
    wanted = {name: [_mode_of(head, modes) for head in names] for name, names in heads.items()}
    _require_possible(wanted, found, kept)
    errors = _errors(model, wanted, kept, measure)

    def choose(name: str) -> tuple[CacheChoice, ...]:
        chosen = [
            _measured(_of(errors[name], [head], kept), window, budget, kept)
            if mode == ADAPTIVE
            else _asked(mode, planes, window)
            for head, mode in enumerate(wanted[name])
        ]
        runs, first = [], 0
        for choice, same in itertools.groupby(chosen):
            heads = range(first, first + len(list(same)))
            said = _said(_of(errors[name], heads, kept), budget) if choice.mode == ADAPTIVE else None
            turned = rotation and choice.window is not None
            runs.append(replace(choice, heads=len(heads), rotated=turned, reason=said))
            first = heads.stop
        return tuple(runs)

    return {name: choose(name) for name in wanted if not kept or found[name] is None}


def apply_choices(model: ImportedModel, choices: Choices, target: Target) -> ImportedModel:
    """Keep keys and values inside, or round keys in a run of whole texts.

    Raises
    ------
    OptionError
        If the target is no CPU, and keys and values are to be kept, or there is no kernel for an attention.
    """
    if not choices:
        return model
    # Pasts that stay inputs stay as they are.
    kept = [name for name, reason in find_caches(unstack_pasts(model)).items() if reason is None]
    model = unstack_pasts(model, kept)
    if any(reason is None for reason in find_caches(model).values()):
        if target.kind == "cuda":
            problem = f"{target.name} is no CPU; models keep keys and values on CPUs so far"
            raise OptionError("attention", problem, "compile with --attention full")
        return cache_attention(model, choices, partial(_cached, target))
    if target.kind == "cuda":
        _require_kernels(model, choices, target)
        return round_keys(model, choices, _rounded_on_gpu)
    return round_keys(model, choices, partial(_rounded, target))


def _cached(
    target: Target,
    shape: Attention,
    key_planes: int,
    value_planes: int,
    lengths: tuple[int | None, int | None],
) -> tvm.tirx.PrimFunc:
    packed = Packed(key_planes, value_planes, BYTE_DOTS[target.tier])
    return cached_attention(shape, packed, lengths, simd_of(tvm.target.Target(target.tvm)))


def _rounded(
    target: Target, shape: Attention, planes: int, window: int, lengths: tuple[int | None, ...]
) -> tuple[tvm.tirx.PrimFunc, tvm.tirx.PrimFunc, Outputs]:
    packed = Packed(planes, planes, BYTE_DOTS[target.tier], PAIR_DOTS.get(target.tier))
    simd = simd_of(tvm.target.Target(target.tvm))
    batch, _, keys = lengths
    pack = pack_keys(shape, packed, window, (batch, keys), simd)
    return pack, rounded_attention(shape, packed, window, lengths, simd), partial(words_of, shape, packed)


def _rounded_on_gpu(
    shape: Attention, planes: int, window: int, lengths: tuple[int | None, ...]
) -> tuple[tvm.tirx.PrimFunc, tvm.tirx.PrimFunc, Outputs]:
    """In bfloat16, whatever the scheme: it has no limit, and is finer than any number of planes."""
    batch, queries, keys = (int(length or 0) for length in lengths)
    pack, outputs = pack_operands(shape, planes, window, (batch, queries, keys))
    attend = attention_packed(shape, planes, window, (batch, queries, keys))
    made = [([*map(as_index, extents)], dtype) for extents, dtype in outputs]
    return pack.without_attr("global_symbol"), attend.without_attr("global_symbol"), lambda *_: made


def _require_kernels(model: ImportedModel, choices: Choices, target: Target) -> None:
    """Refuse what there is no kernel for on a GPU."""
    for name, match in named_attentions(model).items():
        if name in choices and any(choice.window is not None for choice in choices[name]):
            extents = match.query.extents["b"], match.query.extents["l"], match.key.extents["l"]
            # Whatever its mask is.
            why = why_not(match.shape("bms", match.scores.hidden), tuple(map(known_extent, extents)))
            if why is not None:
                hint = "give all sizes with --dim, or compile with --attention full"
                raise OptionError(f"attention {name}", f"cannot have ternary keys on {target.name}: it {why}", hint)


def _require_possible(wanted: Mapping[str, list[str]], found: Mapping[str, str | None], kept: bool) -> None:
    """Refuse to keep what cannot be kept; where nothing is, keys may be rounded in the run."""
    for name, reason in found.items():
        possible = {FULL} if kept or reason != NO_PAST else {FULL, KEYS, ADAPTIVE}
        for mode in wanted[name]:
            if reason is not None and mode not in possible:
                hint = "export the model with past keys and values as inputs and present ones as outputs"
                hint = f"choose {KEYS}, or {hint}" if KEYS in possible else hint
                raise OptionError(f"attention {name}", f"cannot be {mode}: it {reason}", hint)


def _errors(
    model: ImportedModel, wanted: Mapping[str, list[str]], kept: bool, measure: Measure | None
) -> dict[str, HeadErrors]:
    if not any(ADAPTIVE in modes for modes in wanted.values()):
        return {}
    if measure is None:
        problem = "decides by what planes cost in accuracy, and was given nothing to measure that with"
        raise OptionError("attention adaptive", problem, "give --kv-calibration, or choose ternary-keys")
    found = measure(without_past(model) if kept else model, kept)
    return dict(zip(wanted, found.values(), strict=True))


def _pair(text: str) -> tuple[str, str]:
    pattern, equals, mode = text.rpartition("=")
    return (pattern, mode) if equals else ("", text)


def _mode_of(name: str, modes: Mapping[str, str]) -> str:
    return next((mode for pattern, mode in modes.items() if re.search(pattern, name)), FULL)


def _asked(mode: str, planes: tuple[int, int], window: int) -> CacheChoice:
    keys, values = planes
    if mode == FULL:
        return CacheChoice(1, mode, 1, 1, None)
    return CacheChoice(1, mode, keys, 0 if mode == KEYS else values, window)


def _of(errors: HeadErrors, heads: Sequence[int], kept: bool) -> HeadErrors:
    """The errors of some heads; where nothing is kept a choice is one for all."""
    return {head: errors[head] for head in heads} if kept else errors


def _said(errors: HeadErrors, budget: float) -> str:
    """The largest errors of these heads."""
    counts = sorted(set.intersection(*(set(of_planes) for of_planes in errors.values())))
    if all(math.isnan(error) for of_planes in errors.values() for error in of_planes.values()):
        return "float: no text was long enough for anything to be packed"
    worst = ", ".join(f"{max(of_planes[n] for of_planes in errors.values()):.3f}" for n in counts)
    return f"errors with {', '.join(map(str, counts))} planes: {worst}; at most {budget:g}"


def _measured(errors: HeadErrors, window: int, budget: float, kept: bool) -> CacheChoice:
    """The fewest planes that are good enough for all of these heads; float where none are."""
    (planes,) = choose_planes({"": errors}, budget).values()
    if not planes:
        return CacheChoice(1, ADAPTIVE, 1, 1, None)
    return CacheChoice(1, ADAPTIVE, planes, planes if kept else 0, window)
