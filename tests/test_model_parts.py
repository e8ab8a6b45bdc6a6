"""Models of several parts: the whole is refused, and what the message advises works when it is followed to the letter."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from architectures import tiny_model
from torch import Tensor, nn

import sparsec
from sparsec.errors import DataError, SparsecError, TraceError
from sparsec.evaluate import Windows, compare
from sparsec.kernels import SparseLinear

SPEC = "magnitude(0.5),freeze,lower(csr)"
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
_TEXT = {"vocab_size": 64, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2, **_SIZES}
_VISION = {"image_size": 16, "patch_size": 4, **_SIZES}


def llava() -> nn.Module:
    text, vision = hf.LlamaConfig(**_TEXT), hf.CLIPVisionConfig(**_VISION)
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(text_config=text, vision_config=vision, image_token_id=63))


def clip() -> nn.Module:
    return hf.CLIPModel(hf.CLIPConfig(text_config=_TEXT, vision_config=_VISION, projection_dim=16))


def t5() -> nn.Module:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    )


def bart() -> nn.Module:
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 32))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return hf.BartForConditionalGeneration(
        hf.BartConfig(vocab_size=64, d_model=32, max_position_embeddings=32, **sizes, **heads)
    )


@pytest.mark.parametrize(
    ("build", "first"),
    [
        (llava, "model.model.language_model"),
        (clip, "model.text_model"),
        (t5, "model.encoder"),
        (bart, "model.model.encoder"),
    ],
)
def test_the_parts_that_the_refusal_names_compile_in_their_place(build: Callable[[], nn.Module], first: str) -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model = build().eval()
    with pytest.raises(TraceError) as refused:
        sparsec.compile(model, SPEC)
    said = str(refused.value)
    paths = re.findall(r"model(?:\.\w+|\[\d+\])+", said)
    assert paths[0] == first
    assert f"sparsec.compile({first}, copy=False)" in said
    for path in paths[:2]:
        part = eval(path)  # as a reader of the message would write it
        assert sparsec.compile(part, SPEC, copy=False) is part
        assert any(isinstance(m, SparseLinear) for m in part.modules())
    lowered = {path for path, module in model.named_modules() if isinstance(module, SparseLinear)}
    for path in paths[:2]:
        assert any(f"model.{name}".startswith(f"{path}.") for name in lowered)


def test_an_encoder_decoder_still_generates_with_its_parts_lowered() -> None:
    torch.manual_seed(0)
    model = t5().eval()
    ids = torch.arange(3, 19).view(2, 8)
    encoder = sparsec.compile(model.get_encoder(), SPEC, example_inputs={"input_ids": ids}, copy=False)
    states = encoder(input_ids=ids).last_hidden_state
    decoder = sparsec.compile(
        model.get_decoder(), SPEC, example_inputs={"input_ids": ids, "encoder_hidden_states": states}, copy=False
    )
    cross = next(m for path, m in decoder.named_modules() if path.endswith("EncDecAttention.q"))
    assert isinstance(cross, SparseLinear)
    assert model.generate(input_ids=ids, max_new_tokens=3, decoder_start_token_id=0).shape[0] == 2


def test_a_decoder_that_is_not_shown_its_encoders_states_says_what_stays_dense() -> None:
    decoder = sparsec.compile(t5().eval().get_decoder(), SPEC)
    assert any("linear weights (block.0.layer.1.EncDecAttention" in note for note in decoder.sparsec.notes)


def test_the_input_of_a_speech_encoder_is_named() -> None:
    sizes = {f"{side}_{what}": 1 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    config = hf.WhisperConfig(
        vocab_size=64, num_mel_bins=8, d_model=16, max_source_positions=20, pad_token_id=0, **sizes
    )
    model = hf.WhisperForConditionalGeneration(config).eval()
    advice = r"sparsec\.compile\(model\.model\.encoder, example_inputs=\{'input_features': tensor\}, copy=False\)"
    with pytest.raises(TraceError, match=advice):
        sparsec.compile(model, SPEC)
    with pytest.raises(TraceError, match=r"example_inputs=\{'input_features': tensor\}"):
        sparsec.compile(model.get_encoder(), SPEC)
    out = sparsec.compile(model.get_encoder(), SPEC, example_inputs={"input_features": torch.randn(2, 8, 40)})
    assert any(isinstance(m, SparseLinear) for m in out.modules())


class Transformer(nn.Module):
    """As sentence_transformers' module of that name."""

    def __init__(self) -> None:
        super().__init__()
        self.auto_model = tiny_model("bert-base")[0]

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return features | {"token_embeddings": self.auto_model(**features).last_hidden_state}


class Pooling(nn.Module):
    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return features["token_embeddings"].mean(1)


class SentenceTransformer(nn.Sequential):
    """As sentence_transformers' class of that name: modules that hand a dict on."""

    def forward(self, input: dict[str, Tensor]) -> Tensor:
        return super().forward(input)


@pytest.mark.parametrize("how", ["no inputs", "a dict", "a tuple"])
def test_a_wrapper_of_a_transformers_model_is_told_which_model_inside_to_compile(how: str) -> None:
    model = SentenceTransformer(Transformer(), Pooling()).eval()
    features = {"input_ids": torch.arange(3, 19).view(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.int64)}
    given = {"no inputs": None, "a dict": features, "a tuple": (features,)}[how]
    with pytest.raises(SparsecError, match=r"BertModel.*sparsec\.compile\(model\[0\]\.auto_model, copy=False\)"):
        sparsec.compile(model, SPEC, example_inputs=given)
    before = model(features)
    sparsec.compile(model[0].auto_model, SPEC, copy=False)
    assert any(isinstance(m, SparseLinear) for m in model.modules())
    assert model(features).shape == before.shape


def test_an_encoder_decoder_is_not_evaluated_and_advised() -> None:
    """Regression: the model's own ValueError came through."""
    windows = Windows(torch.randint(2, 60, (1, 8)), "a text", "00", 8)
    with pytest.raises(DataError, match="dense: T5ForConditionalGeneration is an encoder-decoder"):
        compare({"dense": t5()}, windows)
