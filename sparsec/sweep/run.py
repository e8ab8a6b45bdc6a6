"""Measures the cells that a planner asks for: one dense reference for all, one pruning for those in a row that prune alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Protocol

import torch

from sparsec import memory
from sparsec.calibrate import Sequences
from sparsec.compiler import compile, extend
from sparsec.data import LoadedModel
from sparsec.errors import SparsecError, first_words
from sparsec.evaluate import Encoding, Evaluation, compare_embeddings
from sparsec.evaluate import compare as compare_outputs
from sparsec.machine import cores
from sparsec.pipeline import Pass, Pipeline
from sparsec.pipeline.table import known_passes
from sparsec.progress import Progress, stage
from sparsec.report.collect import Report
from sparsec.report.layer import known_ratio
from sparsec.report.variant import Variant
from sparsec.study.figures import with_measurements
from sparsec.study.kept_embeddings import KeptEmbeddings
from sparsec.study.kept_logits import KeptLogits
from sparsec.study.measure import known_machine
from sparsec.study.plan import StudyPlan
from sparsec.study.variants import lossless, masked_stock, split, warm_up
from sparsec.sweep.energy import EnergyMeter
from sparsec.sweep.grid import Cell
from sparsec.timing.latency import Comparison, compare_latency
from sparsec.timing.others import in_the_way

DENSE = "dense"
"""The specification of the reference, as a row."""


@dataclass(frozen=True)
class CellResult:
    """What one cell gave; where it failed, `error` says why and nothing is known."""

    spec: str
    values: tuple[tuple[str, str], ...]
    figures: Variant | None
    error: str = ""
    layouts: str = ""  # of its packed matrices, with their numbers
    energy_mj: float | None = None  # per generated token; None where the machine does not tell
    disturbed: bool = False  # other processes left too few cores while it was timed
    seconds: float = 0.0  # of compiling and measuring
    template: str = ""  # that the values went into

    @property
    def timed(self) -> bool:
        """Whether it was timed, and not looked at for its quality alone."""
        return self.figures is not None and self.figures.prefill_ms is not None


class Planner(Protocol):
    """Says which cells a study measures, in view of what those before them gave."""

    @property
    def candidates(self) -> Sequence[Cell]:
        """Every cell that may be asked for."""
        ...

    def next(self, results: Mapping[str, CellResult]) -> Sequence[Cell]:
        """Cells to measure now; empty when the study is done. results: by specification, those that failed too."""
        ...

    def left(self, results: Mapping[str, CellResult]) -> int:
        """How many cells are expected from here on."""
        ...


def settled(cell: Cell, results: Mapping[str, CellResult]) -> CellResult | None:
    """What a cell gave; None where it was not measured, or without the times that it needs."""
    found = results.get(cell.spec)
    return found if found is None or found.error or found.timed or not cell.timed else None


def renamed(results: Mapping[str, CellResult], cells: Sequence[Cell]) -> dict[str, CellResult]:
    """Results under the placeholders of these cells: one that was taken over may have been asked for with others."""
    asked = {cell.spec: cell for cell in cells}
    return {
        spec: replace(result, values=asked[spec].values, template=asked[spec].template) if spec in asked else result
        for spec, result in results.items()
    }


def measure_cells(
    loaded: LoadedModel,
    planner: Planner,
    planned: StudyPlan,
    calibration: Sequences | None,
    done: Mapping[str, CellResult],
    keep: Callable[[CellResult], None],
    progress: Progress | None = None,
) -> None:
    """Measures what the planner asks for and is not done, the dense reference first; each result goes to `keep` at once.

    What failed in `done` is tried again. A planner that asks for nothing but what is settled has come to its end.
    """
    results = {spec: result for spec, result in done.items() if not result.error}
    run: _Run | None = None
    known, count = False, 0

    def found(result: CellResult) -> None:
        results[result.spec] = result
        keep(result)

    while (
        wanted := [cell for cell in planner.next(results) if settled(cell, results) is None]
    ) or DENSE not in results:
        if run is None:
            warm_up()
            run = _Run(loaded, planned, calibration, progress)
            run.begin()
        timed = any(cell.timed for cell in wanted)
        if timed and not known:
            known_machine(loaded.model, progress)  # else nothing is predicted of a layout that was named
            known = True
        if DENSE not in results or (timed and not results[DENSE].timed):
            found(run.dense(timed))
        for cell in wanted:
            if progress is not None:
                progress("cells", count, count + max(1, planner.left(results)))
            found(run.attempt(cell))
            count += 1
            memory.trim()
    if progress is not None and count:
        progress("cells", count, count)


@dataclass(eq=False)
class _Pruned:
    model: Any
    quality: Evaluation | Encoding


class _Run:
    def __init__(
        self,
        loaded: LoadedModel,
        planned: StudyPlan,
        calibration: Sequences | None,
        progress: Progress | None,
    ) -> None:
        self.model, self.planned, self.calibration, self.progress = loaded.model, planned, calibration, progress
        self.encodes = loaded.is_encoder
        self.meter = EnergyMeter(next(self.model.parameters()).device.type)
        self._last: tuple[Pipeline, _Pruned] | None = None

    def begin(self) -> None:
        """Runs the dense model over the windows once, and keeps its logits, or an encoder's embeddings."""
        self.kept: Any = (KeptEmbeddings if self.encodes else KeptLogits)(self.model)
        self.reference = self._compared({DENSE: self.kept}, "dense reference")[DENSE]

    def _compared(self, models: Mapping[str, Any], what: str) -> Mapping[str, Evaluation | Encoding]:
        windows = self.planned.windows
        if self.encodes:
            return compare_embeddings(models, windows, self.progress, what)
        return compare_outputs(models, windows, self.progress, what)

    def dense(self, timed: bool) -> CellResult:
        """The reference itself."""
        start = perf_counter()
        counted = compile(self.model, "sparsity,flops", copy="changed").sparsec.report()
        alone = self._timed({DENSE: self.model}) if timed else None
        figures = _counted(
            counted, counted.parameters, memory.held(self.model).total, 0, counted.flops_dense, counted.linears_dense_ms
        )
        measured = self._measured(figures, DENSE, self.reference, alone, counted)
        return CellResult(
            DENSE,
            (),
            measured,
            energy_mj=self._energy(self.model) if timed else None,
            disturbed=_disturbed(alone),
            seconds=perf_counter() - start,
        )

    def attempt(self, cell: Cell) -> CellResult:
        """Of one cell; its error where it fails. The pruning of the cell before serves the one that prunes alike."""
        start = perf_counter()
        try:
            if self._last is None or self._last[0] != cell.pruning:
                self._last = None  # its memory is free before there is another one
                self._last = cell.pruning, self.pruned(cell.pruning)
            return self.cell(cell, self._last[1], start)
        except (SparsecError, RuntimeError, MemoryError, ValueError, TypeError) as error:  # one cell's, whatever it is
            first = first_words(error)
            spent = perf_counter() - start
            return CellResult(cell.spec, cell.values, None, first, seconds=spent, template=cell.template)

    def pruned(self, pruning: Pipeline) -> _Pruned:
        """The masked model, and its quality, which how it is lowered makes no difference to unless values are quantised."""
        made = compile(
            self.model, _with_flops(pruning), calibration=self.calibration, copy="changed", progress=self.progress
        )
        found = self._compared({DENSE: self.kept.forget(), "pruned": made}, "quality")["pruned"]
        memory.trim()
        return _Pruned(made, found)

    def cell(self, cell: Cell, pruned: _Pruned, start: float) -> CellResult:
        rest = split(cell.pipeline)[1]
        if rest is None:
            report, model = pruned.model.sparsec.report(), masked_stock(self.model, pruned.model)
            name, linears, flops, masks = "masked", report.linears_dense_ms, report.flops_dense, report.bytes_masks
        else:
            model = extend(pruned.model, rest, progress=self.progress)
            report = model.sparsec.report()
            name, linears, flops, masks = "lowered", report.linears_ms, report.flops_per_token, report.bytes_masks
        quality = pruned.quality
        if not lossless(rest):
            quality = self._compared({DENSE: self.kept.forget(), "pruned": model}, "quality")["pruned"]
        figures = _counted(report, report.nnz, memory.held(model).total, masks, flops, linears)
        times = self._timed({DENSE: self.model, name: model}) if cell.timed else None
        measured = self._measured(figures, name, quality, times, report)
        energy = self._energy(model) if cell.timed else None
        return CellResult(
            cell.spec,
            cell.values,
            measured,
            layouts=_layouts(report),
            energy_mj=energy,
            disturbed=_disturbed(times),
            seconds=perf_counter() - start,
            template=cell.template,
        )

    def _timed(self, models: Mapping[str, Any]) -> _Times:
        effort, windows = self.planned.effort, self.planned.windows
        with stage(self.progress, "timing"):
            if not self.encodes:
                decodes = max(effort.repeats, effort.new_tokens)
                return _Times(
                    compare_latency(models, self.planned.timed, effort.repeats, decodes, self.progress, effort.seconds)
                )
            long, short = (
                compare_latency(models, tokens, effort.repeats, None, self.progress, effort.seconds / 2)
                for tokens in (windows.tokens[:1], self.planned.timed)
            )
            return _Times(short, long)

    def _measured(
        self, figures: Variant, name: str, quality: Evaluation | Encoding, times: _Times | None, report: Report
    ) -> Variant:
        evaluations = {DENSE: self.reference, "pruned": quality}
        told = _Times(None) if times is None else times
        if self.encodes:  # the cost model tells of one token
            figures = replace(figures, linears_ms=None)
        return with_measurements(figures, name, evaluations, told.prompt, told.window, report.linears_dense_ms)

    def _energy(self, model: Any) -> float | None:
        if self.encodes:
            return None
        return self.meter.per_token(model, self.planned.timed, self.planned.effort.new_tokens)


@dataclass(frozen=True)
class _Times:
    """Of the prompt, and what is decoded after it; of an encoder's whole window."""

    prompt: Comparison | None
    window: Comparison | None = None


def _disturbed(times: _Times | None) -> bool:
    found = () if times is None else (times.prompt, times.window)
    return any(each is not None and in_the_way(each.others, torch.get_num_threads(), cores()) for each in found)


def _counted(report: Report, nnz: int, held: int, masks: int, flops: float | None, linears: float | None) -> Variant:
    return Variant(
        parameters=report.parameters,
        nnz=nnz,
        bytes=held,
        bytes_masks=masks,
        flops_per_token=flops,
        speedup_theoretical=known_ratio(report.flops_dense, flops),
        speedup_theoretical_bytes=known_ratio(report.bytes_dense, held),
        linears_ms=linears,
    )


def _layouts(report: Report) -> str:
    counts = Counter(row.format for row in report.layers if row.packed)
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


def _with_flops(pipeline: Pipeline) -> Pipeline:
    """With the analyses that a study tells of; they change no weight."""
    held = {p.name for p in pipeline.passes}
    missing: list[Pass] = [known_passes()[name]() for name in ("sparsity", "flops") if name not in held]
    return Pipeline((*pipeline.passes, *missing))
