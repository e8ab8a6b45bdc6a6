"""Perplexity, agreement and divergence against slow or planted truths; evaluations that are stopped and go on."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsec.data import Text, load_model
from sparsec.errors import DataError
from sparsec.evaluate import Windows, compare, cut, evaluate
from sparsec.evaluate.__main__ import main
from sparsec.evaluate.compare import agreement, token_losses
from sparsec.evaluate.output import _buckets
from sparsec.evaluate.saved import Saved, fingerprint


def characters(content: str, verbose: bool) -> dict[str, list[int]]:
    """A tokenizer: one token per character."""
    return {"input_ids": [ord(c) for c in content]}


class Planted(nn.Module):
    """A language model whose logits are given, window by window."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)  # [windows, length, vocabulary]
        self.calls = 0

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        self.calls += 1
        return SimpleNamespace(logits=self.logits[self.calls - 1][None])


def windows_of(tokens: Tensor) -> Windows:
    return Windows(tokens, "text", "0" * 64, tokens.numel())


def slow_loss(logits: Tensor, tokens: Tensor) -> float:
    """The definition, token by token, in float64."""
    probabilities = torch.softmax(logits.double(), dim=-1)
    losses = [-math.log(float(probabilities[i, int(tokens[i + 1])])) for i in range(len(tokens) - 1)]
    return sum(losses) / len(losses)


