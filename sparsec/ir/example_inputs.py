"""What a model is called with while it is traced: the user's tensors, or a padded batch of tokens for a Hugging Face model.

Sizes of 1 are avoided, since torch.export takes a size of 1 for a constant. Values do not matter to a trace, only shapes and
dtypes do.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsec.errors import TraceError
from sparsec.ir.names import is_plain
from sparsec.ir.parts import advice, has_towers, is_encoder_decoder, is_hugging_face, shows_itself
from sparsec.ir.parts import arguments as arguments_of

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


def example_call(model: nn.Module, example_inputs: ExampleInputs | None) -> Call:
    """The call to trace.

    `example_inputs` is a tensor, a tuple of tensors or a dict by argument name; a Hugging Face model that takes `input_ids` needs
    none. Raises TraceError on a model of several parts, on missing inputs and on inputs that `forward` does not take.
    """
    name = type(model).__name__
    if is_encoder_decoder(model):
        raise TraceError(
            f"{name} is an encoder-decoder model, which is not traced as a whole: causal LMs, encoders and plain modules are; "
            f"{advice(model)}; a decoder needs example_inputs with the encoder's states, too"
        )
    if example_inputs is None and has_towers(model):
        raise TraceError(f"{name} is made of several models, which no one call shows to a trace; {advice(model)}")
    parameters = arguments_of(model)
    if example_inputs is not None:
        arguments = _by_name(model, example_inputs)
    elif shows_itself(model):
        arguments = _tokens(model, parameters) if "input_ids" in parameters else _pixels(model)
    else:
        inside = advice(model)
        first = getattr(model, "main_input_name", None)
        known = f"{{{first!r}: tensor}}" if first in parameters else "(tensor, ...) or a dict by argument name"
        raise TraceError(
            f"{name}: what to call it with is not known; give example_inputs={known}{f'; {inside}' if inside else ''}"
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


def _pixels(model: nn.Module) -> dict[str, Any]:
    """A batch of two square images."""
    some, config = next(model.parameters()), cast(Any, model.config)
    channels, size = getattr(config, "num_channels", 3), config.image_size
    return {"pixel_values": torch.zeros(BATCH, channels, size, size, dtype=some.dtype, device=some.device)}


def _by_name(model: nn.Module, example_inputs: ExampleInputs) -> dict[str, Any]:
    name = type(model).__name__
    signature = inspect.signature(model.forward)
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    if not isinstance(example_inputs, tuple | list | Mapping):
        raise TraceError(
            f"{name}.forward{signature} does not take these example inputs: give a tensor, or a tuple or dict of tensors, got "
            f"{type(example_inputs).__name__}"
        )
    try:
        args, kwargs = ((), example_inputs) if isinstance(example_inputs, Mapping) else (example_inputs, {})
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        named = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())
        inside = advice(model) or ("give a dict by argument name" if named and not kwargs else "")
        raise TraceError(
            f"{name}.forward{signature} does not take these example inputs: {error}{f'; {inside}' if inside else ''}"
        ) from error
    arguments: dict[str, Any] = {}
    for key, value in bound.arguments.items():
        kind = signature.parameters[key].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            raise TraceError(
                f"{name}.forward takes its inputs as *{key}; give them names: a forward with one argument per input"
            )
        arguments |= value if kind is inspect.Parameter.VAR_KEYWORD else {key: value}
    for key, value in arguments.items():
        if not isinstance(key, str) or "." in key or not is_plain(key):
            raise TraceError(
                f"{name}: the example input {key!r} has a name that no argument in Python can have; rename it"
            )
        if not isinstance(value, (Tensor, *_CONSTANTS)):
            raise TraceError(
                f"{name}: example input {key!r} must be a tensor or a plain constant, got {type(value).__name__}; "
                f"{advice(model) or 'wrap the model in a module whose forward takes tensors'}"
            )
        if isinstance(value, Tensor) and value.layout is not torch.strided:
            raise TraceError(f"{name}: example input {key!r} is a {value.layout} tensor; give a dense one, .to_dense()")
    return arguments
