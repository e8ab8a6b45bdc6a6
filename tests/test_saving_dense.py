"""A model is dense again: as a model of its class, and as a checkpoint that loads where there is no sparsec."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_model
from format_cases import LAYOUTS, some
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

import sparsec
from sparsec import files
from sparsec.errors import CheckpointError, FormatError
from sparsec.kernels import SparseLinear

PRUNED = "magnitude(0.5),freeze"
LOWERED = f"{PRUNED},fuse,lower(bitmap)"


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(t.dtype == b[n].dtype and t.equal(b[n]) for n, t in a.items())


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(torch.arange(14).view(2, 7))[0]
    return found


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("llama", torch.float32), ("gpt2", torch.bfloat16), ("bert-base", torch.bfloat16)],
    ids=str,
)
def test_the_dense_model_is_the_masked_one(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(architecture)[0].eval().to(dtype)
    masked = sparsec.compile(model, PRUNED)
    compiled = sparsec.compile(model, LOWERED)
    compiled.save_pretrained(tmp_path / "packed")
    auto: Any = AutoModel if architecture == "bert-base" else AutoModelForCausalLM
    for packed in (compiled, sparsec.load(tmp_path / "packed"), auto.from_pretrained(tmp_path / "packed")):
        before = copy.deepcopy(packed.state_dict())
        dense = packed.sparsec.to_dense()
        assert [type(m) for m in dense.modules()] == [type(m) for m in model.modules()]
        assert same(dense.state_dict(), masked.state_dict())
        assert torch.equal(logits(dense), logits(masked))
        assert not any("sparsec" in repr(vars(m)) for m in dense.modules())
        assert not {p.data_ptr() for p in dense.parameters()} & {p.data_ptr() for p in packed.parameters()} - {0}
        packed.save_pretrained(tmp_path / "dense", dense=True)
        config = json.loads((tmp_path / "dense/config.json").read_text())
        assert not {"quantization_config", "transformers_weights"} & config.keys()
        assert same(auto.from_pretrained(tmp_path / "dense", dtype="auto").state_dict(), masked.state_dict())
        assert same(packed.state_dict(), before)
        with torch.no_grad():
            for parameter in dense.parameters():
                parameter.zero_()
        assert same(packed.state_dict(), before)


def test_a_model_that_nobody_holds_has_all_its_ways_out(tmp_path: Path) -> None:
    """Regression: `sparsec.load(folder).sparsec.to_dense()` met a hook of the model that Python had let go of, and raised."""
    model = tiny_model("llama")[0].eval()
    masked = sparsec.compile(model, PRUNED)
    sparsec.compile(model, LOWERED).save_pretrained(tmp_path / "packed")
    for kept in (lambda: sparsec.load(tmp_path / "packed"), lambda: sparsec.compile(model, LOWERED)):
        dense = kept().sparsec.to_dense()
        assert same(dense.state_dict(), masked.state_dict())
        whole = kept().sparsec.whole()
        for twin in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
            assert torch.equal(logits(twin), logits(whole))
        wrong = whole.state_dict()
        name = next(n for n in wrong if n.endswith("panel_ptr"))
        wrong[name] = wrong[name] + 1
        with pytest.raises(FormatError, match="panel_ptr"):
            whole.load_state_dict(wrong)
        kept().sparsec.save_pretrained(tmp_path / "dense", dense=True)
        assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "dense").state_dict(), masked.state_dict())


def test_ties_and_training_come_back(tmp_path: Path) -> None:
    model = tiny_model("llama")[0]
    attention = model.model.layers[0].self_attn
    attention.v_proj.weight = attention.k_proj.weight
    for packed in (compiled := sparsec.compile(model, LOWERED), saved(compiled, tmp_path)):
        dense: Any = packed.sparsec.to_dense()
        inside = dense.model.layers[0].self_attn
        assert inside.v_proj.weight is inside.k_proj.weight
        assert inside.v_proj.weight.requires_grad == next(packed.parameters()).requires_grad
        assert (dense.lm_head.weight is dense.get_input_embeddings().weight) == model.config.tie_word_embeddings
    dense = compiled.sparsec.to_dense().train()
    dense(torch.arange(14).view(2, 7), labels=torch.arange(14).view(2, 7)).loss.backward()
    assert dense.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def saved(compiled: Any, folder: Path) -> Any:
    compiled.save_pretrained(folder)
    return sparsec.load(folder)


class Special(nn.Linear):
    """A linear of a class of its own."""


def test_a_plain_module_is_dense_again(tmp_path: Path) -> None:
    model = nn.Sequential(Special(8, 16), nn.LayerNorm(16), nn.Linear(16, 4, bias=False))
    calls = []
    model[0].register_forward_hook(lambda m, x, y: calls.append(type(m)))
    compiled: Any = sparsec.compile(
        model, "magnitude(0.5, targets='*'),freeze,lower(csr)", example_inputs=torch.ones(2, 8)
    )
    sparsec.save(compiled, tmp_path)
    loaded: Any = sparsec.load(tmp_path, into=copy.deepcopy(model))
    for packed in (compiled, loaded):
        dense = packed.sparsec.to_dense()
        assert [type(m) for m in dense] == [Special, nn.LayerNorm, nn.Linear]
        assert torch.allclose(dense(torch.ones(2, 8)), packed(torch.ones(2, 8)))
        with pytest.raises(CheckpointError, match="is no model of transformers"):
            packed.sparsec.save_pretrained(tmp_path / "dense", dense=True)
    assert Special in calls


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([n for n, c in LAYOUTS.items() if c.kind.format != "wcsr"]), st.integers(0, 9), st.data())
def test_every_layout_is_unpacked(name: str, seed: int, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(LAYOUTS[name].kind.dtypes))
    packed, _ = some(LAYOUTS[name], 24, 32, 0.5, dtype, seed)
    from sparsec.checkpoint.dense import dense_copy

    made: Any = dense_copy(nn.Sequential(SparseLinear(packed)))
    assert type(made[0]) is nn.Linear
    assert torch.equal(made[0].weight, packed.unpack())


def test_a_folder_holds_one_model_at_a_time(tmp_path: Path) -> None:
    compiled: Any = sparsec.compile(tiny_model("llama")[0].eval(), LOWERED)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "README.md").write_text("mine")
    for size in ("1GB", "20KB", "1GB"):
        compiled.save_pretrained(tmp_path, dense=True, max_shard_size=size)
        assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(compiled), atol=1e-5)
        assert (tmp_path / "model.safetensors").exists() == (size == "1GB")
        assert (tmp_path / "model.safetensors.index.json").exists() == (size != "1GB")
        assert (tmp_path / "README.md").read_text() == "mine"
    with pytest.warns(UserWarning, match=r"also holds model\.safetensors"):
        compiled.save_pretrained(tmp_path)
    for loaded in (sparsec.load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(logits(loaded), logits(compiled))
        assert loaded.sparsec.record.layers
    compiled.save_pretrained(tmp_path, dense=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "notes.txt",
    ]


def test_a_dense_save_that_fails_leaves_the_packed_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: Any = sparsec.compile(tiny_model("llama")[0].eval(), LOWERED)
    compiled.save_pretrained(tmp_path)
    put = files.put_in_place
    for at in range(3):
        calls = iter(range(100))

        def failing(made: Path, path: Path, calls: Any = calls, at: int = at) -> None:
            if next(calls) == at:
                raise OSError(28, "No space left on device")
            put(made, path)

        monkeypatch.setattr(files, "put_in_place", failing)
        with pytest.raises(CheckpointError, match="No space left on device"):
            compiled.save_pretrained(tmp_path, dense=True)
        assert torch.equal(logits(sparsec.load(tmp_path)), logits(compiled))
        assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_it_loads_where_there_is_no_sparsec(tmp_path: Path) -> None:
    compiled: Any = sparsec.compile(tiny_model("gpt2")[0].eval(), LOWERED)
    compiled.save_pretrained(tmp_path, dense=True)
    code = (
        "import sys, torch\nsys.modules['sparsec'] = None\nfrom transformers import AutoModelForCausalLM\n"
        f"m, info = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, output_loading_info=True)\n"
        "assert not info['missing_keys'] and not info['unexpected_keys'], info\n"
        "print(m(torch.arange(14).view(2, 7)).logits.double().sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, env=dict(os.environ), check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.split()[-1]) == pytest.approx(float(logits(compiled).double().sum()), rel=1e-3, abs=1e-2)
