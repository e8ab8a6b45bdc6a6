"""What a model is called with while it is traced: the user's tensors, or a padded batch of tokens for a Hugging Face model.

Sizes of 1 are avoided, since torch.export takes a size of 1 for a constant. Values do not matter to a trace, only shapes and
dtypes do.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsec.errors import TraceError

BATCH, LENGTH = 2, 8
ExampleInputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
_CONSTANTS = (bool, int, float, str, type(None))


@dataclass(frozen=True, eq=False)
class Call:
    """Arguments of one call, all by name; constants become part of the graph, tensors become its inputs."""

    arguments: dict[str, Any]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The arguments that become inputs of the graph."""
        return {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}


def is_hugging_face(model: nn.Module) -> bool:
    """Whether the model has a config and tells its output embeddings: the protocol of transformers' models."""
    return hasattr(model, "config") and callable(getattr(model, "get_output_embeddings", None))


def example_call(model: nn.Module, example_inputs: ExampleInputs | None) -> Call:
    """The call to trace.

    `example_inputs` is a tensor, a tuple of tensors or a dict by argument name; a Hugging Face model that takes `input_ids` needs
    none. Raises TraceError on an encoder-decoder model, on missing inputs and on inputs that `forward` does not take.
    """
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise TraceError(
            f"{name} is an encoder-decoder model, which is not traced as a whole: causal LMs, encoders and plain modules are. "
            f"Trace its encoder alone: trace(model.get_encoder())"
        )
    parameters = inspect.signature(model.forward).parameters
    if example_inputs is not None:
        arguments = _by_name(model, example_inputs)
    elif is_hugging_face(model) and "input_ids" in parameters:
        arguments = _tokens(model, parameters)
    else:
        raise TraceError(
            f"{name}: what to call it with is not known; give example_inputs=(tensor, ...) or a dict by argument name"
        )
    if is_hugging_face(model):
        fixed = {"use_cache": False, "return_dict": True}
        arguments |= {k: v for k, v in fixed.items() if k in parameters and k not in arguments}
    call = Call(arguments)
    if not call.tensors:
        raise TraceError(
            f"{name}: example inputs hold no tensor, so there is nothing to trace; got {sorted(arguments)}"
        )
    return call


def _tokens(model: nn.Module, parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """A batch of two sequences, the second one padded on the left."""
    device = next(model.parameters()).device
    vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    ids = torch.arange(BATCH * LENGTH, device=device).reshape(BATCH, LENGTH) % vocabulary
    arguments: dict[str, Any] = {"input_ids": ids}
    if "attention_mask" in parameters:
        mask = torch.ones_like(ids)
        mask[1, : LENGTH // 4] = 0
        arguments["attention_mask"] = mask
    return arguments


def _by_name(model: nn.Module, example_inputs: ExampleInputs) -> dict[str, Any]:
    name = type(model).__name__
    signature = inspect.signature(model.forward)
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    try:
        args, kwargs = ((), example_inputs) if isinstance(example_inputs, Mapping) else (example_inputs, {})
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TraceError(f"{name}.forward{signature} does not take these example inputs: {error}") from error
    arguments: dict[str, Any] = {}
    for key, value in bound.arguments.items():
        kind = signature.parameters[key].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            raise TraceError(
                f"{name}.forward takes its inputs as *{key}; give them names: a forward with one argument per input"
            )
        arguments |= value if kind is inspect.Parameter.VAR_KEYWORD else {key: value}
    for key, value in arguments.items():
        if not isinstance(value, (Tensor, *_CONSTANTS)):
            raise TraceError(
                f"{name}: example input {key!r} must be a tensor or a plain constant, got {type(value).__name__}; "
                f"wrap the model in a module whose forward takes tensors"
            )
    return arguments
