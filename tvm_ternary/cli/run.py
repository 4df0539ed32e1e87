"""``tvm-ternary run``: run an artifact on given or random inputs."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvm_ternary.cli.options import add_json, add_verb, parse_pairs, print_json, whole_number
from tvm_ternary.errors import HostError, InputError, OptionError, OutputError

if TYPE_CHECKING:
    import numpy.typing as npt

    from tvm_ternary.analysis.profile import Ceiling
    from tvm_ternary.analysis.report import Table
    from tvm_ternary.runtime.manifest import TensorSpec
    from tvm_ternary.runtime.module import Module

    Arrays = dict[str, npt.NDArray[Any]]

_NAME_LENGTH = 100
# Runs of a profile, where --repeat does not say.
_PROFILED = 20
# Bytes: what a model moves beside its weights, at least.
_LEAST_BUFFER = 1 << 20

_DESCRIPTION = """\
Run a compiled model. An input that is not given is random within its declared shape; a dimension that is not given is
1 if it leads a shape, 32 otherwise, or what the given inputs have.
"""
_EXAMPLES = """\
  tvm-ternary run model.so
  tvm-ternary run model.so --dim batch=1 --dim length=128 --repeat 50 --threads 1
  tvm-ternary run model.so --dim length=128 --profile --trace trace.json --threads 1
  tvm-ternary run decoder.so --dim length=1 --past 1024 --repeat 20
  tvm-ternary run model.so --device cuda:1 --repeat 100
  tvm-ternary run model.so --input input_ids=ids.npy --input attention_mask=mask.npy --output results
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb and its options."""
    parser = add_verb(verbs, "run", "run a compiled model, and time it", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("library", metavar="SO", help="a .so made by 'tvm-ternary compile'")
    parser.add_argument(
        "--input", metavar="NAME=FILE.npy", action="append", default=[], help="an input's values; may be repeated"
    )
    parser.add_argument(
        "--dim", metavar="NAME=VALUE", action="append", default=[], help="size of a dimension; may be repeated"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs (default: %(default)s)")
    parser.add_argument("--output", metavar="DIR", help="write every output there as NAME.npy")
    parser.add_argument("--repeat", metavar="N", type=int, help="time N runs, after one to warm up")
    profile = "print the time of every operator and layer; with a C compiler their share of the roofline too"
    parser.add_argument("--profile", action="store_true", help=profile)
    parser.add_argument("--trace", metavar="FILE", help="write one run as a Chrome trace, and print the profile")
    parser.add_argument(
        "--device",
        metavar="DEVICE",
        help="cpu, cuda (the first GPU) or cuda:N (default: what the model is compiled for)",
    )
    parser.add_argument("--threads", metavar="N", type=int, help="threads that compute (default: one a core)")
    group = parser.add_argument_group("cache", "for a model that was compiled with --attention to keep keys and values")
    group.add_argument("--past", metavar="N", type=int, help="random tokens that come before (default: none)")
    group.add_argument(
        "--kv-tokens", metavar="N", type=int, help="tokens there is room for (default: the model's most)"
    )
    group.add_argument(
        "--kv-window", metavar="N", type=int, help="last tokens that stay in float (default: as compiled)"
    )
    group.add_argument("--kv-memory", metavar="BYTES", help="what all may take, such as 512MiB; adaptive uses it up")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the model once, time it if asked, and print what came out."""
    if args.seed < 0:
        raise OptionError("--seed", f"is {args.seed}; expected a whole number")
    files = parse_pairs("--input", args.input, "input_ids=ids.npy")
    dims = {name: whole_number("--dim", name, text) for name, text in parse_pairs("--dim", args.dim, "batch=1").items()}

    from tvm_ternary.analysis.report import array_stats, cache_tables, outputs_table, timing_table
    from tvm_ternary.runtime.module import load
    from tvm_ternary.runtime.sample import random_inputs

    if args.trace is not None:
        from tvm_ternary.files import require_writable

        require_writable(Path(args.trace))
    cache = {name: getattr(args, name) for name in ("kv_tokens", "kv_window", "kv_memory")}
    module = load(args.library, args.device, args.threads, **cache)
    given = {name: _read_array(name, file) for name, file in files.items()}
    sizes = _dimensions(module.inputs, given, dims)
    if args.past is not None:
        _fill_cache(module, args.past, sizes, args.seed)
    known = module.known_dims
    inputs = {**random_inputs(module.inputs, sizes, args.seed, module.manifest.bounds, known), **given}
    names = [spec.name for spec in module.outputs]
    # A run may leave tokens behind; those that are timed begin where the first did.
    timing = module.time(inputs, args.repeat) if args.repeat is not None else None
    profiled = _profile(module, inputs, args) if args.profile or args.trace else None
    outputs = module.run(None, inputs)
    written = _write_arrays(Path(args.output), names, outputs) if args.output else None
    stats = [array_stats(name, array) for name, array in zip(names, outputs, strict=True)]
    if args.json:
        document = {
            "device": module.device,
            "threads": module.threads,
            "inputs": [{"name": name, "dtype": a.dtype.name, "shape": a.shape} for name, a in inputs.items()],
            "outputs": [asdict(item) for item in stats],
            "files": None if written is None else [str(path) for path in written],
            "seconds": None if timing is None else asdict(timing),
            "profile": None if profiled is None else profiled.document,
            "cache": asdict(module.stats()) if known else None,
        }
        print_json(document)
        return 0
    from tvm_ternary.cli.tables import print_tables

    timed = [timing_table(timing, module.threads)] if timing else []
    kept = cache_tables(module.stats()) if known else []
    print_tables([outputs_table(stats), *timed, *(profiled.tables if profiled else []), *kept])
    return 0


