"""What transformers, accelerate and peft pass to save_pretrained and do with a packed model: honoured, or refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from architectures import tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import sparsec
from sparsec.errors import CheckpointError
from sparsec.kernels import SparseLinear

IDS = torch.arange(14).view(2, 7)
PASSES = "magnitude(0.5, ignore='*.q_proj'),freeze,lower(bitmap)"
LORA = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


@pytest.fixture(scope="module")
def compiled() -> Any:
    return sparsec.compile(tiny_model("llama")[0].eval(), PASSES)


@pytest.fixture(scope="module")
def folder(compiled: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place: Path = tmp_path_factory.mktemp("saved")
    compiled.save_pretrained(place)
    return place


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a repository was asked for, and under "files" what was uploaded to it."""
    told: dict[str, Any] = {"asked": {}, "uploads": []}

    def create(self: Any, repo_id: str, **options: Any) -> Any:
        told["asked"] |= {"repo_id": repo_id, "token": self.token, **options}
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload(self: Any, *, folder_path: Any, allow_patterns: list[str], **options: Any) -> str:
        copied = tmp_path / f"hub{len(told['uploads'])}"
        shutil.copytree(folder_path, copied)
        told["asked"] |= options
        told["uploads"].append((copied, sorted(allow_patterns)))
        return "the commit"

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    return told


def test_a_push_uploads_what_a_save_writes(compiled: Any, folder: Path, hub: dict[str, Any]) -> None:
    for model in (compiled, sparsec.load(folder), AutoModelForCausalLM.from_pretrained(folder)):
        assert model.push_to_hub("pruned", token="secret", private=True, tags=["mine"]) == "the commit"
        place, names = hub["uploads"][-1]
        assert {"repo_id": "me/pruned", "token": "secret", "private": True}.items() <= hub["asked"].items()
        assert names == sorted(p.name for p in place.iterdir())
        assert {"README.md", "config.json", "generation_config.json"} < set(names)
        card = (place / "README.md").read_text()
        assert "mine" in card
        assert "import sparsec" in card
        assert "'me/pruned'" in card
        assert torch.equal(logits(sparsec.load(place)), logits(compiled))


def test_a_save_can_push_what_it_wrote(compiled: Any, hub: dict[str, Any], tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    (place / "notes.txt").write_text("mine")
    compiled.save_pretrained(place, push_to_hub=True, commit_message="smaller", create_pr=True)
    assert hub["asked"]["repo_id"] == "me/small"
    assert hub["asked"]["commit_message"] == "smaller"
    assert hub["asked"]["create_pr"]
    names = hub["uploads"][-1][1]
    assert "notes.txt" not in names
    assert "config.json" in names
    compiled.push_to_hub("dense", dense=True)
    place, names = hub["uploads"][-1]
    assert names == ["config.json", "generation_config.json", "model.safetensors"]
    assert "quantization_config" not in json.loads((place / "config.json").read_text())


def test_options_of_others_are_honoured_or_refused(compiled: Any, tmp_path: Path) -> None:
    compiled.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    compiled.save_pretrained(
        tmp_path / "own",
        state_dict=compiled.state_dict(),
        safe_serialization=True,
        save_function=Accelerator(cpu=True).save,
        token=None,
        variant=None,
        save_peft_format=True,
    )
    assert torch.equal(logits(sparsec.load(tmp_path / "own")), logits(compiled))
    other = {n: t + 1 if t.is_floating_point() else t for n, t in compiled.state_dict().items()}
    refused: list[dict[str, Any]] = [
        {"state_dict": other},
        {"state_dict": {}},
        {"state_dict": other, "dense": True},
        {"safe_serialization": False},
        {"save_function": lambda *_: None},
        {"variant": "fp16"},
        {"distributed_checkpoint": True},
        {"repo_id": "me/there"},
        {"max_shards": 3},
        {"max_shard_size": "much", "dense": True},
    ]
    for options in refused:
        with pytest.raises(CheckpointError, match=next(iter(options))):
            compiled.save_pretrained(tmp_path / "refused", **options)
    assert not (tmp_path / "refused").exists()
    compiled.save_pretrained(tmp_path / "dense", dense=True, variant="fp16", state_dict=compiled.state_dict())
    assert (tmp_path / "dense/model.fp16.safetensors").exists()


class Texts(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        return {"input_ids": IDS[at % 2], "labels": IDS[at % 2]}


@pytest.mark.parametrize("way", ["sparsec.load", "from_pretrained"])
def test_an_adapter_is_trained_saved_and_put_on_again(way: str, folder: Path, tmp_path: Path) -> None:
    def fresh() -> Any:
        return sparsec.load(folder) if way == "sparsec.load" else AutoModelForCausalLM.from_pretrained(folder)

    base = fresh()
    model = get_peft_model(base, LORA)
    arguments: dict[str, Any] = {"report_to": [], "use_cpu": True, "per_device_train_batch_size": 2, "save_steps": 1}
    Trainer(
        model, TrainingArguments(tmp_path, max_steps=2, disable_tqdm=True, **arguments), train_dataset=Texts()
    ).train()
    with pytest.raises(CheckpointError, match=r"is a layer of peft: save the adapter by its own save_pretrained"):
        base.save_pretrained(tmp_path / "both")
    again = PeftModel.from_pretrained(fresh(), tmp_path / "checkpoint-2").eval()
    assert torch.equal(logits(again), logits(model.eval()))
    assert not torch.equal(logits(again), logits(fresh()))
    resumed = get_peft_model(fresh(), LORA)
    trainer = Trainer(
        resumed, TrainingArguments(tmp_path, max_steps=3, disable_tqdm=True, **arguments), train_dataset=Texts()
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 3
    merged = resumed.merge_and_unload()
    assert any(isinstance(m, SparseLinear) for m in merged.modules())
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(sparsec.load(tmp_path / "merged")), logits(merged))


def test_an_adapter_of_transformers_is_saved_by_transformers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    saved = []
    monkeypatch.setattr(type(model), "save_pretrained", lambda self, place, **options: saved.append((place, options)))
    model._hf_peft_config_loaded = True  # as add_adapter leaves it
    model.save_pretrained(tmp_path, state_dict=None)
    assert saved == [(tmp_path, {"state_dict": None, "is_main_process": True, "push_to_hub": False})]


def test_all_linears_are_those_that_are_not_packed(folder: Path) -> None:
    model = get_peft_model(sparsec.load(folder), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted = {name for name, m in model.named_modules() if hasattr(m, "lora_A")}
    assert {name.rpartition(".")[2] for name in adapted} == {"q_proj"}


def test_an_adapter_on_packed_layers_is_refused_by_peft(folder: Path) -> None:
    with pytest.raises(ValueError, match="is not supported"):
        get_peft_model(sparsec.load(folder), LoraConfig(target_modules=["up_proj"], task_type="CAUSAL_LM"))
