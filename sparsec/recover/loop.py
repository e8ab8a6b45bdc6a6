"""The training loop: steps or minutes, a learning rate that falls, gradients of a batch, and what goes wrong on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from sparsec.errors import RecoverError
from sparsec.memory import trim
from sparsec.ranks import ALONE, Ranks
from sparsec.recover.losses import finite
from sparsec.recover.regrow import Regrowth
from sparsec.recover.student import Student

LOOKS = 8
"""How often the loss on the sequences that are held out is taken."""
SAVE_EVERY = 180.0
"""Seconds, at least, between two saved states."""
RAISE_EVERY = 200
"""Steps after which a loss scale that was halved is doubled again."""
_WARM = 0.05
_LOWER = 0.5
OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda leaves, rate, decay: torch.optim.AdamW(
        leaves, lr=rate, betas=(0.9, 0.95), weight_decay=decay, fused=True
    ),
    "sgd": lambda leaves, rate, decay: torch.optim.SGD(leaves, lr=rate, momentum=0.9, weight_decay=decay, fused=True),
}
SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
    "linear": lambda share: 1 - share,
    "constant": lambda share: 1.0,
}


@dataclass(frozen=True)
class Settings:
    """How to train. steps or minutes: one of them. batch: sequences of a step. clip: of the gradients' norm. scale: what losses are
    multiplied with before the backward, at most, and gradients divided by afterwards: float16 has no small numbers."""

    steps: int | None = None
    minutes: float | None = None
    learning_rate: float = 2e-4
    schedule: str = "cosine"
    batch: int = 1
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    clip: float = 1.0
    scale: float = 1.0
    seed: int = 0
    regrowth: Regrowth | None = None


@dataclass
class Progressed:
    """How far a training is: what is saved, and what is told of it in the end."""

    steps: int = 0
    skipped: int = 0  # batches whose loss was NaN
    tokens: int = 0
    seconds: float = 0.0
    before: float = math.nan
    after: float = math.nan
    lowered: float = 1.0  # what the learning rate is multiplied with since a loss was NaN
    scale: float = 1.0  # what losses are multiplied with now
    notes: list[str] = field(default_factory=list)
    stopped: bool = False  # by the user


@dataclass
class Training:
    """One training of a student.

    gradients: adds the gradients of some sequences, by their numbers, times a scale, and returns (loss, tokens). held_out: the loss
    on what is not trained on. count: of sequences. tell: called with (share done, text). keep: called now and then, to save what
    there is. changed: called after every step, with its number and the share done. ranks: each runs its share of every batch, as
    DistributedDataParallel does; all step alike, by the clock of the first.
    """

    student: Student
    settings: Settings
    count: int
    gradients: Callable[[Sequence[int], float], tuple[float, int]]
    held_out: Callable[[], float]
    tell: Callable[[float, str], None] = lambda share, text: None
    keep: Callable[[Training], None] = lambda training: None
    changed: Callable[[int, float], None] = lambda step, share: None
    ranks: Ranks = ALONE
    at: Progressed = field(default_factory=Progressed)
    best: tuple[float, dict[str, Tensor]] | None = None

    def __post_init__(self) -> None:
        self.at.scale = self.settings.scale
        self.student.moves |= self.settings.regrowth is not None
        self._optimize()

    def _optimize(self) -> None:
        settings = self.settings
        self.optimizer = OPTIMIZERS[settings.optimizer](
            list(self.student.leaves.values()), settings.learning_rate, settings.weight_decay
        )

    @property
    def share(self) -> float:
        """Done of the steps, or of the minutes."""
        if self.settings.steps is not None:
            return min(1.0, self.at.steps / self.settings.steps)
        return min(1.0, self.at.seconds / (60 * (self.settings.minutes or 0.0)))

    def run(self) -> Progressed:
        """Trains to the end, or until the user interrupts; the student then has the best weights that were seen."""
        now = self.ranks.clock
        start = now() - self.at.seconds
        if self.best is None:
            self.at.before = self._held_out()
            if not finite(self.at.before):
                raise RecoverError(
                    "the loss is NaN or inf before the first step: the pruned model or its teacher computes no numbers; "
                    "look for inf or NaN in the weights, or train in float32 (dtype='fp32'; of a model of 16 bits, model.float())"
                )
            self.best = (self.at.before, self.student.kept())
        saved = now()
        try:
            for batch in self._batches():
                if self.share >= 1:
                    break
                place = int(self.share * LOOKS)
                fine = self._step(batch)
                self.at.seconds = now() - start
                if not fine and not self._again():
                    break
                if int(self.share * LOOKS) > place:
                    self._look()
                if int(self.share * LOOKS) > place or now() - saved > SAVE_EVERY:
                    self.at.seconds = now() - start
                    self.keep(self)
                    saved = now()
        except KeyboardInterrupt:
            if not self.ranks.alone:  # the others may be elsewhere in their step
                raise
            self.at.stopped = True
            self.at.notes.append(f"interrupted after {self.at.steps} steps; the best weights so far stay")
            self._look()
            self.keep(self)
        assert self.best is not None
        self.at.seconds = now() - start
        self.at.after = self.best[0]
        self.student.restore(self.best[1])
        if self.at.steps and not self.at.after < self.at.before:
            self.at.notes.append(
                "training made nothing better on what is held out, so the weights stay what they were; take another learning_rate= "
                f"than {self.settings.learning_rate:g}, or train longer"
            )
        return self.at

    def _batches(self) -> Iterator[list[int]]:
        """Numbers of sequences, all of them before one comes again; the same for the same seed, from the step that is next."""
        size = min(self.settings.batch, self.count)
        return islice(_batches(self.count, size, self.settings.seed), self.at.steps + self.at.skipped, None)

    def _step(self, batch: Sequence[int]) -> bool:
        """Whether it was taken: not where a loss or gradient is NaN."""
        factor = SCHEDULES[self.settings.schedule](self.share) * min(1.0, (self.share + 1e-3) / _WARM)
        rate = self.settings.learning_rate * self.at.lowered * factor
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        began = perf_counter()
        loss, tokens = self._gradients(batch)
        regrowth = self.settings.regrowth
        if regrowth is not None and finite(loss) and regrowth.due(self.at.steps, self.share):
            self.student.move(regrowth, self.at.steps, self.share, self.optimizer)
        self.student.clean()
        fine = finite(loss, self.student.clip(self.settings.clip))
        if fine:
            self.optimizer.step()
        self.optimizer.zero_grad()
        trim()  # gradients come and go between activations: without this the heap grows by a third
        if fine:
            self.at.steps += 1
            self.at.tokens += tokens
            self.changed(self.at.steps, self.share)
            pace = tokens / max(1e-9, perf_counter() - began)
            self.tell(self.share, f"loss {loss:.4g}, {pace:,.0f} tokens/s")
        return fine

    def _gradients(self, batch: Sequence[int]) -> tuple[float, int]:
        """(loss, tokens), and the leaves' gradients, by the largest scale at which they are finite."""
        at = self.at
        if at.steps % RAISE_EVERY == 0:
            at.scale = min(2 * at.scale, self.settings.scale)
        first = at.scale
        loss, tokens = self._shared(batch, at.scale)
        while at.scale > 1 and finite(loss) and not self.student.finite(self._found()):
            self.optimizer.zero_grad()
            at.scale /= 2
            loss, tokens = self._shared(batch, at.scale)
        if at.scale > 1:
            for gradient in self._found():
                gradient.div_(at.scale)
        elif first > 1 and not self.student.finite(self._found()):
            at.scale = first  # they are finite at no scale
        return loss, tokens

    def _shared(self, batch: Sequence[int], scale: float) -> tuple[float, int]:
        """`gradients` of a batch of which every rank runs a part: the sums of all parts, the same on all."""
        ranks = self.ranks
        if ranks.alone:
            return self.gradients(batch, scale)
        mine = [batch[i] for i in ranks.mine([1] * len(batch))]
        share = len(mine) / len(batch)
        loss, tokens = self.gradients(mine, scale * share) if mine else (0.0, 0)
        told = torch.tensor([loss * share, tokens], dtype=torch.float64)
        ranks.sum([told])
        self.student.sum_gradients(ranks)
        return float(told[0]), int(told[1])

    def _held_out(self) -> float:
        """By the first rank: the others have the same numbers, but for rounding."""
        return self.ranks.of_first(self.held_out())

    def _found(self) -> list[Tensor]:
        return [leaf.grad for leaf in self.student.leaves.values() if leaf.grad is not None]

    def _again(self) -> bool:
        """After a NaN: from the last good weights with a lower rate, once."""
        assert self.best is not None
        self.at.skipped += 1
        self.student.restore(self.best[1])
        where = f"the loss was NaN or inf in step {self.at.steps + 1}"
        if self.at.lowered < 1:
            self.at.notes.append(f"{where}, again: training ended, with the last good weights")
            return False
        self.at.lowered = _LOWER
        self._optimize()
        self.at.notes.append(
            f"{where}: back to the last good weights, and on with a learning rate of "
            f"{self.settings.learning_rate * _LOWER:g}"
        )
        return True

    def _look(self) -> None:
        loss = self._held_out()
        assert self.best is not None
        if finite(loss) and loss <= self.best[0]:
            self.best = (loss, {})  # the old copy goes before the new one is made
            self.best = (loss, self.student.kept())


