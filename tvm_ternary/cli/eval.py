"""``tvm-ternary eval``: what a model loses when its weights become ternary."""

from __future__ import annotations

import argparse
from typing import Any

from tvm_ternary.cli.options import add_json, add_verb, constant, parse_pairs, print_json, size_or_name
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
  tvm-ternary eval model.onnx --scheme t1a8g64 --scheme t2a8g64 --scheme t3a8g64
  tvm-ternary eval checkpoint-folder quantized-folder --data lee_background.cor --samples 64 --length 128
  tvm-ternary eval float.so ternary.so --metric examples/sentence_similarity.py:lee --json
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb and its options."""
    parser = add_verb(verbs, "eval", "compare a ternary model with its float model", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help="the float model: .onnx, checkpoint folder, or its compiled .so")
    parser.add_argument("candidates", metavar="TERNARY", nargs="*", help="quantized folders or compiled .so files")
    parser.add_argument(
        "--scheme", metavar="SCHEME", action="append", default=[], help="compile MODEL with it too; may be repeated"
    )
    parser.add_argument("--layers", metavar="PATTERN[=SCHEME]", action="append", help="for --scheme; as for 'compile'")
    parser.add_argument("--method", help="for --scheme; as for 'compile'")
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
    parser.add_argument("--quiet", action="store_true", help="no progress")
    add_json(parser)
    parser.set_defaults(run=run)


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
    if args.seed < 0:
        raise OptionError("--seed", f"is {args.seed}; expected a whole number")
    dims = {name: size_or_name("--dim", name, text) for name, text in parse_pairs("--dim", args.dim, "batch=1").items()}
    constants = parse_pairs("--constant", args.constant, "sr=16000")
    options: dict[str, Any] = {"layers": args.layers, "method": args.method}
    options = {name: value for name, value in options.items() if value is not None}
    if options and not args.scheme:
        raise OptionError(f"--{next(iter(options))}", "is for --scheme, which is not given", "leave it out")

    from tvm_ternary.analysis.quality_tables import evaluation_tables
    from tvm_ternary.cli.progress import show_progress
    from tvm_ternary.cli.tables import print_tables
    from tvm_ternary.evaluation.evaluate import evaluate

    with show_progress(quiet=args.quiet or args.json) as progress:
        evaluation = evaluate(
            args.model,
            args.candidates,
            scheme=args.scheme,
            target=args.target,
            device=args.device,
            data=args.data,
            samples=args.samples,
            length=args.length,
            seed=args.seed,
            tokenizer=args.tokenizer,
            metric=args.metric,
            logits=args.logits,
            threads=args.threads,
            dims=dims,
            constants={name: constant(name, text) for name, text in constants.items()},
            options=options,
            progress=progress,
        )
    if args.json:
        print_json(evaluation.to_dict())
    else:
        print_tables(evaluation_tables(evaluation))
    return 0
