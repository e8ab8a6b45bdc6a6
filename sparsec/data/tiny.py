"""A small random language model, for trying things out in seconds and without any file.

It has the shape of a Llama and a tokenizer whose tokens are the 256 bytes, so any text goes in; what it says means
nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:  # which takes longer to import than all else together, so what can be done without it does
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from sparsec.arguments import check_seed

END = "<|end|>"
RANDOM = "random weights"
"""How the source of a model begins that nobody trained."""


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Two layers, 64 wide, tied head. The global random state stays as it was."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=256,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(check_seed(seed))
        return LlamaForCausalLM(config).to(dtype).eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8, and `<|end|>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)} | {END: len(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, model_max_length=1024)
