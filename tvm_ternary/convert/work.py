"""Fit groups of matrices, keep what is finished, and say of each what became of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.convert.parts import Part, Parts
from tvm_ternary.convert.stream import calibrate
from tvm_ternary.formats import TernaryTensor
from tvm_ternary.formats.checkpoint import CheckpointFile
from tvm_ternary.formats.transform import InputTransform
from tvm_ternary.graph.importer import ImportedModel
from tvm_ternary.quantize.config import LayerQuantizationConfig
from tvm_ternary.quantize.fit import fit_matrix, metric_of
from tvm_ternary.quantize.observers import Statistics
from tvm_ternary.quantize.plan import LayerPlan, packed_bits
from tvm_ternary.quantize.transformed import choose_transform, transform_statistics

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, how many of its steps are done, and of how many."""


@dataclass(frozen=True)
class QuantizedLayer:
    """What became of a matrix, or is to become of it.

    Attributes
    ----------
    name : str
    shape : (N, K)
    scheme : str or None
        None: it stayed float.
    bits_per_weight : float
        As kernels read it, scales and padding counted.
    why : str
        What decided.
    error, output_error : float or None
        Relative Frobenius norms of the error of the weights, and of their products with the calibration data.
    plain_output_error : float or None
        What the output error would be without compensation; None where there was none.
    notes : tuple of str
        What a user should know.
    """

    name: str
    shape: tuple[int, int]
    scheme: str | None
    bits_per_weight: float
    why: str
    error: float | None = None
    output_error: float | None = None
    plain_output_error: float | None = None
    notes: tuple[str, ...] = ()


def described(row: LayerPlan, result: Mapping[str, Any] | None) -> QuantizedLayer:
    """A planned matrix, with what was measured when it was made."""
    if row.scheme is None:
        return QuantizedLayer(row.name, row.shape, None, 32.0, row.reason or "")
    # A matrix that was ternary already needs one plane, whatever the scheme allows.
    scheme = row.scheme if result is None else replace(row.scheme, planes=result.get("planes", row.scheme.planes))
    bits = packed_bits(row.shape, scheme) / max(1, row.shape[0] * row.shape[1])
    measured = result or {}
    return QuantizedLayer(
        row.name,
        row.shape,
        str(scheme),
        bits,
        row.rule,
        measured.get("error"),
        measured.get("output_error"),
        measured.get("plain_output_error"),
        tuple(measured.get("notes", ())),
    )


class Work:
    """Fits groups of matrices, or takes them from finished parts."""

    def __init__(
        self,
        model: ImportedModel,
        rows: Mapping[str, LayerPlan],
        config: LayerQuantizationConfig,
        parts: Parts,
        progress: Progress,
        on_layer: Callable[[QuantizedLayer], None] | None,
    ) -> None:
        self.model, self.rows, self.recipe, self.parts = model, rows, config.recipe, parts
        self.progress, self.on_layer = progress, on_layer
        self.weights = _Weights(model.ternary)
        self.results: dict[str, Mapping[str, Any]] = {}
        for part in parts.finished():
            self._keep(part)
        self.resumed = len(self.results)
        self.wanted = [name for name, row in rows.items() if row.scheme is not None and name not in self.weights]

    def run(self, samples: Sequence[Mapping[str, npt.NDArray[Any]]] | None) -> None:
        """Fit all matrices, with samples those that share an input together, each to what it then multiplies."""
        self._count()
        if samples is not None:
            # What is finished is no weight of the float model any more.
            begun = replace(self.model, params=_Params(self.model.params, self.weights))
            hessian = self.recipe.compensate
            original = self.model if hessian and self.recipe.correct_inputs > 0 else None
            calibrate(
                begun,
                samples,
                self.replace,
                wanted=self.wanted,
                hessian=hessian,
                original=original,
                progress=self.progress,
            )
        for name in self.wanted:
            # With samples, what is left is used by none of the outputs.
            if name not in self.results:
                self.fit([name], None)

    def replace(self, names: tuple[str, ...], statistics: Statistics) -> dict[str, npt.NDArray[np.float32]]:
        """Fit what is to be fitted of a group, and give (K, N) float weights for all of it."""
        self.fit([name for name in names if name in self.wanted], statistics)
        params = _Params(self.model.params, self.weights)
        return {name: params[name] for name in names}

    def fit(self, names: list[str], statistics: Statistics | None) -> None:
        """Fit matrices that share an input, and keep them."""
        self._keep(self.parts.save(list(self.rows).index(names[0]), *self._fitted(names, statistics)))
        self._count()
        if self.on_layer is not None:
            for name in names:
                self.on_layer(described(self.rows[name], self.results[name]))

    def _keep(self, part: Part) -> None:
        content, results = part
        for name in content:
            self.weights.add(name, content)
            self.results[name] = results[name]

    def _count(self) -> None:
        self.progress("quantize", len(self.results), self.resumed + len(self.wanted))

    def _fitted(
        self, names: list[str], statistics: Statistics | None
    ) -> tuple[dict[str, TernaryTensor], dict[str, dict[str, Any]]]:
        transform = self._transform(names, statistics)
        if transform is not None and statistics is not None:
            statistics = transform_statistics(statistics, transform)
        metric = None
        if statistics is not None and statistics.hessian is not None and self.recipe.compensate:
            metric = metric_of(statistics, self.recipe)
        weights: dict[str, TernaryTensor] = {}
        results: dict[str, dict[str, Any]] = {}
        for name in names:
            scheme = self.rows[name].scheme
            assert scheme is not None
            w = self.model.params[name].T
            w = w if transform is None else transform.weight(w)
            fit = fit_matrix(w, scheme, self.recipe, statistics, metric=metric, name=name)
            weights[name] = replace(fit.weight, transform=transform)
            results[name] = {
                "error": fit.error,
                "output_error": fit.output_error,
                "plain_output_error": fit.plain_output_error,
                "planes": fit.weight.num_planes,
                "notes": list(fit.notes),
            }
        return weights, results

    def _transform(self, names: list[str], statistics: Statistics | None) -> InputTransform | None:
        """What is done to the input that matrices share."""
        scheme = self.rows[names[0]].scheme
        assert scheme is not None
        if not (self.recipe.scaling or self.recipe.rotation):
            return None
        return choose_transform([self.model.params[name].T for name in names], scheme, self.recipe, statistics)


class _Params(Mapping[str, npt.NDArray[np.float32]]):
    """A model's matrices (K, N), those that are ternary by now dequantized; each made when it is asked for."""

    def __init__(self, params: Mapping[str, npt.NDArray[np.float32]], weights: Mapping[str, TernaryTensor]) -> None:
        self._params, self._weights = params, weights

    def __getitem__(self, name: str) -> npt.NDArray[np.float32]:
        return self._weights[name].dequantize().T if name in self._weights else self._params[name]

    def __contains__(self, name: object) -> bool:
        return name in self._params

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)


class _Weights(Mapping[str, TernaryTensor]):
    """All ternary matrices, each read from where it lies when it is asked for."""

    def __init__(self, ternary: Mapping[str, TernaryTensor]) -> None:
        self._homes: dict[str, Mapping[str, Any]] = dict.fromkeys(ternary, ternary)

    def add(self, name: str, home: CheckpointFile) -> None:
        self._homes[name] = home

    def __getitem__(self, name: str) -> TernaryTensor:
        tensor = self._homes[name][name]
        assert isinstance(tensor, TernaryTensor)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._homes

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)
