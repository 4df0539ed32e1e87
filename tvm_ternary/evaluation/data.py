"""What the models are run on: the user's data, or random inputs where there are none."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tvm_ternary.convert.samples import Data, load_samples
from tvm_ternary.errors import OptionError
from tvm_ternary.evaluation.logits import IDS, MASK
from tvm_ternary.evaluation.models import Arrays, Runner, Source
from tvm_ternary.runtime.sample import random_inputs


@dataclass(frozen=True)
class Samples:
    """Inputs by name, one mapping a sample, and a word about where they are from."""

    samples: tuple[Arrays, ...]
    description: str


def find_samples(
    run: Runner,
    model: Source,
    data: Data | None,
    count: int,
    length: int,
    seed: int,
    tokenizer: Source | None,
) -> Samples:
    """Read the data, or make random inputs.

    Parameters
    ----------
    run : Runner
        The float model.
    model : path
        Where it is from; a ``tokenizer.json`` beside it is found.
    data : path, iterable or None
        As `tvm_ternary.convert.samples.load_samples` takes it; None makes random inputs.
    count : int
        How many samples to take at most, or to make.
    length : int
        Longest text in tokens; length of random inputs where the model leaves it open.
    seed : int
    tokenizer : path, optional

    Raises
    ------
    OptionError
        If a number is below 1.
    InputError
        If the data cannot be read, hold nothing, or do not fit the model's inputs.
    """
    for name, value in (("samples", count), ("length", length)):
        if value < 1:
            raise OptionError(f"--{name}", f"is {value}; expected at least 1")
    if data is None:
        made = tuple(_random(run, length, seed + number) for number in range(count))
        return Samples(made, f"{count} random inputs, seed {seed}: they say little about how good a model is")
    name = f"samples of {os.fspath(data)}" if isinstance(data, str | os.PathLike) else "given samples"
    bound = min([length, *(most for dim, most in run.manifest.bounds.items() if dim in _lengths(run))])
    chosen = load_samples(data, run.inputs, count, seed, _tokenizer(model, tokenizer), bound)
    return Samples(tuple(chosen), f"{len(chosen)} {name}")


def _tokenizer(model: Source, given: Source | None) -> Path | None:
    """The given one, or the one that lies in the model's folder."""
    if given is not None:
        return Path(given)
    path = Path(model)
    beside = (path if path.is_dir() else path.parent) / "tokenizer.json"
    return beside if beside.is_file() else None


def _lengths(run: Runner) -> set[int | str]:
    """The dimensions of token numbers that are lengths."""
    return {spec.shape[-1] for spec in run.inputs if spec.name == IDS and spec.shape}


def _random(run: Runner, length: int, seed: int) -> Arrays:
    """Random inputs; token numbers are drawn from the whole vocabulary, and nothing is padded."""
    bounds = run.manifest.bounds
    leading = {spec.shape[0] for spec in run.inputs if spec.shape}
    free = {dim for spec in run.inputs for dim in spec.shape[1:] if isinstance(dim, str)} - leading
    # Where the last dimension of token numbers is open it is a length; other open dimensions may be an image's.
    texts = _lengths(run)
    sizes = {dim: min(length, bounds.get(dim, length)) for dim in free & texts}
    inputs = random_inputs(run.inputs, sizes, seed, bounds)
    if MASK in inputs:
        inputs[MASK] = np.ones_like(inputs[MASK])
    if IDS in inputs:
        ids = np.random.default_rng(seed).integers(0, _vocabulary(run), inputs[IDS].shape)
        inputs[IDS] = ids.astype(inputs[IDS].dtype)
    return inputs


def _vocabulary(run: Runner) -> int:
    """How many tokens there are: the rows of the largest table; 2 where there is none."""
    layers = run.manifest.layers
    tables = [one.shape[0] for one in layers if one.became == "int8" or "table" in (one.reason or "")]
    return max(tables, default=2)
