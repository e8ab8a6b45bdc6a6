"""Folders that somebody made to do harm: nothing in them is run, read without end, or looked for elsewhere."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_models import packed_model, saved_model
from torch import nn
from transformers import AutoModelForCausalLM

import sparsec
from sparsec.checkpoint.checking import examine
from sparsec.errors import CheckpointError, SparsecError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved model."""
    return saved_model("csr16", tmp_path / "model")


def changed(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """config.json with something changed."""
    content = json.loads((folder / "config.json").read_bytes())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))


def files_of(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = content["quantization_config"]["files"]
    return found


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "a\\b.safetensors",
        "..",
        "",
        "x\0.safetensors",
        "x.bin",
    ],
)
def test_a_file_of_another_folder_is_refused(name: str, folder: Path) -> None:
    changed(folder, lambda c: files_of(c).update({name: {"bytes": 1, "sha256": ""}}))
    with pytest.raises(CheckpointError):
        sparsec.load(folder)
    assert examine(folder).faults
    with pytest.raises((SparsecError, OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(folder)


def test_an_index_that_names_files_elsewhere_is_refused(folder: Path, tmp_path: Path) -> None:
    """transformers takes the files that its index names, wherever they are."""
    other = saved_model("csr16", tmp_path / "other")
    (index,) = folder.glob("*.index.json")
    content = json.loads(index.read_bytes())
    content["weight_map"] = {key: f"../{other.name}/{name}" for key, name in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="other folders"):
        AutoModelForCausalLM.from_pretrained(folder)
    assert any("is said to be in '../other" in fault for fault in examine(folder).faults)


@pytest.mark.parametrize("what", ["pipe", "device", "folder"])
@pytest.mark.parametrize("pattern", ["*.safetensors", "generation_config.json", "config.json"])
def test_what_is_no_plain_file_is_not_read(what: str, pattern: str, folder: Path) -> None:
    """Regression: a pipe was waited for without end."""
    place = sorted(folder.glob(pattern))[0]
    place.unlink()
    if what == "pipe":
        os.mkfifo(place)
    elif what == "device":
        place.symlink_to("/dev/zero")
    else:
        place.mkdir()
    with pytest.raises(CheckpointError, match="is no plain file"):
        sparsec.load(folder)
    assert any("is no plain file" in fault for fault in examine(folder).faults)


def test_links_are_followed(folder: Path, tmp_path: Path) -> None:
    """The cache of the hub is made of them."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert examine(snapshot).faults == []
    assert sparsec.load(snapshot).config.vocab_size == AutoModelForCausalLM.from_pretrained(snapshot).config.vocab_size


def test_a_config_that_is_too_large_or_too_deep_is_refused(folder: Path) -> None:
    path = folder / "config.json"
    text = path.read_text()
    for bad, said in (
        ('{"a":' * 200_000, "is no JSON"),
        ('{"x": ' + "[" * 100_000 + "]" * 100_000 + "}", "is no JSON"),
        (
            text.replace('"model_type"', '"quantization_config": {}, "model_type"'),
            "'quantization_config' stands there twice",
        ),
        (text.replace('"order": 1', '"order": 1, "order": 1', 1), "'order' stands there twice"),
    ):
        path.write_text(bad)
        with pytest.raises(CheckpointError, match=said):
            sparsec.load(folder)
    with path.open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(CheckpointError, match="has 1073741824 bytes, and must have"):
        sparsec.load(folder)
    path.write_text(text)
    changed(folder, lambda c: c["quantization_config"].update(layers={str(i): {} for i in range(20_000)}))
    with pytest.raises(CheckpointError, match=r"layers\['0'\]"):
        sparsec.load(folder)
    assert len(examine(folder).faults) > 20_000


def test_code_beside_a_model_is_not_run(folder: Path, tmp_path: Path) -> None:
    """Whoever asks transformers for it (`trust_remote_code=True`) gets it: that is a choice, and not sparsec's."""
    proof = tmp_path / "run"
    (folder / "evil.py").write_text(f"open({str(proof)!r}, 'w').write('x')\nclass Config: pass\nclass Model: pass\n")
    auto = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForCausalLM": "evil.Model"}
    changed(folder, lambda c: c.update(auto_map=auto))
    model: Any = sparsec.load(folder)
    assert type(model).__module__ == "transformers.models.llama.modeling_llama"
    assert not hasattr(model.config, "auto_map")
    assert examine(folder).faults == []
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is type(model)
    changed(folder, lambda c: c.update(model_type="evil", architectures=["Model"]))
    with pytest.raises(CheckpointError, match="no config of a model that transformers knows"):
        sparsec.load(folder)
    assert not proof.exists()


def test_a_format_of_a_package_that_is_installed_is_not_imported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name in a file must not choose what is imported."""

    def offered() -> None:
        raise AssertionError("asked for what packages offer")

    monkeypatch.setattr("sparsec.formats.take_offered", offered)
    monkeypatch.setattr("sparsec.formats.layout.take_offered", offered)
    layer = next(iter(json.loads((folder / "config.json").read_bytes())["quantization_config"]["layers"]))
    changed(folder, lambda c: c["quantization_config"]["layers"][layer].update(layout="their_format"))
    with pytest.raises(CheckpointError, match="is known once that is imported"):
        sparsec.load(folder)


def test_a_tensor_that_is_lacking_is_not_filled_with_noise(folder: Path) -> None:
    """transformers fills it, and says so in a warning."""
    (index,) = folder.glob("*.index.json")
    layers = json.loads((folder / "config.json").read_bytes())["quantization_config"]["layers"]
    path = sorted(folder.glob("*.safetensors"))[0]
    data = path.read_bytes()
    name = next(f"{p}.values" for p in layers if f"{p}.values".encode() in data)
    path.write_bytes(data.replace(f"{name}".encode(), f"{name[:-1]}z".encode()))
    index.write_text(index.read_text().replace(f'"sparsec.{name}"', f'"sparsec.{name[:-1]}z"'))
    with pytest.raises(CheckpointError, match=r"valuez, which config\.json does not name"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_folder_that_goes_away_after_loading_leaves_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    model: Any = sparsec.load(folder.name)
    ids = torch.arange(5)[None]
    right = model(ids)[0]
    monkeypatch.chdir("/")
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert torch.equal(model(ids)[0], right)


@pytest.mark.parametrize("name", ["with space", "ünïcødé-模型", "a'b\"c", "-dash", "x" * 200])
def test_any_name_of_a_folder_will_do(name: str, tmp_path: Path) -> None:
    folder = saved_model("bitmap", tmp_path / name)
    assert examine(folder).faults == []
    right = sparsec.load(folder)(torch.arange(4)[None])[0]
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(torch.arange(4)[None])[0], right)


@pytest.mark.parametrize("name", ["wcsr8", "wcsr16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_a_gpu_saved_runs_on_a_cpu(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """It is laid out anew there, as columns, and holds the same weights."""
    folder = saved_model(name, tmp_path / "there", dtype)
    assert set(examine(folder).layouts) == {name}
    there = packed_model(name, dtype)
    for here in (sparsec.load(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)):
        for path, module in there.named_modules():
            if isinstance(module, sparsec.SparseLinear):
                layer: Any = here.get_submodule(path)
                assert layer.packed.format == "csr"
                assert torch.equal(layer.packed.unpack(), module.packed.unpack())
        assert here(torch.arange(4)[None])[0].shape == (1, 4, here.config.vocab_size)


def test_a_read_only_folder_loads(folder: Path) -> None:
    for path in folder.iterdir():
        path.chmod(0o400)
    folder.chmod(0o500)
    try:
        assert examine(folder).faults == []
        sparsec.load(folder)
    finally:
        folder.chmod(0o700)


def test_an_index_file_of_another_name_is_refused(tmp_path: Path) -> None:
    sparsec.save(nn.Linear(2, 2), tmp_path)
    changed(tmp_path, lambda c: c.update(transformers_weights=["x"]))
    assert any("transformers_weights must name" in fault for fault in examine(tmp_path).faults)
