"""Attention over ternary keys and values on a GPU: a step of decoding, and what appends to the cache."""
