"""``tvm-ternary quantize``: a model in, a checkpoint folder with ternary matrices out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import tvm_ternary
from tvm_ternary.cli.options import add_json, add_verb, constant, parse_pairs, parse_value, print_json, size_or_name

if TYPE_CHECKING:
    from tvm_ternary.analysis.report import Table
    from tvm_ternary.convert.work import QuantizedLayer

_DESCRIPTION = """\
Make the matrices of a model ternary and write a checkpoint folder, which 'compile', 'eval' and a later 'quantize' read.
Each matrix becomes a sum of one to four matrices of {-1, 0, 1} with a scale for every group of weights, fitted one
matrix after the other: a model larger than memory streams through, and a killed job goes on where it was.

MODEL     an .onnx file, or a checkpoint folder: config.json and *.safetensors (BERT, RoBERTa, GPT-2, LLaMA, ...)
schemes   t2a8g64: 2 trit planes (t1 to t4), int8 activations (a8; a32, a16, abf16, a1), a scale for every 64 weights
          (g64; nothing: one a row; pt: one a matrix)
policy    the first and the last block of layers matter most, and get four planes; the output layer stays float;
          embeddings become int8, a scale a row. --edges, --output-layer, --embeddings change that, and a regular
          expression of --layers wins over it
mixed     --target-bpw 3.5 or --max-error 0.05 choose planes and group sizes matrix by matrix, by the output error that
          each choice was measured to have; the table says why
data      with --calibration, matrices are fitted to what they multiply rather than to their weights alone:
          FILE.npz or FILE.jsonl of the model's inputs, or text, a document a line, for a model with a tokenizer.json
"""
_EXAMPLES = """\
  tvm-ternary quantize model.onnx --dry-run                      the plan: what would become of every matrix, and why
  tvm-ternary quantize model.onnx -o model-t2 --scheme t2a8g64
  tvm-ternary quantize checkpoint/ -o checkpoint-t2 --scheme t2a8g64 --calibration texts.txt --samples 128
  tvm-ternary quantize checkpoint/ -o OUT --layers ffn=t2a8g64 --layers 'query|key=t3a8g64'
  tvm-ternary quantize checkpoint/ -o OUT --edges same --output-layer same        every matrix at the scheme
  tvm-ternary quantize checkpoint/ -o OUT --target-bpw 3.5 --calibration texts.txt
  tvm-ternary quantize checkpoint/ -o OUT --config layers.toml
  tvm-ternary compile checkpoint-t2 -o model.so

layers.toml:
  scheme = "t2a8g64"
  output_layer = "t4"
  [layers]
  "query|key" = "t3a8g64"
  ffn = "t2a8g64"
  [recipe]
  damping = 0.02
"""
_PLAN, _DONE = ("matrix", "N x K", "becomes"), ("matrix", "N x K", "became")


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb and its options."""
    summary = "make a model's matrices ternary and write a checkpoint folder"
    parser = add_verb(verbs, "quantize", summary, _DESCRIPTION, _EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help="an .onnx file or a checkpoint folder")
    parser.add_argument("-o", "--output", metavar="OUT", help="the folder to write; whole or not at all")
    add_quantization(parser)
    parser.add_argument(
        "--dim",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="fix a symbolic dimension, or say what it is, as for 'compile'; may be repeated",
    )
    parser.add_argument(
        "--constant",
        metavar="INPUT=VALUE",
        action="append",
        default=[],
        help="make an input a constant; may be repeated",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is a quantized checkpoint")
    parser.add_argument("--no-resume", action="store_true", help="throw away what a killed job has finished")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--target-bpw",
        type=float,
        metavar="BITS",
        help="choose planes and group sizes a matrix, for the least error with so many bits a weight on average",
    )
    budget.add_argument(
        "--max-error",
        type=float,
        metavar="ERROR",
        help="choose the fewest bits a matrix with at most this relative output error, float where nothing reaches it",
    )
    parser.add_argument("--dry-run", action="store_true", help="show the plan and write nothing")
    parser.add_argument("--quiet", action="store_true", help="no progress and no tables")
    add_json(parser)
    parser.set_defaults(run=run)


