"""sparsec.masked in the trainers that people use: zeros, moments and saved models after transformers, accelerate, peft and DDP."""

from __future__ import annotations

import copy
import socket
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from architectures import tiny_model
from peft import LoraConfig, get_peft_model
from test_masked import Noise, X, came_back, fresh, masks, step
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import sparsec
from sparsec.errors import SparsecWarning
from sparsec.kernels import SparseLinear

IDS = torch.arange(3, 35).view(2, 16) % 61 + 3
ROWS = [{"input_ids": row, "labels": row} for row in torch.arange(8 * 16).view(8, 16) % 61 + 3]


@cache
def _language_model(name: str) -> nn.Module:
    return sparsec.compile(tiny_model(name)[0], "magnitude(0.5),freeze")


def language_model(name: str = "llama") -> Any:
    return sparsec.masked(copy.deepcopy(_language_model(name)))


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "qwen2-moe"])
def test_language_models_with_ties_turned_weights_and_experts(name: str) -> None:
    model = language_model(name).train()
    keys, kept = list(model.state_dict()), masks(model)
    model.gradient_checkpointing_enable()
    optimiser = Noise([p for p in model.parameters() if p.requires_grad])
    for _ in range(2):
        optimiser.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimiser.step()
        assert came_back(model, kept) == 0
    assert list(model.state_dict()) == keys
    fast = sparsec.extend(model.eval(), "lower(auto, objective='bytes')", verify="facts")
    assert any(w.packed is not None for w in fast.sparsec.graph.weights.values())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_run_again_within_the_backward(reentrant: bool) -> None:
    model = language_model().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    plain = copy.deepcopy(_language_model("llama")).train()
    kept = masks(model)
    for each in (model, plain):
        each(input_ids=IDS, labels=IDS).loss.backward()
    for name, p in model.named_parameters():
        want = plain.get_parameter(name).grad
        torch.testing.assert_close(p.grad, want * kept[name] if name in kept else want)


def test_saving_is_what_it_was(tmp_path: Path) -> None:
    model = language_model()
    model.model.layers[0].mlp.up_proj(torch.randn(1, 32)).sum().backward()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
    saved = type(model).from_pretrained(tmp_path)
    assert came_back(saved, masks(model)) == 0
    assert list(saved.state_dict()) == list(model.state_dict()) == list(_language_model("llama").state_dict())


def test_scaled_gradients_and_autocast() -> None:
    model, scaler = fresh(), torch.amp.GradScaler("cpu", init_scale=2.0**8)
    optimiser, kept = torch.optim.AdamW(model.parameters(), lr=0.1), masks(model)
    for _ in range(3):
        optimiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(X).float().square().sum()
        scaler.scale(loss).backward()
        scaler.unscale_(optimiser)
        scaler.step(optimiser)
        scaler.update()
        assert came_back(model, kept) == 0
        assert not any(optimiser.state[model.get_parameter(n)]["exp_avg"][~m].any() for n, m in kept.items())


def test_an_optimiser_that_steps_within_the_backward() -> None:
    model = fresh()
    kept = masks(model)
    each = {p: torch.optim.AdamW([p], lr=0.1) for p in model.parameters()}
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: each[p].step())
    model(X).square().sum().backward()
    assert came_back(model, kept) == 0
    assert not any(each[model.get_parameter(n)].state_dict()["state"][0]["exp_avg"][~m].any() for n, m in kept.items())


