"""How a model decodes, in words: by a program, or what stood in its way."""

from __future__ import annotations

import itertools

from torch import nn

from sparsec.program.decoder import StepForward

NATIVE = "one native call a token"


def told_decoding(model: nn.Module) -> str | None:
    """Of a model as it is now; None where no program is wanted: of encoders, and what is not lowered, in training or on a GPU.

    Prepares the program where none is yet, which takes as long as some tokens.
    """
    forward = vars(model).get("forward")
    tensors = itertools.chain(model.parameters(), model.buffers())
    if not isinstance(forward, StepForward) or model.training or any(t.device.type != "cpu" for t in tensors):
        return None
    reason = forward.reason()
    return f"the model's own code, no native call: {reason}" if reason else NATIVE
