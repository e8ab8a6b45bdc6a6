"""The most memory that passes would take on a graph, and which of them where: an upper bound, from shapes alone."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from sparsec import memory
from sparsec.calibrate import CalibrationData
from sparsec.cost.phase import Phase
from sparsec.errors import CompileError, briefly
from sparsec.ir.graph import Graph
from sparsec.pipeline import Pipeline
from sparsec.pipeline.base import Effect, Pass
from sparsec.pipeline.foreseen import Foreseen
from sparsec.pipeline.spec import unparse_one
from sparsec.ranks import Ranks

PROCESS = 350_000_000
"""Interpreter and libraries with a traced model, mapped files aside, where the system does not tell what this process takes."""
GROWN = {False: 64_000_000, True: 130_000_000}
"""Bytes that libraries take once they compute, and that are freed and not handed back yet while streaming; the second with a
calibration."""
SCATTERED = (0.9, 340_000_000)
"""What a solve frees leaves gaps, with a calibration: this share of what it took, and so many bytes at most. Wanda took
1,210 MB on a Llama of 3B, of which 375 by a solve, 899 and 214 in eight blocks of Qwen2.5-Coder-1.5B, 472 and 40 on SmolLM2."""
SLACK = 1.05
"""What allocators and libraries take beside what is asked of them."""


@dataclass(frozen=True)
class Moment:
    """A phase of a pass. standing: bytes of the model, in all states between the passes, where it is no mapped file."""

    spec: str
    phase: Phase
    standing: int = 0

    @property
    def nbytes(self) -> int:
        """All that is held, the process aside."""
        return self.standing + int(SLACK * self.phase.nbytes)


@dataclass(frozen=True)
class Footprint:
    """process: bytes of interpreter and libraries. notes: what was taken for granted."""

    process: int
    moments: tuple[Moment, ...]
    notes: tuple[str, ...] = ()

    @property
    def worst(self) -> Moment | None:
        """Where most is held; None where passes take nothing to speak of."""
        return max(self.moments, key=lambda moment: moment.nbytes, default=None)

    @property
    def total(self) -> int:
        """Bytes at the worst moment."""
        return self.process + (self.worst.nbytes if self.worst is not None else 0)

    @property
    def files(self) -> int:
        """Bytes of the files that a streamed run keeps beside its result, packed weights aside, where most of them are there."""
        phases = [moment.phase for moment in self.moments]
        return sum(phase.files for phase in phases) + max((phase.passing for phase in phases), default=0)

    @property
    def ways(self) -> list[str]:
        """What to change where that is too much, by what takes most."""
        found, worst = ["give more memory"], self.worst
        if worst is None:
            return found
        if worst.phase.solve is not None:
            gram = worst.phase.held["statistics"]
            found.append("prune with wanda, which needs no Gram matrix" if gram else "prune with magnitude")
            found.append("leave the widest layers out with ignore=")
        elif "activations of one call" in worst.phase.held:
            found.append("take shorter calibration sequences")
        elif worst.spec.startswith("lower(auto"):
            found.append("name a layout, such as lower(bitmap)")
        if worst.phase.held.get("activations between blocks"):
            found.append("take fewer calibration sequences, or more ranks")
        return found

    def __str__(self) -> str:
        """In words: the figure, and what it is made of."""
        worst = self.worst
        parts = {"interpreter and libraries": self.process}
        if worst is not None:
            parts |= {"the model": worst.standing} if worst.standing else {}
            parts |= {what: int(SLACK * n) for what, n in worst.phase.held.items() if n}
        told = ", ".join(f"{what} {n / 1e6:,.1f}" for what, n in parts.items())
        where = f" in {worst.spec}, {worst.phase.what} of {worst.phase.where}" if worst is not None else ""
        return f"{self.total / 1e6:,.1f} MB{where}: {told}"


def peak(
    graph: Graph,
    pipeline: Pipeline,
    data: CalibrationData | None = None,
    *,
    streaming: bool = True,
    process: int | None = None,
    now: int | None = None,
    ranks: int = 1,
) -> Footprint:
    """What running a pipeline on a graph would hold at most. The graph stays what it is, and no weight is read.

    data: the calls that it would be calibrated on; only their shapes count, so they may be on torch's device meta. streaming:
    weights, masks and packed tensors lie in mapped files, which are no memory; else all of the model is held. process: bytes of
    interpreter and libraries, by default what this process takes; now: that, looked at before. ranks: processes that work
    together, each of which holds that.
    Raises PipelineError, SelectionError and WeightError as a run does, and TraceError where shapes depend on numbers.
    """
    pipeline.validate(graph.facts)
    graph, foreseen = graph.view(), Foreseen(data, streaming, ranks)
    moments: list[Moment] = []
    for p in pipeline.passes:
        before = _standing(graph, streaming)
        phases = list(p.phases(graph, foreseen))
        graph.forget(p.invalidates - p.produces)
        graph.facts |= p.produces
        standing = max(before, _standing(graph, streaming))
        moments += [Moment(unparse_one(p), phase, standing) for phase in phases]
        if not phases and p.effect is not Effect.ANALYSIS and type(p).phases is Pass.phases:
            foreseen.granted(f"{p.name}: the pass does not say what it takes, so it is taken to need no memory")
    if process is None:
        learning = bool(pipeline.learning)
        share, most = SCATTERED if learning else (0.0, 0)
        gaps = min(most, int(share * max((moment.phase.nbytes for moment in moments), default=0)))
        process = (now or memory.unmapped() or PROCESS) + (GROWN[learning] + gaps if streaming else 0)
    return Footprint(process, tuple(moments), tuple(foreseen.notes))


def refuse_beyond(
    limit: int | None,
    folder: Path | None,
    graph: Graph,
    pipeline: Pipeline,
    data: CalibrationData | None,
    *,
    ranks: Ranks,
) -> None:
    """Raises CompileError where `peak` is more than `limit` bytes, or the disk of the folder that a run streams into too full.

    folder: None for a run in memory. What it holds already counts as room: it is of the same run. Weights that are in memory may be
    written in place, so that less is kept: then the disk is not looked at.
    """
    if limit is None and folder is None:
        return
    try:
        found = peak(graph, pipeline, data, streaming=folder is not None, ranks=ranks.count)
    except Exception as error:  # whatever a pass raises: what is wrong the run says itself
        if limit is not None:
            raise
        graph.notes.append(f"whether the disk has room was not looked at: {briefly(error)}")
        return
    if folder is not None and not any(memory.is_own(graph.tensor(name)) for name in graph.weights):
        _refuse_full(folder, found.files, ranks)
    if limit is not None and found.total > limit:
        raise CompileError(
            f"this run would hold {found}; max_memory is {limit / 1e6:,.1f} MB: {', or '.join(found.ways)}"
        )


def _refuse_full(folder: Path, files: int, ranks: Ranks) -> None:
    """All ranks refuse where one has too little room; that those on one machine share a disk is not looked at."""
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not _beside(path, folder))
    free = shutil.disk_usage(folder).free
    said = (
        f"{folder}: this run keeps {files / 1e6:,.1f} MB of files there until it is done, and writes its result; "
        f"{free / 1e6:,.1f} MB are free: make room, or save on another disk"
    )
    if refused := [each for each in ranks.told(said if files > held + free else "") if each]:
        raise CompileError(refused[0])


def _beside(path: Path, folder: Path) -> bool:
    """Weights that were converted, and packed ones: what a run needs is told without them."""
    return path.relative_to(folder).parts[0].startswith("source ") or path.name.startswith("packed ")


def _standing(graph: Graph, streaming: bool) -> int:
    """Bytes of weights and masks, each storage once."""
    if streaming:
        return 0
    masks = sum(w.numel for w in graph.masked())
    return memory.held(graph.module).total + masks
