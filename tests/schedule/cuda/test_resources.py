"""What the kernels take of a GPU, against a table that says what they took, and bounds that say what they may.

``resources.toml`` is made by ``python -m tests.schedule.cuda.test_resources``.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from tvm import tirx

from tests.cuda_matmul import source_of
from tvm_ternary.build.nvcc import KernelResources, compile_fatbin
from tvm_ternary.kernels.attention import Attention
from tvm_ternary.kernels.shape import MatmulShape
from tvm_ternary.kernels.table import kernel_for
from tvm_ternary.schedule.cuda.attention.append import append_tokens
from tvm_ternary.schedule.cuda.attention.prompt import attention_prompt, attention_prompt_cached, pack_operands
from tvm_ternary.schedule.cuda.attention.step import attention_step
from tvm_ternary.schedule.cuda.cut import Cut
from tvm_ternary.schedule.cuda.matmul import matmul_function
from tvm_ternary.schedule.cuda.rows import rows_function
from tvm_ternary.schedule.cuda.tiles import choose, fits, load_cuda_tiles
from tvm_ternary.target.cuda import CUDA_ARCHS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TABLE = Path(__file__).with_name("resources.toml")
KINDS = {"a8": (8, False), "a16": (16, False), "abf16": (16, True), "a1": (1, False)}
ROWS = (1, 16, 128, 4096)
SHAPES = {
    "4096x4096": MatmulShape(4096, 4096, 1, 1, 4096),
    "4096x4096g128": MatmulShape(4096, 4096, 1, 32, 128),
    "384x1536t3g64": MatmulShape(384, 1536, 3, 24, 64),
}
# Heads of queries and of keys, elements, planes.
CACHES = {
    "32x8x128p2": (32, 8, 128, 2),
    "32x8x128p1": (32, 8, 128, 1),
    "64x8x128p2": (64, 8, 128, 2),
    "12x12x64p2": (12, 12, 64, 2),
    "8x1x256p3": (8, 1, 256, 3),
}


def attention_functions() -> dict[str, tirx.PrimFunc]:
    """Steps over some caches of 32,768 tokens, what appends to them, and attention of prompts."""
    functions = {}
    for name, (heads, kv_heads, size, planes) in CACHES.items():
        shape = Attention(heads, kv_heads, size, size, size**-0.5, key="bhld", value="bhld")
        functions[f"step_{name}"] = attention_step(shape, (planes, planes), (1, 1, 511, 128))
        functions[f"append_{name}"] = append_tokens(shape, (planes, planes), 64, (1, None, 511, 128))
    for heads, kv_heads, size, causal in ((32, 8, 128, True), (12, 12, 64, False)):
        shape = Attention(heads, kv_heads, size, size, size**-0.5)
        name, lengths = f"{heads}x{kv_heads}x{size}", (1, 4096, 4096)
        functions[f"prompt_{name}"] = attention_prompt(shape, lengths, causal=causal)
        for planes in (2, 3) if size == 128 else (1,):
            function = attention_prompt(shape, lengths, causal=causal, planes=planes, window=64)
            functions[f"prompt_{name}_keys{planes}"] = function
        function = attention_prompt_cached(shape, (2, 2), (1, 512, 511, 128))
        functions[f"prompt_{name}_cached2"] = function
        bits = replace(shape, mask="bms", hidden=-3e38)
        functions[f"prompt_{name}_bits"] = attention_prompt(bits, lengths, kind="float16", planes=2)
        functions[f"pack_operands_{name}"] = pack_operands(shape, 2, 64, lengths)[0]
    functions[f"prompt_{name}_masked"] = attention_prompt(replace(shape, mask="bms"), lengths, kind="float16")
    return functions


@cache
def report(arch: str) -> dict[str, KernelResources]:
    """The kernels that are chosen for some shapes, those that prepare their rows, and those of attention."""
    functions = attention_functions()
    for kind, (bits, bfloat) in KINDS.items():
        kernel = kernel_for(bits, bfloat=bfloat).matmul
        for name, shape in SHAPES.items():
            functions[f"rows_{kind}_{name}"] = rows_function(kernel, shape)
            for rows in ROWS:
                variants = choose(kernel, shape, f"cuda-{arch}", rows)
                functions[f"matmul_{kind}_{name}_m{rows}"] = matmul_function(kernel, shape, variants, rows=rows)
    code = compile_fatbin(source_of(functions), [arch])
    return {used.kernel.removesuffix("_kernel"): used for used in code.kernels}


def golden() -> dict[str, int]:
    return {name: int(value) for name, value in tomllib.loads(TABLE.read_text())["registers"].items()}


def check(arch: str, name: str, used: KernelResources) -> None:
    # Elsewhere the assembler may trade a few bytes for one block of threads more on a multiprocessor.
    most = 0 if arch in ("sm_80", "sm_90") else 16
    assert max(used.spill_bytes, used.local_bytes) <= most, name
    assert used.registers <= 255
    assert used.shared_bytes == 0, f"{name}: all shared memory is asked for at launch"
    assert used.arch == arch


def test_the_chosen_kernels_take_what_they_took() -> None:
    """On sm_90; a compiler's version may change a register here and there, but not a quarter of them."""
    found, known = report("sm_90"), golden()
    assert found.keys() == known.keys(), "make the table anew"
    for name, used in found.items():
        check("sm_90", name, used)
        assert abs(used.registers - known[name]) <= max(8, known[name] // 4), name


@pytest.mark.slow
@pytest.mark.parametrize("arch", [arch for arch in CUDA_ARCHS if arch != "sm_90"])
def test_they_compile_for_every_architecture(arch: str) -> None:
    for name, used in report(arch).items():
        check(arch, name, used)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_variant_of_the_files_compiles_as_counted(kind: str) -> None:
    """`Cut.registers` decides which variants are tried: it must not be far below what the compiler takes."""
    bits, bfloat = KINDS[kind]
    kernel, functions, counted = kernel_for(bits, bfloat=bfloat).matmul, {}, {}
    for shape in SHAPES.values():
        for index, candidate in enumerate(load_cuda_tiles(kernel.name, "cuda-sm_90").candidates):
            if not fits(kernel, shape, candidate.variant, CUDA_ARCHS["sm_90"]):
                continue
            name = f"v{index}_{shape.n}_{shape.groups}"
            functions[name] = matmul_function(kernel, shape, [candidate.variant])
            counted[name] = Cut(kernel, shape, candidate.variant).registers
    for used in compile_fatbin(source_of(functions), ["sm_90"]).kernels:
        name = used.kernel.removesuffix("_kernel")
        assert used.registers <= counted[name] + 60, name
        # A register or two more than three blocks of threads a multiprocessor leave room for.
        assert used.spill_bytes <= 8, name


if __name__ == "__main__":
    lines = [f"{name} = {used.registers}" for name, used in sorted(report("sm_90").items())]
    TABLE.write_text(
        "# Registers of a thread on sm_90; see test_resources.py.\n\n[registers]\n" + "\n".join(lines) + "\n"
    )