def test_a_tie_that_breaks_leaves_two_weights_under_one_mask() -> None:
    """Regression: each run of the model gave both of them one more hook."""

    class Twice(nn.Module):
        """Two linears of one weight."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            """x: [rows, 16]."""
            result: Tensor = self.b(torch.relu(self.a(x)))
            return result

    model = sparsec.masked(sparsec.compile(Twice(), "magnitude(0.5),freeze", example_inputs=X))
    kept = masks(model)["a.weight"]
    model.b.weight = nn.Parameter(model.a.weight.detach().clone())
    for _ in range(3):
        step(model, Noise(model.parameters()))
    for weight in (model.a.weight, model.b.weight):
        assert not weight[~kept].any()
        assert not weight.grad[~kept].any()
        assert len(weight._backward_hooks) == 1


def trainer(model: Any, folder: Path, **options: Any) -> Trainer:
    """As a user has it, in silence."""
    given = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    return Trainer(model=model, args=TrainingArguments(**given | options), train_dataset=ROWS, eval_dataset=ROWS)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "weight_decay": 0.1},
        {"bf16": True, "optim": "adafactor", "gradient_checkpointing": True},
        {
            "save_strategy": "steps",
            "save_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "load_best_model_at_end": True,
        },
    ],
    ids=["accumulated", "bf16", "saved"],
)
def test_trainer_of_transformers(options: dict[str, Any], tmp_path: Path) -> None:
    model = language_model()
    kept, before = masks(model), copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error", SparsecWarning)
        made = trainer(model, tmp_path, **options)
        made.train()
        assert came_back(model, kept) == 0
        assert not any(torch.equal(model.get_parameter(name), before[name]) for name in kept)
        fast = sparsec.extend(model.eval(), "lower(csr)", verify="facts")
    assert not fast.sparsec.report().notes
    if "save_steps" in options:
        saved = type(model).from_pretrained(tmp_path / "checkpoint-2")
        assert came_back(saved, kept) == 0
        state = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"].values()
        sizes = {name: mask for name, mask in kept.items() if name.endswith("down_proj.weight")}
        moments = [s["exp_avg"] for s in state if any(s["exp_avg"].shape == m.shape for m in sizes.values())]
        assert len(moments) == len(sizes) == 2
        assert all((m == 0).float().mean() > 0.3 for m in moments)
        resumed = trainer(language_model(), tmp_path, **options | {"max_steps": 6})
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        assert came_back(resumed.model, kept) == 0


def test_accelerate() -> None:
    model = language_model().train()
    kept, accelerator = masks(model), Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared, optimiser, rows = accelerator.prepare(
        model, torch.optim.AdamW(model.parameters(), lr=0.01), DataLoader(ROWS, batch_size=2)
    )
    for batch in rows:
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(**batch).loss)
            accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
        assert came_back(model, kept) == 0
    inner = accelerator.unwrap_model(prepared)
    assert inner is model
    fast = sparsec.extend(inner.eval(), "lower(csr)", verify="facts")
    assert sum(isinstance(m, SparseLinear) for m in fast.modules()) == 14


def adapted(model: nn.Module) -> Any:
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(0)
    return get_peft_model(model, config)


@pytest.mark.parametrize("outside", [True, False], ids=["around", "inside"])
def test_an_adapter_is_trained_and_merged_without_losing_a_zero(outside: bool, tmp_path: Path) -> None:
    base = language_model() if outside else copy.deepcopy(_language_model("llama"))
    kept = masks(base)
    model = adapted(base) if outside else sparsec.masked(adapted(base))
    before = {name: t.clone() for name, t in base.sparsec.kept.module.state_dict().items() if name in kept}
    with warnings.catch_warnings():
        warnings.simplefilter("error", SparsecWarning)
        trainer(model, tmp_path).train()
        fast = sparsec.extend(model.eval(), "lower(csr)", verify="facts")  # beside its adapter
    assert sum(isinstance(m, SparseLinear) for m in fast.modules()) == 14
    lost = sum(int((~kept[n]).sum()) for n in kept if "q_proj" in n or "up_proj" in n)
    merged = model.merge_and_unload()
    with pytest.warns(SparsecWarning, match=rf"{lost:,} pruned values.*merged adapter.*layers\.0.*and 1 more") as told:
        merged(input_ids=IDS)
    assert len(told) == 1
    assert came_back(merged, kept) == 0
    assert all(
        torch.equal(merged.get_parameter(n), before[n]) == ("q_proj" not in n and "up_proj" not in n) for n in kept
    )
    assert not merged.sparsec.report().notes
    sparsec.extend(merged, "lower(csr)", verify="facts")


def test_an_adapter_that_is_merged_for_a_while() -> None:
    model = adapted(language_model())
    inner = model.base_model.model
    kept = {w.name: w.mask for w in inner.sparsec.kept.masked()}
    held = {n: inner.sparsec.kept.tensor(n) for n in kept}
    before = {n: t.clone() for n, t in held.items()}
    for change in (model.merge_adapter, model.unmerge_adapter):
        change()
        with pytest.warns(SparsecWarning, match="merged adapter"):
            model(input_ids=IDS)
        assert not any(held[n][~mask].any() for n, mask in kept.items())
    for n, t in held.items():
        torch.testing.assert_close(t, before[n])


PARALLEL = """
import sys
import torch
import torch.distributed as dist
from types import SimpleNamespace
from torch.nn.parallel import DistributedDataParallel
rank, port, tests = int(sys.argv[1]), sys.argv[2], sys.argv[3]
sys.path.insert(0, tests)
from test_masked import came_back, fresh, masks
import sparsec

torch.set_num_threads(1)
torch.manual_seed(0)  # both processes start from the same model, and so from the same masks
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
model = fresh()
kept = masks(model)
both = DistributedDataParallel(model, gradient_as_bucket_view=True)
optimiser = torch.optim.AdamW(both.parameters(), lr=0.1)
for n in range(3):
    optimiser.zero_grad()
    with both.no_sync():
        both(torch.randn(4, 16, generator=torch.Generator().manual_seed(10 * n + rank))).square().sum().backward()
    both(torch.randn(4, 16, generator=torch.Generator().manual_seed(20 * n + rank))).square().sum().backward()
    optimiser.step()
    assert came_back(model, kept) == 0
    for name, mask in kept.items():
        assert not optimiser.state[model.get_parameter(name)]["exp_avg"][~mask].any()
for way in ("rigl", "set"):
    callback, state = sparsec.RegrowCallback(way, every=2), SimpleNamespace(max_steps=9)
    for state.global_step in (2, 4):
        before = masks(model)
        callback.on_step_begin(None, state, None, model=model)
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(30 * state.global_step + rank))
        with both.no_sync():
            both(x).square().mean().backward()
        both(x.flip(0) + 1).square().mean().backward()
        callback.on_pre_optimizer_step(None, state, None, model=model, optimizer=optimiser)
        optimiser.step()
        optimiser.zero_grad()
        now = masks(model)
        assert came_back(model, now) == 0
        for name, mask in now.items():
            assert not torch.equal(mask, before[name])
            assert not optimiser.state[model.get_parameter(name)]["exp_avg"][~mask].any()
            other = mask.clone()
            dist.broadcast(other, 0)
            assert torch.equal(mask, other)
total = torch.stack([p.detach().double().sum() for p in model.parameters()])
other = total.clone()
dist.broadcast(other, 0)
assert torch.equal(total, other)
print("done", flush=True)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_that_average_their_gradients(tmp_path: Path) -> None:
    script = tmp_path / "parallel.py"
    script.write_text(PARALLEL)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), port, Path(__file__).parent],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        told = [each.communicate(timeout=300) for each in ranks]
    finally:
        for each in ranks:
            each.kill()
    assert [out for out, _ in told] == ["done\n"] * 2, told