def _fill_cache(module: Module, past: int, sizes: dict[str, int], seed: int) -> None:
    """Run on so many random tokens, whose keys and values are kept."""
    from tvm_ternary.runtime.sample import random_inputs

    if not module.known_dims:
        raise OptionError("--past", "is for a model that keeps keys and values", "give its inputs of the past instead")
    if past < 1:
        raise OptionError("--past", f"is {past}; expected at least 1")
    runs, said = _runs_of(module, past)
    changed = said.keys() | module.known_dims.keys()
    # What is arithmetic over these is another number now than in the inputs that were given.
    kept = {name: size for name, size in sizes.items() if changed.isdisjoint(_factors(name))}
    for _ in range(runs):
        known, bounds = module.known_dims, module.manifest.bounds
        module.run([], random_inputs(module.inputs, kept | said, seed, bounds, known))


def _runs_of(module: Module, past: int) -> tuple[int, dict[str, int]]:
    """How many runs append so many tokens, and the dimensions of their inputs that say so."""
    from tvm_ternary.runtime.linear import Linear, read_linear

    length = module.manifest.caches[0].length
    if isinstance(length, int):
        runs, rest = divmod(past, length)
        if rest:
            raise OptionError("--past", f"is {past}; a run appends {length} tokens", f"give a multiple of {length}")
        return runs, {}
    named = {dim for spec in module.inputs for dim in spec.shape}
    formula = read_linear(length) or Linear({length: 1})
    (name, *others) = formula.factors
    if not others and (name in named or formula.multiple is not None):
        size = formula.solve(past)
        if size is None:
            raise OptionError("--past", f"is {past}; a run appends {length} tokens, which are never so many")
        return 1, {name: size}
    if length in named:
        return 1, {length: past}
    raise OptionError("--past", f"does not say how many of {length} tokens are of which dimension")


def _factors(dim: str) -> set[str]:
    from tvm_ternary.runtime.linear import read_linear

    formula = read_linear(dim)
    return set() if formula is None else set(formula.factors)


@dataclass(frozen=True)
class _Profiled:
    tables: list[Table]
    document: dict[str, Any]


