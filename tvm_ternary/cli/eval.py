"""``tvm-ternary eval``: what a model loses when its weights become ternary."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tvm_ternary.cli.options import add_json, add_verb, constant, parse_pairs, parse_value, print_json, size_or_name
from tvm_ternary.errors import OptionError

_DESCRIPTION = """\
Compare a float model with the same model after its weights became ternary. All are compiled, run on the same data with
the activations that the scheme says (int8 for a8), and compared

  matrix by matrix   error of the weights, and of the outputs for the inputs that the float model gives the matrix
  at the outputs     signal to noise (SQNR), cosine, relative, largest and mean error; for logits the Kullback-Leibler
                     divergence and how often the most likely class is the same; for decoders both perplexities
  by your measure    --metric FILE.py:FUNCTION, called for every model. Write one of

                       def accuracy(run):               # run(inputs) gives outputs, both dicts of arrays by name;
                           ...                          # run.inputs and run.outputs have names, dtypes and shapes
                           return {"accuracy": 0.93}    # a number or numbers by name; or arrays (rows, width), whose
                                                        # rows are compared with the float model's
                       def accuracy(inputs, outputs):   # lists with a dict for each sample of --data
                           return 0.93

Bits a weight count scales and padding, as they lie in the library.
"""
_EXAMPLES = """\
  tvm-ternary eval model.onnx quantized-folder --data samples.npz
  tvm-ternary eval model.onnx --scheme t1a8g64 --scheme t2a8g64 --scheme t3a8g64 --html report.html
  tvm-ternary eval checkpoint-folder quantized-folder --data lee_background.cor --samples 64 --length 128
  tvm-ternary eval float.so ternary.so --metric examples/sentence_similarity.py:lee --json
  tvm-ternary eval model.onnx folder-a folder-b --metric metrics.py:accuracy --plots pictures
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb and its options."""
    parser = add_verb(verbs, "eval", "compare a ternary model with its float model", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help="the float model: .onnx, checkpoint folder, or its compiled .so")
    parser.add_argument("candidates", metavar="TERNARY", nargs="*", help="quantized folders or compiled .so files")
    parser.add_argument(
        "--scheme", metavar="SCHEME", action="append", default=[], help="quantize MODEL to it too; may be repeated"
    )
    _add_quantization(parser)
    _add_data(parser)
    parser.add_argument(
        "--metric", metavar="FILE.py:FUNCTION", action="append", default=[], help="your measure; may be repeated"
    )
    parser.add_argument(
        "--logits",
        metavar="OUTPUT",
        action="append",
        default=[],
        help="an output that is logits; may be repeated (default: those with 'logits' in their name)",
    )
    parser.add_argument("--target", default="native", help="what to compile for (default: %(default)s)")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: as compiled)")
    parser.add_argument("--threads", metavar="N", type=int, help="threads that compute (default: one a core)")
    for option, meaning in (("--dim", "fix a symbolic dimension"), ("--constant", "make an input a constant")):
        parser.add_argument(
            option, metavar="NAME=VALUE", action="append", default=[], help=f"{meaning}; as for 'compile'"
        )
    parser.add_argument("--html", metavar="FILE", help="write a report with pictures too, one file")
    parser.add_argument("--plots", metavar="DIR", help="write the pictures too, as .svg and .png")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    add_json(parser)
    parser.set_defaults(run=run)


def _add_quantization(parser: argparse.ArgumentParser) -> None:
    """Options of 'quantize' that --scheme goes with."""
    options = {"--edges": "WHAT", "--output-layer": "WHAT", "--config": "FILE", "--method": "METHOD"}
    group = parser.add_argument_group("for --scheme, as for 'quantize'")
    group.add_argument("--layers", metavar="PATTERN[=SCHEME]", action="append")
    for option, metavar in options.items():
        group.add_argument(option, metavar=metavar)
    group.add_argument("--recipe", metavar="OPTION=VALUE", action="append")
    group.add_argument("--calibration", metavar="DATA")


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="what to run on: .npz or .jsonl of inputs, or text, a sample a line (default: random inputs)",
    )
    parser.add_argument("--samples", metavar="N", type=int, default=32, help="at most (default: %(default)s)")
    parser.add_argument(
        "--length", metavar="N", type=int, default=128, help="longest text, in tokens (default: %(default)s)"
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json for text (default: the one beside MODEL)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the choice (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Evaluate, showing progress, and print or write what was found."""
    options = _options(args)

    from tvm_ternary.analysis.gallery import write_pictures
    from tvm_ternary.analysis.html import write_report
    from tvm_ternary.analysis.pictures import require_matplotlib
    from tvm_ternary.analysis.quality_tables import evaluation_tables
    from tvm_ternary.cli.progress import show_progress
    from tvm_ternary.cli.tables import print_tables
    from tvm_ternary.evaluation.evaluate import evaluate
    from tvm_ternary.files import require_writable

    if args.html is not None:
        require_writable(args.html)
    if args.html is not None or args.plots is not None:
        require_matplotlib()
    with show_progress(quiet=args.quiet or args.json) as progress:
        evaluation = evaluate(args.model, args.candidates, progress=progress, **options)
    if args.html is not None:
        write_report(evaluation, Path(args.html))
    if args.plots is not None:
        write_pictures(evaluation, Path(args.plots))
    if args.json:
        print_json(evaluation.to_dict())
    else:
        print_tables(evaluation_tables(evaluation))
    return 0


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """What `tvm_ternary.evaluation.evaluate` takes by keyword."""
    if args.seed < 0:
        raise OptionError("--seed", f"is {args.seed}; expected a whole number")
    dims = parse_pairs("--dim", args.dim, "batch=1")
    constants = parse_pairs("--constant", args.constant, "sr=16000")
    same = (
        "scheme",
        "target",
        "device",
        "data",
        "samples",
        "length",
        "seed",
        "tokenizer",
        "metric",
        "logits",
        "threads",
    )
    return {
        **{name: getattr(args, name) for name in same},
        "dims": {name: size_or_name("--dim", name, text) for name, text in dims.items()},
        "constants": {name: constant(name, text) for name, text in constants.items()},
        "options": _quantization(args),
    }


def _quantization(args: argparse.Namespace) -> dict[str, Any]:
    """What `tvm_ternary.quantize_model` takes by keyword."""
    names = ("layers", "edges", "output_layer", "config", "method", "recipe", "calibration")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if given and not args.scheme:
        option = next(iter(given)).replace("_", "-")
        raise OptionError(f"--{option}", "is for --scheme, which is not given", "leave it out")
    pairs = parse_pairs("--recipe", given.pop("recipe", []), "damping=0.02")
    recipe: dict[str, Any] = {name: parse_value(text) for name, text in pairs.items()}
    recipe |= {"method": given.pop("method")} if "method" in given else {}
    if "calibration" in given:
        given |= {name: getattr(args, name) for name in ("tokenizer", "length", "seed")}
    return {**given, **({"recipe": recipe} if recipe else {})}
