"""Checkpoints of every layout through quantize: tied weights, bfloat16, shards, and those that are ternary already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm

from tests.formats.strategies import assert_same
from tests.graph.models.checkpoints import BERT, GPT2, bert, gpt2, write_checkpoint
from tests.graph.models.decoders import BITNET, LLAMA, decoder, write_bfloat16
from tests.graph.models.test_bitnet import OFFLINE, TRITS, packed
from tvm_ternary.convert.folder import resave
from tvm_ternary.convert.job import quantize_model
from tvm_ternary.errors import ModelError
from tvm_ternary.formats import checkpoint_folder
from tvm_ternary.graph.importer import ImportedModel
from tvm_ternary.graph.source import import_model

SAME: dict[str, Any] = {"edges": "same", "output_layer": "same", "recipe": {"method": "absmean"}}


def there_and_back(source: Path, folder: Path, **options: Any) -> tuple[ImportedModel, ImportedModel]:
    """Quantize, check that graph, tables and what is ternary come back and are saved the same; give both imports."""
    done = quantize_model(source, folder / "out", **{**SAME, **options})
    before, after = import_model(source), import_model(folder / "out")
    tvm.ir.assert_structural_equal(before.module, after.module)
    assert list(after.ternary) == [layer.name for layer in done.layers if layer.scheme is not None]
    for name, table in before.tables.items():
        np.testing.assert_array_equal(after.tables[name].value.numpy(), table.value.numpy())
    for name in before.shapes.keys() - after.ternary.keys():
        np.testing.assert_array_equal(after.params[name], before.params[name])
    (folder / "again").mkdir()
    resave(after, folder / "out", folder / "again")
    for path in (folder / "out").iterdir():
        assert path.read_bytes() == (folder / "again" / path.name).read_bytes(), path.name
    return before, after


def test_matrices_stored_the_other_way_round_and_a_tied_head(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "gpt2", GPT2, gpt2())
    before, after = there_and_back(source, tmp_path, scheme="t2a8")
    head = "transformer.wte.weight"
    assert list(after.ternary) == list(before.shapes)
    # The head is ternary, while rows are gathered from the float table.
    assert np.unique(after.params[head][:, 0]).size <= 9
    assert head in after.tables


def test_a_tied_head_stays_float_by_default(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "gpt2", GPT2, gpt2())
    before, after = there_and_back(source, tmp_path, scheme="t1a8", output_layer=None)
    assert before.shapes.keys() - after.ternary.keys() == {"transformer.wte.weight"}


@pytest.mark.parametrize("config", [LLAMA, {**LLAMA, "tie_word_embeddings": True}], ids=["own head", "tied"])
def test_bfloat16(tmp_path: Path, config: dict[str, Any]) -> None:
    source = write_bfloat16(tmp_path / "llama", config, decoder(config))
    before, after = there_and_back(source, tmp_path, scheme="t2a8", output_layer="float")
    assert len(before.shapes) - len(after.ternary) == 1


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_folder.save_folder, "__defaults__", (4096,))
    there_and_back(write_checkpoint(tmp_path / "bert", BERT, bert()), tmp_path, scheme="t1a8")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert (tmp_path / "out" / checkpoint_folder.INDEX).exists()


def test_what_is_ternary_already_comes_through_bit_by_bit(tmp_path: Path) -> None:
    source = write_bfloat16(tmp_path / "bitnet", {**BITNET, "quantization_config": OFFLINE}, packed())
    before, after = there_and_back(source, tmp_path, scheme="t2a8", output_layer="float")
    assert set(after.ternary) == set(TRITS)
    for name in TRITS:
        assert_same(after.ternary[name], before.ternary[name])


def test_a_gguf_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"model\.gguf"):
        quantize_model(tmp_path / "model.gguf", tmp_path / "out")
