"""The demo's network in torch, bfloat16, with random weights of its sizes: what its time is held against."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.cases import VOCABULARY
from benchmarks.gpu.device import Call

WIDTH, HEADS, LAYERS = 384, 12, 3


def network(torch: Any, batch: int, length: int, place: str = "cuda") -> Call:
    """A call that runs it: embeddings, three layers of attention and feed-forward, the mean over the words.

    A little less than the model does: token types and positions are one addition, the mean counts padding.
    """
    kind = {"dtype": torch.bfloat16, "device": place}
    functional = torch.nn.functional

    def weight(*shape: int) -> Any:
        return torch.randn(shape, **kind) * 0.05

    layers = [
        [weight(WIDTH, WIDTH) for _ in range(4)] + [weight(4 * WIDTH, WIDTH), weight(WIDTH, 4 * WIDTH)]
        for _ in range(LAYERS)
    ]
    bias, wide, table, position = weight(WIDTH), weight(4 * WIDTH), weight(VOCABULARY, WIDTH), weight(length, WIDTH)
    ids = torch.randint(0, VOCABULARY, (batch, length), device=place)
    mask = torch.zeros((batch, 1, 1, length), **kind)

    def norm(x: Any) -> Any:
        return functional.layer_norm(x, (WIDTH,), bias, bias)

    def split(x: Any) -> Any:
        return x.view(batch, length, HEADS, WIDTH // HEADS).transpose(1, 2)

    def run() -> Any:
        with torch.inference_mode():
            x = norm(table[ids] + position)
            for q, k, v, out, up, down in layers:
                parts = [split(functional.linear(x, w, bias)) for w in (q, k, v)]
                mixed = functional.scaled_dot_product_attention(*parts, attn_mask=mask)
                x = norm(x + functional.linear(mixed.transpose(1, 2).reshape(batch, length, WIDTH), out, bias))
                x = norm(x + functional.linear(functional.gelu(functional.linear(x, up, wide)), down, bias))
            return x.mean(dim=1)

    return run
