"""The tile files that are shipped, and files that a person got wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tvm_ternary.errors import OptionError
from tvm_ternary.kernels.shape import Tile, Variant
from tvm_ternary.kernels.table import EVERY_KERNEL, kernel_for
from tvm_ternary.schedule import tiles
from tvm_ternary.schedule.tiles import load_tiles
from tvm_ternary.target import CUDA_ARCHS, TIERS

NAMES = [kernel_for(*key).matmul.name for key in EVERY_KERNEL]
EXPECTED = "expected [[variant]] tables with rows, blocks, perhaps panel and tiles; max_rows in all but the last"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of schedules in place of the shipped one."""
    monkeypatch.setattr(tiles, "_FOLDERS", (tmp_path / "absent", tmp_path))
    load_tiles.cache_clear()
    yield tmp_path
    load_tiles.cache_clear()


def write(folder: Path, tier: str, text: str) -> Path:
    path = folder / tier / "matmul_a8.toml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_has_tiles_for_every_tier(name: str, tier: str) -> None:
    table = load_tiles(name, tier)
    assert table.source == f"{tier}/{name}.toml"
    *limited, last = table.variants
    assert last.max_rows is None
    limits = [variant.max_rows for variant in limited]
    assert all(limit is not None and limit > 0 for limit in limits)
    assert limits == sorted(set(limits), key=lambda limit: limit or 0)
    for rows in (1, 2, 10, 10**6):
        assert any(variant.serves(rows) for variant in table.variants)


def test_no_file_is_for_a_kernel_or_tier_that_does_not_exist() -> None:
    root = next(folder for folder in tiles._FOLDERS if folder.is_dir())
    files = {path.relative_to(root).as_posix() for path in root.rglob("*.toml")}
    cuda = {f"cuda-{arch}/matmul_{kind}.toml" for arch in CUDA_ARCHS for kind in ("a16", "abf16", "a8", "a1")}
    assert files <= {f"{tier}/{name}.toml" for tier in TIERS for name in NAMES} | cuda


def test_a_file_is_read_as_it_is_written(folder: Path) -> None:
    text = "# a note\n[[variant]]\nmax_rows = 4\nrows = 1\nblocks = 3\n[[variant]]\nrows = 2\nblocks = 5\n"
    write(folder, "avx2", text)
    table = load_tiles("matmul_a8", "avx2")
    assert table.variants == (Variant(Tile(1, 3), 4), Variant(Tile(2, 5), None))
    assert table.source == "avx2/matmul_a8.toml"


def test_a_tier_without_a_file_takes_the_portable_one(folder: Path) -> None:
    write(folder, "portable", "[[variant]]\nrows = 2\nblocks = 1\n")
    table = load_tiles("matmul_a8", "avx512")
    assert table.variants == (Variant(Tile(2, 1), None),)
    assert table.source == "portable/matmul_a8.toml"


def test_a_missing_file_is_named(folder: Path) -> None:
    with pytest.raises(OptionError) as caught:
        load_tiles("matmul_a8", "avx2")
    assert str(caught.value).startswith(f"{folder / 'avx2' / 'matmul_a8.toml'}: no such schedule file")


LAST = "[[variant]]\nrows = 1\nblocks = 1\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", f"got keys []; {EXPECTED}"),
        ("variant = []", f"got keys ['variant']; {EXPECTED}"),
        ("variant = 3", f"got keys ['variant']; {EXPECTED}"),
        ("[variant]\nrows = 1\nblocks = 1", f"got keys ['variant']; {EXPECTED}"),
        (f"speed = 1\n{LAST}", f"got keys ['speed', 'variant']; {EXPECTED}"),
        ("variant = [1]", f"variant 0 is 1; {EXPECTED}"),
        ("[[variant]]\nrows = 1", f"variant 0 is {{'rows': 1}}; {EXPECTED}"),
        ("[[variant]]\nrows = 0\nblocks = 1", f"variant 0 is {{'rows': 0, 'blocks': 1}}; {EXPECTED}"),
        ("[[variant]]\nrows = 1\nblocks = -2", f"variant 0 is {{'rows': 1, 'blocks': -2}}; {EXPECTED}"),
        ("[[variant]]\nrows = 1.0\nblocks = 1", f"variant 0 is {{'rows': 1.0, 'blocks': 1}}; {EXPECTED}"),
        ("[[variant]]\nrows = true\nblocks = 1", f"variant 0 is {{'rows': True, 'blocks': 1}}; {EXPECTED}"),
        ("[[variant]]\nrows = '1'\nblocks = 1", f"variant 0 is {{'rows': '1', 'blocks': 1}}; {EXPECTED}"),
        (f"{LAST}max_rows = 8", f"variant 0 is {{'rows': 1, 'blocks': 1, 'max_rows': 8}}; {EXPECTED}"),
        (f"{LAST}{LAST}", f"variant 0 is {{'rows': 1, 'blocks': 1}}; {EXPECTED}"),
        (f"{LAST}max_rows = 0\n{LAST}", f"variant 0 is {{'rows': 1, 'blocks': 1, 'max_rows': 0}}; {EXPECTED}"),
        (f"{LAST}max_rows = 8\n{LAST}max_rows = 4\n{LAST}", f"max_rows are [8, 4]; {EXPECTED}"),
        (f"{LAST}max_rows = 8\n{LAST}max_rows = 8\n{LAST}", f"max_rows are [8, 8]; {EXPECTED}"),
    ],
)
def test_a_malformed_file_is_refused_with_what_was_expected(folder: Path, text: str, problem: str) -> None:
    path = write(folder, "avx2", text)
    with pytest.raises(OptionError) as caught:
        load_tiles("matmul_a8", "avx2")
    assert str(caught.value) == f"{path}: {problem}"


def test_text_that_is_no_toml_is_refused(folder: Path) -> None:
    path = write(folder, "avx2", "[[variant]\nrows = 1")
    with pytest.raises(OptionError) as caught:
        load_tiles("matmul_a8", "avx2")
    assert str(caught.value).startswith(f"{path}: not valid TOML: ")


def test_bytes_that_are_no_text_are_refused(folder: Path) -> None:
    path = write(folder, "avx2", "")
    path.write_bytes(b"\xff\xfe[")
    with pytest.raises(OptionError) as caught:
        load_tiles("matmul_a8", "avx2")
    assert str(caught.value).startswith(f"{path}: not valid TOML: ")
