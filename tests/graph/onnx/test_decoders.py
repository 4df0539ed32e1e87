"""Decoders with and without past keys and values: they match onnxruntime, and steps give what one pass gives."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest

from tests.graph.onnx.running import Compiled, relative_error, run_onnxruntime, weight_products
from tests.models import gpt2, llama
from tvm_ternary.graph.importer import ImportedModel, import_onnx


def feeds(imported: ImportedModel, batch: int, length: int, past: int, vocabulary: int = 50) -> dict[str, np.ndarray]:
    """Random tokens and states; where there is a mask the first row hides its first key."""
    random = np.random.default_rng(length)
    sizes = {"batch": batch, "length": length, "past": past, "past + length": past + length}
    arrays = {}
    for spec in imported.inputs:
        shape = [sizes.get(dim, dim) for dim in spec.shape]
        if spec.name == "input_ids":
            arrays[spec.name] = random.integers(0, vocabulary, shape)
        elif spec.name == "attention_mask":
            arrays[spec.name] = np.ones(shape, np.int64)
            arrays[spec.name][0, 0] = batch == 1
        else:
            arrays[spec.name] = random.standard_normal(shape).astype(np.float32)
    return arrays


def check_decoder(
    prompt: Path | onnx.ModelProto,
    step: Path | onnx.ModelProto,
    matrices: int,
    *,
    hides: bool = True,
    sizes: Sequence[tuple[int, int, int]] = ((2, 5, 3), (1, 1, 7)),
) -> None:
    """Both files against onnxruntime, and a prompt with single steps behind it against one pass.

    Parameters
    ----------
    prompt, step : path or model
    matrices : int
        How many each has.
    hides : bool
        Whether a mask hides a key in the first comparison.
    sizes : sequence of tuple of int
        Batch, length and past of each comparison with onnxruntime.
    """
    compiled = {}
    for name, source in (("prompt", prompt), ("step", step)):
        imported = import_onnx(source)
        compiled[name] = Compiled(imported)
        assert len(weight_products(imported)) == matrices
        for batch, length, past in sizes:
            case = feeds(imported, batch, length, past if name == "step" else 0)
            if "attention_mask" in case and not hides:
                case["attention_mask"][:] = 1
            for got, want in zip(compiled[name](case), run_onnxruntime(source, case), strict=True):
                assert relative_error(got, want) <= 1e-5
    whole = feeds(compiled["prompt"].imported, 2, 8, 0)
    if "attention_mask" in whole:
        whole["attention_mask"][:] = 1
    logits = compiled["prompt"](whole)[0]
    for position, found in enumerate(steps(compiled, whole, prompt=5), start=5):
        assert relative_error(found, logits[:, position]) <= 1e-5


def steps(compiled: Mapping[str, Compiled], whole: Mapping[str, np.ndarray], prompt: int) -> list[np.ndarray]:
    """Logits of the tokens behind a prompt, one after the other."""
    _, *states = compiled["prompt"]({name: array[:, :prompt] for name, array in whole.items()})
    names = [spec.name for spec in compiled["step"].imported.inputs if spec.name not in whole]
    found = []
    for position in range(prompt, whole["input_ids"].shape[1]):
        case = {name: array[:, : position + 1] for name, array in whole.items()}
        case["input_ids"] = case["input_ids"][:, -1:]
        logits, *states = compiled["step"](case | dict(zip(names, states, strict=True)))
        found.append(logits[:, 0])
    return found


@pytest.mark.parametrize(("build", "matrices"), [(gpt2, 9), (llama, 15)])
def test_built_by_hand(build: Callable[..., onnx.ModelProto], matrices: int) -> None:
    check_decoder(build(cache="out"), build(cache="both"), matrices)


@pytest.fixture(scope="module")
def exporter() -> ModuleType:
    """The script that exports decoders; it needs torch."""
    pytest.importorskip("torch", reason="needs torch and onnxscript: pip install torch onnxscript")
    pytest.importorskip("onnxscript", reason="needs onnxscript: pip install onnxscript")
    return importlib.import_module("export_decoder")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "opset"), [("trace", 17), ("trace", 20), ("dynamo", 18), ("dynamo", 23)])
@pytest.mark.parametrize(("family", "matrices"), [("gpt2", 9), ("llama", 15)])
def test_exported(exporter: ModuleType, family: str, matrices: int, kind: str, opset: int, tmp_path: Path) -> None:
    for name, past in (("prompt", False), ("step", True)):
        exporter.export(tmp_path / f"{name}.onnx", family, past=past, exporter=kind, opset=opset)
    check_decoder(tmp_path / "prompt.onnx", tmp_path / "step.onnx", matrices)
