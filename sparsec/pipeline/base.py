"""What a pass is: a frozen dataclass whose fields are its options and whose class says what it needs, gives and breaks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from sparsec.calibrate import CalibrationData
from sparsec.cost.phase import Phase
from sparsec.errors import SpecError
from sparsec.ir.facts import Weight
from sparsec.ir.graph import Graph
from sparsec.memory import is_own, page_out
from sparsec.pipeline.foreseen import Foreseen
from sparsec.pipeline.trained import TrainingFigures
from sparsec.progress import Noted, Progress, each_of
from sparsec.ranks import ALONE, Ranks
from sparsec.spill import Keep

T = TypeVar("T")


class Effect(Enum):
    """What a pass may do to the numbers that a graph computes. A graph's meaning includes its masks."""

    ANALYSIS = "analysis"  # changes facts only
    EXACT = "exact"  # outputs equal, bit for bit (0.0 and -0.0 are equal)
    NUMERIC = "numeric"  # the same function, another order of summation
    LOSSY = "lossy"  # another function: pruning


FACTS: tuple[str, ...] = ("mask", "pattern", "frozen", "sparsity", "flops", "lowered")
"""The names that `requires`, `produces` and `invalidates` may hold."""


@dataclass(eq=False)
class Context:
    """What a pass may use beside the graph."""

    masks: Mapping[str, Tensor] = field(default_factory=dict)  # given by the user, by weight or module name
    calibration: CalibrationData | None = None  # calls to learn from, for passes that need them
    dense: Mapping[str, Tensor] = field(default_factory=dict)  # parameters as the model came in, where they are held
    progress: Progress | None = None
    keep_dense: Mapping[str, str] = field(default_factory=dict)  # weight -> why it cannot be lowered
    unswappable: Mapping[str, str] = field(default_factory=dict)  # weight -> why its module must stay what it is
    owns_weights: bool = False  # the graph's tensors may be overwritten and freed: nobody else needs them
    generates: bool = True  # what the model is for is the next token; not an encoder
    rows: int = 1  # of x in a call of the model as it is mostly used: one token, or a batch of sequences
    elsewhere: Mapping[str, str] = field(default_factory=dict)  # weight -> who does need it all the same
    put: Callable[[Weight, Tensor], None] = lambda weight, tensor: (
        None
    )  # has the model that is consumed hold another tensor for a weight that it owns
    probe: tuple[Tensor, ...] = ()  # example inputs, for the verifier's strictest level
    ranks: Ranks = ALONE  # who works on this model, each on a graph of its own that stays the same on all
    store: Keep = field(default_factory=Keep)  # where what a pass makes is kept: a place of its own for each pass

    def owns(self, weight: str) -> bool:
        """Whether nobody else needs the tensor of this weight."""
        return self.owns_weights and weight not in self.elsewhere

    def may_overwrite(self, weight: str, tensor: Tensor) -> bool:
        """Whether to write into a weight's tensor: it is owned, and nobody lent it, as mapped files and arrays are."""
        return self.owns(weight) and is_own(tensor)

    def write(self, graph: Graph, name: str, tensor: Tensor) -> None:
        """Gives a weight other values: in its own memory where that may be overwritten, else `tensor` takes its place."""
        old = graph.tensor(name)
        if self.may_overwrite(name, old):
            with torch.no_grad():
                old.copy_(tensor)
        else:
            graph.replace_tensor(name, tensor.detach())
            self.replaced(graph.weights[name], old, graph.tensor(name))

    def replaced(self, weight: Weight, old: Tensor, new: Tensor) -> None:
        """The graph holds `new` for a weight: so does the model that is consumed, and the old one's memory goes back."""
        if new is not old and self.owns(weight.name):
            self.put(weight, new)
            page_out([old])

    def step(self, what: str, done: int, total: int, note: str = "") -> None:
        """Reports progress, where somebody listens; a note, such as a loss, to those who take notes."""
        if self.progress is not None:
            if note and isinstance(self.progress, Noted):
                self.progress.note(what, note)
            self.progress(what, done, total)

    def each_of(self, what: str, items: Collection[T]) -> Iterator[T]:
        """The items, as a stage of their own."""
        return each_of(self.progress, what, items)


@dataclass(frozen=True)
class PassResult:
    """What a pass has to say of its run."""

    changed: bool
    summary: str  # one line
    notes: tuple[str, ...] = ()  # what was left alone, and why
    training: TrainingFigures | None = None  # of a pass that trains
    spent: Mapping[str, float] = field(default_factory=dict)  # seconds by kind of work, of a pass that calibrates


@dataclass(frozen=True)
class PassRecord:
    """One pass as it ran."""

    index: int  # from 1
    spec: str  # canonical text of the pass with its options
    name: str
    effect: Effect
    seconds: float
    changed: bool
    summary: str
    notes: tuple[str, ...]
    training: TrainingFigures | None = None
    spent: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Pass(ABC):
    """Base of all passes. Subclasses are frozen dataclasses; options are checked in `__post_init__` (SpecError)."""

    name: ClassVar[str]
    effect: ClassVar[Effect]
    requires: ClassVar[frozenset[str]] = frozenset()
    produces: ClassVar[frozenset[str]] = frozenset()
    invalidates: ClassVar[frozenset[str]] = frozenset()
    excludes: ClassVar[frozenset[str]] = (
        frozenset()
    )  # facts that must not hold yet: pruning needs weights not yet packed

    trains: ClassVar[bool] = False
    """Whether it learns from a text what it will be asked on: then a second text is looked at beside it."""
    examples: ClassVar[tuple[str, ...]] = ()
    """Pipelines that end in it, its options in use, for listings and tests: on any model, whatever its shapes and names."""
    wants: ClassVar[str] = ""
    """What its user has to bring, in words for listings."""
    otherwise: ClassVar[str] = ""
    """What its user can do in place of giving it the facts that it requires."""
    gone: ClassVar[Mapping[str, str]] = {}
    """Options of earlier versions, each with what to say in its place."""

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """SpecError for an option of an earlier version."""
        for option in options:
            if option in cls.gone:
                raise SpecError(f"{option}= is no option any more: {cls.gone[option]}")
        return super().__new__(cls)

    @property
    def keeps_state_in(self) -> str | None:
        """The folder that this instance keeps its state in; no other pass of a pipeline may."""
        return None

    @property
    def uses_dense(self) -> bool:
        """Whether this instance looks at the parameters as the model came in, where they are held."""
        return self.needs_dense

    @property
    def needs_calibration(self) -> bool:
        """Whether this instance needs calibration data."""
        return False

    @property
    def needs_dense(self) -> bool:
        """Whether this instance needs the parameters as the model came in (`Context.dense`)."""
        return False

    def phases(self, graph: Graph, foreseen: Foreseen) -> Iterator[Phase]:
        """What a run would take, in order, told from shapes alone: `graph` may be on torch's device meta. Writes into both what the
        run would leave: masks without numbers, sparsities. Raises what `run` raises for what shapes and names show to be wrong."""
        yield from ()

    @abstractmethod
    def run(self, graph: Graph, context: Context) -> PassResult:
        """Changes the graph in place."""
