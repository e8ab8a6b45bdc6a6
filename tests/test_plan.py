"""Plans: bytes as packing gives them, times that add up, and a command that says what is wrong with its input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_planned_memory import model

import sparsec
from sparsec import plan
from sparsec.cost.constants import machine_constants
from sparsec.cost.phase import Attended, Looked, Phase
from sparsec.counts import MOST_PARTS
from sparsec.data import hub
from sparsec.data.models import load_model
from sparsec.errors import DataError
from sparsec.formats.layout import Layout
from sparsec.ir.tracer import trace
from sparsec.passes import Freeze, Round, SparseGPT, Wanda
from sparsec.patterns import Pattern
from sparsec.pipeline import Pipeline
from sparsec.planning import sizes
from sparsec.planning.foretell import Foretold, foretell, meta_calls
from sparsec.planning.shape import shape_of_model
from sparsec.planning.times import TimeOf, solve_seconds

LAYOUTS = ["bitmap", "csr8", "csr16", "csr32", "bsr16x16", "nm2:4", "bitmap:int8", "bitmap:int4g64", "dense:int8"]
REST = "freeze,sparsity,flops,fuse"


def constants():
    found = machine_constants([torch.float32, torch.bfloat16], measuring=False)
    assert found is not None
    return found.constants


def told(
    passes: str, dtype: torch.dtype = torch.float32, ranks: int = 1, sequences: int = 8, layers: int = 2
) -> Foretold:
    graph = trace(model(dtype, "meta", layers=layers))
    data = meta_calls(graph, sequences, 64)
    return foretell(
        graph, Pipeline.parse(passes), data, constants(), name="a model", architecture="Llama", ranks=ranks, context=128
    )


@given(
    layout=st.sampled_from(LAYOUTS),
    shape=st.sampled_from([(64, 128), (160, 64), (32, 512)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    sparsity=st.sampled_from([0.25, 0.5, 0.9]),
    seed=st.integers(0, 3),
)
def test_planned_bytes_are_those_of_a_packed_matrix(
    layout: str, shape: tuple[int, int], dtype: torch.dtype, sparsity: float, seed: int
) -> None:
    kind = Layout.parse(layout)
    pattern = "2:4" if "nm" in layout else "block:16x16" if "bsr" in layout else "unstructured"
    sparsity = 0.5 if "nm" in layout else sparsity
    mask = Pattern.parse(pattern).mask(torch.rand(shape, generator=torch.Generator().manual_seed(seed)), sparsity)
    whole = torch.ones_like(mask) if layout.startswith("dense") else mask
    packed = kind.pack(torch.randn(shape).to(dtype), whole)
    planned = sizes.planned_bytes(kind, shape, dtype, sparsity, pattern)
    # Where each row has as many as it likes, lists of column numbers that must not be too far apart differ a little.
    assert planned.nbytes == pytest.approx(packed.nbytes, rel=0.02 if layout in ("csr8", "bitmap:int4g64") else 1e-9)


def test_some_rows_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, bf16 = (4096, 512), torch.bfloat16
    names = ("bitmap", "csr16", "bitmap:int8")
    whole = [sizes.planned_bytes(Layout.parse(n), shape, bf16, 0.5).nbytes for n in names]
    monkeypatch.setattr(sizes, "LOOKED_AT", 1 << 15)
    sizes.sampled_mask.cache_clear()
    sizes.planned_bytes.cache_clear()
    some = [sizes.planned_bytes(Layout.parse(n), shape, bf16, 0.5).nbytes for n in names]
    assert len(sizes.sampled_mask(shape, 0.5, "unstructured")) == 64
    sizes.sampled_mask.cache_clear()
    sizes.planned_bytes.cache_clear()
    assert some == pytest.approx(whole, rel=0.01)


@pytest.mark.parametrize("layout", ["bitmap", "csr16", "bitmap:int8"])
def test_bytes_after_are_those_of_the_compiled_model(layout: str) -> None:
    passes = f"wanda(0.5),{REST},lower('{layout}')"
    calibration = [(torch.arange(64)[None] % 64, torch.ones(1, 64, dtype=torch.int64))]
    made = sparsec.compile(model(torch.float32), passes, calibration=calibration)
    graph = made.sparsec.graph
    packed = [w for w in graph.weights.values() if w.packed is not None]
    found = told(passes)
    assert found.pruned_weights == sum(w.numel for w in packed)
    assert found.layouts_after == {layout: len(packed)}
    saved = sum(w.nbytes_dense - w.nbytes for w in packed)
    assert found.bytes_dense - found.bytes_after == pytest.approx(saved, rel=1e-3)
    assert found.bytes_by_layout[layout] == found.bytes_after


def test_auto_packs_what_gains() -> None:
    found = told(f"magnitude(0.9),{REST},lower(auto)")
    assert sum(found.layouts_after.values()) == 14
    assert found.bytes_after <= found.bytes_dense
    assert found.tokens_after >= found.tokens_dense


def test_ranks_share_text_and_solves() -> None:
    one, four = (told(f"sparsegpt(0.5),{REST},lower(bitmap)", ranks=n, sequences=64) for n in (1, 4))
    work = [{(p.spec, p.what): p for p in each.parts} for each in (one, four)]
    for what in ("forward", "forward again"):
        key = ("sparsegpt(0.5)", what)
        assert work[1][key].flops == pytest.approx(work[0][key].flops / 4)
    assert four.footprint.worst is not None
    assert one.footprint.worst is not None
    assert four.footprint.worst.nbytes <= one.footprint.worst.nbytes
    assert one.seconds == sum(part.seconds for part in one.parts)


def test_weights_in_training_are_shared_out_where_that_is_asked_for() -> None:
    whole, shared = (
        told(f"magnitude(0.5),freeze,recover(steps=2, shard={shard})", ranks=4).footprint for shard in (False, True)
    )
    one, other = (next(m.phase.held for m in found.moments if m.phase.what == "training") for found in (whole, shared))
    what = "weights, gradients and moments in training"
    assert other[what] == pytest.approx(one[what] / 4, abs=1)
    assert other["a stretch and its gradients, whole"] > one["a stretch and its gradients, whole"] == 0


def test_flops_are_those_of_the_shapes() -> None:
    (forward,) = (p for p in told("wanda(0.5)", layers=1, sequences=16).parts if p.what == "forward")
    # q, k and v of 256 columns, o, gate and up; attention over 64 tokens; what down_proj makes is not looked at.
    products = 2 * 256 * (256 + 128 + 128 + 256 + 768 + 768)
    attention = 4 * 256 * 64
    assert forward.flops == 16 * 64 * (products + attention)


def test_a_phase_takes_as_long_as_its_parts() -> None:
    known = constants()
    clock, ran = TimeOf(known), list[int]()
    sample = Looked("a sample", lambda: ran.append(1), 3.0)
    first = clock.seconds(Freeze(), Phase("", "", sample=sample))
    count = len(ran)
    assert clock.seconds(Freeze(), Phase("", "", sample=sample)) == first
    assert len(ran) == count
    assert known.bandwidth is not None
    assert clock.seconds(Freeze(), Phase("", "", moved=known.bandwidth)) == pytest.approx(1)
    once, twice = (Phase("", "", attention={Attended(torch.float32, 32, 32, 8): n}) for n in (1e9, 2e9))
    assert 0 < 2 * clock.seconds(Freeze(), once) == pytest.approx(clock.seconds(Freeze(), twice))
    flops = {torch.float32: 2 * clock.rate(torch.float32)}
    assert clock.seconds(Freeze(), Phase("", "", flops=flops)) == pytest.approx(2)


def test_solves_grow_with_rows_and_columns() -> None:
    for p in (Wanda(0.5), SparseGPT(0.5), Round("int8")):
        seconds = solve_seconds(p)
        assert 0 < seconds(256, 256, 256) < seconds(512, 1024, 512) < seconds(4096, 4096, 4096)


@pytest.mark.parametrize(("last", "what"), [("round(int8)", "solving"), ("round(int8, method='nearest')", "rounding")])
def test_rounding_takes_time(last: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsec.planning.times.TRIED", ((32, 32), (64, 32), (32, 64)))
    for ranks in (1, 4):
        found = told(f"magnitude(0.5),{last}", layers=1, ranks=ranks)
        (part,) = (p for p in found.parts if p.what == what)
        assert part.spec == last
        assert part.seconds > 0


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Of a model whose weights nobody has."""
    known = load_model("tiny").model.config
    known.dtype = torch.float32
    known.save_pretrained(tmp_path / "only-config")
    return tmp_path / "only-config"


