"""Products of one x in one call, at run time: the first module of a group computes all, the others take their result.

Why so: the model's own code calls its linears one by one, and it must go on to do so for hooks, copies and `generate()` to work.

A result is taken only by a module that is called in the same thread with the very same tensor object at the same version,
while its own tensors are the ones that were multiplied, at their versions. In every other case, an order of calls that
nobody foresaw included, a module computes its own product: grouping changes the speed, never the result. So also
- where gradients are recorded, under autocast, on other devices than the CPU, and without the native library;
- under torch.inference_mode: its tensors have no version, so that nobody could tell whether x was written to meanwhile
  (`generate()` runs under no_grad and is served);
- under torch.compile, where the backend "sparsec" fuses instead (sparsec/inductor); torch.export sees one operator, as the
  graph has it.

Tensors that were given other memory (`x.data = y`, `swap_tensors`) are known by its address. Writes into their memory that torch's
version counter does not see (through `x.data.add_()`, numpy, another library) are not seen here either.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsec import private
from sparsec.errors import FormatError
from sparsec.kernels.dense import native_serves
from sparsec.kernels.derivatives import transformed
from sparsec.kernels.fused import INFERENCE, fused_linear, inference_linear
from sparsec.kernels.registry import added


class Grouped:
    """Base, beside nn.Module, of the modules that can stand in a group."""

    _group: Group | None = None
    _index = 0
    _parameters: dict[str, Any]
    _buffers: dict[str, Any]

    def part(self) -> tuple[list[Tensor], tuple[int, ...]]:
        """What the module multiplies by, as `fused_linear` takes it: (tensors with the bias, layout).

        KeyError where it is not stored, but computed at every call.
        """
        raise NotImplementedError

    def join(self, group: Group, index: int) -> None:
        """Makes this module the group's member at `index`."""
        self._group = group if group.join(index, self) else None
        self._index = index

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        # A new group where the module is copied or loaded; this very one in copy.copy(module), which then is left out.
        if self._group is not None:
            if not 0 <= self._index < self._group.size:
                raise FormatError(
                    f"a group of {self._group.size} products has no member {self._index}: the pickle is damaged"
                )
            self.join(self._group, self._index)


class _Plan:
    """What a group multiplies by. Each member asks for itself whether that still is what it holds."""

    __slots__ = ("kernels", "layout", "members", "tensors")

    def __init__(self, members: Sequence[Grouped]) -> None:
        self.kernels = len(added)  # those of other packages that there were
        parts = [member.part() for member in members]
        self.members = [_Holding(member) for member in members]
        self.tensors = [t for own, _ in parts for t in own]
        self.layout = [word for _, words in parts for word in words]

    def unwritten(self) -> bool:
        """Whether nobody has written to what any member multiplies by since it was looked at."""
        for member in self.members:  # noqa: SIM110 - the generator of all() takes as long again
            if not member.unwritten():
                return False
        return True


class _Holding:
    """One member's tensors, their versions, and where their memory is, which `.data = ` changes and no version tells."""

    __slots__ = ("marks", "places")

    def __init__(self, member: Grouped) -> None:
        self.places: list[_Place] = [
            (place, key, tensor) for place in (member._parameters, member._buffers) for key, tensor in place.items()
        ]
        held = [tensor for _, _, tensor in self.places if tensor is not None]
        self.marks = [] if torch.compiler.is_compiling() else [(t, t._version, t.data_ptr()) for t in held]

    def held(self) -> bool:
        """Whether the member still has the tensors that it had."""
        for place, key, tensor in self.places:  # noqa: SIM110 - the generator of all() takes as long again
            if place.get(key) is not tensor:
                return False
        return True

    def unwritten(self) -> bool:
        """Whether nobody has written to them since."""
        for tensor, version, memory in self.marks:  # noqa: SIM110 - as above
            if tensor._version != version or tensor.data_ptr() != memory:
                return False
        return True


_Place = tuple[dict[str, Tensor | None], str, Tensor | None]


