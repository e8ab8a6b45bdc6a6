"""Models whose weights two processes hold together: they compute what one does, in every layout, and what cannot be is refused."""

from __future__ import annotations

import copy
import json
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from format_cases import Sized
from processes import TESTS, together
from torch import nn
from transformers.distributed import DistributedConfig

import sparsec
from sparsec.checkpoint.pretrained import save_packed
from sparsec.errors import CheckpointError
from sparsec.kernels import SparseLinear
from sparsec.kernels.modules.group import Group
from sparsec.kernels.modules.packed_layer import HeldShare, PackedLayer
from sparsec.parallel.plan import processes_wanted, split_dims
from sparsec.parallel.shares import processes_of

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
PLAIN = (
    *("csr8", "csr16", "csr32", "bitmap", "bsr16x16", "bsr16x1", "bsr32x32"),
    *("nm1:4", "nm2:4", "nm3:8", "nm4:8", "wcsr8", "wcsr16"),
)
CODED = (
    *("dense:int8", "dense:int8g32", "dense:int4g64", "dense:int4mg64", "bitmap:int8", "bitmap:int4mg64"),
    *("nm2:4:int8", "nm4:8:int4g64", "bsr16x16:int8g64", "csr8:int8", "csr16:int4g64"),
)
FEW = ("bitmap", "dense:int4g64")
"""Of which the rest is slow: a second each."""
COMPILED = {
    "llama-dense": ("Llama", {}, "lower(dense)"),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}, "magnitude(0.5),freeze,fuse,lower(bitmap)"),
    "gemma3": ("Gemma3Text", {"sliding_window": 4}, "magnitude(0.5),freeze,fuse,lower(bitmap)"),
    "gemma3-head": (
        "Gemma3Text",
        {"sliding_window": 4},
        "magnitude(0.5, targets=('lm_head', 'mlp')),freeze,lower('bitmap:int8', targets=('lm_head', 'mlp'))",
    ),
    "qwen2-untied": ("Qwen2", {}, "magnitude(0.5, targets='*'),freeze,fuse,lower(nm)"),
}
HEAD = {"Gemma3Text": "Gemma3ForCausalLM"}
IDS = torch.arange(3, 25).view(2, 11)


def of_family(family: str, **options: Any) -> Any:
    """A small model whose biases and norms are not what they begin as."""
    torch.manual_seed(0)
    config = getattr(hf, f"{family}Config")(**SIZES | options)
    model = getattr(hf, HEAD.get(family, f"{family}ForCausalLM"))(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@cache
def by_hand(name: str) -> nn.Module:
    """A Llama whose linears in the block all have biases and one layout; two groups among them."""
    model = of_family("Llama", attention_bias=True, mlp_bias=True)
    layout = Sized.parse(name)
    for path, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            mask = layout.mask(*module.weight.shape, 0.5, torch.Generator().manual_seed(0))
            layer = SparseLinear(layout.pack(module.weight.detach(), mask), module.bias)
            layer.path = f"model.{path}"
            model.set_submodule(layer.path, layer)
    block = model.model.layers[0]
    attention, mlp = block.self_attn, block.mlp
    for members in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
        group = Group(len(members))
        for i, member in enumerate(members):
            member.join(group, i)
    return model


def saved(folder: Path, model: Any) -> Path:
    """A folder of the model, with what one process computes."""
    model.save_pretrained(folder) if hasattr(model, "sparsec") else save_packed(model, folder)
    one = sparsec.load(folder)
    with torch.no_grad():
        logits = one(input_ids=IDS).logits
    text = one.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0)
    nbytes = sum(m.packed.nbytes for m in one.modules() if isinstance(m, PackedLayer))
    torch.save({"ids": IDS, "logits": logits, "text": text, "nbytes": nbytes}, folder / "expected.pt")
    return folder


