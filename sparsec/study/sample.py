"""A short greedy continuation, so that a reader sees what pruning did to the language and not only to the numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sparsec.errors import DataError


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt as a model reads it."""

    text: str
    chat: bool  # went through the tokenizer's chat template
    tokens: torch.Tensor  # int64 [1, tokens]


def check_prompt(text: str) -> None:
    """DataError for an empty one."""
    if not text:
        raise DataError("the prompt '' has no tokens, and a model continues at least one; give it a word")


def read_prompt(tokenizer: Any, text: str, new_tokens: int, limit: int | None = None, chat: bool = True) -> Prompt:
    """Tokenises a prompt, through the chat template where the tokenizer has one and `chat` is not False.

    limit: the model's positions. Raises DataError for a prompt without tokens, and for one that leaves no room for `new_tokens`.
    """
    check_prompt(text)
    chat = chat and bool(getattr(tokenizer, "chat_template", None))
    if chat:
        message = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        ids = tokenizer(text, verbose=False)["input_ids"]
    if not ids:
        raise DataError(f"the prompt {text!r} has no tokens, and a model continues at least one; give it a word")
    if limit is not None and len(ids) + new_tokens > limit:
        raise DataError(
            f"the prompt has {len(ids)} tokens, which with {new_tokens} new ones need {len(ids) + new_tokens} positions, the "
            f"model has {limit}; take a shorter prompt or fewer new tokens"
        )
    return Prompt(text, chat, torch.tensor([ids], dtype=torch.int64))


def continuation(model: Any, tokenizer: Any, tokens: torch.Tensor, new_tokens: int, seconds: float) -> str:
    """Greedy, of a prompt's tokens [1, tokens]. seconds: no token begins after so many."""
    found = generated(model, tokenizer, tokens, new_tokens, max_time=seconds)
    text: str = tokenizer.decode(found, skip_special_tokens=True)
    return text


@torch.inference_mode()
def generated(
    model: Any, tokenizer: Any, tokens: torch.Tensor, new_tokens: int, streamer: Any = None, **options: Any
) -> torch.Tensor:
    """The tokens after a prompt's [1, tokens]: int64 [at most new_tokens], greedy unless `generate`'s options say otherwise."""
    from transformers import GenerationConfig

    ids = tokens.to(model.device)
    end = model.generation_config.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
    # A configuration of its own: the model's may ask for sampling.
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        eos_token_id=end,
        pad_token_id=pad[0] if isinstance(pad, list) else pad,
        **({"do_sample": False} | options),
    )
    out: torch.Tensor = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=streamer
    )
    return out[0, ids.shape[1] :]