class _Held:
    """Results of one call that wait for their modules."""

    __slots__ = ("memory", "plan", "results", "version", "waiting", "x")

    def __init__(self, x: Tensor, version: int, memory: int, plan: _Plan, results: list[Any]) -> None:
        self.version, self.memory, self.plan = version, memory, plan
        self.results = results  # by index of the member; None once taken
        self.waiting = len(results) - 1
        # Nobody can ask for them once x is gone, as after an exception between the calls.
        self.x = weakref.ref(x, lambda _: results.clear())


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
        self._plans: list[_Plan] = []  # at most one
        self._slot = _Slot()

    def join(self, index: int, member: Grouped) -> bool:
        """Makes a module the group's member at `index`; False where another one is."""
        known = self._members[index]
        if known is not None and known() not in (None, member):
            return False
        plans = self._plans  # not self: a member that goes takes its tensors with it
        self._members[index] = weakref.ref(member, lambda _: plans.clear())
        plans.clear()
        return True

    def product(self, index: int, member: Grouped, x: Tensor) -> Tensor | None:
        """The product of one member with x; None where it has to compute it by itself."""
        compiling = torch.compiler.is_compiling()
        if compiling and not torch.compiler.is_exporting():
            return None
        # These flags are the process's: a plain tensor comes from another thread than the one that exports.
        if (not compiling or type(x) is Tensor) and (
            torch.is_grad_enabled() or transformed() or private.any_autocast()
        ):
            return None
        if index:
            return self._take(index, member, x)
        if x.is_inference() or not x.is_cpu or not native_serves(INFERENCE):
            return None
        return self._lead(member, x)

    def _lead(self, leader: Grouped, x: Tensor) -> Tensor | None:
        """Computes the products of all members; keeps those of the others for them."""
        plan = self._plan(leader)
        if plan is None:
            return None
        version, memory = x._version, 0 if torch.compiler.is_compiling() else x.data_ptr()
        try:
            with private.below_autograd():
                # The same, but that the other one also asks whether the library knows all formats; exported graphs have it.
                product = fused_linear if torch.compiler.is_compiling() else inference_linear
                results: list[Any] = product(x, plan.tensors, plan.layout)
        except RuntimeError:
            # A member on another device or of another dtype, say. Whose fault it is shows where that one is called.
            self._plans.clear()
            return None
        mine: Tensor = results[0]
        results[0] = None
        self._slot.held = _Held(x, version, memory, plan, results)
        return mine

    def _plan(self, leader: Grouped) -> _Plan | None:
        """The plan of the last call where it is still the leader's, else a new one; None where a member is missing.

        Whether its tensors were written to is asked of all, since the product reads them. What the others hold now is asked when
        they come for their results: one that finds something else ends the plan.
        """
        for plan in self._plans:  # a loop, since another thread may end it meanwhile
            first = self._members[0]
            same = first is not None and first() is leader and plan.members[0].held() and plan.kernels == len(added)
            if same and plan.unwritten():
                return plan
        self._plans.clear()
        members = [member for known in self._members if known is not None and (member := known()) is not None]
        if len(members) < self.size or members[0] is not leader:
            return None
        try:
            plan = _Plan(members)
        except (KeyError, FormatError):  # a weight or bias is computed from others at every call, or is no valid matrix
            return None
        if any(t.is_inference() for t in plan.tensors):  # they have no versions
            return None
        if not torch.compiler.is_compiling():  # whose tensors are not those of the next call
            self._plans.append(plan)
        return plan

    def _take(self, index: int, member: Grouped, x: Tensor) -> Tensor | None:
        held = self._slot.held
        if held is None or held.x() is not x or held.version != x._version:
            return None
        if held.memory and held.memory != x.data_ptr():
            return None
        result: Tensor | None = held.results[index]
        if result is None:
            return None
        held.results[index] = None
        held.waiting -= 1
        if not held.waiting:
            self._slot.held = None
        known = self._members[index]
        own = held.plan.members[index]
        if known is not None and known() is member and own.held() and own.unwritten():
            return result
        self._plans.clear()
        return None

    def __getstate__(self) -> dict[str, int]:
        return {"size": self.size}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(state["size"])  # type: ignore[misc]
