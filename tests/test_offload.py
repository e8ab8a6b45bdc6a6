"""Compiled models whose weights accelerate keeps elsewhere until they are wanted: they compute the same, or are refused by name."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from test_parallel import IDS, of_family
from transformers import AutoModelForCausalLM

import sparsec
from sparsec.checkpoint.folder import PREFIX
from sparsec.errors import CheckpointError, SparsecWarning
from sparsec.kernels.modules.packed_layer import PackedLayer

SPECS = {
    "bitmap": "magnitude(0.5),freeze,fuse,lower(bitmap)",
    "head": "magnitude(0.5, targets=('lm_head', 'mlp')),freeze,fuse,lower('bitmap:int8', targets=('lm_head', 'mlp'))",
    "dense": "lower(dense)",
}
PARTS = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", "model.layers.0", "model.layers.1")
LEFT = "accelerate offloads layers whose packed weights are buffers.*offload_buffers=True"
OFFLOADED = "the model's own code, no native call: weights of it are offloaded, and come at every call"


@cache
def compiled(name: str) -> Any:
    """Only to be copied, and read."""
    return sparsec.compile(of_family("Llama", num_hidden_layers=2), SPECS[name])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {name: tmp_path_factory.mktemp(name) for name in SPECS}
    for name, place in found.items():
        compiled(name).save_pretrained(place)
    return found


def on_disk(*parts: str) -> dict[str, str]:
    return {part: "disk" if part in parts else "cpu" for part in PARTS}


def away(model: Any) -> set[str]:
    """The packed layers whose tensors are elsewhere."""
    return {n for n, m in model.named_modules() if isinstance(m, PackedLayer) and m.packed.values.is_meta}


def assert_same(model: Any, name: str) -> None:
    one = compiled(name)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, one(input_ids=IDS).logits)
    texts = [m.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0) for m in (model, one)]
    assert torch.equal(*texts)


WAYS: dict[str, Callable[[Any, Path], Any]] = {
    "cpu_offload": lambda m, _: accelerate.cpu_offload(m, execution_device="cpu", offload_buffers=True),
    "disk_offload": lambda m, place: accelerate.disk_offload(m, place, execution_device="cpu", offload_buffers=True),
    "dispatch_model": lambda m, place: accelerate.dispatch_model(
        m, on_disk(*PARTS[3:]), main_device="cpu", offload_dir=place, offload_buffers=True
    ),
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("way", WAYS)
def test_accelerate_offloads_a_model_in_memory_and_gives_it_back(way: str, name: str, tmp_path: Path) -> None:
    model = copy.deepcopy(compiled(name))
    layers = {n for n, m in model.named_modules() if isinstance(m, PackedLayer)}
    with warnings.catch_warnings():
        warnings.simplefilter("error", SparsecWarning)
        WAYS[way](model, tmp_path)
    assert away(model) == layers - ({"model.embed_tokens"} if way == "dispatch_model" else set())
    assert any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert_same(model, name)
    assert model.sparsec.report().decoding == OFFLOADED
    with pytest.raises(
        CheckpointError, match="is on meta, which has no contents: an offloaded model is saved after its"
    ):
        model.save_pretrained(tmp_path / "saved")
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    if way == "cpu_offload":
        assert_same(model, name)
        assert model.sparsec.report().decoding == "one native call a token"
        model.save_pretrained(tmp_path / "saved")
        assert_same(sparsec.load(tmp_path / "saved"), name)


@pytest.mark.parametrize("name", SPECS)
def test_from_pretrained_leaves_layers_on_disk(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    given: dict[str, Any] = {"device_map": on_disk(*PARTS[3:]), "offload_folder": tmp_path}
    with warnings.catch_warnings():
        warnings.simplefilter("error", SparsecWarning)
        model = AutoModelForCausalLM.from_pretrained(folders[name], **given, offload_buffers=True)
    packed = {n for n, m in model.named_modules() if isinstance(m, PackedLayer)}
    assert {n for n in packed if n.startswith("model.layers")} <= away(model)
    assert model.lm_head.weight.is_meta or "lm_head" in packed
    assert_same(model, name)
    assert model.sparsec.report().decoding == OFFLOADED


def test_a_map_that_transformers_makes_for_a_bound_of_memory(folders: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        folders["bitmap"], device_map="auto", max_memory={"cpu": 400_000}, offload_folder=tmp_path, offload_buffers=True
    )
    assert "disk" in model.hf_device_map.values()
    assert away(model)
    assert_same(model, "bitmap")


def test_packed_weights_that_stay_because_nobody_asked_for_buffers_are_told(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.warns(SparsecWarning, match=LEFT):
        model = accelerate.cpu_offload(copy.deepcopy(compiled("bitmap")), execution_device="cpu")
    assert not away(model)
    assert_same(model, "bitmap")
    with pytest.warns(SparsecWarning, match=LEFT):
        model = AutoModelForCausalLM.from_pretrained(
            folders["bitmap"], device_map=on_disk("model.layers.1"), offload_folder=tmp_path
        )
    assert_same(model, "bitmap")


def test_layers_on_one_device_stay_where_they_are(folders: dict[str, Path]) -> None:
    for given in ({"": "cpu"}, "auto"):
        model = AutoModelForCausalLM.from_pretrained(folders["head"], device_map=given)
        assert not away(model)
        assert_same(model, "head")
        assert model.sparsec.report().decoding == "one native call a token"


def test_another_dtype_for_what_is_offloaded_is_refused_with_the_way_out(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(
        CheckpointError, match=r"dtype=torch\.bfloat16 with offloaded layers: .* holds torch\.float32.*save that"
    ):
        AutoModelForCausalLM.from_pretrained(
            folders["bitmap"],
            device_map=on_disk("model.layers.1"),
            offload_folder=tmp_path,
            offload_buffers=True,
            dtype=torch.bfloat16,
        )


def test_what_stays_on_disk_is_looked_at_before_a_kernel_reads_it(tmp_path: Path) -> None:
    """Regression: on meta there was nothing to look at, and what came later was not looked at."""
    compiled("bitmap").save_pretrained(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.safetensors")
    held = bytearray(file.read_bytes())
    size = int.from_bytes(held[:8], "little")
    begin, end = json.loads(held[8 : 8 + size])[f"{PREFIX}model.layers.1.mlp.up_proj.bits"]["data_offsets"]
    held[8 + size + begin : 8 + size + end] = b"\xff" * (end - begin)
    file.write_bytes(held)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj: bits must keep"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "saved",
            device_map=on_disk("model.layers.1"),
            offload_folder=tmp_path / "offloaded",
            offload_buffers=True,
        )
