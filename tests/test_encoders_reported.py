"""A report of an encoder: quality by its embeddings, speed by its forwards, and nothing that has no meaning."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from test_encoders_evaluated import encoder, tokenizer

from sparsec.bench import __main__ as bench
from sparsec.data import load_model, load_text
from sparsec.defaults import QUICK
from sparsec.errors import DataError
from sparsec.pipeline import Pipeline
from sparsec.report.__main__ import main
from sparsec.report.schema import check_report
from sparsec.study import measure
from sparsec.study.plan import plan

LOWERED = "magnitude(0.5),freeze,sparsity,flops,fuse,lower(csr)"
SMALL = replace(QUICK, length=32, prompt_tokens=8, repeats=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("encoder") / "small"
    encoder().save_pretrained(to)
    tokenizer().save_pretrained(to)
    return to


def test_the_command_reports_an_encoder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    sizes = ["--quick", "--eval-length", "32", "--prompt-tokens", "8"]
    assert main([str(folder), "--passes", LOWERED, "--beside", "magnitude(0.9)", *sizes, "--json", str(file)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        "cosine of the embeddings to dense 0.",
        "ms to read 8 tokens",
        "ms to read 32 tokens",
        "decoding, perplexity and a sample have no meaning",
        "8 rows through its module",
    ):
        assert words in shown, words
    assert "ms to decode" not in shown
    assert "Sample:" not in shown
    found = json.loads(file.read_text())
    assert check_report(found) == []
    assert (found["model"]["encoder"], found["sample"], found["latency"]["decode_repeats"]) == (True, None, None)
    assert found["latency"]["window_tokens"] == 32
    lowered, masked = found["summary"]["lowered"], found["summary"]["masked"]
    assert 0 < lowered["cosine_min"] <= lowered["cosine"] < 0.999
    assert lowered["cosine"] == masked["cosine"]
    assert found["beside"]["magnitude(0.9)"] < lowered["cosine"]
    assert found["summary"]["dense"]["cosine"] == 1
    assert all(v["prefill_ms"] > 0 and v["window_ms"] > 0 for v in found["summary"].values())
    for name in ("perplexity", "kl", "decode_ms", "speedup_decode", "linears_ms", "speedup_predicted"):
        assert {v[name] for v in found["summary"].values()} == {None}, name


def test_variants_in_turn_and_one_after_another_give_the_same_quality(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for scarce in (False, True):
        monkeypatch.setattr(measure, "scarce", lambda dense, scarce=scarce: scarce)
        loaded = load_model(folder)
        report, made = measure.measured_report(loaded, Pipeline.parse(LOWERED), plan(loaded, load_text(), SMALL))
        assert made.sparsec is not None
        found.append({name: (v.cosine, v.cosine_min, v.embedding_error) for name, v in report.summary.items()})
        assert all(v.window_ms is not None for v in report.summary.values())
    assert found[0] == found[1]


def test_a_prompt_longer_than_the_model_takes_is_refused(folder: Path) -> None:
    loaded = load_model(folder)
    with pytest.raises(DataError, match="a prompt of 65 tokens needs as many positions, the model has 64"):
        plan(loaded, load_text(), replace(SMALL, prompt_tokens=65, windows=4))


def test_calibration_takes_the_positions_that_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Regression: RoBERTa's positions begin behind the padding's: as many as max_position_embeddings were too many."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    model = hf.RobertaModel(hf.RobertaConfig(vocab_size=260, max_position_embeddings=66, pad_token_id=1, **sizes))
    model.save_pretrained(tmp_path / "roberta")
    tokenizer().save_pretrained(tmp_path / "roberta")
    few = ["--passes", "wanda(0.5),freeze,sparsity,lower(csr)", "--calibration-sequences", "2", "--no-measure"]
    assert main([str(tmp_path / "roberta"), *few]) == 0
    assert "2 sequences of 64 tokens" in " ".join(capsys.readouterr().out.split())


def test_the_benchmark_of_decoding_refuses_an_encoder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--end-to-end", str(folder)]) == 2
    assert "BertModel is an encoder and decodes nothing" in capsys.readouterr().err
