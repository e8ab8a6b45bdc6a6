"""Products of one x in one call, at run time: the first module of a group computes all, the others take their result.

Why so: the model's own code calls its linears one by one, and it must go on to do so for hooks, copies and `generate()` to work.

A result is taken only by a module that is called in the same thread with the very same tensor object at the same version,
while its own tensors are the ones that were multiplied, at their versions. In every other case, an order of calls that
nobody foresaw included, a module computes its own product: grouping changes the speed, never the result. So also
- where gradients are recorded, under autocast, on other devices than the CPU, and without the native library;
- under torch.inference_mode: its tensors have no version, so that nobody could tell whether x was written to meanwhile
  (`generate()` runs under no_grad and is served);
- under torch.compile; torch.export sees one operator, as the graph has it.

Writes that torch's version counter does not see (through `x.data`, numpy, another library) are not seen here either.
"""

from __future__ import annotations

import threading
import weakref
from operator import is_
from typing import Any

import torch
from torch import Tensor

from sparsec.kernels.dense import native_serves
from sparsec.kernels.fused import NAME, fused_linear


class Grouped:
    """Base, beside nn.Module, of the modules that can stand in a group."""

    _group: Group | None = None
    _index = 0

    def part(self) -> tuple[list[Tensor], tuple[int, ...]]:
        """What the module multiplies by, as `fused_linear` takes it: (tensors with the bias, layout)."""
        raise NotImplementedError

    def join(self, group: Group, index: int) -> None:
        """Makes this module the group's member at `index`."""
        self._group = group if group.join(index, self) else None
        self._index = index

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        if (
            self._group is not None
        ):  # a new one where the module is copied or loaded, this very one in copy.copy(module)
            self.join(self._group, self._index)


class _Held:
    """Results of one call that wait for their modules."""

    __slots__ = ("entries", "version", "waiting", "x")

    def __init__(self, x: Tensor, version: int, entries: list[Any]) -> None:
        # By index of the member: (result, the tensors it was computed from, their versions); None once taken.
        self.entries = entries
        self.version = version
        self.waiting = len(entries) - 1
        # Nobody can ask for them once x is gone, as after an exception between the calls.
        self.x = weakref.ref(x, lambda _: entries.clear())


class _Slot(threading.local):
    held: _Held | None = None


class Group:
    """Modules that are given the same x, in order of execution; knows them weakly and owns no tensors.

    A copy is empty. The copies of the modules join it, so that a copied model has groups of its own, and a module that is
    copied or pickled by itself computes by itself.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._members: list[weakref.ref[Grouped] | None] = [None] * size
        self._slot = _Slot()

    def join(self, index: int, member: Grouped) -> bool:
        """Makes a module the group's member at `index`; False where another one is."""
        known = self._members[index]
        if known is not None and known() not in (None, member):
            return False
        self._members[index] = weakref.ref(member)
        return True

    def product(self, index: int, member: Grouped, x: Tensor) -> Tensor | None:
        """The product of one member with x; None where it has to compute it by itself."""
        if torch.compiler.is_compiling():
            traced = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
            return self._go(index, member, x) if traced else None
        if torch.is_grad_enabled() or x.is_inference() or torch._C._is_any_autocast_enabled():
            return None
        if index == 0 and not (x.is_cpu and native_serves(NAME)):
            return None
        return self._go(index, member, x)

    def _go(self, index: int, member: Grouped, x: Tensor) -> Tensor | None:
        return self._take(index, member, x) if index else self._lead(member, x)

    def _lead(self, leader: Grouped, x: Tensor) -> Tensor | None:
        """Computes the products of all members; keeps those of the others for them."""
        members = [member for known in self._members if known is not None and (member := known()) is not None]
        if len(members) < len(self._members) or members[0] is not leader:
            return None
        parts = [member.part() for member in members]
        try:
            version = x._version
            versions = [[t._version for t in tensors] for tensors, _ in parts]
            tensors = [t for tensors, _ in parts for t in tensors]
            layout = [word for _, words in parts for word in words]
            with torch._C._AutoDispatchBelowAutograd():
                results = fused_linear(x, tensors, layout)
        except RuntimeError:
            # A member on another device or of another dtype, say. Whose fault it is shows where that one is called.
            return None
        entries = [(result, own, seen) for result, (own, _), seen in zip(results, parts, versions, strict=True)]
        entries[0] = None
        self._slot.held = _Held(x, version, entries)
        return results[0]

    def _take(self, index: int, member: Grouped, x: Tensor) -> Tensor | None:
        held = self._slot.held
        if held is None or held.x() is not x or held.version != x._version:
            return None
        entry = held.entries[index]
        if entry is None:
            return None
        held.entries[index] = None
        held.waiting -= 1
        if not held.waiting:
            self._slot.held = None
        result, tensors, versions = entry
        own, _ = member.part()
        same = len(own) == len(tensors) and all(map(is_, own, tensors)) and [t._version for t in own] == versions
        return result if same else None

    def __getstate__(self) -> dict[str, int]:
        return {"size": self.size}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(state["size"])  # type: ignore[misc]
