"""nanoguard's tokenizer, which its package keeps as a pickled ``tiktoken.Encoding``, for the package ``tokenizers``.

Both merge bytes pair by pair, the pair of least rank first. tiktoken knows the rank of each token; ``tokenizers`` wants
the pairs, so each token is taken apart into the two that are merged last on the way to it.
"""

from __future__ import annotations

import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

from tvm_ternary.errors import ModelError

# As in the package's tokenizer.py.
BEGIN, PADDING = "<|reserved_0|>", "<|reserved_1|>"


class _Encoding:
    """What stands for ``tiktoken.Encoding``: its state is kept, its code not needed."""

    pat_str: str
    mergeable_ranks: dict[bytes, int]
    special_tokens: dict[str, int]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _Encoding
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def load(path: Path, length: int) -> Tokenizer:
    """Read the pickle, running nothing of it.

    Parameters
    ----------
    path : Path
        nanoguard's ``tokenizer.pkl``.
    length : int
        Each text begins with `BEGIN` and is cut or padded to so many tokens, as the package does.

    Raises
    ------
    ModelError
        If the file holds anything else.
    """
    try:
        with path.open("rb") as file:
            encoding = _Unpickler(file).load()
    except (pickle.UnpicklingError, EOFError, ValueError) as error:
        raise ModelError(str(path), f"is no pickled tokenizer ({error})") from error
    if not isinstance(encoding, _Encoding):
        raise ModelError(str(path), f"holds a {type(encoding).__name__}, expected tiktoken's Encoding")
    return convert(encoding.pat_str, encoding.mergeable_ranks, encoding.special_tokens, length)


def convert(pattern: str, ranks: dict[bytes, int], special: dict[str, int], length: int) -> Tokenizer:
    """Make a tokenizer that gives the numbers of ``tiktoken``'s ``encode_ordinary``, `BEGIN` before them."""
    letters = byte_letters()
    names = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            left, right = merge(token, ranks, below=rank)
            merges.append((names[left], names[right]))
    # Special tokens have numbers but are not looked for in texts: who writes one there does not end the prompt.
    vocabulary = {names[token]: rank for token, rank in ranks.items()} | special
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, special[BEGIN])]
    )
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=special[PADDING], pad_token=PADDING)
    return tokenizer


def merge(text: bytes, ranks: dict[bytes, int], below: int | None = None) -> list[bytes]:
    """Byte-pair encoding as tiktoken does it: merge the neighbours whose union has the least rank, while there are any.

    Parameters
    ----------
    text : bytes
        One piece of a text.
    ranks : dict
        Token -> rank.
    below : int, optional
        Make no token of this rank or a higher one.
    """
    parts = [text[i : i + 1] for i in range(len(text))]
    while True:
        pairs = [(ranks.get(left + right), i) for i, (left, right) in enumerate(pairwise(parts))]
        known = [(rank, i) for rank, i in pairs if rank is not None and (below is None or rank < below)]
        if not known:
            return parts
        _, i = min(known)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary: itself where it is visible.

    References
    ----------
    ``bytes_to_unicode`` in GPT-2's encoder.py.
    """
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]
