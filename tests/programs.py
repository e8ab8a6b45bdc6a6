"""What tests of programs share: compiled tiny models, the same without their programs, and how many steps programs took."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from architectures import tiny_model
from torch import Tensor, nn

import sparsec
from sparsec.kernels.program import Program
from sparsec.kv_cache import cache_argument, cache_of
from sparsec.program.decoder import StepForward

SERVED = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "opt", "gpt2", "gpt-neox", "phi3")
BITMAP = "magnitude(0.5),freeze,fuse,lower(bitmap)"


@cache
def compiled(name: str, spec: str = BITMAP, dtype: torch.dtype = torch.float32) -> Any:
    """One for all tests; those that change it take `fresh`. Its weights are the same in all dtypes, but for rounding."""
    if dtype != torch.float32:
        return copy.deepcopy(compiled(name, spec)).to(dtype)
    return sparsec.compile(tiny_model(name)[0], spec)


def fresh(name: str = "llama", spec: str = BITMAP) -> Any:
    """A compiled model of one test's own."""
    return copy.deepcopy(compiled(name, spec))


def step_forward(model: nn.Module) -> StepForward:
    """What stands in the place of the model's forward."""
    found = vars(model)["forward"]
    assert isinstance(found, StepForward)
    return found


@contextmanager
def own_code(model: nn.Module) -> Iterator[None]:
    """The model as transformers has it."""
    taken = vars(model).pop("forward")
    try:
        yield
    finally:
        vars(model)["forward"] = taken


@dataclass
class Steps:
    """Native steps that gave something."""

    batches: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.batches)


@contextmanager
def counted() -> Iterator[Steps]:
    """Counts the steps that programs take."""
    steps, step = Steps(), Program.step

    def counting(self: Program, *args: Any, **kwargs: Any) -> Tensor | None:
        out = step(self, *args, **kwargs)
        if out is not None:
            steps.batches.append(self.batch)
        return out

    Program.step = counting  # type: ignore[method-assign]
    try:
        yield steps
    finally:
        Program.step = step  # type: ignore[method-assign]


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Ids [batch, length]."""
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def step(model: Any, ids: Tensor, cache: Any, **more: Any) -> Any:
    """What a model gives for tokens after those of a cache."""
    return model(ids, use_cache=True, **{cache_argument(model): cache}, **more)


def decode(model: Any, ids: Tensor, prompt: int, cache: Any = None, padded: int = 0, **more: Any) -> list[Tensor]:
    """Logits of the prompt's last token, and of each token after it. padded: positions on the left of the first sequence."""
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    outs = []
    with torch.no_grad():
        for begin, end in [(0, prompt), *((i, i + 1) for i in range(prompt, ids.shape[1]))]:
            given = {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]} if padded else {}
            out = step(model, ids[:, begin:end], cache, **given, **more)
            cache = cache_of(out)
            outs.append(out.logits[:, -1].float())
    return outs


def near(found: list[Tensor], wanted: list[Tensor], bound: float = 1e-4) -> None:
    """Logits are the same but for `bound` times the largest."""
    assert len(found) == len(wanted)
    largest = max(w.abs().max().item() for w in wanted)
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert a.shape == b.shape
        assert (a - b).abs().max().item() <= bound * largest, f"step {i}: {(a - b).abs().max().item() / largest:.1e}"
