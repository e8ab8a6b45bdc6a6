"""`sparsec compress` and `sparsec generate`: from a model to a folder, and from the folder to text."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_model
from transformers import BertConfig, BertModel

import sparsec
from sparsec import compress, generate
from sparsec.data import load_model
from sparsec.errors import CheckpointError
from sparsec.report.schema import document
from sparsec.study.sample import generated, read_prompt

PASSES = "magnitude(0.5),freeze,sparsity,flops,fuse,lower(bitmap)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("compressed") / "model"
    assert compress.main(["tiny", str(place), "--passes", PASSES, "--new-tokens", "4"]) == 0
    return place


def test_what_is_saved_is_what_compile_makes(folder: Path) -> None:
    made = sparsec.compile(load_model("tiny").model, PASSES)
    loaded: Any = sparsec.load(folder)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(made(ids).logits, loaded(ids).logits)
    here, there = (document(model.sparsec.report()) for model in (made, loaded))  # type: ignore[union-attr]
    assert here["layers"] == there["layers"]


def test_it_shows_what_is_written_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tiny", str(tmp_path / "m"), "--passes", PASSES, "--prompt", "abc", "--new-tokens", "4"]
    assert compress.main(words) == 0
    out, err = capsys.readouterr()
    out = " ".join(out.split())
    assert "before" in out
    assert "after" in out
    assert "14 as bitmap" in out
    assert "quality perplexity" in out
    assert "2 windows of 256 tokens of pydoc_data.topics" in out
    assert f"sparsec generate {tmp_path / 'm'}" in out
    assert "writing ..." in err


def test_the_card_loads_the_model_by_the_name_of_its_folder(folder: Path) -> None:
    """Regression: by that of the folder in which it was being made, `result`."""
    assert f"from_pretrained('{folder.name}')" in (folder / "README.md").read_text()


def test_a_saved_model_writes_what_generate_of_the_library_writes(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert generate.main([str(folder), "abc", "--new-tokens", "6", "--json", str(tmp_path / "out.json")]) == 0
    out, err = capsys.readouterr()
    loaded: Any = sparsec.load(folder)
    tokenizer = load_model("tiny").tokenizer
    tokens = generated(loaded, tokenizer, read_prompt(tokenizer, "abc", 6).tokens, 6)
    assert tokenizer is not None
    assert out.strip() == tokenizer.decode(tokens, skip_special_tokens=True).strip()
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["prompt_tokens"], found["new_tokens"], found["model"]) == (3, 6, "model")
    assert "tokens/s" in err


def test_what_is_drawn_follows_the_seed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(seed: str) -> str:
        assert generate.main([str(folder), "abc", "--new-tokens", "8", "--temperature", "1", "--seed", seed]) == 0
        return capsys.readouterr().out

    assert told("1") == told("1")
    assert len({told(str(seed)) for seed in range(3)}) > 1


def test_the_prompt_may_come_from_the_input(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("abc\n"))
    assert generate.main([str(folder), "-", "--new-tokens", "6", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "abc"


def test_a_measured_model_keeps_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sparsec.study import plan

    short = {"windows": 1, "length": 32, "prompt_tokens": 8, "repeats": 2, "seconds": 1.0}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(compress, "Effort", lambda **given: plan.Effort(**(short | given)))
        words = ["tiny", str(tmp_path / "m"), "--passes", PASSES, "--new-tokens", "4", "--measure"]
        assert compress.main(words) == 0
    found = sparsec.load(tmp_path / "m").sparsec.report()  # type: ignore[union-attr]
    assert found.summary["lowered"].perplexity > 1
    assert "| perplexity |" in (tmp_path / "m" / "README.md").read_text()
    assert "before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tokens", "said"), [([1] * 40, True), ([2] * 9 + [1] * 31, True), ([1] * 15, False), ([1, 2, 3] * 20, False)]
)
def test_a_text_of_one_token_is_called_none(tokens: list[int], said: bool) -> None:
    trained = dataclasses.replace(load_model("tiny"), source="a folder")
    assert bool(generate.says_little(trained, tokens)) == said
    assert "random weights" in generate.says_little(load_model("tiny"), [])[0]


def test_an_empty_prompt_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Regression: minutes later."""
    for main, words in ((generate.main, ["tiny", ""]), (compress.main, ["tiny", str(tmp_path / "m"), "--prompt", ""])):
        assert main(words) == 2
        err = capsys.readouterr().err
        assert "no tokens" in err
        assert "loading" not in err


