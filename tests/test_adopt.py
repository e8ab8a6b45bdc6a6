"""What others pruned: checkpoints of compressed-tensors and dense ones with zeros, read, packed, refused, and nothing dropped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import sparsec
from sparsec.console.output import guarded
from sparsec.data import load_model
from sparsec.data.compressed_tensors import dense_weights, sparse_format
from sparsec.data.tiny import byte_tokenizer, tiny_model
from sparsec.errors import CheckpointError, DataError, SparsecWarning
from sparsec.evaluate.__main__ import main as evaluate

PACK = "zeros,freeze,lower(bitmap)"
SPARSE, TWO_OF_FOUR = "sparse-bitmask", "sparse-24-bitmask"
IDS = torch.arange(24).view(2, 12)


def compressed(weight: Tensor, layout: str) -> dict[str, Tensor]:
    """One weight by the published layout."""
    if layout == TWO_OF_FOUR:
        fours = weight.reshape(-1, 4)
        mask = (
            torch.zeros_like(fours, dtype=torch.bool).scatter_(1, fours.abs().topk(2, 1).indices, True).view_as(weight)
        )
    else:
        mask = weight != 0
    bits = torch.from_numpy(numpy.packbits(mask.numpy(), axis=-1, bitorder="little"))
    counts = mask.sum(-1)
    values, shape = weight[mask], torch.tensor(weight.shape)
    if layout == TWO_OF_FOUR:
        return {"shape": shape.view(-1, 1), "compressed": values.view(len(weight), -1), "bitmask": bits}
    return {"shape": shape, "compressed": values, "bitmask": bits, "row_offsets": torch.cumsum(counts, 0) - counts}


def pruned() -> Any:
    """A tiny model that holds zeros."""
    model = tiny_model(0)
    for name, weight in model.named_parameters():
        if "proj" in name:
            fours = weight.data.view(-1, 4)
            fours[
                torch.zeros_like(fours, dtype=torch.bool).scatter_(
                    1, fours.abs().topk(2, 1, largest=False).indices, True
                )
            ] = 0
    return model


def written(folder: Path, layout: str, spoil: Callable[[dict[str, Tensor]], object] = lambda held: None) -> Path:
    """The tiny model as compressed-tensors saves it, its projections sparse, everything else dense."""
    model = pruned()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    held: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        module = name.removesuffix(".weight")
        parts = compressed(tensor, layout) if "proj" in name else {}
        held |= {f"{module}.{part}": t.contiguous() for part, t in parts.items()} or {name: tensor}
    spoil(held)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_bytes())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "version": "0.14.0",
        "sparsity_config": {"format": layout, "ignore": ["lm_head"], "targets": ["Linear"]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def edit(folder: Path, **changes: Any) -> None:
    """Changes what config.json says of how the weights are stored."""
    config = json.loads((folder / "config.json").read_bytes())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("layout", [SPARSE, TWO_OF_FOUR])
def test_a_checkpoint_of_compressed_tensors_is_read_bit_for_bit(layout: str, tmp_path: Path) -> None:
    want = pruned().state_dict()
    loaded = load_model(written(tmp_path, layout))
    assert layout in loaded.source_precision
    assert loaded.tokenizer is not None
    found = loaded.model.state_dict()
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], want[name]) for name in want)
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    model = sparsec.load(tmp_path, passes=PACK)
    assert len([m for m in model.modules() if isinstance(m, sparsec.SparseLinear)]) == 14
    torch.testing.assert_close(logits(model), logits(pruned()), rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_matrix_comes_back(data: st.DataObject) -> None:
    """NaN, infinities, rows without values, columns that fill no byte."""
    layout = data.draw(st.sampled_from([SPARSE, TWO_OF_FOUR]))
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9)) * (4 if layout == TWO_OF_FOUR else 1)
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    drawn = st.sampled_from([0.0, 0.0, 1.5, -2.0, float("inf"), float("nan"), 6e-8])
    weight = torch.tensor(data.draw(st.lists(drawn, min_size=rows * columns, max_size=rows * columns))).to(dtype)
    weight = weight.view(rows, columns)
    if layout == TWO_OF_FOUR:
        weight = weight.nan_to_num()
        fours = weight.view(-1, 4)
        fours[
            torch.zeros_like(fours, dtype=torch.bool).scatter_(1, fours.abs().topk(2, 1, largest=False).indices, True)
        ] = 0
    found = _read({f"a.{part}": t for part, t in compressed(weight, layout).items()}, layout)["a.weight"]
    assert found.dtype == dtype
    assert torch.equal(found.isnan(), weight.isnan())
    assert torch.equal(found.nan_to_num(), weight.nan_to_num())


def _read(held: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        save_file({name: t.contiguous() for name, t in held.items()}, Path(folder) / "model.safetensors")
        return dense_weights(Path(folder), layout, {})


WEIGHT = torch.tensor([[1.0, 0, 2, 0], [0, 0, 3, 4], [5, 6, 0, 0]])
WRONG: dict[str, tuple[str, dict[str, Tensor | None], str]] = {
    "a bitmask of too few bytes": (
        SPARSE,
        {"bitmask": torch.zeros(2, 1, dtype=torch.uint8)},
        r"bitmask must be uint8 \[3, 1\]",
    ),
    "a bitmask of another dtype": (SPARSE, {"bitmask": torch.zeros(3, 1, dtype=torch.int32)}, "bitmask must be uint8"),
    "a bit more than values": (
        SPARSE,
        {"bitmask": torch.tensor([[7], [12], [3]], dtype=torch.uint8)},
        r"compressed must be \[7\]",
    ),
    "values of two dimensions": (SPARSE, {"compressed": torch.ones(3, 2)}, r"compressed must be \[6\]"),
    "offsets that jump": (SPARSE, {"row_offsets": torch.tensor([0, 3, 4])}, "row_offsets do not follow"),
    "offsets that are negative": (SPARSE, {"row_offsets": torch.tensor([0, 2, -4])}, "row_offsets do not follow"),
    "too few offsets": (SPARSE, {"row_offsets": torch.tensor([0, 2])}, "row_offsets do not follow"),
    "no offsets": (SPARSE, {"row_offsets": None}, "a lacks row_offsets"),
    "no bitmask": (SPARSE, {"bitmask": None}, "a lacks bitmask"),
    "a shape that lies": (SPARSE, {"shape": torch.tensor([4, 4])}, "bitmask must be"),
    "a huge shape": (SPARSE, {"shape": torch.tensor([2**30, 2**30])}, "shape must hold"),
    "a large shape": (SPARSE, {"shape": torch.tensor([2**20, 2**20])}, "bitmask must be"),
    "a negative shape": (SPARSE, {"shape": torch.tensor([-3, -4])}, "shape must hold"),
    "a shape of nothing": (SPARSE, {"shape": torch.zeros(0, dtype=torch.int64)}, "shape must hold"),
    "a shape of fractions": (SPARSE, {"shape": torch.tensor([3.0, 4.0])}, "shape must hold"),
    "quantised values": (SPARSE, {"compressed": torch.ones(6, dtype=torch.int8)}, "which is quantised"),
    "a dense one beside it": (SPARSE, {"weight": WEIGHT}, "both dense and"),
    "three of four": (
        TWO_OF_FOUR,
        {"bitmask": torch.tensor([[7], [8], [3]], dtype=torch.uint8)},
        "two bits set of every four",
    ),
    "one value per row": (TWO_OF_FOUR, {"compressed": torch.ones(3, 1)}, "two values of every four"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_compressed_tensor_that_is_wrong_is_named(case: str) -> None:
    layout, changes, message = WRONG[case]
    parts = {**compressed(WEIGHT, layout), **changes}
    with pytest.raises(DataError, match=message):
        _read({f"a.{part}": t for part, t in parts.items() if t is not None}, layout)


def test_a_weight_of_another_size_than_the_model_has_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    def spoil(held: dict[str, Tensor]) -> None:
        parts = compressed(torch.zeros(8, 8), SPARSE)
        held.update({f"model.layers.0.mlp.up_proj.{part}": t for part, t in parts.items()})

    with pytest.raises(DataError, match=r"up_proj.shape is \[8, 8\], and the model's weight is \[192, 64\]"):
        load_model(written(tmp_path, SPARSE, spoil))


def test_what_compressed_tensors_stores_besides_is_refused_by_name(tmp_path: Path) -> None:
    folder = written(tmp_path, SPARSE)
    edit(folder, format="pack-quantized", config_groups={"group_0": {"weights": {"num_bits": 4}}})
    with pytest.raises(DataError, match=r"quantised \(pack-quantized on top of sparse-bitmask\).*quantised from"):
        sparsec.load(folder)
    for stored, message in (
        ({"sparsity_config": {"format": "marlin-24"}}, "'marlin-24' is none that sparsec reads"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "transformed"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "quantised"),
        ({"sparsity_config": []}, ""),
    ):
        if message:
            with pytest.raises(DataError, match=message):
                sparse_format("x", stored)
        else:
            assert sparse_format("x", stored) == "dense"


def test_shards_of_other_folders_are_not_read(tmp_path: Path) -> None:
    folder = written(tmp_path / "m", SPARSE)
    for name in ("../out.safetensors", "/out.safetensors", 3):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(DataError, match="in its own folder"):
            load_model(folder)


def with_more(folder: Path, more: dict[str, Tensor]) -> Path:
    """The pruned model, and tensors that it has no place for."""
    pruned().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    held = load_file(folder / "model.safetensors") | more
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_tensors_that_no_module_owns_are_named_where_they_are_loaded_and_saved(tmp_path: Path) -> None:
    frequencies = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)
    }  # which transformers leaves out by design
    folder = with_more(tmp_path / "m", {"extra.weight": torch.ones(3), **frequencies})
    with pytest.warns(SparsecWarning, match="owns extra.weight, so it is not loaded"):
        loaded = load_model(folder)
    assert loaded.unowned == ("extra.weight",)
    for model in (sparsec.compile(loaded.model, PACK), None):
        kept: Any = model or sparsec.load(tmp_path / "0")
        kept.save_pretrained(tmp_path / ("0" if model else "1"))
    card = (tmp_path / "1" / "README.md").read_text("utf-8")
    assert "**Not carried over**: `extra.weight`, which" in card


def test_a_head_that_differs_from_the_embedding_it_should_be_tied_to_is_kept(tmp_path: Path) -> None:
    folder = with_more(tmp_path / "m", {"lm_head.weight": torch.randn(257, 64)})
    model = sparsec.compile(load_model(folder).model, PACK)
    model.save_pretrained(tmp_path / "out")
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert torch.equal(logits(sparsec.load(tmp_path / "out")), logits(model))


def test_a_checkpoint_that_nobody_pruned_is_refused_with_the_way_out(tmp_path: Path) -> None:
    tiny_model(0).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"nobody pruned this model.*sparsec\.load\(.*passes="):
        sparsec.load(tmp_path)
    model = sparsec.load(tmp_path, passes="magnitude(0.5),freeze,lower(csr)", dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(CheckpointError, match="packed already, and takes no passes"):
        sparsec.load(tmp_path / "out", passes="zeros")
    with pytest.raises(DataError, match=r"sparsec saved this model.*evaluate"):
        load_model(tmp_path / "out")
    for place in (tmp_path / "nowhere", "tiny-one"):
        with pytest.raises(DataError):
            sparsec.load(place)


def test_a_config_that_names_more_than_the_files_hold_costs_no_memory(tmp_path: Path) -> None:
    folder = with_more(tmp_path, {})
    config = json.loads((folder / "config.json").read_bytes())
    for changes in ({"vocab_size": 10**9}, {"num_hidden_layers": 10**7}):
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(DataError, match=r"the files hold .* bytes; is it whole"):
            sparsec.load(folder)


def test_commands_say_what_no_module_owns_in_a_notice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = with_more(tmp_path / "m", {"extra.weight": torch.ones(3)})
    assert guarded(lambda: load_model(folder) and None) == 0
    assert "notice: " in (said := capsys.readouterr().err)
    assert "extra.weight" in said
    assert ".py:" not in said


@pytest.mark.slow
def test_a_saved_model_is_evaluated_beside_the_dense_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = with_more(tmp_path / "m", {})
    packed = sparsec.compile(load_model(folder).model, PACK)
    packed.save_pretrained(tmp_path / "packed", tokenizer=byte_tokenizer())
    assert (
        evaluate(
            [str(folder), str(tmp_path / "packed"), "--windows", "2", "--length", "32", "--json", str(tmp_path / "j")]
        )
        == 0
    )
    dense, sparse = json.loads((tmp_path / "j").read_bytes())["models"].values()
    assert sparse["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-4)
