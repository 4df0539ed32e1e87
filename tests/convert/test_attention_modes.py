"""Which attentions keep what: options that are read, choices that are made, and what cannot be."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.models import gpt2
from tvm_ternary.convert.attention import Errors
from tvm_ternary.convert.attention_modes import apply_choices, choose_caches, read_modes, read_planes
from tvm_ternary.errors import OptionError
from tvm_ternary.graph.importer import ImportedModel, import_onnx
from tvm_ternary.target import resolve

NAMES = ["past.0.key", "past.1.key"]


@pytest.fixture(scope="module")
def decoder() -> ImportedModel:
    return import_onnx(gpt2(cache="both"))


def choose(model: ImportedModel, modes: Any, **options: Any) -> dict[str, tuple[Any, ...]]:
    choices = choose_caches(model, read_modes(modes), (2, 1), 64, **options)
    return {
        name: tuple((c.heads, c.mode, c.key_planes, c.value_planes, c.window) for c in of_heads)
        for name, of_heads in choices.items()
    }


@pytest.mark.parametrize(
    ("given", "modes"),
    [
        (None, {}),
        ("full", {"": "full"}),
        ("a=full", {"a": "full"}),
        (["0=full", "ternary-keys"], {"0": "full", "": "ternary-keys"}),
        ({"a|b": "adaptive"}, {"a|b": "adaptive"}),
    ],
)
def test_modes(given: Any, modes: dict[str, str]) -> None:
    assert read_modes(given) == modes


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("half", "attention 'half': does not exist; choose one of full, ternary-keys, ternary-keys-values, adaptive"),
        ("a=", "attention '': does not exist"),
        ("(=full", r"attention '\(': is no regular expression"),
    ],
)
def test_modes_that_are_none(given: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        read_modes(given)


@pytest.mark.parametrize(("given", "planes"), [(2, (2, 2)), ("3", (3, 3)), ("2,1", (2, 1)), ((1, 3), (1, 3))])
def test_planes(given: Any, planes: tuple[int, int]) -> None:
    assert read_planes(given) == planes


@pytest.mark.parametrize("given", [0, 4, "2,1,1", "", "two", (2, 0), 1.5])
def test_planes_that_are_none(given: Any) -> None:
    with pytest.raises(OptionError, match="is no number of planes; expected 1 to 3, or two of them: 2,1"):
        read_planes(given)


def test_choices(decoder: ImportedModel) -> None:
    assert choose(decoder, None) == choose(decoder, "full") == {}
    both = ((4, "ternary-keys-values", 2, 1, 64),)
    assert choose(decoder, "ternary-keys-values") == dict.fromkeys(NAMES, both)
    # One that keeps its past inside, and so all do.
    assert choose(decoder, "past.1=ternary-keys-values") == {NAMES[0]: ((4, "full", 1, 1, None),), NAMES[1]: both}
    assert choose(decoder, "ternary-keys") == dict.fromkeys(NAMES, ((4, "ternary-keys", 2, 0, 64),))
    assert choose(decoder, ["0.key#[12]=full", "ternary-keys"])[NAMES[0]] == (
        (1, "ternary-keys", 2, 0, 64),
        (2, "full", 1, 1, None),
        (1, "ternary-keys", 2, 0, 64),
    )


def test_adaptive_takes_the_fewest_planes_that_are_good_enough(decoder: ImportedModel) -> None:
    measured: list[ImportedModel] = []

    def measure(model: ImportedModel, values: bool) -> Errors:
        assert values
        measured.append(model)
        good, bad = {1: 0.3, 2: 0.1, 3: 0.05}, {1: 0.9, 2: 0.8, 3: 0.7}
        return {
            "attention.0": {0: good, 1: {**good, 2: 0.15}, 2: good, 3: good},
            "attention.1": {0: good, 1: bad, 2: bad, 3: {**good, 1: 0.1}},
        }

    choices = choose_caches(decoder, read_modes("adaptive"), (2, 2), 64, measure, 0.2)
    found = [[(c.heads, c.key_planes, c.window) for c in of_heads] for of_heads in choices.values()]
    assert found == [[(4, 2, 64)], [(1, 2, 64), (2, 1, None), (1, 1, 64)]]
    assert choices[NAMES[0]][0].reason == "errors with 1, 2, 3 planes: 0.300, 0.150, 0.050; at most 0.2"
    assert choices[NAMES[1]][1].reason == "errors with 1, 2, 3 planes: 0.900, 0.800, 0.700; at most 0.2"
    # Errors are those of whole texts: there is no past.
    assert [str(spec) for spec in measured[0].inputs] == ["input_ids: int64[batch, length]"]
    assert [str(spec) for spec in measured[0].outputs] == ["logits: float32[batch, length, 50]"]


def test_texts_that_are_too_short(decoder: ImportedModel) -> None:
    nothing = dict.fromkeys((1, 2, 3), math.nan)

    def measure(model: ImportedModel, values: bool) -> Errors:
        return {f"attention.{n}": dict.fromkeys(range(4), nothing) for n in range(2)}

    choices = choose_caches(decoder, read_modes("adaptive"), (2, 2), 64, measure, 0.2)
    assert [c.window for c in choices[NAMES[0]]] == [None]
    assert choices[NAMES[0]][0].reason == "float: no text was long enough for anything to be packed"


@pytest.mark.parametrize(
    ("modes", "message"),
    [
        ("adaptive", "attention adaptive: decides by what planes cost.*give --kv-calibration"),
        ("layer9=ternary-keys", "attention 'layer9': matches none; there are past.0.key, past.1.key"),
    ],
)
def test_choices_that_cannot_be_made(decoder: ImportedModel, modes: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        choose(decoder, modes)


def test_a_model_of_whole_texts_keeps_nothing() -> None:
    model = import_onnx(gpt2())
    message = "attention attention.0: cannot be ternary-keys-values: it has no past.*choose ternary-keys, or export"
    with pytest.raises(OptionError, match=message):
        choose(model, "ternary-keys-values")
    keys = ((1, "ternary-keys", 2, 0, 64),)
    assert choose(model, "ternary-keys") == {"attention.0": keys, "attention.1": keys}


def test_a_past_of_a_fixed_length() -> None:
    with pytest.raises(OptionError, match="has a past of a fixed length"):
        choose(import_onnx(gpt2(cache="both"), {"past": 8}), "ternary-keys-values")


def test_windows_are_blocks(decoder: ImportedModel) -> None:
    with pytest.raises(OptionError, match="kv_window 63: is no multiple of 64"):
        choose_caches(decoder, read_modes("ternary-keys-values"), (2, 2), 63)


def test_not_on_a_gpu(decoder: ImportedModel) -> None:
    choices = choose_caches(decoder, read_modes("ternary-keys-values"), (2, 2), 64)
    with pytest.raises(OptionError, match=r"cuda-sm_90 is no CPU.*compile with --attention full"):
        apply_choices(decoder, choices, resolve("cuda-sm_90"))


def test_whole_texts_on_a_gpu_have_known_lengths() -> None:
    model = import_onnx(gpt2(), {"batch": 1})
    message = r"attention.0: cannot have ternary keys on cuda-sm_90: it has lengths that are not known.*--dim"
    with pytest.raises(OptionError, match=message):
        apply_choices(model, choose_caches(model, read_modes("ternary-keys"), (2, 2), 64), resolve("cuda-sm_90"))