def _batches(count: int, size: int, seed: int) -> Iterator[list[int]]:
    epoch = 0
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            generator = torch.Generator().manual_seed(seed + epoch)
            waiting += torch.randperm(count, generator=generator).tolist()
            epoch += 1
        yield waiting[:size]
        waiting = waiting[size:]


SAVED = ("steps", "skipped", "tokens", "seconds", "before", "best", "lowered", "notes")
"""The numbers of a saved state."""


def training_state(training: Training) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, numbers) from which `resume` goes on: leaves, the optimiser's moments, and the best weights."""
    assert training.best is not None
    tensors = {f"now {name}": tensor for name, tensor in training.student.kept().items()}
    tensors |= {f"best {name}": tensor for name, tensor in training.best[1].items()}
    states = training.optimizer.state_dict()["state"]
    for i, name in enumerate(training.student.leaves):
        tensors |= {f"{what} {name}": torch.as_tensor(value) for what, value in states.get(i, {}).items()}
    at = training.at
    return tensors, {
        "steps": at.steps,
        "skipped": at.skipped,
        "tokens": at.tokens,
        "seconds": at.seconds,
        "before": at.before,
        "best": training.best[0],
        "lowered": at.lowered,
        "scale": at.scale,
        "notes": list(at.notes),
    }


def resume(training: Training, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    """Puts a training where `training_state` found it."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        what, _, name = key.partition(" ")
        found.setdefault(what, {})[name] = tensor
    training.student.restore(found.pop("now"))
    training.best = (numbers["best"], found.pop("best"))
    names = list(training.student.leaves)
    state = {
        i: {what: held[name] for what, held in found.items() if name in held}
        for i, name in enumerate(names)
        if any(name in held for held in found.values())
    }
    whole = training.optimizer.state_dict()
    training.optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})
    at = training.at
    at.steps, at.skipped, at.tokens = numbers["steps"], numbers["skipped"], numbers["tokens"]
    at.seconds, at.before, at.lowered = numbers["seconds"], numbers["before"], numbers["lowered"]
    at.scale = min(float(numbers.get("scale", at.scale)), training.settings.scale)
    at.notes = list(numbers["notes"])
