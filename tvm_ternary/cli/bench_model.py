"""``tvm-ternary bench model``: a whole model beside onnxruntime."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvm_ternary.cli.options import add_verb, constant, parse_pairs, whole_number
from tvm_ternary.errors import InputError, OptionError

if TYPE_CHECKING:
    import numpy.typing as npt

_DESCRIPTION = """\
Compile a model and measure it beside onnxruntime on the same file, in turns in one run, after looking at every answer.
Ours and onnxruntime are called as users call them, arrays in and arrays out. A ratio is the median over the turns of a
peer's time over ours: above 1 we are faster. 'error' is the largest relative error of an output against onnxruntime in
float32. Then what each library cost: compiling, its peak memory beyond that of the idle compiler, and loading to the
first result beyond reading the file, each in a process of its own.
"""
_EXAMPLES = """\
  tvm-ternary bench model model.onnx --dim batch=1 --dim length=128
  tvm-ternary bench model model.onnx --dim batch=1,1,8 --dim length=16,128,128 --schemes t1a8,t2a8,float --threads 1,2
  tvm-ternary bench model decoder.onnx --dim past=1024 --int4 --json lines.jsonl
  tvm-ternary bench model checkpoint-folder --reference exported.onnx --dim batch=1 --dim length=16
"""


def add_parser(what: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``model`` to what ``bench`` can measure."""
    parser = add_verb(what, "model", "a whole model, beside onnxruntime", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help="an .onnx file, or a checkpoint or quantized folder")
    parser.add_argument(
        "--dim",
        metavar="NAME=SIZE,...",
        action="append",
        default=[],
        help="size of a dimension; a list is a size for each shape, all lists of one length; may be repeated",
    )
    parser.add_argument(
        "--schemes", metavar="NAME,...", default="t1a8,float", help="float: no matrix ternary (default: %(default)s)"
    )
    parser.add_argument("--layers", metavar="PATTERN", action="append", help="which matrices; as for 'compile'")
    parser.add_argument("--threads", metavar="N,...", default="1", help="of every engine (default: %(default)s)")
    parser.add_argument(
        "--constant", metavar="INPUT=VALUE", action="append", default=[], help="as for 'compile'; may be repeated"
    )
    parser.add_argument("--static", action="store_true", help="compile for every shape with its sizes")
    parser.add_argument("--data", metavar="FILE.npz", help="the inputs of a run (default: random ones)")
    parser.add_argument("--reference", metavar="FILE.onnx", help="what onnxruntime runs (default: MODEL)")
    parser.add_argument("--int4", action="store_true", help="also onnxruntime's 4-bit weights (MatMulNBits)")
    parser.add_argument("--no-peers", action="store_true", help="ours alone")
    turns = "turns of each engine, of one to five timed calls each (default: %(default)s)"
    parser.add_argument("--turns", metavar="N", type=int, default=9, help=turns)
    parser.add_argument("--target", metavar="NAME", default="native", help="one that this host can run")
    parser.add_argument("--json", metavar="FILE", help="append a line of JSON for each row")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables and append the lines."""
    sizes = _sizes(args.dim)
    threads = [whole_number("--threads", "N", text) for text in args.threads.split(",")]
    constants = parse_pairs("--constant", args.constant, "sr=16000")

    from tvm_ternary.bench.lines import append_line
    from tvm_ternary.bench.machine import machine_facts
    from tvm_ternary.bench.model import ModelMeasurement, Subject, measure_model
    from tvm_ternary.bench.model_peers import FLOAT, INT4, INT8
    from tvm_ternary.bench.model_report import costs_table, ratio_table
    from tvm_ternary.bench.report import machine_table
    from tvm_ternary.cli.progress import show_progress
    from tvm_ternary.cli.tables import print_tables
    from tvm_ternary.files import require_writable
    from tvm_ternary.runtime.threads import thread_count

    for count in threads:
        thread_count(count)
    lines = args.json and Path(args.json)
    if lines:
        require_writable(lines)
    subject = Subject(
        model=Path(args.model),
        reference=_reference(args),
        schemes=tuple(dict.fromkeys(args.schemes.split(","))),
        constants={name: constant(name, text) for name, text in constants.items()},
        layers=None if args.layers is None else tuple(args.layers),
        static=args.static,
        target=args.target,
    )
    peers = () if args.no_peers else (FLOAT, INT8, *((INT4,) if args.int4 else ()))
    facts = machine_facts()
    measured: list[ModelMeasurement] = []
    with show_progress(quiet=False) as progress:
        assert progress is not None
        options: dict[str, Any] = {"peers": peers, "data": _data(args.data), "turns": args.turns}
        for one in measure_model(subject, sizes, threads, progress=progress, **options):
            measured.append(one)
            if lines:
                append_line(lines, {**facts, "benchmark": "model", "turns": args.turns, **one.as_json()})
    absent = {} if subject.reference else {"onnxruntime": "the model has no graph: name one with --reference"}
    shown = machine_table(facts, max(threads), args.target, {} if args.no_peers else absent)
    print_tables([shown, ratio_table(measured), costs_table(measured)])
    return 0


def _reference(args: argparse.Namespace) -> Path | None:
    if args.no_peers:
        return None
    if args.reference is not None:
        return Path(args.reference)
    return Path(args.model) if args.model.endswith(".onnx") else None


def _sizes(items: list[str]) -> list[dict[str, int]]:
    """The shapes that ``--dim`` options list; a single size is of all of them."""
    lists = {
        name: [whole_number("--dim", name, one) for one in text.split(",")]
        for name, text in parse_pairs("--dim", items, "batch=1,8").items()
    }
    count = max((len(own) for own in lists.values()), default=1)
    for name, own in lists.items():
        if len(own) not in (1, count):
            raise OptionError("--dim", f"{name} has {len(own)} sizes, another {count}", "give as many, or one")
    return [{name: own[i if len(own) > 1 else 0] for name, own in lists.items()} for i in range(count)]


def _data(file: str | None) -> dict[str, npt.NDArray[Any]] | None:
    if file is None:
        return None
    import numpy as np

    try:
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(
            "--data", f"{file} is no .npz file of arrays ({error})", "write it with numpy.savez"
        ) from error
