"""What `from_pretrained` of transformers' auto classes makes of a saved model, besides the class that was saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import tiny_model
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

import sparsec
from sparsec.errors import CheckpointError
from sparsec.kernels import SparseLinear

SPEC = "magnitude(0.5),freeze,fuse,lower(bitmap)"


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.arange(14).view(2, 7))[0]
    return found


@pytest.mark.parametrize("spec", [SPEC, "magnitude(0.5),freeze,lower(dense)"])
def test_transformers_keeps_the_dtype_that_a_model_was_converted_to(spec: str, tmp_path: Path) -> None:
    """Regression: the config told the dtype that the model was made with, to which transformers converted all of it."""
    model, _ = tiny_model("llama")
    model.config.dtype = torch.float32
    compiled = sparsec.compile(model.eval().to(torch.bfloat16), spec)
    compiled.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters() if p.is_floating_point()} == {torch.bfloat16}
    assert torch.equal(outputs(loaded), outputs(compiled))
    asked = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in asked.parameters() if p.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_base_of_a_causal_model_loads_without_its_head(architecture: str, tmp_path: Path) -> None:
    """As transformers loads the base of any checkpoint; regression: every tensor was said to be lacking."""
    compiled = sparsec.compile(tiny_model(architecture)[0].eval(), SPEC)
    compiled.save_pretrained(tmp_path / "whole")
    loaded = AutoModel.from_pretrained(tmp_path / "whole")
    base = compiled.base_model
    assert type(loaded) is type(base)
    assert torch.equal(outputs(loaded), outputs(base))
    paths = {path for path, m in loaded.named_modules() if isinstance(m, SparseLinear)}
    assert paths == {path for path, m in base.named_modules() if isinstance(m, SparseLinear)}
    loaded.save_pretrained(tmp_path / "base")
    assert torch.equal(outputs(sparsec.load(tmp_path / "base")), outputs(base))
    with pytest.raises(CheckpointError, match=r"lack lm_head\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "base")
