"""Decoding on a GPU as fast as it goes there: a static cache, and every token one replay of a CUDA graph.

So what is timed is the work of the GPU and not that of Python, which launches most kernels slower than they run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsec.kv_cache import cache_argument
from sparsec.timing.replay import Replay

BEFORE = 2
"""Tokens decoded before a graph is there: a first one, and one where none could be recorded."""


class Decoder:
    """Greedy decoding, batch 1, one token at a time, after a prompt of token ids [1, tokens]."""

    def __init__(self, model: Any, prompt: Tensor, new_tokens: int, compiled: bool = False) -> None:
        """new_tokens: that will be decoded at most. compiled: under torch.compile."""
        from transformers import StaticCache

        device = next(model.parameters()).device
        prompt = prompt.to(device)
        length = prompt.shape[1]
        self._cache = StaticCache(config=model.config, max_cache_len=length + BEFORE + new_tokens)
        self._cache_argument = cache_argument(model)
        takes = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._with_positions = "position_ids" in takes
        self._token = prompt[:, -1:].clone()
        self._position = torch.full_like(self._token, length)
        self._call(model, prompt, torch.arange(length, device=device)[None])
        call = torch.compile(model, dynamic=False) if compiled else model
        self.note = ""
        """Why no graph could be recorded; "" where one was."""
        self._replay: Replay | None = None
        self._step: Callable[[], None] = partial(self._decode, call)
        try:
            self._replay = Replay([self._step], device)
        except RuntimeError as error:  # what waits for the GPU cannot be recorded
            self.note = f"no graph: {str(error).partition(chr(10))[0]}"
            self._step()
        self.mode = ("compiled " if compiled else "") + ("eager" if self.note or device.type != "cuda" else "graph")

    def seconds(self, tokens: int = 1) -> float:
        """Of one token, over so many."""
        return Replay.several(self._replay.run if self._replay else self._step, tokens, self._token.device)

    def _decode(self, call: Any) -> None:
        out = self._call(call, self._token, self._position)
        self._token.copy_(out.logits[:, -1:].argmax(dim=-1))
        self._position += 1

    def _call(self, call: Any, ids: Tensor, positions: Tensor) -> Any:
        inputs = {"input_ids": ids, self._cache_argument: self._cache, "use_cache": True, **self._last_only}
        if self._with_positions:
            inputs["position_ids"] = positions
        return call(**inputs)
