"""Named targets against LLVM itself, and every name or dictionary that must be refused."""

from __future__ import annotations

import itertools
import json
import platform
import re
from pathlib import Path
from typing import Any

import pytest
import tvm
import tvm_ffi
from tvm.script import tirx as T

from tvm_ternary.errors import HostError, OptionError
from tvm_ternary.target import CUDA_ARCHS, TIERS, Target, host_features, native, resolve, target_names
from tvm_ternary.target.cpu import _LLVM_NAMES, cpu_names

NAMED = list(cpu_names())
X86 = ["x86-64-v2", "x86-64-v3", "avx2-vnni", "x86-64-v4", "avx512-vnni", "amx"]
# Each has all that the one before it has. No CPU must have AVX-VNNI.
CHAINS = (["x86-64-v2", "x86-64-v3", "x86-64-v4", "avx512-vnni", "amx"], ["x86-64-v3", "avx2-vnni"])
TRIPLE = "x86_64-unknown-linux-gnu"
# What LLVM reports for every x86-64 CPU, and its tuning switches, which ask for no instruction.
LLVM_BASE = {"64bit", "64bit-mode", "cmov", "cx8", "fxsr", "mmx", "nopl", "sse", "sse2", "vzeroupper", "x87"}
LLVM_TUNING = re.compile(r"(fast|slow|false-deps|allow-light|idiv|fuse|use|enable)-?.*|macrofusion")
# CRC32 came with SSE4.2 and has no flag of its own. ETE and TRBE are tracing, fp-armv8 is in every aarch64.
LLVM_UNLISTED = {"crc32", "ete", "trbe", "fp-armv8"}


def llvm_features(target: Target) -> set[str]:
    with tvm.target.Target(target.tvm) as tvm_target:
        return {str(name) for name in tvm_ffi.get_global_func("target.llvm_get_cpu_features")(tvm_target)}


@pytest.mark.parametrize("name", NAMED)
def test_llvm_may_use_exactly_the_features_that_the_host_is_asked_for(name: str) -> None:
    target = resolve(name)
    names = _LLVM_NAMES[target.architecture]
    enabled = {feature for feature in llvm_features(target) if not LLVM_TUNING.fullmatch(feature)}
    assert enabled - LLVM_BASE - LLVM_UNLISTED == {names[feature] for feature in target.features}


@pytest.mark.parametrize("architecture", _LLVM_NAMES)
def test_llvm_knows_every_feature_name(architecture: str, capfd: pytest.CaptureFixture[str]) -> None:
    mcpu = {"x86_64": "x86-64", "aarch64": "generic"}[architecture]
    for llvm in _LLVM_NAMES[architecture].values():
        target = resolve(
            {"kind": "llvm", "mtriple": f"{architecture}-unknown-linux-gnu", "mcpu": mcpu, "mattr": [f"+{llvm}"]}
        )
        assert llvm in llvm_features(target)
    assert "not a recognized feature" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("name", NAMED)
def test_a_named_target_holds_no_fact_of_this_host(name: str) -> None:
    exported = dict(tvm.target.Target(resolve(name).tvm).export())
    assert not {"num-cores", "tag"} & {key for key, value in exported.items() if value}
    assert exported["mcpu"] in ("x86-64-v2", "x86-64-v3", "x86-64-v4", "generic")
    assert json.loads(json.dumps(resolve(name).tvm)) == resolve(name).tvm


@T.prim_func(s_tir=True)
def by_hand(a: T.Buffer((1024,), "float32"), b: T.Buffer((1024,), "float32"), c: T.Buffer((1024,), "float32")) -> None:
    for i in range(64):
        for j in T.vectorized(16):
            c[i * 16 + j] = a[i * 16 + j] * b[i * 16 + j] + T.float32(1)


@T.prim_func(s_tir=True)
def by_llvm(a: T.Buffer((1024,), "float32"), b: T.Buffer((1024,), "float32"), c: T.Buffer((1024,), "float32")) -> None:
    for i in range(1024):
        c[i] = a[i] * b[i] + T.float32(1)


@pytest.mark.parametrize("function", [by_hand, by_llvm])
@pytest.mark.parametrize("name", X86)
def test_the_code_uses_vectors_of_the_stated_width(name: str, function: Any) -> None:
    target = resolve(name)
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    text = tvm.compile(module, tvm.target.Target(target.tvm)).mod.inspect_source("asm")
    arithmetic = re.findall(r"v?(?:mul|add|fmadd\w+)ps\s.*%([xyz])mm", text)
    assert arithmetic
    assert {128: "x", 256: "y", 512: "z"}[TIERS[target.tier].vector_bits] == max(arithmetic)


