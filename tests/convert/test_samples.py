"""Samples from arrays, JSON, text and Python."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tvm_ternary.convert.samples import load_samples, readable_twice
from tvm_ternary.errors import HostError, InputError, OptionError
from tvm_ternary.runtime.manifest import TensorSpec

X = (TensorSpec("x", "float32", ("batch", 3)),)
TEXT = tuple(
    TensorSpec(name, "int64", ("batch", "sequence")) for name in ("input_ids", "attention_mask", "token_type_ids")
)
WORDS = ["[CLS]", "[SEP]", "[UNK]", "a", "b", "c", "d"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A word a token, [CLS] in front and [SEP] behind; the file asks for padding to 16, as those of encoders do."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)])
    made.enable_padding(length=16, pad_id=2, pad_token="[UNK]")
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


def test_rows_of_npz_are_samples(tmp_path: Path) -> None:
    x = np.arange(15, dtype=np.float32).reshape(5, 3)
    np.savez(tmp_path / "data.npz", x=x)
    samples = load_samples(tmp_path / "data.npz", X, 10)
    np.testing.assert_array_equal(np.concatenate([sample["x"] for sample in samples]), x)
    assert all(sample["x"].shape == (1, 3) for sample in samples)


def test_the_seed_chooses_and_keeps_the_order(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.arange(300, dtype=np.float32).reshape(100, 3))

    def chosen(seed: int) -> list[float]:
        return [float(sample["x"][0, 0]) for sample in load_samples(tmp_path / "data.npz", X, 10, seed)]

    assert len(chosen(0)) == 10
    assert chosen(0) == chosen(0) == sorted(chosen(0))
    assert chosen(0) != chosen(1)


def test_lines_of_json(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"x": [1, 2, 3]}\n\n{"x": [[4, 5, 6.5]]}\n')
    first, second = load_samples(path, X, 5)
    assert (first["x"].tolist(), second["x"].tolist()) == ([[1, 2, 3]], [[4, 5, 6.5]])
    assert first["x"].dtype == np.float32
    path.write_text('{"text": "a b"}\n')
    (text,) = load_samples(path, TEXT, 5, tokenizer=tokenizer)
    assert text["input_ids"].tolist() == [[0, 3, 4, 1]]


@pytest.mark.parametrize("name", ["data.txt", "data.cor"])
def test_lines_of_text_are_cut_and_not_padded(tmp_path: Path, tokenizer: Path, name: str) -> None:
    (tmp_path / name).write_text("a b\n\n  c\na b c d a b c d\n")
    got = load_samples(tmp_path / name, TEXT, 5, tokenizer=tokenizer, length=5)
    assert [sample["input_ids"].tolist() for sample in got] == [[[0, 3, 4, 1]], [[0, 5, 1]], [[0, 3, 4, 5, 1]]]
    for sample in got:
        assert list(sample) == [spec.name for spec in TEXT]
        np.testing.assert_array_equal(sample["attention_mask"], np.ones_like(sample["input_ids"]))
        np.testing.assert_array_equal(sample["token_type_ids"], np.zeros_like(sample["input_ids"]))


def test_text_that_is_not_utf8(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "old.cor").write_bytes("a \xe9 b".encode("latin-1"))
    (sample,) = load_samples(tmp_path / "old.cor", TEXT, 1, tokenizer=tokenizer)
    assert sample["input_ids"].tolist() == [[0, 3, 2, 4, 1]]


def test_windows_give_as_many_texts_as_wanted_of_all_lengths(tokenizer: Path) -> None:
    documents = [" ".join("abcd"[i % 4] for i in range(60)), " ".join("dcba"[i % 4] for i in range(60))]
    got = load_samples(documents, TEXT, 24, tokenizer=tokenizer, length=32, windows=True)
    again = load_samples(documents, TEXT, 24, tokenizer=tokenizer, length=32, windows=True)
    lengths = [sample["input_ids"].shape[1] for sample in got]
    assert len(got) == 24
    assert max(lengths) == 32
    assert len(set(lengths)) > 6
    for one, other in zip(got, again, strict=True):
        np.testing.assert_array_equal(one["input_ids"], other["input_ids"])


def test_an_iterable_of_inputs_is_read_once() -> None:
    samples = load_samples(({"x": np.full((2, 3), i, np.float32)} for i in range(4)), X, 2)
    assert [sample["x"].shape for sample in samples] == [(2, 3), (2, 3)]


def test_what_can_be_read_twice(tmp_path: Path) -> None:
    class Entry:
        """A path of another kind, as `os.scandir` gives."""

        def __fspath__(self) -> str:
            return str(tmp_path / "c.npz")

    entry = Entry()
    assert [readable_twice(data) for data in (entry, "c.npz", tmp_path)] == [entry, "c.npz", tmp_path]
    assert readable_twice(iter("ab")) == ["a", "b"]


@pytest.mark.parametrize("item", [3, np.ones(1, np.float32)])
def test_samples_that_are_none(item: Any) -> None:
    with pytest.raises(InputError, match=f"sample 0: is {type(item).__name__}; expected inputs by name, or a text"):
        load_samples([item], X, 1)


def write(path: Path, content: Any) -> Path:
    """A file of the kind that its content is."""
    if isinstance(content, dict):
        np.savez(path / "d.npz", **content)
        return path / "d.npz"
    name = "d.jsonl" if content[:1] in ("{", "[", "?") else "d.txt"
    (path / name).write_text(content)
    return path / name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x": np.zeros((0, 3), np.float32)}, "holds no sample; expected one at least"),
        ("", "holds no sample; expected one at least"),
        ({"x": np.zeros((2, 4), np.float32)}, r"sample 0, input 'x': has shape \[1, 4\]; expected \[batch, 3\]"),
        ({"x": np.zeros((2, 3))}, None),
        ({"x": np.full((2, 3), "a")}, "sample 0, input x: is <U1; expected float32"),
        ({"y": np.zeros((2, 3), np.float32)}, "sample 0, input 'y': no such input; expected 'x'"),
        ({"x": np.zeros((2, 3), np.float32), "y": np.zeros(3)}, r"has \{'x': 2, 'y': 3\} rows"),
        ('{"x": [1, 2, 3]}\n{"x": [1, 2', "d.jsonl, line 2: is no JSON"),
        ("[1]", "d.jsonl, line 1: is no object"),
        ('{"x": [[1, 2], [3]]}', "sample 0, input x: is no array"),
        ('{"x": "text"}', "sample 0, input x: is <U4; expected float32"),
    ],
)
def test_bad_data_are_named(tmp_path: Path, content: Any, message: str | None) -> None:
    path = write(tmp_path, content)
    if message is None:  # numpy's default float is as good
        assert load_samples(path, X, 1)[0]["x"].dtype == np.float32
        return
    with pytest.raises(InputError, match=message) as caught:
        load_samples(path, X, 1)
    assert str(path) in str(caught.value)


def test_files_that_are_not_what_they_are_called(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "d.npz").write_text("no archive")
    with pytest.raises(InputError, match=r"is no \.npz of arrays"):
        load_samples(tmp_path / "d.npz", X, 1)
    with pytest.raises(InputError, match="cannot be read"):
        load_samples(tmp_path / "missing.txt", X, 1)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 1}))
    with pytest.raises(InputError, match=r"tokenizer\.json: is no tokenizer"):
        load_samples(["a"], TEXT, 1, tokenizer=tmp_path / "tokenizer.json")


def test_text_takes_a_tokenizer_and_a_model_of_text(tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match=r"is text, and there is no tokenizer\.json beside the model"):
        load_samples(["a"], TEXT, 1)
    with pytest.raises(InputError, match="is text, but the model takes x"):
        load_samples(["a"], X, 1, tokenizer=tokenizer)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(HostError, match="takes the package tokenizers; pip install tokenizers"):
        load_samples(["a"], TEXT, 1, tokenizer=tokenizer)


@pytest.mark.parametrize("option", [{"samples": 0}, {"samples": 1, "length": 0}])
def test_numbers_below_one(option: dict[str, int]) -> None:
    with pytest.raises(OptionError, match="0, expected at least 1"):
        load_samples([{"x": [1, 2, 3]}], X, **option)
