"""What every module over a packed matrix has in common: buffers that move, load, pickle and copy as one whole matrix."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from sparsec import private
from sparsec.errors import FormatError, SparsecWarning
from sparsec.formats.base import Packed
from sparsec.formats.layout import Layout, for_device
from sparsec.formats.seen import NOTHING, LookedAt, look_at, recall, remember, unsound
from sparsec.kernels.modules.loading import loadable, unpickled
from sparsec.kernels.modules.weight_view import WeightView, write_error


@dataclass(frozen=True)
class HeldShare:
    """What a process holds of a matrix that several hold together: some of its rows (dim 0) or columns (dim 1)."""

    dim: int
    first: int
    end: int
    processes: int

    @classmethod
    def of_rank(cls, shape: tuple[int, int], dim: int, rank: int, processes: int) -> Self:
        """As torch.chunk splits: all have as many, but for the last ones."""
        each = -(-shape[dim] // processes)
        first = min(each * rank, shape[dim])
        return cls(dim, first, min(first + each, shape[dim]), processes)

    def cut(self, packed: Packed) -> Packed:
        """Of the whole matrix. FormatError where its layout cannot be cut there."""
        return (packed.cut_columns if self.dim else packed.cut_rows)(self.first, self.end)

    def sizes(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Of the share of a matrix of these."""
        held = self.end - self.first
        return (out_features, held) if self.dim else (held, in_features)

    def __str__(self) -> str:
        return (
            f"{'columns' if self.dim else 'rows'} {self.first} to {self.end - 1} in this of {self.processes} processes"
        )


