"""Makes CUDA C++, as TVM generates it, something that g++ with cuda_shim.h compiles."""

import re
from dataclasses import dataclass
from pathlib import Path

# A definition, not a declaration: its parameter list is followed by a brace.
_KERNEL = re.compile(
    r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\(\s*(?P<threads>\d+)[^)]*\)\s*|__maxnreg__\([^)]*\)\s*)?'
    r"(?P<name>\w+)\s*\((?P<parameters>[^;{}]*)\)\s*\{"
)
_DYNAMIC_SHARED = re.compile(
    r"extern\s+__shared__\s+(?:__align__\(\d+\)\s*|alignas\(\d+\)\s*)*(?P<type>[\w\s]+?)\s+(?P<name>\w+)\s*\[\s*\]\s*;"
)
_PARAMETER_NAME = re.compile(r"(\w+)\s*$")


@dataclass(frozen=True)
class Signature:
    """One kernel of a source.

    Attributes
    ----------
    threads : what __launch_bounds__ says, 0 where it says nothing
    """

    name: str
    parameters: tuple[str, ...]
    threads: int


def kernels_of(source: str) -> list[Signature]:
    """The kernels that a source defines, in order."""
    found = []
    for match in _KERNEL.finditer(source):
        parameters = [p for p in match["parameters"].split(",") if p.strip()]
        names = tuple(_PARAMETER_NAME.search(p)[1] for p in parameters)  # type: ignore[index]
        found.append(Signature(match["name"], names, int(match["threads"] or 0)))
    return found


def prepare(source: str, file: Path) -> str:
    """Return the source with its shared memory placed, and with a table of its kernels at the end.

    `file` is what debug information names as the source.

    Static shared memory of the kernel number n goes into the section tt_shared_n, whose bounds the linker knows;
    dynamic shared memory, an array without a size, becomes a pointer.
    """
    kernels = kernels_of(source)
    # g++ takes alignas only before the declaration's other words.
    text = re.sub(r"__shared__\s+alignas\((\d+)\)", r"__shared__ __align__(\1)", source)
    text = _DYNAMIC_SHARED.sub(
        r"\g<type>* const \g<name> = reinterpret_cast<\g<type>*>(tt_emu_dynamic_shared());", text
    )
    pieces, end = [], 0
    for number, match in enumerate(_KERNEL.finditer(text)):
        # `#line` keeps the numbers in reports those of the source.
        line = text.count("\n", 0, match.start()) + 1
        shared = f'static __attribute__((section("tt_shared_{number}")))'
        placed = f'\n#undef __shared__\n#define __shared__ {shared}\n#line {line} "{file}"\n'
        pieces += [text[end : match.start()], placed]
        end = match.start()
    pieces.append(text[end:])
    bounds = "".join(f"TT_SECTION_BOUNDS({n})\n" for n in range(len(kernels)))
    rows = "".join(
        f'  TT_KERNEL({kernel.name}, {n}, {kernel.threads}, "{",".join(kernel.parameters)}"),\n'
        for n, kernel in enumerate(kernels)
    )
    table = (
        f'extern "C" __attribute__((visibility("default"))) const tt_kernel tt_kernels[] = {{\n{rows}  {{nullptr}}}};\n'
    )
    return f'#line 1 "{file}"\n' + "".join(pieces) + "\n" + bounds + table
