"""The main job: a model file in, one ``.so`` with its weights and its manifest out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.build.artifact import build_artifact
from tvm_ternary.build.describe import constant_bytes, describe, describe_cuda, describe_kernels
from tvm_ternary.build.executable import build_executable, cuda_source
from tvm_ternary.build.heap import return_freed_memory
from tvm_ternary.build.lift_constants import lift_constants
from tvm_ternary.build.nvcc import compile_fatbin, find_nvcc
from tvm_ternary.build.weights import weights_lie_beside
from tvm_ternary.convert.attention import Errors, attention_errors
from tvm_ternary.convert.attention_modes import apply_choices, choose_caches, keeps_past, read_modes, read_planes
from tvm_ternary.convert.first import quantized_first
from tvm_ternary.convert.samples import find_tokenizer, load_samples
from tvm_ternary.errors import OutputError
from tvm_ternary.files import require_writable
from tvm_ternary.formats import SHARED_SCALES, Scheme, TernaryTensor, with_shared_scales
from tvm_ternary.graph.importer import ImportedModel
from tvm_ternary.graph.passes.quantize_tables import quantize_tables
from tvm_ternary.graph.passes.ternarize import TernaryLayer
from tvm_ternary.graph.pipeline import dump_to, is_static, lower
from tvm_ternary.graph.quantized import is_quantized, read_config
from tvm_ternary.graph.source import import_model
from tvm_ternary.kernels.table import require_device
from tvm_ternary.quantize import quantization_error, quantize
from tvm_ternary.quantize.config import require_embeddings
from tvm_ternary.quantize.methods import find_method
from tvm_ternary.quantize.plan import LayerPlan, make_plan, named_by
from tvm_ternary.quantize.settled import settled_plan
from tvm_ternary.runtime.artifact import read_artifact
from tvm_ternary.runtime.manifest import Manifest
from tvm_ternary.schedule.records import open_logs
from tvm_ternary.target import resolve

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, how many of its steps are done, and of how many."""

DEFAULT_SCHEME = "t3a8g64"
DEFAULT_METHOD = "twn"
DEFAULT_KV_ERROR = 0.2


@dataclass(frozen=True)
class Artifact:
    """A compiled model.

    Attributes
    ----------
    path : Path
        The ``.so``.
    manifest : Manifest
        What it says about itself.
    seconds : dict of str to float
        Time each stage took.
    notes : tuple of str
        What a user should know: lines of the tuning log that were skipped.
    """

    path: Path
    manifest: Manifest
    seconds: dict[str, float]
    notes: tuple[str, ...] = ()


