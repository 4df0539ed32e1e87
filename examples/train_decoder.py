"""Train a small decoder of the LLaMA family, character by character, on the text that every Python brings along.

No small decoder with free weights travels in a package, so here is one: 1.8 million parameters,
numpy alone, some minutes on two cores. It becomes a checkpoint folder as Hugging Face would write it::

    python examples/train_decoder.py
    cd .cache/models/decoder
    tvm-ternary quantize . -o t2 --scheme t2a8g64 --edges same --calibration calibration.npz
    tvm-ternary eval . t2 --data held_out.npz --samples 256

Ctrl-C stops it; the next call goes on from the last hundred steps, and ends with the same numbers as if it had not been
stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Sums in another order round otherwise; and two threads of ours go faster than two of OpenBLAS, which wait for each
    # other at every product. It reads this when numpy is imported.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np
from decoder import DecoderConfig, Parameters, Tokens, forward, initial, loss_and_gradients
from fetch_models import FOLDER
from safetensors import safe_open
from safetensors.numpy import save_file
from stdlib_text import documents, split
from tokenizers import Tokenizer, decoders, models

from tvm_ternary.errors import ModelError, TernaryError
from tvm_ternary.files import atomic_path

DECODER = FOLDER / "decoder"
# What is neither of these becomes the unknown token.
CHARACTERS = "\n" + "".join(map(chr, range(ord(" "), ord("~") + 1)))
UNKNOWN = "<unk>"
# Each batch is cut into so many parts, a thread each. A constant, since gradients of parts are rounded before they add.
PARTS = 2
SAVE_EVERY = 100
# Windows of text to measure on, and to calibrate with.
HELD_OUT, CALIBRATION = 256, 128


@dataclass(frozen=True)
class Training:
    """How to train: AdamW, the rate rising in a line and falling as a cosine.

    References
    ----------
    Loshchilov and Hutter, "Decoupled weight decay regularization", 2019, algorithm 2.
    """

    steps: int = 1200
    batch: int = 12
    rate: float = 3e-3
    warmup: int = 100
    decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.98
    largest_gradient: float = 1.0
    seed: int = 0

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, 0 to ``steps`` - 1."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return float(self.rate * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * done))))


@dataclass
class State:
    """Where training stands after ``step`` steps: what Adam averages of each parameter's gradient and its square."""

    step: int
    parameters: Parameters
    mean: Parameters
    square: Parameters

    @classmethod
    def new(cls, config: DecoderConfig, seed: int) -> State:
        parameters = initial(config, seed)
        return cls(0, parameters, *({name: np.zeros_like(a) for name, a in parameters.items()} for _ in range(2)))


