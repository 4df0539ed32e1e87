"""Attention of a cache and of a prompt beside others' fused kernels: what is aimed at, and what is reached.

    python -m benchmarks.attention [--only ROW ...] [--turns N] [--threads N,...]

Every row is one ``tvm-ternary bench attention``, with one thread and with two unless told otherwise. Finished rows are
kept in ``benchmarks/results/attention.jsonl`` and not measured again; ``--only`` measures those named again. Tables are
written to ``benchmarks/results/attention.md``, and drawn beside it. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.kept import bench_lines, measure_missing
from tvm_ternary.analysis.report import Table
from tvm_ternary.bench.attention import AttentionMeasurement
from tvm_ternary.bench.attention_memory import memory_table
from tvm_ternary.bench.attention_plot import plot_attention
from tvm_ternary.bench.attention_report import attention_table
from tvm_ternary.bench.report import markdown as table_text

RESULTS = Path(__file__).resolve().parent / "results" / "attention.jsonl"
STEPS = ("--prompts", "none", "--cached", "1024,4096,16384,32768", "--schemes", "full,t1a8,t1a32,t2a8,t2a32,t3a8,t3a32")
PROMPTS = ("--cached", "none", "--prompts", "512,1024,2048,4096", "--prompt-schemes")
ROWS = {
    f"{name} {shape}": ("--shapes", shape, *options)
    for shape in ("32/8x128", "12x64")
    for name, options in (
        ("steps", STEPS),
        ("prompts", (*PROMPTS, "full")),
        ("prompts, ternary keys,", (*PROMPTS, "t1a8,t2a8")),
    )
}
"""Row to options."""

FLOAT32, BFLOAT16 = ("ort-gqa", "ort-mha", "torch-float32"), ("torch-bf16",)
Aims = Mapping[tuple[str, ...], float]
STEP_AIMS: Mapping[int, Aims] = {1: {FLOAT32: 5, BFLOAT16: 2.5}, 2: {FLOAT32: 3, BFLOAT16: 1.5}}
"""Planes to how often ours is to fit into the time of the best of some peers, with `AIM_CACHED` tokens."""
AIM_CACHED = (4096, 32768)
PROMPT_AIMS: Mapping[bool, Aims] = {False: {FLOAT32: 1}, True: {FLOAT32: 1.5}}
"""Whether keys are ternary to the same."""
CAUSAL_AIM = 0.6
"""Of a prompt that is not causal, what one that is may take."""


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
    """The machine, the ratios beside what is aimed at, all steps, all prompts, and what the cache of a model takes."""
    if not lines:
        return ""
    last, measured = lines[-1], list(map(AttentionMeasurement.from_json, lines))
    engines = ", ".join(
        f"{name} {last['versions'][name]}" for name in ("onnxruntime", "torch") if name in last["versions"]
    )
    text = f"{last['cpu']}, load before {last['load']:.1f}, {engines}, commit {last['commit']}. "
    text += "A ratio is a peer's time over ours; in brackets what is aimed at.\n"
    parts = [[one for one in measured if one.case.step is step] for step in (True, False)]
    tables = [attention_table(part) for part in parts if part]
    text += "".join(f"\n{table_text(table)}" for table in (aims_table(measured), *tables, memory_table()))
    return text + (f"\n![steps]({RESULTS.with_suffix('.png').name})\n" if parts[0] else "")


def aims_table(measured: Sequence[AttentionMeasurement]) -> Table:
    """A row for each measurement of which something is promised, and whether it is kept."""
    columns = ("heads", "kind", "tokens", "threads", "cache", "ms", "best float32", "bfloat16", "of non-causal", "met")
    rows = [_aims(one) for one in measured if _aims_of(one)]
    return Table(columns, tuple(rows), frozenset({2, 3, 5, 6, 7, 8}))


def _aims_of(one: AttentionMeasurement) -> Aims:
    if not one.case.step:
        return PROMPT_AIMS[bool(one.scheme.planes)]
    return STEP_AIMS.get(one.scheme.planes, {}) if one.case.keys in AIM_CACHED else {}


def _aims(one: AttentionMeasurement) -> tuple[str, ...]:
    aims, cells, kept = _aims_of(one), [], list[bool | None]()
    for peers in (FLOAT32, BFLOAT16):
        # The best peer is the one that comes closest.
        ratio = min((one.ratios[name] for name in peers if name in one.ratios), default=None)
        cells.append(_beside(ratio, aims.get(peers)))
        if peers in aims:
            kept.append(None if ratio is None else ratio >= aims[peers])
    cells.append(_beside(one.causal_share, CAUSAL_AIM if one.case.causal else None))
    if one.case.causal:
        kept.append(None if one.causal_share is None else one.causal_share <= CAUSAL_AIM)
    met = "no" if False in kept else "not measured" if None in kept else "yes"
    case = [str(one.case.shape), one.case.kind, str(one.case.keys), str(one.threads), str(one.scheme)]
    return (*case, f"{one.time.median / 1e3:.3f}", *cells, f"**{met}**" if met != "yes" else met)


def _beside(value: float | None, aim: float | None) -> str:
    shown = "" if value is None else f"{value:.2f}"
    return shown if aim is None else f"{shown} ({aim:g})".strip()


if __name__ == "__main__":
    main()
