"""Encoders, from the checkpoint to the commands."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from sparsec.data import load_model
from sparsec.errors import DataError
from sparsec.ir.parts import positions

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}
VISION = {key: value for key, value in SIZES.items() if key not in ("vocab_size", "max_position_embeddings")}
BERT = hf.BertConfig(**SIZES)
T5 = {"vocab_size": 8, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
VIT = hf.ViTConfig(**VISION, image_size=32, patch_size=16)


def saved(model: hf.PreTrainedModel, to: Path, architectures: list[str] | None = None) -> Path:
    """A folder of it, whose config names these architectures."""
    model.save_pretrained(to)
    if architectures is not None:
        config = json.loads((to / "config.json").read_text())
        (to / "config.json").write_text(json.dumps(config | {"architectures": architectures}))
    return to


@pytest.mark.parametrize(
    ("make", "named", "expected", "words"),
    [
        (lambda: hf.BertModel(BERT), None, "BertModel", ""),
        (lambda: hf.BertForMaskedLM(BERT), None, "BertForMaskedLM", ""),
        (lambda: hf.BertForSequenceClassification(BERT), None, "BertForSequenceClassification", ""),
        (lambda: hf.BertModel(BERT), [], "BertModel", ""),
        (lambda: hf.BertModel(BERT), ["Contriever"], "BertModel", ""),
        (lambda: hf.BertModel(BERT), ["BertForMaskedLM"], "BertModel", "lacks 6 weights of BertForMaskedLM"),
        (lambda: hf.BertForMaskedLM(BERT), ["BertModel"], "BertModel", r"\(pooler.*leaves out 5 of its tensors \(cls"),
        (lambda: hf.BertModel(BERT, add_pooling_layer=False), None, "BertModel", "as BertModel without these"),
        (lambda: hf.T5EncoderModel(hf.T5Config(**T5)), None, "T5EncoderModel", ""),
    ],
)
def test_an_encoder_is_loaded_as_what_its_config_names_or_as_what_its_checkpoint_is_whole_for(
    make: Callable[[], Any], named: list[str] | None, expected: str, words: str, tmp_path: Path
) -> None:
    model = make().eval()
    loaded = load_model(saved(model, tmp_path / "model", named))
    assert (type(loaded.model).__name__, loaded.is_encoder, bool(loaded.notes)) == (expected, True, bool(words))
    assert re.search(words, "".join(loaded.notes))
    held = model.state_dict()
    own = {n: t for n, t in loaded.model.state_dict().items() if "position_ids" not in n}
    assert all(torch.equal(held[n if n in held else f"bert.{n}"], t) for n, t in own.items())


def test_an_encoder_whose_body_is_not_whole_is_refused(tmp_path: Path) -> None:
    folder = saved(hf.BertForMaskedLM(BERT), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"lacks 1 of the model's weights.*is it a BertForMaskedLM, and whole"):
        load_model(folder)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
            r"encoder-decoder.*sparsec\.compile\(model\.get_encoder\(\)\)",
        ),
        (lambda: hf.ViTModel(VIT), r"ViTModel reads pixel_values and no text.*sparsec\.compile\(model, example_inputs"),
        (
            lambda: hf.CLIPModel(
                hf.CLIPConfig(
                    text_config=VISION | {"vocab_size": 8}, vision_config=VISION | {"image_size": 32, "patch_size": 16}
                )
            ),
            r"CLIPModel is made of several models.*sparsec\.compile\(model\.text_model",
        ),
    ],
)
def test_what_no_command_can_measure_is_refused_with_the_way_out(make: Any, words: str, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "other")
    with pytest.raises(DataError, match=words):
        load_model(tmp_path / "other")


def test_a_decoder_of_a_family_of_encoders_is_a_causal_model(tmp_path: Path) -> None:
    decoder = hf.BertConfig(**SIZES, is_decoder=True)
    for named in (None, []):
        loaded = load_model(saved(hf.BertLMHeadModel(decoder), tmp_path / f"{named}", named))
        assert (type(loaded.model), loaded.is_encoder) == (hf.BertLMHeadModel, False)
    assert not load_model("tiny").is_encoder


def test_positions_are_those_that_a_call_may_have() -> None:
    """RoBERTa counts from behind the padding's: one token more than the table has room for is out of its range."""
    for kind, config, limit in ((hf.BertModel, hf.BertConfig, 64), (hf.RobertaModel, hf.RobertaConfig, 62)):
        model = kind(config(**SIZES)).eval()
        assert positions(model) == limit
        model(input_ids=torch.full((1, limit), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, limit + 1), 5))
    assert positions(torch.nn.Linear(2, 2)) is None
