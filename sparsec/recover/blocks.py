"""Stretch by stretch: each block's attention, then its MLP, is trained to make what the dense one makes, on what the recovered
ones before it give it. Only the activations between two stretches are held.

After EBFT (arXiv:2402.12419), whose blocks are whole ones; halves of a block do as well (arXiv:2510.14444).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, fx

from sparsec.calibrate.kept import flat, gone, whole
from sparsec.errors import some
from sparsec.ranks import Ranks
from sparsec.recover.loop import Progressed, Settings, Training
from sparsec.recover.losses import relative_error
from sparsec.recover.precision import Compute
from sparsec.recover.stretches import Read, Stretch, Stretches, Values
from sparsec.recover.student import Student
from sparsec.recover.text import TrainingText
from sparsec.spill import Keep

_WHO = ("student", "teacher")


def _key(who: str, place: int, call: int) -> str:
    return f"{who} {place:05d} {call:05d}"


def _nowhere(number: int, names: Sequence[str], at: Progressed) -> None:
    """Keeps nothing."""


@dataclass
class Going:
    """How far an earlier training came: stretches that are done, by number, and what it counted. keep: told of each further one, by
    number from 1, with its weights; of the one too in which the user stops, which is then half trained (`at.stopped`)."""

    done: int = 0
    at: Progressed = field(default_factory=Progressed)
    keep: Callable[[int, Sequence[str], Progressed], None] = _nowhere


@dataclass
class BlockByBlock:
    """student: makes the one that trains some weights; its result is put into the graph before the next stretch. names: weights to
    train. varying: nodes whose values differ from call to call. store: of what is alive between stretches."""

    stretches: Stretches
    text: TrainingText
    names: Sequence[str]
    student: Callable[[Sequence[str]], Student]
    settle: Callable[[Student], None]
    stored: Read
    teacher: Read
    settings: Settings
    precision: Compute
    varying: set[fx.Node]
    tell: Callable[[float, str], None]
    going: Going
    store: Keep
    ranks: Ranks

    @property
    def at(self) -> Progressed:
        """How far it is."""
        return self.going.at

    def run(self) -> Progressed:
        """Trains every stretch that has something to train."""
        start = self.ranks.clock() - self.at.seconds
        calls = [*self.text.trained, *self.text.held]
        mine: list[Values] = [{} for _ in calls]
        theirs: list[Values] = [{} for _ in calls]
        stretches = self.stretches.stretches
        own = [self._trained(stretch) for stretch in stretches]
        sizes = [sum(self.stretches.graph.weights[name].numel for name in names) for names in own]
        late: list[str] = []
        # No further than the first stretch that is still to be trained: what was kept behind it is of an earlier training.
        last = next((i for i, names in enumerate(own) if i >= self.going.done and names), len(stretches))
        begun = next((i for i in range(last, 0, -1) if self._kept(i, len(calls))), 0)
        if begun:
            mine, theirs = self._held("student", begun, len(calls)), self._held("teacher", begun, len(calls))
        try:
            for i, stretch in enumerate(stretches):
                if i < begun:
                    continue
                if self._over() or not any(own[i:]):
                    break
                first = perf_counter()
                theirs = self._moved(stretch, calls, theirs, self.teacher, ("teacher", i + 1))
                if own[i] and i >= self.going.done:
                    # Once for the teacher, once for the student, in each stretch to come.
                    moving = self.ranks.of_first(perf_counter() - first)
                    share = sizes[i] / max(1, sum(sizes[i:]))
                    settings = self._settings(start, 2 * moving * (len(stretches) - i), share)
                    if settings is None:
                        late.append(stretch.name)
                    else:
                        self._train(
                            stretch, own[i], calls, mine, theirs, settings, (sum(sizes[:i]), sizes[i], sum(sizes))
                        )
                    self.at.seconds = self.ranks.clock() - start
                    self.going.keep(i + 1, own[i], self.at)
                    if self._over():
                        break
                mine = self._moved(stretch, calls, mine, self.stored, ("student", i + 1))
                self._drop(i, len(calls))
        except KeyboardInterrupt:  # between two trainings, or before the first step of one
            if not self.ranks.alone:
                raise
            self.at.stopped = True
            self.at.notes.append(f"interrupted after {self.at.steps} steps; what is trained so far stays")
        if late:
            self.at.notes.append(f"{some(late)}: not trained, since no time was left; give more minutes=")
        self.at.seconds = self.ranks.clock() - start
        return self.at

    def _over(self) -> bool:
        """Whether the user stopped."""
        return self.at.stopped

    @property
    def _lasting(self) -> bool:
        return self.store.lasting and not self.stretches.in_place

    def _kept(self, place: int, calls: int) -> bool:
        """Whether what is alive after so many stretches is kept from an earlier run."""
        keys = [_key(who, place, number) for who in _WHO for number in range(calls)]
        return self._lasting and place > 0 and all(self.store.has(key) for key in keys)

    def _held(self, who: str, place: int, calls: int) -> list[Values]:
        named = {node.name: node for node in self.stretches.steps}
        return [whole(self.store.made(_key(who, place, number), gone), named) for number in range(calls)]

    def _drop(self, place: int, calls: int) -> None:
        for who in _WHO if self._lasting else ():
            for number in range(calls):
                self.store.drop(_key(who, place, number))

    def _settings(self, begun: float, moving: float, share: float) -> Settings | None:
        """Of one stretch: its share of the minutes that are left; None where none are."""
        if self.settings.minutes is None:
            return self.settings
        left = (60 * self.settings.minutes - (self.ranks.clock() - begun) - moving) * share
        return replace(self.settings, minutes=left / 60) if left > 0 else None

    def _trained(self, stretch: Stretch) -> list[str]:
        """What is trained and read there: matrices with masks, and the norms and biases beside them."""
        steps = self.stretches.steps[stretch.start : stretch.end]
        read = {str(n.target) for step in steps for n in _stored(step)}
        weights = self.stretches.graph.weights
        found = [name for name in self.names if name in read]
        return found if any(weights[name].mask is not None for name in found) else []

    @torch.no_grad()
    def _moved(
        self,
        stretch: Stretch,
        calls: Sequence[tuple[Tensor, ...]],
        states: list[Values],
        read: Read,
        place: tuple[str, int],
    ) -> list[Values]:
        """The states after a stretch. What does not differ from call to call is held once; a store that lasts keeps them all."""
        shared: dict[tuple[torch.Size, ...], Values] = {}
        moved = []
        for number, (call, values) in enumerate(zip(calls, states, strict=True)):
            with self.precision():
                made = self.stretches.run(stretch.start, stretch.end, call, values, read)
            if self._lasting:
                named = {node.name: node for node in made}
                moved.append(whole(self.store.made(_key(*place, number), partial(flat, made)), named))
                continue
            same = shared.setdefault(tuple(t.shape for t in call), made)
            moved.append({node: value if node in self.varying else same[node] for node, value in made.items()})
        return moved

    def _train(
        self,
        stretch: Stretch,
        names: Sequence[str],
        calls: Sequence[tuple[Tensor, ...]],
        mine: Sequence[Values],
        theirs: Sequence[Values],
        settings: Settings,
        weighed: tuple[int, int, int],
    ) -> None:
        student = self.student(names)
        count = len(self.text.trained)
        before, size, whole = weighed

        def loss(number: int) -> Tensor:
            with self.precision():
                made = self.stretches.run(stretch.start, stretch.end, calls[number], mine[number], student.read)
                goal = theirs[number]
                nodes = [n for n in made if _floating(goal[n]) and n not in mine[number]]
                return relative_error([made[n] for n in nodes], [goal[n] for n in nodes])

        def gradients(numbers: Sequence[int], scale: float) -> tuple[float, int]:
            total, tokens = 0.0, 0
            for number in numbers:
                found = loss(number) / len(numbers)
                torch.autograd.backward(found * scale)
                total += float(found.detach())
                tokens += calls[number][0].numel() if self.text.stackable else 1
            return total, tokens

        def held_out() -> float:
            with torch.no_grad():
                return sum(float(loss(i)) for i in range(count, len(calls))) / (len(calls) - count)

        def tell(share: float, text: str) -> None:
            self.tell((before + share * size) / max(1, whole), f"{stretch.name}, {text}")

        training = Training(student, settings, count, gradients, held_out, tell, ranks=self.ranks)
        found = training.run()
        self.settle(student)
        self.at.steps += found.steps
        self.at.tokens += found.tokens
        self.at.stopped |= found.stopped
        self.at.notes += [f"{stretch.name}: {note}" for note in found.notes]


def _stored(node: fx.Node) -> list[fx.Node]:
    """Stored tensors that a node reads, through views of them too."""
    found: list[fx.Node] = []
    waiting = list(node.all_input_nodes)
    while waiting:
        used = waiting.pop()
        if used.op == "get_attr":
            found.append(used)
        elif used.all_input_nodes and all(n.op == "get_attr" for n in used.all_input_nodes):
            waiting += used.all_input_nodes
    return found


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
