"""Which matrix becomes what, and why another stays float."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.formats.strategies import granularities, make_tensor
from tvm_ternary.errors import OptionError
from tvm_ternary.formats import Granularity, Scheme, pack_bits, pack_codes, pack_dense, pack_scale, pack_shared
from tvm_ternary.quantize.plan import GROUPS, LayerPlan, make_plan, packed_bits, parse_layers

# Names as exporters write them, and what each is.
ATTENTION = (
    "encoder.layer.0.attention.self.query.weight",
    "encoder.layer.0.attention.self.key.weight",
    "encoder.layer.0.attention.output.dense.weight",
    "/encoder/layer.1/attention/self/value/MatMul",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.11.self_attn.o_proj.weight",
    "transformer.h.0.attn.c_attn.weight",
    "transformer.h.0.attn.c_proj.weight",
    "encoder.block.0.layer.0.SelfAttention.q.weight",
    "visual.blocks.3.qkv",
    "decoder.out_proj",
)
FFN = (
    "encoder.layer.0.intermediate.dense.weight",
    "encoder.layer.0.output.dense.weight",
    "/encoder/layer.1/output.dense/MatMul",
    "model.layers.0.mlp.gate_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "transformer.h.0.mlp.c_fc.weight",
    "transformer.h.0.mlp.c_proj.weight",
    "encoder.block.0.layer.1.DenseReluDense.wi.weight",
    "encoder.block.0.layer.1.DenseReluDense.wo.weight",
    "blocks.0.feed_forward.lin1",
    "decoder.fc2.weight",
)
NEITHER = ("lm_head.weight", "classifier.dense.weight", "pooler.dense.weight")
NAMES = (*ATTENTION, *FFN, *NEITHER)
SIZE = (384, 384)


def chosen(layers: str | Sequence[str] | Mapping[str, str], names: Sequence[str] = NAMES) -> dict[str, str]:
    """Scheme of every matrix that becomes ternary."""
    plan = make_plan(dict.fromkeys(names, SIZE), "t2a8g64", layers)
    assert [row.name for row in plan] == list(names)
    for row in plan:
        assert row.shape == SIZE
        assert (row.scheme is None) == (row.reason is not None)
    return {row.name: str(row.scheme) for row in plan if row.scheme is not None}


def test_all_means_every_matrix() -> None:
    assert chosen("all") == dict.fromkeys(NAMES, "t2a8g64")


def test_words_find_layers_by_the_names_that_exporters_give() -> None:
    assert tuple(chosen("attention")) == ATTENTION
    assert tuple(chosen("ffn")) == FFN
    assert set(GROUPS) == {"all", "attention", "ffn"}


def test_anything_else_is_a_regular_expression_searched_in_names() -> None:
    assert tuple(chosen("q_proj|lm_head")) == ("model.layers.0.self_attn.q_proj.weight", "lm_head.weight")
    assert tuple(chosen(r"^lm_head\.weight$")) == ("lm_head.weight",)
    assert tuple(chosen("LM_HEAD|pooler")) == ("pooler.dense.weight",)


def test_the_first_entry_that_matches_decides() -> None:
    layers = ["attention=t3a32g32", "query|down_proj=t1a8", "ffn"]
    got = chosen(layers)
    assert {got[name] for name in ATTENTION} == {"t3a32g32"}
    assert got["model.layers.0.mlp.down_proj.weight"] == "t1a8"
    assert got["model.layers.0.mlp.up_proj.weight"] == "t2a8g64"
    assert not got.keys() & set(NEITHER)
    assert set(chosen(list(reversed(layers))).values()) == {"t2a8g64", "t1a8", "t3a32g32"}


def test_a_mapping_gives_every_entry_its_scheme() -> None:
    as_mapping = chosen({"attention": "t3a32g32", "all": "t1a1pt"})
    assert as_mapping == chosen(["attention=t3a32g32", "all=t1a1pt"])
    assert as_mapping == {name: "t3a32g32" if name in ATTENTION else "t1a1pt" for name in NAMES}


def test_one_string_is_one_entry() -> None:
    assert chosen("ffn=t4a8") == dict.fromkeys(FFN, "t4a8")


def test_a_scheme_may_be_given_as_one() -> None:
    assert [rule.scheme for rule in parse_layers("all", Scheme.parse("t1a8g32"))] == [Scheme.parse("t1a8g32")]
    assert make_plan({"w": SIZE}, Scheme.parse("t1a8g32"))[0].scheme == Scheme.parse("t1a8g32")


def test_what_is_left_out_says_so() -> None:
    plan = {row.name: row for row in make_plan(dict.fromkeys(NAMES, SIZE), "t1a8", "attention")}
    assert plan["lm_head.weight"] == LayerPlan("lm_head.weight", SIZE, None, "not chosen by layers")
    assert not chosen([])


def test_an_entry_that_matches_nothing_lists_what_there_is() -> None:
    with pytest.raises(OptionError) as caught:
        make_plan({"fc1": SIZE, "fc2": SIZE}, "t1a8", ["fc1", "conv=t2a8"])
    assert str(caught.value) == "layers 'conv': matches no matrix of the model; matrices are: fc1, fc2"


def test_all_may_match_nothing_where_there_is_no_matrix() -> None:
    assert make_plan({}, "t1a8") == []
    with pytest.raises(OptionError, match="matrices are: none"):
        make_plan({}, "t1a8", "attention")


@pytest.mark.parametrize(
    ("layers", "scheme", "text"),
    [
        ("fc[", "t1a8", "layers 'fc[': is no regular expression: unterminated character set"),
        (["ok", "(=t1a8"], "t1a8", "layers '(': is no regular expression: missing )"),
        ({"*": "t1a8"}, "t1a8", "layers '*': is no regular expression: nothing to repeat"),
        ("all", "t5a8", "scheme 't5a8': unknown"),
        ("all=t1a4", "t1a8", "scheme 't1a4': unknown"),
        ({"all": ""}, "t1a8", "scheme '': unknown"),
        ("fc=", "t1a8", "scheme '': unknown"),
    ],
)
def test_entries_that_cannot_be_read_are_named(
    layers: str | Sequence[str] | Mapping[str, str], scheme: str, text: str
) -> None:
    with pytest.raises(OptionError) as caught:
        make_plan({"fc": SIZE, "ok": SIZE}, scheme, layers)
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize(
    ("shape", "scheme", "ternary", "dense"),
    [
        ((1, 64), "t1a8", 320, 256),  # one row is padded to sixteen
        ((16, 1), "t1a8", 128, 64),  # one column to sixteen, and a scale a row
        ((64, 8), "t4a32g1", 16384, 2048),  # each weight to sixteen, and a scale a weight
        ((2, 2), "t1a1pt", 192, 16),
        ((0, 5), "t1a8", 0, 0),
    ],
)
def test_a_matrix_that_would_grow_stays_float(shape: tuple[int, int], scheme: str, ternary: int, dense: int) -> None:
    (row,) = make_plan({"w": shape}, scheme)
    assert row.scheme is None
    assert row.reason == f"{scheme} would take {ternary} bytes, float32 takes {dense}"


@given(
    n=st.integers(1, 100),
    k=st.integers(1, 200),
    planes=st.integers(1, 4),
    key=st.sampled_from([(32, "fast"), (8, "fast"), (8, "dense"), (1, "fast")]),
    kind=granularities,
)
def test_sizes_are_those_of_the_packed_arrays(
    n: int, k: int, planes: int, key: tuple[int, str], kind: Granularity
) -> None:
    bits, packing = key
    tensor = make_tensor(n, k, kind, planes, seed=0)
    scheme = Scheme(planes, bits, kind)
    scales = pack_shared(tensor) if bits == 8 and planes > 1 else (pack_scale(tensor),)
    packed = (pack_dense if packing == "dense" else pack_bits if bits == 1 else pack_codes)(tensor)
    size = sum(array.nbytes for array in (packed, *scales))
    assert packed_bits((n, k), scheme, packing) == 8 * size
    (row,) = make_plan({"w": (n, k)}, scheme, packing=packing)
    assert (row.scheme is not None) == (size < 4 * n * k)


def test_dense_takes_four_fifths_where_no_group_is_padded() -> None:
    scheme = Scheme.parse("t2a8g160")
    fast, dense = (packed_bits((64, 1600), scheme, packing) for packing in ("fast", "dense"))
    scales = 64 * 10 * (32 + 2 * 8)
    assert 5 * (dense - scales) == 4 * (fast - scales) == 4 * 2 * 2 * 64 * 1600


@pytest.mark.parametrize(("scheme", "layers"), [("t1a32", "all"), ("t1a8", ["w=t1a1", "all"])])
def test_a_packing_that_a_scheme_does_not_have_is_refused(scheme: str, layers: str | list[str]) -> None:
    with pytest.raises(OptionError, match=r"packing 'dense': does not exist for a.* schemes; expected a8"):
        make_plan({"w": SIZE}, scheme, layers, "dense")
