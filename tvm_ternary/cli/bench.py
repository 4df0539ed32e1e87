"""``tvm-ternary bench``: how fast the kernels are here, beside others and the machine's limits."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from tvm_ternary.cli.options import add_verb, whole_number
from tvm_ternary.errors import OptionError, OutputError

_SHAPES = "2560x2560,6912x2560,2560x6912,4096x4096,14336x4096,4096x14336"
_ROWS = "1,2,4,8,16,32,128,512"
_SCHEMES = "t1a8,t1a8g128"

_DESCRIPTION = """\
Measure y = x w^T from float32 to float32, ours and other engines in turns in one run. Every answer is checked first.
The floor is what reading the operands or multiplying takes at least on this machine, measured in the same run by C
code; 'reached' is floor / us. Times are medians in microseconds; a ratio is the best peer's median over ours.
"""
_EXAMPLES = """\
  tvm-ternary bench matmul
  tvm-ternary bench matmul --shapes 4096x4096 --rows 1,8 --schemes t1a8,t2a8 --cold --json bench.jsonl
  tvm-ternary bench matmul --shapes 4096x4096 --rows 1 --peers none --target x86-64-v3
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb and its options."""
    parser = add_verb(verbs, "bench", "measure the kernels, beside other engines", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("what", choices=("matmul",), help="what to measure")
    parser.add_argument("--shapes", metavar="NxK,...", default=_SHAPES, help="default: %(default)s")
    parser.add_argument("--rows", metavar="M,...", default=_ROWS, help="default: %(default)s")
    parser.add_argument("--schemes", metavar="NAME,...", default=_SCHEMES, help="default: %(default)s")
    parser.add_argument("--threads", metavar="N", type=int, default=1, help="of every engine (default: %(default)s)")
    parser.add_argument("--cold", action="store_true", help="measure also with weights that come from memory")
    parser.add_argument("--repeat", metavar="N", type=int, default=30, help="timed calls (default: %(default)s)")
    parser.add_argument("--peers", metavar="auto|none|NAME,...", default="auto", help="auto: those installed")
    parser.add_argument("--target", metavar="NAME", default="native", help="one that this host can run")
    parser.add_argument("--json", metavar="FILE", help="append a line of JSON for each row to this file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables and append the lines."""
    shapes = [_shape(text) for text in args.shapes.split(",")]
    rows = [whole_number("--rows", "M", text) for text in args.rows.split(",")]

    from tvm_ternary.bench.machine import machine_facts
    from tvm_ternary.bench.matmul import measure_matmuls
    from tvm_ternary.bench.peers import choose_peers
    from tvm_ternary.bench.report import machine_table, matmul_table, means_table
    from tvm_ternary.cli.progress import show_progress
    from tvm_ternary.cli.tables import print_tables
    from tvm_ternary.files import require_writable
    from tvm_ternary.target import resolve

    target, peers, facts = resolve(args.target), choose_peers(args.peers), machine_facts()
    about = {**facts, "benchmark": "matmul", "threads": args.threads, "target": target.name, "repeat": args.repeat}
    if args.json is not None:
        require_writable(Path(args.json))
    schemes = list(dict.fromkeys(args.schemes.split(",")))
    steps = len(shapes) * len(rows) * len(schemes) * (2 if args.cold else 1)
    options = {"threads": args.threads, "cold": args.cold, "repeat": args.repeat, "target": target}
    measured = []
    with show_progress(quiet=False) as progress:
        assert progress is not None
        progress("measure", 0, steps)
        for one in measure_matmuls(shapes, rows, schemes, peers=peers, **options):
            measured.append(one)
            progress("measure", len(measured), steps)
            if args.json is not None:
                _append(Path(args.json), {**about, **one.as_json()})
    tables = [machine_table(facts, args.threads, target.name), matmul_table(measured)]
    print_tables([*tables, *([means_table(measured)] if peers else [])])
    return 0


def _shape(text: str) -> tuple[int, int]:
    match = re.fullmatch("([0-9]+)x([0-9]+)", text)
    if match is None:
        raise OptionError("--shapes", f"got {text!r}; expected NxK", "for example --shapes 4096x4096,2560x6912")
    return whole_number("--shapes", "N", match[1]), whole_number("--shapes", "K", match[2])


def _append(path: Path, line: dict[str, Any]) -> None:
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, sort_keys=True, allow_nan=False) + "\n")
    except OSError as error:
        raise OutputError(str(path), f"cannot be written ({error.strerror or error})", "choose another") from error