def test_the_command_plans_from_a_config(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    passes = "wanda(0.5),freeze,lower(bitmap)"
    options = ["--calibration-length", "64", "--passes", passes]
    assert (
        plan.main([str(config / "config.json"), *options, "--memory", "64GB", "--json", str(tmp_path / "plan.json")])
        == 0
    )
    said = capsys.readouterr().out
    assert "LlamaForCausalLM" in said
    assert "14 as bitmap" in said
    assert "fits into 64.00 GB" in said
    facts = json.loads((tmp_path / "plan.json").read_text())
    assert facts["schema"] == plan.SCHEMA
    assert facts["fits"] is True
    assert facts["bytes_after"] == facts["bytes_by_layout"]["bitmap"] < facts["bytes_dense"]
    assert facts["seconds"] == pytest.approx(sum(part["seconds"] for part in facts["parts"]))
    assert plan.main([str(config), *options, "--memory", "1MB"]) == 1
    said = capsys.readouterr().out
    assert "does not fit into 1.00 MB" in said
    assert "give more memory" in said


def test_the_ways_out_of_too_little_memory() -> None:
    solving = told("sparsegpt(0.5)", sequences=4)
    assert "prune with wanda" in plan.that_fits(solving, 1)
    assert "ignore=" in plan.that_fits(solving, 1)
    assert plan.that_fits(solving, solving.footprint.total).startswith("fits")
    assert "does not fit" in plan.that_fits(solving, solving.footprint.total - 1)


@pytest.mark.parametrize(("seconds", "said"), [(1.5, "1.5 s"), (130, "2.2 min"), (9000, "2.5 h"), (200000, "2.3 days")])
def test_times_are_said_in_units_that_fit(seconds: float, said: str) -> None:
    assert plan.duration(seconds) == said


def test_what_is_no_config_is_refused(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "unreachable", lambda: "the hub is away")
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(DataError, match="is no config of a model that transformers knows"):
        shape_of_model(str(odd))
    with pytest.raises(DataError, match=r"holds no config\.json"):
        shape_of_model(str(tmp_path))
    with pytest.raises(DataError, match="there is no such file"):
        shape_of_model("nowhere/config.json")
    known = json.loads((config / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**known, "num_hidden_layers": MOST_PARTS + 1}))
    with pytest.raises(DataError, match="num_hidden_layers is 2,001, and a plan takes 2,000"):
        shape_of_model(str(odd))
    for name, size in (("hidden_size", 0), ("intermediate_size", 0), ("hidden_size", 2**40)):
        (odd / "config.json").write_text(json.dumps({**known, name: size}))
        with pytest.raises(DataError, match=r"this config makes model|hidden_size is 1,099,511,627,776, and a plan"):
            shape_of_model(str(odd))
    many = [str(config), "--passes", "wanda(0.5),freeze,lower(bitmap)", "--calibration-sequences", str(2 * 10**9)]
    for words, said in (
        (many, "2,000,000,000 sequences"),
        ([str(config), "--passes", "nonsense(0.5)"], "nonsense"),
        ([str(config), "--passes", "magnitude(0.5),lower(bitmap)"], "needs 'frozen'"),
        ([str(config), "--memory", "much"], "--memory must be"),
        (["nobody/no-such-model"], "There is no folder or file of this name here, and the hub is away"),
        (["tinny"], "tinny: did you mean `tiny`? There is no folder or file"),
        ([str(tmp_path / "none.gguf")], "none.gguf"),
        ([str(config), "--passes", "mask,freeze"], "a plan does not know"),
    ):
        assert plan.main(words) == 2
        assert said in capsys.readouterr().err


