"""What a compiled model says about itself: its manifest, from what each stage of the compiler made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from tvm_ternary.build.nvcc import CudaCode, Nvcc
from tvm_ternary.build.weights import describe_weights
from tvm_ternary.graph.importer import ImportedModel
from tvm_ternary.graph.passes.quantize_tables import QuantizedTables
from tvm_ternary.graph.passes.ternarize import TernaryLayer
from tvm_ternary.graph.pipeline import LoweredModel
from tvm_ternary.graph.source import model_digest
from tvm_ternary.kernels.shape import MatmulShape
from tvm_ternary.quantize.plan import LayerPlan
from tvm_ternary.quantize.tables import row_bits
from tvm_ternary.runtime.manifest import (
    FunctionInfo,
    KernelInfo,
    LayerInfo,
    Manifest,
    ModelInfo,
    SizesInfo,
    TargetInfo,
)
from tvm_ternary.target import Target


def describe(
    imported: ImportedModel,
    source: Path,
    plan: Sequence[LayerPlan],
    layers: Mapping[str, TernaryLayer],
    errors: Mapping[str, float],
    tables: QuantizedTables,
    lowered: LoweredModel,
    target: Target,
    scheme: str,
) -> Manifest:
    """The manifest of a library for CPUs; for GPUs `describe_cuda` and `describe_kernels` add to it."""
    params, kernels = lowered.ternary.params, lowered.ternary.kernels
    before = sum(4 * n * k for n, k in imported.shapes.values()) + _inner_bytes(imported.module)
    after = sum(array.nbytes for array in params.values()) + _inner_bytes(lowered.ternary.module)
    return Manifest(
        model=ModelInfo(imported.name, source.resolve().name, model_digest(source)),
        inputs=imported.inputs,
        outputs=imported.outputs,
        bounds=imported.bounds,
        scheme=scheme,
        layers=(
            *(_layer(row, layers.get(row.name), errors.get(row.name), params, lowered) for row in plan),
            *(_table(name, imported, tables) for name in imported.embeddings),
            *(
                LayerInfo(name, shape, "float32", None, 32.0, None, None, "rule", None, reason)
                for name, (shape, reason) in imported.others.items()
                if name not in imported.embeddings
            ),
        ),
        functions=tuple(
            FunctionInfo(name, kernels.get(name), who, lowered.layers.get(name, ()))
            for name, who in lowered.schedules.items()
        ),
        target=TargetInfo(target.name, dict(target.tvm), tuple(sorted(target.features))),
        versions={name: version(name) for name in ("tvm-ternary", "apache-tvm", "apache-tvm-ffi")},
        weights=describe_weights(params),
        sizes=SizesInfo(before, after),
        caches=imported.caches,
        attentions=imported.attentions,
    )


def describe_cuda(target: Target, nvcc: Nvcc, code: CudaCode | None) -> TargetInfo:
    """A model without any kernel has no machine code either, but still runs where its memory is."""
    return TargetInfo(
        target.name,
        dict(target.tvm),
        tuple(sorted(target.features)),
        device=target.kind,
        archs=target.archs,
        ptx=target.archs[-1] if code is not None else None,
        cuda=".".join(nvcc.version.split(".")[:2]),
    )


def describe_kernels(cuda: CudaCode | None) -> tuple[KernelInfo, ...]:
    """What nvcc made of each kernel."""
    used = cuda.kernels if cuda is not None else ()
    return tuple(KernelInfo(k.kernel, k.arch, k.registers, k.shared_bytes, k.local_bytes, k.spill_bytes) for k in used)


def _layer(
    row: LayerPlan,
    layer: TernaryLayer | None,
    error: float | None,
    params: Mapping[str, npt.NDArray[Any]],
    lowered: LoweredModel,
) -> LayerInfo:
    if layer is None:
        return LayerInfo(row.name, row.shape, "float32", None, 32.0, None, None, "rule", None, row.reason)
    kernel = layer.kernel.matmul
    constants = kernel.constants(MatmulShape.of(layer.weight))
    stored = sum(params[f"{row.name}.{operand}"].nbytes for operand in constants)
    return LayerInfo(
        name=row.name,
        shape=row.shape,
        became="ternary",
        scheme=str(layer.scheme),
        bits_per_weight=8 * stored / (row.shape[0] * row.shape[1]),
        kernel=kernel.name,
        layout=kernel.layout,
        schedule=lowered.ternary.matrices[row.name],
        error=error,
        reason=None,
        epilogue="; ".join(sorted({str(e) for e in lowered.ternary.epilogues[row.name] if str(e)})) or None,
    )


def _table(name: str, imported: ImportedModel, tables: QuantizedTables) -> LayerInfo:
    shape = imported.embeddings[name]
    if name in tables.errors:
        bits, error = row_bits(shape[1]), tables.errors[name]
        return LayerInfo(name, shape, "int8", None, bits, None, None, "rule", error, None)
    _, used = imported.others.get(name, (shape, "a float table, read by rows"))
    return LayerInfo(name, shape, "float32", None, 32.0, None, None, "rule", None, tables.kept.get(name, used))


def _inner_bytes(module: tvm.IRModule) -> int:
    """Bytes of the constants inside ``main``: biases, norms, tables."""
    sizes: dict[Any, int] = {}

    def visit(expr: relax.Expr) -> None:
        if isinstance(expr, tvm.ir.GenericConst):
            sizes[expr] = constant_bytes(expr)

    relax.analysis.post_order_visit(module["main"], visit)
    return sum(sizes.values())


def constant_bytes(constant: relax.Expr) -> int:
    """Bytes of a constant's elements."""
    array = constant.value
    return int(np.prod(array.shape, dtype=np.int64)) * np.dtype(str(array.dtype)).itemsize
