"""Export a decoder of random weights to ONNX with torch, in the shapes that real ones have.

Needs ``torch`` (the CPU build does); ``onnxscript`` too for the exporter that traces with dynamo. For example::

    pip install torch onnxscript
    python examples/export_decoder.py decoder.onnx --family llama --past --exporter dynamo --opset 23

With ``--past`` the model takes the keys and values of the tokens before and gives those of all: one file for the step
behind a prompt, whose own keys and values come from the file without.
"""

# Where torch is not installed its modules are Any.
# mypy: allow-subclassing-any
from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

try:
    import torch
    from torch import nn
except ImportError:
    raise SystemExit("needs torch, and onnxscript for --exporter dynamo: pip install torch onnxscript") from None


Past: TypeAlias = "tuple[torch.Tensor, torch.Tensor] | None"
"""Keys and values (batch, heads, past, size) of the tokens before, where there are some."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder.

    Parameters
    ----------
    layers, width, heads, kv_heads, inner, vocabulary, longest : int
        Blocks, features of a token, heads of queries, heads of keys, features between the feed-forward's matrices,
        tokens, and positions that a table of them has.
    """

    layers: int = 2
    width: int = 64
    heads: int = 4
    kv_heads: int = 2
    inner: int = 128
    vocabulary: int = 100
    longest: int = 64

    @property
    def head(self) -> int:
        """Features of a head."""
        return self.width // self.heads


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Attention of (batch, heads, length, size); ``seen`` says which keys (a column each) a query sees."""
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    mixed: torch.Tensor = torch.softmax(scores, -1) @ v
    return mixed.transpose(1, 2).flatten(2)


class Gpt2Block(nn.Module):
    """Layer norm, fused q/k/v, tanh-GELU."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.ln_1, self.ln_2 = nn.LayerNorm(sizes.width), nn.LayerNorm(sizes.width)
        self.c_attn, self.c_proj = nn.Linear(sizes.width, 3 * sizes.width), nn.Linear(sizes.width, sizes.width)
        self.c_fc, self.c_out = nn.Linear(sizes.width, 4 * sizes.width), nn.Linear(4 * sizes.width, sizes.width)

    def forward(self, x: torch.Tensor, seen: torch.Tensor, angles: Any, past: Past) -> Any:
        """Give the next hidden state, and all keys and values."""
        fused = self.c_attn(self.ln_1(x)).unflatten(2, (-1, self.sizes.head)).transpose(1, 2)
        q, k, v = fused.chunk(3, 1)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        x = x + self.c_proj(attend(q, k, v, seen))
        inner = nn.functional.gelu(self.c_fc(self.ln_2(x)), approximate="tanh")
        return x + self.c_out(inner), k, v


class RmsNorm(nn.Module):
    """X over its root mean square, times a weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize the last axis."""
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class LlamaBlock(nn.Module):
    """RMS norm, rotary positions, grouped keys and values, SwiGLU."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.input_norm, self.post_norm = RmsNorm(sizes.width), RmsNorm(sizes.width)
        kv = sizes.kv_heads * sizes.head
        self.q_proj, self.o_proj = (nn.Linear(sizes.width, sizes.width, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(sizes.width, kv, bias=False) for _ in range(2))
        self.gate_proj, self.up_proj = (nn.Linear(sizes.width, sizes.inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(sizes.inner, sizes.width, bias=False)

    def forward(self, x: torch.Tensor, seen: torch.Tensor, angles: Any, past: Past) -> Any:
        """Give the next hidden state, and all keys and values."""
        normed = self.input_norm(x)
        q, k, v = (
            layer(normed).unflatten(2, (-1, self.sizes.head)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.turn(q, *angles), self.turn(k, *angles)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        times = self.sizes.heads // self.sizes.kv_heads
        keys, values = (t[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2) for t in (k, v))
        x = x + self.o_proj(attend(q, keys, values, seen))
        normed = self.post_norm(x)
        return x + self.down_proj(nn.functional.silu(self.gate_proj(normed)) * self.up_proj(normed)), k, v

    @staticmethod
    def turn(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        """Rotate the two halves of each head."""
        first, second = x.chunk(2, -1)
        return x * cosine + torch.cat([-second, first], -1) * sine


class Decoder(nn.Module):
    """Either family: token ids and flat past keys and values in, logits and all keys and values out."""

    def __init__(self, family: str, sizes: Sizes) -> None:
        super().__init__()
        self.family, self.sizes = family, sizes
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.width)
        self.positions = nn.Embedding(sizes.longest, sizes.width) if family == "gpt2" else None
        block = Gpt2Block if family == "gpt2" else LlamaBlock
        self.blocks = nn.ModuleList(block(sizes) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.width) if family == "gpt2" else RmsNorm(sizes.width)
        self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)

    def forward(self, input_ids: torch.Tensor, *past: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Give logits (batch, length, vocabulary), then keys and values of each block in turn."""
        before = past[0].shape[2] if past else 0
        length = input_ids.shape[1]
        places = torch.arange(length) + before
        seen = torch.arange(before + length) <= places.unsqueeze(1)
        x, angles = self.embedding(input_ids), None
        if self.positions is not None:
            x = x + self.positions(places)
        else:
            frequencies = 10000.0 ** (-torch.arange(0, self.sizes.head, 2) / self.sizes.head)
            both = torch.cat([places[:, None] * frequencies] * 2, -1)
            angles = (both.cos(), both.sin())
        states: list[torch.Tensor] = []
        for index, block in enumerate(self.blocks):
            own = (past[2 * index], past[2 * index + 1]) if past else None
            x, key, value = block(x, seen, angles, own)
            states += [key, value]
        return (self.head(self.norm(x)), *states)