def test_the_small_random_model_is_planned_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    """Regression: it was looked for on the hub."""
    options = ["--passes", "magnitude(0.5),freeze,lower(bitmap)", "--dtype", "bf16"]
    assert plan.main(["tiny", *options, "--json", "-"]) == 0
    facts = json.loads(capsys.readouterr().out)
    made = sparsec.compile(load_model("tiny", torch.bfloat16).model, options[1])
    assert facts["bytes_dense"] == pytest.approx(made.sparsec.report().bytes_dense, rel=1e-3)  # a tied head counts once
    assert facts["layouts_after"] == {"bitmap": 14}


def test_another_dtype_than_that_of_compress_is_said(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = json.loads((config / "config.json").read_text())
    (config / "config.json").write_text(json.dumps({**known, "dtype": "bfloat16"}))
    for options, said in (([], True), (["--dtype", "bf16"], False)):
        assert plan.main([str(config), *options]) == 0
        assert ("sparsec compress then takes --dtype bf16" in " ".join(capsys.readouterr().out.split())) == said


def test_the_dtype_is_the_configs_or_the_one_that_is_asked_for(config: Path) -> None:
    assert shape_of_model(str(config))[0].dtype == torch.float32
    assert shape_of_model(str(config), torch.float16)[0].dtype == torch.float16
    made, name = shape_of_model(str(config))
    assert name == "only-config"
    assert all(p.is_meta for p in made.parameters())
