"""The models that are compared, compiled and loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from tvm_ternary import compiler
from tvm_ternary.errors import InputError
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
    shared : mapping
        Options of `tvm_ternary.compile` for the float model and the others alike: ``dims``, ``constants``.
    """

    folder: Path
    target: str | Mapping[str, Any]
    device: str | None
    threads: int | None
    shared: Mapping[str, Any]

    def open(self, name: str, model: Source, **options: Any) -> Runner:
        """Compile a model, unless it is a library already, and load it.

        Raises
        ------
        TernaryError
            As `tvm_ternary.compile` and `tvm_ternary.load`.
        """
        if is_library(model):
            return Runner(name, load(model, self.device, self.threads))
        path = self.folder / f"{len(list(self.folder.glob('*.so')))}.so"
        compiler.compile(Path(model), path, target=self.target, **self.shared, **options)
        return Runner(name, load(path, self.device, self.threads))


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
