"""generate() with programs gives the tokens of the model's own code, in every way that transformers has of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from programs import compiled, counted, fresh, own_code, tokens
from torch import Tensor
from transformers.generation import MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from sparsec.kernels import status

pytestmark = pytest.mark.skipif(not status().built, reason="no native kernels")


class _Collected(BaseStreamer):
    def __init__(self) -> None:
        self.got: list[int] = []

    def put(self, value: Tensor) -> None:
        self.got += value.flatten().tolist()

    def end(self) -> None:
        pass


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 20},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    "scores": {"output_scores": True, "output_logits": True, "return_dict_in_generate": True},
    "hidden states": {"output_hidden_states": True, "return_dict_in_generate": True},
    "stopping": {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(13)])},
    "static cache": {"cache_implementation": "static"},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "no cache": {"use_cache": False},
}
UNSERVED = ("hidden states", "static cache", "no cache")


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("way", WAYS)
def test_generate_gives_the_tokens_of_the_models_own_code(way: str, name: str) -> None:
    model = compiled(name)
    batch = 1 if way == "prompt lookup" else 2
    ids = tokens(batch, 6).repeat(1, 2)[:, :8]
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[0, :2] = 0
    options = {
        "attention_mask": mask,
        "max_new_tokens": 12,
        "pad_token_id": 0,
        "eos_token_id": None,
        "do_sample": False,
    }

    def run() -> Tensor:
        torch.manual_seed(0)
        out = model.generate(ids, **options | WAYS[way])
        return out if isinstance(out, Tensor) else out.sequences

    with counted() as steps:
        found = run()
    assert bool(len(steps)) == (way not in UNSERVED)
    with own_code(model):
        assert torch.equal(found, run())


def test_generate_streams_and_is_assisted() -> None:
    model, ids = compiled("llama"), tokens(1, 6)
    other = fresh()
    with torch.no_grad():
        other.model.norm.weight.add_(0.05 * torch.randn(32, generator=torch.Generator().manual_seed(0)))
    for assistant in (model, other):
        assistant.generation_config.assistant_confidence_threshold = 0
        assistant.generation_config.num_assistant_tokens = 4
    options: dict[str, Any] = {"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    with own_code(model):
        wanted = model.generate(ids, **options)
    streamer = _Collected()
    model.generate(ids, streamer=streamer, **options)
    assert streamer.got == wanted[0].tolist()
    with counted() as steps:
        assert torch.equal(model.generate(ids, assistant_model=other, **options), wanted)
    assert len(steps) > 4
    with counted() as steps, own_code(model):
        assert torch.equal(model.generate(ids, assistant_model=other, **options), wanted)
    assert len(steps) > 4


def test_an_adapter_of_peft_decodes_right() -> None:
    peft = pytest.importorskip("peft")
    model = fresh(spec="magnitude(0.5, targets=('mlp',)),freeze,lower(bitmap, targets=('mlp',))")
    model.generate(tokens(1, 7), max_new_tokens=3, pad_token_id=0)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    wrapped.eval()
    ids = tokens(1, 7)
    options: dict[str, Any] = {"max_new_tokens": 6, "pad_token_id": 0, "do_sample": False}
    found = wrapped.generate(input_ids=ids, **options)
    with own_code(model):
        assert torch.equal(found, wrapped.generate(input_ids=ids, **options))
    with wrapped.disable_adapter():
        found = wrapped.generate(input_ids=ids, **options)
        with own_code(model):
            assert torch.equal(found, wrapped.generate(input_ids=ids, **options))
