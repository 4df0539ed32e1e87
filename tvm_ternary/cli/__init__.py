"""The command line: one file a verb; each parses its options, calls one public function and prints.

Exit status: 0; 2 for an error that the user can mend; 70 for one in the program (``EX_SOFTWARE``); 128 plus the
signal's number where one ended it.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from tvm_ternary.cli import bench as bench_verb
from tvm_ternary.cli import compile as compile_verb
from tvm_ternary.cli import eval as eval_verb
from tvm_ternary.cli import inspect as inspect_verb
from tvm_ternary.cli import package as package_verb
from tvm_ternary.cli import quantize as quantize_verb
from tvm_ternary.cli import run as run_verb
from tvm_ternary.cli import tune as tune_verb
from tvm_ternary.cli.text import printable
from tvm_ternary.errors import TernaryError

TRACE = "TVM_TERNARY_TRACE"
USER_ERROR = 2
INTERNAL_ERROR = 70

_DESCRIPTION = """\
Compile neural networks with ternary weights to one shared library, and run it.

  tvm-ternary compile model.onnx -o model.so     weights become sums of a few {-1, 0, 1} matrices with scales
  tvm-ternary quantize MODEL -o DIR              the same step alone, fitted to data, as a checkpoint to compile
  tvm-ternary run model.so --repeat 20           random inputs; what comes out, and how long it takes
  tvm-ternary eval model.onnx --scheme t2a8g64   what is lost: float against ternary, by matrix, output and measure
  tvm-ternary inspect model.so                   what is in it: every matrix, and what the host needs
  tvm-ternary package model.so -o DIR            it and all that it needs in a folder, with a runner in C++
  tvm-ternary tune model.onnx                    search the fastest schedules for its matrices on this machine
  tvm-ternary bench matmul                       the kernels beside other engines', and beside what the machine can do
"""
_EPILOG = f"""\
'tvm-ternary VERB --help' explains a verb, with examples.
An error is one line and exit status {USER_ERROR}; with {TRACE}=1 in the environment the trace comes before it.
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error does."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"error: {printable(message)}; see '{self.prog} --help'\n")


class _Terminated(BaseException):
    """SIGTERM, raised so that temporary files are removed on the way out."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name. None: those of the process.

    Returns
    -------
    int
        The exit status.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal without UTF-8 shall show an escape for a character that it lacks, not end the program.
            stream.reconfigure(errors="backslashreplace")
    args = _parser().parse_args(argv)
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        return _guarded(args)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _parser() -> _Parser:
    parser = _Parser(
        prog="tvm-ternary",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for verb in (compile_verb, quantize_verb, run_verb, eval_verb, inspect_verb, package_verb, tune_verb, bench_verb):
        verb.add_parser(verbs)
    return parser


class _Version(argparse.Action):
    """Reads the installed package's metadata, which takes too long to do on every call."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version

        print(f"tvm-ternary {version('tvm-ternary')}")
        parser.exit()


def _guarded(args: argparse.Namespace) -> int:
    """Run a verb and turn whatever ends it early into one line and an exit status."""
    try:
        status: int = args.run(args)
        return status
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return _fail("interrupted", 128 + signal.SIGINT)
    except _Terminated:
        return _fail("terminated", 128 + signal.SIGTERM)
    except TernaryError as error:
        return _fail(f"error: {error}", USER_ERROR)
    except MemoryError as error:
        return _fail(f"error: not enough memory ({error})", USER_ERROR)
    except Exception as error:
        text = str(error).strip()
        detail = f": {text.splitlines()[0]}" if text else ""
        return _fail(f"internal error: {type(error).__name__}{detail} (set {TRACE}=1 for the trace)", INTERNAL_ERROR)


def _fail(line: str, status: int) -> int:
    if os.environ.get(TRACE) == "1":
        traceback.print_exc()
    print(printable(line), file=sys.stderr)
    return status


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated
