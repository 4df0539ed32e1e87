"""The plan for a model that was quantized before: it is what it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tvm_ternary.errors import OptionError
from tvm_ternary.formats import Scheme, require_packing
from tvm_ternary.formats.quantization import QuantizationConfig
from tvm_ternary.quantize.plan import LayerPlan, make_plan

_RULE = "ternary in the model"


def settled_plan(
    config: QuantizationConfig,
    matrices: Mapping[str, tuple[int, int]],
    scheme: str | None,
    layers: str | Sequence[str] | Mapping[str, str] | None,
    packing: str,
) -> list[LayerPlan]:
    """Decide for each matrix of a quantized checkpoint.

    Parameters
    ----------
    config : QuantizationConfig
        What became of each.
    matrices : mapping of name to (N, K)
    scheme : str or None
        What the user asks for, if anything: a scheme that the checkpoint was made with, or one of its matrices has.
    layers : as in `make_plan`, or None
        Which of the matrices that stayed float become ternary after all, None for none; and which of the ternary ones
        stay so, None for all: the others are dequantized.
    packing : str

    Raises
    ------
    OptionError
        If the scheme is another one; or as `make_plan`.
    """
    if scheme is not None:
        _require_same(config, Scheme.parse(scheme))
    for known in config.schemes.values():
        require_packing(packing, known.activation_bits)
    default = scheme or str(config.options.get("scheme") or next(iter(config.schemes.values()), "t3a8g64"))
    rows = make_plan(matrices, default, "all" if layers is None else layers, packing)
    return [_row(row, config, chosen=layers is not None) for row in rows]


def _row(row: LayerPlan, config: QuantizationConfig, *, chosen: bool) -> LayerPlan:
    if row.name not in config.schemes:
        return row if chosen else LayerPlan(row.name, row.shape, None, config.reasons[row.name])
    if chosen and row.scheme is None:
        return row
    return LayerPlan(row.name, row.shape, config.schemes[row.name], None, _RULE)


def _require_same(config: QuantizationConfig, scheme: Scheme) -> None:
    known = {str(own) for own in config.schemes.values()}
    if str(scheme) not in known | {config.options.get("scheme")}:
        has = ", ".join(sorted(known)) or "no ternary matrix"
        problem = f"the model was quantized before and has {has}"
        raise OptionError(f"scheme {scheme}", problem, "leave the scheme out, or quantize the float model again")
