"""What compile takes to calibrate on, and how it refuses the rest."""

from __future__ import annotations

import pytest
import torch
from architectures import tiny_model

import sparsec
from sparsec.calibrate import strings, windows
from sparsec.data import load_model
from sparsec.data.tiny import byte_tokenizer
from sparsec.errors import ActivationError, ArgumentError, DataError, PipelineError
from sparsec.report.__main__ import main


def test_strings_become_sequences_and_empty_ones_are_refused() -> None:
    assert [len(ids) for ids in strings(["abc", "de"], byte_tokenizer(), length=2)] == [2, 2]
    with pytest.raises(DataError, match="calibration string 1 has no tokens"):
        strings(["a", ""], byte_tokenizer())


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (None, PipelineError, "the pass 'wanda' needs calibration data; in Python give calibration="),
        (7, DataError, "calibration must be token ids .* got int"),
        ([1, 2], DataError, "calibration must be token ids .* got list of int"),
        ("no-such-file.txt", DataError, "no-such-file.txt"),
        ([(torch.ones(2, 3),)], DataError, "must be integers .*got torch.float32 in sequence 0"),
    ],
)
def test_compile_says_which_calibration_it_takes(given, error, message: str) -> None:
    tokenizer = None if given is None else byte_tokenizer()
    with pytest.raises(error, match=message):
        sparsec.compile(tiny_model("llama")[0], "wanda(0.5)", calibration=given, tokenizer=tokenizer)


def test_a_tokenizer_alone_draws_from_the_embedded_text() -> None:
    loaded = load_model("tiny")
    drawn = {"tokenizer": loaded.tokenizer, "calibration_sequences": 4, "calibration_length": 40}
    pruned = sparsec.compile(loaded.model, "wanda(0.5)", **drawn)
    assert "on 4 sequences of 40 tokens of pydoc_data.topics, second half" in pruned.sparsec.records[0].summary
    # A pass that needs none draws none.
    assert "pydoc" not in sparsec.compile(loaded.model, "magnitude(0.5)", **drawn).sparsec.records[0].summary


def test_sequences_longer_than_the_model_takes_are_named() -> None:
    model = tiny_model("gpt2")[0]
    positions = model.config.max_position_embeddings
    with pytest.raises(
        ActivationError, match=rf"cannot run on calibration data of \[1, {positions + 3}\].*index out of range"
    ):
        sparsec.compile(model, "wanda(0.5)", calibration=torch.ones(1, positions + 3, dtype=torch.int64))


@pytest.mark.parametrize("length", [0, -3, 1])
def test_lengths_that_are_none_are_refused(length) -> None:
    with pytest.raises(DataError, match=f"at least 2 tokens, got .*{length!r}; take more"):
        windows(None, byte_tokenizer(), 2, length)
    with pytest.raises(DataError, match=f"at least 2 tokens, got a length of {length!r}; take more"):
        strings(["abc"], byte_tokenizer(), length)


def test_a_length_that_is_no_number_is_refused() -> None:
    with pytest.raises(ArgumentError, match="windows: length must be a whole number or None, got str '64'"):
        windows(None, byte_tokenizer(), 2, "64")


def test_data_that_no_pass_learns_from_is_noted(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    model, _ = tiny_model("llama")
    out = sparsec.compile(model, "magnitude(0.5),freeze", calibration=torch.zeros(2, 8, dtype=torch.int64))
    assert "calibration data was given, and none of magnitude(0.5),freeze learns from it" in out.sparsec.notes
    text = tmp_path / "own.txt"
    text.write_text("words " * 100)
    assert main(["tiny", "--passes", "magnitude(0.5)", "--no-measure", "--calibration", str(text)]) == 0
    assert f"no pass learns from data, so --calibration {text} is not used" in capsys.readouterr().err


def test_compile_takes_strings_and_files(tmp_path) -> None:
    loaded = load_model("tiny")
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    for data in (file, ["one text", "another one"]):
        pruned = sparsec.compile(
            loaded.model,
            "wanda(0.5)",
            calibration=data,
            tokenizer=loaded.tokenizer,
            calibration_sequences=3,
            calibration_length=32,
        )
        assert all(w.pruned.error > 0 for w in pruned.sparsec.graph.masked())