def _profile(module: Module, inputs: Arrays, args: argparse.Namespace) -> _Profiled:
    """Profile, write the trace, and make the tables."""
    from tvm_ternary.analysis.profile import as_document, layers_table, operators_table, write_trace

    profile = module.profile(inputs, args.repeat or _PROFILED)
    if args.trace is not None:
        write_trace(profile, Path(args.trace))
    ceiling = _ceiling(module)
    about = profile, module.manifest, ceiling
    return _Profiled([operators_table(*about), layers_table(*about)], as_document(*about))


def _ceiling(module: Module) -> Ceiling | None:
    """What this machine can do at most; without a C compiler nobody knows, which is said."""
    from tvm_ternary.analysis.profile import Ceiling, activation_bits
    from tvm_ternary.bench.roofline import Roofline
    from tvm_ternary.target import resolve

    try:
        limits = Roofline(resolve(module.manifest.target.name), module.threads)
    except HostError as error:
        print(f"tvm-ternary: note: no share of the roofline: {error}", file=sys.stderr)
        return None
    bits = {32, *map(activation_bits, module.manifest.layers)}
    size = max(module.manifest.sizes.weights_after, _LEAST_BUFFER)
    return Ceiling(limits.bandwidth(size), {one: limits.peak(one) for one in bits})


def _read_array(name: str, file: str) -> npt.NDArray[Any]:
    import numpy as np

    from tvm_ternary.runtime.arrays import BFLOAT16, dtype_of

    subject, hint = f"input {name!r}", "write it with numpy.save"
    try:
        array = np.load(file, allow_pickle=False)
    except FileNotFoundError as error:
        raise InputError(subject, f"{file}: no such file") from error
    except OSError as error:
        raise InputError(subject, f"{file} cannot be read ({error.strerror or error})") from error
    except (ValueError, EOFError) as error:
        raise InputError(subject, f"{file} is not a whole .npy file of numbers", hint) from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise InputError(subject, f"{file} is an archive; expected a .npy file of one array", hint)
    # Of bfloat16 numpy writes only how wide it is.
    return array.view(dtype_of(BFLOAT16)) if array.dtype == np.dtype("V2") else array


def _dimensions(specs: Sequence[TensorSpec], given: Arrays, dims: dict[str, int]) -> dict[str, int]:
    """Add to ``dims`` the sizes that the given arrays have, so that random inputs fit them."""
    sizes = dict(dims)
    for spec in specs:
        array = given.get(spec.name)
        if array is None or array.ndim != len(spec.shape):
            # A wrong rank is reported when the model is run, with all that was expected.
            continue
        for name, size in zip(spec.shape, array.shape, strict=True):
            if isinstance(name, str) and sizes.setdefault(name, size) != size and name in dims:
                raise InputError(f"input {spec.name!r}", f"has {name}={size}; --dim says {name}={dims[name]}")
    return sizes


def _write_arrays(folder: Path, names: Sequence[str], arrays: Sequence[npt.NDArray[Any]]) -> list[Path]:
    import numpy as np

    from tvm_ternary.files import atomic_path

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            str(folder), f"cannot be made a folder ({error.strerror or error})", "choose another"
        ) from error
    paths = [folder / f"{stem}.npy" for stem in _file_stems(names)]
    for path, array in zip(paths, arrays, strict=True):
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            np.save(stream, array)
    return paths


def _file_stems(names: Sequence[str]) -> list[str]:
    """Give each output a file name that stays in its folder and is no other output's."""
    stems: list[str] = []
    for index, name in enumerate(names):
        stem = re.sub(r"[^A-Za-z0-9._-]", "_", name).strip(".")[:_NAME_LENGTH] or f"output_{index}"
        # Compared without case: some file systems do not tell case apart.
        while stem.lower() in {other.lower() for other in stems}:
            stem += "_"
        stems.append(stem)
    return stems
