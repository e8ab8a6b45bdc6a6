"""A model whose weights stay in their files gives the bits and the report of one that is loaded, for whatever passes do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from pass_cases import EXAMPLES
from streamed import differing, in_memory, saved, streamed, text, told

import sparsec
from sparsec.data import load_model
from sparsec.memory import held, is_own
from sparsec.spill import Spill

BLOCKS = "magnitude(0.5),freeze,recover(method='blocks', steps=2)"
PIPELINES = (
    "magnitude(0.5),freeze,sparsity,flops,fuse,lower(auto)",
    "magnitude(0.5, pattern='block:8x2', scope='layer'),freeze,lower(bsr8x2)",
    "zeros,magnitude(0.3, scope='row'),freeze,magnitude(pattern='2:4'),freeze,lower('nm2:4')",
    "wanda(0.5, allocation='owl'),freeze,lower(bitmap)",
    "wanda(0.5, allocation='sensitivity', feed='dense'),freeze,lower(bitmap)",
    "sparsegpt(0.5, order='true', allocation='alphapruning'),freeze,lower(auto, objective='bytes')",
    "magnitude(0.5),admm,freeze,recover(steps=2),lower(bitmap)",
    "wanda(0.5),sparsegpt(0.7),freeze,round('int8'),lower(csr, values='int8')",
    "wanda(0.5),freeze,recover(method='blocks', steps=2, values='int8'),lower(csr, values='int8')",
)
"""Every pass that keeps something in a store, and most ways that it has."""
MORE = (
    *(example for _, example in EXAMPLES if "minutes" not in example and example != "mask"),
    "wanda(0.5, allocation='global'),freeze,lower(bitmap)",
    "admm(0.5, order='true'),freeze,lower(bitmap)",
    "wanda(0.5),sparsegpt(0.7),freeze,round('int8'),recover(steps=1),lower(csr, values='int8')",
    "wanda(0.5),freeze,recover(method='norms', steps=2),freeze,lower(bitmap)",
    "magnitude(0.5),freeze,recover(steps=4, regrow='rigl', regrow_every=2),freeze,lower(bitmap)",
)
LEARNT = ("wanda(0.5),freeze,sparsity,fuse,lower(bitmap)", "wanda(0.5, order='true'),freeze", BLOCKS)
"""Solves are not among them: a Gram matrix may differ in its last bit where activations lie at another multiple of 8 bytes."""
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, None),
]


def equal(folder: Path, spill: Path, passes: str, dtype: torch.dtype | None = torch.float32) -> None:
    learning = {"calibration": text()} if sparsec.Pipeline.parse(passes).learning else {}
    held = in_memory(folder, passes, dtype, **learning)
    mapped = streamed(folder, spill, passes, dtype, **learning)
    assert differing(held, mapped) == []
    assert told(held) == told(mapped)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("passes", [*PIPELINES, *(pytest.param(each, marks=pytest.mark.slow) for each in MORE)])
def test_whatever_passes_do_the_bits_are_those_of_a_model_in_memory(passes: str, llama: Path, tmp_path: Path) -> None:
    equal(llama, tmp_path, passes)


LAYOUTS = ("dense", "csr8", "csr16", "csr32", "bitmap", "bsr16x1", "bsr8x4", "nm2:4", "nm1:4", "nm3:8")
VALUES = ("int8", "int8g64", "int4g64", "int4mg64", "auto")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_comes_back_from_its_file(layout: str, llama: Path, tmp_path: Path) -> None:
    pattern = f", pattern='{layout[2:]}'" if layout.startswith("nm") else ""
    equal(llama, tmp_path, f"magnitude({pattern[2:] or '0.5'}),freeze,lower('{layout}')")


@pytest.mark.slow
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("layout", ["csr16", "bitmap", "nm2:4", "dense"])
def test_every_codec_comes_back_from_its_file(layout: str, values: str, llama: Path, tmp_path: Path) -> None:
    pattern = "pattern='2:4'" if layout == "nm2:4" else "0.5"
    equal(llama, tmp_path, f"magnitude({pattern}),freeze,lower('{layout}', values='{values}', bound=1.0)")


NAMES = [name for name in ARCHITECTURES if name != "mlp"]
ALL_DTYPES = ("llama", "mixtral", "bert")
"""Of the others each has one pair, in turn: what a dtype changes is the same code for all."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtypes"),
    [
        pytest.param(name, dtypes, id=f"{name}-{dtypes}")
        for turn, name in enumerate(NAMES)
        for place, dtypes in enumerate(DTYPES)
        if name in ALL_DTYPES or place == turn % len(DTYPES)
    ],
)
def test_of_every_architecture_and_dtype(name: str, dtypes: Any, tmp_path: Path) -> None:
    stored, computed = dtypes
    folder = saved(name, tmp_path / "model", stored)
    for number, passes in enumerate(LEARNT):
        equal(folder, tmp_path / str(number), passes, computed)


@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "bert"])
def test_merged_and_tied_weights_and_encoders_of_another_dtype(name: str, tmp_path: Path) -> None:
    equal(saved(name, tmp_path / "model", torch.bfloat16), tmp_path / "spill", LEARNT[0])


def test_every_weight_is_mapped_and_every_file_is_known(tmp_path: Path) -> None:
    """Regression: of files whose weights transformers merges none was known, so that nobody saw them change."""
    for name in ("mixtral", "llama-tied"):
        folder = saved(name, tmp_path / name)
        loaded = load_model(folder, spill=Spill.of(tmp_path / f"spill of {name}"))
        assert not [n for n, p in loaded.model.named_parameters() if is_own(p)]
        assert {path.name for path in loaded.files} == {path.name for path in folder.glob("*.safetensors*")}
        assert not [n for n, m in loaded.model.named_modules() if "forward" in vars(m) or hasattr(m, "_hf_hook")]
        assert not hasattr(loaded.model, "hf_device_map")
    loaded.model.load_state_dict({name: torch.zeros_like(t) for name, t in loaded.model.state_dict().items()})
    again = load_model(folder).model
    assert all(bool(p.any()) for p in again.parameters()), "a write went into the files"


def test_a_checkpoint_without_its_head_is_loaded_as_what_it_is(tmp_path: Path) -> None:
    """Regression: the first class that lacks weights ended it, and the body was never tried."""
    folder = saved("bert-base", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertForSequenceClassification"]}))
    held, mapped = load_model(folder), load_model(folder, spill=Spill.of(tmp_path / "spill"))
    assert type(held.model) is type(mapped.model)
    assert held.notes == mapped.notes != ()
    assert differing(held.model, mapped.model) == []


def test_a_tensor_without_bytes_takes_none_of_another_away() -> None:
    """Regression: mapped from one file both begin at one place, and only the first was counted."""
    memory = torch.zeros(64, dtype=torch.uint8).untyped_storage()
    module = torch.nn.Module()
    module.register_buffer("none", torch.empty(0, dtype=torch.uint8).set_(memory[:0], 0, (0,)))
    module.register_buffer("some", torch.empty(0, dtype=torch.uint8).set_(memory[:32], 0, (32,)))
    assert held(module).buffers == 32