class PackedLayer(nn.Module):
    """Holds a packed matrix [out_features, in_features] as buffers, under the names that the format gives them.

    `weight` is for reading, and a write to it raises WeightError. Modules that hold the same tensors stay so, whatever becomes of
    one of them.
    """

    in_features: int
    out_features: int
    format: str
    bias: nn.Parameter | None
    share: HeldShare | None = None
    """What is held here of a matrix of these sizes, where other processes hold the rest."""
    path: str = ""
    """Of the module in its model, for messages."""
    follow: partial[Packed] | None = None
    """Told of a new packed matrix, for a type of device; gives the one to hold. A copy of the module alone tells nobody, a copy of
    a compiled model its own graph."""

    takes_place_of: type[nn.Module]
    """The class of the dense layer that stood here."""

    _before: str = ""
    """The parameters of the layout that it had on another device."""
    _seen: LookedAt = NOTHING
    """What of its tensors was looked at."""

    def _hold(self, packed: Packed, bias: nn.Parameter | None) -> None:
        """As a new module: nn.Module's own `__init__` comes before."""
        self.out_features, self.in_features = packed.shape
        self._take(packed)
        self.register_parameter("bias", bias)
        self._parameters["weight"] = None  # torch.nn.utils look for it here, and meet the errors of this class then

    def _take(self, packed: Packed) -> None:
        """Holds a packed matrix of this module's size in place of any before."""
        for name in self.__dict__.get("_names", ()):
            self._buffers.pop(name, None)
        self.format = packed.format
        self._packed_type = type(packed)
        self._op = self._operator(packed)
        self._names = tuple(packed.tensors())
        self._scalars = packed.scalars()
        self._scalar_args = tuple(self._scalars.values())
        for name, tensor in packed.tensors().items():
            self.register_buffer(name, tensor)
        self.__dict__["_seen"] = recall(packed)

    def check(self) -> None:
        """FormatError, naming the layer and the tensor, unless it holds a valid matrix of its sizes.

        Reads contents where they were changed since somebody looked. Every product asks for it.
        """
        layer = self.path or type(self).__name__
        for name in self._names:
            if not isinstance(held := self._buffers.get(name), Tensor):
                raise unsound(layer, self._packed_type.title, f"{name} must be a tensor, got {held!r}")
        packed = self.packed
        seen = look_at(packed, layer)
        sizes = self.out_features, self.in_features
        wanted = sizes if self.share is None else self.share.sizes(*sizes)
        if packed.shape != wanted:
            why = f"{', '.join(self._names)} must form a matrix {list(wanted)}, got {list(packed.shape)}"
            raise unsound(layer, self._packed_type.title, why)
        self.__dict__["_seen"] = seen

    def _check_quickly(self) -> None:
        """The same where they are what they were when it was asked last, in a third of a microsecond."""
        buffers = self._buffers
        try:
            for name, number, version, place in self._seen.marks:
                tensor: Any = buffers.get(name)
                if id(tensor) != number or tensor._version != version or tensor.data_ptr() != place:
                    break
            else:
                return
        except RuntimeError:  # of a tensor that has no version, or no memory
            pass
        self.check()

    def let_go(self) -> None:
        """Holds no matrix until `hold_share` gives it one."""
        for name in self._names:
            self._buffers.pop(name, None)

    def hold_share(self, packed: Packed, share: HeldShare | None) -> None:
        """Holds a share of the matrix, whose sizes stay those of this module; None: packed is the whole."""
        self.follow = None  # a graph tells of the whole
        self._take(packed)
        self.share = share

    def _operator(self, packed: Packed) -> private.OpOverload:
        """The one that `forward` calls."""
        raise NotImplementedError

    def lay_out(self, device: str) -> None:
        """Packs the matrix again where a type of device has kernels for another format: CSR becomes warp CSR on "cuda"."""
        packed = self.packed
        fitting = for_device(packed, device, self._before)
        if fitting is not packed:
            self._before = Layout.of(packed).parameters
            self._take(fitting if self.follow is None else self.follow(fitting, device))

    @property
    def packed(self) -> Packed:
        """The packed matrix; shares the buffers."""
        tensors = {n: t for n in self._names if (t := self._buffers[n]) is not None}
        return self._packed_type.from_parts(tensors, self._scalars)

    @property
    def weight(self) -> Tensor:
        """The dense matrix [out, in], unpacked at every access, for reading. WeightError for what writes to it.

        Under torch.compile and torch.export it is a plain tensor.
        """
        if torch.compiler.is_compiling():
            return self.packed.unpack()
        self._check_quickly()
        # Not in inference mode, whose tensors do not tell that they were written to.
        with torch.inference_mode(False), torch.no_grad():
            dense = self.packed.unpack()
        return WeightView.of(dense, self.path) if type(dense) is Tensor else dense

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise write_error(self.path)
        if name in self.__dict__.get("_names", ()) and (
            not isinstance(value, Tensor) or isinstance(value, nn.Parameter)
        ):
            why = f"{name} must be a tensor, and no Parameter, got {type(value).__name__}"
            raise unsound(self.path or type(self).__name__, self._packed_type.title, why)
        if name == "_hf_hook" and any(map(_leaves_buffers, (value, *getattr(value, "hooks", ())))):
            warnings.warn(
                "accelerate offloads layers whose packed weights are buffers, and keeps these on the device that computes; give it "
                "offload_buffers=True, and they are offloaded too",
                SparsecWarning,
                stacklevel=2,
            )
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        """WeightError for the weight and for the packed tensors: a parametrisation would take them away to compute them anew."""
        if name == "weight" or name in self._names:
            raise write_error(self.path)
        super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """WeightError for a weight, and for what pruning and normalising utilities make of one (`weight_orig`, `weight_g`)."""
        if name.split("_")[0] == "weight":
            self._parameters["weight"] = None  # torch.nn.utils.weight_norm has taken it out by now
            raise write_error(self.path)
        super().register_parameter(name, param)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`.to()` and friends, in place as for parameters: who shares a packed tensor (a tied layer, the graph) follows.

        Then the matrix is laid out for the device that it is on.
        """
        self._check_quickly()
        packed = self.packed
        self._check_dtype(fn(packed.values.new_empty(0, dtype=packed.dtype)).dtype)
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers.update(self.packed.ordered().tensors())
        self._keep(before)
        values = self._buffers["values"]
        if type(values) is Tensor:  # not one that only pretends to have contents
            self.lay_out(values.device.type)
        return self

    def _check_dtype(self, dtype: torch.dtype) -> None:
        known, held = self._packed_type.dtypes, self.packed.dtype
        if dtype != held and dtype not in known:
            raise FormatError(
                f"{self.path or type(self).__name__}: {self._packed_type.title} holds {', '.join(map(_plain, known))}, and cannot "
                f"be converted to {_plain(dtype)}; take the model back with .to({held}), or convert the original and compile it "
                "with lower(csr), which holds float64 too"
            )

    def admit(self, state: Mapping[str, Any], prefix: str, assign: bool) -> dict[str, Tensor]:
        """What a state has for this module's packed tensors, by key. FormatError unless it is a valid matrix that fits."""
        return loadable(self.path or prefix[:-1], self.packed, self._parameters.get("bias"), state, prefix, assign)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], *rest: Any
    ) -> None:
        """Loads a whole valid matrix or raises FormatError. `assign=True` puts new tensors in place of the packed ones; who shares
        them follows here too."""
        admitted = self.admit(state_dict, prefix, bool(local_metadata.get("assign_to_params_buffers", False)))
        before = dict(self._buffers)
        # Plain tensors: a Parameter that is assigned to a buffer's name would become a parameter.
        errors: list[str] = rest[-1]
        told = len(errors)
        super()._load_from_state_dict({**state_dict, **admitted}, prefix, local_metadata, *rest)
        self._keep(before)
        looked_at = all(type(tensor) is Tensor and not tensor.is_meta for tensor in admitted.values())
        if admitted and looked_at and len(errors) == told:
            self.__dict__["_seen"] = remember(self.packed)

    def _keep(self, before: Mapping[str, Tensor | None]) -> None:
        """Gives the tensors held before the contents of those held now, and holds them again."""
        for name, old in before.items():
            new = self._buffers[name]
            if new is old or old is None or new is None:
                continue
            if private.same_kind(old, new):  # not between meta and a real device
                old.data = new.data
                torch.autograd.graph.increment_version(old)
                self._buffers[name] = old

    def __getstate__(self) -> dict[str, Any]:
        # Operators cannot be pickled; the format names ours.
        kept = {k: v for k, v in self.__dict__.items() if k not in ("_op", "_seen", "follow")}
        return {**kept, "order": self._packed_type.order}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """FormatError, before a kernel reads any of it, for a state that is no valid matrix of a known format."""
        packed = unpickled(state)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._names = packed.tensor_names
        self._take(packed)
        if type(packed.values) is Tensor:  # not one that only pretends to have contents
            self.lay_out(packed.values.device.type)


def _leaves_buffers(hook: Any) -> bool:
    """Whether a hook of accelerate offloads parameters alone."""
    return bool(getattr(hook, "offload", False)) and not getattr(hook, "offload_buffers", True)


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