def compile(
    model: str | Path,
    output: str | Path,
    *,
    target: str | Mapping[str, Any] = "native",
    scheme: str | None = None,
    layers: str | Sequence[str] | Mapping[str, str] | None = None,
    method: str | None = None,
    dims: Mapping[str, int | str] | None = None,
    constants: Mapping[str, Any] | None = None,
    packing: str = "fast",
    embeddings: str | None = None,
    calibration: str | Path | Iterable[Any] | None = None,
    samples: int = 128,
    seed: int = 0,
    tokenizer: str | Path | None = None,
    length: int = 128,
    recipe: Mapping[str, Any] | None = None,
    edges: str | None = None,
    output_layer: str | None = None,
    attention: str | Sequence[str] | Mapping[str, str] | None = None,
    kv_planes: int | str | tuple[int, int] = 2,
    kv_window: int = 64,
    kv_rotation: bool = True,
    kv_error: float = DEFAULT_KV_ERROR,
    kv_calibration: str | Path | Iterable[Any] | None = None,
    weights: str = "auto",
    tuning_log: str | Path | None = None,
    dump_ir: str | Path | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Compile a model with ternary weights to one shared library.

    Parameters
    ----------
    model : path
        An ``.onnx`` file, a checkpoint folder (``config.json`` and safetensors), or one that `quantize_model` wrote.
    output : path
        The ``.so`` to write; it appears whole or not at all.
    target : str or mapping
        A name that `tvm_ternary.target.target_names` lists, ``native`` for this host, or a TVM target dictionary.
        ``cuda-sm_90`` compiles for a GPU; nvcc is needed for that, a GPU is not.
    scheme : str, optional
        ``t{planes}a{activation bits}`` and the scales' granularity: ``g64`` for groups of 64, ``pt`` for one a matrix,
        nothing for one a row. ``t3a8g64``, the default, is three trit planes, int8 activations, groups of 64. A
        quantized checkpoint has its own.
    layers : str, sequence or mapping, optional
        Which matrices become ternary: ``all``, ``attention``, ``ffn`` or regular expressions over their names, each
        perhaps with a scheme of its own (``"query|key=t3a8g64"``). The others stay float. By default all; of a
        quantized checkpoint those that are ternary.
    method : str, optional
        How one plane is fitted, a key of `tvm_ternary.quantize.METHODS`; by default ``twn``. Where the model is
        quantized first, the method of `Recipe`.
    dims : mapping, optional
        Values of symbolic dimensions, or what one is equal to: another, or arithmetic such as ``32*rows``, a multiple
        of 32, where ``rows`` may be a new name. The others stay dynamic.
    constants : mapping, optional
        Values of inputs that become constants (a sampling rate, a flag).
    packing : str
        ``fast`` keeps trits in 2 bits. ``dense`` keeps five in a byte, 1.6 bits each, where all schemes are ``a8``; it
        suits one scale a row or groups of 128 and more, since a group is padded to a multiple of 20 weights.
    embeddings : str, optional
        What tables that are read by rows become: ``int8`` with a scale a row, which is the default, or ``float``, which
        leaves them as they are. Of a quantized checkpoint what it says.
    calibration, samples, seed, tokenizer, length, recipe, edges, output_layer
        As for `quantize_model`: with any of calibration, recipe, edges and output_layer, the model is quantized first
        as that does it; edges and the output layer are then the same as the others unless they are given.
    attention : str, sequence or mapping, optional
        What a decoder does with the keys and values of the past: ``full``, the default, leaves them among its inputs
        and outputs, in float. ``ternary-keys``, ``ternary-keys-values`` and ``adaptive`` keep them inside the library
        from run to run, packed; a run is then given new tokens only. One mode for all attentions, or ``PATTERN=MODE``
        over the names of the inputs with past keys; the first that matches counts, and what none matches is kept inside
        in float. ``adaptive`` takes the fewest planes that ``kv_calibration`` shows to be good enough.
    kv_planes : int, str or (int, int)
        Ternary planes, 1 to 3, of keys and values, or of each: ``"2,1"``.
    kv_window : int
        Last tokens that stay in float, a multiple of 64; `tvm_ternary.load` may choose another.
    kv_rotation : bool
        Whether heads of keys and values are turned by a Hadamard matrix before they are rounded, and back.
    kv_error : float
        The largest relative error of any head's result that ``adaptive`` allows.
    kv_calibration : path or iterable, optional
        Whole texts, as ``calibration``, of which ``samples`` of at most ``length`` tokens measure that error; the
        matrices are not fitted to them. None: those of ``calibration``.
    weights : str
        ``inside`` the library, ``beside`` it as safetensors, or ``auto``: beside when larger than 1 GiB.
    tuning_log : path, optional
        A folder that ``tvm-ternary tune`` has written. Its records win over those that come with this package.
    dump_ir : path, optional
        Folder for the module after each phase.
    progress : callable, optional
        Told of each step.

    Returns
    -------
    Artifact

    Raises
    ------
    ModelError, UnsupportedOperatorError
        If the model cannot be read, imported or quantized.
    OptionError
        If an option names something that does not exist; the message lists what does.
    HostError
        If there is no linker, or no nvcc for the target's architectures.
    OutputError
        If a file cannot be written.
    """
    stages = _Stages(progress)
    resolved = resolve(target)
    nvcc = find_nvcc(resolved.archs) if resolved.kind == "cuda" else None
    weights_lie_beside(0, weights)
    source, destination = Path(model), Path(output)
    require_writable(destination)
    if destination.exists() and source.exists() and destination.samefile(source):
        raise OutputError(str(output), "is the model itself", "choose another name")
    if embeddings is not None:
        require_embeddings(embeddings)
    # Code for several GPUs is written, and was tuned, for the oldest.
    logs = open_logs(resolved.tier if resolved.kind == "cuda" else resolved.name, tuning_log)
    dump = dump_to(dump_ir)
    modes, planes = read_modes(attention), read_planes(kv_planes)
    texts = calibration if kv_calibration is None else kv_calibration
    measured = partial(_attention_errors, source, texts, samples, seed, tokenizer, length, kv_window, kv_rotation)
    fitting = {
        "calibration": calibration,
        "samples": samples,
        "seed": seed,
        "tokenizer": tokenizer,
        "length": length,
        "recipe": recipe,
        "edges": edges,
        "output_layer": output_layer,
    }
    first = _quantize_options(fitting, scheme, layers, method, stages.progress)
    if not first:
        find_method(method or DEFAULT_METHOD)
    with quantized_first(source, destination, first, dims, constants) as (ready, free, fixed):
        with stages.stage("import"):
            # The graph holds every weight once more, and nothing below looks at it.
            imported = replace(import_model(ready, free, fixed, named_by(layers), past=keeps_past(modes)), onnx=None)
            if ready != source:
                imported = replace(imported, name=source.resolve().name if source.is_dir() else source.stem)
            settled = read_config(ready)[1] if is_quantized(ready) else None
            named = scheme or (settled.options.get("scheme") if settled is not None else None) or DEFAULT_SCHEME
            measure = None if texts is None else measured
            choices = choose_caches(imported, modes, planes, kv_window, measure, kv_error, kv_rotation)
            imported = apply_choices(imported, choices, resolved)
            dump("import", imported.module)
            if settled is None:
                plan = make_plan(imported.shapes, named, "all" if layers is None else layers, packing)
            else:
                plan = settled_plan(settled, imported.shapes, scheme, layers, packing)
            for own in (row.scheme for row in plan if row.scheme is not None):
                require_device(own.activation_bits, resolved.kind, packing)
        with stages.stage("quantize", sum(row.scheme is not None for row in plan)) as step:
            quantized, errors = _quantize(imported, plan, method or DEFAULT_METHOD, packing, step)
            if settled is not None:
                errors |= {name: result["error"] for name, result in settled.results.items() if name in errors}
            chosen = embeddings or (settled.embeddings if settled is not None else "int8")
            tables = quantize_tables(imported.module, imported.tables, imported.embeddings if chosen == "int8" else ())
        with stages.stage("lower"):
            size = sum(layer.packed_bytes for layer in quantized.values())
            size += sum(4 * n * k for name, (n, k) in imported.shapes.items() if name not in quantized)
            size += sum(constant_bytes(table) for table in tables.tables.values())
            beside = weights_lie_beside(size, weights)
            changed = replace(imported, module=tables.module, tables=tables.tables, params=_rest(imported, quantized))
            lowered = lower(changed, quantized, resolved, bind_weights=not beside, logs=logs, dump=dump)
            manifest = describe(imported, source, plan, quantized, errors, tables, lowered, resolved, named)
            module, params = (lowered.module, lowered.ternary.params) if beside else lift_constants(lowered.module)
        # The module has its own copies of the weights.
        del imported, quantized, tables, changed, lowered
        return_freed_memory()
    graph = resolved.kind == "cuda" and is_static(module)
    with stages.stage("build"):
        executable = build_executable(module, resolved.tvm, cuda_graph=graph)
        del module
    cuda = None
    # A model that only moves its inputs has no kernel.
    if nvcc is not None and (code := cuda_source(executable)) is not None:
        with stages.stage("nvcc"):
            cuda = compile_fatbin(code, resolved.archs, nvcc)
    with stages.stage("link"):
        if nvcc is not None:
            manifest = replace(
                manifest, target=describe_cuda(resolved, nvcc, cuda), kernels=describe_kernels(cuda), graph=graph
            )
        fatbin = cuda.fatbin if cuda is not None else None
        path = build_artifact(executable, manifest, destination, params, fatbin, beside=beside)
        # Read back, which checks the file and brings what was filled in while it was written.
        manifest = read_artifact(path).manifest
    return Artifact(path, manifest, stages.seconds, tuple(note for log in logs for note in log.notes))


def _quantize_options(
    fitting: dict[str, Any],
    scheme: str | None,
    layers: str | Sequence[str] | Mapping[str, str] | None,
    method: str | None,
    progress: Progress | None,
) -> dict[str, Any]:
    """Arguments of `quantize_model`; none where matrices are fitted one by one to their weights."""
    if all(fitting[name] is None for name in ("calibration", "recipe", "edges", "output_layer")):
        return {}
    places = {name: fitting[name] or "same" for name in ("edges", "output_layer")}
    recipe = {**(fitting["recipe"] or {}), **({} if method is None else {"method": method})}
    chosen = {"scheme": scheme or DEFAULT_SCHEME, "layers": layers, "recipe": recipe, "progress": progress}
    return {**fitting, **places, **chosen}


def _attention_errors(
    source: Path,
    calibration: str | Path | Iterable[Any] | None,
    samples: int,
    seed: int,
    tokenizer: str | Path | None,
    length: int,
    window: int,
    rotated: bool,
    model: ImportedModel,
    values: bool,
) -> Errors:
    """What planes of keys and values cost each attention, on the samples that matrices are fitted to."""
    text = find_tokenizer(tokenizer, source)
    given = load_samples(calibration or (), model.inputs, samples, seed, text, length)
    return attention_errors(model, given, window=window, values=values, rotated=rotated)


def _quantize(
    imported: ImportedModel, plan: Sequence[LayerPlan], method: str, packing: str, step: Callable[[], None]
) -> tuple[dict[str, TernaryLayer], dict[str, float]]:
    layers: dict[str, TernaryLayer] = {}
    errors: dict[str, float] = {}
    for row in plan:
        if row.scheme is None:
            continue
        if row.name in imported.ternary:
            weight, errors[row.name] = _as_it_is(imported.ternary[row.name], row.scheme)
        else:
            dense = imported.params[row.name].T
            weight = quantize(dense, row.scheme, method, name=row.name)
            errors[row.name] = quantization_error(dense, weight)
        layers[row.name] = TernaryLayer(weight, row.scheme.activation_bits, packing, row.scheme.bfloat)
        step()
    return layers, errors


def _rest(imported: ImportedModel, quantized: Mapping[str, TernaryLayer]) -> dict[str, npt.NDArray[Any]]:
    """All matrices, without the float elements of those that are ternary now."""
    nothing = np.float32(0)
    return {
        name: np.broadcast_to(nothing, (k, n)) if name in quantized else imported.params[name]
        for name, (n, k) in imported.shapes.items()
    }


def _as_it_is(stored: TernaryTensor, scheme: Scheme) -> tuple[TernaryTensor, float]:
    """A matrix that is ternary in the model already: its own planes and granularity, whatever the scheme's are.

    One plane keeps every bit. Several have shared scales if `quantize` made them for a scheme with such; then they too
    come back as they are.
    """
    weight = with_shared_scales(stored) if scheme.activation_bits in SHARED_SCALES else stored
    return weight, 0.0 if weight is stored else quantization_error(stored.dequantize(), weight)


@dataclass
class _Stages:
    """Times the stages and reports their steps."""

    progress: Progress | None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, steps: int = 1) -> Iterator[Callable[[], None]]:
        """Yield a function that counts a step; a stage of one step counts it by itself."""
        done = 0
        started = time.perf_counter()
        self._report(name, 0, steps)

        def step() -> None:
            nonlocal done
            done += 1
            self._report(name, done, steps)

        yield step
        self.seconds[name] = time.perf_counter() - started
        if done < steps:
            self._report(name, steps, steps)

    def _report(self, name: str, done: int, steps: int) -> None:
        if self.progress is not None:
            self.progress(name, done, steps)
