"""Whole models compiled for a GPU against the same ones compiled for this CPU, or in onnxruntime.

The artifact runs through TVM's CUDA runtime on the tests' own driver, whose GPU is the emulator: its machine code is
looked at, its kernels run as the source that the machine code was made of.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.build.test_agreement import PARAPHRASE, SILERO, Feeds, Source, errors, sounds, tokens, vectors
from tests.cuda_emulator import fake_gpu
from tests.models import gpt2, llama, mlp
from tests.reference import Reference, ternary_weights, with_rounded_activations, with_weights
from tvm_ternary import compiler
from tvm_ternary.errors import OptionError
from tvm_ternary.formats import Scheme
from tvm_ternary.quantize.tables import quantize_rows
from tvm_ternary.runtime.manifest import Manifest
from tvm_ternary.runtime.module import load

RUN = """
import sys
import numpy as np
import tvm_ternary
from tests.cuda_emulator import fake_gpu
folder = sys.argv[1]
module = tvm_ternary.load(folder + "/gpu.so")
assert str(module.device).startswith("cuda")
for number in range(int(sys.argv[2])):
    feeds = dict(np.load(f"{folder}/in{number}.npz"))
    fake_gpu.reset_counters()
    np.savez(f"{folder}/out{number}.npz", *module.run(None, {spec.name: feeds[spec.name] for spec in module.inputs}))
