"""The whole pruned model trained towards the whole dense one: on logits, on what comes next in the text, on hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from sparsec.ranks import ALONE, Ranks
from sparsec.recover.losses import head_loss, relative_error
from sparsec.recover.precision import Compute
from sparsec.recover.stretches import Read, Run, Stretches, Values
from sparsec.recover.text import Call

TOGETHER = 2048
"""Tokens of sequences of one length that are computed at once."""


KNOWN = 3 << 25
"""Bytes of the teacher's last hidden states that are kept, so that a sequence that comes again is not run through it again."""


@dataclass(frozen=True)
class Losses:
    """Means: per token in nats, of the divergence from the teacher and of what comes next; relative errors of outputs and of
    hidden states."""

    divergence: float = 0.0
    cross_entropy: float = 0.0
    error: float = 0.0
    hidden: float = 0.0

    def plus(self, other: Losses, share: float) -> Losses:
        """With a share of others added."""
        return Losses(*(a + share * b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Towards:
    """What is trained for. cross_entropy: its share beside the divergence from the teacher's logits; hidden: weight of the relative
    error of hidden states after every block; temperature: of both distributions."""

    cross_entropy: float = 0.0
    hidden: float = 0.0
    temperature: float = 1.0


@dataclass
class WholeModel:
    """Gradients and losses of a student on sequences, each a call of the graph with one sequence.

    student, teacher: read the tensors to compute with. precision: gives the context to compute in. recompute: share of the
    stretches whose activations are computed again for their gradients, so that only what lies between them is kept. around: runs
    the student's stretch that begins at a place. ranks: those that all have to run a stretch for one to run it.
    """

    stretches: Stretches
    sequences: Sequence[Call]
    student: Read
    teacher: Read | None
    towards: Towards
    precision: Compute
    recompute: float = 0.0
    stackable: bool = True
    around: Callable[[int, Values, Run], Values] = lambda start, values, run: run(values)
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        self._head = self.stretches.head()
        self._known: dict[int, Tensor] = {}
        self._known_bytes = 0
        self._cuts = self.stretches.cuts()

    def gradients(self, numbers: Sequence[int], scale: float = 1.0) -> tuple[float, int]:
        """Adds the gradients of the mean loss over some sequences, times a scale; returns (loss, tokens)."""
        total, tokens = 0.0, 0
        calls = list(self._together(numbers))
        for some, call, share in calls:
            total += share * self._mixed(self._losses(some, call, share * scale))
            tokens += _tokens(call)
        for _ in range(max(self.ranks.told(len(calls))) - len(calls)):  # others have more lengths than this one
            self._losses(*calls[0][:2], 0.0)
        return total, tokens

    def losses(self, numbers: Sequence[int]) -> Losses:
        """The mean losses over some sequences."""
        found = Losses()
        with torch.no_grad():
            for some, call, share in self._together(numbers):
                found = found.plus(self._losses(some, call, None), share)
        return found

    def loss(self, numbers: Sequence[int]) -> float:
        """What is trained for, over some sequences."""
        return self._mixed(self.losses(numbers))

    def _mixed(self, found: Losses) -> float:
        share = self.towards.cross_entropy if self.teacher else 1.0
        if self._head is None:
            return found.error + self.towards.hidden * found.hidden
        return (1 - share) * found.divergence + share * found.cross_entropy + self.towards.hidden * found.hidden

    def together(self, number: int) -> int:
        """How many sequences of this one's length are computed at once."""
        return max(1, TOGETHER // max(1, _tokens(self.sequences[number]))) if self.stackable else 1

    def activations(self, number: int) -> int:
        """About how many bytes a backward through a call wants kept, by what half of one block and its neighbour keep."""
        held: dict[int, int] = {}
        leaves = {id(t) for t in self.stretches.graph.module.parameters()}

        def seen(tensor: Tensor) -> Tensor:
            if id(tensor) not in leaves:
                storage = tensor.untyped_storage()
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        call, values = self.sequences[number], dict[fx.Node, Any]()
        cuts = self._cuts[:3]
        with self.precision(), torch.autograd.graph.saved_tensors_hooks(seen, lambda t: t):
            for start, end in pairwise(cuts):
                values = self._stretch(start, end, call, values, again=False)
        return sum(held.values()) * max(1, len(self._cuts) - 1) // max(1, len(cuts) - 1)

    def _together(self, numbers: Sequence[int]) -> Iterator[tuple[list[int], Call, float]]:
        """Calls of several sequences of one length: their numbers, the call, its share of them all."""
        lengths: dict[tuple[torch.Size, ...], list[int]] = {}
        for number in numbers:
            lengths.setdefault(tuple(t.shape for t in self.sequences[number]), []).append(number)
        for alike in lengths.values():
            most = self.together(alike[0])
            for i in range(0, len(alike), most):
                some = alike[i : i + most]
                parts = zip(*(self.sequences[number] for number in some), strict=True)
                yield some, tuple(torch.cat(part) for part in parts), len(some) / len(numbers)

    def _losses(self, numbers: Sequence[int], call: Call, scale: float | None) -> Losses:
        """Of one call. scale: gradients times it are added; None makes none."""
        trains, deep = scale is not None, self.towards.hidden > 0
        with self.precision():
            wanted, reached = self._taught(numbers, call, deep)
            with torch.set_grad_enabled(trains):
                values, states = self._forward(call, self.student, deep, self.recompute if trains else 0.0)
                extra = relative_error(states, reached) if states and reached else torch.zeros(())
            if self._head is None:
                with torch.set_grad_enabled(trains):
                    error = relative_error(self.stretches.outputs(values), self.stretches.outputs(wanted))
                    if scale is not None:
                        torch.autograd.backward((error + self.towards.hidden * extra) * scale)
                return Losses(error=float(error.detach()), hidden=float(extra.detach()))
            _, hidden = self._head
            divergence, missed, gradient = head_loss(
                values[hidden],
                wanted.get(hidden),
                self._logits(call, values, self.student),
                self._logits(call, wanted, self.teacher) if self.teacher else None,
                self._ids(call)[:, 1:],
                cross_entropy=self.towards.cross_entropy if self.teacher else 1.0,
                temperature=self.towards.temperature,
                scale=scale,
            )
            if gradient is not None and scale is not None:
                roots = [(values[hidden], gradient), (extra, torch.full_like(extra, scale * self.towards.hidden))]
                pairs = [(root, seed) for root, seed in roots if root.requires_grad]
                torch.autograd.backward([root for root, _ in pairs], [seed for _, seed in pairs])
            return Losses(divergence, missed, hidden=float(extra.detach()))

    def _taught(self, numbers: Sequence[int], call: Call, deep: bool) -> tuple[Values, list[Tensor]]:
        """What the teacher has before the head. What the head reads is remembered, as much as KNOWN bytes of it."""
        if self.teacher is None:
            return {}, []
        if self._head is None or deep:
            return self._forward(call, self.teacher, deep)
        hidden = self._head[1]
        if all(number in self._known for number in numbers):
            return {hidden: torch.cat([self._known[number] for number in numbers])}, []
        values, _ = self._forward(call, self.teacher, False)
        if set(values) == {hidden}:
            rows = call[0].shape[0] // len(numbers)
            for number, part in zip(numbers, torch.split(values[hidden], rows), strict=True):
                size = part.numel() * part.itemsize
                if number not in self._known and self._known_bytes + size <= KNOWN:
                    self._known[number] = part.clone()
                    self._known_bytes += size
        return values, []

    def _forward(self, call: Call, read: Read, states: bool, recompute: float = 0.0) -> tuple[Values, list[Tensor]]:
        """What is alive before the head, and hidden states after each stretch where they are asked for."""
        values: Values = {}
        found: list[Tensor] = []
        frozen = read is not self.student
        for number, (start, end) in enumerate(pairwise(self._cuts)):
            if frozen:
                with torch.no_grad():
                    values = self.stretches.run(start, end, call, values, read)
            else:
                values = self._stretch(start, end, call, values, number < recompute * (len(self._cuts) - 1))
            if states:
                found += [v for v in values.values() if isinstance(v, Tensor) and v.is_floating_point() and v.dim() > 1]
        return values, found

    def _stretch(self, start: int, end: int, call: Call, values: Values, again: bool) -> Values:
        """Of the student. again: computed again for its gradients."""

        def run(values: Values) -> Values:
            if again:
                found: Values = checkpoint(
                    self.stretches.run, start, end, call, values, self.student, use_reentrant=False
                )
                return found
            return self.stretches.run(start, end, call, values, self.student)

        return self.around(start, values, run)

    def _logits(self, call: Call, values: Values, read: Read) -> Callable[[Tensor], Tensor]:
        assert self._head is not None
        at, hidden = self._head
        rest = {node: value for node, value in values.items() if node is not hidden}

        def logits(part: Tensor) -> Tensor:
            held: dict[fx.Node, Any] = {**rest, hidden: part}
            made = self.stretches.run(at, len(self.stretches.steps), call, held, read)
            return self.stretches.outputs(made)[0]

        return logits

    def _ids(self, call: Call) -> Tensor:
        return call[self.stretches.graph.inputs.index("input_ids")]


def _tokens(call: Call) -> int:
    return call[0].shape[0] * (call[0].shape[1] if call[0].dim() > 1 else 1)
