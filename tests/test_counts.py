"""A config.json that asks for more parts than a model can have is refused by name before transformers makes any of them."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_models import SIZES, saved_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.auto import CONFIG_MAPPING

import sparsec
from sparsec.checkpoint.checking import examine
from sparsec.counts import FEW_PARTS, MOST_PARTS, counts_asked
from sparsec.data import load_model
from sparsec.errors import CheckpointError, DataError

PATIENCE = 20
"""Seconds of a CPU, since a process may be stopped for a while; a refusal takes a thousandth of one."""


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError("transformers was asked")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, PATIENCE)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)


def asked(content: Any, parts: int = 50) -> list[tuple[str, int]]:
    return [(name, most) for name, _, most in counts_asked(content, parts)]


@pytest.mark.parametrize(
    "name",
    [
        *(
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "num_layers",
            "encoder_layers",
            "decoder_layers",
            "num_decoder_layers",
        ),
        *(
            "num_nextn_predict_layers",
            "num_hidden_groups",
            "inner_group_num",
            "block_sizes",
            "altup_num_inputs",
            "depth",
        ),
        *("num_layers_per_stack", "attention_types", "H_cycles", "L_cycles"),
        *(
            "num_block_repeats",
            "blocks_per_stage",
            "n_codes_total",
            "conv_symmetric_num",
            "enc_res2net_scale",
            "num_multimask_outputs",
        ),  # of images and sound
    ],
)
def test_every_number_that_transformers_makes_parts_for_is_known(name: str) -> None:
    """Those for which a config, or a model of it, took all the time or memory that there was."""
    assert asked({name: 2**70}) == [(name, FEW_PARTS)]
    assert asked({name: [2, 2**70]}, 10**9) == [(name, MOST_PARTS)]
    assert asked({"text_config": {"a": [{name: FEW_PARTS + 1}]}}) == [(f"text_config.a.{name}", FEW_PARTS)]
    assert asked({name: FEW_PARTS}) == asked({name: 300}, 300) == asked({"quantization_config": {name: 2**70}}) == []


def test_sizes_and_labels_have_bounds_of_their_own_and_other_numbers_have_none() -> None:
    assert asked({"num_labels": 2**70, "head_dim": 2**40, "hidden_size": 2**25}) == [
        ("hidden_size", 2**24),
        ("head_dim", 2**24),
        ("num_labels", 2**17),
    ]
    towers = {"vision_config": {"image_size": [2**15, 224], "backbone_config": {"blocks_per_stage": [2, 2**40]}}}
    assert sorted(asked(towers)) == [
        ("vision_config.backbone_config.blocks_per_stage", FEW_PARTS),
        ("vision_config.image_size", 2**14),
    ]
    known = {
        "vocab_size": 262_144,
        "max_position_embeddings": 10_485_760,
        "rope_theta": 10**12,
        "sliding_window": 2**31,
    }
    more = {"max_window_layers": 2**20, "num_labels": 21_000, "hidden_size": 16384, "seed": 2**63, "use_cache": True}
    assert asked({**known, **more, "num_experts_per_tok": 2**20, "eos_token_id": [151_645], "block_size": 4096}) == []


WAYS: dict[str, Callable[[Path], Any]] = {
    "sparsec.load": sparsec.load,
    "AutoModelForCausalLM": AutoModelForCausalLM.from_pretrained,
    "AutoModel": AutoModel.from_pretrained,
    "LlamaForCausalLM": LlamaForCausalLM.from_pretrained,
    "AutoConfig": AutoConfig.from_pretrained,
}


@pytest.mark.slow
def test_no_config_of_transformers_asks_for_too_much_by_itself() -> None:
    """Regression: Doge's default of 16,384 experts was refused, so that no saved one loaded."""
    for name, kind in CONFIG_MAPPING.items():
        try:
            content = kind().to_dict()
        except Exception:  # of a config that wants arguments, or another package
            continue
        assert asked(content, MOST_PARTS) == [], name


def changed(folder: Path, changes: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 2**70}, f"num_hidden_layers is {2**70}, and the files hold"),
        ({"num_labels": 2**40}, f"num_labels is {2**40}, and no model has more than 131,072"),
        ({"model_type": "qwen2", "num_hidden_layers": 2**40}, f"num_hidden_layers is {2**40}, and the files hold"),
        ({"model_type": "gpt2", "n_layer": 2**40}, f"n_layer is {2**40}, and the files hold"),
        ({"model_type": "albert", "inner_group_num": 300}, "inner_group_num is 300, and the files hold"),
        ({"model_type": "llava", "text_config": {"num_hidden_layers": 2**40}}, "text_config.num_hidden_layers is"),
        ({"model_type": "llava", "vision_config": {"num_hidden_layers": 2**40}}, "vision_config.num_hidden_layers is"),
        (
            {"model_type": "sam2", "vision_config": {"backbone_config": {"blocks_per_stage": [2**40]}}},
            "blocks_per_stage is",
        ),
        (
            {"model_type": "align", "vision_config": {"num_block_repeats": [2**40]}},
            "vision_config.num_block_repeats is",
        ),
        ({"model_type": "bark", "fine_acoustics_config": {"n_codes_total": 2**40}}, "n_codes_total is"),
        ({"model_type": "clip", "vision_config": {"image_size": 2**20}}, "vision_config.image_size is"),
    ],
    ids=lambda value: next(reversed(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("way", WAYS)
def test_a_saved_model_that_asks_for_more_than_its_files_hold_is_refused_by_name(
    way: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = saved_model("csr16", tmp_path)
    changed(folder, changes)
    with pytest.raises(CheckpointError, match=message) as refused:
        WAYS[way](folder)
    assert str(folder) in str(refused.value)
    assert any(message in fault for fault in examine(folder).faults)


@pytest.mark.parametrize("name", ["num_hidden_layers", "num_labels"])
def test_a_dense_checkpoint_is_looked_at_before_transformers_makes_its_config(name: str, tmp_path: Path) -> None:
    Qwen2ForCausalLM(Qwen2Config(**SIZES)).save_pretrained(tmp_path)
    assert load_model(tmp_path).model.config.num_hidden_layers == 1
    content = json.loads((tmp_path / "config.json").read_bytes())
    content.pop("layer_types", None)  # which a config makes of its number of layers
    (tmp_path / "config.json").write_text(json.dumps({**content, name: 2**40}))
    with pytest.raises(DataError, match=rf"config\.json: {name} is 1,099,511,627,776, and"):
        load_model(tmp_path)


def test_what_a_model_is_computed_with_is_not_chosen_by_a_file(tmp_path: Path) -> None:
    """Such a name may be that of code on the hub, which transformers fetches and runs."""
    folder = saved_model("csr16", tmp_path)
    right = sparsec.load(folder)(torch.arange(4)[None])[0]
    for name in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        changed(folder, {name: "nobody/such-code"})
    loaded: Any = sparsec.load(folder)
    assert loaded.config._attn_implementation == "sdpa"
    assert torch.equal(loaded(torch.arange(4)[None])[0], right)