def test_a_model_that_nobody_pruned_is_called_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Regression: the pass said it in the report alone, and the command saved a dense model without a word."""
    words = ["tiny", str(tmp_path / "m"), "--no-sample", "--passes", "zeros,freeze,lower(auto, objective='bytes')"]
    assert compress.main(words) == 0
    assert "- the checkpoint holds only 0.00 % zeros in these weights" in " ".join(capsys.readouterr().out.split())


def test_why_nothing_is_packed_is_told_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = "magnitude(0.001),freeze,sparsity,lower(auto, objective='bytes')"
    assert compress.main(["tiny", str(tmp_path / "m"), "--no-sample", "--passes", spec]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "no matrix is packed; 0.1% of all parameters are zero, 0.1% of" in out
    assert "no layout that pays for any of the 14 pruned matrices. Of 14 of them it says: the smallest, " in out
    assert "lower(bitmap) in its place packs them all the same" in out
    assert "the others, such as those of norms, are kept" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tiny", "{new}", "--passes", "magnitude(0.5)"], "no pass lowers"),
        (["tiny", "{file}"], "is a file"),
        (["tiny", "{other}"], "holds another model"),
        (["tiny", "{mine}"], "holds README.md"),
        (["tiny", "{new}", "--prompt", ""], "no tokens"),
        (["{other}", "{other}"], "is the model itself"),
        (["{saved}", "{new}"], "was saved by sparsec"),
        (["tiny", "{new}", "--calibration", "nowhere.txt"], "nowhere.txt"),
        (["tiny", "{new}", "--text", "some.txt"], "add --measure"),
        (["tiny", "{new}", "--max-shard-size", "lots"], "max_shard_size"),
        (["nowhere", "{new}"], "nowhere"),
    ],
)
def test_what_cannot_be_compressed_is_refused_and_nothing_is_written(
    words: list[str], said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    places = {name: tmp_path / name for name in ("new", "file", "other", "mine")} | {"saved": folder}
    before = sorted(tmp_path.rglob("*"))
    assert compress.main([word.format(**places) for word in words]) == 2
    assert said in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["loop", "nowhere/inside", "zero\0byte", "surrogate\ud800"])
def test_a_name_that_no_folder_can_have_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Regression: RuntimeError, ValueError and UnicodeEncodeError as they came."""
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    Path("nowhere").symlink_to("gone")
    assert compress.main(["tiny", name]) == 2
    assert "no folder can have this name" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loop", "nowhere"]
    model = sparsec.compile(tiny_model("llama")[0], "magnitude(0.5),freeze")
    with pytest.raises(CheckpointError):
        model.save_pretrained(name)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tiny", "--temperature", "-1"], "--temperature"),
        (["tiny", "--temperature", "nan"], "--temperature"),
        (["tiny", "--temperature", "1e-300"], "must be 0, which takes the most likely token, or at least 1e-06"),
        (["tiny", "--top-p", "0.5"], "add --temperature"),
        (["tiny", "--top-p", "2", "--temperature", "1"], "--top-p"),
        (["tiny", ""], "no tokens"),
        (["tiny", "bad \udcff"], "must be UTF-8"),
        (["tiny", "abc", "--new-tokens", "99999"], "positions"),
        (["{saved}", "abc", "--dtype", "bf16"], "saved to compute in float32"),
        (["{bert}", "abc"], "BertModel writes no text"),
        (["Why is the sky blue?"], "sparsec generate smollm2 'Why is the sky blue?'"),
        (["tinny", "abc"], "error: tinny: did you mean `tiny`? There is no folder or file of this name here"),
        (["hello"], "If 'hello' is the text: MODEL comes before it, sparsec generate smollm2 hello"),
        (["it's"], "smollm2 'it'\"'\"'s'"),
    ],
)
def test_what_cannot_be_generated_is_refused(
    words: list[str], said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "{bert}" in words:
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        bert = sparsec.compile(BertModel(BertConfig(vocab_size=64, **sizes)), "magnitude(0.5),freeze,lower(csr)")
        bert.save_pretrained(tmp_path / "bert")
    places = {"saved": folder, "bert": tmp_path / "bert"}
    assert generate.main([word.format(**places) for word in words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tiny", "abc", "--temperature", "hot"], "must be a number, got 'hot'"),
        (["tiny", "Why", "is", "the", "sky"], "what has several words goes in quotes"),
        (["tiny", "abc", "--temprature", "1"], "did you mean --temperature?"),
    ],
)
def test_words_that_cannot_be_read_end_with_the_way_out(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        generate.main(words)
    assert said in capsys.readouterr().err
