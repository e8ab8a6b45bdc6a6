"""What was trained, kept where a killed run finds it: a whole model's weights, or those of each stretch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparsec.calibrate.kept import gone
from sparsec.ir.graph import Graph
from sparsec.pipeline.base import Context
from sparsec.recover.blocks import Going
from sparsec.recover.loop import Progressed
from sparsec.recover.rounding import likes_of, take_likes
from sparsec.spill import Made

COUNTED = ("steps", "tokens", "seconds", "notes")
"""What a training block by block has done so far."""


def _stretch(number: int) -> str:
    """Its key, by number from 1."""
    return f"stretch {number:05d}"


@dataclass(frozen=True)
class Trainings:
    """values: that weights are rounded to, or "". moves: whether masks may have moved."""

    graph: Graph
    context: Context
    values: str
    moves: bool

    def made(self, names: Sequence[str], train: Callable[[], Progressed]) -> Progressed:
        """Trains these weights, unless an earlier run did."""
        if not self.context.store.lasting:
            return train()
        if not all(self.context.ranks.told(self.context.store.has("trained"))):
            self.context.store.drop("trained")  # ranks train together, or none does
        return self._take(names, self.context.store.made("trained", lambda: self._kept(names, train())))

    def made_by_stretch(self, count: int, train: Callable[[Going], Progressed]) -> Progressed:
        """The same, of so many stretches, each of which is kept by itself. One that the user stopped in stays half trained, since
        what came after it was made of that."""
        if not self.context.store.lasting:
            return train(Going())
        going, store = Going(keep=self._keep), self.context.store
        found = [number for number in range(1, count + 1) if store.has(_stretch(number))]
        agreed = min(self.context.ranks.told(max(found, default=0)))  # that all ranks came to
        for number in found:
            if number > agreed:
                store.drop(_stretch(number))
            else:
                made = store.made(_stretch(number), gone)
                going.done, going.at = number, self._take(made[1]["names"], made)
        return self.made((), lambda: train(going))

    def _keep(self, number: int, names: Sequence[str], at: Progressed) -> None:
        """From then on the graph reads from there."""
        self._take(names, self.context.store.made(_stretch(number), lambda: self._kept(names, at)))

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
