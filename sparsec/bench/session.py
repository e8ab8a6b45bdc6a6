"""A model as a user runs it, batch 1: a prompt, then one token after another with the key-value cache, in eager mode or compiled.

As `generate()` does it: greedy, under no_grad, logits of the last position only. Compiled modes have a static cache where the
model can have one, since a cache that grows would be compiled anew; an eager mode is faster with one that grows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsec.kv_cache import cache_argument


class Session:
    """One model in one mode."""

    def __init__(self, model: Any, prompt: Tensor, max_tokens: int, backend: str | None = None) -> None:
        """prompt: token ids [1, tokens]. max_tokens: positions that prompt and decoded tokens take together. backend: of
        torch.compile; None for eager.
        """
        self._prompt, self._config, self._max_tokens = prompt, model.config, max_tokens
        self._static = backend is not None and bool(getattr(model, "_can_compile_fullgraph", False))
        self.cache = "static" if self._static else "dynamic"
        self._call: Callable[..., Any] = model
        if backend is not None:
            # Shapes are those of the prompt and of one token; with a cache that grows they change with every token.
            self._call = torch.compile(model, dynamic=False if self._static else None, backend=backend)
        self._cache_argument = cache_argument(model)
        takes = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        # As generate() does: some architectures would else slice by the cache's length, and be compiled anew at every token.
        self._takes_positions = "position_ids" in takes
        self._position = 0
        self._state: Any = self._new_cache()
        self._token = prompt[:, -1:]
        if self._static:
            # Its tensors are made at the first use; compiled code that saw none of them would be compiled again.
            with torch.no_grad():
                model(**self._inputs(prompt))

    @torch.no_grad()
    def prefill(self) -> None:
        """The prompt, from an empty cache."""
        if self._static:
            self._state.reset()
        else:
            self._state = self._new_cache()
        self._position = 0
        self._step(self._prompt)

    @torch.no_grad()
    def decode(self, tokens: int) -> None:
        """So many tokens more, each the likeliest."""
        for _ in range(tokens):
            self._step(self._token)

    @property
    def token(self) -> int:
        """The one decoded last."""
        return int(self._token)

    def _step(self, ids: Tensor) -> None:
        out = self._call(**self._inputs(ids))
        self._position += ids.shape[1]
        self._token = out.logits[:, -1:].argmax(dim=-1)

    def _inputs(self, ids: Tensor) -> dict[str, Any]:
        inputs = {"input_ids": ids, self._cache_argument: self._state, "use_cache": True, **self._last_only}
        if self._takes_positions:
            inputs["position_ids"] = torch.arange(self._position, self._position + ids.shape[1])[None]
        return inputs

    def _new_cache(self) -> Any:
        from transformers import DynamicCache, StaticCache

        if self._static:
            return StaticCache(config=self._config, max_cache_len=self._max_tokens)
        return DynamicCache(config=self._config)
