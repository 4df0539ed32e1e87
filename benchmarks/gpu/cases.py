"""What the GPU benchmark builds, checks, times and asks for. Imports nothing, as it runs on both hosts."""

from __future__ import annotations

ARCH = "sm_90"

# out_features x in_features.
TIMED_SHAPES = ((4096, 4096), (14336, 4096), (8192, 8192), (28672, 8192))
TIMED_SCHEMES = ("t1a8", "t1a16", "t1a8g128", "t2a8g128", "t1abf16", "t1a1")
# Only the first two schemes for all shapes; the others for the first.
TIMED_ROWS = (1, 8, 16, 128, 512, 4096)

# Ragged ones, small ones, several planes, groups that divide nothing.
CHECKED = (
    (96, 256, "t1a8"),
    (70, 1000, "t3a8g24"),
    (129, 516, "t2a16g64"),
    (70, 300, "t4abf16"),
    (70, 300, "t1abf16g128"),
    (100, 1000, "t2a1g100"),
    (384, 1536, "t3a8g64"),
    (1536, 384, "t3a8g64"),
)
CHECKED_ROWS = (1, 3, 8, 16, 17, 33, 64, 100, 128, 512, 1000)

# The demo model: batch, length, scheme.
MODELS = ((1, 128, "t3a8g64"), (8, 128, "t3a8g64"), (1, 128, "t2a16g64"))
VOCABULARY = 4096
"""Its table of words is cut to so many, which is what travels; all else is the model's own."""

REQUIRED = (
    ("copy", "M = 1, t1a16 and t1a8, matrices over 16 MB read: share of the measured copy bandwidth", 0.8),
    ("rows1", "M = 1, t1a16 and t1a8: over torch bf16", 4.0),
    ("rows8", "M = 8, 16: over torch bf16", 3.0),
    ("rows128", "M = 128, t1a8: over torch bf16", 1.5),
    ("rows4096", "M = 4096, t1a8: over torch bf16", 1.0),
    ("model", "demo model end to end, CUDA graph: over torch bf16 eager", 2.0),
    ("gemlite", "over gemlite, the same shapes", 1.0),
    ("bitblas", "over bitblas, the same shapes", 1.0),
)


def timed() -> list[tuple[int, int, str]]:
    """The matrices that are timed: N, K, scheme."""
    return [
        (n, k, scheme)
        for number, (n, k) in enumerate(TIMED_SHAPES)
        for place, scheme in enumerate(TIMED_SCHEMES)
        if number == 0 or place < 2
    ]


def name_of(n: int, k: int, scheme: str) -> str:
    """The name of a matrix's functions, ``rows_`` and ``matmul_`` before it."""
    return f"{scheme}_{n}x{k}"
