"""The dense weight of a packed layer, for reading: every write to it raises, since it would reach the packed values never.

It is a tensor of its own, unpacked at every access. Whatever shares its memory (`.data`, `.detach()`, `.T`, `[0]`) refuses writes
too, numpy's view is read-only, and every other result (`.clone()`, sums, products) is a plain tensor. A write is told by torch's
own counter of versions, and by its shape, so that no list of operators has to be complete.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsec import private
from sparsec.errors import WeightError
from sparsec.private import pytree


def write_error(layer: str) -> WeightError:
    """The error of a write to the weight of a packed layer."""
    return WeightError(
        f"{layer or 'SparseLinear'}: weight is for reading: the layer is lowered and holds packed values, and what is written "
        "here would be lost; merge adapters and change weights before lowering (extend the pruned model again), or work on "
        "weight.clone()"
    )


class WeightView(Tensor):
    """A dense weight that raises WeightError when it is written to."""

    _layer: str
    _is_hf_initialized = True  # transformers, which initialises what a file lacks, leaves it alone

    @staticmethod
    def of(dense: Tensor, layer: str) -> Tensor:
        """dense [out, in], seen as the weight of the layer of that name."""
        view = dense.as_subclass(WeightView)
        object.__setattr__(view, "_layer", layer)
        return view

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # which follows no versions
            with private.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        views = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, WeightView)]
        with private.DisableTorchFunctionSubclass():
            before = [_state(view) for view in views]
            result = func(*args, **kwargs)
            for view, state in zip(views, before, strict=True):
                if _state(view) != state or view.requires_grad:
                    raise write_error(view._layer)
            if type(result) in (tuple, list):
                return type(result)(_guarded(each, views) for each in result)
            return _guarded(result, views)

    def __setattr__(self, name: str, value: Any) -> None:
        # `weight.requires_grad = False` and `weight.grad = None` change nothing, and freezing a model does them everywhere.
        # Autograd itself sets `_backward_hooks`.
        changes = name != "_backward_hooks" and not (
            (name == "requires_grad" and value is False) or (name == "grad" and value is None)
        )
        if changes:
            raise write_error(self._layer)
        super().__setattr__(name, value)

    def set_(self, *args: Any, **kwargs: Any) -> Tensor:
        """Of this write torch tells no subclass, and the next three raise no counter."""
        raise write_error(self._layer)

    apply_ = map_ = map2_ = set_

    def _plain(self) -> Tensor:
        with private.DisableTorchFunctionSubclass():
            return self.clone()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self._plain()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._plain().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self._plain().__dlpack__(*args, **kwargs)


def _state(view: Tensor) -> tuple[Any, ...]:
    """What a write changes; the counter stays where `t_` gives a tensor another shape."""
    return view._version, view.shape, view.stride()


def _guarded(result: Any, views: list[WeightView]) -> Any:
    """A result that shares a view's memory, guarded as the view is."""
    if isinstance(result, np.ndarray):
        result.flags.writeable = False
    elif isinstance(result, Tensor) and result.layout == torch.strided:
        if private.is_functorch_wrapped_tensor(result):
            return result
        memory = result.untyped_storage()._cdata
        for view in views:
            if view.untyped_storage()._cdata == memory:
                return WeightView.of(result, view._layer)
    return result
