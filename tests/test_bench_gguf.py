"""The GGUF file that peers read: every tensor stands in it, as transformers reads it back, or the model is refused."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsec.bench import gguf_file
from sparsec.data.tiny import tiny_model
from sparsec.errors import DataError


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_rows_of_a_head_are_interleaved(heads: int, half: int, columns: int, bias: bool) -> None:
    shape = (heads * 2 * half,) if bias else (heads * 2 * half, columns)
    given_rows = torch.arange(torch.Size(shape).numel()).view(shape)
    found = gguf_file._interleaved(given_rows, heads)
    for head in range(heads):
        for i in range(half):
            first = head * 2 * half
            assert torch.equal(found[first + 2 * i], given_rows[first + i])
            assert torch.equal(found[first + 2 * i + 1], given_rows[first + half + i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_file_holds_the_model(dtype: torch.dtype, tmp_path: Path) -> None:
    """As transformers reads it back: it has its own code for the names, and for the order of rows."""
    from transformers import AutoModelForCausalLM

    model = tiny_model().to(dtype)
    stored = gguf_file.write_gguf(model, tmp_path / "m.gguf")
    kinds = {t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if len(t.shape) > 1}
    assert kinds == {stored}
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    back = dict(read.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(back[name], parameter.float()), name


@pytest.mark.parametrize(("kind", "width"), [("Mistral", 16), ("Qwen2", 8), ("Qwen3", 128)])
@pytest.mark.parametrize("tied", [True, False])
def test_architectures_keep_every_tensor(kind: str, width: int, tied: bool, tmp_path: Path) -> None:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_()  # biases too
    gguf_file.write_gguf(model, tmp_path / "m.gguf")
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    back = dict(read.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(back[name], parameter), name


def test_rotary_embeddings_that_are_scaled_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    model.config.rope_parameters = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    with pytest.raises(DataError, match="rotary embeddings of the type 'yarn'"):
        gguf_file.write_gguf(model, tmp_path / "m.gguf")
