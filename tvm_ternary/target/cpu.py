"""CPUs: which instructions the code may use, and what this host has.

A target is named by the instruction set alone. Its TVM dictionary holds a generic ``mcpu`` and no fact of the
building host, so that one name gives one code everywhere. Features are spelled as in ``/proc/cpuinfo``; LLVM spells
some otherwise.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvm_ternary.errors import HostError, OptionError
from tvm_ternary.target.base import Target

# The levels of the x86-64 psABI above the baseline, section 3.1.1 (https://gitlab.com/x86-psABIs/x86-64-ABI).
_X86_V2 = frozenset({"cx16", "lahf_lm", "pni", "popcnt", "sse4_1", "sse4_2", "ssse3"})
_X86_V3 = _X86_V2 | {"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"}
_X86_V4 = _X86_V3 | {"avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"}
# What Ice Lake and Zen 4 share beyond the fourth level. Cascade Lake has VNNI but not the others.
_VNNI_EXTRA = ("avx512_bitalg", "avx512_vbmi2", "avx512_vnni", "avx512_vpopcntdq", "avx512ifma", "avx512vbmi", "gfni")
_X86_VNNI = _X86_V4 | frozenset(_VNNI_EXTRA)
# Alder Lake and Zen 5: the byte dot product of AVX-512 VNNI for 256-bit registers of CPUs that need not have AVX-512.
_AVX_VNNI_EXTRA = ("avx_vnni",)
_X86_AVX_VNNI = _X86_V3 | frozenset(_AVX_VNNI_EXTRA)
# Sapphire Rapids: tiles of 16 rows of 64 bytes.
_AMX_EXTRA = ("amx_tile", "amx_int8")
_X86_AMX = _X86_VNNI | frozenset(_AMX_EXTRA)
_ARM_DOT = frozenset({"asimd", "asimddp"})


@dataclass(frozen=True)
class Tier:
    """What a kernel may count on.

    Parameters
    ----------
    vector_bits : int
        Width of the widest vector register.
    features : frozenset of str
        Instruction set extensions that every target of this tier has, as in ``/proc/cpuinfo``.
    """

    vector_bits: int
    features: frozenset[str]


# Worst to best, of each architecture.
TIERS: dict[str, Tier] = {
    "portable": Tier(128, frozenset()),
    "sse4": Tier(128, _X86_V2),
    "avx2": Tier(256, _X86_V3),
    "avx2-vnni": Tier(256, _X86_AVX_VNNI),
    "avx512": Tier(512, _X86_V4),
    "avx512-vnni": Tier(512, _X86_VNNI),
    "amx": Tier(512, _X86_AMX),
    "neon-dot": Tier(128, _ARM_DOT),
}

# /proc/cpuinfo name -> LLVM name, for every extension that a target dictionary may switch on.
_LLVM_NAMES: dict[str, dict[str, str]] = {
    "x86_64": {
        "pni": "sse3",
        "ssse3": "ssse3",
        "sse4_1": "sse4.1",
        "sse4_2": "sse4.2",
        "cx16": "cx16",
        "lahf_lm": "sahf",
        "popcnt": "popcnt",
        "abm": "lzcnt",
        "avx": "avx",
        "avx2": "avx2",
        "bmi1": "bmi",
        "bmi2": "bmi2",
        "f16c": "f16c",
        "fma": "fma",
        "movbe": "movbe",
        "xsave": "xsave",
        "amx_int8": "amx-int8",
        "amx_tile": "amx-tile",
        "avx_vnni": "avxvnni",
        "avx512f": "avx512f",
        "avx512bw": "avx512bw",
        "avx512cd": "avx512cd",
        "avx512dq": "avx512dq",
        "avx512vl": "avx512vl",
        "avx512_bf16": "avx512bf16",
        "avx512_bitalg": "avx512bitalg",
        "avx512_fp16": "avx512fp16",
        "avx512_vbmi2": "avx512vbmi2",
        "avx512_vnni": "avx512vnni",
        "avx512_vpopcntdq": "avx512vpopcntdq",
        "avx512ifma": "avx512ifma",
        "avx512vbmi": "avx512vbmi",
        "gfni": "gfni",
        "vaes": "vaes",
        "vpclmulqdq": "vpclmulqdq",
    },
    "aarch64": {
        "asimd": "neon",
        "asimddp": "dotprod",
        "asimdhp": "fullfp16",
        "bf16": "bf16",
        "i8mm": "i8mm",
        "sve": "sve",
        "sve2": "sve2",
    },
}
# LLVM switches that choose among instructions without asking for any.
_TUNING = frozenset({"prefer-256-bit"})

# Extensions that an mcpu brings along, by architecture. Other CPU names are refused: only LLVM knows what they imply.
_MCPU: dict[str, dict[str, frozenset[str]]] = {
    "x86_64": {
        "x86-64": frozenset(),
        "x86-64-v2": _X86_V2,
        "x86-64-v3": _X86_V3,
        "x86-64-v4": _X86_V4,
    },
    "aarch64": {"generic": frozenset({"asimd"})},
}
_TRIPLES = {"x86_64": "x86_64-unknown-linux-gnu", "aarch64": "aarch64-unknown-linux-gnu"}


@dataclass(frozen=True)
class _Row:
    architecture: str
    mcpu: str
    mattr: tuple[str, ...]
    features: frozenset[str]
    tier: str


def _switched_on(*features: str) -> tuple[str, ...]:
    """LLVM's ``mattr`` for x86-64 features."""
    return tuple(f"+{_LLVM_NAMES['x86_64'][name]}" for name in features)


