"""The GPU benchmark as far as it goes without one: what it builds, its checks on the emulator, its table."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gpu import build, cases, floors, run
from benchmarks.gpu.kernels import activation_arrays
from benchmarks.gpu.reference import bound, random_matrix, rounded
from benchmarks.gpu.table import render
from tests.cuda_emulator import fake_gpu, toolchain
from tvm_ternary.formats import Scheme
from tvm_ternary.kernels.activations import reference_int8_rows, reference_ternary_rows
from tvm_ternary.kernels.shape import MatmulShape
from tvm_ternary.kernels.table import kernel_for

ROOT = Path(__file__).resolve().parents[2]
CHECKED = ((70, 300, "t2a8g32"), (33, 100, "t1abf16"), (40, 100, "t1a1"))
RUN = """
import sys
import benchmarks.gpu.run as run
run.CHECKED, run.CHECKED_ROWS, run.MODELS = {checked}, (1, 18), ()
sys.argv = ["run", sys.argv[1], sys.argv[2], "--checks-only"]
print("status", run.main())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """What travels, small: some kernels, and the sources that the emulator needs."""
    made, sources = tmp_path_factory.mktemp("gpu"), list[str]()
    compile_fatbin = build.compile_fatbin

    def keep(source: str, archs: tuple[str, ...]) -> object:
        sources.append(source)
        return compile_fatbin(source, archs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "timed", list)
        patch.setattr(build, "CHECKED", CHECKED)
        patch.setattr(build, "compile_fatbin", keep)
        build.kernels(made)
    for name in run.LIBRARIES:
        (made / name).touch()
    (made / "facts.json").write_text(json.dumps({"commit": "0"}))
    return made, sources


def on_emulator(folder: Path, sources: list[str], out: Path) -> str:
    env = fake_gpu.environment(kernels=sources, compute_capability=(9, 0), checked=False, name="Emulated H100")
    env["TVM_TERNARY_CUDART"] = str(toolchain.fake_driver_folder() / "libcudart.so.13")
    runtime = Path(__import__("tvm").__file__).parent / "lib"
    env["TVM_TERNARY_RUNTIME"] = str(runtime / "libtvm_runtime.so")
    env["TVM_TERNARY_RUNTIME_CUDA"] = str(runtime / "libtvm_runtime_cuda.so")
    return fake_gpu.python(RUN.format(checked=CHECKED), env, folder, out)


def test_the_checks_pass_and_are_written(folder: tuple[Path, list[str]], tmp_path: Path) -> None:
    told = on_emulator(*folder, tmp_path)
    assert "status 0" in told
    lines = [json.loads(text) for text in (tmp_path / "cuda-emulated-h100.jsonl").read_text().splitlines()]
    assert [(line["case"], line["m"]) for line in lines if line["kind"] == "check"] == [
        (cases.name_of(*case), m) for case in CHECKED for m in (1, 18)
    ]
    assert not any(line["wrong"] for line in lines)
    assert "not measured" in (tmp_path / "cuda-emulated-h100.md").read_text()


def test_a_wrong_kernel_is_found(folder: tuple[Path, list[str]], tmp_path: Path) -> None:
    made, sources = folder
    wrong = [source.replace("(word >> (2 * s)) & 0x03030303u", "(word >> (2 * s)) & 0x01030303u") for source in sources]
    assert wrong != sources
    told = on_emulator(made, wrong, tmp_path)
    assert "status 1" in told
    assert "WRONG t2a8g32_70x300, 18 rows" in told


def test_without_a_gpu_it_says_so_and_exits_2(folder: tuple[Path, list[str]], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.run", str(folder[0]), str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode != 2 and not result.stderr:
        pytest.fail("this host has a GPU; run benchmarks/gpu.sh")
    assert result.returncode == 2
    assert "nothing was measured" in result.stderr
    assert "its references work: 8 matrices" in result.stdout
    assert not list(tmp_path.iterdir())


def test_the_script(tmp_path: Path) -> None:
    """As a user calls it, in a copy without anything built."""
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("results"))
    script = str(tmp_path / "benchmarks" / "gpu.sh")
    for word, message in (("run", "no build-gpu; run 'benchmarks/gpu.sh build'"), ("walk", "usage: ")):
        result = subprocess.run([script, word], capture_output=True, text=True, check=False)
        assert (result.returncode, message in result.stderr) == (1, True)


