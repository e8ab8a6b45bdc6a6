"""One line of a report says what computes a token; it is asked once, and not of what has no program."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from report_cases import model, report
from transformers import BertConfig, BertForMaskedLM

import sparsec
import sparsec.report.__main__ as report_command
from sparsec.kernels import status
from sparsec.program import decoder
from sparsec.program.told import NATIVE, told_decoding
from sparsec.report.reread import reread
from sparsec.report.schema import check_report, document

native = pytest.mark.skipif(not status().built, reason="there are no native kernels")
LINE = f"decoding: {NATIVE}"


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("decoding:")]


@native
def test_a_lowered_model_says_that_a_token_is_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[int] = []
    record = decoder.record_step

    def counted(*given: Any) -> Any:
        recorded.append(1)
        return record(*given)

    monkeypatch.setattr(decoder, "record_step", counted)
    made = sparsec.compile(model(), "magnitude(0.5),freeze,lower(bitmap)")
    assert recorded == [], "nobody asked yet"
    assert lines(str(made.sparsec.report())) == [LINE]
    count = len(recorded)
    made.sparsec.report()
    with torch.no_grad():
        made.generate(torch.arange(4)[None], max_new_tokens=3, do_sample=False)
    assert len(recorded) == count, "prepared once, for the report and for decoding"
    made.save_pretrained(tmp_path)
    assert lines(str(sparsec.load(tmp_path).sparsec.report())) == [LINE]
    assert lines(str(pickle.loads(pickle.dumps(made)).sparsec.report())) == [LINE]


@native
def test_what_stood_in_the_way_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = sparsec.compile(model(), "magnitude(0.5),freeze,lower(bitmap)")
    made.save_pretrained(tmp_path)
    monkeypatch.delitem(decoder.OPERATORS, "aten.silu.default")
    for each in (sparsec.compile(model(), "magnitude(0.5),freeze,lower(bitmap)"), sparsec.load(tmp_path)):
        found = each.sparsec.report()
        assert found.decoding is not None
        assert "aten.silu.default" in found.decoding
        summary, groups = str(found).split("\n== Passes", 1)[0], str(found).split("decoding:", 1)[1]
        assert all("aten.silu.default" in " ".join(text.split()) for text in (summary, groups))


def test_reports_of_others_are_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("a step is recorded")

    monkeypatch.setattr(decoder, "record_step", never)
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    encoder = sparsec.compile(BertForMaskedLM(config).eval(), "magnitude(0.5),freeze,lower(bitmap)")
    assert lines(str(encoder.sparsec.report())) == []
    assert lines(str(sparsec.compile(model(), "magnitude(0.5),freeze").sparsec.report())) == []
    training = sparsec.compile(model(), "magnitude(0.5),freeze,lower(bitmap)").train()
    assert told_decoding(training) is None
    elsewhere = sparsec.compile(model(), "magnitude(0.5),freeze,lower(bitmap)").to("meta")
    assert told_decoding(elsewhere) is None


def test_a_report_that_was_saved_before_has_no_such_line() -> None:
    found = document(report())
    assert check_report(found) == []
    del found["decoding"]
    assert lines(str(reread(json.loads(json.dumps(found))))) == []


def test_the_command_shows_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert report_command.main(["tiny", "--no-measure", "--passes", "magnitude(0.5),freeze,lower(bitmap)"]) == 0
    shown = lines(capsys.readouterr().out)
    assert len(shown) == 1
    assert shown == [LINE] or not status().built
