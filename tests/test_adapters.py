"""Models that carry adapters: these are pruned by no default, and compile and extend take the model with what stands around it."""

from __future__ import annotations

import copy
import operator
from functools import cache
from typing import Any

import pytest
import torch
from architectures import tiny_model
from peft import (
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PromptEncoderConfig,
    VeraConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from torch import Tensor, nn
from traces import traced as trace

import sparsec
from sparsec.errors import CompileError, TraceError
from sparsec.kernels import SparseLinear

IDS = torch.arange(3, 35).view(2, 16) % 61 + 3
LAYERS = {"target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(r=4, init_lora_weights=False, **LAYERS),
    "dora": LoraConfig(r=4, init_lora_weights=False, use_dora=True, **LAYERS),
    "embedding and head": LoraConfig(
        r=4, init_lora_weights=False, target_modules=["embed_tokens", "lm_head", "o_proj"], task_type="CAUSAL_LM"
    ),
    "ia3": IA3Config(feedforward_modules=["up_proj"], init_ia3_weights=False, **LAYERS),
    "loha": LoHaConfig(r=4, init_weights=False, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "vera": VeraConfig(r=4, init_weights=False, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "prompts": PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16, task_type="CAUSAL_LM"),
}


@cache
def pruned() -> nn.Module:
    return sparsec.compile(tiny_model("llama")[0], "magnitude(0.5),freeze,sparsity")


def adapted(name: str, model: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(copy.deepcopy(model or tiny_model("llama")[0]), CONFIGS[name]).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def said(model: nn.Module) -> str:
    return "\n".join((*model.sparsec.notes, *(n for r in model.sparsec.records for n in r.notes)))


def packed(model: nn.Module) -> list[str]:
    return [path for path, m in model.named_modules() if isinstance(m, SparseLinear)]


@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_are_a_group_of_their_own(name: str) -> None:
    """Regression: the matrices of LoRA counted as attention and mlp, and were pruned with them."""
    model = adapted(name)
    graph = trace(model)
    theirs = {n for n, p in model.named_parameters() if p.requires_grad or "prompt_encoder" in n or "vera_" in n}
    assert {n for n, w in graph.weights.items() if w.group == "adapter"} == theirs
    assert theirs
    for weight in graph.weights.values():
        assert (weight.group == "adapter") == (weight.name in theirs)


@pytest.mark.parametrize("merged", [True, False])
def test_a_wrapper_that_takes_any_arguments_is_called_as_the_model_inside(merged: bool) -> None:
    """Regression: without a task type it was refused, with the advice to compile a part that was refused too."""
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "up_proj"])
    model = get_peft_model(copy.deepcopy(tiny_model("llama")[0]), config).eval()
    if merged:
        model.merge_adapter()
    made = sparsec.compile(model, "magnitude(0.5,scope='layer'),freeze")
    assert made.sparsec.graph.inputs == ("input_ids", "attention_mask")
    assert "mlp.up_proj.base_layer.weight" in " ".join(w.name for w in made.sparsec.graph.masked())
    assert trace(model.base_model).inputs == ("input_ids", "attention_mask")


class LowRank(nn.Module):
    """An adapter as other libraries have it, or as it is written by hand, around a linear."""

    def __init__(self, down: str, up: str, linears: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.names = (down, up)
        for name, shape in ((down, (4, 16)), (up, (16, 4))):
            holder, _, leaf = name.rpartition(".")
            if holder:
                self.add_module(holder, self._modules.get(holder) or nn.Module())
            place = self.get_submodule(holder)
            if linears:
                place.add_module(leaf, nn.Linear(shape[1], shape[0], bias=False))
            else:
                place.register_parameter(leaf, nn.Parameter(torch.randn(shape)))
        self.magnitude = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        down, up = (operator.attrgetter(name)(self) for name in self.names)
        low = up(down(x)) if isinstance(down, nn.Module) else x @ down.T @ up.T
        return self.magnitude * (self.linear(x) + low)


def test_adapters_of_other_libraries_and_hand_written_ones_are_told_by_their_names() -> None:
    """Regression: only peft's classes were known; the matrices of all others were pruned by default."""
    forms = [
        LowRank(down, up, linears)
        for down, up in (("lora_A", "lora_B"), ("lora_a", "lora_b"), ("lora_down", "lora_up"), ("lora.A", "lora.B"))
        for linears in (True, False)
    ]
    model = nn.Sequential(
        *forms, LowRank("adapter_down", "adapter_up", True), LowRank("flora_a", "lora_attention", True)
    )
    made = sparsec.compile(model.eval(), "magnitude(0.5, scope='layer'),freeze", example_inputs=torch.randn(3, 16))
    zeros = {name for name, p in made.named_parameters() if p.dim() == 2 and (p == 0).any()}
    linears = {f"{i}.linear.weight" for i in range(len(model))}
    assert zeros == linears | {"9.flora_a.weight", "9.lora_attention.weight"}
    theirs = {n for n, w in made.sparsec.graph.weights.items() if w.group == "adapter"}
    assert theirs >= {
        n for n, _ in model.named_parameters() if n[0] != "9" and "linear" not in n and n[1:] != ".magnitude"
    }
    assert {"0.magnitude", "4.magnitude"} <= theirs <= {n for n, _ in model.named_parameters() if n[0] != "9"}


def test_adapters_are_pruned_when_they_are_named_alone() -> None:
    model = adapted("lora")
    kept = sparsec.compile(model, "magnitude(0.5),freeze")
    assert not [n for n, p in kept.named_parameters() if "lora_" in n and (p == 0).any()]
    assert sum(bool((p == 0).any()) for n, p in kept.named_parameters() if "base_layer" in n) == 4
    for targets in ("adapter", "*lora_A*"):
        named = sparsec.compile(model, f"magnitude(0.5, targets='{targets}'),freeze")
        zeros = {n for n, p in named.named_parameters() if (p == 0).any() and "embed_tokens" not in n}  # it has padding
        assert zeros
        assert all("lora_" in name for name in zeros)


@pytest.mark.parametrize(("name", "count"), [("lora", 14), ("dora", 10), ("ia3", 14), ("vera", 14)])
def test_extend_goes_on_with_a_model_that_adapters_were_put_around(name: str, count: int) -> None:
    """Regression: nothing was lowered, and nothing was said; of VeRA, whose layers share a module, nothing was lowered."""
    model = adapted(name, pruned())
    fast = sparsec.extend(model, "fuse,lower(csr)", verify="facts")
    assert type(fast) is type(model)
    assert len(packed(fast)) == count
    torch.testing.assert_close(logits(fast), logits(model), rtol=1e-4, atol=1e-4)
    assert "traced anew" in said(fast)
    with fast.disable_adapter():
        torch.testing.assert_close(logits(fast), logits(pruned()), rtol=1e-4, atol=1e-4)
    report = fast.sparsec.report()
    assert sum(r.nnz < r.parameters for r in report.layers) == 14
    assert "sparsec" not in vars(fast.base_model.model), "the graph of the model inside would hold the dense weights"


def test_adapters_that_no_trace_follows_are_to_be_merged() -> None:
    """Regression: the advice was to compile the wrapper's inside, which holds the same adapters."""
    model = get_peft_model(tiny_model("llama")[0], HRAConfig(r=2, target_modules=["q_proj"], init_weights=False)).eval()
    with pytest.raises(TraceError, match=r"merge its adapters first, model = model\.merge_and_unload\(\)"):
        sparsec.compile(model, "magnitude(0.5)")
    assert packed(sparsec.compile(model.merge_and_unload(), "magnitude(0.5),freeze,lower(csr)"))


def test_what_is_trained_after_it_was_lowered_is_the_adapter() -> None:
    fast = sparsec.extend(adapted("lora", pruned()), "lower(csr)")
    before = logits(fast)
    optimiser = torch.optim.SGD([p for n, p in fast.named_parameters() if "lora_" in n], lr=0.1)
    fast(input_ids=IDS, labels=IDS).loss.backward()
    optimiser.step()
    assert not torch.equal(logits(fast), before)


def test_the_adapters_alone_can_be_saved_and_the_lowered_model_inside_of_them_cannot(tmp_path: Any) -> None:
    fast = sparsec.extend(adapted("lora", pruned()), "lower(csr)")
    fast.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    with pytest.raises(CompileError, match="a part of a compiled model"):
        fast.base_model.model.save_pretrained(tmp_path / "model")


def test_a_merged_adapter_takes_zeros_away_and_that_is_said() -> None:
    merged = adapted("lora", pruned()).merge_and_unload()
    assert any("no longer zero" in note and "merged adapter" in note for note in merged.sparsec.report().notes)
    fast = sparsec.extend(merged, "lower(csr)", verify="facts")
    assert "q_proj" in said(fast)
    torch.testing.assert_close(logits(fast), logits(merged), rtol=1e-4, atol=1e-4)
    again = sparsec.extend(merged, "magnitude(0.5),freeze,lower(csr)", verify="facts")
    share = [w.sparsity for w in again.sparsec.graph.weights.values() if w.packed is not None]
    assert sum(share) / len(share) == pytest.approx(0.5, abs=0.05)


def test_adapters_that_were_put_into_the_model_itself() -> None:
    model = copy.deepcopy(pruned())
    inject_adapter_in_model(CONFIGS["lora"], model)
    assert any("lora_A" in n or "base_layer" in n or "q_proj" in n for n in model.sparsec.report().notes)
    fast = sparsec.extend(model.eval(), "lower(csr)", verify="facts")
    assert len(packed(fast)) == 14
    torch.testing.assert_close(logits(fast), logits(model), rtol=1e-4, atol=1e-4)


class Around(nn.Module):
    """Somebody's own module around a model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """x: token ids."""
        return self.inner(input_ids=x).logits


def test_what_cannot_be_called_as_the_model_was_has_a_way_out() -> None:
    model = Around(copy.deepcopy(pruned()))
    with pytest.raises(CompileError, match="extend the compiled model inside and put the result back"):
        sparsec.extend(model, "lower(csr)")
    model.inner = sparsec.extend(model.inner, "lower(csr)")
    assert len(packed(model)) == 14
    model(IDS)


def test_wrappers_and_what_is_no_model_are_refused_with_a_way_out() -> None:
    for call in (sparsec.compile, sparsec.extend):
        with pytest.raises(CompileError, match=r"DataParallel.*\.module"):
            call(nn.DataParallel(pruned()), "lower(csr)")
        with pytest.raises(CompileError, match=r"torch\.compile; give sparsec the model inside, \._orig_mod"):
            call(torch.compile(pruned()), "magnitude(0.5)")
        with pytest.raises(CompileError, match=r"takes a torch\.nn\.Module, got NoneType"):
            call(None, "magnitude(0.5)")
    with pytest.raises(CompileError, match=r"compiled already \(inner\).*sparsec\.extend goes on"):
        sparsec.compile(Around(pruned()), example_inputs=IDS)
    with pytest.raises(CompileError, match="several compiled ones"):
        sparsec.extend(nn.ModuleList([pruned(), copy.deepcopy(pruned())]), "lower(csr)")
    with pytest.raises(CompileError, match="compile the model first"):
        sparsec.extend(nn.Linear(2, 2), "lower(csr)")
