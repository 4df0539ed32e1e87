"""The plan: which matrix becomes ternary, with which scheme, and why another stays float.

No matrix is skipped in silence: a plan has a row for each, and a row that stays float carries its reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tvm_ternary.errors import OptionError
from tvm_ternary.formats import (
    BITS_BLOCK,
    CODES_BLOCK,
    DENSE_BLOCK,
    MAX_PLANES,
    SHARED_SCALES,
    PerChannel,
    Scheme,
    padded_k,
    require_packing,
)
from tvm_ternary.quantize.blocks import OUTPUT, find_places

GROUPS: dict[str, str] = {
    "all": r"",
    "attention": r"(?i)attention|attn|\bquery\b|\bkey\b|\bvalue\b|q_proj|k_proj|v_proj|o_proj|out_proj|qkv|c_attn",
    "ffn": (
        r"(?i)^(?!.*(attention|attn))"
        r".*(ffn|mlp|feed_?forward|intermediate|output\.dense|up_proj|down_proj|gate_proj|c_fc|\bfc\d|\bwi|\bwo\b|lin[12])"
    ),
}
"""Words that stand for a pattern over matrix names, in the spellings of common exporters."""

_PLANES = re.compile(rf"t([1-{MAX_PLANES}])")


@dataclass(frozen=True)
class LayerPlan:
    """What is to become of one matrix.

    Attributes
    ----------
    name : str
    shape : (N, K)
        out_features, in_features.
    scheme : Scheme or None
        None leaves it float.
    reason : str or None
        Why it stays float.
    rule : str
        What decided: the entry of ``layers``, or where the matrix stands in the model.
    """

    name: str
    shape: tuple[int, int]
    scheme: Scheme | None
    reason: str | None
    rule: str = field(default="", compare=False)


@dataclass(frozen=True)
class LayerRule:
    """One entry of ``layers``: a word or regular expression over matrix names, and the scheme of those it matches."""

    text: str
    pattern: re.Pattern[str]
    scheme: Scheme

    @property
    def is_word(self) -> bool:
        """Whether it is one of `GROUPS`, which say nothing about the edges of a model."""
        return self.text in GROUPS


def parse_layers(layers: str | Sequence[str] | Mapping[str, str], scheme: str | Scheme) -> list[LayerRule]:
    """Read the ``layers`` option.

    Parameters
    ----------
    layers : str, sequence of str, or mapping
        Each entry is ``all``, ``attention``, ``ffn`` or a regular expression searched in matrix names, alone or with a
        scheme of its own: ``"query|key=t3a8g64"``, or a mapping of one to the other. The first entry that matches a
        name decides.
    scheme : str or Scheme
        The scheme of entries without one.

    Raises
    ------
    OptionError
        If an entry is no regular expression, or a scheme does not exist.
    """
    default = scheme if isinstance(scheme, Scheme) else Scheme.parse(scheme)
    if isinstance(layers, Mapping):
        entries = [(pattern, Scheme.parse(own)) for pattern, own in layers.items()]
    else:
        entries = [_entry(text, default) for text in ([layers] if isinstance(layers, str) else layers)]
    return [LayerRule(text, _pattern(text), own) for text, own in entries]


def named_by(layers: str | Sequence[str] | Mapping[str, str] | None) -> Callable[[str], bool]:
    """Tell which weights of convolutions are to be matrices: those that ``layers`` names.

    Parameters
    ----------
    layers : str, sequence, mapping or None
        As in `parse_layers`; None names none.

    Returns
    -------
    callable (str) -> bool
        Whether a regular expression of ``layers`` matches a name. A word, ``all`` for one, speaks of matrices only.
    """
    rules = [rule for rule in parse_layers(layers or (), Scheme(1, 8, PerChannel())) if not rule.is_word]
    return lambda name: any(rule.pattern.search(name) for rule in rules)


def make_plan(
    matrices: Mapping[str, tuple[int, int]],
    scheme: str | Scheme,
    layers: str | Sequence[str] | Mapping[str, str] = "all",
    packing: str = "fast",
    *,
    edges: str = "same",
    output_layer: str = "same",
) -> list[LayerPlan]:
    """Decide for each matrix.

    Parameters
    ----------
    matrices : mapping of name to (N, K)
        In the order of their use.
    scheme, layers
        As in `parse_layers`.
    packing : str
        A key of `formats.PACKINGS`.
    edges, output_layer : str
        What the matrices of the first and last block, and those behind the blocks, become where a word of ``layers``
        chose them; see `parse_place`. A matrix that a regular expression chose becomes what that says.

    Raises
    ------
    OptionError
        If an entry of ``layers`` matches no matrix, the message lists the names; if ``edges`` or ``output_layer``
        cannot be read; or if the packing does not exist for one of the schemes.
    """
    rules = parse_layers(layers, scheme)
    policy = {"edges": edges, "output_layer": output_layer}
    for option, text in policy.items():
        parse_place(option, text, Scheme(1, 8, PerChannel()))
    for rule in rules:
        require_packing(packing, rule.scheme.activation_bits)
        if rule.text != "all" and not any(rule.pattern.search(name) for name in matrices):
            known = ", ".join(matrices) or "none"
            raise OptionError(f"layers {rule.text!r}", "matches no matrix of the model", f"matrices are: {known}")
    places = find_places(matrices)
    return [_decide(name, shape, rules, packing, places.get(name), policy) for name, shape in matrices.items()]


def parse_place(option: str, text: str, scheme: Scheme) -> Scheme | None:
    """Read what matrices at an edge of the model become.

    Parameters
    ----------
    option : str
        What errors call it.
    text : str
        ``same`` (the scheme of the others), ``float``, a scheme, or only its planes: ``t4`` keeps the activations and
        the granularity.
    scheme : Scheme
        That of the others.

    Returns
    -------
    Scheme or None
        None is float.

    Raises
    ------
    OptionError
        If it is none of these.
    """
    if text in ("same", "float"):
        return scheme if text == "same" else None
    if match := _PLANES.fullmatch(text):
        return replace(scheme, planes=int(match[1]))
    try:
        return Scheme.parse(text)
    except OptionError:
        problem = f"got {text!r}; expected float, same, planes alone (t4) or a scheme"
        raise OptionError(option, problem, "for example t4, or t4a8g64") from None


def _decide(
    name: str,
    shape: tuple[int, int],
    rules: Sequence[LayerRule],
    packing: str,
    place: str | None,
    policy: Mapping[str, str],
) -> LayerPlan:
    rule = next((rule for rule in rules if rule.pattern.search(name)), None)
    if rule is None:
        return LayerPlan(name, shape, None, "not chosen by layers")
    scheme, why = rule.scheme, f"layers {rule.text}"
    if place is not None and rule.is_word:
        option = "output_layer" if place == OUTPUT else "edges"
        chosen = parse_place(option, policy[option], rule.scheme)
        told = f"{place}: {option.replace('_', '-')} is {policy[option]}"
        if chosen is None:
            return LayerPlan(name, shape, None, told)
        scheme, why = chosen, why if policy[option] == "same" else told
        require_packing(packing, scheme.activation_bits)
    ternary, dense = packed_bits(shape, scheme, packing), 32 * shape[0] * shape[1]
    if ternary >= dense:
        return LayerPlan(name, shape, None, f"{scheme} would take {ternary // 8} bytes, float32 takes {dense // 8}")
    return LayerPlan(name, shape, scheme, None, why)


def packed_bits(shape: tuple[int, int], scheme: Scheme, packing: str = "fast") -> int:
    """Bits of the packed planes and their scales as a kernel reads them, padding counted."""
    n, k = shape
    # Both planes of a block of bits take a word each; other blocks are a word.
    block = DENSE_BLOCK if packing == "dense" else BITS_BLOCK if scheme.activation_bits == 1 else CODES_BLOCK
    words = 2 if block == BITS_BLOCK else 1
    groups, padded = padded_k(k, scheme.granularity, block)
    rows = -(-n // 16) * 16
    shared = scheme.activation_bits in SHARED_SCALES and scheme.planes > 1
    scales = 32 + 8 * scheme.planes if shared else 32 * scheme.planes
    return rows * groups * (32 * words * (padded // block) * scheme.planes + scales)


def _entry(text: str, default: Scheme) -> tuple[str, Scheme]:
    """Split ``PATTERN=SCHEME``; what stands behind the last = must be a scheme, since names hold none."""
    pattern, found, own = text.rpartition("=")
    return (pattern, Scheme.parse(own)) if found else (text, default)


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(GROUPS.get(text, text))
    except re.error as error:
        words = ", ".join(GROUPS)
        raise OptionError(f"layers {text!r}", f"is no regular expression: {error}", f"use one, or {words}") from error
