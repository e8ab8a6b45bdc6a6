"""Saved models: what goes in comes out bit for bit, what is damaged is named, and a save that fails leaves what was there."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from architectures import tiny_model
from format_cases import LAYOUTS, some
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

import sparsec
from sparsec import files
from sparsec.checkpoint.record import BUFFERS, PREFIX, Record
from sparsec.errors import CheckpointError, CompileError, SparsecError
from sparsec.kernels import SparseLinear

SPEC = "magnitude(0.5),freeze,fuse,lower(bitmap)"
ON_CPU = [name for name, case in LAYOUTS.items() if case.kind.format != "wcsr"]


def bits(tensor: Tensor) -> Tensor:
    return (
        tensor.detach().flatten().clone().view(torch.uint8)
        if tensor.numel()
        else tensor.new_empty(0, dtype=torch.uint8)
    )


def same(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(bits(t), bits(two[n])) for n, t in one.items())


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.arange(14).view(2, 7))[0]
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A lowered model, and the folder that it was saved to in several files."""
    model, _ = tiny_model("llama")
    compiled = sparsec.compile(model.eval(), SPEC)
    folder = tmp_path_factory.mktemp("llama")
    compiled.save_pretrained(folder, max_shard_size="40KB")
    return compiled, folder


@pytest.mark.parametrize("name", ON_CPU)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_layout_and_type_comes_back_bit_for_bit(name: str, tmp_path: Path, data: st.DataObject) -> None:
    case = LAYOUTS[name]
    dtype = data.draw(st.sampled_from(case.kind.dtypes))
    packed, dense = some(
        case, data.draw(st.integers(0, 40)), data.draw(st.integers(0, 40)), 0.5, dtype, data.draw(st.integers(0, 9))
    )
    bias = torch.randn(len(dense)).to(dtype) if data.draw(st.booleans()) else None
    model = nn.Sequential(nn.Identity(), SparseLinear(packed, bias))
    sparsec.save(model, tmp_path)
    fresh = nn.Sequential(nn.Identity(), nn.Linear(dense.shape[1], len(dense), bias=bias is not None, device="meta"))
    loaded = sparsec.load(tmp_path, into=fresh)
    assert loaded is fresh
    assert same(loaded, model)
    x = torch.randn(3, dense.shape[1]).to(dtype)
    assert torch.equal(bits(loaded(x)), bits(model(x)))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert-base"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_of_transformers_loads_both_ways(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, _ = tiny_model(architecture)
    compiled = sparsec.compile(model.eval().to(dtype), SPEC)
    compiled.save_pretrained(tmp_path)
    right = outputs(compiled)
    auto = AutoModel if architecture == "bert-base" else AutoModelForCausalLM
    for loaded in (sparsec.load(tmp_path), auto.from_pretrained(tmp_path)):
        assert type(loaded) is type(model)
        assert torch.equal(outputs(loaded), right)
        assert same(loaded, compiled)
        grouped = [m for m in loaded.modules() if isinstance(m, SparseLinear) and m._group is not None]
        assert len(grouped) == sum(isinstance(m, SparseLinear) and m._group is not None for m in compiled.modules())
        assert [p["spec"] for p in loaded.sparsec.passes] == [r.spec for r in compiled.sparsec.records]


def test_a_loaded_model_is_saved_as_it_was(llama: tuple[nn.Module, Path], tmp_path: Path) -> None:
    compiled, folder = llama
    first = copy.deepcopy(sparsec.load(folder))
    first.save_pretrained(tmp_path)
    twin = copy.deepcopy(compiled)
    twin.save_pretrained(tmp_path / "again")
    assert same(sparsec.load(tmp_path / "again"), compiled)
    second = sparsec.load(tmp_path)
    assert same(second, compiled)
    assert second.sparsec.passes == first.sparsec.passes
    with pytest.raises(CompileError, match="lowered"):
        sparsec.extend(second, "lower(csr)")


