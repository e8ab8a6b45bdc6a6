"""calibration="self": text that a model writes itself, for those who have none."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import CAUSAL_LMS, Mlp, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sparsec
from sparsec import cache
from sparsec.calibrate import own_text
from sparsec.compress import main as compress
from sparsec.data.tiny import byte_tokenizer
from sparsec.data.tiny import tiny_model as random_model
from sparsec.errors import DataError, SparsecWarning
from sparsec.evaluate.__main__ import main as evaluate

CACHE = "sparsec.calibrate.self_written.cache.folder"


@pytest.fixture(autouse=True)
def _texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are kept in a folder of the test's own, kernels where they always are."""
    own = cache.folder
    (tmp_path / "texts").mkdir()
    monkeypatch.setattr(CACHE, lambda *parts: tmp_path / "texts" if parts == ("texts",) else own(*parts))


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "texts").glob("*"))


def forget(tmp_path: Path) -> None:
    for path in kept(tmp_path):
        path.unlink()


class Counting:
    """How often a model generated."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, own = 0, model.generate

        def generate(**given: Any) -> Any:
            self.calls += 1
            return own(**given)

        monkeypatch.setattr(model, "generate", generate)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "qwen2-moe", "mamba", "bloom"])
def test_the_same_seed_writes_the_same_text_and_another_seed_another(name: str, tmp_path: Path) -> None:
    assert name in CAUSAL_LMS
    model = tiny_model(name)[0]
    first, source = own_text(model, None, 3, 12, seed=5)
    forget(tmp_path)
    torch.rand(7)
    again = own_text(model, None, 3, 12, seed=5)[0]
    assert torch.equal(first, again)
    assert first.shape == (3, 12)
    assert first.dtype == torch.int64
    assert not torch.equal(first, own_text(model, None, 3, 12, seed=6)[0])
    assert source.startswith("3 sequences of 12 tokens that the model wrote itself (sampled at temperature 1")
    assert "seed 5)" in source


def test_text_is_sampled_from_the_models_own_distribution() -> None:
    """A bigram model whose chances are known: what follows what must come as often as it says."""
    model = random_model()
    logits = torch.randn(257, 257, generator=torch.Generator().manual_seed(0))

    def forward(input_ids: Tensor, **given: Any) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        return CausalLMOutputWithPast(logits=logits[input_ids])

    model.forward = forward  # type: ignore[method-assign]
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.eos_token_id = 3
    ids = own_text(model, None, 256, 30, seed=1)[0]
    pairs = torch.stack((ids[:, :-1].flatten(), ids[:, 1:].flatten()))
    for token in pairs[0].bincount(minlength=257).topk(3).indices.tolist():
        after = pairs[1][pairs[0] == token].bincount(minlength=257)
        want = torch.softmax(logits[token], 0)
        likely = want > 0.01
        error = (after / after.sum() - want)[likely].abs()
        assert bool((error < 4 * (want[likely] / after.sum()).sqrt()).all())
    assert bool((pairs[0] == 3).any()), "an end of text is a token like others"
    assert model.generation_config.repetition_penalty == 5.0


@settings(max_examples=6)
@given(st.integers(1, 40), st.integers(3, 6), st.integers(0, 3), st.booleans())
def test_first_tokens_are_plain_ones_after_the_bos(count: int, length: int, seed: int, bos: bool) -> None:
    tokenizer, model = byte_tokenizer(), random_model()
    ids = own_text(model, tokenizer, count, length, seed, bos=bos)[0]
    assert ids.shape == (count, length)
    assert int(ids.min()) >= 0
    assert int(ids.max()) < 257
    assert not bool((ids[:, 0] == 256).any())
    if count > 20:
        assert len(ids[:, 0].unique()) > 10


def test_a_tokenizer_that_begins_texts_with_a_bos_begins_these() -> None:
    class Beginning:
        """As that of Llama."""

        all_special_ids = (256,)

        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": [256] * options.get("add_special_tokens", True) + list(text.encode())}

        def num_special_tokens_to_add(self) -> int:
            return 1

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return ["<s>" for _ in ids]

        def get_vocab(self) -> dict[str, int]:
            return {str(i): i for i in range(100)} | {"<s>": 256}

    ids, source = own_text(random_model(), Beginning(), 20, 5)
    assert bool((ids[:, 0] == 256).all())
    assert int(ids[:, 1].max()) < 100
    assert source.endswith("every window begins with <s>")
    assert int(own_text(random_model(), Beginning(), 20, 5, bos=False)[0][:, 0].max()) < 100


def test_what_was_written_is_kept_and_a_damaged_copy_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model()
    counted = Counting(model, monkeypatch)
    first, source = own_text(model, None, 2, 8)
    assert counted.calls == 1
    assert own_text(model, None, 2, 8)[1] == source
    assert torch.equal(own_text(model, None, 2, 8)[0], first)
    assert counted.calls == 1
    (path,) = kept(tmp_path)
    good = path.read_bytes()
    damaged = [
        good[:-1],
        good[:40],
        b"",
        good + b"x",
        good[:-1] + bytes([good[-1] ^ 1]),
        bytes([good[0] ^ 1]) + good[1:],
    ]
    for number, data in enumerate(damaged):
        path.write_bytes(data)
        assert torch.equal(own_text(model, None, 2, 8)[0], first)
        assert counted.calls == 2 + number
        assert path.read_bytes() == good


def test_another_model_another_length_and_another_seed_are_kept_apart(tmp_path: Path) -> None:
    model = random_model()
    own_text(model, None, 2, 8)
    own_text(model, None, 2, 9)
    own_text(model, None, 3, 8)
    own_text(model, None, 2, 8, seed=1)
    own_text(model.bfloat16(), None, 2, 8)
    model = random_model()
    with torch.no_grad():
        model.model.norm.weight[0] += 1.0
    own_text(model, None, 2, 8)
    model.config.rms_norm_eps = 0.1
    own_text(model, None, 2, 8)
    assert len(kept(tmp_path)) == 7


def test_a_cache_that_cannot_be_used_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(SparsecWarning, match="not kept for the next time"):
        ids = own_text(random_model(), None, 2, 8)[0]
    assert ids.shape == (2, 8)


def test_the_model_and_the_process_stay_what_they_were() -> None:
    model = random_model().train()
    model.model.layers[0].eval()
    settings_, state = model.generation_config, torch.get_rng_state()
    own_text(model, None, 2, 8)
    assert model.training
    assert not model.model.layers[0].mlp.training
    assert model.generation_config is settings_
    assert torch.equal(torch.get_rng_state(), state)


def test_progress_counts_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsec.calibrate.self_written._TOKENS_AT_ONCE", 16)
    told: list[tuple[str, int, int]] = []
    ids = own_text(random_model(), None, 5, 8, progress=lambda *step: told.append(step))[0]
    assert ids.shape == (5, 8)
    assert {(what, total) for what, _, total in told} == {("writing text to calibrate on", 35)}
    done = [n for _, n, _ in told]
    assert done == sorted(done)
    assert done[0] == 2
    assert done[-1] == 35


@pytest.mark.parametrize("passes", ["wanda(0.5)", "sparsegpt(0.5)", "magnitude(0.5, allocation='owl')"])
def test_every_pass_that_learns_takes_it(passes: str) -> None:
    model = tiny_model("llama")[0]
    sizes = {"calibration_sequences": 4, "calibration_length": 16}
    made = sparsec.compile(model, f"{passes},freeze", calibration="self", seed=3, **sizes)
    ids, source = own_text(model, None, 4, 16, seed=3, limit=128)
    assert made.sparsec.calibration["source"] == source
    given_ = sparsec.compile(model, f"{passes},freeze", calibration=(ids, source))
    assert made.sparsec.calibration == given_.sparsec.calibration
    for name, parameter in made.named_parameters():
        assert torch.equal(parameter, given_.get_parameter(name))


def test_nothing_is_written_where_no_pass_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")[0]
    counted = Counting(model, monkeypatch)
    made = sparsec.compile(model, "magnitude(0.5)", calibration="self", copy=False)
    assert counted.calls == 0
    assert any("none of magnitude(0.5) learns" in note for note in made.sparsec.notes)


def test_commands_take_it(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = ["--calibration", "self", "--calibration-sequences", "2", "--calibration-length", "16"]
    assert compress(["tiny", "out", "--passes", "wanda(0.5),freeze,lower(csr)", *sizes]) == 0
    assert "2 sequences of 16 tokens that the model wrote itself" in (tmp_path / "out" / "README.md").read_text()
    assert evaluate(["tiny", "--passes", "wanda(0.5)", "--windows", "2", "--length", "16", *sizes]) == 0
    assert "calibrated on 2 sequences of 16 tokens that the model wrote itself" in "".join(capsys.readouterr())
    assert len(kept(tmp_path)) == 1, "both commands and both sizes of windows take one text"
    assert evaluate(["tiny", "--passes", "magnitude(0.5)", "--windows", "2", "--length", "16", *sizes]) == 0
    assert "--calibration self is not used" in capsys.readouterr().err


class Alone(nn.Module):
    """It has no config, and generates nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 16), nn.Linear(16, 64)

    def forward(self, input_ids: Tensor) -> Tensor:
        """[batch, length] -> [batch, length, 64]."""
        logits: Tensor = self.head(self.embed(input_ids))
        return logits


