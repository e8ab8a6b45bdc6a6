"""Which calls of a tape are products with matrices of the model, and which of them read the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sparsec.formats.parts import DENSE, Part, tensor_count, unflatten
from sparsec.kernels.fused import alone
from sparsec.kernels.ops import OPERATORS
from sparsec.program.served import NotServedError
from sparsec.program.tape import Executed

_SEVERAL = tuple(f"sparsec.{name}.default" for name in ("fused_linear", "inference_linear", "inference_single"))
_SAME_NUMBERS = (
    "aten.view.default",
    "aten._unsafe_view.default",
    "aten.reshape.default",
    "aten.unsqueeze.default",
    "aten.squeeze.dim",
    "aten.alias.default",
    "aten.detach.default",
)


@dataclass(eq=False)
class Member:
    """One call that multiplies rows x [..., in] by matrices."""

    call: Executed
    x: Tensor
    parts: list[Part[Tensor]]


class ProductCalls:
    """Those of some calls. made: the call that gave each tensor, by its id; sources: names of the model's tensors, by id."""

    def __init__(self, calls: Sequence[Executed], made: dict[int, Executed], sources: dict[int, str]) -> None:
        self._made, self._sources = made, sources
        self._formats = {str(op): name for name, op in OPERATORS.items()} | {"sparsec.dense_linear.default": DENSE}
        self._members: dict[int, Member] = {}
        self._beside: dict[tuple[int, int], list[Member]] = {}
        for call in calls:
            found = self._member(call)
            if found is not None:
                self._members[id(call)] = found
                self._beside.setdefault(self._rows(found), []).append(found)

    def holds(self, call: Executed) -> bool:
        """Whether a call is a product."""
        return id(call) in self._members

    def beside(self, call: Executed) -> tuple[Tensor, list[Member]]:
        """The rows that a product reads, and all products of these. NotServedError for a format that another package computes."""
        own = self._members[id(call)]
        members = self._beside[self._rows(own)]
        for member in members:
            if odd := [part.format for part in member.parts if alone(part.format)]:
                raise NotServedError(f"products in {odd[0]} have no native kernel")
        return own.x, members

    def _rows(self, member: Member) -> tuple[int, int]:
        x = member.x
        while (call := self._made.get(id(x))) is not None and call.target in _SAME_NUMBERS:
            x = call.args[0]
        return id(x), member.x.shape[-1]

    def _member(self, call: Executed) -> Member | None:
        if call.target in _SEVERAL:
            x, tensors, layout = call.args
            return Member(call, x, self._known(unflatten(tensors, layout)))
        name = self._formats.get(call.target)
        if name is not None:
            x, *arguments = call.args
            count = tensor_count(name)
            part = Part(name, tuple(arguments[:count]), arguments[count], tuple(arguments[count + 1 :]))
            return Member(call, x, self._known([part]))
        if call.target == "aten.linear.default":
            x, weight, bias = (*call.args, None)[:3]
            return self._dense(call, x, weight, bias)
        if call.target == "aten.mm.default":
            return self._dense(call, call.args[0], self._turned(call.args[1]), None)
        if call.target == "aten.addmm.default" and not call.kwargs:
            return self._dense(call, call.args[1], self._turned(call.args[2]), call.args[0])
        return None

    def _dense(self, call: Executed, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Member | None:
        if weight is None or id(weight) not in self._sources:
            return None
        return Member(call, x, self._known([Part(DENSE, (weight,), bias)]))

    def _turned(self, tensor: Tensor) -> Tensor | None:
        """The weight [out, in] whose transpose a tensor is."""
        call = self._made.get(id(tensor))
        turned = call is not None and (
            call.target == "aten.t.default"
            or (call.target == "aten.transpose.int" and set(call.args[1:]) in ({0, 1}, {-1, -2}))
        )
        return call.args[0] if call is not None and turned else None

    def _known(self, parts: Sequence[Part[Tensor]]) -> list[Part[Tensor]]:
        for part in parts:
            for tensor in (*part.tensors, *([] if part.bias is None else [part.bias])):
                if id(tensor) not in self._sources:
                    raise NotServedError(
                        f"a product in {part.format} multiplies by a matrix that is computed at every call"
                    )
        return list(parts)