def test_every_tensor_is_stored_once_under_a_name_that_no_dense_model_has(
    llama: tuple[nn.Module, Path],
) -> None:
    compiled, folder = llama
    names = []
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names += list(file.keys())
    assert len(names) == len(set(names))
    assert all(n.startswith((PREFIX, BUFFERS)) for n in names)
    tied = json.loads((folder / "config.json").read_bytes())["quantization_config"]["tied"]
    assert len(names) + len(tied) >= len(compiled.state_dict())
    assert "import sparsec" in (folder / "README.md").read_text()


def test_a_save_that_fails_anywhere_leaves_the_old_model(
    llama: tuple[nn.Module, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, _ = llama
    old = nn.Sequential(nn.Linear(3, 5))
    sparsec.save(old, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    put = files.put_in_place
    for at in range(20):
        calls = iter(range(100))

        def failing(made: Path, path: Path, calls: Any = calls, at: int = at) -> None:
            if next(calls) == at:
                raise OSError(28, "No space left on device")
            put(made, path)

        monkeypatch.setattr(files, "put_in_place", failing)
        told = ""
        try:
            sparsec.save(compiled, tmp_path, max_shard_size="40KB")
        except CheckpointError as error:
            told = str(error)
        if not told:
            assert at > 3
            break
        assert "No space left on device" in told
        assert same(sparsec.load(tmp_path, into=nn.Sequential(nn.Linear(3, 5))), old)
        assert not list(tmp_path.glob(".*.tmp"))
    record = Record.read(json.loads((tmp_path / "config.json").read_bytes())["quantization_config"], "")
    assert {p.name for p in tmp_path.glob("*.safetensors")} == set(record.files)
    assert len(list(tmp_path.glob("*.index.json"))) == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"


SPOIL: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("method", lambda q: q.update(quant_method="gptq"), "quant_method must be 'sparsec', got 'gptq'"),
    ("schema", lambda q: q.update(schema="sparsec.checkpoint/9"), "load it with the version that saved it"),
    ("layout", lambda q: first(q).update(layout="os.system"), "is none that is known"),
    ("order", lambda q: first(q).update(order=1), "must be 2, got 1"),
    ("scalars", lambda q: first(q)["scalars"].update(out_features=-1), "must be a whole number from 0"),
    ("shape", lambda q: first(q)["tensors"].update(values=["float32", [7]]), "in config.json"),
    ("dtype", lambda q: first(q)["tensors"].update(values=["complex64", [7]]), "must be a dtype and a shape"),
    ("no text", lambda q: first(q)["tensors"].update(values=[["float32"], [7]]), "must be a dtype and a shape"),
    ("bias", lambda q: first(q).update(bias="float32"), "bias is not in the files"),
    ("layer", lambda q: q["layers"].update({"model.nowhere": first(q)}), "has no such module"),
    ("group", lambda q: q.update(groups=[["model.norm", "lm_head"]]), "groups must name packed linears"),
    ("two groups", lambda q: q.update(groups=q["groups"] * 2), "groups must name packed linears, each once"),
    ("packed and dense", lambda q: q.update(dense_kernels=[next(iter(q["layers"]))]), "or packed, or named twice"),
    (
        "overflow",
        lambda q: first(q)["tensors"].update(values=["float32", [2**61, 8]]),
        "a shape that a tensor can have",
    ),
    ("packs nothing", lambda q: first(q).update(layout="dense"), "dense packs nothing"),
    ("dense", lambda q: q.update(dense_kernels=["model.norm"]), "which is no linear"),
    ("tied", lambda q: q.update(tied={"lm_head.weight": "nothing"}), "is tied to nothing"),
    ("climb", lambda q: q.update(files={"../x.safetensors": {}}), "in the folder itself"),
    ("absent", lambda q: q.update(files={"x.safetensors": {"bytes": 1}}), "cannot be read"),
]


def first(q: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(iter(q["layers"].values()))
    return found


@pytest.mark.parametrize(("what", "spoil", "message"), SPOIL, ids=[s[0] for s in SPOIL])
def test_a_record_that_is_wrong_is_named(
    what: str,
    spoil: Callable[[dict[str, Any]], Any],
    message: str,
    llama: tuple[nn.Module, Path],
    tmp_path: Path,
) -> None:
    folder = copied(llama[1], tmp_path)
    content = json.loads((folder / "config.json").read_bytes())
    spoil(content["quantization_config"])
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as caught:
        sparsec.load(folder)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, and the files hold"),
        ({"hidden_size": -1}, "no LlamaForCausalLM can be made of it|no config of a model"),
        ({"hidden_size": 2**40}, "hidden_size is 1099511627776, and no model has more than 16,777,216"),
        ({"architectures": ["Path"]}, "transformers has no 'Path'"),
        ({"model_type": "os"}, "no config of a model that transformers knows"),
    ],
)
def test_sizes_and_classes_of_a_config_are_not_believed(
    sizes: dict[str, Any], message: str, llama: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    folder = copied(llama[1], tmp_path)
    content = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps({**content, **sizes}))
    with pytest.raises(CheckpointError, match=message):
        sparsec.load(folder)


def test_what_does_not_fit_leaves_the_module_as_it_was(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    saved = sparsec.compile(model, "magnitude(0.5, targets='*'),freeze,lower(csr)", example_inputs=torch.ones(2, 8))
    sparsec.save(saved, tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        right = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    spoilt: list[dict[str, Tensor | None]] = [
        {f"{PREFIX}0.weight": torch.zeros(16, 8)},  # which the packed layer has no use for
        {f"{PREFIX}1.weight": torch.zeros(16, dtype=torch.int32)},
        {f"{PREFIX}1.weight": torch.zeros(15)},
        {f"{PREFIX}1.bias": None},
        {f"{PREFIX}nobody": torch.zeros(1)},
    ]
    for change in spoilt:
        save_file({k: t for k, t in {**right, **change}.items() if t is not None}, path)
        content = json.loads((tmp_path / "config.json").read_bytes())
        content["quantization_config"]["files"][path.name]["bytes"] = path.stat().st_size
        (tmp_path / "config.json").write_text(json.dumps(content))
        into = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))
        before = copy.deepcopy(into)
        with pytest.raises(CheckpointError):
            sparsec.load(tmp_path, into=into)
        assert [type(m) for m in into] == [type(m) for m in before]
        assert same(into, before)


def test_transformers_converts_to_the_dtype_that_is_asked_for(llama: tuple[nn.Module, Path]) -> None:
    compiled, folder = llama
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert same(loaded, copy.deepcopy(compiled).to(torch.bfloat16))


def test_a_packed_matrix_of_two_modules_is_one_again(tmp_path: Path) -> None:
    model, _ = tiny_model("llama")
    attention = model.model.layers[0].self_attn
    attention.v_proj.weight = attention.k_proj.weight
    compiled = sparsec.compile(model, SPEC)
    compiled.save_pretrained(tmp_path)
    for loaded in (sparsec.load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        inside = loaded.model.layers[0].self_attn
        assert inside.v_proj.values is inside.k_proj.values
        assert same(loaded, compiled)
        assert torch.equal(outputs(loaded), outputs(compiled))


class Odd(nn.Module):
    """Buffers that no state dict has, and one that is a part of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(4, 4)
        self.register_buffer("part", self.inside.weight.detach()[:2])
        self.register_buffer("places", torch.arange(5), persistent=False)


def test_buffers_of_every_kind_come_back(tmp_path: Path) -> None:
    model = Odd()
    model.places += 7
    sparsec.save(model, tmp_path)
    loaded = sparsec.load(tmp_path, into=Odd())
    assert same(loaded, model)
    assert torch.equal(loaded.places, model.places)


def test_no_file_of_somebody_else_is_removed(tmp_path: Path) -> None:
    (tmp_path / "mine.safetensors").write_text("mine")
    sparsec.save(nn.Linear(2, 3), tmp_path)
    content = json.loads((tmp_path / "config.json").read_bytes())
    content["quantization_config"]["files"]["mine.safetensors"] = {"bytes": 4}
    (tmp_path / "config.json").write_text(json.dumps(content))
    sparsec.save(nn.Linear(2, 4), tmp_path)
    assert (tmp_path / "mine.safetensors").read_text() == "mine"
    assert len(list(tmp_path.glob("model-*"))) == 2
    (tmp_path / "config.json").write_text("[" * 100_000)
    sparsec.save(nn.Linear(2, 5), tmp_path)
    assert sparsec.load(tmp_path, into=nn.Linear(2, 5)).out_features == 5


def test_saves_into_one_folder_take_turns(tmp_path: Path) -> None:
    """Each removes what the one before wrote: side by side one could remove what the other has just named."""
    models = [nn.Linear(3, 3) for _ in range(4)]

    def often(model: nn.Module) -> None:
        for _ in range(5):
            sparsec.save(model, tmp_path)

    threads = [Thread(target=often, args=(m,)) for m in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    loaded = sparsec.load(tmp_path, into=nn.Linear(3, 3))
    assert any(same(loaded, m) for m in models)
    assert len(list(tmp_path.glob("model-*"))) == 2


def copied(folder: Path, to: Path) -> Path:
    """A copy of a saved model."""
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_bytes_give_an_error_or_a_valid_model(tmp_path: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(ON_CPU))
    packed, dense = some(LAYOUTS[name], 16, 32, 0.5, torch.float32, data.draw(st.integers(0, 3)))
    sparsec.save(nn.Sequential(SparseLinear(packed)), tmp_path)
    path = data.draw(st.sampled_from([tmp_path / "config.json", *sorted(tmp_path.glob("*.safetensors"))]))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        model = sparsec.load(tmp_path, into=nn.Sequential(nn.Linear(dense.shape[1], len(dense), bias=False)))
    except SparsecError:
        return
    finally:
        for left in tmp_path.iterdir():
            left.unlink()
    model[0].packed.check()
    model(torch.zeros(2, dense.shape[1]))


def test_what_cannot_be_saved_is_named(llama: tuple[nn.Module, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="weight is on meta"):
        sparsec.save(nn.Linear(2, 2, device="meta"), tmp_path)
    with pytest.raises(CheckpointError, match="max_shard_size must be"):
        sparsec.save(nn.Linear(2, 2), tmp_path, max_shard_size="much")
    with pytest.raises(CheckpointError, match="could not be written"):
        sparsec.save(nn.Linear(2, 2), "/proc/nowhere")
    for size in ("9" * 400 + "GB", "²GB", "-1GB", "0GB"):
        with pytest.raises(CheckpointError, match="max_shard_size must be"):
            sparsec.save(nn.Linear(2, 2), tmp_path, max_shard_size=size)
    with pytest.raises(CheckpointError, match=r"wrap it in nn\.Sequential"):
        sparsec.save(SparseLinear(some(LAYOUTS["csr8"], 8, 8, 0.5, torch.float32)[0]), tmp_path)
    with pytest.raises(CompileError, match="a part of a compiled model"):
        llama[0].model.save_pretrained(tmp_path)


@pytest.mark.slow
def test_transformers_finds_it_whoever_is_imported_first(llama: tuple[nn.Module, Path]) -> None:
    folder = llama[1]
    for lines in ("import sparsec, transformers", "import transformers, sparsec"):
        code = f"{lines}\nm = transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})\nprint(m.sparsec)"
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], capture_output=True, text=True, env=dict(os.environ), check=False
        )
        assert "packed layers" in done.stdout, done.stderr[-2000:]
    code = f"import transformers\ntransformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, env=dict(os.environ), check=False
    )
    assert "MISSING" in done.stdout + done.stderr
