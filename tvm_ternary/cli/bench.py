"""``tvm-ternary bench``: how fast kernels and models are here, beside others and the machine's limits."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from tvm_ternary.cli import bench_attention, bench_model
from tvm_ternary.cli.options import add_verb, whole_number
from tvm_ternary.errors import OptionError

if TYPE_CHECKING:
    from tvm_ternary.analysis.report import Table
    from tvm_ternary.bench.measurement import Measurement

_SHAPES = "2560x2560,6912x2560,2560x6912,4096x4096,14336x4096,4096x14336"
_ROWS = "1,2,4,8,16,32,128,512"
_SCHEMES = "t1a8,t1a8g128"

_DESCRIPTION = (
    "Measure kernels and models beside other engines and beside the limits of the machine, and draw the result."
)
_EXAMPLES = """\
  tvm-ternary bench matmul
  tvm-ternary bench model model.onnx --dim batch=1 --dim length=128
  tvm-ternary bench attention --cached 4096,32768 --prompts none
  tvm-ternary bench matmul --shapes 4096x4096 --rows 1,8 --schemes t1a8,t2a8 --cold --json bench.jsonl
  tvm-ternary bench plot bench.jsonl -o roofline.png -o roofline.svg
"""
_MATMUL = """\
Measure y = x w^T from float32 to float32, ours and other engines in turns in one run. Every answer is checked first.
The limits of the machine are measured in the same run by C code; the floor is what reading the operands or multiplying
takes at least, and 'reached' is floor / us. Times are medians in microseconds; a ratio is a peer's median over ours.
"""
_MATMUL_EXAMPLES = """\
  tvm-ternary bench matmul
  tvm-ternary bench matmul --shapes 4096x4096 --rows 1,8 --cold --json bench.jsonl --plot roofline.png
  tvm-ternary bench matmul --shapes 4096x4096 --rows 1 --peers none --target x86-64-v3
"""
_PLOT = "Draw the roofline, our points and the peers', from lines that 'bench matmul --json' wrote."
_PLOT_EXAMPLES = "  tvm-ternary bench plot bench.jsonl -o roofline.png -o roofline.svg\n"


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb and what it can measure and draw."""
    verb = add_verb(verbs, "bench", "measure kernels or a model, beside other engines", _DESCRIPTION, _EXAMPLES)
    what = verb.add_subparsers(metavar="WHAT", required=True)
    parser = add_verb(what, "matmul", "y = x w^T by a ternary w", _MATMUL, _MATMUL_EXAMPLES)
    parser.add_argument("--shapes", metavar="NxK,...", default=_SHAPES, help="default: %(default)s")
    parser.add_argument("--rows", metavar="M,...", default=_ROWS, help="default: %(default)s")
    parser.add_argument("--schemes", metavar="NAME,...", default=_SCHEMES, help="default: %(default)s")
    parser.add_argument("--threads", metavar="N", type=int, default=1, help="of every engine (default: %(default)s)")
    cold = "measure M up to 8 also with weights that come from memory"
    parser.add_argument("--cold", action="store_true", help=cold)
    turns = "turns of each engine, of one to five timed calls each (default: %(default)s)"
    parser.add_argument("--turns", metavar="N", type=int, default=9, help=turns)
    parser.add_argument("--peers", metavar="auto|none|NAME,...", default="auto", help="auto: those that are here")
    parser.add_argument("--target", metavar="NAME", default="native", help="one that this host can run")
    parser.add_argument("--json", metavar="FILE", help="append a line of JSON for the limits and for each row")
    parser.add_argument("--plot", metavar="FILE", action="append", default=[], help="draw the roofline: .png, .svg")
    parser.set_defaults(run=_run_matmul)
    bench_model.add_parser(what)
    bench_attention.add_parser(what)
    parser = add_verb(what, "plot", "the roofline as a picture", _PLOT, _PLOT_EXAMPLES)
    parser.add_argument("lines", metavar="LINES", help="what 'bench matmul --json' wrote")
    parser.add_argument("-o", "--output", metavar="FILE", action="append", required=True, help=".png or .svg")
    parser.set_defaults(run=_run_plot)


