"""What the GPU benchmark builds, checks, times and asks for. Imports nothing of ours, as it runs on both hosts."""

from __future__ import annotations

from dataclasses import dataclass

ARCH = "sm_90"

# out_features x in_features.
TIMED_SHAPES = ((4096, 4096), (14336, 4096), (8192, 8192), (28672, 8192))
# What is asked for comes first, and is timed first.
TIMED_SCHEMES = ("t1a8", "t1a16", "t1a8g128", "t2a8g128", "t1abf16", "t1a1")
ASKED_SCHEMES = TIMED_SCHEMES[:2]
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

# The demo model: batch, length, scheme. Zeros: both are chosen at every run, and so there is no CUDA graph.
MODELS = ((1, 128, "t3a8g64"), (8, 128, "t3a8g64"), (1, 128, "t2a16g64"), (0, 0, "t3a8g64"))
FREE_SIZES = ((1, 128), (2, 37))
VOCABULARY = 1024
"""Its table of words is cut to so many, which is what travels; all else is the model's own."""

# Of attention: heads of queries and of keys, elements of a head, planes, tokens. Long ones are timed, too.
CACHES = (
    (4, 2, 20, 3, 200),
    (12, 12, 64, 1, 300),
    (8, 1, 80, 2, 777),
    (32, 8, 128, 2, 32768),
    (32, 8, 128, 1, 32768),
    (32, 8, 128, 2, 4096),
    (12, 12, 64, 2, 32768),
)
TIMED_TOKENS = 4096
ASKED_CACHE = CACHES[3]

# Heads of queries and of keys, elements of a head, tokens, what hides the keys behind a query's own (nothing, the
# kernel, or a mask of bits, as models have it), planes of the keys (0: they are in float).
PROMPTS = (
    (4, 2, 20, 70, "causal", 0),
    (3, 3, 64, 200, "", 0),
    (4, 2, 20, 150, "causal", 1),
    (2, 1, 96, 200, "", 3),
    (4, 2, 64, 300, "bits", 2),
    (32, 8, 128, 512, "causal", 0),
    (32, 8, 128, 4096, "causal", 0),
    (32, 8, 128, 4096, "", 0),
    (12, 12, 64, 4096, "causal", 0),
    (32, 8, 128, 4096, "bits", 0),
    (32, 8, 128, 4096, "causal", 2),
    (32, 8, 128, 4096, "causal", 1),
)
TIMED_PROMPT_TOKENS = 512
WINDOW = 64
"""Last keys that stay in float."""

# Caches, and new tokens behind what is in them.
CHUNKS = ((*CACHES[0], 70), (*CACHES[3], 512))

REQUIRED = (
    ("copy", "M = 1, t1a16 and t1a8, matrices over 16 MB read: share of the measured copy bandwidth", 0.8),
    ("rows1", "M = 1, t1a16 and t1a8: over torch bf16", 4.0),
    ("rows8", "M = 8, 16, t1a16 and t1a8: over torch bf16", 3.0),
    ("rows128", "M = 128, t1a8: over torch bf16", 1.5),
    ("rows512", "M = 512, t1a8: over torch bf16", 1.0),
    ("rows4096", "M = 4096, t1a8: over torch bf16", 1.0),
    ("model", "demo models of fixed sizes end to end, CUDA graph: over torch bf16 eager", 2.0),
    ("attention", "a token over 32,768 cached, 32 heads of 128 (8 of keys), two planes: over torch SDPA bf16", 3.0),
    ("prompt", "prompts of 512 and 4,096 tokens, 32 heads of 128 (8 of keys): over torch SDPA bf16", 0.7),
    ("gemlite", "over gemlite, the same shapes", 1.0),
    ("bitblas", "over bitblas, the same shapes", 1.0),
)


Matrix = tuple[int, int, str]
"""N, K, scheme."""
Cache = tuple[int, int, int, int, int]
"""Heads, heads of keys, size, planes, tokens."""
Prompt = tuple[int, int, int, int, str, int]
"""Heads, heads of keys, size, tokens, what hides keys, planes."""
Chunk = tuple[int, int, int, int, int, int]
"""A cache, and new tokens."""


@dataclass(frozen=True)
class Cases:
    """What is built and done; it travels with what was built.

    Attributes
    ----------
    checked : tuple of Matrix
        Small ones, with numbers of rows ``checked_rows``.
    timed : tuple of Matrix
        Large ones, in the order in which they are checked and timed with ``timed_rows``.
    models : tuple of (int, int, str)
        Batch, length, scheme.
    free_sizes : tuple of (int, int)
        What a model of any sizes is checked with.
    words : int
        Of the models' table.
    caches : tuple of Cache
    prompts : tuple of Prompt
    chunks : tuple of Chunk
        Those that attention is checked and, if they are long, timed with. A chunk's cache is among ``caches``.
    """

    checked: tuple[Matrix, ...]
    checked_rows: tuple[int, ...]
    timed: tuple[Matrix, ...]
    timed_rows: tuple[int, ...]
    models: tuple[tuple[int, int, str], ...]
    free_sizes: tuple[tuple[int, int], ...] = FREE_SIZES
    words: int = VOCABULARY
    caches: tuple[Cache, ...] = ()
    prompts: tuple[Prompt, ...] = ()
    chunks: tuple[Chunk, ...] = ()


def timed() -> tuple[Matrix, ...]:
    """The matrices that are timed, in that order."""
    return tuple(
        (n, k, scheme)
        for asked in (True, False)
        for n, k in TIMED_SHAPES
        for scheme in TIMED_SCHEMES
        if (scheme in ASKED_SCHEMES) == asked
    )


ALL = Cases(CHECKED, CHECKED_ROWS, timed(), TIMED_ROWS, MODELS, caches=CACHES, prompts=PROMPTS, chunks=CHUNKS)


def name_of(n: int, k: int, scheme: str) -> str:
    """The name of a matrix's functions, ``rows_`` and ``matmul_`` before it."""
    return f"{scheme}_{n}x{k}"


def cache_name(cache: Cache) -> str:
    """The name of a cache's functions, ``append_`` and ``step_`` before it."""
    heads, kv_heads, size, planes, tokens = cache
    return f"t{planes}kv_{heads}x{kv_heads}x{size}_{tokens}"


def prompt_name(prompt: Prompt) -> str:
    """The name of a prompt's function, ``prompt_`` before it."""
    heads, kv_heads, size, tokens, hides, planes = prompt
    packed = f"t{planes}k_" if planes else ""
    return f"{packed}{heads}x{kv_heads}x{size}_{tokens}{f'_{hides}' if hides else ''}"


def chunk_name(chunk: Chunk) -> str:
    """The name of the function of a prompt behind a cache, ``prompt_`` before it."""
    return f"{cache_name(chunk[:5])}_{chunk[5]}"


def model_name(batch: int, length: int, scheme: str) -> str:
    """The name of a demo model's file."""
    return f"demo_{f'{batch}x{length}' if batch else 'any'}_{scheme}"


def cpu_scheme(scheme: str) -> str:
    """The same on a CPU, where activations of 16 bits have 32."""
    return scheme.replace("a16", "a32").replace("abf16", "a32")


def cpu_name(scheme: str) -> str:
    """The name of the file that computes the same on a CPU."""
    return f"cpu_{cpu_scheme(scheme)}"
