"""Encoders on a text: how near their embeddings are to those of a reference."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers.processors import TemplateProcessing
from torch import nn

import sparsec
from sparsec.compress import main as compress
from sparsec.data import load_text
from sparsec.data.tiny import byte_tokenizer
from sparsec.errors import DataError
from sparsec.evaluate import compare, compare_embeddings, cut
from sparsec.evaluate.__main__ import main
from sparsec.evaluate.embeddings import left_out
from sparsec.generate import main as generate

SHORT = ["--length", "48", "--windows", "2", "--calibration-length", "48", "--calibration-sequences", "2"]


def tokenizer() -> hf.PreTrainedTokenizerFast:
    """Bytes between [CLS] and [SEP]."""
    found = byte_tokenizer()
    found.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]"})
    marks = [(mark, found.convert_tokens_to_ids(mark)) for mark in ("[CLS]", "[SEP]")]
    found.backend_tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    return found


def encoder(kind: Any = hf.BertModel) -> hf.PreTrainedModel:
    """One layer, random."""
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=260,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return kind(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("encoder") / "small"
    encoder(hf.BertForMaskedLM).save_pretrained(to)
    tokenizer().save_pretrained(to)
    return to


def test_embeddings_are_compared_as_their_definition_says() -> None:
    windows = cut(load_text(), tokenizer(), 48, 3)
    assert windows.beginning.token == "[CLS]"
    dense = encoder()
    pruned = sparsec.compile(dense, "magnitude(0.5),freeze,lower(csr)")
    found = compare_embeddings({"dense": dense, "pruned": pruned, "dense again": dense}, windows)
    with torch.no_grad():
        one, other = (m(input_ids=windows.tokens).last_hidden_state.double().mean(dim=1) for m in (dense, pruned))
    cosines = torch.nn.functional.cosine_similarity(one, other).tolist()
    errors = ((other - one).norm(dim=1) / one.norm(dim=1)).tolist()
    assert found["pruned"].cosines == pytest.approx(cosines, abs=1e-6)
    assert found["pruned"].errors == pytest.approx(errors, rel=1e-4)
    assert found["pruned"].cosine == pytest.approx(sum(cosines) / 3, abs=1e-6)
    assert found["pruned"].cosine_min == pytest.approx(min(cosines), abs=1e-6)
    assert found["pruned"].cosine < 0.99 < found["dense again"].cosine
    assert (found["dense"].cosines, found["dense"].errors) == ((1.0,) * 3, (0.0,) * 3)


def test_what_has_no_meaning_says_so_with_the_way_out() -> None:
    windows = cut(load_text(), tokenizer(), 48, 1)
    with pytest.raises(DataError, match=r"small: BertForMaskedLM is an encoder.*no meaning for it; compare_embeddings"):
        compare({"small": encoder(hf.BertForMaskedLM)}, windows)
    with pytest.raises(DataError, match=r"plain: .*an encoder of transformers is evaluated; Linear is none"):
        compare_embeddings({"plain": torch.nn.Linear(2, 2)}, windows)
    wide = hf.BertModel(
        hf.BertConfig(vocab_size=260, hidden_size=48, num_hidden_layers=1, num_attention_heads=2)
    ).eval()
    with pytest.raises(DataError, match="wide: its embeddings have 48 numbers, those of small have 32"):
        compare_embeddings({"small": encoder(), "wide": wide}, windows)


def test_the_command_compares_encoders_and_goes_on_where_it_was(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    passes = ["--passes", "magnitude(0.5)", "--passes", "wanda(0.5),freeze,lower(bitmap)"]
    files = ["--resume", str(tmp_path / "run.json"), "--json", str(tmp_path / "out.json")]
    assert main([str(folder), *passes, *SHORT, *files]) == 0
    first = capsys.readouterr().out
    assert "every window begins with [CLS]" in first
    assert "there is no perplexity" in " ".join(first.split())
    written = json.loads((tmp_path / "out.json").read_text())
    assert {model["perplexity"] for model in written["models"].values()} == {None}
    learnt = written["models"]["wanda(0.5),freeze,lower(bitmap)"]
    assert 0 < learnt["cosine_min"] <= learnt["cosine"] < 1
    assert len(learnt["window_cosines"]) == len(learnt["window_embedding_errors"]) == 2
    assert main([str(folder), *passes, *SHORT, *files]) == 0
    again = json.loads((tmp_path / "out.json").read_text())
    assert again["models"] == written["models"]
    assert "2 windows were taken over" in " ".join(capsys.readouterr().out.split())


def test_encoders_and_causal_models_are_not_compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder), "tiny", *SHORT]) == 2
    assert "small is an encoder and tiny a causal language model" in capsys.readouterr().err


def test_a_causal_model_has_null_for_what_only_encoders_have(tmp_path: Path) -> None:
    assert main(["tiny", *SHORT, "--json", str(tmp_path / "out.json")]) == 0
    (model,) = json.loads((tmp_path / "out.json").read_text())["models"].values()
    assert (model["cosine"], model["window_cosines"]) == (None, None)
    assert math.isfinite(model["perplexity"])


HEADS = (
    "BertForMaskedLM",
    "BertForSequenceClassification",
    "DistilBertForMaskedLM",
    "DistilBertForSequenceClassification",
)


@pytest.mark.parametrize("name", HEADS)
def test_every_command_takes_a_model_with_a_head_or_says_why_not(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes: dict[str, Any] = {"vocab_size": 260, "max_position_embeddings": 64, "initializer_range": 0.3}
    config = (
        hf.DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64, **sizes)
        if name.startswith("Distil")
        else hf.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, **sizes)
    )
    torch.manual_seed(0)
    place, packed = str(tmp_path / "model"), str(tmp_path / "packed")
    dense = getattr(hf, name)(config).eval()
    dense.save_pretrained(place)
    tokenizer().save_pretrained(place)
    spec = "magnitude(0.5),freeze,lower(bitmap)"
    head = f"what the head of {name} makes of the last hidden state is not looked at"

    def told() -> str:
        out, err = capsys.readouterr()
        return " ".join(f"{out} {err}".split())

    assert compress([place, packed, "--passes", spec]) == 0
    assert f"no sample: {name} writes no text" in told()
    loaded: Any = sparsec.load(packed)
    ids = torch.arange(9)[None]
    assert type(loaded) is type(dense)
    torch.testing.assert_close(loaded(ids).logits, sparsec.compile(dense, spec)(ids).logits)
    assert main([place, packed, *SHORT]) == 0
    found = told()
    assert f"model: {head}" in found
    assert f"packed: {head}" in found
    assert "nothing to compare" not in found
    assert main([place, *SHORT]) == 0
    assert "there is nothing to compare it with: give --passes, or a second model" in told()
    for written in (place, packed):
        assert generate([written, "a text"]) == 2
        assert f"{name} writes no text; sparsec evaluate compares the embeddings of encoders" in told()


def test_a_body_has_no_head_that_could_be_left_out() -> None:
    assert left_out(encoder()) == left_out(nn.Linear(2, 2)) == []
    assert len(left_out(encoder(hf.BertForMaskedLM))) == 1
