"""Run the onnx package's node tests through the importer, and write which operators pass: ``docs/operators.md``.

    python -m tests.graph.onnx.node_table [--only REGEX] [--jobs N]

Every case is imported, compiled and run in a process of its own, with a time limit. Results are kept in
``.cache/node_tests.json`` and not made again; ``--only`` makes those again whose operator or name matches, ``--only .``
all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import onnx

from tests.graph.onnx.node_cases import BOUND, NodeCase, node_cases
from tvm_ternary.files import atomic_path
from tvm_ternary.graph.onnx.operators.contrib.table import CONTRIB
from tvm_ternary.graph.onnx.operators.table import known_operators

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / ".cache" / "node_tests.json"
TABLE = ROOT / "docs" / "operators.md"
EMPTY = "an input has no elements, and a dimension is taken for at least 1"
LIMIT = 120
"""Seconds for one case."""

HEAD = """# Operators

Made by `python -m tests.graph.onnx.node_table` with onnx {version}.

The yardstick are the node tests of the onnx package (`onnx.backend.test`). Each is imported, compiled for this machine
and run, and its outputs have to agree with the case's within its own tolerance (in half precision, four units in the
last place). A case also counts for its operator where its model holds the function body that the standard composes the
operator of.

**{passed} of the {numeric} node tests whose tensors are numeric pass ({percent:.1f}%).** {others} more are on strings,
sequences and optionals, which the importer does not carry.

Inputs stay inputs unless they are named under "known at import": those are bound to the case's values, as
`--constant NAME=VALUE` does. Tensors of float8, float4 and of integers below 8 bits are carried as weights
only: an input of such a type is bound where others are left, and a case with an output of such a type fails. Inputs
without elements are given to the compiled module as they are; the runtime that comes with a library refuses them.

| operator | opsets | known at import | node tests passed |
|---|---|---|---|
"""

CONTRIB_HEAD = """
## Operators of com.microsoft

The onnx package has no node tests of these; our own compare them with onnxruntime.

"""


def run(case: NodeCase) -> str | None:
    """Why a case fails, None where it passes."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_report, args=(case, theirs))
    process.start()
    theirs.close()
    try:
        reason = ours.recv() if ours.poll(LIMIT) else f"takes more than {LIMIT} s"
    except EOFError:
        reason = "crashes"
    process.kill()
    process.join()
    return None if reason is None else str(reason)


def _report(case: NodeCase, to: Connection) -> None:
    """Run in a process of its own, whose streams take what TVM prints."""
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    try:
        case.check()
    except Exception as error:
        to.send(EMPTY if case.has_empty_input else _reason(error))
    else:
        to.send(None)


def _reason(error: Exception) -> str:
    """The first line of an error, without what the table says anyway."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    problem = re.sub(r"^\S+: operator (\S+) of \S+ opset \d+:? ", r"\1: ", lines[0])
    return problem.split("; ")[0][:200]


def run_all(cases: Sequence[NodeCase], jobs: int) -> None:
    """Run cases side by side and keep each result at once."""
    RESULTS.parent.mkdir(exist_ok=True)
    results = read_results()
    with ThreadPoolExecutor(jobs) as pool:
        for count, (case, reason) in enumerate(zip(cases, pool.map(run, cases), strict=True), start=1):
            results[case.name] = reason
            if count % 25 == 0 or count == len(cases):
                with atomic_path(RESULTS) as path:
                    path.write_text(json.dumps(results, indent=0))
                print(f"{count} of {len(cases)}", flush=True)


def read_results() -> dict[str, str | None]:
    """What earlier runs found, by case."""
    with contextlib.suppress(FileNotFoundError):
        return dict(json.loads(RESULTS.read_text()))
    return {}


def write_table(results: Mapping[str, str | None]) -> None:
    """Write ``docs/operators.md``."""
    numeric = [case for case in node_cases() if case.is_numeric]
    by_op: dict[str, list[NodeCase]] = {op: [] for op in known_operators()}
    for case in numeric:
        by_op.setdefault(case.op, []).append(case)
    passed = {case.name for case in numeric if results[case.name] is None}
    text = HEAD.format(
        version=onnx.__version__,
        passed=len(passed),
        numeric=len(numeric),
        percent=100 * len(passed) / len(numeric),
        others=len(node_cases()) - len(numeric),
    )
    for op, cases in sorted(by_op.items()):
        score = f"{sum(case.name in passed for case in cases)} of {len(cases)}" if cases else "has none"
        text += f"| {op} | {_opsets(op)} | {_bound_names(op)} | {score} |\n"
    text += "\n## What fails\n\n"
    for op, cases in sorted(by_op.items()):
        reasons = defaultdict(list)
        for case in cases:
            if case.name not in passed:
                reasons[results[case.name]].append(f"`{case.name}`")
        for reason, names in reasons.items():
            text += f"- **{op}**: {reason}. {', '.join(names)}\n"
    text += CONTRIB_HEAD + "\n".join(f"- {op}" for op in sorted(CONTRIB)) + "\n"
    with atomic_path(TABLE) as path:
        path.write_text(text)


def _schemas(op: str) -> list[onnx.defs.OpSchema]:
    """All versions of an operator, the oldest first."""
    domain, _, name = op.rpartition(".")
    found = [s for s in onnx.defs.get_all_schemas_with_history() if (s.domain, s.name) == (domain, name)]
    return sorted(found, key=lambda schema: int(schema.since_version))


def _opsets(op: str) -> str:
    """From the version that brought it to the newest, or to the last before it was withdrawn."""
    schemas = _schemas(op)
    if not schemas:
        return ""
    withdrawn = [schema.since_version for schema in schemas if schema.deprecated]
    last = withdrawn[0] - 1 if withdrawn else onnx.defs.onnx_opset_version() if "." not in op else "newest"
    return f"{schemas[0].since_version} to {last}"


def _bound_names(op: str) -> str:
    schemas = _schemas(op)
    names = [formal.name for formal in schemas[-1].inputs] if schemas else []
    return ", ".join(f"`{names[slot]}`" for slot in BOUND.get(op, ()))


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="REGEX", help="run cases again whose operator or name matches")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    cases = [case for case in node_cases() if case.is_numeric]
    if options.only:
        chosen = [c for c in cases if re.search(options.only, c.op) or re.search(options.only, c.name)]
    else:
        chosen = [c for c in cases if c.name not in read_results()]
    run_all(chosen, options.jobs)
    results = read_results()
    if options.only:
        for case in chosen:
            print(f"{case.name}: {results[case.name] or 'passes'}")
    if all(case.name in results for case in cases):
        write_table(results)


if __name__ == "__main__":
    main()
