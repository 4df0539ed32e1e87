"""The files of tiles, and the choice among them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tvm_ternary.errors import OptionError
from tvm_ternary.kernels.shape import MatmulShape
from tvm_ternary.kernels.table import kernel_for
from tvm_ternary.schedule import tiles as files
from tvm_ternary.schedule.cuda.cut import Cut
from tvm_ternary.schedule.cuda.tiles import REPRESENTATIVES, best, choose, fits, load_cuda_tiles
from tvm_ternary.target.cuda import CUDA_ARCHS

KERNELS = [kernel_for(8).matmul, kernel_for(16).matmul, kernel_for(16, bfloat=True).matmul, kernel_for(1).matmul]
SHAPES = [
    MatmulShape(4096, 4096, 1, 1, 4096),
    MatmulShape(28672, 8192, 1, 64, 128),
    MatmulShape(384, 1536, 3, 24, 64),
    MatmulShape(37, 100, 4, 5, 24),
    MatmulShape(1, 1, 1, 1, 1),
]


@pytest.mark.parametrize("arch", CUDA_ARCHS)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_and_number_of_rows_is_served(arch: str, kernel: object, shape: MatmulShape) -> None:
    variants = choose(kernel, shape, f"cuda-{arch}", None)  # type: ignore[arg-type]
    limits = [variant.max_rows for variant in variants]
    assert limits[-1] is None
    assert limits[:-1] == sorted({limit for limit in limits[:-1] if limit is not None})
    assert len(variants) <= 5
    for rows in REPRESENTATIVES:
        (variant,) = choose(kernel, shape, f"cuda-{arch}", rows)  # type: ignore[arg-type]
        assert fits(kernel, shape, variant, CUDA_ARCHS[arch])  # type: ignore[arg-type]
        assert Cut(kernel, shape, variant).shared_bytes <= CUDA_ARCHS[arch].shared_bytes  # type: ignore[arg-type]


def test_a_large_matrix_and_many_rows_keep_every_multiprocessor_busy() -> None:
    arch, kernel, shape = CUDA_ARCHS["sm_90"], kernel_for(8).matmul, SHAPES[0]
    tiles = load_cuda_tiles(kernel.name, "cuda-sm_90")
    for rows in (1, 16, 128, 4096):
        v = best(tiles, kernel, shape, arch, rows)
        blocks = -(-rows // v.rows) * -(-shape.n // (v.columns * v.warps_n))
        assert blocks >= 0.9 * arch.multiprocessors, (rows, v)


def write(folder: Path, text: str) -> None:
    (folder / "cuda-sm_80").mkdir(exist_ok=True)
    (folder / "cuda-sm_80" / "matmul_a8.toml").write_text(text)


SPACE = "[space]\nrows = [8]\ncolumns = [32]\nwarps_n = [1]\nwarps_k = [4]\nstages = [2]\nshared = [0]\n"
GOOD = "[[variant]]\nrows = 8\ncolumns = 32\nwarps_n = 1\nwarps_k = 4\nstages = 3\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD, "expected \\[\\[variant\\]\\] tables and \\[space\\]"),
        (GOOD.replace("rows = 8", "rows = 12") + SPACE, "expected rows a multiple of 8"),
        (GOOD.replace("columns = 32", "columns = 48") + SPACE, "columns 32 or 64"),
        (GOOD.replace("stages = 3", "stages = 1") + SPACE, "2 stages or more"),
        (GOOD.replace("warps_k = 4", "warps_k = 64") + SPACE, "at most 32 warps"),
        (GOOD.replace("stages = 3\n", "") + SPACE, "expected columns, rows, stages, warps_k, warps_n"),
        (GOOD + "depth = 2\n" + SPACE, "a variant is"),
        (GOOD.replace("rows = 8", 'rows = "8"') + SPACE, "expected whole numbers above 0"),
        (GOOD + "max_rows = 8\n" + SPACE, "do not serve every M"),
        (GOOD + SPACE.replace("rows = [8]\n", ""), "expected a list of whole numbers for each of rows"),
        (GOOD + SPACE.replace("rows = [8]", "rows = []"), "expected a list of whole numbers"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    monkeypatch.setattr(files, "_FOLDERS", (tmp_path,))
    write(tmp_path, text)
    with pytest.raises(OptionError, match=message) as caught:
        load_cuda_tiles.__wrapped__("matmul_a8", "cuda-sm_80")
    assert "matmul_a8.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_architecture_without_a_file_takes_the_oldest_ones() -> None:
    assert load_cuda_tiles("matmul_a8", "cuda-sm_120").source == "cuda-sm_80/matmul_a8.toml"
