"""Where matrices stand, the policy for the edges of a model, and the configuration as a value."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tvm_ternary.errors import OptionError
from tvm_ternary.quantize.blocks import FIRST, LAST, ONLY, OUTPUT, block_of, blocks_of, find_places
from tvm_ternary.quantize.config import LayerQuantizationConfig
from tvm_ternary.quantize.plan import make_plan
from tvm_ternary.quantize.recipe import Recipe

SIZE = (384, 384)
BERT = [f"encoder.layer.{i}.{part}.weight" for i in range(3) for part in ("attention.self.query", "output.dense")]
NAMES = ["embeddings.project.weight", *BERT, "pooler.dense.weight", "classifier.weight"]


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("encoder.layer.11.attention.self.query.weight", ("encoder.layer", 11)),
        ("h.3.mlp.c_fc.weight", ("h", 3)),
        ("model.layers.12.mlp.gate_proj.weight", ("model.layers", 12)),
        ("blocks.5.qkv", ("blocks", 5)),
        ("encoder.block.2.layer.0.SelfAttention.q.weight", ("encoder.block", 2)),
        ("fc1.weight", None),
        ("lm_head.weight", None),
        ("layer.².weight", None),  # a digit to Python, no number
    ],
)
def test_blocks_are_read_off_the_names(name: str, block: tuple[str, int] | None) -> None:
    assert block_of(name) == block


def test_a_number_that_all_names_share_is_no_block() -> None:
    names = [f"model.0.encoder.layer.{i}.{kind}" for i in range(3) for kind in "ab"]
    assert blocks_of(["model.0.embeddings.word", *names]) == {
        name: ("model.0.encoder.layer", int(name.split(".")[4])) for name in names
    }
    assert blocks_of(names[:2]) == dict.fromkeys(names[:2], ("model", 0))
    assert blocks_of(["0.a", "1.a", "fc"]) == {"0.a": ("", 0), "1.a": ("", 1)}
    places = find_places(names)
    assert [places.get(name) for name in names] == [FIRST, FIRST, None, None, LAST, LAST]


def test_places_are_first_last_and_what_is_behind() -> None:
    places = find_places(NAMES)
    assert places == {
        **dict.fromkeys(BERT[:2], FIRST),
        **dict.fromkeys(BERT[4:], LAST),
        **dict.fromkeys(NAMES[-2:], OUTPUT),
    }
    assert find_places(["h.0.a", "h.0.b"]) == {"h.0.a": ONLY, "h.0.b": ONLY}
    assert find_places(["fc1", "fc2", "fc3"]) == {"fc3": OUTPUT}
    assert find_places(["fc1"]) == {}
    assert find_places([]) == {}
    two_stacks = find_places(["encoder.0.a", "encoder.1.a", "decoder.0.a", "decoder.1.a"])
    assert two_stacks == {"encoder.0.a": FIRST, "decoder.1.a": LAST}


def schemes(**options: Any) -> dict[str, str]:
    config = LayerQuantizationConfig(**{"scheme": "t2a8g64", **options})
    return {row.name: str(row.scheme or "float") for row in config.plan(dict.fromkeys(NAMES, SIZE))}


def test_edges_get_four_planes_and_heads_stay_float_by_default() -> None:
    got = schemes()
    assert {got[name] for name in BERT[:2] + BERT[4:]} == {"t4a8g64"}
    assert {got[name] for name in (NAMES[0], *BERT[2:4])} == {"t2a8g64"}
    assert {got[name] for name in NAMES[-2:]} == {"float"}


def test_every_row_says_what_decided() -> None:
    rows = {row.name: row for row in LayerQuantizationConfig().plan(dict.fromkeys(NAMES, SIZE))}
    assert rows[BERT[0]].rule == "the first block: edges is t4"
    assert rows[BERT[5]].rule == "the last block: edges is t4"
    assert rows[BERT[2]].rule == "layers all"
    assert rows[NAMES[-1]].reason == "the output layer: output-layer is float"


def test_edges_and_output_the_same_is_what_compile_does() -> None:
    plan = LayerQuantizationConfig("t2a8g64", edges="same", output_layer="same").plan(dict.fromkeys(NAMES, SIZE))
    assert plan == make_plan(dict.fromkeys(NAMES, SIZE), "t2a8g64")
    assert {str(row.scheme) for row in plan} == {"t2a8g64"}


def test_a_policy_may_be_a_scheme_or_float() -> None:
    got = schemes(edges="float", output_layer="t3a32")
    assert {got[name] for name in BERT[:2] + BERT[4:]} == {"float"}
    assert {got[name] for name in NAMES[-2:]} == {"t3a32"}


def test_a_regular_expression_wins_over_the_policy_and_a_word_does_not() -> None:
    got = schemes(layers=("classifier", r"layer\.0=t1a8", "all"))
    assert got["classifier.weight"] == "t2a8g64"
    assert got["pooler.dense.weight"] == "float"
    assert {got[name] for name in BERT[:2]} == {"t1a8"}
    assert {got[name] for name in BERT[4:]} == {"t4a8g64"}


def test_toml_is_read_and_options_win(tmp_path: Path) -> None:
    file = tmp_path / "layers.toml"
    file.write_text(
        'scheme = "t2a8g64"\nedges = "same"\nembeddings = "float"\n'
        '[layers]\n"query|key" = "t3a8g64"\nffn = "t1a8"\n[recipe]\nmethod = "twn"\nsweeps = 2\n'
    )
    config = LayerQuantizationConfig.of(file, edges="float", output_layer=None, recipe={"sweeps": 3})
    assert config.recipe == Recipe(method="twn", sweeps=3)
    assert config.to_dict() == {
        "scheme": "t2a8g64",
        "layers": ["query|key=t3a8g64", "ffn=t1a8"],
        "edges": "float",
        "output_layer": "float",
        "embeddings": "float",
        "recipe": asdict(config.recipe),
    }
    assert LayerQuantizationConfig.of(None, layers="ffn").layers == ("ffn",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scheme = ", "is no TOML: "),
        (
            'shceme = "t1a8"',
            "has no option 'shceme'; options are: scheme, layers, edges, output_layer, embeddings, recipe",
        ),
        ("scheme = 3", "scheme is 3; expected a string"),
        ("layers = [1]", "layers is [1]; expected strings"),
        ("layers = 4", "layers is 4; expected strings"),
        ('recipe = "twn"', "recipe is 'twn'; expected a table"),
        ("[recipe]\nswaps = 3", "recipe has no option 'swaps'; options are: method, compensate"),
        ("[recipe]\nsweeps = 2.5", "recipe sweeps is 2.5; expected one like 3"),
        ("[recipe]\ncompensate = 1", "recipe compensate is 1; expected one like True"),
        ('[recipe]\nmethod = "magic"', "method 'magic': unknown"),
        ('scheme = "t9"', "scheme 't9': unknown"),
        ('edges = "t5"', "edges: got 't5'; expected float, same, planes alone (t4) or a scheme"),
        ('output_layer = "int8"', "output_layer: got 'int8'; expected float, same"),
        ('embeddings = "t2"', "embeddings: got 't2'; expected one of int8, float"),
        ('layers = "("', "layers '(': is no regular expression"),
    ],
)
def test_bad_files_are_told_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(OptionError) as caught:
        LayerQuantizationConfig.of(file)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"none\.toml: cannot be read"):
        LayerQuantizationConfig.of(tmp_path / "none.toml")
