"""Small saved models of every layout, made without tracing: linears are packed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from format_cases import Sized
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sparsec.checkpoint.pretrained import save_packed
from sparsec.formats import Packed
from sparsec.kernels import SparseLinear
from sparsec.kernels.modules.group import Group

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}


def packed(name: str, weight: torch.Tensor, seed: int = 0) -> Packed:
    """A weight with half of it kept."""
    case = Sized.parse(name)
    mask = case.mask(*weight.shape, 0.5, torch.Generator().manual_seed(seed))
    return case.pack(weight.detach(), mask)


def packed_model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A causal model whose linears in the blocks are of one layout, two of them a group."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SIZES)).to(dtype).eval()
    for path, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            layer = SparseLinear(packed(name, module.weight))
            layer.path = f"model.{path}"
            model.set_submodule(layer.path, layer)
    group = Group(2)
    for i, part in enumerate((model.model.layers[0].mlp.gate_proj, model.model.layers[0].mlp.up_proj)):
        part.join(group, i)
    return model


def saved_model(name: str, folder: Path, dtype: torch.dtype = torch.float32, size: int | str = "16KB") -> Path:
    """Its folder, with several files."""
    save_packed(packed_model(name, dtype), folder, max_shard_size=size)
    return folder
