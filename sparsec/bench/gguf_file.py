"""A dense model as a GGUF file, from its tensors: what llama.cpp reads, without a vocabulary, which timing does not need.

Names of tensors are those that the package gguf maps; the rows of queries and keys are put into the order that llama.cpp's rotary
embedding of `llama` expects, as its own converter does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsec.errors import DataError, MissingExtraError

ARCHITECTURES = {
    "LlamaForCausalLM": "LLAMA",
    "MistralForCausalLM": "LLAMA",
    "Qwen2ForCausalLM": "QWEN2",
    "Qwen3ForCausalLM": "QWEN3",
}
"""Classes of transformers, and what gguf calls them."""
STORED = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_gguf(model: Any, file: Path) -> str:
    """Writes it in the model's own type, and returns the type's name in GGUF.

    DataError for an architecture that is not written; MissingExtraError without gguf.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError('GGUF files need the package gguf; `pip install "sparsec[gguf]"`') from error
    kind, config = type(model).__name__, model.config
    if kind not in ARCHITECTURES:
        raise DataError(f"no GGUF file is written of {kind}; of {', '.join(ARCHITECTURES)} one is")
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type", "default") != "default":
        raise DataError(f"no GGUF file is written of rotary embeddings of the type {rope['rope_type']!r}")
    name = ARCHITECTURES[kind]
    architecture = gguf.MODEL_ARCH[name]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(shared)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    stored = STORED[model.dtype]
    for path, parameter in model.named_parameters():
        there = names.get_name(path, try_suffixes=(".weight", ".bias"))
        if there is None:
            raise DataError(f"no GGUF file is written of {kind}: it has no name for {path}")
        tensor = parameter.detach()
        if name == "LLAMA" and path.rpartition(".")[0].endswith(("q_proj", "k_proj")):
            tensor = _interleaved(tensor, heads if "q_proj" in path else shared)
        if tensor.dim() < 2:
            writer.add_tensor(there, tensor.float().numpy())
        elif stored == "BF16":
            codes = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(there, codes, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(there, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def _interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Rows [heads * width, ...] of the two halves of each head by turns."""
    halves = tensor.view(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)
