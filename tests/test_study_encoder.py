"""A study of an encoder: quality by its embeddings, time by its forwards."""

from __future__ import annotations

import csv
import io
import json
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


def test_the_frontier_of_an_encoder_goes_by_its_embeddings(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(folder), "--preset", "frontier", "--grid", "method=magnitude", "--grid", "zeros=0.5,0.9", *LITTLE]
    assert study.main([*words, "--json", str(tmp_path / "json")]) == 0
    told = capsys.readouterr().out.split("== The fronts")[1]
    assert "higher cosine" in told
    assert "perplexity" not in told
    assert "decoding" not in told
    document = json.loads((tmp_path / "json").read_text())
    cells = {cell["spec"]: cell["figures"] for cell in document["cells"]}
    findings = document["findings"]
    assert set(findings["compared"]) == set(cells)
    for front, cost in (("by_bytes", lambda v: v["bytes"]), ("by_time", lambda v: -v["speedup_window"])):
        own = {spec: (-v["cosine"], cost(v)) for spec, v in cells.items()}
        beaten = {s for s, p in own.items() if any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in own.values())}
        assert set(findings[front]) == set(cells) - beaten


@pytest.mark.parametrize("preset", ["seminar", "tipping", "patterns"])
def test_a_preset_that_needs_decoding_refuses_an_encoder_and_names_another(
    folder: Path, preset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study.main([str(folder), "--preset", preset, *LITTLE]) == 2
    said = capsys.readouterr().err
    assert "BertModel is an encoder" in said
    assert "--preset frontier goes by the cosine" in said