def export(
    path: Path,
    family: str = "gpt2",
    sizes: Sizes | None = None,
    *,
    past: bool = False,
    exporter: str = "trace",
    opset: int = 17,
    seed: int = 0,
) -> None:
    """Write a decoder with random weights, the same for the same seed.

    Parameters
    ----------
    path : Path
    family : str
        ``gpt2`` or ``llama``.
    sizes : Sizes, optional
    past : bool
        Whether it takes keys and values of the tokens before.
    exporter : str
        ``trace`` or ``dynamo``.
    opset : int
    seed : int
    """
    sizes = sizes or Sizes()
    torch.manual_seed(seed)
    model = Decoder(family, sizes).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    kv_heads = sizes.heads if family == "gpt2" else sizes.kv_heads
    kinds = [f"{kind}.{index}" for index in range(sizes.layers) for kind in ("key", "value")]
    olds = [f"past.{kind}" for kind in kinds] if past else []
    ids = torch.zeros((2, 3), dtype=torch.int64)
    state = torch.zeros((2, kv_heads, 5, sizes.head))
    arguments = (ids, *(state.clone() for _ in olds))
    axes = {"input_ids": {0: "batch", 1: "length"}} | {name: {0: "batch", 2: "past"} for name in olds}
    names = {"input_names": ["input_ids", *olds], "output_names": ["logits", *(f"present.{kind}" for kind in kinds)]}
    if exporter == "dynamo":
        batch, length, before = (torch.export.Dim(name, min=1, max=4096) for name in ("batch", "length", "past"))
        shapes: list[Any] = [{0: batch, 1: length}, tuple({0: batch, 2: before} for _ in olds)]
        options: dict[str, Any] = {
            "dynamo": True,
            "dynamic_shapes": tuple(filter(None, shapes)),
            "external_data": False,
        }
    else:
        options = {"dynamo": False, "dynamic_axes": axes}
    torch.onnx.export(model, arguments, path, opset_version=opset, **options, **names)


def main() -> None:
    """Read the command line and export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--family", choices=("gpt2", "llama"), default="gpt2")
    parser.add_argument("--past", action="store_true", help="take keys and values of the tokens before")
    parser.add_argument("--exporter", choices=("trace", "dynamo"), default="trace")
    parser.add_argument("--opset", type=int, default=17)
    for name in ("layers", "width", "heads", "kv-heads", "inner", "vocabulary", "longest"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Sizes, name.replace("-", "_")))
    args = parser.parse_args()
    sizes = Sizes(*(getattr(args, name) for name in Sizes.__dataclass_fields__))
    export(args.output, args.family, sizes, past=args.past, exporter=args.exporter, opset=args.opset)


if __name__ == "__main__":
    main()
