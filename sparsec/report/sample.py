"""A short greedy continuation, so that a reader sees what pruning did to the language and not only to the numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationConfig

from sparsec.report.records import Sample


def sample(models: Mapping[str, Any], tokenizer: Any, prompt: str, new_tokens: int) -> Sample:
    """Greedy continuations of one prompt by several models; through the chat template where the tokenizer has one."""
    chat = bool(getattr(tokenizer, "chat_template", None))
    if chat:
        message = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    return Sample(prompt, chat, new_tokens, {n: _continue(m, tokenizer, inputs, new_tokens) for n, m in models.items()})


@torch.inference_mode()
def _continue(model: Any, tokenizer: Any, inputs: Mapping[str, torch.Tensor], new_tokens: int) -> str:
    ids = inputs["input_ids"].to(model.device)
    mask = inputs["attention_mask"].to(model.device)
    end = model.generation_config.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
    # A configuration of its own: the model's may ask for sampling.
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=end,
        pad_token_id=pad[0] if isinstance(pad, list) else pad,
    )
    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy)
    text: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return text
