"""Inputs of a model from a user's data: arrays, lines of JSON, text, or whatever Python iterates over."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.errors import HostError, InputError, OptionError
from tvm_ternary.runtime.inputs import check_inputs
from tvm_ternary.runtime.manifest import TensorSpec

Arrays = dict[str, npt.NDArray[Any]]
Data = str | os.PathLike[str] | Iterable[Mapping[str, Any] | str]

# What the inputs of models of text are called, and what they hold for token numbers without padding.
_TOKENS: dict[str, Callable[[npt.NDArray[np.int64]], npt.NDArray[Any]]] = {
    **dict.fromkeys(("input_ids", "ids", "tokens"), lambda ids: ids),
    **dict.fromkeys(("attention_mask", "mask"), np.ones_like),
    **dict.fromkeys(("token_type_ids", "segment_ids"), np.zeros_like),
    "position_ids": lambda ids: np.broadcast_to(np.arange(ids.shape[1]), ids.shape),
}
_SHORTEST = 8


def find_tokenizer(given: str | Path | None, source: Path) -> Path | None:
    """What cuts text into tokens: what was given, or what lies with the model."""
    own = (source if source.is_dir() else source.parent) / "tokenizer.json"
    return Path(given) if given is not None else own if own.is_file() else None


def load_samples(
    data: Data,
    inputs: Sequence[TensorSpec],
    samples: int,
    seed: int = 0,
    tokenizer: Path | None = None,
    length: int = 128,
    *,
    windows: bool = False,
) -> list[Arrays]:
    """Read samples.

    Parameters
    ----------
    data : path or iterable
        ``.npz``: an array for each input, whose rows are samples; one without rows is of all samples. ``.jsonl``: a
        line for each sample, an object of inputs by name or ``{"text": ...}``. Any other file: text, a document a
        line. An iterable: mappings of inputs by name, or texts.
    inputs : sequence of TensorSpec
        Of the model.
    samples : int
        How many to take at most.
    seed : int
        Which: the same for the same seed and data.
    tokenizer : path, optional
        ``tokenizer.json``; text needs one.
    length : int
        Tokens of a text at most, special ones counted.
    windows : bool
        Text only. Take as many windows of the documents as samples are wanted, every second one of a random length from
        8 tokens on, and all but the first of a document from a random word on: what a model meets in short texts,
        special tokens above all, then counts as well.

    Returns
    -------
    list of dict of str to array
        Each with a leading axis of one sample, as the model takes it.

    Raises
    ------
    InputError
        If the data cannot be read, hold nothing, or do not fit the model; names the file and the sample.
    OptionError
        If a number is below 1, or text is given without a tokenizer.
    HostError
        If text is given and the package ``tokenizers`` is missing.
    """
    for option, value in (("samples", samples), ("length", length)):
        if value < 1:
            raise OptionError(f"option {option}", f"{value}, expected at least 1")
    origin = os.fspath(data) if isinstance(data, str | os.PathLike) else "calibration data"
    items = _items(data)
    if not items:
        raise InputError(origin, "holds no sample; expected one at least")
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(items))
    texts = [_text(item) for item in items]
    encode = _encoder(tokenizer, origin) if any(text is not None for text in texts) else None
    chosen: list[Any] = [items[i] for i in sorted(order[:samples])]
    if encode is not None:
        whole = [text for text in (texts[i] for i in order) if text is not None]
        if windows and len(whole) == len(items):
            chosen = [encode(*_window(whole, i, length, generator)) for i in range(samples)]
        else:
            pairs = [(items[i], texts[i]) for i in sorted(order[:samples])]
            chosen = [item if text is None else encode(text, length) for item, text in pairs]
    return [_sample(f"{origin}, sample {i}", inputs, item) for i, item in enumerate(chosen)]


def readable_twice(data: Data) -> Data:
    """What an iterable gives, once and for all; a path as it is."""
    return data if isinstance(data, str | os.PathLike) else list(data)


def given_names(data: Data) -> set[str]:
    """The inputs that samples name; texts name none.

    Raises
    ------
    InputError
        If a file cannot be read.
    """
    return {name for item in _items(data) if isinstance(item, Mapping) and _text(item) is None for name in item}


def _items(data: Data) -> list[Mapping[str, Any] | str]:
    return list(_read(Path(data)) if isinstance(data, str | os.PathLike) else data)


def _read(path: Path) -> Iterator[Mapping[str, Any] | str]:
    try:
        if path.suffix == ".npz":
            yield from _rows(path)
            return
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(str(path), f"cannot be read ({error.strerror or error})", "check the path") from error
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        # Old corpora; every byte is a character there.
        text = raw.decode("latin-1")
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        yield _object(path, number, line) if path.suffix == ".jsonl" else line.strip()


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(str(path), f"is no .npz of arrays ({error})", "write it with numpy.savez") from error
    rows = {name: len(array) for name, array in arrays.items() if array.ndim}
    if len(set(rows.values())) > 1:
        raise InputError(str(path), f"has {rows} rows; expected as many of each input")
    for row in range(next(iter(rows.values()), 0)):
        yield {name: array[row : row + 1] if array.ndim else array for name, array in arrays.items()}


def _object(path: Path, number: int, line: str) -> Mapping[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InputError(f"{path}, line {number}", f"is no JSON: {error}") from error
    if not isinstance(value, dict) or not value:
        raise InputError(f"{path}, line {number}", "is no object; expected inputs by name, or a text")
    return value


def _text(item: Mapping[str, Any] | str) -> str | None:
    if isinstance(item, str):
        return item
    text = item.get("text") if isinstance(item, Mapping) and len(item) == 1 else None
    return text if isinstance(text, str) else None


def _window(texts: Sequence[str], i: int, length: int, generator: np.random.Generator) -> tuple[str, int]:
    """The i-th text to encode, and how many tokens of it."""
    text = texts[i % len(texts)]
    if i >= len(texts):
        words = text.split()
        text = " ".join(words[int(generator.integers(max(1, len(words) - 3))) :])
    if i % 2 and length > _SHORTEST:
        length = int(np.exp(generator.uniform(np.log(_SHORTEST), np.log(length + 1))))
    return text, length


def _encoder(tokenizer: Path | None, origin: str) -> Callable[[str, int], list[int]]:
    if tokenizer is None:
        raise OptionError(origin, "is text, and there is no tokenizer.json beside the model", "give one: tokenizer")
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise HostError(origin, "is text, which takes the package tokenizers", "pip install tokenizers") from error
    try:
        loaded = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # The package raises nothing more special.
        raise InputError(str(tokenizer), f"is no tokenizer ({error})", "give a tokenizer.json") from error
    loaded.no_padding()

    def encode(text: str, length: int) -> list[int]:
        loaded.enable_truncation(length)
        return list(loaded.encode(text).ids)

    return encode


def _sample(subject: str, inputs: Sequence[TensorSpec], item: Any) -> Arrays:
    """Inputs by name, or token numbers, as the model takes them."""
    if isinstance(item, list):
        item = _of_tokens(subject, inputs, item)
    if not isinstance(item, Mapping):
        raise InputError(subject, f"is {type(item).__name__}; expected inputs by name, or a text")
    specs = {spec.name: spec for spec in inputs}
    arrays = {
        name: _as_input(f"{subject}, input {name}", specs[name], value) if name in specs else value
        for name, value in item.items()
    }
    try:
        checked = check_inputs(tuple(inputs), arrays)
    except InputError as error:
        raise InputError(f"{subject}, {error.subject}", error.problem, error.hint) from error
    return dict(zip(specs, checked, strict=True))


def _of_tokens(subject: str, inputs: Sequence[TensorSpec], tokens: list[int]) -> Arrays:
    if not tokens:
        raise InputError(subject, "is a text without tokens; expected one at least")
    ids = np.array([tokens], dtype=np.int64)
    unknown = [spec.name for spec in inputs if spec.name not in _TOKENS]
    if unknown:
        known = ", ".join(_TOKENS)
        raise InputError(subject, f"is text, but the model takes {', '.join(unknown)}", f"known for text: {known}")
    return {spec.name: _TOKENS[spec.name](ids) for spec in inputs}


def _as_input(subject: str, spec: TensorSpec, value: Any) -> npt.NDArray[Any]:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InputError(subject, f"is no array ({error})") from error
    if array.ndim == len(spec.shape) - 1:
        array = array[None]
    wanted = np.dtype(spec.dtype)
    # Python's numbers have one width; another kind of number is another matter.
    same = array.dtype.kind == wanted.kind or (array.dtype.kind in "iu" and wanted.kind in "iuf")
    if not same or (array.size and wanted.kind in "iu" and not np.array_equal(array.astype(wanted), array)):
        raise InputError(subject, f"is {array.dtype}; expected {wanted}")
    return array.astype(wanted, copy=False)
