"""Write text with a decoder whose keys and values stay inside the library, as ternary planes.

    python examples/train_decoder.py                      # a small LLaMA, some minutes
    python examples/generate.py [CHECKPOINT] [--prompt TEXT] [--tokens N] [--mode MODE] [--planes N]

CHECKPOINT is a folder with ``config.json``, safetensors and ``tokenizer.json``, of a LLaMA, Mistral, Qwen, BitNet or
GPT-2. It is compiled once for each mode, beside the folder's own files; a run is then given new tokens only.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

import tvm_ternary as tt

DECODER = Path(__file__).resolve().parent.parent / ".cache" / "models" / "decoder"


def main() -> None:
    """Compile if needed, then let it write, always the likeliest token."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path, default=DECODER)
    parser.add_argument("--prompt", default="It was a ")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--mode", default="ternary-keys-values")
    parser.add_argument("--planes", default="2")
    args = parser.parse_args()
    library = args.checkpoint / f"{args.mode}-{args.planes}.so"
    if not library.is_file():
        tt.compile(args.checkpoint, library, scheme="t3a8g64", attention=args.mode, kv_planes=args.planes)
    tokenizer = Tokenizer.from_file(str(args.checkpoint / "tokenizer.json"))
    module = tt.load(library)
    new: list[int] = list(tokenizer.encode(args.prompt).ids)
    written: list[int] = []
    started = time.perf_counter()
    while len(written) < args.tokens and module.cache.length + len(new) <= module.cache.capacity:
        mask = np.ones((1, module.cache.length + len(new)), np.int64)
        (logits,) = module.run(["logits"], {"input_ids": np.array([new]), "attention_mask": mask})
        new = [int(logits[0, -1].argmax())]
        written += new
    seconds = time.perf_counter() - started
    print(args.prompt + tokenizer.decode(written))
    stats = module.stats()
    packed = max(layer.packed_tokens for layer in stats.layers)
    print(f"{len(written) / seconds:.0f} tokens/s; {stats.tokens} tokens cached, {packed} of them packed")


if __name__ == "__main__":
    main()
