"""What an evaluation found, as tables of text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tvm_ternary.analysis.quality import Candidate, Evaluation, LayerQuality, OutputQuality
from tvm_ternary.analysis.report import Table, format_bytes

_OUTPUT_COLUMNS = (
    "candidate",
    "output",
    "equal",
    "SQNR dB",
    "cosine",
    "relative error",
    "max error",
    "mean error",
    "KL nats",
    "top-1 agrees",
    "perplexity float",
    "ternary",
)
_LAYER_COLUMNS = (
    "matrix",
    "N x K",
    "became",
    "bits/weight",
    "weight error",
    "weight cosine",
    "output error",
    "output cosine",
    "SQNR dB",
    "why float",
)


def evaluation_tables(evaluation: Evaluation) -> list[Table]:
    """Everything: what was compared, sizes, outputs, metrics, and the matrices of each candidate."""
    candidates = evaluation.candidates
    tables = [facts_table(evaluation), candidates_table(evaluation), outputs_table(candidates)]
    if any(candidate.metrics for candidate in candidates):
        tables.append(metrics_table(candidates))
    return [*tables, *(layers_table(candidate) for candidate in candidates)]


def facts_table(evaluation: Evaluation) -> Table:
    """What was compared, on what, where, and how long it took."""
    threads = f", {evaluation.threads} thread{'' if evaluation.threads == 1 else 's'}"
    rows = (
        ("float model", evaluation.model),
        ("its weights", format_bytes(evaluation.weight_bytes)),
        ("data", evaluation.data),
        ("ran on", f"{evaluation.device}{threads}, compiled for {evaluation.target}"),
        ("time", f"{sum(evaluation.seconds.values()):.1f} s"),
    )
    return Table(("", ""), rows)


def candidates_table(evaluation: Evaluation) -> Table:
    """A row for each candidate: bits a ternary weight, scales counted, and the size of all weights."""
    columns = ("candidate", "ternary matrices", "bits/weight", "all weights", "times smaller")
    rows = tuple(
        (
            candidate.name,
            f"{len(candidate.ternary)} of {len(candidate.layers)}",
            _number(candidate.bits_per_weight, ".2f"),
            format_bytes(candidate.weight_bytes),
            _number(_ratio(evaluation.weight_bytes, candidate.weight_bytes), ".2f"),
        )
        for candidate in evaluation.candidates
    )
    return Table(columns, rows, frozenset(range(1, len(columns))))


def outputs_table(candidates: Sequence[Candidate]) -> Table:
    """A row for every output of every candidate, beside the float model's."""
    rows = [_output_row(candidate.name, output) for candidate in candidates for output in candidate.outputs]
    return _without_empty_columns(_OUTPUT_COLUMNS, rows, texts=2)


def metrics_table(candidates: Sequence[Candidate]) -> Table:
    """A row for every value of the user's metrics: of the float model, of each candidate, and the change."""
    names = [f"{column}" for candidate in candidates for column in (candidate.name, "change")]
    rows = []
    for values in zip(*(candidate.metrics for candidate in candidates), strict=True):
        cells = [cell for value in values for cell in (f"{value.value:.4f}", f"{value.change:+.4f}")]
        rows.append((values[0].name, f"{values[0].reference:.4f}", *cells))
    columns = ("metric", "float", *names)
    return Table(columns, tuple(rows), frozenset(range(1, len(columns))))


def layers_table(candidate: Candidate) -> Table:
    """A row for every matrix; errors are relative, outputs those for the inputs that the float model gives it."""
    rows = [_layer_row(layer) for layer in candidate.layers]
    table = _without_empty_columns(_LAYER_COLUMNS, rows, texts=3)
    heading = f"{table.columns[0]} of {candidate.name}"
    return Table((heading, *table.columns[1:]), table.rows, table.numeric)


def _output_row(name: str, output: OutputQuality) -> tuple[str, ...]:
    close, logits = output.closeness, output.logits
    errors = (
        [""] * 5
        if close is None
        else [
            _number(close.sqnr_db, ".1f"),
            _number(close.cosine, ".5f"),
            *(_number(value, ".3g") for value in (close.relative_error, close.max_error, close.mean_error)),
        ]
    )
    predictions = (
        [""] * 4
        if logits is None
        else [
            _number(logits.kl_divergence, ".4g"),
            f"{logits.top1_agreement:.2%}",
            _number(logits.perplexity_float, ".4f"),
            _number(logits.perplexity, ".4f"),
        ]
    )
    return (name, f"{output.name}: {output.dtype}", f"{output.equal:.0%}", *errors, *predictions)


def _layer_row(layer: LayerQuality) -> tuple[str, ...]:
    errors = (layer.weight_error, layer.weight_cosine, layer.output_error, layer.output_cosine)
    return (
        layer.name,
        " x ".join(map(str, layer.shape)),
        layer.scheme or layer.became,
        f"{layer.bits_per_weight:.2f}",
        *(_number(value, ".4f") for value in errors),
        _number(layer.sqnr_db, ".1f"),
        layer.reason or "",
    )


def _without_empty_columns(columns: Sequence[str], rows: Sequence[tuple[str, ...]], texts: int) -> Table:
    """Leave out columns in which every cell is empty; the first ``texts`` and the reason are text, others numbers."""
    used = [i for i in range(len(columns)) if any(row[i] for row in rows) or not rows]
    return Table(
        tuple(columns[i] for i in used),
        tuple(tuple(row[i] for i in used) for row in rows),
        frozenset(position for position, i in enumerate(used) if i >= texts and columns[i] != "why float"),
    )


def _number(value: float | None, form: str) -> str:
    if value is None:
        return ""
    return format(value, form) if math.isfinite(value) else str(value)


def _ratio(before: int, after: int) -> float | None:
    return before / after if after else None