def train(
    text: Tokens,
    config: DecoderConfig,
    training: Training,
    path: Path,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> Parameters:
    """Train, or go on with what ``path`` holds, and keep the state there.

    Parameters
    ----------
    text : (characters,) int
        What to train on, as token numbers.
    path : Path
        The state's file; it need not exist.
    report : callable, optional
        Told each step, counted from 1, and its loss in nats a token.

    Raises
    ------
    ModelError
        If ``path`` holds the state of another training.
    """
    identity = [asdict(config), asdict(training), zlib.crc32(text.astype("<i8").tobytes())]
    state = load_state(path, identity) if path.exists() else State.new(config, training.seed)
    with ThreadPoolExecutor(PARTS) as pool:
        while state.step < training.steps:
            loss, gradients = _average(pool, state.parameters, sample(text, config, training, state.step), config)
            adam(state, gradients, training)
            report(state.step, loss)
            if state.step % SAVE_EVERY == 0 or state.step == training.steps:
                save_state(path, state, identity)
    return state.parameters


def _average(
    pool: ThreadPoolExecutor, parameters: Parameters, batch: Tokens, config: DecoderConfig
) -> tuple[float, Parameters]:
    """Loss and gradients of a batch, its parts at once."""
    parts = np.array_split(batch, PARTS)
    results = pool.map(lambda part: loss_and_gradients(parameters, part, config), parts)
    loss, gradients = 0.0, {name: np.zeros_like(array) for name, array in parameters.items()}
    for part, (part_loss, part_gradients) in zip(parts, results, strict=True):
        share = len(part) / len(batch)
        loss += share * part_loss
        for name, total in gradients.items():
            total += np.float32(share) * part_gradients[name]
    return loss, gradients


def sample(text: Tokens, config: DecoderConfig, training: Training, step: int) -> Tokens:
    """Pieces of the text for one step, (batch, context + 1), the same at every call."""
    rng = np.random.default_rng((training.seed, step))
    starts = rng.integers(0, len(text) - config.context, training.batch)
    pieces: Tokens = text[starts[:, None] + np.arange(config.context + 1)]
    return pieces


def adam(state: State, gradients: Parameters, training: Training) -> None:
    """Change ``state`` by one step."""
    norm = float(np.sqrt(sum(float((g * g).sum(dtype=np.float64)) for g in gradients.values())))
    shrink = np.float32(min(1.0, training.largest_gradient / norm)) if norm else np.float32(1)
    rate = training.rate_at(state.step)
    state.step += 1
    unbias1, unbias2 = (1 - beta**state.step for beta in (training.beta1, training.beta2))
    for name, parameter in state.parameters.items():
        gradient = shrink * gradients[name]
        mean, square = state.mean[name], state.square[name]
        mean += np.float32(1 - training.beta1) * (gradient - mean)
        square += np.float32(1 - training.beta2) * (gradient * gradient - square)
        if parameter.ndim == 2:
            parameter *= np.float32(1 - rate * training.decay)
        parameter -= np.float32(rate / unbias1) * mean / (np.sqrt(square / np.float32(unbias2)) + np.float32(1e-8))


def save_state(path: Path, state: State, identity: list[Any]) -> None:
    """Write all that training needs to go on."""
    kinds = {"parameters": state.parameters, "mean": state.mean, "square": state.square}
    arrays = {f"{kind}/{name}": array for kind, named in kinds.items() for name, array in named.items()}
    # One entry, because safetensors writes several in no fixed order.
    _save(path, arrays, {"training": json.dumps({"step": state.step, "identity": identity})})


def load_state(path: Path, identity: list[Any]) -> State:
    """Read what `save_state` wrote."""
    with safe_open(path, "numpy") as file:
        described = json.loads(file.metadata()["training"])
        if described["identity"] != identity:
            problem = "is of a training with other sizes, settings or text"
            raise ModelError(str(path), problem, "remove it, or name another --folder")
        kinds: dict[str, Parameters] = {"parameters": {}, "mean": {}, "square": {}}
        for key in file.keys():  # noqa: SIM118 - not a dict
            kind, _, name = key.partition("/")
            kinds[kind][name] = file.get_tensor(key)
    return State(described["step"], **kinds)


def save_checkpoint(folder: Path, parameters: Parameters, config: DecoderConfig) -> None:
    """Write ``config.json``, ``model.safetensors`` and ``tokenizer.json``."""
    described = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "head_dim": config.width // config.heads,
        "hidden_act": "silu",
        "rms_norm_eps": config.epsilon,
        "rope_theta": config.theta,
        "max_position_embeddings": config.context,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    with atomic_path(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    _save(folder / "model.safetensors", parameters, {"format": "pt"})
    with atomic_path(folder / "tokenizer.json") as temporary:
        temporary.write_text(tokenizer().to_str(pretty=True), encoding="utf-8")


def _save(path: Path, arrays: Parameters, metadata: dict[str, str]) -> None:
    with atomic_path(path) as temporary:
        mode = temporary.stat().st_mode
        save_file(arrays, temporary, metadata=metadata)
        # save_file puts a file of mode 0600 in the place of the one that had what the umask gives.
        temporary.chmod(mode)


def tokenizer() -> Tokenizer:
    """A token a character: byte-pair encoding in which nothing was ever paired."""
    vocabulary = {token: i for i, token in enumerate((UNKNOWN, *CHARACTERS))}
    result = Tokenizer(models.BPE(vocabulary, [], unk_token=UNKNOWN))
    result.decoder = decoders.Fuse()
    return result


def encode(text: str) -> Tokens:
    """Token numbers of a text, (characters,) int64."""
    return np.array(tokenizer().encode(text).ids, np.int64)


def windows(text: Tokens, length: int, count: int) -> Tokens:
    """Windows (count, length) at even distances, from the beginning of a text to its end."""
    starts = np.linspace(0, len(text) - length, count).astype(np.int64)
    found: Tokens = text[starts[:, None] + np.arange(length)]
    return found


def save_windows(path: Path, tokens: Tokens) -> None:
    """Write windows as the inputs of a model, for ``tvm-ternary``."""
    with atomic_path(path) as temporary:
        np.savez(temporary, input_ids=tokens, attention_mask=np.ones_like(tokens))


def perplexity(parameters: Parameters, pieces: Tokens, config: DecoderConfig) -> float:
    """Exponential of the mean cross entropy over windows (count, length), each read alone."""
    losses = []
    for piece in pieces:
        logits = forward(parameters, piece[None, :-1], config)[0].astype(np.float64)
        top = logits.max(axis=1)
        normalizer = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        losses.append((normalizer - np.take_along_axis(logits, piece[1:, None], axis=1)[:, 0]).mean())
    return float(np.exp(np.mean(losses)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=DECODER, help="where to put the checkpoint (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=Training.steps, help="of 1,536 characters (default: %(default)s)")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    config, training = DecoderConfig(1 + len(CHARACTERS)), Training(steps=args.steps)
    print("collecting text", file=sys.stderr, flush=True)
    text, other = map(encode, split(documents()))
    held_out = windows(other, config.context, HELD_OUT)
    save_windows(args.folder / "held_out.npz", held_out)
    save_windows(args.folder / "calibration.npz", windows(text, config.context, CALIBRATION))
    start = time.perf_counter()

    def report(step: int, loss: float) -> None:
        if step % SAVE_EVERY == 0 or step in (1, training.steps):
            spent = time.perf_counter() - start
            print(f"step {step} of {training.steps}: {loss:.3f} nats, {spent:.0f} s", file=sys.stderr, flush=True)

    parameters = train(text, config, training, args.folder / "training.safetensors", report)
    save_checkpoint(args.folder, parameters, config)
    print(f"{args.folder}: held-out perplexity {perplexity(parameters, held_out, config):.4f}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (TernaryError, OSError) as error:
        sys.exit(f"error: {error}")
