"""``tvm-ternary tune``: search the fastest schedule for the matrices of a model, or for shapes given by hand."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvm_ternary.cli.options import add_json, add_verb, constant, parse_pairs, print_json, size_or_name, whole_number
from tvm_ternary.cli.text import printable
from tvm_ternary.errors import HostError, OptionError
from tvm_ternary.target import Target, target_names

if TYPE_CHECKING:
    from tvm_ternary.tuning.report import TaskResult, TuningReport
    from tvm_ternary.tuning.task import Task
    from tvm_ternary.tuning.tuner import Options

_DESCRIPTION = f"""\
Measure which tiles and variants make each ternary matmul fastest. What is measured goes to a folder, a line a
candidate; a call that was ended, in whatever way, is gone on with by the next. 'compile --tuning-log DIR' uses it. The
table at the end has microseconds of the default schedule and of the best one found, measured in turns at the end.
For a GPU that is elsewhere, --export-candidates builds candidates here, to be measured there by a Python script that
needs neither tvm nor a compiler, and --import-results takes what it has measured.

targets   {", ".join(target_names())}, or a TVM target as JSON; native is this CPU
schemes   as for 'compile': t1a8, t3a8g64, ...
"""
_EXAMPLES = """\
  tvm-ternary tune model.onnx --scheme t1a8g128 --work-dir tuned
  tvm-ternary compile model.onnx -o model.so --scheme t1a8g128 --tuning-log tuned
  tvm-ternary tune --op linear --shape 4096,4096 --m 1,8,128 --scheme t1a8 --trials 64
  tvm-ternary tune model.onnx --rpc-tracker 192.0.2.7:9190 --rpc-key xeon --target avx512-vnni
  tvm-ternary tune model.onnx --target cuda-sm_90 --export-candidates batch --work-dir tuned
  tvm-ternary tune --import-results batch/results.jsonl --work-dir tuned
  tvm-ternary tune --prune tuned --prune tuned-elsewhere -o tuning_logs/avx512-vnni
"""
_ROWS = "1,8,128"


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb and its options."""
    parser = add_verb(verbs, "tune", "search the fastest schedules by measuring", _DESCRIPTION, _EXAMPLES)
    _add_work(parser)
    _add_search(parser)
    parser.add_argument("--rpc-tracker", metavar="HOST:PORT", help="measure on the servers of this TVM RPC tracker")
    parser.add_argument("--rpc-key", metavar="KEY", help="the key that these servers registered with")
    parser.add_argument("--export-candidates", metavar="DIR", help="only build candidates, to measure them elsewhere")
    parser.add_argument("--import-results", metavar="FILE", help="only record what was measured there")
    parser.add_argument("--prune", metavar="DIR", action="append", help="only merge logs: the best of each workload")
    parser.add_argument("-o", "--output", metavar="DIR", help="with --prune: the log to write")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    add_json(parser)
    parser.set_defaults(run=run)


def _add_work(parser: argparse.ArgumentParser) -> None:
    """Add what is to be tuned."""
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="the .onnx file or checkpoint folder whose matrices to tune for"
    )
    parser.add_argument("--op", choices=("linear",), help="instead of a model: shapes of this operator")
    parser.add_argument("--shape", metavar="N,K", action="append", default=[], help="with --op; may be repeated")
    parser.add_argument("--m", metavar="M,...", default=_ROWS, help="rows of activations (default: %(default)s)")
    parser.add_argument("--target", default="native", help="what to tune for (default: %(default)s)")
    parser.add_argument("--scheme", help="what matrices are, as for 'compile' (default: t3a8g64)")
    parser.add_argument("--layers", metavar="PATTERN[=SCHEME]", action="append", help="as for 'compile'")
    parser.add_argument("--dim", metavar="NAME=VALUE", action="append", default=[], help="as for 'compile'")
    parser.add_argument("--constant", metavar="INPUT=VALUE", action="append", default=[], help="as for 'compile'")


