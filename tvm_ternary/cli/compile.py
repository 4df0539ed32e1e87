"""``tvm-ternary compile``: a model in, a shared library with ternary weights out."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import tvm_ternary
from tvm_ternary.cli.options import add_json, add_verb, constant, parse_pairs, print_json, size_or_name
from tvm_ternary.cli.quantize import add_fitting, fitting
from tvm_ternary.target.cpu import cpu_names
from tvm_ternary.target.cuda import cuda_names

_DESCRIPTION = f"""\
Compile a model to one shared library whose matrices are ternary: each is a sum of one to four matrices of
{{-1, 0, 1}}, with a scale for every group of weights. The table at the end says what became of every matrix, or why it
stayed float.

schemes   t3a8g64: 3 trit planes (t1 to t4: more are nearer to the float weights, larger and slower), int8 activations
          (a8; a32: float32, on CPUs; a16, abf16: float16, bfloat16, on GPUs; a1: ternary), a scale for every 64 weights
          (g64; nothing: one a row; pt: one a matrix)
targets   native (this CPU), {", ".join(cpu_names())};
          GPUs: {", ".join(cuda_names())}, several as
          cuda-sm_80+sm_90 (nvcc is needed, a GPU is not); or a TVM target as JSON
methods   absmax, absmean, meanstd, optimal, percentile, twn: how one plane is fitted
"""
_PACKING = (
    "how trits lie in memory: fast (default), 2 bits each, or dense, 1.6 bits each, for a8 schemes; groups of 64 and "
    "less are padded so that nothing is saved. With AVX-512 VNNI, one row on one thread and weights read from memory, "
    "dense is 12%% to 14%% faster for 16 million weights and more; from a cache it takes 1.7 times as long, and on "
    "other CPUs it only saves memory"
)
_ATTENTION = """\
a decoder's keys and values of the past: full leaves them among inputs and outputs; the other modes keep them inside the
library from run to run, as ternary planes, so that a run takes new tokens only and the past takes a sixth or a twelfth
of the memory. adaptive chooses the planes of each attention, and tvm_ternary.load(kv_memory=...) how much stays float
"""
_EXAMPLES = """\
  tvm-ternary compile model.onnx -o model.so
  tvm-ternary compile model.onnx -o model.so --scheme t1a8g128 --dim batch=1
  tvm-ternary compile model.onnx -o model.so --layers ffn --layers 'query|key=t4a8g64'
  tvm-ternary compile model.onnx -o model.so --target x86-64-v3 --weights beside
  tvm-ternary compile model.onnx -o model.so --target cuda-sm_90 --scheme t2a16g64 --dim batch=1 --dim sequence=128
  tvm-ternary compile model.onnx -o model.so --tuning-log my-tuning
  tvm-ternary compile checkpoint/ -o model.so --scheme t2a8g64 --calibration texts.txt
  tvm-ternary compile decoder.onnx -o decoder.so --attention ternary-keys-values --kv-planes 2
  tvm-ternary compile decoder.onnx -o decoder.so --attention adaptive --kv-calibration texts.txt --length 1024
  tvm-ternary compile vad.onnx -o vad.so --constant sr=16000
  tvm-ternary compile detector.onnx -o detector.so --dim 'height=32*rows' --dim 'width=32*columns'
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb and its options."""
    parser = add_verb(verbs, "compile", "compile a model to a .so with ternary weights", _DESCRIPTION, _EXAMPLES)
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="an .onnx file, a checkpoint folder (config.json, *.safetensors), or one that 'quantize' wrote",
    )
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="the .so to write; whole or not at all")
    parser.add_argument("--target", default="native", help="where it shall run (default: %(default)s)")
    parser.add_argument(
        "--scheme", help="what matrices become (default: t3a8g64; a quantized checkpoint's are what they are)"
    )
    parser.add_argument(
        "--layers",
        metavar="PATTERN[=SCHEME]",
        action="append",
        help="which matrices: all (default), attention, ffn, or a regular expression searched in their names, perhaps "
        "with a scheme of its own; may be repeated, the first that matches counts; the others stay float",
    )
    parser.add_argument("--method", help="how one plane is fitted (default: twn)")
    parser.add_argument(
        "--dim",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="fix a symbolic dimension, or say what it is: another one, or arithmetic (height=32*rows: a multiple of "
        "32; rows is a new name); may be repeated",
    )
    parser.add_argument(
        "--constant",
        metavar="INPUT=VALUE",
        action="append",
        default=[],
        help="make an input a constant, a number or a list such as [[1,2]]; may be repeated",
    )
    parser.add_argument("--packing", default="fast", help=_PACKING)
    parser.add_argument(
        "--embeddings",
        choices=("int8", "float"),
        help="what tables that are read by rows become (default: int8, with a scale a row)",
    )
    parser.add_argument(
        "--weights",
        choices=("auto", "inside", "beside"),
        default="auto",
        help="where the weights go: inside the .so, or beside it in a safetensors file (default: beside over 1 GiB)",
    )
    parser.add_argument(
        "--tuning-log",
        metavar="DIR",
        help="a folder that 'tvm-ternary tune' has written; its records win over the shipped ones",
    )
    group = parser.add_argument_group(
        "fitting",
        "with any of --calibration, --recipe, --edges, --output-layer matrices are fitted as 'quantize' does it",
    )
    add_fitting(group, edges="same", output_layer="same")
    _add_attention(parser.add_argument_group("attention", _ATTENTION))
    parser.add_argument("--dump-ir", metavar="DIR", help="write the program after every phase to this folder")
    parser.add_argument("--quiet", action="store_true", help="no progress and no tables")
    add_json(parser)
    parser.set_defaults(run=run)


def _add_attention(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--attention",
        metavar="[PATTERN=]MODE",
        action="append",
        help="full (default), ternary-keys, ternary-keys-values or adaptive, for all attentions or for those whose "
        "input of past keys matches; may be repeated, the first that matches counts",
    )
    group.add_argument(
        "--kv-planes", metavar="N", default="2", help="ternary planes, 1 to 3, or of keys and values: 2,1 (default: 2)"
    )
    group.add_argument(
        "--kv-window",
        metavar="TOKENS",
        type=int,
        default=64,
        help="last tokens that stay in float, a multiple of 64 (default: %(default)s)",
    )
    group.add_argument(
        "--no-kv-rotation",
        dest="kv_rotation",
        action="store_false",
        help="round heads as they are, not turned by a Hadamard matrix before and back behind, which loses less",
    )
    group.add_argument(
        "--kv-calibration",
        metavar="DATA",
        help="texts that adaptive measures errors with, as for --calibration, which is the default",
    )
    group.add_argument(
        "--kv-error",
        metavar="E",
        type=float,
        help="the largest relative error of any head that adaptive allows (default: 0.2)",
    )


def run(args: argparse.Namespace) -> int:
    """Compile, showing progress, and print what became of every matrix."""
    dims = parse_pairs("--dim", args.dim, "batch=1")
    constants = parse_pairs("--constant", args.constant, "sr=16000")
    options: dict[str, Any] = {
        "target": args.target,
        "scheme": args.scheme,
        "layers": args.layers,
        "method": args.method,
        "dims": {name: size_or_name("--dim", name, text) for name, text in dims.items()},
        "constants": {name: constant(name, text) for name, text in constants.items()},
        "packing": args.packing,
        "embeddings": args.embeddings,
        "attention": args.attention,
        "kv_planes": args.kv_planes,
        "kv_window": args.kv_window,
        "kv_rotation": args.kv_rotation,
        "kv_calibration": args.kv_calibration,
        **({} if args.kv_error is None else {"kv_error": args.kv_error}),
        "weights": args.weights,
        "tuning_log": args.tuning_log,
        "dump_ir": args.dump_ir,
        **fitting(args),
    }

    from tvm_ternary.cli.progress import show_progress

    with show_progress(quiet=args.quiet or args.json) as progress:
        artifact = tvm_ternary.compile(args.model, args.output, progress=progress, **options)
    for note in artifact.notes:
        print(f"tvm-ternary: note: {note}", file=sys.stderr)
    file_bytes = artifact.path.stat().st_size
    if args.json:
        manifest = artifact.manifest.to_dict()
        print_json({"path": str(artifact.path), "bytes": file_bytes, "seconds": artifact.seconds, "manifest": manifest})
    elif not args.quiet:
        from tvm_ternary.analysis.report import attentions_tables, layers_table, summary_table
        from tvm_ternary.cli.tables import print_tables

        summary = summary_table(artifact.manifest, file_bytes, artifact.seconds)
        print_tables([layers_table(artifact.manifest.layers), *attentions_tables(artifact.manifest), summary])
    return 0
