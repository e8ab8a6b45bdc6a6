"""What was trained, kept where a killed run finds it: a whole model's weights, or those of each stretch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparsec.ir.graph import Graph
from sparsec.pipeline.base import Context
from sparsec.recover.loop import Progressed
from sparsec.recover.rounding import likes_of, take_likes
from sparsec.spill import Made

COUNTED = ("steps", "tokens", "seconds", "notes")
"""What a training block by block has done so far."""


@dataclass(frozen=True)
class Trainings:
    """values: that weights are rounded to, or "". moves: whether masks may have moved."""

    graph: Graph
    context: Context
    values: str
    moves: bool

    @property
    def lasting(self) -> bool:
        """Whether another run finds what is kept here."""
        return self.context.store.lasting

    def made(self, names: Sequence[str], train: Callable[[], Progressed]) -> Progressed:
        """Trains these weights, unless an earlier run did."""
        if not self.lasting:
            return train()
        if not all(self.context.ranks.told(self.context.store.has("trained"))):
            self.context.store.drop("trained")  # ranks train together, or none does
        return self._take(names, self.context.store.made("trained", lambda: self._kept(names, train())))

    def keep(self, stretch: int, names: Sequence[str], at: Progressed) -> None:
        """Keeps what a stretch trained, by number from 1; from then on the graph reads it from there."""
        self._take(names, self.context.store.made(f"stretch {stretch:05d}", lambda: self._kept(names, at)))

    def stretches(self, count: int) -> tuple[int, Progressed]:
        """Takes what an earlier run trained of so many stretches; the number of the last one, and how far it was."""
        last, at = 0, Progressed()
        store = self.context.store
        found = [n for n in range(1, count + 1) if store.has(f"stretch {n:05d}")]
        agreed = min(self.context.ranks.told(max(found, default=0)))  # that all ranks came to
        for number in found:
            if number > agreed:
                store.drop(f"stretch {number:05d}")
            else:
                made = self.context.store.made(f"stretch {number:05d}", lambda: ({}, {}))
                last, at = number, self._take(made[1]["names"], made)
        return last, at

    def _kept(self, names: Sequence[str], at: Progressed) -> Made:
        tensors = {f"weight {name}": self.graph.tensor(name).detach() for name in names}
        weights = [self.graph.weights[name] for name in names]
        if self.moves:
            tensors |= {f"mask {w.name}": w.mask for w in weights if w.mask is not None}
        likes = likes_of(self.graph, self.values)
        mine = {key: like for key, like in likes.items() if key.split(" ", 1)[1] in names}
        numbers = {name: getattr(at, name) for name in (*COUNTED, "stopped")}
        return tensors | mine, {"names": list(names), **numbers}

    def _take(self, names: Sequence[str], made: Made) -> Progressed:
        tensors, facts = made
        for name in names:
            self.context.write(self.graph, name, tensors[f"weight {name}"])
            self.graph.update(name, trained="under")
            if (mask := tensors.get(f"mask {name}")) is not None:
                self.graph.update(name, mask=mask)
        take_likes(self.graph, tensors, self.values)
        return Progressed(**{name: facts[name] for name in (*COUNTED, "stopped")})
