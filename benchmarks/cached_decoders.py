"""A step of a decoder over a long past: ternary keys and values inside the library, and those that go in and out.

    python -m benchmarks.cached_decoders [--turns N] [--threads N,...]

A LLaMA of 12 layers, 768 wide, 12 heads and 4 of keys, random weights, matrices ``t1a8``; its past is so many random
tokens. ``full`` takes keys and values and gives them back in float32, as onnxruntime does with the same file (float32,
and 4-bit weights); the others keep them in. All are called as users call them, in turns. The lines go to
``benchmarks/results/cached_decoders.jsonl``, the table to ``.md`` beside it. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import tvm_ternary
from benchmarks.models import llama_of
from tvm_ternary.bench.machine import machine_facts
from tvm_ternary.bench.model_peers import FLOAT, INT4, PEERS, SPIN, open_session
from tvm_ternary.bench.timing import Spread, pace_of, time_turns, turn_ratio
from tvm_ternary.runtime.module import Module
from tvm_ternary.runtime.sample import random_inputs

RESULTS = Path(__file__).resolve().parent / "results" / "cached_decoders.jsonl"
OURS = {"full": {}, "2 planes": {"kv_planes": 2}, "1 plane": {"kv_planes": 1}}
# Far from the end of a block, so that no step packs one.
PASTS = tuple(past + 32 for past in (1024, 4096, 16384))
Feeds = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=7, help="of each engine (default: %(default)s)")
    parser.add_argument("--threads", default="1,2", help="default: %(default)s")
    args = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model.onnx"
        onnx.save(llama_of("both")(), model)
        libraries = {name: build(model, name, Path(scratch)) for name in OURS}
        peers = {name: PEERS[name](model, Path(scratch)) for name in (FLOAT, INT4)}
        for threads in map(int, args.threads.split(",")):
            for past in PASTS:
                lines.append(measure(libraries, peers, past, threads, args.turns))
                RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines))
    RESULTS.with_suffix(".md").write_text(markdown(lines))
    print(markdown(lines))


def build(model: Path, name: str, folder: Path) -> Path:
    options: dict[str, Any] = {"scheme": "t1a8", "dims": {"batch": 1}}
    if name == "full":
        options["dims"] = {"batch": 1, "length": 1}
    else:
        options |= {"attention": "ternary-keys-values", **OURS[name]}
    return tvm_ternary.compile(model, folder / f"{name.replace(' ', '')}.so", **options).path


def measure(libraries: dict[str, Path], peers: dict[str, Path], past: int, threads: int, turns: int) -> Feeds:
    """All engines in turns, each alone on a past of its own."""
    calls: dict[str, list[Callable[[], Any]]] = {}
    sizes: dict[str, int] = {}
    full = tvm_ternary.load(libraries["full"], threads=threads)
    feeds = random_inputs(full.inputs, {"past": past})
    sizes["full"] = sum(array.nbytes for name, array in feeds.items() if name.startswith("past"))
    calls["full"] = [lambda: full.run(None, feeds)]
    for name, library in libraries.items():
        if name != "full":
            module = tvm_ternary.load(library, threads=threads, kv_tokens=past + 64)
            fill(module, past)
            sizes[name] = module.stats().bytes
            calls[name] = [lambda module=module: step(module, past)]  # type: ignore[misc]
    for name, file in peers.items():
        session = open_session(file, threads)
        calls[name] = [lambda session=session: session.run(None, feeds)]  # type: ignore[misc]
    rests = dict.fromkeys(calls, SPIN) if threads > 1 else None
    time.sleep(SPIN)
    samples = time_turns(calls, turns, pace_of(threads), rests)
    return {
        "past": past,
        "threads": threads,
        **machine_facts(),
        "microseconds": {name: Spread.of_turns(own).median for name, own in samples.items()},
        "ratios": {
            ours: {name: turn_ratio(samples[name], samples[ours]) for name in samples if name != ours} for ours in OURS
        },
        "bytes": sizes,
    }


def fill(module: Module, past: int) -> None:
    """Random tokens, in prompts."""
    random = np.random.default_rng(0)
    while module.cache.length < past:
        new = min(1024, past - module.cache.length)
        mask = np.ones((1, module.cache.length + new), np.int64)
        module.run([], {"input_ids": random.integers(0, 32000, (1, new)), "attention_mask": mask})


def step(module: Module, past: int) -> Any:
    """One token, which the next call forgets."""
    module.cache.truncate(past)
    mask = np.ones((1, past + 1), np.int64)
    return module.run(None, {"input_ids": np.ones((1, 1), np.int64), "attention_mask": mask})


def markdown(lines: list[Feeds]) -> str:
    facts = lines[-1]
    text = f"{facts['cpu']}, load before {facts['load']:.1f}, commit {facts['commit']}. A step of a LLaMA (12 layers, "
    text += (
        "768 wide, 12 heads, 4 of keys), `t1a8`,\nmilliseconds; in brackets how many times as long as with two planes. "
    )
    text += "MiB is what all layers keep.\n\n"
    names = ["2 planes", "1 plane", "full", FLOAT, INT4]
    text += f"| past | threads | {' | '.join(names)} | MiB: 2 planes | 1 plane | full |\n"
    text += f"|---:|---:|{'---:|' * (len(names) + 3)}\n"
    for line in lines:
        ratios = line["ratios"]["2 planes"]
        cells = [str(line["past"]), str(line["threads"])]
        for name in names:
            shown = f"{line['microseconds'][name] / 1e3:.2f}"
            cells.append(shown + (f" ({ratios[name]:.1f}x)" if name in ratios else ""))
        cells += [f"{line['bytes'][name] / 2**20:.0f}" for name in ("2 planes", "1 plane", "full")]
        text += f"| {' | '.join(cells)} |\n"
    return text


if __name__ == "__main__":
    main()
