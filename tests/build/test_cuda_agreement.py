"""Whole models compiled for a GPU against the same ones compiled for this CPU.

The artifact runs through TVM's CUDA runtime on the tests' own driver, whose GPU is the emulator: its machine code is
looked at, its kernels run as the source that the machine code was made of.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.build.test_agreement import PARAPHRASE, SILERO, Source, errors, sounds, tokens, vectors
from tests.cuda_emulator import fake_gpu
from tests.models import gpt2, llama, mlp
from tvm_ternary import compiler
from tvm_ternary.errors import OptionError
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


class Pair:
    """A model compiled for a GPU and for this CPU."""

    def __init__(self, source: Source, scheme: str, models: Path, folder: Path, **options: Any) -> None:
        path = models / source if isinstance(source, str) else folder / "model.onnx"
        if not isinstance(source, str):
            onnx.save(source(), path)
        self.folder, self.sources = folder, list[str]()
        compile_fatbin = compiler.compile_fatbin

        def keep(code: str, *arguments: Any) -> Any:
            self.sources.append(code)
            return compile_fatbin(code, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiler, "compile_fatbin", keep)
            gpu = compiler.compile(path, folder / "gpu.so", target="cuda-sm_90", scheme=scheme, **options)
        self.manifest: Manifest = gpu.manifest
        plain = scheme.replace("abf16", "a32").replace("a16", "a32")
        self.cpu = load(compiler.compile(path, folder / "cpu.so", scheme=plain, **options).path, threads=2)

    def errors(self, feeds: list[dict[str, np.ndarray]]) -> list[float]:
        """The largest error of each run; and what the last one launched, as ``launches``."""
        for number, feed in enumerate(feeds):
            np.savez(self.folder / f"in{number}.npz", **feed)
        env = fake_gpu.environment(kernels=self.sources, compute_capability=(9, 0), checked=False)
        self.launches = fake_gpu.python(RUN, env, self.folder, len(feeds)).strip()
        found = []
        for number, feed in enumerate(feeds):
            with np.load(self.folder / f"out{number}.npz") as out:
                got = [out[name] for name in out.files]
            found.append(max(errors(got, self.cpu.run(None, {s.name: feed[s.name] for s in self.cpu.inputs}))))
        return found


@pytest.mark.parametrize(
    ("source", "scheme", "feeds"),
    [
        (lambda: mlp((64, 96, 32)), "t2a8g16", vectors),
        (lambda: mlp((64, 96, 32)), "t1a1", vectors),
        (lambda: mlp((64, 96, 32)), "t1abf16", vectors),
        (lambda: gpt2(1), "t1a16g16", lambda: tokens(50)),
        # Most of whose matrices are of one shape.
        (lambda: llama(1, inner=32), "t1a8pt", lambda: tokens(50)),
    ],
)
def test_any_shape_of_input(source: Source, scheme: str, feeds: Any, models: Path, tmp_path: Path) -> None:
    pair = Pair(source, scheme, models, tmp_path)
    assert {layer.became for layer in pair.manifest.layers if layer.scheme} == {"ternary"}
    assert not any("fallback" in function.schedule for function in pair.manifest.functions)
    assert not pair.manifest.graph
    found = pair.errors(feeds())
    half = next((bound for name, bound in HALF.items() if name in scheme), None)
    if half is not None:
        assert max(found) <= half
        return
    # An activation nearer to the middle of two steps than float32's rounding falls either way.
    assert np.median(found) <= ROUNDED
    assert max(found) <= 2e-2


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
