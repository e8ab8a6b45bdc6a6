"""Fused experts: every expert's matrix is pruned for itself, by what that expert reads, and what saw too little is named."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import slow_pruning
import torch
from architectures import VOCABULARY, tiny_model
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM

import sparsec
from sparsec.errors import MaskError
from sparsec.passes import ADMM, Magnitude, SparseGPT, Wanda
from sparsec.patterns import Pattern


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("mixtral", "unstructured"), ("mixtral", "2:4"), ("mixtral", "block:4x4"), ("qwen2-moe", "2:4")],
)
@pytest.mark.parametrize("algorithm", [Wanda, SparseGPT, ADMM, Magnitude])
def test_every_expert_is_pruned_for_itself(name: str, algorithm, pattern: str) -> None:
    model, call = traced_moe(name)
    ids = torch.randint(3, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(0))
    p = algorithm(
        sparsity=None if pattern == "2:4" else 0.5,
        pattern=pattern,
        **({"scope": "layer"} if algorithm is Magnitude else {}),
    )
    out = sparsec.compile(model, [p, "freeze,sparsity,flops,lower(bitmap)"], calibration=ids, verify="facts")
    graph = out.sparsec.graph
    stacks = [w for w in graph.weights.values() if w.kind == "experts"]
    assert len(stacks) == 4
    for weight in stacks:
        assert weight.packed is None
        assert "no kernel multiplies by fused experts that are sparse" in weight.reason
        assert weight.pruned.criterion == p.name
        dense = model.get_parameter(weight.name).detach()
        for e, (mask, matrix) in enumerate(
            zip(graph.mask_matrices(weight.name), graph.matrices(weight.name), strict=True)
        ):
            change, other = (float((matrix - dense[i] * mask).norm()) for i in (e, e - 1))
            assert change < 0.9 * other if algorithm in (SparseGPT, ADMM) else change == 0, "another expert's weights"
            assert int((~mask).sum()) == mask.numel() // 2
            assert bool((matrix[~mask] == 0).all())
            if pattern == "2:4":
                assert (mask.reshape(-1, 4).sum(1) == 2).all()
    notes = out.sparsec.records[-1].notes
    (note,) = [note for note in notes if "fused experts" in note]
    assert "and 1 more stay dense: " in note
    with torch.no_grad():
        torch.testing.assert_close(out(**call())[0], graph.run(**call())[0], rtol=1e-4, atol=1e-5)


@cache
def traced_moe(name: str) -> tuple[nn.Module, Callable]:
    """Only to be read."""
    return tiny_model(name)


def test_masks_of_experts_are_those_of_what_each_one_reads() -> None:
    model, _ = traced_moe("mixtral")
    ids = torch.randint(3, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(0))
    first = model.model.layers[0].mlp.experts
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = first.register_forward_pre_hook(lambda m, args: seen.append((args[0], args[1])))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    out = sparsec.compile(model, "wanda(0.5, targets='layers.0.mlp.experts')", calibration=ids, copy=True)
    mask = out.sparsec.graph.weights["model.layers.0.mlp.experts.gate_up_proj"].mask
    hidden, chosen = torch.cat([h for h, _ in seen]), torch.cat([c for _, c in seen])
    for expert in range(mask.shape[0]):
        rows = hidden[(chosen == expert).any(-1)]
        matrix = first.gate_up_proj[expert].detach()
        everything = np.ones(matrix.shape, dtype=bool)
        expected = slow_pruning.wanda(matrix.double().numpy(), rows.double().numpy(), 0.5, "unstructured", everything)
        assert np.array_equal(mask[expert].numpy(), expected)


@pytest.mark.parametrize("algorithm", [Wanda, SparseGPT, ADMM])
def test_experts_that_saw_too_little_are_named_and_keep_their_largest_weights(algorithm) -> None:
    model, _ = tiny_model("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:  # two of four experts get everything
            layer.mlp.gate.weight.zero_()
            layer.post_attention_layernorm.weight.fill_(1.0)
    ids = torch.randint(3, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(0))
    out = sparsec.compile(model, [algorithm(0.5, targets="experts")], calibration=ids)
    notes = [n for n in out.sparsec.records[0].notes if "gate_up_proj" in n]
    none = next(n for n in notes if "saw no token of the text; their masks are by magnitude alone" in n)
    few = next(n for n in notes if f"saw fewer than {128 if algorithm is Wanda else 32} tokens" in n)
    assert "(16)" in few
    unseen = int(none.split("experts ")[-1].split(",")[0].split()[0])
    weight = out.sparsec.graph.weights["model.layers.0.mlp.experts.gate_up_proj"]
    before = model.model.layers[0].mlp.experts.gate_up_proj[unseen].detach()
    if algorithm is Wanda:
        expected = torch.stack([Pattern().mask(row[None], 0.5)[0] for row in before])
    else:
        expected = Pattern().mask(before, 0.5)
    assert torch.equal(weight.mask[unseen], expected)
    torch.testing.assert_close(out.get_parameter(weight.name)[unseen], before * expected)


def test_stacks_of_experts_stored_in_out_are_pruned_along_their_inputs() -> None:
    config = GptOssConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    torch.manual_seed(0)
    model = GptOssForCausalLM(config).eval()
    ids = torch.randint(3, VOCABULARY, (8, 16))
    experts, seen = model.model.layers[0].mlp.experts, []
    handle = experts.register_forward_pre_hook(lambda m, args: seen.append((args[0], args[1])))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    out = sparsec.compile(model, "wanda(pattern='2:4'),freeze", calibration=ids, verify="probe")
    weight = out.sparsec.graph.weights["model.layers.0.mlp.experts.gate_up_proj"]
    assert (weight.transposed, weight.matrix_shape) == (True, (32, 32))
    hidden, chosen = (torch.cat([entry[i] for entry in seen]) for i in (0, 1))
    for expert in range(4):
        rows = hidden[(chosen == expert).any(-1)]
        matrix = experts.gate_up_proj[expert].detach().t()
        everything = np.ones(matrix.shape, dtype=bool)
        expected = slow_pruning.wanda(matrix.double().numpy(), rows.double().numpy(), 0.5, "2:4", everything)
        assert np.array_equal(weight.mask[expert].t().numpy(), expected)


def test_masks_for_experts_are_given_by_the_name_of_their_stack() -> None:
    model, _ = traced_moe("mixtral")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    mask = torch.rand(4, 96, 32, generator=torch.Generator().manual_seed(0)) < 0.5
    out = sparsec.compile(model, masks={name: mask})
    assert torch.equal(out.sparsec.graph.weights[name].mask, mask)
    with pytest.raises(MaskError, match=r"no weight or module is called 'model\.layers\.0\.mlp\.experts'"):
        sparsec.compile(model, masks={"model.layers.0.mlp.experts": mask})  # holds two stacks
