"""Models by name that need no download: known architectures with random weights, and the shapes of their linear layers.

Sizes from the models' published configurations.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from sparsec.data.quiet import quiet
from sparsec.errors import SpecError

SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
OPT = {
    "vocab_size": 50272,
    "hidden_size": 768,
    "ffn_dim": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 2048,
}
PYTHIA = {
    "vocab_size": 50304,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "max_position_embeddings": 2048,
}
LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm2-135m": ("LlamaConfig", SMOLLM2),
    "opt-125m": ("OPTConfig", OPT),
    "pythia-410m": ("GPTNeoXConfig", PYTHIA),
    "llama-7b": ("LlamaConfig", LLAMA),
}
"""By name: a class of transformers, and its sizes."""
STD = 0.02


def config(name: str, layers: int | None = None) -> Any:
    """A configuration of transformers; `layers` in place of the model's own number. SpecError for a name not known."""
    if name not in CONFIGS:
        raise SpecError(f"there is no model {name!r} built in; known are {', '.join(CONFIGS)}")
    import transformers

    kind, sizes = CONFIGS[name]
    return getattr(transformers, kind)(**sizes if layers is None else {**sizes, "num_hidden_layers": layers})


def on_meta(name: str, layers: int | None = None) -> nn.Module:
    """The model without values."""
    import transformers

    with torch.device("meta"), quiet():
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config(name, layers))
    return model


def shapes(name: str) -> dict[tuple[int, int], int]:
    """(out, in) of every distinct linear layer, in order of execution, with how often the model has it; lm_head included."""
    linears = (m for m in on_meta(name).modules() if isinstance(m, nn.Linear))
    return dict(Counter((m.out_features, m.in_features) for m in linears))


def random_model(
    name: str, dtype: torch.dtype, layers: int | None = None, seed: int = 0, device: torch.device | str = "cpu"
) -> Any:
    """In eval mode, matrices normal with a deviation of 0.02, which times do not depend on."""
    import transformers
    from transformers.initialization import no_init_weights

    with quiet(), no_init_weights(), torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config(name, layers), dtype=dtype)
        model.tie_weights()  # which is left out together with the initial values
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, STD, generator=generator)
            else:
                parameter.fill_(0.0 if path.endswith("bias") else 1.0)
    return model.eval()
