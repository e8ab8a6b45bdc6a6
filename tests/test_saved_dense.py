"""Tensors of a saved model that are not packed are those that were saved, in the types that they had."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_models import packed_model, saved_model
from test_hostile_folders import changed, files_of
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertModel

import sparsec
from sparsec.checkpoint.checking import examine
from sparsec.checkpoint.pretrained import save_packed
from sparsec.errors import CheckpointError

NORM = "sparsec.model.norm.weight"
ROTARY = "sparsec-buffer.model.rotary_emb.inv_freq"
WAYS: tuple[Callable[[Path], Any], ...] = (sparsec.load, AutoModelForCausalLM.from_pretrained)


def edited(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """The one file's tensors are others, and config.json believes its size."""
    (path,) = folder.glob("*.safetensors")
    held = load_file(path)
    change(held)
    save_file(held, path, metadata={"format": "pt"})
    changed(folder, lambda c: files_of(c)[path.name].update(bytes=path.stat().st_size))


@pytest.mark.parametrize("load", WAYS, ids=["sparsec", "transformers"])
@pytest.mark.parametrize("name", [NORM, ROTARY])
def test_a_dense_tensor_of_another_width_is_refused_before_it_fails_in_forward(
    load: Callable[[Path], Any], name: str, tmp_path: Path
) -> None:
    folder = saved_model("csr16", tmp_path, torch.bfloat16, "1GB")
    edited(folder, lambda held: held.update({name: held[name].to(torch.float16)}))
    with pytest.raises(CheckpointError, match=rf"{name.removeprefix('sparsec.')} is float16 in the file, and"):
        load(folder)
    assert any("is float16 in the file" in fault for fault in examine(folder).faults)


@pytest.mark.parametrize("load", WAYS, ids=["sparsec", "transformers"])
def test_a_dense_tensor_that_is_not_there_is_not_made_up(load: Callable[[Path], Any], tmp_path: Path) -> None:
    """transformers fills it with noise, and only warns."""
    folder = saved_model("csr16", tmp_path, size="1GB")
    edited(folder, lambda held: held.update(x=held.pop(NORM)))
    edited(folder, lambda held: held.pop("x"))
    with pytest.raises(CheckpointError, match=r"names model\.norm\.weight, not in the files"):
        load(folder)


@pytest.mark.parametrize("load", WAYS, ids=["sparsec", "transformers"])
def test_a_norm_that_was_kept_wider_comes_back_so(load: Callable[[Path], Any], tmp_path: Path) -> None:
    model: Any = packed_model("csr16", torch.bfloat16)
    model.model.norm.weight = nn.Parameter(model.model.norm.weight.float())
    save_packed(model, tmp_path)
    loaded = load(tmp_path)
    assert loaded.model.norm.weight.dtype == torch.float32
    assert loaded.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("load", WAYS, ids=["sparsec", "transformers"])
def test_a_folder_that_was_saved_before_dtypes_were_told_still_loads(
    load: Callable[[Path], Any], tmp_path: Path
) -> None:
    folder = saved_model("csr16", tmp_path)
    changed(folder, lambda c: c["quantization_config"].pop("dense"))
    ids = torch.arange(6)[None]
    assert torch.isfinite(load(folder)(ids).logits).all()
    assert examine(folder).faults == []


def test_what_was_saved_without_a_part_is_not_given_one_of_noise(tmp_path: Path) -> None:
    """Regression: AutoModel gave it a random pooler, and only transformers' own report of loading said so."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertModel(BertConfig(vocab_size=64, **sizes), add_pooling_layer=False).eval()
    compiled: Any = sparsec.compile(bert, "magnitude(0.5),freeze,lower(csr)")
    compiled.save_pretrained(tmp_path)
    for load in (sparsec.load, AutoModel.from_pretrained):
        with pytest.raises(CheckpointError, match=r"lack pooler.*make it as the saved one was made"):
            load(tmp_path)
    ids = torch.arange(6)[None]
    empty = BertModel(BertConfig(vocab_size=64, **sizes), add_pooling_layer=False).eval()
    for loaded in (sparsec.load(tmp_path, into=empty), AutoModel.from_pretrained(tmp_path, add_pooling_layer=False)):
        with torch.no_grad():
            assert torch.equal(loaded(ids).last_hidden_state, compiled(ids).last_hidden_state)
