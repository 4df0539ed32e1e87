"""Quantize a model: one group of matrices after the other, resumable, into a checkpoint folder."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.convert.folder import write_folder
from tvm_ternary.convert.mixed import Budget, mixed_plan
from tvm_ternary.convert.parts import Parts, open_parts
from tvm_ternary.convert.samples import find_tokenizer, given_names, load_samples, readable_twice
from tvm_ternary.convert.whole_texts import model_for
from tvm_ternary.convert.work import Progress, QuantizedLayer, Work, described
from tvm_ternary.errors import OptionError, OutputError
from tvm_ternary.formats import Scheme
from tvm_ternary.formats.quantization import QuantizationConfig
from tvm_ternary.graph.importer import ImportedModel
from tvm_ternary.graph.onnx.data import data_files
from tvm_ternary.graph.quantized import is_quantized, read_config
from tvm_ternary.graph.source import import_model
from tvm_ternary.quantize.config import LayerQuantizationConfig
from tvm_ternary.quantize.plan import LayerPlan, named_by


@dataclass(frozen=True)
class QuantizedModel:
    """What `quantize_model` made.

    Attributes
    ----------
    path : Path or None
        The checkpoint folder; None where only the plan was wanted.
    layers : tuple of QuantizedLayer
        All matrices, in the order of their use.
    seconds : float
    resumed : int
        Matrices that an earlier, killed run had finished.
    """

    path: Path | None
    layers: tuple[QuantizedLayer, ...]
    seconds: float
    resumed: int = 0

    @property
    def bits_per_weight(self) -> float:
        """Mean over the weights of all matrices, float ones included."""
        weights = sum(n * k for n, k in (layer.shape for layer in self.layers))
        bits = sum(layer.bits_per_weight * layer.shape[0] * layer.shape[1] for layer in self.layers)
        return bits / weights if weights else 0.0


def quantize_model(
    model: str | Path,
    output: str | Path | None,
    *,
    scheme: str | None = None,
    layers: str | Sequence[str] | Mapping[str, str] | None = None,
    edges: str | None = None,
    output_layer: str | None = None,
    embeddings: str | None = None,
    recipe: Mapping[str, Any] | None = None,
    config: str | Path | None = None,
    target_bpw: float | None = None,
    max_error: float | None = None,
    calibration: str | Path | Iterable[Any] | None = None,
    samples: int = 128,
    seed: int = 0,
    tokenizer: str | Path | None = None,
    length: int = 128,
    dims: Mapping[str, int | str] | None = None,
    constants: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    resume: bool = True,
    dry_run: bool = False,
    progress: Progress | None = None,
    on_layer: Callable[[QuantizedLayer], None] | None = None,
) -> QuantizedModel:
    """Make a model's matrices ternary and write a checkpoint folder that `compile` reads.

    One group of matrices after the other is fitted and stored, so that memory holds little more than the largest of
    them, and a killed job goes on where it was.

    Parameters
    ----------
    model : path
        An ``.onnx`` file, a checkpoint folder (``config.json`` and safetensors), or a quantized one, whose ternary
        matrices stay as they are.
    output : path
        The folder to write; it appears whole or not at all. Work in progress lies in ``OUTPUT.partial``. None is
        enough for a plan.
    scheme, layers, edges, output_layer, embeddings, recipe
        As `LayerQuantizationConfig`; None leaves it to ``config``, or to its default.
    config : path, optional
        A TOML file with the same keys.
    calibration : path or iterable, optional
        Inputs of the model, as `load_samples` takes them. Matrices are then fitted to what they multiply. Of a decoder
        that takes keys and values of the past they may be whole texts, without one.
    target_bpw, max_error : float, optional
        Choose planes and group sizes a matrix (`mixed_plan`): the least error for so many bits a weight on average, or
        the fewest bits with at most this relative output error, float where nothing reaches it.
    samples, seed, tokenizer, length
        How many of the inputs to take, chosen by the seed; for text, what cuts it into tokens, and how many at most.
    dims, constants : mappings, optional
        As for `compile`; they become part of the checkpoint where the model is ONNX.
    overwrite : bool
        Whether an existing quantized checkpoint is replaced.
    resume : bool
        Whether to go on with what a killed job left; otherwise it is thrown away.
    dry_run : bool
        Only plan; nothing is written.
    progress : callable, optional
        Told of each step.
    on_layer : callable, optional
        Told of each matrix when it is finished.

    Returns
    -------
    QuantizedModel

    Raises
    ------
    ModelError, UnsupportedOperatorError
        If the model cannot be read, imported or quantized.
    OptionError, InputError
        If an option names something that does not exist, or the calibration data do not fit.
    OutputError
        If the folder exists or cannot be written, or holds an unfinished job with other options.
    """
    started = time.perf_counter()
    source = Path(model)
    chosen = LayerQuantizationConfig.of(
        config,
        scheme=scheme,
        layers=layers,
        edges=edges,
        output_layer=output_layer,
        embeddings=embeddings,
        recipe=recipe,
    )
    destination = None if dry_run else _free(output, source, overwrite)
    report = progress or (lambda stage, done, total: None)
    report("import", 0, 1)
    imported = import_model(source, dims, constants, named_by(chosen.layers))
    rows = {row.name: row for row in _with_ternary(chosen.plan(imported.shapes), imported, source)}
    report("import", 1, 1)
    budget = None if target_bpw is None and max_error is None else Budget(target_bpw, max_error)
    inputs: list[dict[str, npt.NDArray[Any]]] | None = None
    measured = imported
    if calibration is not None and (budget is not None or not dry_run):
        data = readable_twice(calibration)
        measured, text = model_for(imported, given_names(data)), find_tokenizer(tokenizer, source)
        inputs = load_samples(data, measured.inputs, samples, seed, text, length, windows=True)
    if budget is not None:
        rows = mixed_plan(measured, rows, chosen.recipe, inputs, budget, report)
    if destination is None:
        planned = tuple(described(row, None) for row in rows.values())
        return QuantizedModel(None, planned, time.perf_counter() - started)
    # A checkpoint's own dimensions stay free: only a graph is changed by what is fixed here.
    given = {"samples": None if inputs is None else len(inputs), "seed": seed}
    options = {**chosen.to_dict(), **given, "target_bpw": target_bpw, "max_error": max_error}
    job = {
        "model": _stamp(source, imported),
        "plan": {name: str(row.scheme) for name, row in rows.items()},
        "options": options,
        "inputs": None if inputs is None else _digest(inputs),
        "fixed": repr((sorted((dims or {}).items()), sorted((constants or {}).items()))),
        "version": version("tvm-ternary"),
    }
    with open_parts(destination, job, resume=resume) as parts:
        work = Work(measured, rows, chosen, parts, report, on_layer)
        work.run(inputs)
        report("write", 0, 1)
        _finish(destination, parts, imported, work, _config(source, rows, work, options), source)
        report("write", 1, 1)
    made = tuple(described(row, work.results.get(row.name)) for row in rows.values())
    return QuantizedModel(destination, made, time.perf_counter() - started, work.resumed)


def _with_ternary(plan: Sequence[LayerPlan], model: ImportedModel, source: Path) -> Iterator[LayerPlan]:
    """The plan, in which matrices that are ternary in the model stay as they are."""
    schemes = read_config(source)[1].schemes if is_quantized(source) else {}
    for row in plan:
        if row.name not in model.ternary:
            yield row
            continue
        known = schemes.get(row.name)
        if known is None:
            weight = model.ternary[row.name]
            known = Scheme(weight.num_planes, row.scheme.activation_bits if row.scheme else 8, weight.granularity)
        yield replace(row, scheme=known, reason=None, rule="ternary in the model")


def _config(source: Path, rows: Mapping[str, LayerPlan], work: Work, options: dict[str, Any]) -> QuantizationConfig:
    """What ``config.json`` says; a quantized model to which nothing was added keeps what it said."""
    before = read_config(source)[1] if is_quantized(source) else None
    if before is not None and not work.results:
        return before
    return QuantizationConfig(
        schemes={name: row.scheme for name, row in rows.items() if row.scheme is not None},
        reasons={name: row.reason or "" for name, row in rows.items() if row.scheme is None},
        embeddings=options["embeddings"],
        results={**(before.results if before is not None else {}), **work.results},
        options=options,
    )


def _finish(
    destination: Path,
    parts: Parts,
    model: ImportedModel,
    work: Work,
    config: QuantizationConfig,
    source: Path,
) -> None:
    """Write the folder beside its place and rename it."""
    made, old = parts.folder / "made", parts.folder / "old"
    for folder in (made, old):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        made.mkdir()
        write_folder(made, model, work.weights, config, source)
        if destination.exists():
            destination.rename(old)
        made.rename(destination)
    except OSError as error:
        raise OutputError(str(destination), f"cannot be written ({error.strerror})", "check space") from error
    shutil.rmtree(parts.folder, ignore_errors=True)


def _free(output: str | Path | None, source: Path, overwrite: bool) -> Path:
    """The folder to write, which must not hold anything else."""
    if output is None:
        raise OptionError("output", "is missing; expected a folder to write", "for example -o OUT")
    destination = Path(output)
    inside = (source.resolve(), *source.resolve().parents)
    if source.exists() and destination.exists() and destination.resolve() in inside:
        raise OutputError(str(destination), "is the model itself, or holds it", "choose another name")
    if destination.exists() and not destination.is_dir():
        raise OutputError(str(destination), "is a file, expected a folder to write", "choose another name")
    if destination.is_dir() and any(destination.iterdir()):
        if not is_quantized(destination):
            raise OutputError(str(destination), "exists and is no quantized checkpoint", "choose another name")
        if not overwrite:
            raise OutputError(str(destination), "exists", "choose another name, or replace it with --overwrite")
    return destination


def _stamp(source: Path, model: ImportedModel) -> list[list[Any]]:
    """Name, size and time of change of the files a model is made of: cheap to look at, and new when they are."""
    if source.is_dir():
        files = sorted(path for path in source.iterdir() if path.is_file())
    else:
        files = [source, *(data_files(model.onnx.model) if model.onnx is not None else [])]
    return [[path.name, (stat := path.stat()).st_size, stat.st_mtime_ns] for path in files]


def _digest(samples: Iterable[Mapping[str, npt.NDArray[Any]]]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        for name, array in sorted(sample.items()):
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
