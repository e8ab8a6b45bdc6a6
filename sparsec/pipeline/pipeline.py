"""A sequence of passes: read, checked before anything runs, and run over a graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import IOBase
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch

from sparsec.arguments import checked, checked_but, shown
from sparsec.errors import PipelineError, SpecError, VerifyError
from sparsec.ir.graph import Graph
from sparsec.ir.settle import settle
from sparsec.ir.verifier import outputs_differ, problems, snapshot
from sparsec.pipeline.base import FACTS, Context, Effect, Pass, PassRecord, PassResult
from sparsec.pipeline.instruments import Instrument, Timing
from sparsec.pipeline.spec import parse, unparse, unparse_one
from sparsec.pipeline.table import known_passes
from sparsec.pipeline.trained import TrainingFigures
from sparsec.progress import stage

Verify = Literal["none", "structure", "facts", "probe"]
"""`structure`: the graph and its tables hold together, and analyses change nothing but facts. `facts`: every fact is also computed
again. `probe`: the graph is also run on example inputs before and after each pass, and its declared effect is held against that."""


@dataclass(frozen=True)
class Pipeline:
    """Passes in order. `str()` gives the canonical specification."""

    passes: tuple[Pass, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.passes, tuple) or not all(isinstance(p, Pass) for p in self.passes):
            raise SpecError(
                f"Pipeline takes a tuple of Pass objects, got {shown(self.passes)}; Pipeline.of reads specifications and lists"
            )

    @classmethod
    @checked
    def parse(cls, text: str) -> Self:
        """From a specification such as `magnitude(0.5),freeze,lower(csr)`. Raises SpecError."""
        return cls(parse(text, known_passes()))

    @classmethod
    def of(cls, passes: object) -> Pipeline:
        """From whatever `passes=` may hold: a Pipeline, a specification, a Pass, or a sequence of the last two."""
        if isinstance(passes, Pipeline):
            return passes
        if isinstance(passes, str):
            return cls.parse(passes)
        if isinstance(passes, Pass):
            return cls((passes,))
        if not isinstance(passes, list | tuple | Iterator) or isinstance(passes, IOBase):
            raise SpecError(
                f"passes: expected a specification, a Pipeline or a list, got {type(passes).__name__}: {passes!r:.200}"
            )
        found: list[Pass] = []
        for item in passes:
            if isinstance(item, str):
                found.extend(parse(item, known_passes()))
            elif isinstance(item, Pass):
                found.append(item)
            elif isinstance(item, type) and issubclass(item, Pass):
                raise SpecError(f"passes: {item.__name__} is a class; give an instance, {item.__name__}(...)")
            else:
                raise SpecError(f"passes: expected specifications and Pass objects, got {shown(item)}")
        if not found:
            raise SpecError("passes: an empty list; for example: ['magnitude(0.5)', 'freeze', 'lower(csr)']")
        return cls(tuple(found))

    def __str__(self) -> str:
        return unparse(self.passes)

    @property
    def learning(self) -> tuple[str, ...]:
        """Names of the passes that need calibration data."""
        return tuple(p.name for p in self.passes if p.needs_calibration)

    @property
    def training(self) -> tuple[str, ...]:
        """Names of the passes that train."""
        return tuple(p.name for p in self.passes if p.trains)

    @property
    def learning_part(self) -> Pipeline | None:
        """The passes up to the last one that needs calibration data: what several ranks share; None where none does."""
        last = max((i for i, p in enumerate(self.passes, 1) if p.needs_calibration), default=0)
        return Pipeline(self.passes[:last]) if last else None

    @checked
    def before(self, name: str) -> Pipeline:
        """The passes that stand before the first pass of that name; all, when there is none."""
        names = [p.name for p in self.passes]
        return Pipeline(self.passes[: names.index(name)] if name in names else self.passes)

    @checked
    def with_first(self, first: Pass) -> Pipeline:
        """The same passes after one more."""
        return Pipeline((first, *self.passes))

    @checked
    def validate(self, facts: frozenset[str] = frozenset()) -> None:
        """Raises PipelineError when a pass needs a fact that does not hold when its turn comes.

        facts: what holds before the first pass.
        """
        self._check_folders()
        held = set(facts)
        made: dict[str, str] = {}
        lost: dict[str, str] = {}
        for i, p in enumerate(self.passes, 1):
            _check_declaration(p)
            me = f"pass {i} {p.name!r}"
            if lacking := [fact for fact in FACTS if fact in p.requires - held]:
                why = next(
                    (f"which {lost[f]} took away" for f in lacking if f in lost), "which no earlier pass produces"
                )
                put = " and then ".join(self._maker(fact, i) for fact in lacking)
                other = f", or {p.otherwise}" if p.otherwise else ""
                needs = " and ".join(map(repr, sorted(lacking)))
                raise PipelineError(f"{me} needs {needs}, {why}; put {put} before it{other}\n  {self}")
            for fact in sorted(p.excludes & held):
                raise PipelineError(
                    f"{me} cannot follow {made.get(fact, 'what was done before')}, which made {fact!r} true; "
                    f"put it earlier\n  {self}"
                )
            made.update(dict.fromkeys(p.produces, me))
            lost.update(dict.fromkeys(p.invalidates & held, me))
            held = (held - p.invalidates) | p.produces

    def _check_folders(self) -> None:
        """Raises PipelineError where two passes would keep their state in one folder."""
        known: dict[Path, str] = {}
        for i, p in enumerate(self.passes, 1):
            if p.keeps_state_in is None:
                continue
            me, place = f"pass {i} {p.name!r}", Path(p.keeps_state_in).expanduser().resolve()
            if other := known.get(place):
                raise PipelineError(
                    f"{me} and {other} keep their state in one folder, {p.keeps_state_in!r}, where each would find the other's; "
                    f"give each its own checkpoint=\n  {self}"
                )
            known[place] = me

    def _maker(self, fact: str, place: int) -> str:
        """What makes a fact true that is wanted at a place: a pass that stands too late, else those that there are."""
        for i, p in enumerate(self.passes[place:], place + 1):
            if fact in p.produces:
                return f"pass {i} {p.name!r}"
        makers = [cls.name for cls in known_passes().values() if fact in cls.produces]
        return (
            makers[0]
            if len(makers) == 1
            else f"one of {', '.join(makers)}"
            if makers
            else f"a pass that gives {fact!r}"
        )

    @checked_but("verify")
    def run(
        self,
        graph: Graph,
        context: Context | None = None,
        verify: Verify = "structure",
        instruments: Sequence[Instrument] = (),
        first: int = 1,
    ) -> tuple[PassRecord, ...]:
        """Validates, then changes the graph in place, pass by pass. first: the number of the first pass.

        Weights that changed since they were pruned are looked at first; the first record says what was found.

        Raises PipelineError before anything runs, VerifyError when a pass breaks its promise, and whatever a pass raises.
        """
        if verify not in get_args(Verify):
            raise SpecError(f"verify must be one of {', '.join(get_args(Verify))}, got {verify!r}")
        said = settle(graph)
        self.validate(graph.facts)
        context = context or Context()
        store = context.store
        timing = Timing()
        records: list[PassRecord] = []
        for i, p in enumerate(self.passes, first):
            held = _Promise(p, i, graph, context, verify)
            context.store = store.within(f"{i:02d} {p.name}")
            with ExitStack() as around:
                for instrument in instruments:  # what they do is no part of the pass
                    around.enter_context(instrument.around(i, p, graph))
                around.enter_context(stage(context.progress, f"pass {i} {unparse_one(p)}"))
                around.enter_context(timing.around(i, p, graph))
                result = _said(p, i, p.run(graph, context))
                graph.forget(p.invalidates - p.produces)
                graph.facts |= p.produces
            held.check(result)
            records.append(
                PassRecord(
                    index=i,
                    spec=unparse_one(p),
                    name=p.name,
                    effect=p.effect,
                    seconds=timing.seconds[i],
                    changed=result.changed,
                    summary=result.summary,
                    notes=result.notes if records else (*said, *result.notes),
                    training=result.training,
                    spent=result.spent,
                )
            )
        return tuple(records)


class _Promise:
    """What a pass declares, held against what it did."""

    def __init__(self, p: Pass, index: int, graph: Graph, context: Context, level: Verify) -> None:
        self.p, self.index, self.graph, self.context, self.level = p, index, graph, context, level
        self.before = snapshot(graph, self.recompute) if level != "none" else None
        self.outputs = self._outputs()

    @property
    def recompute(self) -> bool:
        return self.level in ("facts", "probe")

    def check(self, result: PassResult) -> None:
        if self.level == "none":
            return
        try:
            found = problems(self.graph, self.recompute)
            changed = snapshot(self.graph, self.recompute) != self.before
        except Exception as error:  # a record or a tensor of another kind
            raise VerifyError(
                f"after pass {self.index} {self.p.name!r} the graph cannot be read any more: {type(error).__name__}: {error}; this "
                "is a defect of the pass"
            ) from error
        if self.p.effect is Effect.ANALYSIS and changed:
            found.append("it is declared an analysis, but the dataflow, a mask or a tensor changed")
        if changed and not result.changed and self.p.effect is not Effect.ANALYSIS:
            found.append("it says that nothing changed, but the dataflow, a mask or a tensor did")
        if self.outputs is not None and self.p.effect is not Effect.LOSSY:
            difference = outputs_differ(self.outputs, self._outputs(), exact=self.p.effect is not Effect.NUMERIC)
            if difference:
                found.append(f"it is declared {self.p.effect.value}, but on the probe inputs {difference}")
        if found:
            listed = "\n  ".join(found[:8]) + (f"\n  and {len(found) - 8} more" if len(found) > 8 else "")
            raise VerifyError(f"after pass {self.index} {self.p.name!r} the graph is not right:\n  {listed}")

    def _outputs(self) -> object | None:
        if self.level != "probe" or not self.context.probe:
            return None
        with torch.no_grad():
            result: object = self.graph.run(*self.context.probe)
        return result


def _check_declaration(p: Pass) -> None:
    sets = {name: getattr(p, name, None) for name in ("requires", "produces", "invalidates", "excludes")}
    if odd := [name for name, facts in sets.items() if not isinstance(facts, frozenset)]:
        raise PipelineError(f"pass {p.name!r}: {odd[0]} must be a frozenset of facts, got {sets[odd[0]]!r}")
    if not isinstance(p.name, str) or not isinstance(p.effect, Effect):
        raise PipelineError(f"pass {p.name!r}: name must be a word and effect a sparsec.Effect, got {p.effect!r}")
    unknown = (p.requires | p.produces | p.invalidates | p.excludes) - set(FACTS)
    if unknown:
        raise PipelineError(f"pass {p.name!r} declares unknown facts {sorted(unknown)}; facts: {', '.join(FACTS)}")


def _said(p: Pass, index: int, result: Any) -> PassResult:
    """What a pass said of its run. VerifyError for anything else."""
    texts = (
        [result.summary, *result.notes]
        if isinstance(result, PassResult) and isinstance(result.notes, tuple)
        else [None]
    )
    known = isinstance(getattr(result, "training", None), TrainingFigures | None)
    if not known or not all(isinstance(text, str) for text in texts):
        raise VerifyError(
            f"pass {index} {p.name!r} must give a PassResult with one line of text and a tuple of notes, and TrainingFigures where "
            f"it trains, got {result!r}; this is a defect of the pass"
        )
    told: PassResult = result
    return told
