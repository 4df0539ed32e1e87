"""The instructions that TensorIR does not name: device functions of a few lines, each with its meaning beside it.

A function is CUDA C++ with inline PTX. Under ``TVM_TERNARY_EMULATED`` it is its meaning in plain C++ instead, so that
the code which TVM generates can be run and checked on a CPU (``tests/cuda_emulator``).

How 2-bit codes meet a tensor core. A thread of a warp is ``lane = 4 g + t``. It loads 16 bytes of packed codes: the
words of four neighbouring outputs n for one block of 16 k's; t chooses the block and g the outputs. `mma` wants of
thread (g, t) the rows g and g + 8 of the left matrix, and which k's stand in its registers does not matter as long as
both matrices agree. So words 0 and 1 of the four are rows g and g + 8 of one product, words 2 and 3 of a second one,
and the k's of a thread's registers are those of its own block: no shuffle, no shared memory, and a word becomes
operands by shifts and masks alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.backend.cuda.op import cuda_func_call

Expr = Any


@dataclass(frozen=True)
class Device:
    """A device function.

    Attributes
    ----------
    name : str
    parameters : str
        As C++ writes them.
    code : str
        Its body for a GPU.
    meaning : str, optional
        Its body in plain C++, where ``code`` is not that already.
    result : str
        TVM's dtype of what it returns.
    needs : tuple of Device
        Those that its body calls.
    """

    name: str
    parameters: str
    code: str
    meaning: str | None = None
    result: str = "void"
    needs: tuple[Device, ...] = ()

    @property
    def source(self) -> str:
        """The definitions of those it needs and its own, each once in a file."""
        kind = {"void": "void", "float32": "float", "int32": "int", "uint32": "unsigned"}[self.result]
        head = f"\n__device__ __forceinline__ {kind} {self.name}({self.parameters}) {{\n"
        body = self.code.strip("\n")
        if self.meaning is not None:
            meaning = self.meaning.strip("\n")
            body = f"#if defined(TVM_TERNARY_EMULATED)\n{meaning}\n#else\n{body}\n#endif"
        guard = self.name.upper()
        needed = "".join(other.source for other in self.needs)
        return f"{needed}\n#ifndef {guard}\n#define {guard}{head}{body}\n}}\n#endif\n"

    def __call__(self, *arguments: Expr) -> Expr:
        """The expression of a call."""
        return cuda_func_call(self.name, *arguments, source_code=self.source, return_type=self.result)


def _loads(name: str, kind: str, shared: bool) -> Device:
    """Load 16 bytes at an address, or at an offset of shared memory."""
    parameters = "const void* shared, int offset" if shared else "const void* from"
    vector, place = ("uint4" if kind == "unsigned" else "float4"), "(const char*)shared + offset" if shared else "from"
    lines = [f"{vector} four = *(const {vector}*)({place});"]
    lines += [f"to[{i}] = four.{part};" for i, part in enumerate("xyzw")]
    return Device(name, f"{kind}* to, {parameters}", "\n".join(f"  {line}" for line in lines))


load_floats = _loads("tt_load_floats", "float", shared=False)
load_shared = _loads("tt_load_shared", "unsigned", shared=True)
load_shared_floats = _loads("tt_load_shared_floats", "float", shared=True)

store_floats = Device(
    "tt_store_floats",
    "void* to, float a, float b, float c, float d",
    "  *(float4*)to = make_float4(a, b, c, d);",
)

get_word = Device(
    "tt_get_word",
    "const void* shared, int offset",
    "  return *(const unsigned*)((const char*)shared + offset);",
    result="uint32",
)

put_int = Device("tt_put_int", "void* shared, int index, int value", "  ((int*)shared)[index] = value;")
put_float = Device("tt_put_float", "void* shared, int index, float value", "  ((float*)shared)[index] = value;")
get_int = Device("tt_get_int", "const void* shared, int index", "  return ((const int*)shared)[index];", result="int32")
get_float = Device(
    "tt_get_float", "const void* shared, int index", "  return ((const float*)shared)[index];", result="float32"
)

swap = Device("tt_swap", "unsigned* a, unsigned* b", "  unsigned kept = *a;\n  *a = *b;\n  *b = kept;")


def copy_rows(size: int) -> Device:
    """Copy ``size`` (4, 8 or 16) bytes to shared memory while the thread goes on; those beyond ``bytes`` become 0."""
    cache = "cg" if size == 16 else "ca"
    return Device(
        f"tt_copy_{size}",
        "void* shared, int offset, const void* from, int bytes",
        f"""
  unsigned to = (unsigned)__cvta_generic_to_shared((char*)shared + offset);
  asm volatile("cp.async.{cache}.shared.global [%0], [%1], {size}, %2;" :: "r"(to), "l"(from), "r"(bytes) : "memory");
