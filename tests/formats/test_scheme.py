"""Short names of schemes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvm_ternary.errors import OptionError
from tvm_ternary.formats import (
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    Scheme,
    granularity_from_suffix,
    parse_packed,
)

from .strategies import granularities


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("t1a8g128", Scheme(1, 8, PerGroup(128))),
        ("t2a32", Scheme(2, 32, PerChannel())),
        ("t4a1pt", Scheme(4, 1, PerTensor())),
        ("t3a32g1", Scheme(3, 32, PerGroup(1))),
        ("t1a16g64", Scheme(1, 16, PerGroup(64))),
        ("t2abf16", Scheme(2, 16, PerChannel(), bfloat=True)),
    ],
)
def test_names_mean_what_the_docs_say(text: str, scheme: Scheme) -> None:
    assert Scheme.parse(text) == scheme
    assert str(scheme) == text


@given(
    st.integers(1, 4), st.sampled_from([(32, False), (16, False), (16, True), (8, False), (1, False)]), granularities
)
def test_name_and_back(planes: int, activation: tuple[int, bool], granularity: Granularity) -> None:
    scheme = Scheme(planes, activation[0], granularity, bfloat=activation[1])
    assert Scheme.parse(str(scheme)) == scheme
    assert granularity_from_suffix(granularity.suffix) == granularity


@pytest.mark.parametrize(
    "text",
    [
        *("", "t0a8", "t5a8", "t1a4", "t1abf8", "t1b16", "t1", "t1a8g0", "t1a8g", "t1a8g-1", "t1a8ptg8", "t1a8g1.5"),
        *("T1A8", " t1a8", "t1a8\n", "t1a8g٣", "t1a8g" + "9" * 5000),
    ],
)
def test_other_names_are_refused_with_the_grammar_and_an_example(text: str) -> None:
    with pytest.raises(OptionError) as caught:
        Scheme.parse(text)
    message = str(caught.value)
    assert message.startswith("scheme ")
    assert "\n" not in message
    assert all(word in message for word in ("t{1-4}a{32|bf16|16|8|1}", "g{size}", "pt", "for example t1a8g128"))


@given(st.text(alphabet="tabf12368pg0 ", max_size=8))
def test_any_text_is_parsed_in_full_or_refused(text: str) -> None:
    try:
        scheme = Scheme.parse(text)
    except OptionError:
        return
    assert str(scheme) == text


@pytest.mark.parametrize(
    ("planes", "bits", "granularity", "problem"),
    [
        (0, 8, PerChannel(), "planes=0, expected 1 to 4"),
        (5, 8, PerChannel(), "planes=5"),
        (True, 8, PerChannel(), "planes=True"),
        (1.0, 8, PerChannel(), "planes=1.0"),
        (1, 4, PerChannel(), "activation_bits=4, expected 32, 16, 8 or 1"),
        (1, True, PerChannel(), "activation_bits=True"),
        (1, 8, "g128", r"granularity='g128', expected PerTensor\(\), PerChannel\(\) or PerGroup\(size\)"),
    ],
)
def test_other_values_are_refused(planes: int, bits: int, granularity: Granularity, problem: str) -> None:
    with pytest.raises(OptionError, match=problem):
        Scheme(planes, bits, granularity)


@pytest.mark.parametrize("bits", [32, 8, 1])
def test_only_sixteen_bits_can_be_bfloats(bits: int) -> None:
    with pytest.raises(OptionError, match=f"bfloat with {bits} bits, expected 16; for example t1abf16"):
        Scheme(1, bits, PerChannel(), bfloat=True)


@pytest.mark.parametrize("suffix", ["g", "g0", "channel", "pt ", "g08"])
def test_other_suffixes_are_refused(suffix: str) -> None:
    with pytest.raises(OptionError, match=r"granularity .* expected nothing"):
        granularity_from_suffix(suffix)


@pytest.mark.parametrize(
    ("text", "packing"), [("t1a8", "fast"), ("t1a8/fast", "fast"), ("t3a8g128/dense", "dense"), ("t1a1/fast", "fast")]
)
def test_a_packing_may_follow_a_scheme(text: str, packing: str) -> None:
    assert parse_packed(text) == (Scheme.parse(text.partition("/")[0]), packing)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("t1a8/", "packing '': does not exist; expected one of fast, dense"),
        ("t1a8/tight", "packing 'tight': does not exist; expected one of fast, dense"),
        ("t1a1/dense", "packing 'dense': does not exist for a1 schemes; expected a8"),
        ("t9/dense", "scheme 't9': unknown"),
    ],
)
def test_a_packing_that_does_not_exist_is_refused(text: str, problem: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_packed(text)
    assert str(caught.value).startswith(problem)
