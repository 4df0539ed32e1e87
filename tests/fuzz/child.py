"""Import mutants one after another, in a process that may crash: ``python -m tests.fuzz.child FOLDER FIRST COUNT``.

Prints a line before each case and what went wrong in it, so that whoever started this knows the case that ended it.
Memory is limited; a case that takes too long ends the process.
"""

from __future__ import annotations

import faulthandler
import resource
import signal
import sys
from pathlib import Path

from tests.fuzz.mutations import mutant
from tvm_ternary import compiler
from tvm_ternary.errors import TernaryError
from tvm_ternary.graph.importer import import_onnx

MEMORY = 6 << 30
# Of a case: of the processor, since others may use the machine; and by the clock, since a hang need not compute.
SECONDS, PATIENCE = 30, 300
# Of what can be imported, one in so many is compiled as well, which takes a hundred times longer.
COMPILED = 100


def run(folder: Path, first: int, count: int) -> None:
    """Import cases ``first`` to ``first + count``; compile a few of them."""
    path = folder / "model.onnx"
    imported = 0
    for seed in range(first, first + count):
        print(f"case {seed}", flush=True)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.alarm(PATIENCE)
        path.write_bytes(mutant(seed))
        try:
            import_onnx(path)
            imported += 1
            if imported % COMPILED == 0:
                compiler.compile(path, folder / "model.so", scheme="t1a8")
        except TernaryError as error:
            if "\n" in str(error):
                print(f"failed {seed}: several lines: {error!r}", flush=True)
        except Exception as error:
            print(f"failed {seed}: {type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)
    print(f"imported {imported}", flush=True)


if __name__ == "__main__":
    faulthandler.enable()
    # The timers have no handlers: they end the process even where no Python runs.
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
