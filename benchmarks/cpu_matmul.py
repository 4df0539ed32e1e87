"""The whole matmul benchmark: every shape and M, one thread and all, and AVX2 code beside an llama.cpp without AVX-512.

    python benchmarks/cpu_matmul.py [--threads 1,2] [--llama-avx2 DIR] [--shapes ...] [--rows ...]

Each part is a `tvm-ternary bench matmul` in a process of its own: onnxruntime's pool has one size a process, and a
process loads one build of llama.cpp. Writes benchmarks/results/cpu_matmul-CPU.jsonl, anew unless --only names a part,
and from these lines a roofline (.png, .svg) and tables (.md). Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tvm_ternary.bench.lines import Results, read_lines
from tvm_ternary.bench.machine import cpu_name
from tvm_ternary.bench.matmul import COLD_ROWS
from tvm_ternary.bench.means import means_table, scaling_table
from tvm_ternary.bench.measurement import Measurement
from tvm_ternary.bench.peers.llama_cpp import FOLDER
from tvm_ternary.bench.plot import plot_roofline
from tvm_ternary.bench.report import left_out_table, limits_table, machine_table, markdown, matmul_table
from tvm_ternary.bench.timing import geometric_mean
from tvm_ternary.runtime.threads import default_threads
from tvm_ternary.target import resolve

SHAPES = "2560x2560,6912x2560,2560x6912,4096x4096,14336x4096,4096x14336"
# Beside its smooth neighbour: no divisor shall be needed.
RAGGED, NEIGHBOUR = (4097, 4099), (4096, 4096)
ROWS = "1,2,4,8,16,32,128,512"
# The first one is the yardstick of what the others cost.
SCHEMES = "t1a8,t1a8pt,t1a8g128,t1a8g64,t1a8g32,t2a8,t1a32,t1a1"
# Whose rows are listed one by one; the others' are in the lines.
LISTED = ("t1a8", "t1a8g128")
AVX2 = "x86-64-v3"


@dataclass(frozen=True)
class Part:
    """A process."""

    name: str
    threads: int
    target: str
    schemes: str
    peers: str = "auto"
    cold: bool = True
    llama: str | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = ",".join(map(str, sorted({1, default_threads()})))
    parser.add_argument("--threads", default=everything, help="a part for each (default here: %(default)s)")
    parser.add_argument(
        "--llama-avx2", metavar="DIR", help="ggml's libraries built without AVX-512; no such part without"
    )
    parser.add_argument("--only", metavar="PART,...", help="threads-1, ..., avx2; results of the others are kept")
    parser.add_argument("--shapes", default=f"{SHAPES},{RAGGED[0]}x{RAGGED[1]}")
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    parts = list_parts(args)
    args.output.mkdir(parents=True, exist_ok=True)
    lines = args.output / f"cpu_matmul-{re.sub('[^a-z0-9]+', '-', cpu_name().lower()).strip('-')}.jsonl"
    if args.only is None:
        lines.unlink(missing_ok=True)
    for part in parts:
        measure(part, args.shapes, args.rows, lines)
    results = read_lines(lines)
    for suffix in (".png", ".svg"):
        plot_roofline(results, lines.with_suffix(suffix))
    lines.with_suffix(".md").write_text("\n".join(report(results)), encoding="utf-8")
    print(lines.with_suffix(".md"))


def list_parts(args: argparse.Namespace) -> list[Part]:
    """The parts that the options ask for."""
    parts = [Part(f"threads-{count}", int(count), "native", SCHEMES) for count in args.threads.split(",")]
    if args.llama_avx2 is not None:
        peers = "llama-tq2_0,llama-q4_0"
        parts.append(Part("avx2", 1, AVX2, "t1a8,t1a8g128", peers, cold=False, llama=args.llama_avx2))
    chosen = [part.name for part in parts] if args.only is None else args.only.split(",")
    unknown = set(chosen) - {part.name for part in parts}
    if unknown:
        sys.exit(f"--only: no part {', '.join(sorted(unknown))}; expected some of {', '.join(p.name for p in parts)}")
    return [part for part in parts if part.name in chosen]


def measure(part: Part, shapes: str, rows: str, lines: Path) -> None:
    """Run a part; its lines are appended as they come."""
    print(part.name, file=sys.stderr, flush=True)
    options = {"shapes": shapes, "rows": rows, "schemes": part.schemes, "threads": part.threads}
    options |= {"target": part.target, "peers": part.peers, "json": lines}
    command = [sys.executable, "-m", "tvm_ternary", "bench", "matmul"]
    command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    if part.cold and min(map(int, rows.split(","))) <= COLD_ROWS:
        command.append("--cold")
    environment = os.environ | ({FOLDER: part.llama} if part.llama is not None else {})
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def report(results: Results) -> Iterator[str]:
    """Tables as Markdown: for each target and number of threads the limits, the means, then every row."""
    yield f"# y = x w^T by a ternary w on {results.facts['cpu']}\n\nMade by `benchmarks/cpu_matmul.py`; do not edit.\n"
    groups: dict[tuple[str, int], list[Measurement]] = {}
    for one in results.measurements:
        groups.setdefault((one.target, one.threads), []).append(one)
    native = resolve("native").name
    for (target, threads), group in groups.items():
        smooth = [one for one in group if (one.n, one.k) != RAGGED]
        yield f"\n## {target}, {threads} thread{'s' if threads > 1 else ''}\n"
        yield markdown(machine_table(results.facts, threads, target, {}))
        if (target, threads) in results.limits:
            yield markdown(limits_table(results.limits[target, threads]))
        yield markdown(means_table(smooth or group))
        if threads > 1 and (native, 1) in groups:
            yield markdown(scaling_table(groups[native, 1], smooth))
        yield from ragged(group)
        left_out = left_out_table(group)
        if left_out is not None:
            yield markdown(left_out)
        yield markdown(matmul_table([one for one in group if one.scheme in LISTED]))


def ragged(group: Sequence[Measurement]) -> Iterator[str]:
    """What a shape without divisors costs, of its neighbour's time a multiplication."""
    cases = {(one.n, one.k, one.m, one.scheme, one.cache): one for one in group}
    ratios: dict[str, list[float]] = {}
    for (n, k, m, scheme, cache), one in cases.items():
        neighbour = cases.get((*NEIGHBOUR, m, scheme, cache))
        if (n, k) == RAGGED and neighbour is not None:
            ratios.setdefault(scheme, []).append(one.time.median / neighbour.time.median)
    for scheme, values in ratios.items():
        yield (
            f"{scheme}: {RAGGED[0]} x {RAGGED[1]} takes {geometric_mean(values):.2f} of the time of "
            f"{NEIGHBOUR[0]} x {NEIGHBOUR[1]}, at most {max(values):.2f}.\n"
        )


if __name__ == "__main__":
    main()
