"""Models whose weights are no plain tensors in memory: quantised, offloaded or scripted by other libraries. Known by the names of
their classes, so that none of those libraries is needed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

_QUANTISERS = (
    "aqlm",
    "auto_gptq",
    "awq",
    "bitsandbytes",
    "compressed_tensors",
    "eetq",
    "gptqmodel",
    "hqq",
    "optimum.quanto",
    "torch.ao.nn.quantized",
    "torchao",
    "vptq",
)
"""Packages whose modules and tensors hold quantised weights."""
_QUANTISED = (
    "Linear4bit",
    "Linear8bitLt",
    "QuantLinear",
    "WQLinear",
    "HQQLinear",
    "CompressedLinear",
    "FP8Linear",
    "BitLinear",
)
"""How the classes of such modules begin, wherever they come from."""


def refusal(model: nn.Module) -> str:
    """Why there is nothing to prune in a model as it is, and the way out; "" where its weights are plain."""
    return _scripted(model) or _offloaded(model) or _quantised(model)


def _scripted(model: nn.Module) -> str:
    path = next((p for p, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)), None)
    if path is None:
        return ""
    return f"{path or 'the model'} is a TorchScript module, which has no graph to work on; give the nn.Module that it was made from"


def _offloaded(model: nn.Module) -> str:
    """By accelerate: a hook brings the weights of a module when it is called."""
    for path, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        if any(getattr(h, "offload", False) for h in (hook, *getattr(hook, "hooks", ()))):
            return (
                f"the weights of {path or 'the model'} are offloaded by accelerate, and not in memory where they could be pruned; "
                "load the model whole, from_pretrained(..., device_map='cpu'), or, where it was offloaded after loading, bring "
                "them back with accelerate.hooks.remove_hook_from_submodules(model)"
            )
    return ""


def _quantised(model: nn.Module) -> str:
    for path, module in model.named_modules():
        kind = next(_foreign_types(module), None)
        if kind is None and getattr(module, "quantization_scheme", None) is not None:
            kind = "compressed-tensors layer"
        if kind is not None:
            return (
                f"{path or 'the model'} is quantised (a {kind}): sparsec prunes plain floating-point weights; compile the model "
                "before it is quantised, or load it unquantised"
            )
    return ""


def _foreign_types(module: nn.Module) -> Iterator[str]:
    """Names of the classes, of a module and of the tensors that it holds itself, that hold quantised weights."""
    held: list[nn.Module | Tensor] = [
        t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None
    ]
    # bitsandbytes' StableEmbedding is one whose optimiser is told apart
    table = (
        isinstance(module, nn.Embedding) and type(module.weight) is nn.Parameter and module.weight.is_floating_point()
    )
    for value in held if table else [module, *held]:
        if kind := quantised_kind(value):
            yield kind


def quantised_kind(value: nn.Module | Tensor) -> str:
    """The class of a module or a tensor that holds quantised weights, with its library; "" for every other."""
    kind = type(value)
    for base in kind.__mro__:
        origin = f"{base.__module__}."
        if origin.startswith(tuple(f"{name}." for name in _QUANTISERS)) or base.__name__.startswith(_QUANTISED):
            return f"{kind.__module__.partition('.')[0]} {kind.__name__}"
    return ""
