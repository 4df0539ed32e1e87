"""Evaluate models with ternary weights against the float model they come from."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tvm_ternary.analysis.quality import Candidate, Evaluation, LayerQuality, MetricValue, OutputQuality
from tvm_ternary.convert.samples import Data
from tvm_ternary.errors import OptionError
from tvm_ternary.evaluation.data import find_samples
from tvm_ternary.evaluation.layers import MatrixErrors, observe_matrices
from tvm_ternary.evaluation.logits import find_logits
from tvm_ternary.evaluation.metric import Metric, compare, load_metric
from tvm_ternary.evaluation.models import Arrays, Rival, Runner, Source, Workshop, is_library, require_same_signature
from tvm_ternary.evaluation.outputs import OutputComparison
from tvm_ternary.evaluation.stages import Progress, Stages
from tvm_ternary.formats import Scheme

Measure = str | Callable[..., Any]
# What a picture of an output can show.
_POINTS = 2000


def evaluate(
    model: Source,
    quantized: Source | Sequence[Source] | None = None,
    *,
    scheme: str | Sequence[str] | None = None,
    target: str | Mapping[str, Any] = "native",
    device: str | None = None,
    data: Data | None = None,
    samples: int = 32,
    length: int = 128,
    seed: int = 0,
    tokenizer: Source | None = None,
    metric: Measure | Sequence[Measure] = (),
    logits: Sequence[str] = (),
    threads: int | None = None,
    dims: Mapping[str, int | str] | None = None,
    constants: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Compile a model as it is and with ternary weights, run both on the same data, and measure what differs.

    All models run through their compiled libraries, with the activations that the scheme says, int8 for ``a8``.

    Parameters
    ----------
    model : path
        The float model: what `tvm_ternary.compile` takes, or a library compiled from it with ``layers=[]``.
    quantized : path or sequence of paths, optional
        Models with ternary weights that were made from it: what `tvm_ternary.compile` takes, or libraries.
    scheme : str or sequence of str, optional
        Schemes to quantize the model to; one at least of these and ``quantized`` must be given.
    target, device, threads
        What all are compiled for, and where they run; as in `tvm_ternary.compile` and `tvm_ternary.load`.
    data : path or iterable, optional
        What to run them on, as `tvm_ternary.convert.samples.load_samples` takes it. None: random inputs, which say
        whether the models compute the same, and little about how well.
    samples : int
        How many samples to take at most.
    length : int
        Longest text, in tokens, and the length of random inputs.
    seed : int
        Of the choice of samples and of random inputs.
    tokenizer : path, optional
        ``tokenizer.json`` for text. None: the one beside the model.
    metric : str, callable, or a sequence of them
        Further measures; ``FILE.py:FUNCTION`` or a function, see `tvm_ternary.evaluation.metric.Metric`.
    logits : sequence of str
        Outputs that are logits. None given: those with ``logits`` in their name.
    dims, constants : mapping, optional
        As in `tvm_ternary.compile`, for all models alike.
    options : mapping, optional
        Further options of `tvm_ternary.quantize_model` for ``scheme``: ``layers``, ``recipe``, ``calibration``.
    progress : callable, optional
        Told of each stage.

    Returns
    -------
    Evaluation

    Raises
    ------
    OptionError
        If nothing is to be compared, or an option or metric does not fit.
    InputError
        If the data do not fit the model, or a quantized model takes or gives something else.
    TernaryError
        As `tvm_ternary.compile` and `tvm_ternary.load`.
    """
    wanted = _wanted(model, quantized, scheme)
    metrics = _metrics(metric)
    stages = Stages(progress)
    with tempfile.TemporaryDirectory(prefix="tvm-ternary-eval-") as folder:
        workshop = Workshop(Path(folder), target, device, threads, dims or {}, constants or {})
        with stages.stage("compile the float model"):
            reference = workshop.open_float(model)
        found = find_samples(reference, model, data, samples, length, seed, tokenizer)
        rivals = _open_rivals(workshop, reference, model, wanted, options or {}, stages)
        runners = [rival.runner for rival in rivals]
        with stages.stage("compare outputs", len(found.samples)) as step:
            keep = any(one.wants_outputs for one in metrics)
            comparisons, kept = _compare_outputs(reference, runners, found.samples, logits, seed, keep, step)
        with stages.stage("measure", len(metrics) * (1 + len(rivals))) as step:
            measured = _measure(metrics, [reference, *runners], found.samples, kept, step)
        matrices: list[dict[str, MatrixErrors]] = [{} for _ in rivals]
        if any(rival.weights for rival in rivals) and not is_library(model):
            with stages.stage("compare matrices"):
                weights = [rival.weights for rival in rivals]
                imported = workshop.import_float(model, lambda name: any(name in ternary for ternary in weights))
                matrices = observe_matrices(imported, found.samples, weights)
    return Evaluation(
        model=os.fspath(model),
        data=found.description,
        samples=len(found.samples),
        target=reference.manifest.target.name,
        device=reference.module.device,
        threads=reference.module.threads,
        weight_bytes=reference.manifest.sizes.weights_after,
        candidates=tuple(_candidate(*parts) for parts in zip(rivals, matrices, comparisons, measured, strict=True)),
        seconds=stages.seconds,
    )


