"""A model's logits part by part: those of one call, whatever the model is, whatever hooks it has, and whoever else uses it."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from architectures import tiny_model
from torch import Tensor, nn

from sparsec.evaluate.logits import logits_in_parts, part_rows


def split(model: nn.Module, tokens: Tensor, rows: int) -> Tensor:
    with torch.inference_mode():
        return torch.cat([part.clone() for part in logits_in_parts("a", model, tokens, rows)])


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt"])
def test_logits_in_parts_are_those_of_one_call_and_the_body_runs_once(name: str) -> None:
    model, _ = tiny_model(name)
    tokens = torch.randint(2, 60, (13,), generator=torch.Generator().manual_seed(0))
    whole = model(input_ids=tokens[None], use_cache=False).logits[0].detach()
    runs: list[int] = []
    layer = next(m for m in model.base_model.modules() if isinstance(m, nn.ModuleList))[0]
    layer.register_forward_hook(lambda *_: runs.append(1))
    for rows in (1, 4, 13, 50):
        runs.clear()
        torch.testing.assert_close(split(model, tokens, rows), whole)
        assert len(runs) == 1
    assert "forward" not in {name for m in model.modules() for name in vars(m)}


def test_a_body_is_itself_again_where_the_head_fails() -> None:
    model, _ = tiny_model("llama")
    own = model.base_model.forward
    fine = iter([True, False])

    def fails(module: nn.Module, args: Any) -> None:
        if not next(fine):
            raise ValueError("no room")

    model.get_output_embeddings().register_forward_pre_hook(fails)
    with pytest.raises(ValueError, match="no room"):
        split(model, torch.arange(9), 3)
    assert "forward" not in vars(model.base_model)
    assert model.base_model.forward == own


def test_rows_of_a_part_keep_to_64_megabytes() -> None:
    config = SimpleNamespace(config=SimpleNamespace(vocab_size=262_144))
    assert part_rows(config, 512) == 64
    assert part_rows(SimpleNamespace(config=SimpleNamespace(vocab_size=10**9)), 512) == 1
    assert part_rows(SimpleNamespace(), 512) == 512


def test_threads_that_use_one_model_at_once_get_their_own_logits() -> None:
    """Regression: what one evaluation kept of the body was given to whoever called the model meanwhile."""
    model, _ = tiny_model("llama")
    texts = [torch.randint(2, 60, (12,), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    with torch.no_grad():
        wanted = [model(input_ids=t[None], use_cache=False).logits[0] for t in texts]
    met: list[bool] = []

    def meets(module: nn.Module, args: Any) -> None:
        """While the head computes a part, another thread calls the model, and a third one evaluates it."""
        if threading.current_thread() is not threading.main_thread() or "forward" not in vars(model.base_model):
            return

        def calls() -> None:
            with torch.no_grad():
                met.append(torch.allclose(model(input_ids=texts[1][None]).logits[0], wanted[1], atol=1e-5))

        thread = threading.Thread(target=calls)
        thread.start()
        thread.join()

    model.get_output_embeddings().register_forward_pre_hook(meets)
    others: list[Tensor] = []
    third = threading.Thread(target=lambda: others.extend(split(model, texts[2], 2) for _ in range(4)))
    third.start()
    for _ in range(4):
        torch.testing.assert_close(split(model, texts[0], 2), wanted[0])
    third.join()
    assert met
    assert all(met)
    for found in others:
        torch.testing.assert_close(found, wanted[2])
    assert not any("forward" in vars(m) for m in model.modules())


def hooked(model: nn.Module) -> None:
    model.model.register_forward_hook(
        lambda module, args, out: type(out)(
            last_hidden_state=out.last_hidden_state * torch.linspace(0, 3, out[0].shape[-1])
        )
    )


def mixing(model: nn.Module) -> None:
    def mix(module: nn.Module, args: Any, out: Any) -> Any:
        out.logits = out.logits - out.logits.mean(1, keepdim=True)
        return out

    model.register_forward_hook(mix)


def writing(model: nn.Module) -> None:
    """What stands before the head writes to what the body gave, as the forwards of some models do."""

    def forward(input_ids: Tensor, use_cache: bool = False, logits_to_keep: int | Tensor = 0) -> Any:
        hidden = model.model(input_ids=input_ids, use_cache=use_cache).last_hidden_state
        hidden.mul_(1.5)
        kept = slice(None) if isinstance(logits_to_keep, int) else logits_to_keep
        return SimpleNamespace(logits=model.lm_head(hidden[:, kept]))

    model.forward = forward


@pytest.mark.parametrize("changed", [hooked, mixing, writing])
def test_logits_in_parts_are_those_of_one_call_whatever_is_done_to_the_body_s_output(changed: Any) -> None:
    """Regression: a hook ran once more, and what was written in place added up, with every part."""
    model, _ = tiny_model("llama")
    changed(model)
    tokens = torch.randint(2, 60, (13,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = model(input_ids=tokens[None], use_cache=False).logits[0]
    torch.testing.assert_close(split(model, tokens, 5), whole)
