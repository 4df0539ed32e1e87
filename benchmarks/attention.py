"""Attention of a cache and of a prompt, in float32 and over ternary keys and values, beside others' fused kernels.

    python -m benchmarks.attention [--only ROW ...] [--turns N] [--threads N,...]

Every row is one ``tvm-ternary bench attention``, with one thread and with two unless told otherwise. Finished rows are
kept in ``benchmarks/results/attention.jsonl`` and not measured again; ``--only`` measures those named again. Tables are
written to ``benchmarks/results/attention.md``, and drawn beside it. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.kept import bench_lines, measure_missing
from tvm_ternary.bench.attention import AttentionMeasurement
from tvm_ternary.bench.attention_plot import plot_attention
from tvm_ternary.bench.attention_report import attention_table, memory_table
from tvm_ternary.bench.report import markdown as table_text

RESULTS = Path(__file__).resolve().parent / "results" / "attention.jsonl"
STEPS = ("--prompts", "none", "--cached", "1024,4096,16384,32768", "--schemes", "full,t1a8,t1a32,t2a8,t2a32,t3a8,t3a32")
PROMPTS = ("--cached", "none", "--prompts", "512,1024,2048,4096")
ROWS = {
    f"{name} {shape}": ("--shapes", shape, *options)
    for shape in ("32/8x128", "12x64")
    for name, options in (("steps", STEPS), ("prompts", PROMPTS))
}
"""Row to options."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", help=f"rows to measure again: {list(ROWS)}")
    parser.add_argument("--turns", type=int, default=9, help="of each engine (default: %(default)s)")
    parser.add_argument("--threads", default="1,2", help="default: %(default)s")
    args = parser.parse_args()
    common = ("--turns", str(args.turns), "--threads", args.threads)
    lines = measure_missing(RESULTS, ROWS, args.only, lambda row: bench_lines("attention", *ROWS[row], *common))
    text = markdown(lines)
    RESULTS.with_suffix(".md").write_text(text)
    measured = list(map(AttentionMeasurement.from_json, lines))
    if any(one.case.step for one in measured):
        plot_attention(measured, lines[-1]["cpu"], RESULTS.with_suffix(".png"))
    print(text)


def markdown(lines: list[dict[str, Any]]) -> str:
    """The machine, the steps, the prompts, and what the cache of a model takes."""
    if not lines:
        return ""
    last, measured = lines[-1], list(map(AttentionMeasurement.from_json, lines))
    engines = ", ".join(
        f"{name} {last['versions'][name]}" for name in ("onnxruntime", "torch") if name in last["versions"]
    )
    text = f"{last['cpu']}, load before {last['load']:.1f}, {engines}, commit {last['commit']}. "
    text += "A ratio is a peer's time over ours.\n"
    parts = [[one for one in measured if one.case.step is step] for step in (True, False)]
    tables = [attention_table(part) for part in parts if part]
    text += "".join(f"\n{table_text(table)}" for table in (*tables, memory_table(measured[-1].window)))
    return text + (f"\n![steps]({RESULTS.with_suffix('.png').name})\n" if parts[0] else "")


if __name__ == "__main__":
    main()
