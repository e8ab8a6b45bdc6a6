"""recover: what it is given and cannot use is said, and a caller's modes and folders change nothing."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_model
from safetensors.torch import load_file, save_file
from test_recover import recovered, text, told
from torch import nn

import sparsec
import sparsec.recover.blocks as blocks
from sparsec.errors import CompileError, DataError, RecoverError, SparsecWarning, SpecError
from sparsec.recover.loop import Training
from sparsec.recover.state import StateFolder

METHODS = ("distill", "blocks", "norms", "lora")


def pruned_pair() -> tuple[Any, Any]:
    """A dense model, and itself pruned."""
    dense = tiny_model("llama")[0]
    return dense, sparsec.compile(dense, "magnitude(0.5),freeze")


def extended(pruned: Any, teacher: Any, spec: str = "recover(steps=2)", **options: Any) -> Any:
    return sparsec.extend(pruned, spec, calibration=text(), teacher=teacher, **options)


@pytest.mark.parametrize(
    "spec",
    [
        "recover('blocks', steps=1, cross_entropy=0.5)",
        "recover('blocks', steps=1, hidden=0.1)",
        "recover('blocks', steps=1, temperature=2.0)",
        "recover('blocks', steps=1, recompute=True)",
        "recover(steps=1, rank=4)",
        "recover('norms', steps=1, alpha=4.0)",
        "recover(steps=1, regrow_share=0.1)",
        "recover(steps=1, regrow_every=3)",
        "recover(steps=1, seed=4294967296)",
    ],
)
def test_an_option_that_would_do_nothing_is_refused(spec: str) -> None:
    with pytest.raises(SpecError, match=r"does nothing in this training; leave it out, or|seed must be"):
        recovered(spec)


@pytest.mark.parametrize("name", ["bert", "bert-base", "mlp"])
def test_what_predicts_no_next_token_does_not_learn_it(name: str) -> None:
    model, example = tiny_model(name)
    plain = name == "mlp"
    given: Any = [(example(2, 4 + i)["x"],) for i in range(6)] if plain else text()
    inputs = example() if plain else None
    for share in (0.5, 1.0):
        with pytest.raises(RecoverError, match="does not predict"):
            recovered(f"recover(steps=1, cross_entropy={share})", model, calibration=given, example_inputs=inputs)
    assert "perplexity" not in told(recovered("recover(steps=1)", model, calibration=given, example_inputs=inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", ["distill", "blocks"])
def test_a_teacher_of_another_dtype_teaches(dtype: torch.dtype, method: str) -> None:
    dense, pruned = pruned_pair()
    made = extended(pruned, copy.deepcopy(dense).to(dtype), f"recover('{method}', steps=2)")
    assert {p.dtype for p in made.parameters()} == {torch.float32}


def test_the_pruned_model_is_no_teacher_of_itself() -> None:
    dense, pruned = pruned_pair()
    for teacher in (pruned, copy.deepcopy(pruned)):
        with pytest.raises(RecoverError, match="the pruned one itself"):
            extended(pruned, teacher)
    consumed = copy.deepcopy(dense)
    with pytest.raises(RecoverError, match="the pruned one itself"):
        extended(sparsec.compile(consumed, "magnitude(0.5),freeze", copy=False), consumed)
    with pytest.raises(RecoverError, match=r"cross_entropy=1\.0"):
        extended(pruned, pruned, copy=False)
    with pytest.raises(CompileError, match="meta"):
        extended(pruned_pair()[1], copy.deepcopy(dense).to("meta"))


def test_extend_takes_the_calls_of_a_plain_module() -> None:
    model, example = tiny_model("mlp")
    calls = [(example(2, 4 + i)["x"],) for i in range(6)]
    pruned = sparsec.compile(model, "magnitude(0.5),freeze", example_inputs=example())
    made = sparsec.extend(pruned, "recover(steps=2)", calibration=calls, teacher=model)
    assert "relative error" in told(made)
    with pytest.raises(DataError, match="teacher="):
        sparsec.extend(pruned_pair()[1], "admm", calibration="self")


@pytest.mark.parametrize("method", METHODS)
def test_the_callers_modes_change_no_training(method: str) -> None:
    for dtype in ("fp32", "bf16"):
        _same_in_every_mode(f"recover('{method}', steps=2, learning_rate=0.01, dtype='{dtype}')")


def _same_in_every_mode(spec: str) -> None:
    plain = recovered(spec)
    with torch.no_grad():
        quiet = recovered(spec)
    model = sparsec.compile(tiny_model("llama")[0], "magnitude(0.5),freeze")
    with torch.autocast("cpu", torch.bfloat16):
        cast = extended(model, tiny_model("llama")[0], spec)
    for a, b, c in zip(plain.parameters(), quiet.parameters(), cast.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    with torch.inference_mode(), pytest.raises(RecoverError, match="outside of it"):
        recovered(spec)


def test_a_training_that_does_not_help_is_said() -> None:
    made = recovered("recover(steps=3, learning_rate=100.0)")
    assert "training made nothing better on what is held out" in told(made)
    assert "0 steps" in told(short := recovered("recover('blocks', minutes=1e-9)"))
    assert "not trained, since no time was left" in told(short)
    recovered("recover('lora', steps=2, alpha=1e30)")  # without one good step the graph was said to be unchanged


@pytest.mark.parametrize("place", ["between", "before"])
def test_an_interrupt_between_two_blocks_keeps_what_is_trained(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def interrupted(function: Any, when: int) -> Any:
        def run(*given: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == when:
                raise KeyboardInterrupt
            return function(*given, **options)

        return run

    if place == "between":
        monkeypatch.setattr(blocks.BlockByBlock, "_moved", interrupted(blocks.BlockByBlock._moved, 3))
    else:
        monkeypatch.setattr(Training, "run", interrupted(Training.run, 2))
    made = recovered("recover('blocks', steps=2),lower(bitmap)")
    assert "interrupted after 2 steps" in told(made)
    assert "2 steps, " in told(made)


def test_a_state_is_of_its_masks_and_its_teacher(tmp_path: Path) -> None:
    at = str(tmp_path / "state")
    spec = f"recover('norms', steps=2, checkpoint={at!r})"
    recovered(spec)
    with pytest.raises(RecoverError, match="the state of another training"):
        recovered(f"magnitude(0.7),freeze,{spec}")
    dense, pruned = pruned_pair()
    other = copy.deepcopy(dense)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    at = str(tmp_path / "other")
    extended(pruned, dense, f"recover(steps=2, checkpoint={at!r})")
    with pytest.raises(RecoverError, match="the state of another training"):
        extended(pruned, other, f"recover(steps=2, checkpoint={at!r})")


@pytest.mark.parametrize("method", ["distill", "blocks"])
def test_a_state_that_does_not_fit_is_refused(method: str, tmp_path: Path) -> None:
    spec = f"recover('{method}', steps=2, checkpoint={str(tmp_path)!r})"
    recovered(spec)
    state = tmp_path / "recover.json"
    whole = json.loads(state.read_text())
    tensors = next(tmp_path.glob("*.safetensors"))
    held, saved = load_file(tensors), tensors.read_bytes()
    name = next(key for key in sorted(held, reverse=True) if "up_proj" in key and (method == "blocks" or "now" in key))
    for broken in ({k: t for k, t in held.items() if k != name}, held | {name: held[name][:-1].contiguous()}):
        save_file(broken, tensors)
        state.write_text(json.dumps(whole | {"sha256": hashlib.sha256(tensors.read_bytes()).hexdigest()}))
        with pytest.raises(RecoverError, match=r"does not fit the training.*empty the folder"):
            recovered(spec)
    state.write_text(json.dumps(whole))
    tensors.write_bytes(saved[:-1] + bytes([saved[-1] ^ 1]))
    with pytest.raises(RecoverError, match="not those that were saved; empty the folder"):
        recovered(spec)
    tensors.write_bytes(saved)
    for key, value in (("steps", "x"), ("steps", -3), ("tokens", None), ("notes", 7), ("seconds", [1])):
        state.write_text(json.dumps(whole | {key: value}))
        with pytest.raises(RecoverError, match=f"no state of a training.*'{key}'"):
            recovered(spec)
    state.write_text("[" * 100_000)
    with pytest.raises(RecoverError, match="no state of a training"):
        recovered(spec)
    state.write_text(json.dumps(whole))
    assert "went on from" in told(recovered(spec))


@pytest.mark.parametrize("method", ["distill", "blocks"])
def test_a_full_disk_costs_the_state_and_not_the_training(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, *given: Any) -> None:
        raise RecoverError("checkpoint='x': the state cannot be saved: no space left on device")

    plain = recovered(f"recover('{method}', steps=4)")
    monkeypatch.setattr(StateFolder, "save", full)
    with pytest.warns(SparsecWarning, match="no space left"):
        made = recovered(f"recover('{method}', steps=4, checkpoint={str(tmp_path)!r})")
    assert told(made).count("training goes on, and a stop now loses it") == 1
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), made.parameters(), strict=True))


def test_a_folder_that_cannot_be_written_to_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: Any) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(Training, "run", never)
    with pytest.raises(RecoverError, match=r"cannot be (made|written to).*name another"):
        recovered("recover(steps=2, checkpoint='/proc/self/fdinfo')")


def test_nothing_of_the_given_model_and_the_process_changes() -> None:
    model: nn.Module = tiny_model("llama")[0].train()
    model.get_input_embeddings().weight.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    wanted = [p.requires_grad for p in model.parameters()]
    before, random = {k: t.clone() for k, t in model.state_dict().items()}, torch.get_rng_state()
    for method in METHODS:
        made = recovered(f"recover('{method}', steps=2)", model)
        assert [m.training for m in model.modules()] == modes
        assert [p.requires_grad for p in model.parameters()] == wanted
        assert [p.requires_grad for p in made.parameters()] == wanted
        assert all(p.grad is None for p in (*model.parameters(), *made.parameters()))
        assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), random)
