"""The decoder trained here: its gradients are right, training can be cut in two, its checkpoint is a LLaMA's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import decoder
import numpy as np
import pytest
import stdlib_text
import train_decoder
from decoder import DecoderConfig
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from train_decoder import State, Training

from tvm_ternary.errors import ModelError

from ..conftest import ROOT

TINY = DecoderConfig(vocabulary=7, width=8, hidden=12, layers=2, heads=2, context=6)
QUICK = Training(steps=6, batch=4, warmup=2, rate=0.01)
TEXT = np.random.default_rng(0).integers(0, 7, 200)


def parameters() -> dict[str, Any]:
    """Random in float64, the norms too."""
    rng = np.random.default_rng(1)
    return {name: a + 0.1 * rng.standard_normal(a.shape) for name, a in decoder.initial(TINY, seed=0).items()}


@pytest.mark.parametrize("name", TINY.shapes())
def test_gradient_is_the_slope_of_the_loss(name: str) -> None:
    values, text = parameters(), TEXT[:21].reshape(3, 7)
    _, gradients = decoder.loss_and_gradients(values, text, TINY)
    direction, step = np.random.default_rng(2).standard_normal(values[name].shape), 1e-5
    above, below = (
        decoder.loss_and_gradients(values | {name: values[name] + sign * step * direction}, text, TINY)[0]
        for sign in (1, -1)
    )
    assert gradients[name].dtype == np.float64
    assert (gradients[name] * direction).sum() == pytest.approx((above - below) / (2 * step), rel=1e-6, abs=1e-9)


def test_loss_is_that_of_the_logits() -> None:
    values, text = parameters(), TEXT[:14].reshape(2, 7)
    logits = decoder.forward(values, text[:, :-1], TINY)
    probability = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    expected = -np.log(np.take_along_axis(probability, text[:, 1:, None], axis=2)).mean()
    assert decoder.loss_and_gradients(values, text, TINY)[0] == pytest.approx(expected)


def test_nothing_sees_what_comes_later() -> None:
    values, text = parameters(), TEXT[:6][None]
    changed = text.copy()
    changed[0, 4] = (changed[0, 4] + 1) % 7
    before, after = (decoder.forward(values, ids, TINY) for ids in (text, changed))
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert (before[:, 4:] != after[:, 4:]).any(axis=2).all()


def test_training_cut_in_two_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_decoder, "SAVE_EVERY", 2)
    losses: list[float] = []
    whole = train_decoder.train(TEXT, TINY, QUICK, tmp_path / "whole", lambda _, loss: losses.append(loss))
    assert len(losses) == 6

    def stop(step: int, _: float) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_decoder.train(TEXT, TINY, QUICK, tmp_path / "cut", stop)
    steps: list[int] = []
    resumed = train_decoder.train(TEXT, TINY, QUICK, tmp_path / "cut", lambda step, _: steps.append(step))
    assert steps == [5, 6]
    assert whole.keys() == resumed.keys()
    assert all((whole[name] == resumed[name]).all() for name in whole)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "cut").read_bytes()


def test_another_training_is_not_gone_on_with(tmp_path: Path) -> None:
    train_decoder.train(TEXT, TINY, QUICK, tmp_path / "state")
    with pytest.raises(ModelError, match="is of a training with other sizes, settings or text"):
        train_decoder.train(TEXT[1:], TINY, QUICK, tmp_path / "state")


def test_it_learns(tmp_path: Path) -> None:
    text = np.tile(np.arange(7), 40)
    trained = train_decoder.train(text, TINY, Training(steps=60, batch=4, warmup=5, rate=0.02), tmp_path / "state")
    fresh = decoder.initial(TINY, seed=0)
    pieces = train_decoder.windows(text, 7, 4)
    before, after = (train_decoder.perplexity(values, pieces, TINY) for values in (fresh, trained))
    assert before > 5
    assert after < 1.2


def test_adam_follows_the_paper() -> None:
    rng = np.random.default_rng(0)
    training = Training(steps=100, warmup=0, rate=0.1, largest_gradient=1e9)
    start = rng.standard_normal((2, 3)).astype(np.float32)
    state = State(0, {"w": start.copy()}, {"w": np.zeros_like(start)}, {"w": np.zeros_like(start)})
    expected, m, v = start.astype(np.float64), 0.0, 0.0
    for t in range(1, 6):
        g = rng.standard_normal((2, 3)).astype(np.float32)
        rate = training.rate_at(t - 1)
        train_decoder.adam(state, {"w": g}, training)
        m, v = 0.9 * m + 0.1 * g.astype(np.float64), 0.98 * v + 0.02 * g.astype(np.float64) ** 2
        unit = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.98**t)) + 1e-8)
        expected = expected - rate * (unit + training.decay * expected)
    np.testing.assert_allclose(state.parameters["w"], expected, rtol=1e-5, atol=1e-6)


def test_large_gradients_are_shortened() -> None:
    training = Training(warmup=0, decay=0)
    states = [State(0, {"w": np.zeros(2, np.float32)}, *({"w": np.zeros(2, np.float32)} for _ in "mv")) for _ in "ab"]
    for state, length in zip(states, (5, 1), strict=True):
        train_decoder.adam(state, {"w": np.array([0.6, 0.8], np.float32) * length}, training)
    np.testing.assert_allclose(states[0].mean["w"], states[1].mean["w"], rtol=1e-6)


def test_text_is_split_by_documents() -> None:
    train, held_out = stdlib_text.split([f"text {i}" for i in range(41)])
    assert held_out.split("\n\n") == ["text 0", "text 20", "text 40"]
    assert len(train.split("\n\n")) == 38


def test_docstrings_are_read_not_run(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text(
        '"""First."""\nraise SystemExit\ndef f():\n    """Second\n\n      deep\n    end."""\n', encoding="utf-8"
    )
    assert list(stdlib_text._docstrings(source)) == ["First.", "Second\n\n  deep\nend."]


def test_the_script_writes_a_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "examples" / "train_decoder.py", "--folder", tmp_path, "--steps", "1"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "held-out perplexity" in result.stdout
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    sizes = DecoderConfig(config["vocab_size"])
    assert (config["hidden_size"], config["num_hidden_layers"]) == (sizes.width, sizes.layers)
    shapes = {name: array.shape for name, array in load_file(tmp_path / "model.safetensors").items()}
    assert shapes == sizes.shapes()
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == sizes.vocabulary
    for name, count in (("held_out.npz", 256), ("calibration.npz", 128)):
        with np.load(tmp_path / name) as inputs:
            assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (count, sizes.context)
            text = tokenizer.decode(inputs["input_ids"][1].tolist(), skip_special_tokens=False)
        assert len(text) == sizes.context


def inputs_of(text: str) -> list[int]:
    """Character by character."""
    return [train_decoder.CHARACTERS.index(letter) + 1 for letter in text]


def test_tokens_are_characters() -> None:
    text = "".join(reversed(train_decoder.CHARACTERS))
    assert train_decoder.encode(text).tolist() == inputs_of(text)
    assert train_decoder.encode("aü").tolist() == [*inputs_of("a"), 0]
    assert train_decoder.tokenizer().decode(inputs_of("a b\n c")) == "a b\n c"


def test_windows_reach_from_end_to_end() -> None:
    assert train_decoder.windows(np.arange(10), 4, 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
