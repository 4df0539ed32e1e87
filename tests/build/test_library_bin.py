"""The blob of a library: reading and writing are inverse, and what is damaged is refused in one line."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvm_ternary.build.library_bin import (
    BinModule,
    CudaContent,
    library_blob,
    read_cuda,
    read_library_bin,
    with_cuda_code,
    write_cuda,
    write_library_bin,
)
from tvm_ternary.errors import ArtifactError

NAMES = st.text(max_size=12)
BYTES = st.binary(max_size=40)


def number(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str) -> bytes:
    return number(len(value.encode())) + value.encode()


def listed(items: list[bytes]) -> bytes:
    return number(len(items)) + b"".join(items)


@st.composite
def tables(draw: st.DrawFn) -> bytes:
    """The table of kernels, as TVM writes it: name twice, argument types, launch parameters, marks."""
    words = st.lists(st.binary(min_size=4, max_size=4), max_size=4)
    kernels = draw(st.lists(st.tuples(NAMES, words, st.lists(NAMES, max_size=3), words), max_size=3))
    return listed(
        [text(name) * 2 + listed(types) + listed([text(tag) for tag in tags]) + listed(marks)
         for name, types, tags, marks in kernels]
    )  # fmt: skip


CUDA = st.builds(CudaContent, NAMES, tables(), BYTES)


@st.composite
def module_tuples(draw: st.DrawFn) -> tuple[BinModule, ...]:
    kinds = draw(st.lists(st.sampled_from(["_lib", "relax.VMExecutable", "static_library", "é"]), max_size=5))
    indices = st.lists(st.integers(0, max(len(kinds) - 1, 0)), max_size=3).map(tuple)
    return tuple(BinModule(kind, b"" if kind == "_lib" else draw(BYTES), draw(indices)) for kind in kinds)


@given(module_tuples())
def test_what_is_written_is_read(modules: tuple[BinModule, ...]) -> None:
    blob = write_library_bin(modules)
    assert read_library_bin(blob) == modules
    assert write_library_bin(read_library_bin(blob)) == blob


@given(CUDA)
def test_what_is_written_of_gpu_code_is_read(content: CudaContent) -> None:
    assert read_cuda(write_cuda(content)) == content


@given(module_tuples(), CUDA, BYTES, st.data())
def test_only_the_code_is_replaced(others: tuple[BinModule, ...], content: CudaContent, code: bytes, data: Any) -> None:
    place = data.draw(st.integers(0, len(others)))
    modules = (*others[:place], BinModule("cuda", write_cuda(content), ()), *others[place:])
    changed = read_library_bin(with_cuda_code(write_library_bin(modules), code))
    assert read_cuda(changed[place].content) == CudaContent("fatbin", content.table, code)
    assert (*changed[:place], *changed[place + 1 :]) == others
    assert replace(changed[place], content=b"") == replace(modules[place], content=b"")


@given(module_tuples(), st.data())
def test_a_blob_that_is_cut_off_is_refused(modules: tuple[BinModule, ...], data: Any) -> None:
    blob = write_library_bin(modules)
    end = data.draw(st.integers(0, len(blob) - 1))
    with pytest.raises(ArtifactError):
        read_library_bin(blob[:end])
    # The stated length put right, so that what lies behind it is looked at.
    if end >= 8:
        with pytest.raises(ArtifactError):
            read_library_bin(number(end - 8) + blob[8:end])


@given(CUDA, st.data())
def test_gpu_code_that_is_cut_off_is_refused(content: CudaContent, data: Any) -> None:
    whole = write_cuda(content)
    with pytest.raises(ArtifactError, match="CUDA module: is cut off"):
        read_cuda(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ArtifactError, match="1 bytes are left over"):
        read_cuda(whole + b"x")


def blob_of(*parts: bytes) -> bytes:
    return number(sum(map(len, parts))) + b"".join(parts)


@pytest.mark.parametrize(
    ("blob", "problem"),
    [
        (number(7), "its length is not the one"),
        (blob_of(listed([]), listed([])), "where imports start"),
        (blob_of(listed([number(1)]), listed([number(0)])), "where imports start"),
        (blob_of(listed([number(0), number(2)]), listed([number(0)]), text("_lib")), "where imports start"),
        (blob_of(listed([number(0), number(1)]), listed([number(1)]), text("_lib")), "imported that is not there"),
        (blob_of(listed([number(0)] * 2), listed([]), number(1) + b"\xff"), "a name that is no text"),
        (blob_of(listed([number(0)] * 2), listed([]), text("_lib"), b"x"), "1 bytes are left over"),
        (blob_of(number(1 << 62)), "is cut off"),
        (blob_of(listed([number(0)] * 2), listed([]), text("x"), number((1 << 64) - 1)), "is cut off"),
    ],
)
def test_a_blob_that_makes_no_sense_is_one_line(blob: bytes, problem: str) -> None:
    with pytest.raises(ArtifactError, match=problem) as caught:
        read_library_bin(blob)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("count", [0, 2])
def test_exactly_one_module_may_hold_gpu_code(count: int) -> None:
    cuda = BinModule("cuda", write_cuda(CudaContent("cuda", number(0), b"source")), ())
    blob = write_library_bin((BinModule("_lib", b"", ()), *[cuda] * count))
    with pytest.raises(ArtifactError, match=f"holds {count} CUDA modules, expected one"):
        with_cuda_code(blob, b"code")


@pytest.mark.parametrize("library", [b"", b"\x7fELF", b"no library at all, and longer than the header of one " * 4])
def test_what_is_no_library_is_refused(library: bytes) -> None:
    with pytest.raises(ArtifactError, match="ELF image"):
        library_blob(library)
