"""A process that believes in a GPU, to compile modules of TVM and run them on the emulator.

TVM's CUDA runtime can't leave a process once loaded, and changes how TVM compiles there: hence a process of its own,
one for many modules.
"""

import json
import pickle
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from .errors import EmulatorError
from .fake_gpu import environment, explain
from .kernels import InOut, Out

COUNTERS = (
    "launches",
    "graphs",
    "graph_launches",
    "graph_kernels",
    "copies_to_device",
    "copies_from_device",
    "copies_on_device",
    "allocations",
    "modules",
)


def send(stream: BinaryIO, message: object) -> None:
    """Write a message and its length."""
    data = pickle.dumps(message)
    stream.write(struct.pack("<q", len(data)) + data)
    stream.flush()


def receive(stream: BinaryIO) -> Any:
    """Read a message; EOFError where the other side is gone."""
    header = stream.read(8)
    if len(header) < 8:
        raise EOFError
    return pickle.loads(stream.read(struct.unpack("<q", header)[0]))


class Worker:
    """A process with a fake GPU, as a context manager.

    Parameters
    ----------
    checked : trace every access to memory (see `compile`)
    compute_capability, memory, name, ... : see `fake_gpu.environment`
    """

    def __init__(self, *, checked: bool = True, **settings: Any) -> None:
        env = environment(checked=checked, **settings)
        major, minor = settings.get("compute_capability", (8, 0))
        self.arch = f"sm_{major}{minor}"
        command = [
            sys.executable,
            "-m",
            "tests.cuda_emulator.worker_main",
            str(int(checked)),
            str(major * 100 + minor * 10),
        ]
        self._process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.counters: dict[str, int] = {}

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def run(
        self,
        module: Any,
        *args: Any,
        entry: str = "main",
        target: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> list[np.ndarray]:
        """Compile a module for the fake GPU, once, and call a function of it, a Relax one in a new virtual machine.

        Parameters
        ----------
        module : a tirx PrimFunc or an IRModule of such, scheduled; or an IRModule with Relax functions
        args : the function's arguments in order: an array (put on the GPU), an `Out` or `InOut` (also fetched from it
            into the array given), a number
        target : default: CUDA of the worker's compute capability with an LLVM host
        config : of TVM's PassContext, ``{"relax.backend.use_cuda_graph": True}`` for one
        seed : order of warps between barriers

        Returns
        -------
        outputs : what a Relax function returns; nothing for a PrimFunc

        Raises
        ------
        EmulatorError
            For what the kernels do wrong, and when compiling or running fails.
        """
        request = {
            **self._program(module, entry, target, config),
            "entry": entry,
            "args": [_encode(a) for a in args],
            "seed": seed,
        }
        outputs, written, self.counters = self._call("run", request)
        for argument, array in zip(args, written, strict=True):
            if array is not None:
                argument.array[...] = array
        return list(outputs)

    def source(self, module: Any, *, entry: str = "main", target: Mapping[str, Any] | None = None) -> str:
        """The CUDA source of a module, as it is compiled for `run`."""
        return str(self._call("source", self._program(module, entry, target, None)))

    def _program(
        self, module: Any, entry: str, target: Mapping[str, Any] | None, config: Mapping[str, Any] | None
    ) -> dict[str, str]:
        import tvm

        if not isinstance(module, tvm.IRModule):
            module = tvm.IRModule({entry: module.with_attr("global_symbol", entry)})
        default = {
            "kind": "cuda",
            "arch": self.arch,
            "max_threads_per_block": 1024,
            "thread_warp_size": 32,
            "max_shared_memory_per_block": 49152,
            "host": {"kind": "llvm"},
        }
        return {
            "module": tvm.ir.save_json(module),
            "target": json.dumps(dict(target or default)),
            "config": json.dumps(dict(config or {})),
        }

    def _call(self, action: str, request: Mapping[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            send(self._process.stdin, (action, request))
            succeeded, answer = receive(self._process.stdout)
        except (EOFError, BrokenPipeError):
            raise EmulatorError(f"the worker has ended, exit status {self._process.wait()}") from None
        if not succeeded:
            raise EmulatorError(explain(answer))
        return answer


def _encode(argument: Any) -> tuple[str, Any]:
    if isinstance(argument, Out):
        return "out", argument.array
    if isinstance(argument, InOut):
        return "in_out", argument.array
    return ("in", argument) if isinstance(argument, np.ndarray) else ("number", argument)


def main_loop(actions: Mapping[str, Any], arguments: Sequence[BinaryIO]) -> None:
    """In the worker: answer requests until there are no more."""
    source, sink = arguments
    while True:
        try:
            action, request = receive(source)
        except EOFError:
            return
        try:
            send(sink, (True, actions[action](**request)))
        except Exception as error:
            send(sink, (False, f"{type(error).__name__}: {error}"))
