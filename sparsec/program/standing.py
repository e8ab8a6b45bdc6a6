"""What a program was made from, and whether it still is that.

Asked before every token, so it has to be quick: modules and tensors are compared as whole dictionaries. What else a module keeps
is looked at only in modules of other packages, as adapters are, which switch what they do; in all modules, and in configurations,
where a text begins.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsec import private
from sparsec.kernels.modules.packed_layer import PackedLayer

_VERSION = attrgetter("_version")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_CAPTURING = "transformers.utils.output_capturing"
"""Whose hooks collect hidden states where these are asked for, and stay."""
_IMPLEMENTATION = "_attn_implementation_internal"
"""Where a configuration of transformers keeps the name of a way to compute attention."""
_KNOWN = frozenset(("sparsec", "torch", "transformers"))
"""Packages whose modules do the same from their making on."""


class AsItStood:
    """What a program was made from: modules, tensors, ways of attention, and no hooks."""

    def __init__(self, model: nn.Module) -> None:
        self._held: list[dict[str, Any]] = []
        self._hooks: list[dict[int, Any]] = []
        self._modules: list[dict[str, Any]] = []
        self._forwards: list[Any] = []  # of their classes
        self._foreign: list[dict[str, Any]] = []
        self._configs: dict[int, dict[str, Any]] = {}
        for module in model.modules():
            own = vars(module)
            config = getattr(own.get("config"), "__dict__", {})
            if _IMPLEMENTATION in config:
                self._configs[id(config)] = config
            if module is not model:
                self._modules.append(own)
                self._forwards.append(type(module).forward)
                self._hooks += [own[name] for name in _HOOKS]
                if type(module).__module__.partition(".")[0] not in _KNOWN:
                    self._foreign.append(own)
            self._held += [place for place in (module._modules, module._parameters, module._buffers) if place]
        self._known = [dict(place) for place in self._held]
        self._single = [
            (place, name, value)
            for place in self._held
            for name, value in place.items()
            if isinstance(value, Tensor) and value.numel() == 1
        ]
        # Nobody must have written to the tensors that say where packed values stand.
        packed = [module for module in model.modules() if isinstance(module, PackedLayer)]
        trusted = [t for module in packed for name, t in module._buffers.items() if name != "values" and t is not None]
        self._places = [tensor for tensor in trusted if not tensor.is_inference()]
        self._versions = sum(map(_VERSION, self._places))  # which only grow
        self._attentions = self.attentions()
        self._options = [_options(own) for own in self._foreign]
        self._unhooked = -1  # how many hooks there had been when there was none
        self._root = vars(model)
        self._numbers = self._numbers_now()
        self._kinds = self._kinds_now()

    def attentions(self) -> list[Any]:
        """The names of the model's ways to compute attention."""
        return [config[_IMPLEMENTATION] for config in self._configs.values()]

    def held(self) -> bool:
        """Whether everything stands where it stood."""
        try:
            same = self._held == self._known  # by identity first, and so without looking at numbers
        except RuntimeError:  # two tensors that are not one are compared, and have several numbers
            return False
        return (
            same
            and sum(map(_VERSION, self._places)) == self._versions
            and all(place[name] is value for place, name, value in self._single)
            and self.attentions() == self._attentions
            and [_options(own) for own in self._foreign] == self._options
        )

    def same_numbers(self) -> bool:
        """Whether modules and configurations keep the plain numbers, an epsilon say, that they kept."""
        return self._numbers_now() == self._numbers

    def _numbers_now(self) -> list[dict[str, Any]]:
        return [_options(own) for own in (self._root, *self._modules, *self._configs.values())]

    def same_kinds(self) -> bool:
        """Whether tensors have the dtypes and devices that they had, and forwards are patched, or in training, as they were."""
        return self._kinds_now() == self._kinds

    def _kinds_now(self) -> set[Any]:
        return {self.patched()} | {
            (value.device.type, value.dtype)
            for place in self._held
            for value in place.values()
            if isinstance(value, Tensor)
        }

    def patched(self) -> bool:
        """Whether a module inside has a forward of its own, or is in training."""
        if self._root["training"]:
            return True
        return any(
            own["training"] or ("forward" in own and getattr(own["forward"], "__func__", None) is not forward)
            for own, forward in zip(self._modules, self._forwards, strict=True)
        )  # hooks of accelerate that are taken off leave the class's own behind

    def hooked(self) -> bool:
        """Whether a module inside has hooks, or all modules; not those that transformers leaves behind, which do nothing here."""
        count = RemovableHandle.next_id  # of all hooks that this process ever had
        if count == self._unhooked:
            return False
        if not any(self._hooks):
            if _hooks_of_all():
                return True
            self._unhooked = count
            return False
        hooks = [hook for own in self._hooks for hook in own.values()]
        return any(getattr(hook, "__module__", "") != _CAPTURING for hook in hooks) or _hooks_of_all()


def _options(own: dict[str, Any]) -> dict[str, Any]:
    """What a module keeps beside modules, tensors and hooks, such that a change of it is seen."""
    return {name: _frozen(value) for name, value in own.items() if isinstance(value, _SIMPLE) and name not in _PARTS}


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _frozen(each) for key, each in value.items() if isinstance(each, _SIMPLE)}
    return [_frozen(each) for each in value if isinstance(each, _SIMPLE)] if isinstance(value, list | tuple) else value


_SIMPLE = (bool, int, float, str, list, tuple, dict, type(None))
_PARTS = frozenset(vars(nn.Module())) - {"training"}


def _hooks_of_all() -> bool:
    return bool(private.global_hooks())  # type: ignore[no-untyped-call]