def tried(folder: Path, cases: dict[str, Any], ways: tuple[str, ...] = ("read",)) -> dict[str, list[dict[str, Any]]]:
    """What two processes found of each model, split as it is read, and in memory."""
    folders = [saved(folder / name, model) for name, model in cases.items()]
    if "damaged" in cases:
        damage(folder / "damaged")
    told = together(TESTS / "parallel_run.py", *(f"{way}:{place}" for place in folders for way in ways))
    return {name: [each[name] for each in told] for name in told[0]}


def damage(folder: Path) -> None:
    """Writes over what says where the values of one matrix stand."""
    (file,) = folder.glob("*.safetensors")
    held = bytearray(file.read_bytes())
    size = int.from_bytes(held[:8], "little")
    begin, end = json.loads(held[8 : 8 + size])["sparsec.model.layers.0.mlp.down_proj.panel_ptr"]["data_offsets"]
    held[8 + size + begin : 8 + size + end] = b"\x55" * (end - begin)
    file.write_bytes(held)


def assert_alike(name: str, found: list[dict[str, Any]], folder: Path, most: float) -> None:
    whole = torch.load(folder / name.partition(":")[2] / "expected.pt")["nbytes"]
    for each in found:
        assert "refused" not in each, (name, each)
        assert each["error"] < most, name
        assert each["text"], name
        assert not each["faults"], name
        assert whole == 0 or 0.4 * whole < each["nbytes"] < 0.65 * whole, name
        assert each["decoding"] == "2 processes hold its weights, and no program sums what they compute"
        assert "save or unpack the whole model" in each["saving"]
    assert found[0]["error"] == found[1]["error"]


def assert_layouts(folder: Path, names: tuple[str, ...], ways: tuple[str, ...] = ("read",)) -> None:
    for name, found in tried(folder, {n.replace(":", "-"): by_hand(n) for n in names}, ways).items():
        quantised = "int" in name
        assert_alike(name, found, folder, 2e-3 if quantised else 2e-6)
        assert found[0]["groups"] == 5, name
        assert len(found[0]["shares"]) == 5, (name, found[0]["shares"])  # rows of 64, 128, 256 and columns of 128, 256


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    assert_layouts(tmp_path, FEW, ("read", "memory"))


@pytest.mark.slow
@pytest.mark.parametrize("names", [PLAIN, CODED], ids=["plain", "quantised"])
def test_two_processes_compute_what_one_does_in_every_layout(names: tuple[str, ...], tmp_path: Path) -> None:
    assert_layouts(tmp_path, names)


@pytest.mark.slow
def test_compiled_models_with_ties_dense_heads_and_packed_ones(tmp_path: Path) -> None:
    cases = {}
    for name, (family, options, spec) in COMPILED.items():
        if "lower(nm)" in spec:
            spec = spec.replace("magnitude(0.5,", "magnitude(0.5, pattern='2:4',")
        cases[name] = sparsec.compile(of_family(family, **options), spec)
    cases["odd"] = sparsec.compile(
        of_family("Llama", intermediate_size=192), "lower('dense:int4g64', targets=('mlp',))"
    )
    cases["damaged"] = by_hand("bitmap")
    told = tried(tmp_path, cases, ("read", "memory"))
    for each in (*told.pop("read:damaged"), *told.pop("memory:damaged")):
        assert "mlp.down_proj" in each["refused"]
    for each in (*told.pop("read:odd"), *told.pop("memory:odd")):  # that of every process
        assert "mlp.down_proj: dense:int4g64 [128x192]: columns can be cut at multiples of 64" in each["refused"]
    for name, found in told.items():
        assert_alike(name, found, tmp_path, 2e-3 if "head" in name else 2e-6)
        assert found[0]["tied"] == ["llama" not in name and "untied" not in name], name
        assert found[0]["groups"] == (0 if "dense" in name or "head" in name else 5), name


def asked(processes: int, **options: Any) -> Any:
    """A model that transformers is about to split."""
    model = copy.deepcopy(by_hand("bitmap"))
    model.config.distributed_config = DistributedConfig(tp_size=processes, **options)
    return model


def packed_at(layout: str) -> dict[str, Any]:
    return {p: m.packed for p, m in by_hand(layout).named_modules() if isinstance(m, PackedLayer)}