# LLVM tunes x86-64-v4 for 256-bit vectors; the loops it vectorises by itself would leave half of each register idle.
_WIDE = "-prefer-256-bit"
# Worst to best within an architecture: `native` takes the last one that the host can run.
_ROWS: dict[str, _Row] = {
    "x86-64-v2": _Row("x86_64", "x86-64-v2", (), _X86_V2, "sse4"),
    "x86-64-v3": _Row("x86_64", "x86-64-v3", (), _X86_V3, "avx2"),
    "avx2-vnni": _Row("x86_64", "x86-64-v3", _switched_on(*_AVX_VNNI_EXTRA), _X86_AVX_VNNI, "avx2-vnni"),
    "x86-64-v4": _Row("x86_64", "x86-64-v4", (_WIDE,), _X86_V4, "avx512"),
    "avx512-vnni": _Row("x86_64", "x86-64-v4", (*_switched_on(*_VNNI_EXTRA), _WIDE), _X86_VNNI, "avx512-vnni"),
    "amx": _Row("x86_64", "x86-64-v4", (*_switched_on(*_VNNI_EXTRA, *_AMX_EXTRA), _WIDE), _X86_AMX, "amx"),
    "aarch64": _Row("aarch64", "generic", ("+neon", "+dotprod"), _ARM_DOT, "neon-dot"),
}


def cpu_names() -> tuple[str, ...]:
    """The named CPU targets, worst to best within an architecture."""
    return tuple(_ROWS)


def cpu_target(name: str) -> Target | None:
    """The CPU target of that name, if there is one; ``native`` is the best one that this host can run."""
    if name == "native":
        return native(host_features(), platform.machine())
    return _from_row(name) if name in _ROWS else None


def native(features: frozenset[str], architecture: str) -> Target:
    """Give the best named target that a CPU with these features can run.

    Parameters
    ----------
    features : frozenset of str
        As `host_features` returns them.
    architecture : str
        ``x86_64`` or ``aarch64``.

    Raises
    ------
    HostError
        If there is none.
    """
    fitting = [name for name, row in _ROWS.items() if row.architecture == architecture and row.features <= features]
    if fitting:
        return _from_row(fitting[-1])
    lowest = next((name for name, row in _ROWS.items() if row.architecture == architecture), None)
    if lowest is None:
        raise HostError(
            "target native", f"this host is {architecture}; expected {' or '.join(_TRIPLES)}", "name a target"
        )
    missing = ", ".join(sorted(_ROWS[lowest].features - features))
    raise HostError(
        "target native", f"this CPU lacks {missing}, which {lowest} needs", "name a target to compile for another host"
    )


