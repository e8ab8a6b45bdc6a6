"""A study of an encoder: quality by its embeddings, time by its forwards."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from study_cells import LITTLE
from test_encoders_evaluated import encoder, tokenizer

import sparsec.study.__main__ as study


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("encoder") / "small"
    encoder().save_pretrained(to)
    tokenizer().save_pretrained(to)
    return to


def test_an_encoder_is_studied_by_its_embeddings(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(folder), "--passes", "magnitude({zeros}),freeze,lower(csr)", "--passes", "magnitude({zeros}),freeze"]
    words += ["--grid", "zeros=0.5,0.9", *LITTLE, "--csv", str(tmp_path / "csv")]
    assert study.main(words) == 0
    out = capsys.readouterr().out
    header = next(line for line in out.splitlines() if "cosine" in line)
    assert "perplexity" not in out
    assert "decode ms" not in out
    assert "predicted" not in header
    assert "Cosine of embeddings to dense and speedup of a window" in out
    rows = list(csv.DictReader(io.StringIO((tmp_path / "csv").read_text())))
    assert len(rows) == 5
    assert float(rows[0]["cosine"]) == 1
    by_spec = {row["spec"]: row for row in rows}
    half, most = (float(by_spec[f"magnitude({zeros}),freeze"]["cosine"]) for zeros in ("0.5", "0.9"))
    assert -1 <= most < half < 0.9999
    for row in rows:
        assert float(row["window_ms"]) > 0
        assert float(row["prefill_ms"]) > 0
        assert float(row["speedup_window"]) > 0
        assert row["decode_ms"] == row["perplexity"] == row["energy_mj"] == row["linears_ms"] == ""
        masked = row["spec"].removesuffix(",lower(csr)")
        assert row["cosine"] == by_spec[masked]["cosine"]


@pytest.mark.parametrize("preset", ["seminar", "tipping", "patterns", "frontier"])
def test_a_preset_refuses_an_encoder(folder: Path, preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert study.main([str(folder), "--preset", preset, *LITTLE]) == 2
    assert "BertModel is an encoder" in capsys.readouterr().err
