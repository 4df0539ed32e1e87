"""Quantize to a folder that is gone afterwards: what compiling with calibration data does before anything else."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tvm_ternary.convert.job import quantize_model


@contextmanager
def quantized_first(
    source: Path,
    output: Path,
    options: Mapping[str, Any],
    dims: Mapping[str, int | str] | None,
    constants: Mapping[str, Any] | None,
) -> Iterator[tuple[Path, Mapping[str, int | str] | None, Mapping[str, Any] | None]]:
    """Quantize a model, if there are options for that.

    Parameters
    ----------
    source : path
        The model.
    output : path
        What is compiled; the checkpoint lies beside it meanwhile, and what a killed run finished is used by the next.
    options : mapping
        Arguments of `quantize_model`; empty leaves the model as it is.
    dims, constants : mappings, optional
        What the user fixes.

    Yields
    ------
    model : path
        The model to go on with.
    dims, constants : mappings, optional
        What is still to be fixed in it: a graph of ONNX has it fixed already.
    """
    if not options:
        yield source, dims, constants
        return
    folder = output.with_name(f"{output.name}.quantized")
    is_graph = not source.is_dir()
    try:
        quantize_model(
            source,
            folder,
            **options,
            dims=dims if is_graph else None,
            constants=constants if is_graph else None,
            overwrite=True,
        )
        yield folder, None if is_graph else dims, None if is_graph else constants
    finally:
        shutil.rmtree(folder, ignore_errors=True)