def add_quantization(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what matrices become and how they are fitted."""
    parser.add_argument("--scheme", help="what matrices become (default: t3a8g64)")
    parser.add_argument(
        "--layers",
        metavar="PATTERN[=SCHEME]",
        action="append",
        help="which matrices: all (default), attention, ffn, or a regular expression searched in their names, perhaps "
        "with a scheme of its own; may be repeated, the first that matches counts; the others stay float",
    )
    parser.add_argument("--embeddings", metavar="WHAT", help="tables of embeddings: int8 (default) or float")
    parser.add_argument("--config", metavar="FILE", help="a TOML file of these options; those given here win")
    parser.add_argument("--method", help="how matrices are fitted (default: planes)")
    add_fitting(parser, edges="t4", output_layer="float")


def add_fitting(parser: argparse._ActionsContainer, *, edges: str, output_layer: str) -> None:
    """Add the options of the fit that `compile` has, too."""
    place = "float, same (as the others), planes alone (t4) or a scheme"
    parser.add_argument("--edges", metavar="WHAT", help=f"the first and the last block: {place} (default: {edges})")
    parser.add_argument(
        "--output-layer", metavar="WHAT", help=f"what follows the blocks: {place} (default: {output_layer})"
    )
    parser.add_argument(
        "--recipe",
        metavar="OPTION=VALUE",
        action="append",
        default=[],
        help="an option of the fit, such as damping=0.02 or compensate=false; may be repeated",
    )
    parser.add_argument("--calibration", metavar="DATA", help="inputs to fit to: .npz, .jsonl, or text")
    parser.add_argument("--samples", type=int, default=128, help="how many of them (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which of them (default: %(default)s)")
    parser.add_argument("--tokenizer", metavar="FILE", help="for text (default: the model's own tokenizer.json)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a text at most (default: %(default)s)")


def quantization(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_quantization` parsed, as `tvm_ternary.quantize_model` takes it."""
    options = fitting(args)
    if args.method is not None:
        options["recipe"] = {**(options["recipe"] or {}), "method": args.method}
    return {**options, **{name: getattr(args, name) for name in ("scheme", "layers", "embeddings", "config")}}


def fitting(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_fitting` parsed, by the names of parameters; None for what was not given."""
    recipe = {name: parse_value(text) for name, text in parse_pairs("--recipe", args.recipe, "damping=0.02").items()}
    names = ("edges", "output_layer", "calibration", "samples", "seed", "tokenizer", "length")
    return {"recipe": recipe or None, **{name: getattr(args, name) for name in names}}


def run(args: argparse.Namespace) -> int:
    """Quantize, showing progress and each matrix with its error, and print what became of every matrix."""
    dims = parse_pairs("--dim", args.dim, "batch=1")
    constants = parse_pairs("--constant", args.constant, "sr=16000")
    options = {
        **quantization(args),
        "dims": {name: size_or_name("--dim", name, text) for name, text in dims.items()},
        "constants": {name: constant(name, text) for name, text in constants.items()},
        "target_bpw": args.target_bpw,
        "max_error": args.max_error,
        "overwrite": args.overwrite,
        "resume": not args.no_resume,
        "dry_run": args.dry_run,
    }

    from tvm_ternary.cli.progress import show_progress

    quiet = args.quiet or args.json
    with show_progress(quiet) as progress:
        on_layer = None if quiet else _show_layer
        done = tvm_ternary.quantize_model(args.model, args.output, progress=progress, on_layer=on_layer, **options)
    if args.json:
        layers = [{**asdict(layer), "notes": list(layer.notes)} for layer in done.layers]
        path = None if done.path is None else str(done.path)
        summary = {"bits_per_weight": done.bits_per_weight, "seconds": done.seconds, "resumed": done.resumed}
        print_json({"path": path, "layers": layers, **summary})
    elif not args.quiet:
        from tvm_ternary.cli.tables import print_tables

        print_tables([layers_table(done.layers, planned=args.dry_run), _summary(done)])
    return 0


def layers_table(layers: Sequence[QuantizedLayer], *, planned: bool) -> Table:
    """A row for every matrix; columns in which every cell would be empty are left out."""
    from tvm_ternary.analysis.report import Table

    columns = (*(_PLAN if planned else _DONE), "bits/weight", "weight error", "output error", "why", "notes")
    rows = [_row(layer) for layer in layers]
    used = [i for i in range(len(columns)) if i < 4 or any(row[i] for row in rows)]
    numeric = frozenset(position for position, i in enumerate(used) if 3 <= i <= 5)
    return Table(tuple(columns[i] for i in used), tuple(tuple(row[i] for i in used) for row in rows), numeric)


def _row(layer: QuantizedLayer) -> tuple[str, ...]:
    return (
        layer.name,
        " x ".join(map(str, layer.shape)),
        layer.scheme or "float32",
        f"{layer.bits_per_weight:.2f}",
        _share(layer.error),
        _share(layer.output_error),
        layer.why,
        "; ".join(layer.notes),
    )


def _summary(done: tvm_ternary.QuantizedModel) -> Table:
    from tvm_ternary.analysis.report import Table, format_bytes

    ternary = sum(layer.scheme is not None for layer in done.layers)
    facts = [
        ("matrices", f"{ternary} ternary, {len(done.layers) - ternary} left in float"),
        ("bits a weight", f"{done.bits_per_weight:.2f}, scales and float matrices counted"),
    ]
    if done.path is not None:
        size = sum(path.stat().st_size for path in done.path.iterdir())
        facts += [("folder", f"{done.path}, {format_bytes(size)}"), ("time", f"{done.seconds:.1f} s")]
    if done.resumed:
        facts.append(("resumed", f"{done.resumed} matrices were finished before"))
    return Table(("", ""), tuple(facts))


def _show_layer(layer: QuantizedLayer) -> None:
    """A line for a finished matrix; above the bars where there are some."""
    output = "" if layer.output_error is None else f", output error {_share(layer.output_error)}"
    print(f"  {layer.name}: {layer.scheme}, error {_share(layer.error)}{output}", file=sys.stderr, flush=True)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