def _add_search(parser: argparse.ArgumentParser) -> None:
    """Add how it is tuned."""
    parser.add_argument("--work-dir", metavar="DIR", help="the log to go on with (default: tuning/TARGET-THREADSt)")
    parser.add_argument("--trials", metavar="N", type=int, default=64, help="candidates a task (default: %(default)s)")
    parser.add_argument("--time-limit", metavar="S", type=float, help="seconds after which no more are tried")
    parser.add_argument("--cost-model", metavar="xgb|random", default="xgb", help="default: %(default)s")
    parser.add_argument("--threads", metavar="N|all", default="1", help="of a candidate (default: %(default)s)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of what is random (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Tune, export, import or prune, and print what came of it."""
    if args.prune or args.output:
        return _prune(args)
    if args.import_results:
        return _import(args)
    rows = [whole_number("--m", "M", text) for text in args.m.split(",")]
    if 0 in rows:
        raise OptionError("--m", f"got {args.m!r}; expected rows of at least 1")

    from tvm_ternary.target import resolve
    from tvm_ternary.tuning.extract import for_threads, realize_for
    from tvm_ternary.tuning.tuner import tune

    if (args.rpc_tracker is None) != (args.rpc_key is None):
        raise OptionError("--rpc-tracker", "goes with --rpc-key; expected both or neither")
    target = resolve(args.target)
    options = _options(args, target)
    cuda = target.kind == "cuda"
    work_dir = args.work_dir or str(Path("tuning") / (target.name if cuda else f"{target.name}-{options.threads}t"))
    tasks = _tasks(args, rows, target)
    if args.export_candidates:
        return _export(args, tasks, target, options, work_dir)
    tasks = tasks if cuda else for_threads(tasks, options.threads)
    with _show_progress(args.quiet or args.json) as progress:
        report = tune(tasks, work_dir, target, realize_for(target), options, progress=progress, notice=_notice)
    return _print_report(args, report)


def _options(args: argparse.Namespace, target: Target) -> Options:
    from tvm_ternary.runtime.threads import thread_count
    from tvm_ternary.tuning.rpc import Tracker
    from tvm_ternary.tuning.tuner import Options

    threads = thread_count(None if args.threads == "all" else whole_number("--threads", "N", args.threads))
    if target.kind == "cuda" and threads != 1:
        raise OptionError("--threads", f"is {args.threads}; one thread launches what a GPU computes", "leave it out")
    return Options(
        trials=args.trials,
        time_limit=args.time_limit,
        cost_model=args.cost_model,
        threads=threads,
        seed=args.seed,
        tracker=None if args.rpc_tracker is None else Tracker.parse(args.rpc_tracker, args.rpc_key),
    )


def _print_report(args: argparse.Namespace, report: TuningReport) -> int:
    if args.json:
        print_json(report.as_json())
    else:
        from tvm_ternary.cli.tables import print_tables
        from tvm_ternary.tuning.report import errors_table, results_table

        print_tables([results_table(report), *([errors_table(report)] if report.errors else [])])
    if report.complaint is not None:
        raise HostError("tune", report.complaint, f"look into {report.work_dir}")
    return 0


def _export(args: argparse.Namespace, tasks: Sequence[Task], target: Target, options: Options, work_dir: str) -> int:
    if args.rpc_tracker or args.time_limit:
        raise OptionError("--export-candidates", "measures nothing; expected no --rpc-tracker and no --time-limit")

    from tvm_ternary.cli.text import write_out
    from tvm_ternary.tuning.batch.export import export_candidates
    from tvm_ternary.tuning.extract import realize_for

    def progress(task: str, done: int, count: int) -> None:
        if not (args.quiet or args.json):
            print(printable(f"{task}: library {done} of {count} ..."), file=sys.stderr, flush=True)

    realize = realize_for(target)
    folder = args.export_candidates
    report = export_candidates(tasks, folder, target, realize, options, work_dir=work_dir, progress=progress)
    for reason, count in report.errors:
        _notice(f"{count} candidates left out: {reason}")
    if args.json:
        print_json(report.as_json())
        return 0
    what = f"{sum(report.candidates.values())} candidates of {len(report.candidates)} tasks, {report.bytes >> 20} MiB"
    write_out(f"{printable(report.path)}: {what}; measure them on a GPU with 'python3 measure.py' in there\n")
    return 0


def _import(args: argparse.Namespace) -> int:
    if args.model or args.op or args.export_candidates or not args.work_dir:
        raise OptionError("--import-results", "expected --work-dir DIR, the log to write, and nothing to tune")

    from tvm_ternary.tuning.batch.results import import_results

    return _print_report(args, import_results(args.import_results, args.work_dir, _notice))


def _prune(args: argparse.Namespace) -> int:
    if not (args.prune and args.output) or args.model or args.op:
        raise OptionError("--prune", "expected --prune DIR, perhaps several, with -o DIR, and nothing to tune")

    from tvm_ternary.cli.text import write_out
    from tvm_ternary.tuning.log import prune

    kept = prune(args.prune, args.output, _notice)
    if args.json:
        print_json({"path": args.output, "records": kept})
    else:
        write_out(f"{printable(args.output)}: {kept} records\n")
    return 0


def _tasks(args: argparse.Namespace, rows: list[int], target: Target) -> Sequence[Task]:
    from tvm_ternary.compiler import DEFAULT_SCHEME
    from tvm_ternary.tuning.extract import linear_tasks, model_tasks

    scheme = args.scheme or DEFAULT_SCHEME
    if (args.model is None) == (args.op is None):
        raise OptionError("tune", "expected a model or --op linear, and not both", "see 'tvm-ternary tune --help'")
    if args.model is not None:
        if args.shape:
            raise OptionError("--shape", "is for --op linear; a model has shapes of its own", "leave it out")
        dims = parse_pairs("--dim", args.dim, "batch=1")
        sizes = {name: size_or_name("--dim", name, text) for name, text in dims.items()}
        values = parse_pairs("--constant", args.constant, "sr=16000")
        constants = {name: constant(name, text) for name, text in values.items()}
        layers = args.layers or "all"
        return model_tasks(args.model, target, rows, scheme=scheme, layers=layers, dims=sizes, constants=constants)
    if not args.shape:
        raise OptionError("--op linear", "needs --shape N,K", "for example --shape 4096,4096")
    if args.layers or args.dim or args.constant:
        raise OptionError("--op linear", "has no --layers, --dim or --constant: they are for a model", "leave them out")
    return linear_tasks([_shape(text) for text in args.shape], target, rows, scheme=scheme)


def _shape(text: str) -> tuple[int, int]:
    match = re.fullmatch("([0-9]+),([0-9]+)", text)
    sizes = (
        [whole_number("--shape", name, part) for name, part in zip("NK", match.groups(), strict=True)] if match else []
    )
    if not sizes or 0 in sizes:
        raise OptionError("--shape", f"got {text!r}; expected N,K, both at least 1", "for example --shape 4096,4096")
    return sizes[0], sizes[1]


def _notice(text: str) -> None:
    print(f"note: {printable(text)}", file=sys.stderr, flush=True)


@contextmanager
def _show_progress(quiet: bool) -> Iterator[Callable[[TaskResult, int], None]]:
    """Yield what the tuner takes as ``progress``: a bar a task on a terminal, a line for each new best elsewhere."""
    if quiet:
        yield lambda result, trials: None
        return

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(file=sys.stderr, highlight=False)
    if not console.is_terminal:
        yield _Lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[best]}"))
    with Progress(*columns, console=console, transient=True) as bars:
        shown: dict[str, Any] = {}

        def report(result: TaskResult, trials: int) -> None:
            if result.name not in shown:
                shown[result.name] = bars.add_task(printable(result.name), total=trials, best="")
            bars.update(shown[result.name], completed=result.trials, best=_best(result))

        yield report


class _Lines:
    """Prints a line when a task has a new best candidate."""

    def __init__(self) -> None:
        self._best: dict[str, float | None] = {}

    def __call__(self, result: TaskResult, trials: int) -> None:
        if result.after != self._best.get(result.name):
            self._best[result.name] = result.after
            line = f"{result.name}: {result.trials} of {trials}, {_best(result)} ..."
            print(printable(line), file=sys.stderr, flush=True)


def _best(result: TaskResult) -> str:
    from tvm_ternary.tuning.report import microseconds

    parts = [
        *([f"best {microseconds(result.after)} us"] if result.after is not None else []),
        *([f"{result.failures} failed"] if result.failures else []),
    ]
    return ", ".join(parts)
