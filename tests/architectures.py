"""Tiny random models of every architecture that sparsec is tested on, by name.

    model, example = tiny_model("llama")
    model(**example(batch=2, length=5, padded=1))

The same name gives the same weights every time. Vocabulary 64, two or three layers, 32 wide; biases and norms are random too, since
freshly initialised ones (zeros, ones) would hide mistakes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch
import transformers as hf
from torch import Tensor, nn

VOCABULARY = 64


class Example(Protocol):
    """Arguments for one call; `padded` positions are masked out on the left of the first sequence."""

    def __call__(self, batch: int = 2, length: int = 8, padded: int = 0) -> dict[str, Any]: ...


_SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = _SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128}
_MOE = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
_GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_ENCODER = _SIZES | {"intermediate_size": 48, "max_position_embeddings": 128}

CAUSAL_LMS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _LLAMA),
    "llama-tied": ("Llama", _LLAMA | {"tie_word_embeddings": True, "attention_bias": True}),
    "mistral": ("Mistral", _LLAMA | {"sliding_window": 4}),
    "qwen2": ("Qwen2", _LLAMA),
    "qwen3": ("Qwen3", _LLAMA | {"head_dim": 16}),
    "gemma2": ("Gemma2", _LLAMA | {"head_dim": 8, "sliding_window": 4}),
    "gemma3": ("Gemma3", _LLAMA | {"head_dim": 8, "sliding_window": 4}),
    "opt": ("OPT", _SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 128}),
    "gpt-neox": ("GPTNeoX", _ENCODER),
    "gpt2": ("GPT2", _GPT),
    "phi3": ("Phi3", _LLAMA),
    "qwen2-moe": ("Qwen2Moe", _LLAMA | _MOE),
    "mixtral": ("Mixtral", _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "falcon": ("Falcon", _SIZES),
    "bloom": ("Bloom", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "stablelm": ("StableLm", _LLAMA),
    "olmo2": ("Olmo2", _LLAMA),
    "cohere": ("Cohere", _LLAMA),
    "gptj": ("GPTJ", _GPT | {"rotary_dim": 4}),
    "phi": ("Phi", _LLAMA),
    "granite": ("Granite", _LLAMA),
    "smollm3": ("SmolLM3", _LLAMA),
    "mamba": ("Mamba", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
}
"""Name -> (class name before `ForCausalLM`, options of its config)."""

ENCODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertForMaskedLM", _ENCODER),
    "bert-base": ("BertConfig", "BertModel", _ENCODER),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", _ENCODER),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForMaskedLM",
        {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    ),
}
"""Name -> (config class, model class, options)."""

ARCHITECTURES: tuple[str, ...] = (*CAUSAL_LMS, *ENCODERS, "mlp")


def tiny_model(name: str) -> tuple[nn.Module, Example]:
    """A model in eval mode, and a function that makes arguments for it.

    Raises KeyError for a name that is not in ARCHITECTURES.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _BUILDERS.get(name, _hugging_face)(name)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval(), _features if name == "mlp" else _tokens


class Mlp(nn.Module):
    """A plain module: three linears, the last without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 32)
        self.mid = nn.Linear(32, 32)
        self.down = nn.Linear(32, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, 16] -> [batch, 8]."""
        hidden = torch.relu(self.up(x))
        return self.down(torch.relu(self.mid(hidden)))


def _hugging_face(name: str) -> nn.Module:
    logging.getLogger("transformers.configuration_utils").setLevel(logging.ERROR)  # token ids beyond a tiny vocabulary
    if name in CAUSAL_LMS:
        family, options = CAUSAL_LMS[name]
        config_class = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
        config = getattr(hf, config_class)(**_TOKENS | options)
        head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
        model: nn.Module = getattr(hf, family + head)(config)
    else:
        config_class, model_class, options = ENCODERS[name]
        model = getattr(hf, model_class)(getattr(hf, config_class)(**_TOKENS | options))
    return model


def _mlp(name: str) -> nn.Module:
    return Mlp()


_BUILDERS: dict[str, Callable[[str], nn.Module]] = {"mlp": _mlp}


def _tokens(batch: int = 2, length: int = 8, padded: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1000 * batch + length)
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _features(batch: int = 2, length: int = 8, padded: int = 0) -> dict[str, Any]:
    return {"x": torch.randn(batch * length, 16, generator=torch.Generator().manual_seed(batch * length))}