print(fake_gpu.counters(["launches", "graph_launches"]))
"""

ROUNDED = 1e-5
"""Two orders of adding up in float32; further apart only where int8 rounds another way."""
HALF = {"a16": 2e-3, "abf16": 2e-2}
"""What 11 and 8 bits of an activation leave of a model of a few layers."""


class OnGpu:
    """A model compiled for a GPU."""

    def __init__(self, path: Path, scheme: str, folder: Path, **options: Any) -> None:
        self.folder, self.sources = folder, list[str]()
        compile_fatbin = compiler.compile_fatbin

        def keep(code: str, *arguments: Any) -> Any:
            self.sources.append(code)
            return compile_fatbin(code, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiler, "compile_fatbin", keep)
            gpu = compiler.compile(path, folder / "gpu.so", target="cuda-sm_90", scheme=scheme, **options)
        self.manifest: Manifest = gpu.manifest

    def errors(self, feeds: list[Feeds]) -> list[float]:
        """The largest error of each run; and what the last one launched, as ``launches``."""
        for number, feed in enumerate(feeds):
            np.savez(self.folder / f"in{number}.npz", **feed)
        env = fake_gpu.environment(kernels=self.sources, compute_capability=(9, 0), checked=False)
        self.launches = fake_gpu.python(RUN, env, self.folder, len(feeds)).strip()
        found = []
        for number, feed in enumerate(feeds):
            with np.load(self.folder / f"out{number}.npz") as out:
                got = [out[name] for name in out.files]
            found.append(max(errors(got, self.expected(feed))))
        return found

    def expected(self, feed: Feeds) -> list[np.ndarray]:
        """What the outputs should be."""
        raise NotImplementedError


class Pair(OnGpu):
    """And for this CPU."""

    def __init__(self, source: Source, scheme: str, models: Path, folder: Path, **options: Any) -> None:
        path = models / source if isinstance(source, str) else folder / "model.onnx"
        if not isinstance(source, str):
            onnx.save(source(), path)
        super().__init__(path, scheme, folder, **options)
        plain = scheme.replace("abf16", "a32").replace("a16", "a32")
        self.cpu = load(compiler.compile(path, folder / "cpu.so", scheme=plain, **options).path, threads=2)

    def expected(self, feed: Feeds) -> list[np.ndarray]:
        return self.cpu.run(None, {spec.name: feed[spec.name] for spec in self.cpu.inputs})


class Defined(OnGpu):
    """And its ternary weights and rounded activations in onnxruntime, which compiles nothing: any shape takes a CPU's
    compiler seconds.
    """

    def __init__(self, source: Callable[[], onnx.ModelProto], scheme: str, folder: Path) -> None:
        path, proto = folder / "model.onnx", with_tables_of_bytes(source())
        onnx.save(proto, path)
        super().__init__(path, scheme, folder)
        params, ternary, schemes = ternary_weights(path, scheme)
        dense = {name: weight.dequantize().T for name, weight in ternary.items()}
        if Scheme.parse(scheme).activation_bits == 8:
            self._reference = Reference(with_rounded_activations(proto, params, dense, schemes))
        else:
            self._reference = Reference(with_weights(proto, params, dense))

    def expected(self, feed: Feeds) -> list[np.ndarray]:
        return self._reference.run(feed)


def with_tables_of_bytes(model: onnx.ModelProto) -> onnx.ModelProto:
    """With tables that rounding to bytes, as compiling does, leaves as they are."""
    tables = {node.input[0] for node in model.graph.node if node.op_type == "Gather"}
    for initializer in model.graph.initializer:
        if initializer.name in tables and len(initializer.dims) == 2:
            codes, scale = quantize_rows(numpy_helper.to_array(initializer))
            initializer.CopyFrom(numpy_helper.from_array(codes * scale, initializer.name))
    return model


@pytest.mark.parametrize(
    ("source", "scheme", "feeds"),
    [
        (lambda: mlp((64, 96, 32)), "t2a8g16", vectors),
        (lambda: mlp((64, 96, 32)), "t1abf16", vectors),
        (lambda: gpt2(1), "t1a16g16", lambda: tokens(50)),
        # Most of whose matrices are of one shape.
        (lambda: llama(1, inner=32), "t1a8pt", lambda: tokens(50)),
    ],
)
def test_any_shape_of_input(
    source: Callable[[], onnx.ModelProto], scheme: str, feeds: Callable[[], list[Feeds]], tmp_path: Path
) -> None:
    pair = Defined(source, scheme, tmp_path)
    assert_all_is_scheduled(pair.manifest)
    found = pair.errors(feeds())
    half = next((bound for name, bound in HALF.items() if name in scheme), None)
    if half is not None:
        assert max(found) <= half
        return
    # An activation nearer to the middle of two steps than float32's rounding falls either way.
    assert np.median(found) <= ROUNDED
    assert max(found) <= 2e-2


def test_any_number_of_rows_of_one_bit(models: Path, tmp_path: Path) -> None:
    pair = Pair(lambda: mlp((64, 96, 32)), "t1a1", models, tmp_path)
    assert_all_is_scheduled(pair.manifest)
    found = pair.errors(vectors())
    assert np.median(found) <= ROUNDED
    assert max(found) <= 2e-2


def assert_all_is_scheduled(manifest: Manifest) -> None:
    """Of a model of any shape: all layers are ternary, and no function is left to a fallback."""
    assert {layer.became for layer in manifest.layers if layer.scheme} == {"ternary"}
    assert not any("fallback" in function.schedule for function in manifest.functions)
    assert not manifest.graph


def test_the_demo_model_is_one_graph(models: Path, tmp_path: Path) -> None:
    """With fixed sizes: after the first run, all but the kernels that read the inputs are one launch of a graph."""
    pair = Pair(PARAPHRASE, "t3a8g64", models, tmp_path, dims={"batch_size": 1, "sequence_length": 12})
    assert pair.manifest.graph
    assert {layer.kernel for layer in pair.manifest.layers if layer.scheme} == {"matmul_a8"}
    feed = {name: array[:1, :12] for name, array in tokens(30522)[1].items()}
    found = pair.errors([feed, feed])
    assert max(found) <= ROUNDED
    kernels, graphs = eval(pair.launches).values()
    assert kernels <= 8
    assert graphs in (1, 2)


@pytest.mark.slow
def test_a_model_with_lstm_and_convolutions(models: Path, tmp_path: Path) -> None:
    pair = Pair(SILERO, "t2a8", models, tmp_path, constants={"sr": 16000})
    assert max(pair.errors(sounds())) <= 2e-2


def test_what_has_no_kernel_on_a_gpu(models: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(mlp(), path)
    for options, message in (
        ({"scheme": "t1a32"}, "a32 activations: have no kernel for CUDA; expected one of a16, a8, a1"),
        ({"scheme": "t1a8", "packing": "dense"}, "packing 'dense': has no kernel for CUDA; expected 'fast'"),
    ):
        with pytest.raises(OptionError, match=message):
            compiler.compile(path, tmp_path / "out.so", target="cuda-sm_90", **options)
    with pytest.raises(OptionError, match="a16 activations: have no kernel for a CPU; expected one of a32, a8, a1"):
        compiler.compile(path, tmp_path / "out.so", scheme="t1a16")
    assert not (tmp_path / "out.so").exists()
