"""Mixed precision: what is chosen keeps to its budget, says why, and is better than one scheme for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import tvm_ternary as tt
from tests.models import mlp
from tvm_ternary.convert.job import quantize_model
from tvm_ternary.convert.mixed import Budget
from tvm_ternary.errors import OptionError
from tvm_ternary.graph.source import import_model

ROWS = 50
FIXED: dict[str, Any] = {"dims": {"batch": ROWS}}
"""As many rows as a sample has, which is quicker to compile for than any number."""
SAME: dict[str, Any] = {"edges": "same", "output_layer": "same", **FIXED}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mlp") / "mlp.onnx"
    onnx.save(mlp((130, 32, 48, 16)), path)
    return path


@pytest.fixture(scope="module")
def samples() -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(0)
    mix = generator.standard_normal((130, 130)) * np.exp(generator.standard_normal(130))
    return [{"x": (generator.standard_normal((ROWS, 130)) @ mix).astype(np.float32)} for _ in range(4)]


@pytest.fixture(scope="module")
def want(source: Path, samples: list[dict[str, np.ndarray]], tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """What the float model makes of the first sample."""
    return run(source, tmp_path_factory.mktemp("plain") / "float.so", samples[0], layers=[], **FIXED)


def run(model: Path, library: Path, inputs: dict[str, np.ndarray], **options: Any) -> np.ndarray:
    """Compile and run."""
    made = tt.compile(model, library, **options)
    return tt.load(made.path, threads=1).run(None, inputs)[0]


@pytest.mark.parametrize("bits", [3.0, 5.0, 8.0])
def test_bits_are_kept_to(source: Path, samples: list[dict[str, np.ndarray]], bits: float) -> None:
    plan = quantize_model(source, None, target_bpw=bits, calibration=samples, dry_run=True, **SAME)
    assert plan.bits_per_weight <= bits
    assert all(layer.scheme is not None and layer.why for layer in plan.layers)
    assert plan.bits_per_weight > bits - 1.5, "what is there is used"


def test_a_mixture_is_better_than_one_scheme(
    source: Path, samples: list[dict[str, np.ndarray]], want: np.ndarray, tmp_path: Path
) -> None:
    one = quantize_model(source, tmp_path / "one", scheme="t2a8g64", calibration=samples, **SAME)
    mixed = quantize_model(source, tmp_path / "mixed", target_bpw=one.bits_per_weight, calibration=samples, **SAME)
    errors = []
    for done in (one, mixed):
        assert done.path is not None
        got = run(done.path, done.path.with_suffix(".so"), samples[0])
        errors.append(np.linalg.norm(got - want))
    assert {layer.scheme for layer in mixed.layers} != {"t2a8g64"}
    assert errors[1] <= errors[0]


@pytest.mark.parametrize("limit", [0.3, 0.05])
def test_every_matrix_keeps_to_an_error(
    source: Path, samples: list[dict[str, np.ndarray]], tmp_path: Path, limit: float
) -> None:
    recipe = {"sweeps": 0, "correct_inputs": 0.0}
    done = quantize_model(source, tmp_path / "out", max_error=limit, calibration=samples, recipe=recipe, **SAME)
    for layer in done.layers:
        if layer.scheme is not None:
            # The plan was measured behind float matrices.
            assert layer.output_error is not None
            assert layer.output_error <= 1.5 * limit


def test_what_cannot_be_reached_stays_float_and_says_so(source: Path) -> None:
    plan = quantize_model(source, None, max_error=1e-6, dry_run=True, **SAME)
    assert {layer.scheme for layer in plan.layers} == {None}
    assert all("1e-06" in layer.why for layer in plan.layers)


def test_without_data_weights_decide(source: Path) -> None:
    plan = quantize_model(source, None, max_error=0.2, dry_run=True, **SAME)
    assert all(layer.scheme is not None and "error" in layer.why for layer in plan.layers)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target_bpw": 2.01}, "bit budget"),
        ({"target_bpw": 1.0}, "target_bpw"),
        ({"max_error": 1.0}, "max_error"),
        ({"target_bpw": 3.0, "max_error": 0.1}, "expected one of both"),
    ],
)
def test_budgets_that_cannot_be(source: Path, options: dict[str, float], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        quantize_model(source, None, dry_run=True, **options, **SAME)  # type: ignore[arg-type]
    with pytest.raises(OptionError):
        Budget()


@pytest.mark.parametrize("recipe", [{"rotation": 32}, {"scaling": True}, {"scaling": True, "rotation": 16}])
def test_transformed_inputs_go_all_the_way(
    source: Path, samples: list[dict[str, np.ndarray]], want: np.ndarray, tmp_path: Path, recipe: dict[str, Any]
) -> None:
    quantize_model(source, tmp_path / "out", scheme="t4a32g32", calibration=samples, recipe=recipe, **SAME)
    imported = import_model(tmp_path / "out")
    transforms = [imported.ternary[name].transform for name in imported.ternary]
    assert any(t is not None for t in transforms), "one input at least gains by a scale"
    assert {t.rotation for t in transforms if t is not None} == {recipe.get("rotation")}
    got = run(tmp_path / "out", tmp_path / "out.so", samples[0])
    assert np.linalg.norm(got - want) <= 0.05 * np.linalg.norm(want)
