"""A model that is freed like any other, and that its `.sparsec` can still save when nobody holds it any more."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from sparsec.errors import CheckpointError

OWN = ("sparsec", "save_pretrained", "push_to_hub", "forward")
"""What sparsec adds to a compiled or loaded model; it leads back to the model."""


class ModelReference:
    """Holds the parts of a model, and the model weakly: strongly it would be a circle, and its memory would wait for the collector.

    Python lets go of the model in `compile(model).save_pretrained(folder)` before it saves: then a model of the same parts is made.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._kind = type(model)
        self._parts = {name: part for name, part in vars(model).items() if name not in OWN}

    @property
    def knows_parts(self) -> bool:
        """Whether the model can be had when it is gone. Not of one that a copy or a pickle is still making."""
        return bool(self._parts)

    def __call__(self) -> nn.Module:
        """The model, or one of its parts. CheckpointError for one that came out of a pickle, whose parts came after this."""
        model = self._model()
        if model is None:
            if not self._parts:
                raise CheckpointError(
                    f"the {self._kind.__name__} of this pickle is gone; keep it while its .sparsec is used"
                )
            model = self._kind.__new__(self._kind)
            vars(model).update(self._parts)
            hooks: list[Any] = list(model._load_state_dict_pre_hooks.values())
            for hook in hooks:
                if getattr(hook, "with_module", False):  # it is called with the model, which it knew weakly
                    hook.module = weakref.ref(model)
        return model
