"""How a model decodes, in words: by a program, or what stood in its way."""

from __future__ import annotations

import itertools

from torch import nn

from sparsec.program.decoder import WRAPPED, StepForward

NATIVE = "one native call a token"


def told_decoding(model: nn.Module) -> str | None:
    """Of a model as it is now; None where no program is wanted: of encoders, and what is not lowered, in training or on a GPU.

    Prepares the program where none is yet, which takes as long as some tokens.
    """
    known = (vars(model).get(name) for name in ("forward", WRAPPED))
    forward = next((each for each in known if isinstance(each, StepForward)), None)
    devices = {t.device.type for t in itertools.chain(model.parameters(), model.buffers())}
    if any("_hf_hook" in vars(m) for m in model.modules()):  # of accelerate: what is on meta comes when it is called
        devices.discard("meta")
    if forward is None or model.training or devices - {"cpu"}:
        return None
    reason = forward.reason()
    return f"the model's own code, no native call: {reason}" if reason else NATIVE