""",
        f"  tt_emu_cp_async((char*)shared + offset, from, {size}, bytes);",
    )


commit_copies = Device(
    "tt_commit_copies",
    "",
    r'  asm volatile("cp.async.commit_group;" ::: "memory");',
    "  tt_emu_cp_async_commit();",
)


def wait_copies(left: int) -> Device:
    """Wait until at most ``left`` of this thread's committed groups of copies are under way."""
    return Device(
        f"tt_wait_copies_{left}",
        "",
        f'  asm volatile("cp.async.wait_group {left};" ::: "memory");',
        f"  tt_emu_cp_async_wait({left});",
    )


decode_codes = Device(
    "tt_decode_codes",
    "unsigned* quads, unsigned word",
    """
#pragma unroll
  for (int s = 0; s < 4; ++s) quads[s] = (word >> (2 * s)) & 0x03030303u;
""",
)

# Factors times codes stay within their bytes, or leave them again when all planes are added: see `kernels.int8.MIDDLE`.
start_bytes = Device(
    "tt_start_bytes",
    "unsigned* quads, int middle",
    """
#pragma unroll
  for (int s = 0; s < 4; ++s) quads[s] = (unsigned)middle * 0x01010101u;
""",
)

add_bytes = Device(
    "tt_add_bytes",
    "unsigned* quads, unsigned word, int factor",
    """
#pragma unroll
  for (int s = 0; s < 4; ++s) quads[s] += (unsigned)factor * ((word >> (2 * s)) & 0x03030303u);
""",
)

byte_of = Device(
    "tt_byte_of", "unsigned word, int index", "  return (int)(signed char)(word >> (8 * index));", result="int32"
)

load_word = Device("tt_load_word", "const void* from", "  return *(const unsigned*)from;", result="uint32")


# Left to itself the compiler takes two instructions, since one can hold but one constant.
and_or = Device(
    "tt_and_or",
    "unsigned a, unsigned mask, unsigned set",
    r"""
  unsigned result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(a), "r"(mask), "r"(set));
  return result;
""",
    "  return (a & mask) | set;",
    "uint32",
)


def _fma(name: str, kind: str, meaning: str) -> Device:
    """a * b + c of two halves each, rounded once."""
    code = f"""
  unsigned result;
  asm("fma.rn.{kind} %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
"""
    return Device(name, "unsigned a, unsigned b, unsigned c", code, f"  return {meaning}(a, b, c);", "uint32")


@dataclass(frozen=True)
class HalfFormat:
    """How codes become floats of 16 bits: as the lowest bits of a number whose unit in the last place is 1.

    A code c at bit 2 s of such a number makes it ``base + 4^s c``; times 4^-s and less ``base / 4^s + 1`` it is c - 1,
    which one fused multiply-add gives without rounding.

    Attributes
    ----------
    name : str
    exponent : int
        The bits of ``base``.
    base : float
    mantissa : int
        Bits behind the point: as many as codes may take.
    bits : callable
        float -> its bits in this format.
    fma : Device
    """

    name: str
    exponent: int
    base: float
    mantissa: int
    bits: Callable[[float], int]
    fma: Device

    def splat(self, value: float) -> str:
        """Both halves of a register."""
        return f"0x{self.bits(value) * 0x10001:08x}u"

    def trit(self, s: int) -> str:
        """C++: the trits of field ``s`` of both bytes that ``bits`` holds at its 0 and 16."""
        field, shift = (s, 0) if 2 * s + 2 <= self.mantissa else (0, 2 * s)
        mask = f"0x{(3 << 2 * field) * 0x10001:08x}u"
        number = f"tt_and_or(bits >> {shift}, {mask}, {self.splat(self.base)})"
        return f"{self.fma.name}({number}, {self.splat(4.0**-field)}, {self.splat(-self.base / 4**field - 1)})"

    @property
    def decode(self) -> Device:
        """A word of codes to eight registers of trits: of quad s, k's 0 and 2, then 1 and 3."""
        return self._each("decode", "unsigned* pairs, unsigned word", "pairs[{at}] = {trit};")

    @property
    def add(self) -> Device:
        """Add trits times ``factor``, from -63 to 63, to eight registers."""
        small = self.base + self.base / 2
        start = (
            f"  unsigned number = ({self.splat(small)}) + (unsigned)factor * 0x10001u;\n"
            f"  unsigned times = {self.fma.name}(number, {self.splat(1.0)}, {self.splat(-small)});\n"
        )
        line = f"pairs[{{at}}] = {self.fma.name}({{trit}}, times, pairs[{{at}}]);"
        return self._each("add", "unsigned* pairs, unsigned word, int factor", line, start)

    def _each(self, verb: str, parameters: str, line: str, start: str = "") -> Device:
        lines = "\n".join("    " + line.format(at=f"{2 * s} + half", trit=self.trit(s)) for s in range(4))
        loop = "#pragma unroll\n  for (int half = 0; half < 2; ++half) {\n    unsigned bits = word >> (8 * half);\n"
        return Device(f"tt_{verb}_{self.name}", parameters, f"{start}{loop}{lines}\n  }}", needs=(and_or, self.fma))