@given(
    length=st.sampled_from([2, 3, 17, 255, 256, 257, 258, 513]),
    vocabulary=st.integers(1, 9),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_loss_of_a_window_is_the_definition(length: int, vocabulary: int, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(length, vocabulary, generator=generator)).to(dtype)
    tokens = torch.randint(vocabulary, (length,), generator=generator)
    loss = token_losses(logits[:-1], tokens[1:])
    assert loss.shape == (length - 1,)
    assert float(loss.double().mean()) == pytest.approx(slow_loss(logits, tokens), rel=1e-5, abs=1e-6)


@given(rows=st.sampled_from([1, 2, 255, 256, 257]), vocabulary=st.integers(1, 12), seed=st.integers(0, 99))
def test_agreement_is_the_definition(rows: int, vocabulary: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, reference = torch.randn(2, rows, vocabulary, generator=generator)
    first, among = agreement(logits, reference)
    for i in range(rows):
        order = logits[i].argsort(descending=True)
        wanted = int(reference[i].argmax())
        assert bool(first[i]) == (int(order[0]) == wanted)
        assert bool(among[i]) == (wanted in order[:5].tolist())
    nothing = torch.full((1, vocabulary), math.nan)
    assert not agreement(nothing, reference[:1])[1]


def test_perplexity_is_exp_of_the_mean_over_windows() -> None:
    """Means of windows are averaged, as the papers do; over windows of one length that is the mean over tokens."""
    logits = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(7, (3, 5), generator=torch.Generator().manual_seed(1))
    found = evaluate(Planted(logits), windows_of(tokens))
    each = [slow_loss(logit, token) for logit, token in zip(logits, tokens, strict=True)]
    assert found.perplexity == pytest.approx(math.exp(sum(each) / 3), rel=1e-6)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity() -> None:
    found = evaluate(Planted(torch.zeros(2, 9, 11)), windows_of(torch.zeros(2, 9, dtype=torch.int64)))
    assert found.perplexity == pytest.approx(11)


def test_nan_and_overflow_are_kept_not_hidden() -> None:
    nothing = torch.zeros(1, 3, dtype=torch.int64)
    assert math.isnan(evaluate(Planted(torch.full((1, 3, 4), math.nan)), windows_of(nothing)).perplexity)
    wrong = torch.zeros(1, 3, 4)
    wrong[..., 1] = 1e5
    assert evaluate(Planted(wrong), windows_of(nothing)).perplexity == math.inf


@given(text=st.text("ab", min_size=2, max_size=60), length=st.integers(2, 9), count=st.none() | st.integers(1, 4))
def test_windows_are_consecutive_pieces_and_the_rest_is_dropped(text: str, length: int, count: int | None) -> None:
    tokens = [ord(c) for c in text]
    if len(tokens) < length * (count or 1):
        with pytest.raises(DataError, match=f"the text has {len(tokens)} tokens, .* need {length * (count or 1)}"):
            cut(Text("text", text), characters, length, count)
        return
    found = cut(Text("text", text), characters, length, count)
    assert found.count == (count or len(tokens) // length)
    assert found.tokens.flatten().tolist() == tokens[: found.count * length]
    assert found.tokens_in_text == len(tokens)


@pytest.mark.parametrize(
    ("length", "count", "words"),
    [
        (1, 1, "length must be at least 2"),
        (4, 0, "windows must be at least 1, got 0"),
        (9, 1, "length 9 is more than the model's 8 positions; take 8 or less"),
    ],
)
def test_windows_that_cannot_be_are_refused(length: int, count: int, words: str) -> None:
    with pytest.raises(DataError, match=words):
        cut(Text("text", "abc" * 9), characters, length, count, limit=8)


def test_models_are_compared_window_by_window_and_position_by_position() -> None:
    generator = torch.Generator().manual_seed(0)
    dense, other = 2 * torch.randn(2, 3, 6, 9, generator=generator)
    tokens = torch.randint(9, (3, 6), generator=generator)
    found = compare({"dense": Planted(dense), "other": Planted(other)}, windows_of(tokens))
    one, two = found["dense"], found["other"]
    assert (one.kl, one.top1, one.top5) == (0, 1, 1)
    p, q = dense.double().softmax(-1), other.double().softmax(-1)
    kl = (p * (p / q).log()).sum(-1)
    assert two.kl == pytest.approx(float(kl.mean()), rel=1e-5)
    assert two.kl_by_position == pytest.approx(kl.mean(0).tolist(), rel=1e-5)
    same = (dense.argmax(-1) == other.argmax(-1)).double()
    assert two.top1 == pytest.approx(float(same.mean()))
    assert two.top1_by_position == pytest.approx(same.mean(0).tolist())
    losses = -q[:, :-1].gather(2, tokens[:, 1:, None])[..., 0].log()
    assert two.losses == pytest.approx(losses.mean(1).tolist(), rel=1e-5)
    assert two.loss_by_position == pytest.approx(losses.mean(0).tolist(), rel=1e-5)
    assert two.perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-5)


def test_models_of_other_vocabularies_are_refused() -> None:
    models = {"a": Planted(torch.zeros(1, 4, 5)), "b": Planted(torch.zeros(1, 4, 6))}
    with pytest.raises(DataError, match="b: its vocabulary is 6, that of a is 5"):
        compare(models, windows_of(torch.zeros(1, 4, dtype=torch.int64)))


@given(length=st.integers(2, 70))
def test_every_position_that_predicts_is_in_one_bucket(length: int) -> None:
    covered = [i for a, b in _buckets(length) for i in range(a, b)]
    assert covered == list(range(length - 1))


@given(stop=st.integers(0, 4), seed=st.integers(0, 99))
def test_a_stopped_evaluation_goes_on_to_the_same_figures(
    stop: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 5, 6, 9, generator=generator)
    windows = windows_of(torch.randint(9, (5, 6), generator=generator))
    whole = compare({"a": Planted(logits[0]), "b": Planted(logits[1])}, windows)
    file = tmp_path_factory.mktemp("saved") / "run.json"

    def interrupt(what: str, done: int, total: int) -> None:
        if done == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare({"a": Planted(logits[0]), "b": Planted(logits[1])}, windows, interrupt, saved=Saved(file, {"of": seed}))
    again = Saved(file, {"of": seed})
    assert again.done == stop
    rest = {"a": Planted(logits[0, stop:]), "b": Planted(logits[1, stop:])}
    assert compare(rest, windows, saved=again) == whole
    assert {name: model.calls for name, model in rest.items()} == {"a": 5 - stop, "b": 5 - stop}


def test_a_saved_evaluation_of_something_else_is_refused(tmp_path: Path) -> None:
    file, windows = tmp_path / "run.json", windows_of(torch.zeros(2, 4, dtype=torch.int64))
    compare({"a": Planted(torch.zeros(2, 4, 5))}, windows, saved=Saved(file, {"text": "one", "length": 4}))
    with pytest.raises(DataError, match=r"is of another evaluation: text is 'one' there and 'two' here"):
        Saved(file, {"text": "two", "length": 4})
    held = Saved(file, {"text": "one", "length": 4})
    with pytest.raises(DataError, match="holds a, asked for are b"):
        compare({"b": Planted(torch.zeros(2, 4, 5))}, windows, saved=held)
    with pytest.raises(DataError, match="holds 2 windows, 1 were asked for"):
        compare({"a": Planted(torch.zeros(1, 4, 5))}, windows_of(windows.tokens[:1]), saved=held)
    for damage in (
        "",
        "{",
        "[]",
        '{"sparsec_evaluation": 1}',
        file.read_text()[:-9],
        file.read_text().replace("[[", "["),
    ):
        file.write_text(damage)
        with pytest.raises(DataError, match="is no evaluation of this version of sparsec, or it is damaged"):
            Saved(file, {"text": "one", "length": 4})
    with pytest.raises(DataError, match="its folder does not exist"):
        Saved(tmp_path / "no" / "run.json", {})


def test_a_fingerprint_tells_weights_apart() -> None:
    model = load_model("tiny").model
    before = fingerprint(model)
    assert before == fingerprint(load_model("tiny").model)
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    assert fingerprint(model) != before


def test_a_real_model_agrees_with_itself_and_with_the_definition() -> None:
    loaded = load_model("tiny")
    found = cut(Text("text", "To be, or not to be, that is the question. " * 4), loaded.tokenizer, 32, 3)
    seen: list[tuple[str, int, int]] = []
    both = compare({"one": loaded.model, "two": loaded.model}, found, lambda *step: seen.append(step))
    assert (both["two"].top1, both["two"].top5, both["two"].kl) == (1, 1, 0)
    assert seen == [("evaluating", i, 3) for i in range(4)]
    with torch.no_grad():
        logits = [loaded.model(input_ids=window[None]).logits[0] for window in found.tokens]
    each = [slow_loss(logit, window) for logit, window in zip(logits, found.tokens, strict=True)]
    assert both["one"].perplexity == pytest.approx(math.exp(sum(each) / 3), rel=1e-5)


ARGUMENTS = ["--length", "64", "--windows", "2", "--calibration-length", "64", "--calibration-sequences", "2"]


def test_the_command_says_what_the_passes_noted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tiny", "--passes", "sparsegpt(0.5),freeze", "--passes", "magnitude(0.5)", *ARGUMENTS]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("sparsegpt(0.5),freeze: ") == 1
    assert re.search(r"sparsegpt\(0\.5\),freeze: \d+ layers were shown no more than 128 tokens", said)


def test_json_on_the_standard_output_stands_alone_there(capsys: pytest.CaptureFixture[str]) -> None:
    """Regression: it was written to a file called `-`, and text stood on the standard output."""
    assert main(["tiny", *ARGUMENTS, "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert list(json.loads(out)["models"]) == ["tiny"]
    assert "2 windows of 64 tokens" in " ".join(err.split())


def test_the_command_compares_what_passes_make_of_a_model_and_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    specs = ["magnitude(0.5)", "wanda(0.5),freeze,lower(csr)", "wanda(0.5),freeze,lower(bitmap)"]
    passes = [word for spec in specs for word in ("--passes", spec)]
    files = ["--resume", str(tmp_path / "run.json"), "--json", str(tmp_path / "out.json")]
    assert main(["tiny", *passes, *ARGUMENTS, *files]) == 0
    first = capsys.readouterr().out
    rows = [line.split() for line in first.splitlines() if line[:3] in ("A  ", "B  ", "C  ", "D  ")]
    assert [row[1] for row in rows] == ["tiny", *specs]
    assert rows[2][2:] == rows[3][2:], "two formats of one mask"
    assert "2 windows of 64 tokens that do not overlap, float32" in " ".join(first.split())
    assert "pydoc_data.topics, first half" in first
    assert "calibrated on 2 sequences of 64 tokens of pydoc_data.topics, second half" in " ".join(first.split())
    found = json.loads((tmp_path / "out.json").read_text())
    assert list(found["models"]) == ["tiny", *specs]
    assert len(found["models"]["tiny"]["loss_by_position"]) == 63
    assert found["models"][specs[1]]["kl"] > 0
    assert main(["tiny", *passes, *ARGUMENTS, *files]) == 0
    again = capsys.readouterr().out
    assert f"2 windows were taken over from {tmp_path / 'run.json'}" in " ".join(again.split())
    assert [line for line in again.splitlines() if line[:3] in ("A  ", "B  ", "C  ", "D  ")] == [
        line for line in first.splitlines() if line[:3] in ("A  ", "B  ", "C  ", "D  ")
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny", "--text", "no-such-file.txt"], "no-such-file.txt: the text must be a file, this does not exist"),
        (["tiny", "--passes", "wander(0.5)"], "unknown pass 'wander', did you mean 'wanda'"),
        (["tiny", "--passes", "lower(csr)"], "needs 'frozen'"),
        (["tiny", "--json", "no/such/folder.json"], "no/such/folder.json: cannot be written"),
        (["tiny", "--resume", "no/such/folder.json"], "no/such/folder.json: cannot be written"),
        (["tiny", "--length", "1"], "evaluation length must be at least 2"),
        (["no-such-model.gguf"], "no-such-model.gguf: there is no such folder or file"),
    ],
)
def test_the_command_says_what_is_wrong(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--windows", "1"]) == 2
    assert message in capsys.readouterr().err


def test_tables_fit_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    spec = "magnitude(0.5),freeze,sparsity,flops,fuse,lower(auto)"
    words = ["tiny", "--passes", spec, "--passes", "magnitude(0.9)", "--windows", "1", "--length", "16"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if len(line) > 80] == []
    assert spec in " ".join(out.split())
