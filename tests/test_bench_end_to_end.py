"""Whole models: what is timed is what generate() decodes, times add up, random models are sound, bad input is refused."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from sparsec.bench import end_to_end, models, room, shares, sources
from sparsec.bench.__main__ import main
from sparsec.bench.end_to_end import (
    DENSE_ON_SPARSEC,
    MASKED,
    STOCK,
    DecodingEffort,
    Mode,
    Recipe,
    headlines,
    recipes,
    time_modes,
)
from sparsec.bench.session import Session
from sparsec.data.tiny import tiny_model
from sparsec.errors import DataError, SpecError
from sparsec.kernels import SparseLinear

SMALL: dict[str, dict[str, int]] = {
    "smollm2-135m": {"intermediate_size": 96, "num_key_value_heads": 2},
    "opt-125m": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "pythia-410m": {"intermediate_size": 96},
}
COMMON = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SPARSE = Recipe("50% zero", "magnitude(0.5)")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in architectures, but few and narrow layers."""
    for name, sizes in SMALL.items():
        kind, own = models.CONFIGS[name]
        monkeypatch.setitem(models.CONFIGS, name, (kind, {**own, **COMMON, **sizes}))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("name", "compiled"),
    [(name, False) for name in SMALL] + [("smollm2-135m", True), ("opt-125m", True)],
)
def test_a_session_decodes_what_generate_does(name: str, compiled: bool) -> None:
    """Compiled without a code generator, which takes long and is not ours; everything is compiled once, not at every token."""
    torch._dynamo.reset()
    model = models.random_model(name, torch.float32)
    prompt = torch.randint(300, (1, 8), generator=torch.Generator().manual_seed(1))
    wanted = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 8:]
    session = Session(model, prompt, 20, "eager" if compiled else None)
    assert session.cache == ("static" if compiled else "dynamic")
    graphs = []
    for _ in range(2):
        session.prefill()
        found = [session.token]
        session.decode(1)
        found.append(session.token)
        graphs.append(counters["stats"]["unique_graphs"])
        for _ in range(10):
            session.decode(1)
            found.append(session.token)
        assert found == wanted.tolist()
        graphs.append(counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", SMALL)
def test_random_models_are_sound(name: str) -> None:
    model = models.random_model(name, torch.float32, seed=3)
    again = models.random_model(name, torch.float32, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    for path, parameter in model.named_parameters():
        if parameter.dim() > 1:
            assert 0.015 < float(parameter.detach().std()) < 0.025, path
        else:
            assert set(parameter.tolist()) == {0.0 if path.endswith("bias") else 1.0}, path
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == model.config.tie_word_embeddings == (name != "pythia-410m")
    usual = type(model)(models.config(name))  # its buffers are computed, not left as they were found
    assert all(torch.equal(b, usual.get_buffer(path)) for path, b in model.named_buffers())
    assert models.random_model(name, torch.bfloat16, layers=1).config.num_hidden_layers == 1
    assert torch.isfinite(model(torch.arange(5)[None]).logits).all()


def test_sizes_of_known_models_are_the_published_ones() -> None:
    counts = {name: sum(p.numel() for p in models.on_meta(name).parameters()) for name in models.CONFIGS}
    assert counts == {
        "smollm2-135m": 134_515_008,
        "opt-125m": 125_239_296,
        "pythia-410m": 405_334_016,
        "llama-7b": 6_738_415_616,
    }


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.inner(x))  # type: ignore[no-any-return]


class Toy(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.mix, self.head = attention, nn.Linear(4, 4)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(x))  # type: ignore[no-any-return]


def test_time_is_counted_once_where_it_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(shares, "perf_counter", lambda: float(next(ticks)))
    toy = Toy(Attention())
    found = shares.shares(toy, lambda: toy(torch.ones(1, 4)), 1)
    # One tick between any two readings: model( mix( inner() inner() ) head() )
    assert (found.linears, found.attention, found.lm_head, found.rest) == (2.0, 3.0, 1.0, 3.0)
    assert found.total == 9.0
    assert shares.shares(toy, lambda: [toy(torch.ones(1, 4)) for _ in range(3)], 3).total == 9.0
    plain = Toy(nn.Linear(4, 4))
    found = shares.shares(plain, lambda: plain(torch.ones(1, 4)), 1)
    assert (found.linears, found.attention, found.lm_head, found.rest) == (1.0, None, 1.0, 3.0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in toy.modules())


def test_sparse_variants_stand_beside_the_dense_model(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[Recipe, Any] = {}
    build = end_to_end.compiled_by

    def spy(*given: Any, **rest: Any) -> Any:
        seen.update(build(*given, **rest))
        return seen

    monkeypatch.setattr(end_to_end, "compiled_by", spy)
    effort = DecodingEffort(prompt_tokens=4, new_tokens=2, repeats=2)
    wanted = recipes("magnitude({sparsity}),freeze,lower(bitmap)", [0.5, 0.7])
    modes = time_modes(tiny_model(), wanted, effort)
    assert [(m.name, m.cache) for m in modes] == [
        ("dense eager", "dynamic"),
        ("masked eager", "dynamic"),
        ("dense on sparsec's kernels eager", "dynamic"),
        ("dense:int8 on sparsec's kernels eager", "dynamic"),
        ("dense:int4g64 on sparsec's kernels eager", "dynamic"),
        ("50% zero eager", "dynamic"),
        ("70% zero eager", "dynamic"),
    ]
    for mode in modes:
        assert len(mode.prefill_ms) == len(mode.decode_ms) == 2
        assert mode.step is not None
        assert mode.step.native == (mode.variant not in (STOCK, MASKED))
        assert mode.step.reason == ""
        shares = mode.step.shares
        assert shares is not None
        assert min(shares.linears, shares.lm_head, shares.attention or 0, shares.rest) > 0
        assert (shares.around is not None) == mode.step.native
    for share, model in zip((0.5, 0.7), list(seen.values())[3:], strict=True):
        packed = [m.packed for m in model.modules() if isinstance(m, SparseLinear)]
        assert {p.format for p in packed} == {"bitmap"}
        zeros = sum(p.sparsity * p.shape[0] * p.shape[1] for p in packed)
        assert zeros / sum(p.shape[0] * p.shape[1] for p in packed) == pytest.approx(share, abs=1e-3)


def test_specifications_with_a_placeholder_come_once_for_each_sparsity() -> None:
    assert [v.passes for v in recipes(None, [0.5, 0.75])] == [
        end_to_end.PASSES.replace("{sparsity}", s) for s in ("0.5", "0.75")
    ]
    assert "magnitude({sparsity})" in end_to_end.PASSES
    assert [v.passes for v in recipes("magnitude(0.3),freeze", [0.5, 0.75])] == ["magnitude(0.3),freeze"]
    with pytest.raises(SpecError, match="nonsense"):
        recipes("nonsense({sparsity})", [0.5])


def _mode(variant: Recipe, compiled: bool, prefill: list[float], decode: list[float]) -> Mode:
    return Mode(variant, compiled, "dynamic", tuple(prefill), tuple(decode), None)


def test_the_headline_is_best_against_best_per_round() -> None:
    modes = [
        _mode(STOCK, False, [4.0, 4.0, 4.0], [10.0, 10.0, 10.0]),
        _mode(STOCK, True, [8.0, 8.0, 8.0], [6.0, 8.0, 7.0]),
        _mode(SPARSE, False, [5.0, 5.0, 5.0], [3.0, 2.0, 7.0]),
        _mode(SPARSE, True, [2.0, 2.0, 2.0], [9.0, 9.0, 9.0]),
    ]
    (found,) = headlines(modes)
    assert (found.dense.name, found.sparse.name) == ("dense compiled", "50% zero eager")
    assert found.decode.median == 2.0  # of 6 / 3, 8 / 2, 7 / 7
    assert found.prefill.median == 2.0  # each with the mode that is best there
    assert found.sparse.tokens_per_second == pytest.approx(1e3 / 3.0)
    assert found.zeros is None
    own = _mode(DENSE_ON_SPARSEC, False, [3.0, 3.0, 3.0], [4.5, 4.0, 7.0])
    (found,) = headlines([*modes, own, _mode(MASKED, False, [9.0] * 3, [1.0] * 3)])
    assert found.zeros is not None
    assert found.zeros.median == 1.5  # of 4.5 / 3, 4 / 2, 7 / 7
    assert found.dense.name == "dense compiled"  # masked is no baseline


@pytest.mark.usefixtures("small")
def test_as_many_layers_as_fit_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed, each = sources._sizes("smollm2-135m", torch.float32)
    whole = sum(p.nbytes for p in models.random_model("smollm2-135m", torch.float32).parameters())
    assert fixed + 2 * each == whole
    assert "layers" not in sources.source("smollm2-135m", torch.float32, 1).origin

    def free(layers: float) -> None:
        nbytes = int(3 * (fixed + layers * each) / sources.ROOM_SHARE)
        for module in (sources, room):
            monkeypatch.setattr(module, "available_bytes", lambda: nbytes)

    free(1.5)
    cut = sources.source("smollm2-135m", torch.float32, 1)
    assert cut.model.config.num_hidden_layers == 1
    assert "1 of 2 layers (as many as fit into memory)" in cut.origin
    free(0.5)
    with pytest.raises(DataError, match="not even one layer fits"):
        sources.source("smollm2-135m", torch.float32, 1)
    with pytest.raises(DataError, match="with 2 layers needs about"):
        sources.source("smollm2-135m", torch.float32, 1, layers=2)
    with pytest.raises(SpecError, match="has 2 layers, got 3"):
        sources.source("smollm2-135m", torch.float32, 1, layers=3)


def test_the_command_writes_what_it_prints_in_80_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    files = ["--json", str(tmp_path / "e.json"), "--csv", str(tmp_path / "e.csv")]
    wanted = "--end-to-end tiny --sparsity 0.5 --dtypes bf16 --repeats 2 --prompt-tokens 4 --new-tokens 1"
    assert main([*wanted.split(), *files]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    written = json.loads((tmp_path / "e.json").read_text())
    assert written["schema"] == "sparsec.bench.end_to_end/2"
    assert [r["dtype"] for r in written["runs"]] == ["bf16"]
    with (tmp_path / "e.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["mode"] for r in rows] == [
        "dense eager",
        "masked eager",
        "dense on sparsec's kernels eager",
        "dense:int8 on sparsec's kernels eager",
        "dense:int4g64 on sparsec's kernels eager",
        "50% zero eager",
    ]
    modes = [m for r in written["runs"] for m in r["modes"]]
    for row, mode in zip(rows, modes, strict=True):
        assert row["mode"] == mode["name"]
        assert float(row["tokens_per_second"]) == mode["tokens_per_second"]
        assert f"{mode['tokens_per_second']:.1f}" in printed
        assert len(mode["decode_ms"]) == 2
    for done in written["runs"]:
        (headline,) = done["headlines"]
        assert f"50% zero: decode {headline['decode_speedup']['median']:.2f}x" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("tiny --layers 2", "--layers with --end-to-end is for models with random weights"),
        ("tiny --prompt-tokens 1020", "positions, the model has 1024; take fewer --prompt-tokens"),
        ("tiny --passes nonsense", "nonsense"),
        ("./no-such-model", "there is no such folder or file"),
        ("tiny --new-tokens 0", "--new-tokens must be at least 1, got 0"),
        ("tiny --dtypes fp8", "--dtypes takes fp32, bf16, fp16"),
        ("tiny --shapes 8x8", "--shapes says nothing here; leave it out with --end-to-end"),
    ],
)
def test_bad_input_is_refused(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--end-to-end", *arguments.split()]) == 2
    assert message in capsys.readouterr().err