@pytest.mark.parametrize(
    ("layout", "processes", "message"),
    [
        (
            "dense:int4g64",
            4,
            r"o_proj: dense:int4g64 \[128x128\]: columns can be cut at multiples of 64 alone, got 32.*bitmap$",
        ),
        (
            "bsr32x32",
            8,
            r"q_proj: bsr32x32 \[128x128\]: rows can be cut at multiples of 32 alone, got 16, .* more; take a number",
        ),
        (
            "bitmap",
            4,
            r"k_proj: bitmap \[64x128\]: its rows are those of 2 heads, which 4 processes cannot share alike",
        ),
        ("nm4:8", 64, r"nm4:8 \[128x128\]: columns can be cut at multiples of 8 alone, got 2"),
    ],
)
def test_what_cannot_be_split_is_refused_by_name(layout: str, processes: int, message: str) -> None:
    model = asked(processes)
    assert processes_wanted(model) == processes
    layers = {p: m for p, m in packed_at(layout).items() if processes < 64 or p.endswith("o_proj")}
    with pytest.raises(
        CheckpointError, match=rf"^LlamaForCausalLM cannot be split over {processes} processes: .*{message}"
    ):
        split_dims(model, layers, processes)


def test_a_rule_for_dense_layers_alone_is_refused_by_name() -> None:
    model = asked(2, tp_plan={"model.layers.*.mlp.gate_proj": "sequence_parallel"})
    with pytest.raises(
        CheckpointError,
        match=r"mlp\.gate_proj: the plan's rule 'sequence_parallel' is for dense layers alone; keep this",
    ):
        split_dims(model, packed_at("bitmap"), 2)


def test_rules_that_a_user_gives_take_the_place_of_the_models_own() -> None:
    model = asked(2, tp_plan={"model.layers.*.mlp.down_proj": "replicate"})
    dims = split_dims(model, packed_at("bitmap"), 2)
    assert dims["model.layers.0.mlp.down_proj"] is None
    assert dims["model.layers.0.mlp.up_proj"] == 0
    assert dims["model.layers.0.self_attn.o_proj"] == 1
    none = asked(2, tp_plan={})
    assert set(split_dims(none, packed_at("bitmap"), 2).values()) == {None}


@pytest.mark.parametrize("way", ["fsdp_size", "dp_replicate_size", "pp_size"])
def test_other_ways_to_split_a_model_are_refused_by_name(way: str) -> None:
    model = asked(2)
    setattr(model.config.distributed_config, way, 2)
    with pytest.raises(
        CheckpointError, match=rf"{way}=2: .* is split by tensor parallelism alone; give distributed_config"
    ):
        processes_wanted(model)


def test_one_process_keeps_all() -> None:
    model = sparsec.compile(of_family("Llama"), "magnitude(0.5),freeze,lower(bitmap)")
    before = model.sparsec
    assert sparsec.tensor_parallel(model) is model
    assert processes_of(model) == 1
    assert model.sparsec is before


def test_what_is_no_compiled_model_is_not_split() -> None:
    with pytest.raises(CheckpointError, match="Linear: tensor_parallel splits models of transformers"):
        sparsec.tensor_parallel(nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="LlamaForCausalLM is not a compiled model; compile it"):
        sparsec.tensor_parallel(of_family("Llama"))


def test_a_layer_of_a_share_is_copied_with_it() -> None:
    layer: Any = copy.deepcopy(by_hand("bitmap").get_submodule("model.layers.0.mlp.down_proj"))
    share = HeldShare.of_rank((128, 256), 1, 1, 3)
    assert (share.first, share.end) == (86, 172)
    layer.hold_share(share.cut(layer.packed), share)
    assert (layer.out_features, layer.in_features) == (128, 256)
    assert "columns 86 to 171 in this of 3 processes" in repr(layer)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.share == share
        assert torch.equal(twin.packed.unpack(), layer.packed.unpack())
    x = torch.randn(3, 86)
    torch.testing.assert_close(layer(x), x @ layer.packed.unpack().T + layer.bias)
