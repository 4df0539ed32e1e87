"""What a model that was quantized before is compiled to: what it is."""

from __future__ import annotations

import pytest

from tvm_ternary.errors import OptionError
from tvm_ternary.formats import Scheme
from tvm_ternary.formats.quantization import QuantizationConfig
from tvm_ternary.quantize.settled import settled_plan

SHAPES = dict.fromkeys(["a", "b", "head"], (64, 64))
CONFIG = QuantizationConfig(
    {"a": Scheme.parse("t4a8g64"), "b": Scheme.parse("t2a8g64")},
    {"head": "the output layer"},
    options={"scheme": "t2a8g64"},
)


def schemes(scheme: str | None = None, layers: str | tuple[str, ...] | None = None) -> dict[str, str]:
    rows = settled_plan(CONFIG, SHAPES, scheme, layers, "fast")
    assert all((row.scheme is None) == (row.reason is not None) for row in rows)
    return {row.name: str(row.scheme or row.reason) for row in rows}


def test_it_is_what_it_is() -> None:
    expected = {"a": "t4a8g64", "b": "t2a8g64", "head": "the output layer"}
    assert schemes() == schemes("t2a8g64") == schemes("t4a8g64") == expected


def test_layers_can_add_and_leave_out() -> None:
    assert schemes(layers=()) == dict.fromkeys(SHAPES, "not chosen by layers")
    assert schemes(layers="all") == {"a": "t4a8g64", "b": "t2a8g64", "head": "t2a8g64"}
    assert schemes(layers=("head=t3a8g64", "a=t1a8")) == {
        "a": "t4a8g64",
        "b": "not chosen by layers",
        "head": "t3a8g64",
    }


def test_another_scheme_is_refused() -> None:
    with pytest.raises(OptionError) as caught:
        schemes("t1a8g64")
    problem = "scheme t1a8g64: the model was quantized before and has t2a8g64, t4a8g64; leave the scheme out"
    assert str(caught.value).startswith(problem)
    with pytest.raises(OptionError, match="packing 'tight'"):
        settled_plan(CONFIG, SHAPES, None, None, "tight")


def test_the_document_comes_back() -> None:
    read = QuantizationConfig.from_dict(CONFIG.to_dict(), "here")
    assert read.to_dict() == CONFIG.to_dict()
    assert dict(read.schemes) == dict(CONFIG.schemes)
