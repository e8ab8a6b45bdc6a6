"""Where the time of a decoded token goes: forward hooks on linears, lm_head and attention, each without what runs inside of it.

Of models that run their own code; a program tells the times of its instructions (sparsec/program/shares.py). A fused product is
computed when its first linear is called, and counts as linear. What hooks cost (some microseconds a module) is in the shares and in
no other time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from time import perf_counter
from typing import Any, Literal

from torch import nn

from sparsec.emitter import conv1d_type
from sparsec.kernels import SparseLinear
from sparsec.program.shares import Shares

Where = Literal["linears", "lm_head", "attention", "rest"]


def shares(model: nn.Module, run: Callable[[], Any], tokens: int) -> Shares:
    """Of one call of `run`, which decodes so many tokens with the model."""
    clock = _Clock()
    parts = {module: part for module in model.modules() if (part := _part(model, module)) is not None}
    with ExitStack() as hooks:
        for module, part in parts.items():
            hooks.callback(module.register_forward_pre_hook(clock.enter).remove)
            hooks.callback(module.register_forward_hook(clock.leaver(part)).remove)
        run()
    spent = {part: seconds / tokens for part, seconds in clock.spent.items()}
    attention = spent["attention"] if "attention" in parts.values() else None
    return Shares(spent["linears"], spent["lm_head"], attention, spent["rest"])


class _Clock:
    """Time by part; while an inner module runs, the clock of the outer one stands still."""

    def __init__(self) -> None:
        self.spent: dict[Where, float] = {"linears": 0.0, "lm_head": 0.0, "attention": 0.0, "rest": 0.0}
        self._open: list[list[float]] = []  # by depth: start, seconds spent inside inner modules

    def enter(self, *_: Any) -> None:
        self._open.append([perf_counter(), 0.0])

    def leaver(self, part: Where) -> Callable[..., None]:
        def leave(*_: Any) -> None:
            start, inner = self._open.pop()
            elapsed = perf_counter() - start
            self.spent[part] += elapsed - inner
            if self._open:
                self._open[-1][1] += elapsed

        return leave


def _part(model: Any, module: nn.Module) -> Where | None:
    if module is model:
        return "rest"
    if module is model.get_output_embeddings():
        return "lm_head"
    if isinstance(module, (nn.Linear, SparseLinear, *conv1d_type())):
        return "linears"
    return "attention" if "Attention" in type(module).__name__ else None
