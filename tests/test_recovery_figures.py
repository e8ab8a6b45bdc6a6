"""What training did, as data and as a table, and the second text that stands beside the first where a pass trains."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import report_cases
import torch
from architectures import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from page_cases import page_of

import sparsec
import sparsec.console.command as command
import sparsec.evaluate.__main__ as evaluate_command
import sparsec.report.__main__ as report_command
from sparsec.calibrate.data import another_text
from sparsec.data import LoadedModel, Text, load_model, load_text
from sparsec.data.text import second_text
from sparsec.defaults import QUICK
from sparsec.errors import VerifyError
from sparsec.evaluate import Windows
from sparsec.pipeline import Pipeline
from sparsec.pipeline.trained import FIGURES, TextFigures, TrainingFigures
from sparsec.report import schema
from sparsec.report.collect import Report
from sparsec.report.reread import reread
from sparsec.report.summary import summary_lines
from sparsec.report.text import render
from sparsec.study import variants
from sparsec.study.measure import measured_report
from sparsec.study.plan import plan

RECOVER = "magnitude(0.5),freeze,recover(steps=3, dtype='fp32')"
SMALL = replace(QUICK, windows=2, length=16, prompt_tokens=4, new_tokens=2, repeats=2, seconds=20.0)
LITTLE = ["--eval-windows", "2", "--eval-length", "16", "--prompt-tokens", "4", "--new-tokens", "2", "--quick"]
DRAWN = ["--calibration-sequences", "4", "--calibration-length", "32"]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("tiny")


@pytest.fixture(scope="module")
def recovered(loaded: LoadedModel) -> Any:
    """Calibrated on the embedded text."""
    spec = f"{RECOVER},fuse,lower(bitmap)"
    return sparsec.compile(
        loaded.model, spec, tokenizer=loaded.tokenizer, calibration_sequences=4, calibration_length=32
    )


def trained(compiled: Any) -> TrainingFigures:
    found = next(r.training for r in compiled.sparsec.records if r.name == "recover")
    assert isinstance(found, TrainingFigures)
    return found


def told(changed: float = 3.0, second: bool = True) -> Report:
    """A report of a model that was trained, its figures invented."""
    whole = report_cases.report()
    held = TextFigures("4 sequences of one text", 4, 0.5, 0.25, 41.25, changed)
    other = TextFigures("2 sequences of another", 2, 0.75, 0.5, 60.5, 50.5)
    figures = TrainingFigures("distill", 1234, 56_789, 90.0, "float32", held, other if second else None)
    passes = (*whole.passes[:2], replace(whole.passes[2], training=figures), *whole.passes[3:])
    of = {"dense": 70.25, "masked": 80.5, "dense_on_sparsec": 70.25, "lowered": 80.5}
    summary = {
        name: replace(v, perplexity_second=of[name], top1_second=0.625) if second else v
        for name, v in whole.summary.items()
    }
    return replace(
        whole,
        passes=passes,
        summary=summary,
        second=replace(whole.evaluation, text="another text") if second and whole.evaluation else None,
        beside_second={"magnitude(0.4)": 987.5} if second else {},
    )


def test_the_record_of_a_training_has_its_figures(recovered: Any) -> None:
    found = trained(recovered)
    assert (found.method, found.steps, found.tokens, found.dtype) == ("distill", 3, 3 * 32, "float32")
    assert 0 < found.seconds < next(r for r in recovered.sparsec.records if r.name == "recover").seconds
    assert "pydoc_data.topics" in found.held_out.text
    assert found.second is not None
    assert "docstrings" in found.second.text
    for text in (found.held_out, found.second):
        assert text.sequences >= 1
        assert list(text.changes()) == [FIGURES["divergence"], FIGURES["perplexity"]]
    assert [r.training for r in recovered.sparsec.records if r.name != "recover"] == [None] * 4


def test_the_second_text_has_the_perplexity_that_the_models_have_on_it(loaded: LoadedModel, recovered: Any) -> None:
    some = another_text("pydoc_data.topics", loaded.tokenizer, 32, True)
    assert some is not None
    ids = some()[0]
    masked = sparsec.compile(loaded.model, "magnitude(0.5),freeze")
    found = trained(recovered).second
    assert found is not None
    for model, told in ((masked, found.perplexity_before), (recovered, found.perplexity_after)):
        with torch.no_grad():
            losses = [torch.nn.functional.cross_entropy(model(row[None]).logits[0, :-1], row[1:]) for row in ids]
        assert told == pytest.approx(math.exp(sum(map(float, losses)) / len(losses)), rel=1e-4)


def test_a_plain_module_has_errors_and_ids_without_a_tokenizer_no_second_text() -> None:
    model, example = tiny_model("mlp")
    calls = [(example(2, 4 + i)["x"],) for i in range(6)]
    found = trained(sparsec.compile(model, RECOVER, calibration=calls, example_inputs=example()))
    assert list(found.held_out.changes()) == [FIGURES["error"]]
    assert found.second is None
    ids = torch.arange(4 * 16).view(4, 16) % 50
    assert trained(sparsec.compile(tiny_model("llama")[0], RECOVER, calibration=ids)).second is None


def test_a_loaded_model_has_the_figures_of_the_saved_one(recovered: Any, tmp_path: Path) -> None:
    recovered.save_pretrained(tmp_path)
    back: Any = sparsec.load(tmp_path)
    assert back.sparsec.report().passes[2].training == trained(recovered)
    assert back.sparsec.report().text() == recovered.sparsec.report().text()
    recovered.save_pretrained(tmp_path, report=told())
    again: Any = sparsec.load(tmp_path)
    assert again.sparsec.report().text() == told().text()
    card = (tmp_path / "README.md").read_text()
    assert "| perplexity, second text | 70.25 | 80.50 |" in card
    assert "The second text, not trained on: another text (sha256 " in card


NUMBER = st.one_of(st.none(), st.floats(0, 1e9), st.sampled_from([math.inf, math.nan]))
TEXT = st.builds(TextFigures, st.text(max_size=9), st.integers(1, 9), NUMBER, NUMBER, NUMBER, NUMBER, NUMBER, NUMBER)
COUNT = st.integers(0, 10**9)
TRAINED = st.builds(
    TrainingFigures, st.text(max_size=9), COUNT, COUNT, st.floats(0, 1e6), st.text(max_size=9), TEXT, st.none() | TEXT
)


def _finite(found: TextFigures | None) -> TextFigures | None:
    if found is None:
        return None
    return replace(found, **{k: None for k, v in vars(found).items() if isinstance(v, float) and not math.isfinite(v)})


@given(figures=TRAINED)
def test_json_and_back_keeps_every_finite_figure(figures: TrainingFigures) -> None:
    whole = told()
    passes = (replace(whole.passes[0], training=figures), *whole.passes[1:])
    found = json.loads(json.dumps(schema.document(replace(whole, passes=passes)), allow_nan=False))
    assert schema.check_report(found) == []
    held = _finite(figures.held_out)
    assert held is not None
    wanted = replace(figures, held_out=held, second=_finite(figures.second))
    assert reread(found).passes[0].training == wanted
    render(replace(whole, passes=passes))
    key = sorted(schema.TRAINING)[figures.steps % len(schema.TRAINING)]
    del found["passes"][0]["training"][key]
    assert any(key in problem for problem in schema.check_report(found))


def test_the_terminal_shows_a_small_table() -> None:
    for width in (80, 120):
        text = render(told(), width=width)
        lines = text.split("== Recovery")[1].split("\n\n==")[0].splitlines()
        assert max(map(len, lines)) <= width
        assert lines[1:6] == [
            "pass 3, distill: 1,234 steps, 56,789 tokens, 1.5 min, float32",
            "                            held out   second text",
            "--------------------------------------------------",
            "KL from the dense model  0.5 -> 0.25   0.75 -> 0.5",
            "perplexity                41.25 -> 3  60.5 -> 50.5",
        ]
        assert "second text, not trained on: 2 sequences of another" in text
    assert "Recovery" not in render(report_cases.report())


def test_the_second_text_stands_beside_the_first() -> None:
    text = render(told())
    (row,) = (line for line in text.partition("== Compared")[2].splitlines() if line.startswith("perplexity, second"))
    assert row.split()[-4:] == ["70.25", "80.50", "70.25", "80.50"]
    screen = "\n".join(summary_lines(told()))
    assert "perplexity, second text  70.25" in screen
    assert "on the second text 987.50 by magnitude(0.4)" in screen
    assert "windows of 64 tokens; perplexity 987.50 by magnitude(0.4)" in " ".join(text.split())
    alone = render(told(second=False))
    assert "second text" not in alone.partition("== Compared")[2]


def test_the_screen_has_room_for_a_second_text_on_a_busy_machine() -> None:
    whole = told()
    assert whole.latency is not None
    assert whole.evaluation is not None
    crowded = replace(
        whole,
        latency=replace(whole.latency, disturbed=True, busy_cores=1.0),
        evaluation=replace(whole.evaluation, text="word " * 99),
        passes=tuple(replace(p, spec=p.spec * 9, notes=("word " * 200, "x" * 300)) for p in whole.passes),
    )
    assert len(summary_lines(crowded)) <= 24


def test_the_page_shows_the_table_and_the_second_text() -> None:
    page = page_of(told())
    assert "Recovery: before and after training" in page
    assert "0.5 -&gt; 0.25" in page
    assert "perplexity, second text" in page
    assert "perplexity 987.50 by magnitude(0.4)" in page
    assert "Recovery" not in page_of(report_cases.report())


def test_what_is_no_training_is_refused() -> None:
    class Odd(sparsec.Pass):
        name = "odd"
        effect = sparsec.Effect.ANALYSIS

        def run(self, graph: Any, context: Any) -> sparsec.PassResult:
            return sparsec.PassResult(False, "nothing", training={"steps": 1})  # type: ignore[arg-type]

    with pytest.raises(VerifyError, match="TrainingFigures where it trains"):
        sparsec.compile(tiny_model("llama")[0], [Odd()])


@given(
    evaluated=st.sampled_from(["a.txt", "pydoc_data.topics", "pydoc_data.topics, first half"]),
    learnt=st.sampled_from([None, "b.txt", "self"]),
)
def test_the_second_text_is_neither_trained_nor_evaluated_on(evaluated: str, learnt: str | None) -> None:
    args = argparse.Namespace(calibration=learnt)
    text = None if learnt in (None, "self") else Text(learnt, "words")
    pipelines = [Pipeline.parse("magnitude(0.5)"), Pipeline.parse(RECOVER)]
    found = command.untrained_text(args, pipelines, Text(evaluated, "words"), text)
    assert found is not None
    used = {evaluated.partition(",")[0], "pydoc_data.topics" if learnt is None else learnt}
    assert found.name not in used
    assert len(found.content) > 10_000
    assert command.untrained_text(args, pipelines[:1], Text(evaluated, "words"), text) is None
    assert second_text("a", "b") == load_text()


def reported(loaded: LoadedModel, spec: str, second: Text | None) -> Any:
    drawn = torch.arange(8 * 16).view(8, 16) % 200
    planned = plan(loaded, load_text(), SMALL, second=second)
    return measured_report(loaded, Pipeline.parse(spec), planned, calibration=drawn)[0]  # type: ignore[arg-type]


def test_variants_one_after_another_have_the_same_figures_on_the_second_text(monkeypatch: pytest.MonkeyPatch) -> None:
    second, spec = second_text("pydoc_data.topics"), f"{RECOVER},lower(bitmap)"
    together = reported(load_model("tiny"), spec, second)
    monkeypatch.setattr(variants, "memory_bytes", lambda device: 1_000_000)
    apart = reported(load_model("tiny"), spec, second)
    assert (together.in_turn, apart.in_turn) == (True, False)
    for found in (together, apart):
        assert found.second.text == second.name
        assert (found.second.windows, found.second.window_length) == (2, 16)
        assert found.evaluation.text != found.second.text
    for name, variant in together.summary.items():
        for key in ("perplexity_second", "top1_second"):
            assert getattr(variant, key) == pytest.approx(getattr(apart.summary[name], key), rel=1e-3), (name, key)
        assert variant.perplexity_second != variant.perplexity


def test_a_second_text_that_is_short_gives_fewer_windows(loaded: LoadedModel) -> None:
    planned = plan(loaded, load_text(), replace(SMALL, windows=5), second=Text("short", "a few words. " * 3))
    assert planned.second is not None
    assert planned.second.count == 2
    assert planned.windows.count == 5


def test_the_commands_look_at_a_second_text_where_a_pass_trains_and_only_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "report.json")
    words = ["tiny", *LITTLE, *DRAWN, "--json", out, "--beside", "wanda(0.5)"]
    assert report_command.main([*words, "--passes", f"{RECOVER},lower(bitmap)"]) == 0
    found = json.loads(Path(out).read_bytes())
    assert schema.check_report(found) == []
    assert found["second"]["text"] == "docstrings of the standard library"
    assert found["second"]["windows"] == 2
    assert set(found["beside_second"]) == set(found["beside"]) == {"wanda(0.5)"}
    assert found["beside_second"]["wanda(0.5)"] != found["beside"]["wanda(0.5)"]
    assert found["summary"]["lowered"]["perplexity_second"] > 1
    assert list(found["sample"]["texts"]) == ["dense", "wanda(0.5)", "lowered"]
    assert found["passes"][2]["training"]["steps"] == 3
    said = capsys.readouterr().out
    assert "== Recovery" in said
    assert "perplexity, second text" in said

    def refused(*names: str) -> Text:
        raise AssertionError(names)

    monkeypatch.setattr(command, "second_text", refused)
    assert report_command.main([*words, "--passes", "magnitude(0.5),freeze,lower(bitmap)"]) == 0
    found = json.loads(Path(out).read_bytes())
    assert (found["second"], found["beside_second"]) == (None, {})
    assert "second text" not in capsys.readouterr().out
    assert not any("second" in stage["name"] for stage in found["stages"])


def test_where_time_is_short_what_stands_beside_is_of_the_same_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: other passes were measured on all windows, what was pruned on those for which there was time."""
    monkeypatch.setattr(report_command, "QUICK", replace(QUICK, seconds=0.0))
    words = ["tiny", *LITTLE, *DRAWN, "--passes", f"{RECOVER},lower(bitmap)", "--beside", "wanda(0.5)"]
    found = {}
    for windows in ("1", "2"):
        out = tmp_path / f"{windows}.json"
        assert report_command.main([*words, "--eval-windows", windows, "--json", str(out)]) == 0
        found[windows] = json.loads(out.read_bytes())
    looked = [(each["done"], each["wanted"]) for each in found["2"]["stages"] if each["name"].startswith("evaluating")]
    assert looked == [(1, 2), (1, 2)]
    for each in found.values():
        assert each["evaluation"]["windows"] == each["second"]["windows"] == 1
    assert found["1"]["beside"] == found["2"]["beside"]
    assert found["1"]["beside_second"] == found["2"]["beside_second"]


def test_evaluate_has_the_second_text_and_goes_on_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, state = tmp_path / "out.json", tmp_path / "state"
    words = ["tiny", "--passes", RECOVER, "--windows", "2", "--length", "16", *DRAWN, "--json", str(out)]
    assert evaluate_command.main([*words, "--resume", str(state)]) == 0
    assert "perplexity  second text" in capsys.readouterr().out
    first = json.loads(out.read_bytes())
    assert first["second"]["text"] == "docstrings of the standard library"
    assert first["second"]["models"].keys() == first["models"].keys()
    both = [first["second"]["models"]["tiny"]["perplexity"], first["models"]["tiny"]["perplexity"]]
    assert both[0] != both[1]
    ran: list[Windows] = []
    monkeypatch.setattr(evaluate_command, "compiled_by", lambda *given: ran.append(given[0]) or {})
    assert evaluate_command.main([*words, "--resume", str(state)]) == 0
    again = json.loads(out.read_bytes())
    assert not ran
    assert {k: v for k, v in again.items() if k != "notes"} == {k: v for k, v in first.items() if k != "notes"}
    assert evaluate_command.main([*words[:2], "magnitude(0.5)", *words[3:]]) == 0
    assert json.loads(out.read_bytes())["second"] is None