def test_targets_are_ordered_and_each_tier_has_its_features() -> None:
    for chain in CHAINS:
        features = [resolve(name).features for name in chain]
        assert all(low < high for low, high in itertools.pairwise(features))
    assert [name for name in NAMED if name != "aarch64"] == X86
    for name in NAMED:
        assert TIERS[resolve(name).tier].features == resolve(name).features


@pytest.mark.parametrize(
    ("name", "tier", "bits"),
    [
        ("x86-64-v2", "sse4", 128),
        ("x86-64-v3", "avx2", 256),
        ("avx2-vnni", "avx2-vnni", 256),
        ("x86-64-v4", "avx512", 512),
        ("avx512-vnni", "avx512-vnni", 512),
        ("amx", "amx", 512),
        ("aarch64", "neon-dot", 128),
    ],
)
def test_a_named_target_has_a_tier(name: str, tier: str, bits: int) -> None:
    target = resolve(name)
    assert (target.tier, TIERS[target.tier].vector_bits) == (tier, bits)


@pytest.mark.parametrize("name", X86)
def test_native_is_the_best_target_that_fits(name: str) -> None:
    features = resolve(name).features
    assert native(features, "x86_64").name == name
    assert native(features | {"amx_bf16", "ermsb"}, "x86_64").name == name


def test_native_takes_the_wider_vectors_where_a_cpu_has_both() -> None:
    zen5 = resolve("avx512-vnni").features | {"avx_vnni"}
    assert native(zen5, "x86_64").name == "avx512-vnni"
    assert native(zen5 - {"avx512bw"}, "x86_64").name == "avx2-vnni"


def test_native_falls_by_one_missing_feature() -> None:
    assert native(resolve("avx512-vnni").features - {"avx512_vpopcntdq"}, "x86_64").name == "x86-64-v4"
    assert native(resolve("amx").features - {"amx_int8"}, "x86_64").name == "avx512-vnni"
    assert native(resolve("aarch64").features, "aarch64").name == "aarch64"


def test_native_on_a_host_that_runs_none() -> None:
    with pytest.raises(HostError, match="lacks popcnt, which x86-64-v2 needs"):
        native(resolve("x86-64-v2").features - {"popcnt"}, "x86_64")
    with pytest.raises(HostError, match="this host is riscv64; expected x86_64 or aarch64"):
        native(frozenset(), "riscv64")


def test_native_on_this_host_is_a_named_target_it_can_run() -> None:
    target = resolve("native")
    assert target.name in NAMED
    assert target.features <= host_features()
    assert target.architecture == platform.machine()
    assert resolve(target.name) == target


def test_resolve_gives_a_fresh_dictionary() -> None:
    resolve("x86-64-v4").tvm["mattr"].append("+amx")
    assert resolve("x86-64-v4").tvm["mattr"] == ["-prefer-256-bit"]
    given = {"kind": "llvm", "mtriple": TRIPLE, "mcpu": "x86-64-v3", "mattr": ["+gfni"]}
    resolve(given).tvm["mattr"].append("+amx")
    assert given["mattr"] == ["+gfni"]


@pytest.mark.parametrize(
    ("mcpu", "mattr", "tier", "extra"),
    [
        ("x86-64", [], "portable", set()),
        ("x86-64-v2", [], "sse4", {"popcnt"}),
        ("x86-64-v3", ["+avxvnni"], "avx2-vnni", {"avx_vnni"}),
        ("x86-64-v3", ["+avxvnni", "-avx2"], "sse4", {"avx_vnni"}),
        ("x86-64-v4", ["+avx512vnni"], "avx512", {"avx512_vnni"}),
        ("x86-64-v4", resolve("avx512-vnni").tvm["mattr"], "avx512-vnni", {"gfni"}),
        ("x86-64-v4", resolve("amx").tvm["mattr"], "amx", {"amx_int8"}),
        ("x86-64-v4", ["-avx2"], "sse4", set()),
        ("x86-64-v2", ["-ssse3"], "portable", set()),
    ],
)
def test_a_dictionary_gets_its_features_and_tier(mcpu: str, mattr: list[str], tier: str, extra: set[str]) -> None:
    target = resolve({"kind": "llvm", "mtriple": TRIPLE, "mcpu": mcpu, "mattr": mattr, "num-cores": 2})
    assert target.tier == tier
    assert extra <= target.features
    assert target.tvm["num-cores"] == 2
    assert target.name == ",".join([f"llvm:{mcpu}", *mattr])
    assert resolve(json.dumps(target.tvm)) == target
    assert resolve(target) is target
    tvm.target.Target(target.tvm)


