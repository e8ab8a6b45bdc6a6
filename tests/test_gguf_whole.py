"""A GGUF file that lacks a weight is refused by the weight's name, and what no module owns in it is named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from sparsec.data import load_model
from sparsec.data.gguf_dense import write_dense
from sparsec.data.tiny import byte_tokenizer
from sparsec.errors import DataError, SparsecWarning

gguf = pytest.importorskip("gguf")

BLOCK = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (32, 32)) | {
    "attn_norm": (32,),
    "ffn_norm": (32,),
}
KINDS: dict[str, dict[str, tuple[int, ...]]] = {
    "llama": {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)},
    "qwen2moe": {
        "ffn_gate_inp": (4, 32), "ffn_gate_exps": (4, 16, 32), "ffn_up_exps": (4, 16, 32), "ffn_down_exps": (4, 32, 16),
        "ffn_gate_inp_shexp": (32,), "ffn_gate_shexp": (24, 32), "ffn_up_shexp": (24, 32), "ffn_down_shexp": (32, 24),
    },
}  # fmt: skip


def written(
    path: Path, kind: str = "llama", without: Sequence[str] = (), more: Sequence[str] = (), blocks: int = 1
) -> Path:
    """A model of one layer with random weights, some of them left out."""
    writer = gguf.GGUFWriter(path, kind)
    for say, number in (
        ("block_count", blocks), ("context_length", 64), ("embedding_length", 32), ("feed_forward_length", 64), ("head_count", 2),
        ("head_count_kv", 2), ("layer_norm_rms_eps", 1e-5), ("rope_freq_base", 10000.0), ("vocab_size", 256), ("bos_token_id", 0),
        ("eos_token_id", 1), ("expert_count", 4), ("expert_used_count", 2),
    ):  # fmt: skip
        getattr(writer, f"add_{say}")(number)
    writer.add_tokenizer_model("gpt2")
    known = byte_tokenizer().get_vocab()
    alphabet = sorted(known, key=known.__getitem__)[:256]
    writer.add_token_list([*alphabet[:255], alphabet[0] + alphabet[1]])
    writer.add_token_types([1] * 256)
    writer.add_token_merges([f"{alphabet[0]} {alphabet[1]}"])
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (256, 32), "output_norm": (32,), "output": (256, 32)}
    shapes |= {f"blk.0.{name}": shape for name, shape in (BLOCK | KINDS[kind]).items()}
    tensors = {f"{name}.weight": shape for name, shape in shapes.items()} | dict.fromkeys(more, (32,))
    if kind == "qwen2moe":
        tensors |= {f"blk.0.attn_{name}.bias": (32,) for name in "qkv"}
    for name in tensors.keys() - set(without):
        writer.add_tensor(name, torch.randn(tensors[name]).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    "name", ["token_embd.weight", "output_norm.weight", "blk.0.attn_q.weight", "blk.0.ffn_down.weight"]
)
def test_a_file_that_lacks_a_weight_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    file = written(tmp_path / "m.gguf", without=[name])
    with pytest.raises(DataError, match=rf"m\.gguf: it lacks {name}, of which LlamaForCausalLM needs each"):
        load_model(file)
    assert (
        list((tmp_path / "cache" / "sparsec" / "models").iterdir()) == []
    )  # the message said to delete a folder there


def test_a_file_without_a_head_is_one_whose_head_is_tied(tmp_path: Path) -> None:
    """So the format has it: what tells the two apart is whether there is one."""
    model = load_model(written(tmp_path / "m.gguf", without=["output.weight"])).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_gate_inp_shexp", "attn_k.bias"])
def test_half_of_the_experts_are_not_zeros_in_silence(name: str, tmp_path: Path) -> None:
    """Regression: transformers puts two tensors together into zeros, and did so where one of them was not there."""
    whole = name if name.endswith("bias") else f"{name}.weight"
    file = written(tmp_path / "m.gguf", "qwen2moe", without=[f"blk.0.{whole}"])
    with pytest.raises(DataError, match=rf"it lacks blk\.0\.{name}"):
        load_model(file)


def test_what_no_module_owns_is_named_and_experts_are_not(tmp_path: Path) -> None:
    file = written(tmp_path / "m.gguf", more=["blk.0.stranger.weight", "rope_freqs.weight"])
    with pytest.warns(
        SparsecWarning, match=r"owns blk\.0\.stranger\.weight, rope_freqs\.weight, so they are not loaded"
    ):
        assert load_model(file).unowned == ("blk.0.stranger.weight", "rope_freqs.weight")
    (tmp_path / "dense").mkdir()
    experts = written(tmp_path / "e.gguf", "qwen2moe", more=["blk.0.stranger.weight"])
    _, left = write_dense(experts, torch.float32, tmp_path / "dense", lambda done, total: None)
    assert left == ["blk.0.stranger.weight"]


def test_a_file_of_more_layers_than_there_can_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="num_hidden_layers is 2,147,483,648, and no model has more than 2,000"):
        load_model(written(tmp_path / "m.gguf", blocks=2**31))


def test_tensors_of_other_sizes_than_the_metadata_say_are_the_files_fault(tmp_path: Path) -> None:
    """Regression: the message said to delete a folder of the cache, which came back at every call."""
    file = written(tmp_path / "m.gguf", "qwen2moe")  # which does not say how wide its experts are
    for _ in range(2):
        with pytest.raises(
            DataError, match=r"m\.gguf: its tensors do not make the model that its metadata say"
        ) as refused:
            load_model(file)
        assert "cache" not in str(refused.value)
        assert list((tmp_path / "cache" / "sparsec" / "models").iterdir()) == []


def test_a_converted_copy_that_was_damaged_is_made_anew(tmp_path: Path) -> None:
    file = written(tmp_path / "m.gguf")
    right = load_model(file).model.state_dict()
    (kept,) = (tmp_path / "cache" / "sparsec" / "models").iterdir()
    for path in kept.glob("*.safetensors"):
        path.unlink()  # the model that was loaded has it mapped
        path.write_bytes(b"damaged")
    again = load_model(file).model.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in right.items())