def host_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Give the CPU features that every processor of this host has.

    Parameters
    ----------
    cpuinfo : Path
        The kernel's description of the processors.

    Returns
    -------
    frozenset of str
        The words of the ``flags`` (x86-64) or ``Features`` (aarch64) line.

    Raises
    ------
    HostError
        If the description is missing or names no features: the host is not Linux on a known architecture.
    """
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        reason = error.strerror or str(error)
        raise HostError(
            str(cpuinfo), f"cannot be read ({reason}), so the CPU's features are unknown", "Linux is needed"
        ) from error
    lines = {line for line in text.splitlines() if line.partition(":")[0].strip() in ("flags", "Features")}
    sets = [frozenset(line.partition(":")[2].split()) for line in lines]
    if not sets:
        raise HostError(str(cpuinfo), "names no CPU features; expected a line 'flags' or 'Features'", "name a target")
    return frozenset.intersection(*sets)


def require_host(target: Target, hint: str) -> None:
    """Refuse a target whose code this host cannot run in this process.

    Raises
    ------
    HostError
        If it is no CPU target, or the host has another architecture or lacks a feature; ``hint`` says what to do.
    """
    if target.kind != "cpu":
        raise HostError(f"target {target.name}", "is for a GPU; expected a CPU target here", hint)
    if target.architecture != platform.machine():
        reason = f"is for {target.architecture}; this host is {platform.machine()}"
        raise HostError(f"target {target.name}", reason, hint)
    missing = sorted(target.features - host_features())
    if missing:
        raise HostError(f"target {target.name}", f"this CPU lacks {', '.join(missing)}", hint)


def _from_row(name: str) -> Target:
    row = _ROWS[name]
    tvm: dict[str, Any] = {"kind": "llvm", "mtriple": _TRIPLES[row.architecture], "mcpu": row.mcpu}
    if row.mattr:
        tvm["mattr"] = list(row.mattr)
    return Target(name, tvm, row.features, row.tier)


def cpu_from_dict(given: Mapping[str, Any]) -> Target:
    """The target of a TVM target dictionary of kind ``llvm`` (see `tvm_ternary.target.resolve`)."""
    tvm = deepcopy(dict(given))
    architecture = _architecture(tvm)
    mcpus = _MCPU[architecture]
    mcpu = tvm.setdefault("mcpu", next(iter(mcpus)))
    if not isinstance(mcpu, str) or mcpu not in mcpus:
        raise OptionError(
            "target",
            f"mcpu is {mcpu!r}, whose CPU features are not known here; expected one of {', '.join(mcpus)}",
            "add further features by mattr, such as '+avx512vnni'",
        )
    features = _apply_mattr(mcpus[mcpu], tvm.get("mattr", []), architecture)
    fitting = [name for name, tier in TIERS.items() if tier.features <= features]
    return Target(_dict_name(tvm), tvm, features, fitting[-1])


def _architecture(tvm: dict[str, Any]) -> str:
    triple = tvm.setdefault("mtriple", _TRIPLES.get(platform.machine(), platform.machine()))
    architecture, _, rest = str(triple).partition("-")
    if architecture not in _TRIPLES or "linux" not in rest:
        raise OptionError("target", f"mtriple is {triple!r}; expected {' or '.join(_TRIPLES.values())}")
    return architecture


def _apply_mattr(features: frozenset[str], mattr: object, architecture: str) -> frozenset[str]:
    known = {llvm: name for name, llvm in _LLVM_NAMES[architecture].items()}
    if not isinstance(mattr, list | tuple) or not all(isinstance(item, str) for item in mattr):
        raise OptionError("target", f"mattr is {mattr!r}; expected a list such as ['+avx512vnni']")
    for item in mattr:
        sign, name = item[:1], item[1:]
        if sign not in ("+", "-") or name not in known.keys() | _TUNING:
            choices = ", ".join(sorted(known.keys() | _TUNING))
            raise OptionError("target", f"mattr holds {item!r}; expected '+' or '-' and one of {choices}")
        if name in known:
            features = features | {known[name]} if sign == "+" else features - {known[name]}
    return features


def _dict_name(tvm: dict[str, Any]) -> str:
    return ",".join((f"llvm:{tvm['mcpu']}", *tvm.get("mattr", [])))