@pytest.mark.parametrize("arch", CUDA_ARCHS)
def test_a_gpu_is_named_by_its_architecture(arch: str) -> None:
    target = resolve(f"cuda-{arch}")
    assert (target.name, target.tier, target.kind, target.archs) == (f"cuda-{arch}", f"cuda-{arch}", "cuda", (arch,))
    assert (target.architecture, target.features) == ("x86_64", frozenset())
    made = tvm.target.Target(target.tvm)
    assert (made.kind.name, made.attrs["arch"], made.host.kind.name) == ("cuda", arch, "llvm")
    assert resolve({"kind": "cuda", "arch": arch}) == target


def test_several_gpus_in_one_file_are_written_for_the_oldest() -> None:
    target = resolve("cuda-sm_90+sm_80+sm_86+sm_80")
    assert target.name == "cuda-sm_80+sm_86+sm_90"
    assert target.archs == ("sm_80", "sm_86", "sm_90")
    assert (target.tier, target.tvm["arch"]) == ("cuda-sm_80", "sm_80")
    assert target.tvm["max_shared_memory_per_block"] == CUDA_ARCHS["sm_86"].shared_bytes
    assert resolve("cuda-sm_90+cuda-sm_80").name == "cuda-sm_80+sm_90"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("cuda", "target cuda: names no architecture; expected one of sm_80 \\(A100\\), "),
        ("nvidia-a100", "names no architecture"),
        ("sm_90", "names no architecture"),
        ("cuda-sm_75", "target cuda-sm_75: no such architecture: sm_75; expected one of sm_80"),
        ("cuda-sm_80+sm_91", "no such architecture: sm_91"),
        ({"kind": "cuda"}, "no such architecture"),
        ({"kind": "cuda", "arch": "sm_90", "libs": ["cublas"]}, "target: holds libs; expected kind and arch alone"),
    ],
)
def test_a_gpu_that_does_not_exist(given: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        resolve(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "AVX512", "x86-64-v5", "llvm -mcpu=native"])
def test_an_unknown_name_lists_all(name: str) -> None:
    with pytest.raises(OptionError) as caught:
        resolve(name)
    assert all(known in str(caught.value) for known in target_names())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "kind is None; expected 'llvm' or 'cuda'"),
        ({"kind": "rocm"}, "kind is 'rocm'"),
        ({"kind": "llvm", "mtriple": TRIPLE, "mcpu": "sapphirerapids"}, "whose CPU features are not known here"),
        ({"kind": "llvm", "mtriple": TRIPLE, "mcpu": ["x86-64"]}, "expected one of x86-64, x86-64-v2"),
        ({"kind": "llvm", "mtriple": "riscv64-unknown-linux-gnu"}, "mtriple is 'riscv64-unknown-linux-gnu'; expected"),
        ({"kind": "llvm", "mtriple": "x86_64-apple-darwin"}, "mtriple is 'x86_64-apple-darwin'"),
        (
            {"kind": "llvm", "mtriple": TRIPLE, "mattr": ["+avx1024"]},
            "mattr holds '\\+avx1024'; expected .* avx512vnni",
        ),
        ({"kind": "llvm", "mtriple": TRIPLE, "mattr": ["avx2"]}, "mattr holds 'avx2'; expected '\\+' or '-'"),
        ({"kind": "llvm", "mtriple": TRIPLE, "mattr": "+avx2"}, "expected a list"),
        ('{"kind": "llvm"', "starts as JSON but is none"),
    ],
)
def test_a_bad_dictionary_says_what_is_wrong(given: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        resolve(given)


def test_host_features_are_those_that_all_processors_share(tmp_path: Path) -> None:
    x86 = tmp_path / "x86"
    x86.write_text(
        "processor\t: 0\nflags\t\t: fpu avx2 avx512f\n\nprocessor\t: 1\nflags\t\t: fpu avx2\nvmx flags\t: ept\n"
    )
    assert host_features(x86) == {"fpu", "avx2"}
    arm = tmp_path / "arm"
    arm.write_text("processor\t: 0\nFeatures\t: fp asimd asimddp\n")
    assert host_features(arm) == {"fp", "asimd", "asimddp"}


def test_a_host_that_does_not_say(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="cannot be read"):
        host_features(tmp_path / "absent")
    (tmp_path / "empty").write_text("processor: 0\n")
    with pytest.raises(HostError, match="names no CPU features"):
        host_features(tmp_path / "empty")