def test_what_writes_no_text_is_refused() -> None:
    with pytest.raises(DataError, match="BertForMaskedLM encodes text and writes none; give calibration= a text file"):
        sparsec.compile(tiny_model("bert")[0], "wanda(0.5)", calibration="self", tokenizer=byte_tokenizer())
    for module, x in ((Mlp(), torch.randn(2, 16)), (Alone(), torch.ones(2, 4, dtype=torch.int64))):
        with pytest.raises(DataError, match=r"whose generate writes, and a (Mlp|Alone) is none"):
            sparsec.compile(module, "wanda(0.5, targets='*')", calibration="self", example_inputs=x)
    with pytest.raises(DataError, match="calibration length 200 is more than the model's 128 positions"):
        sparsec.compile(tiny_model("llama")[0], "wanda(0.5)", calibration="self", calibration_length=200)
    with pytest.raises(DataError, match="at least 1 sequence of at least 2 tokens"):
        own_text(random_model(), None, 2, 1)
    with pytest.raises(DataError, match="writes at most"):
        own_text(random_model(), None, 10**6, 1024)
    broken = random_model()
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.nan)
    with pytest.raises(DataError, match=r"LlamaForCausalLM cannot write 2 sequences of 8 tokens \(.*nan"):
        own_text(broken, None, 2, 8)