def _run_matmul(args: argparse.Namespace) -> int:
    """Measure, print the tables, append the lines and draw."""
    shapes = [_shape(text) for text in args.shapes.split(",")]
    rows = [whole_number("--rows", "M", text) for text in args.rows.split(",")]

    from tvm_ternary.analysis.pictures import require_format
    from tvm_ternary.bench.lines import Results, append_line
    from tvm_ternary.bench.machine import machine_facts
    from tvm_ternary.bench.matmul import cache_states, measure_matmuls
    from tvm_ternary.bench.peers import absent_peers, choose_peers
    from tvm_ternary.bench.peers.llama_cpp import FOLDER
    from tvm_ternary.bench.plot import plot_roofline
    from tvm_ternary.bench.report import limits_table, machine_table
    from tvm_ternary.bench.roofline import Roofline
    from tvm_ternary.cli.progress import show_progress
    from tvm_ternary.cli.tables import print_tables
    from tvm_ternary.files import require_writable
    from tvm_ternary.runtime.threads import thread_count
    from tvm_ternary.target import resolve

    threads, target, peers = thread_count(args.threads), resolve(args.target), choose_peers(args.peers)
    facts = {**machine_facts(), "llama_cpp": os.environ.get(FOLDER)}
    pictures, lines = [Path(text) for text in args.plot], args.json and Path(args.json)
    for path in (*pictures, *([lines] if lines else [])):
        require_writable(path)
    for path in pictures:
        require_format(path)
    schemes = list(dict.fromkeys(args.schemes.split(",")))
    steps = len(shapes) * len(schemes) * sum(len(cache_states(m, args.cold)) for m in rows)
    options = {"threads": threads, "cold": args.cold, "turns": args.turns, "target": target}
    measured: list[Measurement] = []
    with show_progress(quiet=False) as progress:
        assert progress is not None
        progress("measure", 0, steps)
        roofline = Roofline(target, threads)
        cases = measure_matmuls(shapes, rows, schemes, peers=peers, roofline=roofline, **options)
        for one in cases:
            if lines and not measured:
                about = {"benchmark": "roofline", "threads": threads, "target": target.name}
                append_line(lines, {**facts, **about, **roofline.limits().as_json()})
            measured.append(one)
            progress("measure", len(measured), steps)
            if lines:
                append_line(lines, {**facts, "benchmark": "matmul", "turns": args.turns, **one.as_json()})
    limits = roofline.limits()
    absent = absent_peers() if args.peers == "auto" else {}
    print_tables([machine_table(facts, threads, target.name, absent), limits_table(limits), *_tables(measured)])
    for path in pictures:
        plot_roofline(Results(facts, tuple(measured), {(target.name, threads): limits}), path)
    return 0


def _tables(measured: list[Measurement]) -> list[Table]:
    from tvm_ternary.bench.means import means_table
    from tvm_ternary.bench.report import left_out_table, matmul_table

    left_out = left_out_table(measured)
    tables = [matmul_table(measured), *([] if left_out is None else [left_out])]
    return [*tables, means_table(measured)]


def _run_plot(args: argparse.Namespace) -> int:
    """Read the lines and draw."""
    from tvm_ternary.analysis.pictures import require_format
    from tvm_ternary.bench.lines import read_lines
    from tvm_ternary.bench.plot import plot_roofline

    paths = [Path(text) for text in args.output]
    for path in paths:
        require_format(path)
    results = read_lines(Path(args.lines))
    for path in paths:
        plot_roofline(results, path)
    return 0


def _shape(text: str) -> tuple[int, int]:
    match = re.fullmatch("([0-9]+)x([0-9]+)", text)
    if match is None:
        raise OptionError("--shapes", f"got {text!r}; expected NxK", "for example --shapes 4096x4096,2560x6912")
    return whole_number("--shapes", "N", match[1]), whole_number("--shapes", "K", match[2])