FLOAT16 = HalfFormat(
    "float16",
    0x6400,
    1024.0,
    10,
    lambda value: int(np.float16(value).view(np.uint16)),
    _fma("tt_fma_float16", "f16x2", "tt_emu_hfma2"),
)
BFLOAT16 = HalfFormat(
    "bfloat16",
    0x4300,
    128.0,
    7,
    lambda value: int(np.float32(value).view(np.uint32)) >> 16,
    _fma("tt_fma_bfloat16", "bf16x2", "tt_emu_bfma2"),
)


def _mma(name: str, kind: str, accumulator: str, meaning: str) -> Device:
    """d += a b for a whole warp; fragments as in the PTX manual under the instruction's name."""
    letter = "f" if accumulator == "float" else "r"
    parameters = f"{accumulator}* d, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1"
    outputs = ", ".join(f'"+{letter}"(d[{i}])' for i in range(4))
    inputs = ", ".join(f'"r"({name})' for name in ("a0", "a1", "a2", "a3", "b0", "b1"))
    return Device(
        name,
        parameters,
        f"""
  asm volatile("{kind} {{%0, %1, %2, %3}}, {{%4, %5, %6, %7}}, {{%8, %9}}, {{%0, %1, %2, %3}};"
               : {outputs} : {inputs});
""",
        f"  unsigned a[4] = {{a0, a1, a2, a3}}, b[2] = {{b0, b1}};\n  {meaning}(d, a, b);",
    )


mma_bytes = _mma("tt_mma_bytes", "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32", "int", "tt_emu_mma_m16n8k32_u8s8")
mma_float16 = _mma(
    "tt_mma_float16", "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", "float", "tt_emu_mma_m16n8k16_f16"
)
mma_bfloat16 = _mma(
    "tt_mma_bfloat16", "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "float", "tt_emu_mma_m16n8k16_bf16"
)
mma_bits = _mma(
    "tt_mma_bits",
    "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc",
    "int",
    "tt_emu_mma_m16n8k256_b1_and_popc",
)

store_bytes = Device(
    "tt_store_bytes",
    "void* to, int a, int b, int c, int d",
    "  *(unsigned*)to = (a & 255) | (b & 255) << 8 | (c & 255) << 16 | (unsigned)(d & 255) << 24;",
)

bits_of = Device(
    "tt_bits_of", "float value", "  int bits;\n  memcpy(&bits, &value, 4);\n  return bits;", result="int32"
)
float_of = Device(
    "tt_float_of", "int bits", "  float value;\n  memcpy(&value, &bits, 4);\n  return value;", result="float32"
)

exchange_int = Device(
    "tt_exchange_int",
    "int value, int distance",
    "  return __shfl_xor_sync(0xffffffffu, value, distance);",
    result="int32",
)
exchange_float = Device(
    "tt_exchange_float",
    "float value, int distance",
    "  return __shfl_xor_sync(0xffffffffu, value, distance);",
    result="float32",
)

# One bit of each thread of a warp.
ballot = Device(
    "tt_ballot",
    "int bit",
    "  return __ballot_sync(0xffffffffu, bit);",
    """
  unsigned word = bit ? 1u << (threadIdx.x % 32) : 0u;
  for (int distance = 16; distance; distance /= 2) word |= (unsigned)__shfl_xor_sync(0xffffffffu, (int)word, distance);
  return word;
""",
    "uint32",
)
