"""A fatbin is read as it is written, and refused in one line where it is damaged or compressed."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvm_ternary.build.fatbin import MAGIC, FatbinEntry, read_fatbin, read_kernels
from tvm_ternary.build.nvcc import compile_fatbin
from tvm_ternary.errors import ArtifactError

TEXT = st.text("abc .\n", max_size=30).map(lambda text: f".version 9.0\n{text}".encode())
ARCHS = st.sampled_from(["sm_80", "sm_90", "sm_120"])
ENTRIES = st.lists(
    st.one_of(
        st.builds(FatbinEntry, st.just("ptx"), ARCHS, TEXT),
        st.builds(FatbinEntry, st.just("elf"), ARCHS, st.binary(max_size=30).map(lambda code: b"\x7fELF" + code)),
    ),
    max_size=4,
)


def written(entries: list[FatbinEntry], padding: int = 0) -> bytes:
    """A fatbin of these; text may be padded, headers may be longer than what is known of them."""
    body = b""
    for entry in entries:
        code = entry.data + bytes(padding if entry.kind == "ptx" else 0)
        kind, size, arch = {"ptx": 1, "elf": 2}[entry.kind], 64 + padding, int(entry.arch[3:])
        body += struct.pack("<HHIQ12xI", kind, 0x101, size, len(code), arch).ljust(size, b"\0") + code
    return struct.pack("<IHHQ", MAGIC, 1, 16, len(body)) + body


@given(ENTRIES, st.integers(0, 9))
def test_what_is_written_is_read(entries: list[FatbinEntry], padding: int) -> None:
    assert read_fatbin(written(entries, padding)) == tuple(entries)


@given(ENTRIES, st.data())
def test_a_fatbin_that_is_cut_off_is_refused(entries: list[FatbinEntry], data: Any) -> None:
    whole = written(entries)
    with pytest.raises(ArtifactError):
        read_fatbin(whole[: data.draw(st.integers(0, len(whole) - 1))])


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "is cut off"),
        (b"\x7fELF" + bytes(60), "begins with 0x464c457f, expected 0xba55ed50"),
        (written([]) + b"x", "holds 17 bytes, expected 16"),
        (struct.pack("<IHHQ", MAGIC, 1, 16, 8) + bytes(8), "is cut off"),
        (struct.pack("<IHHQ", MAGIC, 1, 16, 64) + bytes(64), "is cut off"),
        (written([FatbinEntry("elf", "sm_90", b"\x28\xb5\x2f\xfd")]), "holds compressed code for sm_90"),
        (written([FatbinEntry("ptx", "sm_80", b"\x28\xb5\x2f\xfd")]), "holds compressed code for sm_80"),
    ],
)
def test_what_is_no_fatbin_is_one_line(data: bytes, problem: str) -> None:
    with pytest.raises(ArtifactError, match=problem) as caught:
        read_fatbin(data)
    assert str(caught.value).startswith("fatbin: ")


def test_an_unknown_kind_of_entry_is_refused() -> None:
    data = bytearray(written([FatbinEntry("elf", "sm_90", b"\x7fELF")]))
    data[16] = 9
    with pytest.raises(ArtifactError, match="an entry of kind 9"):
        read_fatbin(bytes(data))


def test_machine_code_that_is_cut_off_is_refused() -> None:
    """Kernels are read, or an error says why not, wherever it ends; the section table stands near the end."""
    code = compile_fatbin('extern "C" __global__ void k(int* x) { x[0] = 1; }', ("sm_90",))
    cubin = next(entry.data for entry in read_fatbin(code.fatbin) if entry.kind == "elf")
    assert [kernel.name for kernel in read_kernels(cubin)] == ["k"]
    table = struct.unpack_from("<Q", cubin, 0x28)[0]
    for end in (0, 10, 63, 64, 1000, table, table + 100):
        with pytest.raises(ArtifactError, match="ELF image"):
            read_kernels(cubin[:end])
