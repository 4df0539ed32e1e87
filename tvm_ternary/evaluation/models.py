"""The models that are compared, compiled and loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from tvm_ternary import compiler
from tvm_ternary.convert.job import quantize_model
from tvm_ternary.errors import InputError
from tvm_ternary.formats import Scheme, TernaryTensor
from tvm_ternary.formats.quantization import QuantizationConfig
from tvm_ternary.graph.importer import ImportedModel
from tvm_ternary.graph.quantized import is_quantized, read_config
from tvm_ternary.graph.source import import_model
from tvm_ternary.runtime.manifest import Manifest, TensorSpec
from tvm_ternary.runtime.module import Module, load

Arrays = dict[str, npt.NDArray[Any]]
Source = str | os.PathLike[str]


@dataclass(frozen=True)
class Runner:
    """A loaded model as a metric sees it: call it with inputs by name, get outputs by name.

    Parameters
    ----------
    name : str
        For tables.
    module : Module
    """

    name: str
    module: Module

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Names, dtypes and shapes of the inputs."""
        return self.module.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Names, dtypes and shapes of the outputs."""
        return self.module.outputs

    @property
    def manifest(self) -> Manifest:
        """What the library says about itself."""
        return self.module.manifest

    def __call__(self, inputs: Mapping[str, npt.ArrayLike]) -> Arrays:
        """Run the model.

        Raises
        ------
        InputError
            As `Module.run`.
        """
        names = [spec.name for spec in self.outputs]
        return dict(zip(names, self.module.run(names, inputs), strict=True))


@dataclass(frozen=True)
class Rival:
    """A model with ternary weights.

    Parameters
    ----------
    runner : Runner
    weights : mapping of str to TernaryTensor
        Its ternary matrices; none where only a library is at hand.
    reasons : mapping of str to str
        Why others stayed float, where the library does not know.
    """

    runner: Runner
    weights: Mapping[str, TernaryTensor]
    reasons: Mapping[str, str]


@dataclass(frozen=True)
class Workshop:
    """Where and for what models are compiled.

    Parameters
    ----------
    folder : Path
        Libraries are written there.
    target : str or mapping
        As `tvm_ternary.compile` takes it.
    device : str, optional
        As `tvm_ternary.load` takes it.
    threads : int, optional
        As `tvm_ternary.load` takes it.
    dims, constants : mapping
        As `tvm_ternary.compile` takes them, for all models alike.
    """

    folder: Path
    target: str | Mapping[str, Any]
    device: str | None
    threads: int | None
    dims: Mapping[str, int | str]
    constants: Mapping[str, Any]

    def open_float(self, model: Source) -> Runner:
        """Compile a model as it is, unless it is a library already, and load it.

        Raises
        ------
        TernaryError
            As `tvm_ternary.compile` and `tvm_ternary.load`.
        """
        if is_library(model):
            return Runner("float", load(model, self.device, self.threads))
        path = self.folder / "float.so"
        fixed: dict[str, Any] = {"dims": self.dims, "constants": self.constants}
        compiler.compile(Path(model), path, target=self.target, layers=(), embeddings="float", **fixed)
        return Runner("float", load(path, self.device, self.threads))

    def import_float(self, model: Source, convolutions: Callable[[str], bool]) -> ImportedModel:
        """Import what `open_float` compiles; as products those convolutions that are to be compared."""
        return import_model(Path(model), self.dims, self.constants, convolutions)

    def open_rival(self, name: str, model: Source) -> Rival:
        """Compile a quantized folder, unless it is a library already, and load it.

        Raises
        ------
        TernaryError
            As `tvm_ternary.compile` and `tvm_ternary.load`.
        """
        if is_library(model):
            return Rival(Runner(name, load(model, self.device, self.threads)), {}, {})
        source = Path(model)
        path = self._free(".so")
        imported = import_model(source)
        # What was fixed when it was quantized is there no more.
        open_dims = {dim for spec in imported.inputs for dim in spec.shape}
        dims = {dim: size for dim, size in self.dims.items() if dim in open_dims}
        names = {spec.name for spec in imported.inputs}
        constants = {key: value for key, value in self.constants.items() if key in names}
        config = _config(source, imported)
        # Exactly what the folder says: what stayed float in it stays so.
        layers = {f"^{re.escape(name)}$": str(scheme) for name, scheme in config.schemes.items()}
        options: dict[str, Any] = {"layers": layers, "embeddings": config.embeddings}
        compiler.compile(source, path, target=self.target, dims=dims, constants=constants, **options)
        return Rival(Runner(name, load(path, self.device, self.threads)), imported.ternary, config.reasons)

    def quantize(self, model: Source, scheme: str, options: Mapping[str, Any]) -> Path:
        """Quantize a model; give the folder.

        Raises
        ------
        TernaryError
            As `tvm_ternary.quantize_model`.
        """
        folder = self._free("")
        given = {"dims": self.dims, "constants": self.constants, **options}
        quantize_model(Path(model), folder, scheme=scheme, **given)
        return folder

    def _free(self, suffix: str) -> Path:
        return self.folder / f"{len(list(self.folder.iterdir()))}{suffix}"


def _config(source: Path, imported: ImportedModel) -> QuantizationConfig:
    """What is ternary in a model, and how: as its folder says, or as its tensors are."""
    if is_quantized(source):
        return read_config(source)[1]
    tensors = ((name, imported.ternary[name]) for name in imported.ternary)
    return QuantizationConfig({name: Scheme(one.num_planes, 8, one.granularity) for name, one in tensors}, {}, "int8")


def is_library(model: Source) -> bool:
    """Whether it is a compiled library by its name."""
    return Path(model).suffix == ".so"


def require_same_signature(reference: Runner, other: Runner) -> None:
    """Refuse to compare models that do not take and give the same.

    Raises
    ------
    InputError
        Naming what differs.
    """
    for kind in ("inputs", "outputs"):
        wanted, got = ([f"{s.name} ({s.dtype})" for s in getattr(runner, kind)] for runner in (reference, other))
        if wanted != got:
            problem = f"has {kind} {', '.join(got)}; the float model has {', '.join(wanted)}"
            raise InputError(other.name, problem, "give the float model that it was made from")