def _wanted(
    model: Source,
    quantized: Source | Sequence[Source] | None,
    scheme: str | Sequence[str] | None,
) -> list[tuple[str, Source | None]]:
    """Name and source of each model to compare; None for a scheme that the float model is to be quantized to."""
    paths = [] if quantized is None else [quantized] if isinstance(quantized, str | os.PathLike) else list(quantized)
    schemes = [] if scheme is None else [scheme] if isinstance(scheme, str) else list(scheme)
    if not paths and not schemes:
        hint = "name a quantized model, or a scheme such as t2a8g64"
        raise OptionError("eval", "got nothing to compare the float model with", hint)
    if schemes and is_library(model):
        problem = f"cannot be applied to {os.fspath(model)}, which is compiled already"
        raise OptionError(f"scheme {schemes[0]}", problem, "give the model that it was compiled from")
    for name in schemes:
        Scheme.parse(name)
    return [*((os.fspath(path), path) for path in paths), *((name, None) for name in schemes)]


def _open_rivals(
    workshop: Workshop,
    reference: Runner,
    model: Source,
    wanted: Sequence[tuple[str, Source | None]],
    options: Mapping[str, Any],
    stages: Stages,
) -> list[Rival]:
    """Quantize where that is to be done, compile and load."""
    rivals = []
    for name, given in wanted:
        source = given
        if source is None:
            with stages.stage(f"quantize to {name}"):
                source = workshop.quantize(model, name, options)
        with stages.stage(f"compile {name}"):
            rivals.append(workshop.open_rival(name, source))
        require_same_signature(reference, rivals[-1].runner)
    return rivals


def _metrics(metric: Measure | Sequence[Measure]) -> list[Metric]:
    given = [metric] if isinstance(metric, str) or callable(metric) else list(metric)
    return [
        load_metric(one) if isinstance(one, str) else Metric(getattr(one, "__name__", "metric"), one) for one in given
    ]


def _compare_outputs(
    reference: Runner,
    rivals: Sequence[Runner],
    samples: Sequence[Arrays],
    logits: Sequence[str],
    seed: int,
    keep: bool,
    step: Callable[[], None],
) -> tuple[list[tuple[OutputQuality, ...]], list[list[Arrays]]]:
    """Run all models on each sample in turn; give what differs, and each one's outputs where they are to be kept."""
    rule = find_logits(reference, samples[0], logits)
    points = -(-_POINTS // len(samples))
    comparisons = [[OutputComparison(spec, rule, points, seed) for spec in reference.outputs] for _ in rivals]
    kept: list[list[Arrays]] = [[] for _ in range(1 + len(rivals))]
    for inputs in samples:
        results = [runner(inputs) for runner in (reference, *rivals)]
        for given, rows in zip(results[1:], comparisons, strict=True):
            for spec, row in zip(reference.outputs, rows, strict=True):
                row.update(results[0][spec.name], given[spec.name], inputs)
        if keep:
            for given, outputs in zip(results, kept, strict=True):
                outputs.append(given)
        step()
    return [tuple(row.result() for row in rows) for rows in comparisons], kept


def _measure(
    metrics: Sequence[Metric],
    runners: Sequence[Runner],
    samples: Sequence[Arrays],
    kept: Sequence[Sequence[Arrays]],
    step: Callable[[], None],
) -> list[tuple[MetricValue, ...]]:
    """Call each metric for each model, the float one first; give the values of each ternary one."""
    values: list[tuple[MetricValue, ...]] = [()] * (len(runners) - 1)
    for metric in metrics:
        reference = None
        for position, (runner, outputs) in enumerate(zip(runners, kept, strict=True)):
            result = metric.measure(runner, samples, outputs)
            step()
            if reference is None:
                reference = result
            else:
                values[position - 1] += compare(metric.name, reference, result)
    return values


def _candidate(
    rival: Rival,
    matrices: Mapping[str, MatrixErrors],
    outputs: tuple[OutputQuality, ...],
    metrics: tuple[MetricValue, ...],
) -> Candidate:
    manifest = rival.runner.manifest
    layers = tuple(
        LayerQuality(
            one.name,
            one.shape,
            one.became,
            one.scheme,
            one.bits_per_weight,
            one.reason and rival.reasons.get(one.name, one.reason),
            **(asdict(matrices[one.name]) if one.scheme and one.name in matrices else {"weight_error": one.error}),
        )
        for one in manifest.layers
    )
    sizes = [(math.prod(layer.shape), layer.bits_per_weight) for layer in layers if layer.scheme is not None]
    weights = sum(count for count, _ in sizes)
    bits = sum(count * bits for count, bits in sizes) / weights if weights else None
    return Candidate(rival.runner.name, bits, manifest.sizes.weights_after, layers, outputs, metrics)
