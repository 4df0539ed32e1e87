"""The manifest goes to JSON and back without loss, and refuses everything that is not one."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvm_ternary.errors import ArtifactError, LayoutError
from tvm_ternary.runtime.manifest import (
    DTYPES,
    AttentionInfo,
    CacheInfo,
    FunctionInfo,
    KernelInfo,
    LayerInfo,
    Manifest,
    ModelInfo,
    SizesInfo,
    TargetInfo,
    TensorSpec,
    WeightsInfo,
)

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
COUNTS = st.integers(0, 2**62)
RATIOS = st.floats(0, 100)
SPECS = st.builds(TensorSpec, NAMES, st.sampled_from(DTYPES), st.lists(st.one_of(COUNTS, NAMES), max_size=4).map(tuple))
LAYERS = st.builds(
    LayerInfo,
    name=NAMES,
    shape=st.tuples(COUNTS, COUNTS),
    became=st.sampled_from(["ternary", "float32"]),
    scheme=st.none() | NAMES,
    bits_per_weight=RATIOS,
    kernel=st.none() | NAMES,
    layout=st.none() | NAMES,
    schedule=st.sampled_from(["rule", "shipped", "tuned", "dlight"]),
    error=st.none() | RATIOS,
    reason=st.none() | NAMES,
)
CACHES = st.builds(
    CacheInfo,
    name=NAMES,
    value=NAMES,
    batch=COUNTS | NAMES,
    past=NAMES,
    length=COUNTS | NAMES,
    kv_heads=COUNTS,
    size=COUNTS,
    value_size=COUNTS,
    mode=NAMES,
    key_planes=COUNTS,
    value_planes=COUNTS,
    window=st.none() | COUNTS,
    rotated=st.booleans(),
    reason=st.none() | NAMES,
)
TVM = st.fixed_dictionaries({"kind": st.just("llvm"), "mattr": st.lists(NAMES, max_size=2)})
ARCHS = st.lists(st.sampled_from(["sm_80", "sm_90", "sm_90a", "sm_120"]), min_size=1, max_size=3).map(tuple)
FEATURES = st.lists(NAMES, max_size=3).map(tuple)
TARGETS = st.builds(TargetInfo, NAMES, TVM, FEATURES) | st.builds(
    TargetInfo, NAMES, TVM, FEATURES, st.just("cuda"), ARCHS, st.sampled_from([None, "sm_90"]), st.just("13.0")
)
MANIFESTS = st.builds(
    Manifest,
    model=st.builds(ModelInfo, NAMES, NAMES, NAMES),
    inputs=st.lists(SPECS, max_size=3).map(tuple),
    outputs=st.lists(SPECS, max_size=3).map(tuple),
    bounds=st.dictionaries(NAMES, st.integers(1, 2**31), max_size=2),
    scheme=NAMES,
    layers=st.lists(LAYERS, max_size=3).map(tuple),
    functions=st.lists(st.builds(FunctionInfo, NAMES, st.none() | NAMES, NAMES), max_size=3).map(tuple),
    target=TARGETS,
    versions=st.dictionaries(NAMES, NAMES, max_size=3),
    weights=st.builds(WeightsInfo, NAMES, COUNTS, st.none() | st.just("model.safetensors"), st.lists(NAMES).map(tuple)),
    sizes=st.builds(SizesInfo, COUNTS, COUNTS),
    kernels=st.lists(st.builds(KernelInfo, NAMES, NAMES, *[COUNTS] * 4), max_size=2).map(tuple),
    graph=st.booleans(),
    caches=st.lists(CACHES, max_size=2).map(tuple),
    attentions=st.lists(st.builds(AttentionInfo, NAMES, NAMES, COUNTS, st.none() | COUNTS, st.booleans(), NAMES)).map(
        tuple
    ),
)
PLAIN = Manifest(
    model=ModelInfo("m", "m.onnx", "ab"),
    inputs=(TensorSpec("x", "float32", ("batch", 4)),),
    outputs=(),
    bounds={},
    scheme="t2a8g128",
    layers=(LayerInfo("w", (3, 4), "ternary", "t2a8g128", 4.5, "gemv", "codes", "rule", 0.25, None),),
    functions=(),
    target=TargetInfo("x86-64-v3", {"kind": "llvm"}, ("avx2",)),
    versions={"tvm_ternary": "0.1.0"},
    weights=WeightsInfo("cd", 12),
    sizes=SizesInfo(48, 12),
    kernels=(KernelInfo("f_kernel", "sm_90", 64, 1024, 0, 0),),
    caches=(CacheInfo("k", "v", "batch", "past", "length", 2, 8, 8, "ternary-keys-values", 2, 1, 64, True),),
    attentions=(AttentionInfo("attention.0", "ternary-keys", 2, 64, False),),
)


@given(MANIFESTS)
def test_to_json_and_back(manifest: Manifest) -> None:
    text = manifest.to_json()
    assert Manifest.from_json(text) == manifest
    assert Manifest.from_json(text).to_json() == text
    assert "\n" not in text


def test_the_text_is_canonical() -> None:
    reordered = replace(PLAIN, target=replace(PLAIN.target, tvm={"mcpu": "b", "kind": "a"}))
    same = replace(PLAIN, target=replace(PLAIN.target, tvm={"kind": "a", "mcpu": "b"}))
    assert reordered.to_json() == same.to_json()
    document = json.loads(PLAIN.to_json())
    assert list(document) == sorted(document)
    assert document["format"] == "tvm-ternary"
    assert document["version"] == 5
    assert document["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["batch", 4]}]
    assert document["weights"] == {"sha256": "cd", "bytes": 12, "file": None, "names": []}
    assert document == PLAIN.to_dict()


def test_numbers_that_json_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        replace(PLAIN, layers=(replace(PLAIN.layers[0], error=float("nan")),)).to_json()


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "null", "[]", "3", '{"format": "onnx", "version": 1}'])
def test_text_that_is_no_manifest(text: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        Manifest.from_json(text, "model.so")
    assert str(caught.value).startswith("model.so: the manifest is not ")
    assert "\n" not in str(caught.value)


def every_key(document: dict[str, Any]) -> list[tuple[str | int, ...]]:
    """Paths of all keys that the format fixes."""
    paths: list[tuple[str | int, ...]] = [(key,) for key in document]
    for key in ("model", "weights", "sizes", "target"):
        paths += [(key, inner) for inner in document[key]]
    return paths + [
        (part, 0, key) for part in ("inputs", "layers", "kernels", "caches", "attentions") for key in document[part][0]
    ]


def parent(document: dict[str, Any], path: tuple[str | int, ...]) -> Any:
    for step in path[:-1]:
        document = document[step]  # type: ignore[index]
    return document


@pytest.mark.parametrize("path", every_key(PLAIN.to_dict()), ids=lambda path: ".".join(map(str, path)))
def test_each_key_is_needed_and_has_its_kind(path: tuple[str | int, ...]) -> None:
    document = PLAIN.to_dict()
    del parent(document, path)[path[-1]]
    with pytest.raises(ArtifactError) as missing:
        Manifest.from_json(json.dumps(document))
    document = PLAIN.to_dict()
    parent(document, path)[path[-1]] = "yes" if path[-1] in ("graph", "rotated") else True
    with pytest.raises(ArtifactError) as wrong:
        Manifest.from_json(json.dumps(document))
    assert str(path[-1]) in str(missing.value)
    assert str(path[-1]) in str(wrong.value)


@pytest.mark.parametrize("most", [0, -1, 2.5, "3", True, None])
def test_a_bound_is_a_number_of_at_least_one(most: object) -> None:
    with pytest.raises(ArtifactError, match=r"manifest\.bounds\.length is .* expected a number of at least 1"):
        Manifest.from_json(json.dumps({**PLAIN.to_dict(), "bounds": {"length": most}}))


def test_an_unknown_version_or_key_is_refused() -> None:
    newer = {**PLAIN.to_dict(), "version": 6}
    with pytest.raises(ArtifactError, match="has version 6; expected 5; compile the model again, or update"):
        Manifest.from_json(json.dumps(newer))
    with pytest.raises(ArtifactError, match="unknown key 'signature'"):
        Manifest.from_json(json.dumps({**PLAIN.to_dict(), "signature": ""}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "tpu"}, "device is 'tpu'; expected cpu or cuda"),
        ({"device": "cuda"}, "device is cuda with GPU code for no GPU"),
        ({"archs": ["sm_90"]}, "device is cpu with GPU code for sm_90"),
        ({"device": "cuda", "archs": ["compute_90"], "cuda": "13.0"}, "arch is 'compute_90'; expected one such as"),
        ({"device": "cuda", "archs": [90], "cuda": "13.0"}, r"manifest\.target\.archs is \[90\]; expected tuple"),
        ({"device": "cuda", "ptx": "sm_9", "cuda": "13.0"}, "arch is 'sm_9'; expected one such as 'sm_90'"),
        ({"device": "cuda", "archs": ["sm_90"]}, "cuda is None; expected a version such as '13.0'"),
    ],
)
def test_a_target_that_cannot_be(change: dict[str, Any], message: str) -> None:
    document = PLAIN.to_dict()
    document["target"].update(change)
    with pytest.raises(ArtifactError, match=message):
        Manifest.from_json(json.dumps(document))


@pytest.mark.parametrize("file", ["../weights.safetensors", "/etc/passwd", "", ".."])
def test_a_weights_file_outside_the_folder_is_refused(file: str) -> None:
    document = PLAIN.to_dict()
    document["weights"]["file"] = file
    with pytest.raises(ArtifactError, match="expected a name without folder"):
        Manifest.from_json(json.dumps(document))


@pytest.mark.parametrize(
    ("dtype", "shape", "message"),
    [
        ("float8", (1,), "dtype is 'float8'; expected one of bool, int8"),
        ("float32", (-1,), "dimension -1; expected a number >= 0 or a name"),
        ("float32", ("",), "dimension ''"),
        ("float32", (True,), "dimension True"),
        ("float32", (1.5,), "dimension 1.5"),
    ],
)
def test_a_tensor_that_cannot_be(dtype: str, shape: tuple[Any, ...], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        TensorSpec("x", dtype, shape)


def test_a_tensor_reads_well() -> None:
    assert str(TensorSpec("x", "float32", ("batch", 4))) == "x: float32[batch, 4]"
