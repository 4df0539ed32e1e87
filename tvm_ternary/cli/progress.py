"""Progress on standard error: a bar on a terminal, a line a stage elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

Callback = Callable[[str, int, int], None]


@contextmanager
def show_progress(quiet: bool) -> Iterator[Callback | None]:
    """Yield what `tvm_ternary.compile` takes as ``progress``; None when ``quiet``."""
    if quiet:
        yield None
        return
    console = Console(file=sys.stderr, highlight=False)
    if not console.is_terminal:
        yield _stage_lines
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        yield report


def _stage_lines(stage: str, done: int, total: int) -> None:
    if done == 0:
        print(f"{stage} ..." if total == 1 else f"{stage}, {total} steps ...", file=sys.stderr, flush=True)
