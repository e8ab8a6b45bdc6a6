"""`sparsec check`: every fault of a saved model is found, named with its place, and told apart from what is only odd."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_models import saved_model
from torch import nn

import sparsec
from sparsec import check
from sparsec.checkpoint.checking import examine
from sparsec.errors import CheckpointError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with several files."""
    return saved_model("csr16", tmp_path_factory.mktemp("llama"))


def copied(folder: Path, to: Path) -> Path:
    """Another copy of a folder."""
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def record_of(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes what config.json says."""
    content = json.loads((folder / "config.json").read_bytes())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))


def tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], number: int = 0) -> str:
    """Changes one file, and what config.json says of its bytes."""
    path = sorted(folder.glob("*.safetensors"))[number]
    held = load_file(path)
    change(held)
    save_file(held, path)
    record_of(folder, lambda c: c["quantization_config"]["files"][path.name].update(bytes=path.stat().st_size))
    return path.name


def test_what_was_saved_is_fine(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([str(saved)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "LlamaForCausalLM, " in out[0]
    assert " csr16)" in out[0]
    assert out[-1] == "nothing is wrong"
    assert len(out) == 2


def test_all_faults_are_found_at_once(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied(saved, tmp_path)
    spoilt: list[str] = []

    def spoil(held: dict[str, torch.Tensor]) -> None:
        spoilt.extend([key for key in held if key.endswith("col_idx")][:1])
        held[spoilt[0]][0] = 9999

    name = tensors(folder, spoil)
    (index,) = folder.glob("*.index.json")
    content = json.loads(index.read_bytes())
    gone = next(iter(content["weight_map"]))
    del content["weight_map"][gone]
    content["weight_map"]["sparsec.other"] = "x"
    index.write_text(json.dumps(content))
    lost = sorted(folder.glob("*.safetensors"))[-1]
    lost.unlink()

    def rename(content: dict[str, Any]) -> None:
        layers = content["quantization_config"]["layers"]
        layers["model.nowhere"] = layers.pop(list(layers)[-1])
        layers["broken"] = 7
        content["quantization_config"]["tied"]["lm_head.weight"] = "nothing"

    record_of(folder, rename)
    (folder / "pytorch_model.bin").write_text("")
    (folder / f"model-00001-of-00001-{'0' * 16}.safetensors").write_text("")
    assert check.main([str(folder), "--json", str(tmp_path / "out.json")]) == 1
    out = capsys.readouterr().out
    for said in (
        f"{name} has the SHA-256",
        f"{spoilt[0].removeprefix('sparsec.').removesuffix('.col_idx')}: col_idx must lie in",
        f"{gone}, which ",
        "sparsec.other is in no file",
        f"{lost.name} cannot be read",
        "layers names 'model.nowhere'",
        "layers['broken'] must be an object, got int",
        "lm_head.weight is tied to nothing",
        "notice: pytorch_model.bin is no part of the model",
        "left of a save that did not end",
    ):
        assert said in out
    found = json.loads((tmp_path / "out.json").read_bytes())
    assert found["fine"] is False
    assert len(found["faults"]) == int(out.splitlines()[-1].split()[0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["quantization_config"].update(schema="sparsec.checkpoint/2"), "load it with the version that"),
        (lambda c: c.update(architectures=["Path"]), "transformers has no 'Path'"),
        (lambda c: c.update(transformers_weights="../x.safetensors.index.json"), "in the folder itself"),
        (lambda c: c["quantization_config"].update(groups=[["a", "b"]]), "groups must name packed linears"),
        (lambda c: c["quantization_config"].update(files=3), "files must be an object"),
        (lambda c: c["quantization_config"].update(report={"file": "/dev/zero"}), "must name .json files"),
        (lambda c: c.update(intermediate_size=8), "holds a matrix"),
    ],
)
def test_a_fault_of_the_config_is_named(
    change: Callable[[dict[str, Any]], None], said: str, saved: Path, tmp_path: Path
) -> None:
    folder = copied(saved, tmp_path)
    record_of(folder, change)
    assert any(said in fault for fault in examine(folder).faults)


def test_what_is_newer_is_said_and_no_fault(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path)
    record_of(folder, lambda c: c["quantization_config"].update(versions={"sparsec": "99.1", "torch": "odd"}))
    found = examine(folder)
    assert found.faults == []
    assert found.notices == [f"saved with sparsec 99.1, which is newer than the {sparsec.__version__} here"]


def test_where_no_model_was_saved_the_code_is_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_text("{}")
    for name in ("nowhere", "dense"):
        assert check.main([str(tmp_path / name)]) == 2
        assert "error: " in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{")
    assert check.main([str(tmp_path)]) == 1


def test_a_plain_module_is_checked_as_far_as_can_be(tmp_path: Path) -> None:
    sparsec.save(nn.Sequential(nn.Linear(3, 4)), tmp_path)
    found = examine(tmp_path)
    assert found.faults == []
    assert "load(folder, into=module)" in found.notices[0]


def test_files_of_a_save_that_was_killed_are_removed_by_a_later_one(tmp_path: Path) -> None:
    sparsec.save(nn.Linear(2, 3), tmp_path)
    names = [f"model-00001-of-00001-{digit * 16}.safetensors" for digit in "01"]
    for name in names:
        (tmp_path / name).write_text("")
    os.utime(tmp_path / names[0], (time.time() - 4000,) * 2)
    assert len(examine(tmp_path).notices) == 3
    sparsec.save(nn.Linear(2, 3), tmp_path)
    assert not (tmp_path / names[0]).exists()
    assert (tmp_path / names[1]).exists()


def test_examine_refuses_what_is_no_folder() -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        examine("nowhere")


def test_a_file_that_is_gone_is_one_fault_and_not_one_for_every_tensor(saved: Path, tmp_path: Path) -> None:
    """Regression: the index and every packed layer were said to lack what was in that file."""
    folder = copied(saved, tmp_path)
    lost = sorted(folder.glob("*.safetensors"))[0]
    held = load_file(lost)
    lost.unlink()
    faults = examine(folder).faults
    assert f"{lost.name} cannot be read" in faults[0]
    assert not [fault for fault in faults[1:] for key in held if f"{key.removeprefix('sparsec.')} is" in fault]
    assert len(faults) <= 3  # what is not packed is told in a line each of config.json and of the class


def test_an_error_of_torch_is_told_in_a_line(saved: Path, tmp_path: Path) -> None:
    """Regression: fifty lines of calls in C++ followed."""
    folder = copied(saved, tmp_path)
    record_of(folder, lambda c: c.update(vocab_size=2**70))
    (fault,) = examine(folder).faults
    assert "no LlamaForCausalLM can be made of it: TypeError" in fault
    assert len(fault.splitlines()) == 1
    with pytest.raises(CheckpointError) as refused:
        sparsec.load(folder)
    assert len(str(refused.value).splitlines()) == 1


def test_a_module_with_the_name_of_computed_buffers_is_not_saved(tmp_path: Path) -> None:
    """Regression: its tensors were taken for buffers that the module computes, and did not come back."""
    module = nn.Module()
    module.add_module("sparsec-buffer", nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match=r"sparsec-buffer\.weight: .*give the module another name"):
        sparsec.save(module, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