@pytest.mark.parametrize("text", ["t1a8", "t2a8g24", "t1a16", "t3abf16g32", "t2a1g40"])
def test_its_references_and_shapes_are_ours(text: str) -> None:
    """The benchmark's own arithmetic, which travels without the kernels, against the package's."""
    n, k, scheme, generator = 20, 100, Scheme.parse(text), np.random.default_rng(0)
    granularity = scheme.granularity
    shape = MatmulShape(n, k, scheme.planes, granularity.groups(k), granularity.group_size(k))
    kernel = kernel_for(scheme.activation_bits, bfloat=scheme.bfloat).matmul
    assert activation_arrays(scheme, 3, k) == [(o.shape(shape, 3), o.dtype) for o in kernel.activations]
    matrix = random_matrix(n, k, text, generator)
    assert [(array.shape, array.dtype) for array in matrix.packed] == [
        (operand.shape(shape, 3), operand.dtype) for operand in (kernel.weight, *kernel.scales(shape))
    ]
    x = generator.standard_normal((3, k)).astype(np.float32)
    got = rounded(x, scheme)
    if scheme.activation_bits == 8:
        q, scale = reference_int8_rows(x, shape)
        want = q.astype(np.float64) * np.repeat(scale, shape.group_size, axis=1)[:, :k]
        np.testing.assert_array_equal(got, want)
    elif scheme.activation_bits == 1:
        trits, scale = reference_ternary_rows(x)
        np.testing.assert_allclose(got, trits * scale[:, None])
    else:
        assert (np.abs(got - x) <= np.abs(x) * 2.0 ** (-8 if scheme.bfloat else -11)).all()
    assert (bound(got, matrix) > 0).all()


def test_the_committed_table_says_what_was_not_measured() -> None:
    assert (ROOT / "benchmarks" / "results" / "cuda.md").read_text() == render(None)


def test_the_table_of_made_up_lines(tmp_path: Path) -> None:
    facts = {"gpu": "H100", "torch": "2", "commit": "0"}
    times = {"seconds": 1e-5, "seconds_with_rows": 2e-5, "torch_bf16": 9e-5, "weight_bytes": 20e6}
    lines = [
        {"kind": "copy", "bytes_per_second": 3e12},
        {"kind": "time", "case": "t1a8_4096x4096", "m": 1, **times},
        {"kind": "time", "case": "t1a8_4096x4096", "m": 4096, **times, "torch_bf16": 1e-5},
        {"kind": "model", "case": "demo", "seconds": 1e-4, "torch_bf16_eager": 3e-4},
        {"kind": "left out", "case": "t1a1_4096x4096", "m": 8},
    ]
    path = tmp_path / "cuda-h100.jsonl"
    path.write_text("".join(json.dumps({**line, **facts}) + "\n" for line in lines))
    text = render(path)
    assert "| 0.8 | 0.67 | not met |" in text
    assert "| 4 | 4.50 | met |" in text
    assert "| 1 | 0.50 | not met |" in text
    assert "| 2 | 3.00 | met |" in text
    assert "| 1.5 | not measured |  |" in text
    assert "Left out for want of time: t1a1_4096x4096 M=8." in text


def test_the_document_holds_the_floors_that_the_code_counts() -> None:
    text = (ROOT / floors.DOCUMENT).read_text()
    assert floors.document(text) == text
    assert floors.floor(4096, 4096, "t1a8", 1) == pytest.approx(1.27, abs=0.02)
    assert floors.dense(4096, 4096, 1) == pytest.approx(10.0, abs=0.1)
