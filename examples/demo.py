"""The whole way on a real model: fetch it, compile it with ternary weights, run it, and compare it with onnxruntime.

``make demo`` runs this. The model is paraphrase-MiniLM-L3-v2, which turns a sentence into 384 numbers so that sentences
of like meaning get like numbers. It was trained in float32; nothing is trained again here.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from fetch_models import DEMO, FOLDER, PARAPHRASE, TOKENIZER, FetchError, fetch
from tokenizers import Tokenizer

import tvm_ternary as tt
from tvm_ternary.analysis.report import Table, format_bytes, layers_table, summary_table
from tvm_ternary.cli.progress import show_progress
from tvm_ternary.cli.tables import print_tables

SCHEME = "t3a8g64"
OUTPUT = Path("demo-out") / "model.so"
GPU, GPU_OUTPUT = "cuda-sm_80+sm_90", Path("demo-out") / "gpu.so"
SENTENCES = (
    "The weather is lovely today.",
    "It is so sunny outside!",
    "He drove to the stadium.",
    "He took his car to the football ground.",
    "The new film was praised by every critic.",
    "Critics loved the movie.",
)
# The model's fourth output is the mean of the last hidden states over a sentence's tokens.
EMBEDDING = 3
TOKENS = 128
ROUNDS = 30
# Far below what any sensible scheme reaches, far above chance.
MUST_REACH = 0.8

Floats = npt.NDArray[np.float32]
Inputs = dict[str, npt.NDArray[Any]]


def main() -> int:
    fetch(DEMO)
    model = FOLDER / PARAPHRASE
    OUTPUT.parent.mkdir(exist_ok=True)
    print(f"1. Compile {model.name} for this CPU, scheme {SCHEME}, to {OUTPUT}\n", flush=True)
    with show_progress(quiet=False) as progress:
        artifact = tt.compile(model, OUTPUT, scheme=SCHEME, progress=progress)
    manifest = artifact.manifest
    print_tables([layers_table(manifest.layers), summary_table(manifest, OUTPUT.stat().st_size, artifact.seconds)])

    print(f"\n2. Run it on {len(SENTENCES)} sentences, and the float model in onnxruntime too\n", flush=True)
    ours = tt.load(OUTPUT, threads=1)
    theirs = onnxruntime.InferenceSession(model, session_options(), providers=["CPUExecutionProvider"])
    inputs = tokenize(SENTENCES)
    name = ours.outputs[EMBEDDING].name
    ternary, dense = (normalized(module.run([name], inputs)[0]) for module in (ours, theirs))
    cosines = (ternary * dense).sum(axis=1)
    print_tables([sentences_table(cosines), pairs_table(ternary @ ternary.T, dense @ dense.T)])

    print(f"\n3. A quick look at speed, not a benchmark: 1 sentence of {TOKENS} tokens, 1 thread\n", flush=True)
    one = random_tokens()
    runs = time_alternating(lambda: ours.run([name], one), lambda: theirs.run([name], one))
    print_tables([costs_table(manifest.sizes.weights_after, manifest.sizes.weights_before, *runs)])

    print(f"\n4. Compile it for GPUs too, {GPU}, whether there is one here or not, to {GPU_OUTPUT}\n", flush=True)
    with show_progress(quiet=False) as progress:
        dims = {"batch_size": 1, "sequence_length": TOKENS}
        artifact = tt.compile(model, GPU_OUTPUT, target=GPU, scheme=SCHEME, dims=dims, progress=progress)
    print_tables([gpu_table(artifact)])
    if cosines.min() < MUST_REACH:
        print(f"error: a cosine is below {MUST_REACH}: this is not the float model's meaning", file=sys.stderr)
        return 1
    return 0


def session_options() -> onnxruntime.SessionOptions:
    """One thread, everything that onnxruntime can optimise."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return options


def tokenize(sentences: tuple[str, ...]) -> Inputs:
    """Token numbers and mask, (sentences, longest) int64; short sentences are padded."""
    tokenizer = Tokenizer.from_file(str(FOLDER / TOKENIZER))
    tokenizer.enable_padding()
    tokenizer.enable_truncation(TOKENS)
    encoded = tokenizer.encode_batch(list(sentences))
    return {
        "input_ids": np.array([item.ids for item in encoded], dtype=np.int64),
        "attention_mask": np.array([item.attention_mask for item in encoded], dtype=np.int64),
    }


def random_tokens() -> Inputs:
    """One sentence of ordinary words, as long as wanted."""
    words = np.random.default_rng(0).integers(2000, 20000, (1, TOKENS))
    return {"input_ids": words, "attention_mask": np.ones_like(words)}


def normalized(embeddings: Floats) -> Floats:
    """Rows of length one, so that a product of two is the cosine of their angle."""
    lengths: Floats = np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings / lengths


def sentences_table(cosines: Floats) -> Table:
    """How near the embedding of each sentence is to the float model's: 1 is the same direction."""
    rows = [(str(i), sentence, f"{c:.4f}") for i, (sentence, c) in enumerate(zip(SENTENCES, cosines, strict=True), 1)]
    return Table(("", "sentence", "cosine of its two embeddings, ternary and float"), tuple(rows), frozenset({2}))


def pairs_table(ternary: Floats, dense: Floats) -> Table:
    """How alike each model finds two sentences."""
    numbers = [str(i) for i in range(1, len(SENTENCES) + 1)]
    rows = [
        (number, *(f"{a:.2f} {b:.2f}" for a, b in zip(left, right, strict=True)))
        for number, left, right in zip(numbers, ternary, dense, strict=True)
    ]
    return Table(("alike: ternary, float", *numbers), tuple(rows))


def time_alternating(*calls: Callable[[], Any]) -> list[float]:
    """Median milliseconds of each call; they take turns, so that a busy moment hits all of them."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS + 1):
        for call, runs in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            runs.append(time.perf_counter() - start)
    # The first round warms up.
    return [1e3 * statistics.median(runs[1:]) for runs in seconds]


def costs_table(after: int, before: int, ours: float, theirs: float) -> Table:
    """Time and size of both."""
    rows = (
        ("tvm-ternary", f"{ours:.1f}", format_bytes(after)),
        ("onnxruntime, float32", f"{theirs:.1f}", format_bytes(before)),
    )
    return Table(("", "median ms", "weights"), rows, frozenset({1, 2}))


def gpu_table(artifact: tt.Artifact) -> Table:
    """What the library for GPUs holds."""
    target, kernels = artifact.manifest.target, artifact.manifest.kernels
    rows = (
        ("machine code for", " and ".join(target.archs)),
        ("kernels", f"{len({kernel.kernel for kernel in kernels})}, no source"),
        ("a run is", "recorded as a CUDA graph" if artifact.manifest.graph else "a launch a kernel"),
        ("compiled in", f"{sum(artifact.seconds.values()):.1f} s, by nvcc {target.cuda}"),
        ("to deploy it", f"tvm-ternary package {artifact.path} -o deploy"),
    )
    return Table(("", ""), rows)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (tt.TernaryError, FetchError) as error:
        sys.exit(f"error: {error}")
