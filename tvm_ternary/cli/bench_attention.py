"""``tvm-ternary bench attention``: attention over float and ternary keys and values, beside others' fused kernels."""

from __future__ import annotations

import argparse
from pathlib import Path

from tvm_ternary.cli.options import add_verb, whole_number
from tvm_ternary.errors import OptionError

_DESCRIPTION = """\
Measure attention kernels, ours and others' fused ones in turns in one run, after looking at every answer: steps of one
token over a cache, keys and values in float32 (full) or ternary, and prompts, causal and not, with float32 keys or
keys that are made ternary on the way. 'error' is relative, against float64 on what the keys and values stand for;
'loss' is what quantizing random ones changes. 'reached' is the time that reading or multiplying takes at least on this
machine, over ours. A ratio is the median over the turns of a peer's time over ours: above 1 we are faster. The last
table is what the cache of a model takes, with a window of 64 tokens: counted, and measured for one layer.
"""
_EXAMPLES = """\
  tvm-ternary bench attention
  tvm-ternary bench attention --shapes 32/8x128 --cached 4096,32768 --prompts none --schemes full,t2a8 --plot steps.png
  tvm-ternary bench attention --cached none --prompts 512,4096 --prompt-schemes full,t2a8 --threads 2 --json lines.jsonl
"""
_NONE = "none"


def add_parser(what: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``attention`` to what ``bench`` can measure."""
    parser = add_verb(what, "attention", "attention, of a cache and of a prompt", _DESCRIPTION, _EXAMPLES)
    heads = "heads of the queries, of the keys if fewer, and elements of each (default: %(default)s)"
    parser.add_argument("--shapes", metavar="HEADS/KVxSIZE,...", default="32/8x128,12x64", help=heads)
    cached = "tokens that a step attends to, its own among them (default: %(default)s)"
    parser.add_argument("--cached", metavar="N,...|none", default="4096,32768", help=cached)
    prompts = "lengths of prompts (default: %(default)s)"
    parser.add_argument("--prompts", metavar="N,...|none", default="512,1024,2048,4096", help=prompts)
    schemes = "of a step's cache: full, or t{planes 1-3}a{1|8|32} (default: %(default)s)"
    parser.add_argument("--schemes", metavar="NAME,...", default="full,t1a8,t1a32,t2a8,t2a32", help=schemes)
    keys = "of a prompt's keys: full, or t{planes 1-3}a{1|8} (default: %(default)s)"
    parser.add_argument("--prompt-schemes", metavar="NAME,...", default="full,t2a8", help=keys)
    window = "last tokens that a ternary cache holds in float32 (default: %(default)s)"
    parser.add_argument("--window", metavar="N", type=int, default=128, help=window)
    parser.add_argument("--threads", metavar="N,...", default="1,2", help="of every engine (default: %(default)s)")
    turns = "turns of each engine, of one to five timed calls each (default: %(default)s)"
    parser.add_argument("--turns", metavar="N", type=int, default=9, help=turns)
    parser.add_argument("--peers", metavar="auto|none|NAME,...", default="auto", help="auto: those that are here")
    parser.add_argument("--target", metavar="NAME", default="native", help="one that this host can run")
    parser.add_argument("--json", metavar="FILE", help="append a line of JSON for each row")
    plot = "draw time, memory and loss of the steps, and losses on made-up keys by planes: .png, .svg"
    parser.add_argument("--plot", metavar="FILE", action="append", default=[], help=plot)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, append the lines and draw."""
    cached, prompts = (_lengths(name, getattr(args, name)) for name in ("cached", "prompts"))
    threads = [whole_number("--threads", "N", text) for text in args.threads.split(",")]
    if not cached and not prompts:
        raise OptionError("bench attention", "nothing to measure: neither --cached nor --prompts", "give one of them")
    if args.plot and not cached:
        raise OptionError("plot", "shows steps; there is none", "give some with --cached")

    from tvm_ternary.analysis.pictures import require_format
    from tvm_ternary.bench.attention import AttentionMeasurement, cases_of, measure_attention
    from tvm_ternary.bench.attention_case import HeadShape
    from tvm_ternary.bench.attention_engines import CacheScheme
    from tvm_ternary.bench.attention_memory import memory_table
    from tvm_ternary.bench.attention_peers import ATTENTION_PEERS
    from tvm_ternary.bench.attention_plot import plot_attention
    from tvm_ternary.bench.attention_report import attention_table, refusals_table
    from tvm_ternary.bench.lines import append_line
    from tvm_ternary.bench.machine import machine_facts
    from tvm_ternary.bench.peers import absent_peers, choose_peers
    from tvm_ternary.bench.report import machine_table
    from tvm_ternary.cli.progress import show_progress
    from tvm_ternary.cli.tables import print_tables
    from tvm_ternary.files import require_writable
    from tvm_ternary.runtime.threads import thread_count
    from tvm_ternary.target import resolve

    for count in threads:
        thread_count(count)
    shapes = list(dict.fromkeys(map(HeadShape.parse, args.shapes.split(","))))
    schemes, of_prompts = (
        list(dict.fromkeys(map(CacheScheme.parse, names.split(",")))) for names in (args.schemes, args.prompt_schemes)
    )
    for scheme in of_prompts:
        scheme.check_prompt()
    cases = list(cases_of(shapes, cached, prompts, window=args.window))
    peers, target = choose_peers(args.peers, ATTENTION_PEERS), resolve(args.target)
    pictures, lines = [Path(text) for text in args.plot], args.json and Path(args.json)
    for path in (*pictures, *([lines] if lines else [])):
        require_writable(path)
    for path in pictures:
        require_format(path)
    facts, measured = machine_facts(), list[AttentionMeasurement]()
    steps = len(threads) * sum(len(schemes if case.step else of_prompts) for case in cases)
    with show_progress(quiet=False) as progress:
        assert progress is not None
        progress("measure", 0, steps)
        for count in threads:
            options = {"threads": count, "window": args.window, "turns": args.turns, "target": target, "peers": peers}
            for one in measure_attention(cases, schemes, prompt_schemes=of_prompts, **options):
                measured.append(one)
                progress("measure", len(measured), steps)
                if lines:
                    append_line(lines, {**facts, "benchmark": "attention", "turns": args.turns, **one.as_json()})
    absent = absent_peers(ATTENTION_PEERS) if args.peers == "auto" else {}
    left_out = refusals_table(measured)
    tables = [machine_table(facts, max(threads), target.name, absent), attention_table(measured)]
    print_tables([*tables, *([] if left_out is None else [left_out]), memory_table()])
    for path in pictures:
        plot_attention(measured, facts["cpu"], path)
    return 0


def _lengths(name: str, text: str) -> list[int]:
    return [] if text == _NONE else [whole_number(f"--{name}", "N", one) for one in text.split(",")]
