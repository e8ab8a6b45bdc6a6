"""The measured part of a report: the variants of one model compared on one machine in one run, within a budget of time.

Quality is measured once for dense and once for what was pruned; speed of every variant, so that what zeros give and what the
kernels give can be told apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from sparsec import memory
from sparsec.calibrate import Sequences
from sparsec.cost import machine_constants
from sparsec.cost.constants import Found
from sparsec.data import LoadedModel
from sparsec.defaults import MIN_REPEATS, Effort
from sparsec.evaluate import Encoding, Evaluation, Windows, compare_embeddings
from sparsec.evaluate import compare as compare_outputs
from sparsec.evaluate.embeddings import left_out
from sparsec.formats.csr import VALUE_DTYPES
from sparsec.ir.parts import ENCODED
from sparsec.lowering.setting import unpredicted
from sparsec.machine import cores, gpu_clock, machine
from sparsec.pipeline import Instrument, Pipeline
from sparsec.progress import Progress
from sparsec.report.collect import Report
from sparsec.report.records import EvaluationFacts, LatencyFacts, ModelFacts, Roofs, Sample
from sparsec.study.clock import Clock
from sparsec.study.figures import counted, with_measurements
from sparsec.study.kept_embeddings import KeptEmbeddings
from sparsec.study.kept_logits import KeptLogits
from sparsec.study.layers import LayerTimes, time_layers
from sparsec.study.plan import StudyPlan
from sparsec.study.sample import continuation
from sparsec.study.sensitivity import sensitivities
from sparsec.study.variants import SCARCE, Builder, filled, masked_stock, scarce, split, warm_up, without_values
from sparsec.timing.latency import Comparison, compare_latency
from sparsec.timing.others import in_the_way


def measured_report(
    loaded: LoadedModel,
    pipeline: Pipeline,
    planned: StudyPlan | None,
    instruments: Sequence[Instrument] = (),
    progress: Progress | None = None,
    calibration: Sequences | None = None,
) -> tuple[Report, Any]:
    """Compiles the model and compares dense, masked, dense on sparsec's kernels and lowered; returns what it made, too.

    planned: None leaves out everything that runs a model. calibration: tokens [sequences, length] for passes that need them, and
    where they come from. A model that has most of the memory is consumed. Raises what `compile` raises.
    """
    pipeline.validate()
    measuring = planned is not None
    before, rest = split(pipeline)
    run = _Run(loaded, planned, progress, Clock(planned.effort.seconds if planned else 0.0))
    with run.clock.stage("measuring the machine"):
        known = known_machine(loaded.model, progress) if measuring else None
        if measuring:
            warm_up()
    dense = loaded.model
    facts = ModelFacts(
        loaded.name,
        type(dense).__name__,
        loaded.source,
        loaded.source_precision,
        str(next(dense.parameters()).dtype).removeprefix("torch."),
        loaded.is_encoder,
    )
    device = next(dense.parameters()).device.type
    watched: dict[str, Any] = {"instruments": instruments, "progress": progress}
    builder = Builder(dense, before, rest, calibration, watched, measuring)
    builder.built.held["dense"], builder.built.resident["dense"] = memory.held(dense).total, loaded.resident_bytes
    in_turn = not scarce(dense)
    if in_turn:
        _together(run, builder)
    else:
        _one_after_another(run, builder)
    remarks = _on_resident_memory(device) if measuring else ["no model was run: nothing is measured"]
    remarks += [*(() if known is None else known.notices), *loaded.notes]
    remarks += left_out(dense) if measuring else []
    built = builder.built
    remarks.append(f"tracing took {built.trace_seconds:.1f} s, emission {built.emit_seconds:.2f} s")
    if rest is None:
        remarks.append("the passes hold no `lower`, so there is no lowered model")
    if not in_turn:
        remarks.append(
            f"memory: the dense model's {built.held['dense'] / 1e9:.1f} GB are more than {SCARCE:.0%} of what there is, so "
            "variants were built and measured one after another, each in place of the one before; speedups are ratios of medians"
        )
    here = machine()
    if measuring and device == "cuda":
        remarks.append(f"on {here.gpu}, its clock after the timing: {gpu_clock()}")
    report = replace(
        built.report,
        machine=here,
        model=facts,
        summary=counted(built, measuring, decodes=not loaded.is_encoder),
        in_turn=in_turn,
        remarks=tuple(remarks),
        roofs=None if known is None else _roofs(known, dense),
    )
    whole = report if planned is None else run.measured(report, planned)
    return replace(whole, stages=tuple(run.clock.stages)), run.made


@dataclass(eq=False)
class _Quality:
    """What is found on one text."""

    stage: str
    windows: Windows
    part: float  # of the time that is left
    found: dict[str, Evaluation | Encoding] = field(default_factory=dict)  # dense, pruned

    @property
    def facts(self) -> EvaluationFacts:
        """What it was found on."""
        windows, dense = self.windows, self.found["dense"]
        return EvaluationFacts(
            text=windows.text_name,
            text_sha256=windows.text_sha256,
            text_tokens=windows.tokens_in_text,
            windows=dense.windows,
            window_length=windows.length,
            bos=windows.beginning.token,
            protocol=windows.beginning.protocol,
            dtype=dense.dtype,
        )


@dataclass(eq=False)
class _Run:
    """What is found while variants come and go."""

    loaded: LoadedModel
    planned: StudyPlan | None
    progress: Progress | None
    clock: Clock
    qualities: tuple[_Quality, ...] = field(init=False)  # on the text, and on a second one where a pass trains
    times: Comparison | None = None
    longer: Comparison | None = None  # of encoders, on a whole window
    layers: LayerTimes | None = None
    alone: dict[str, float] | None = None  # sensitivity, by weight
    texts: dict[str, str] = field(default_factory=dict)
    made: Any = None  # by all the passes

    def __post_init__(self) -> None:
        found = () if self.planned is None else (_Quality("evaluating", self.planned.windows, 0.5),)
        if self.planned is not None and self.planned.second is not None:
            found = (*found, _Quality("evaluating on a second text", self.planned.second, 0.4))
        self.qualities = found

    def evaluate(self, quality: _Quality, models: Mapping[str, Any], count: int | None = None) -> None:
        """Of the function; where `count` is given, on so many windows without a look at the time."""
        wanted = quality.windows if count is None else replace(quality.windows, tokens=quality.windows.tokens[:count])
        with self.clock.stage(quality.stage, budgeted=True):
            seconds = self.clock.share(quality.part) if count is None else None
            if self.loaded.is_encoder:
                quality.found |= compare_embeddings(models, wanted, self.progress, "embeddings", seconds=seconds)
            else:
                quality.found |= compare_outputs(models, wanted, self.progress, "perplexity", seconds=seconds)
        memory.trim()  # of a large vocabulary's logits, before more variants are built
        if count is None:
            self.clock.counted(quality.stage, quality.found["dense"].windows, wanted.count, "windows")

    def time(self, models: Mapping[str, Any], part: float = 0.7) -> None:
        """Prefill and decoding, by turns."""
        if self.planned is None or not models:
            return
        effort = self.planned.effort
        decode_repeats = None if self.loaded.is_encoder else max(effort.repeats, effort.new_tokens)
        with self.clock.stage("timing the models", budgeted=True):
            seconds = self.clock.share(part)
            prompt = self.planned.timed
            if self.loaded.is_encoder:
                seconds /= 2
                window = self.planned.windows.tokens[:1]
                long = compare_latency(models, window, effort.repeats, None, self.progress, seconds)
                self.longer = long if self.longer is None else self.longer.beside(long)
            found = compare_latency(models, prompt, effort.repeats, decode_repeats, self.progress, seconds)
        self.times = found if self.times is None else self.times.beside(found)
        few = min(latency.prefill_ms.repeats for latency in self.times.latencies.values())
        self.clock.counted("timing the models", few, effort.repeats, "rounds of prefill")

    def time_layers(self, lowered: Any, dense: nn.Module | None) -> None:
        """Against the dense modules, or what is unpacked where these are gone."""
        if self.planned is None:
            return
        with self.clock.stage("timing layers", budgeted=True):
            seconds = self.clock.share(0.4)
            rows = self.planned.timed.shape[1] if self.loaded.is_encoder else 1
            self.layers = time_layers(lowered, dense, self.planned.effort.repeats, self.progress, seconds, rows)
        self.clock.counted("timing layers", self.layers.timed, self.layers.products, "products")

    def sense(self, dense: Any, pruned: Any) -> None:
        """Each weight pruned alone; before the model is lowered."""
        if self.planned is None or self.planned.alone is None:
            return
        with self.clock.stage("sensitivity"):
            graph, windows = pruned.sparsec.graph, self.planned.alone
            self.alone = sensitivities(dense, graph, windows, self.loaded.is_encoder, self.progress)

    def say(self, name: str, model: Any) -> None:
        """A sample."""
        if self.planned is None or self.planned.prompt is None:
            return
        prompt, new_tokens = self.planned.prompt.tokens, self.planned.effort.new_tokens
        with self.clock.stage("sample", budgeted=True):
            seconds = max(1.0, self.clock.share(0.5))
            self.texts[name] = continuation(model, self.loaded.tokenizer, prompt, new_tokens, seconds)

    def measured(self, report: Report, planned: StudyPlan) -> Report:
        """The report with what was measured."""
        assert self.times is not None
        windows, effort, times = planned.windows, planned.effort, self.times
        expected = report.linears_dense_ms
        first, *others = self.qualities
        second = others[0] if others else None
        on_second = None if second is None else second.found
        summary = {
            n: with_measurements(v, n, first.found, times, self.longer, expected, on_second)
            for n, v in report.summary.items()
        }
        remarks = [*report.remarks, *times.notes]
        layers = report.layers
        if self.layers is not None:
            t = self.layers
            layers = tuple(
                replace(
                    row,
                    speedup_measured=t.speedups.get(row.name),
                    ms_dense=t.ms_dense.get(row.name),
                    ms=t.ms.get(row.name),
                )
                for row in layers
            )
            remarks.append(_on_layers(self.layers, effort, planned, self.loaded.is_encoder))
        if planned.alone is not None:
            alone = {name: kl for name, kl in (self.alone or {}).items() if math.isfinite(kl)}
            layers = tuple(replace(row, sensitivity=alone.get(row.name)) for row in layers)
            remarks.append(_on_sensitivity(self.alone, alone, planned.alone, self.loaded.is_encoder))
        if effort.repeats < MIN_REPEATS:
            remarks.append(
                f"quick: {effort.repeats} repeats and {windows.count} windows of {windows.length} are too few to compare by"
            )
        if (sampled := self.clock.sampled()) is not None:
            remarks.append(sampled)
        dense = times.latencies["dense"]
        return replace(
            report,
            layers=layers,
            summary=summary,
            evaluation=first.facts,
            second=None if second is None else second.facts,
            latency=LatencyFacts(
                planned.timed.shape[1],
                torch.get_num_threads(),
                dense.prefill_ms.repeats,
                None if dense.decode_ms is None else dense.decode_ms.repeats,
                times.others,
                in_the_way(times.others, torch.get_num_threads(), cores()),
                None if self.longer is None else windows.length,
                None if self.longer is None else self.longer.latencies["dense"].prefill_ms.repeats,
            ),
            sample=None
            if planned.prompt is None
            else Sample(planned.prompt.text, planned.prompt.chat, effort.new_tokens, self.texts),
            remarks=tuple(remarks),
        )


def _together(run: _Run, builder: Builder) -> None:
    """All variants share what is equal, and take turns."""
    with run.clock.stage("compiling"):
        pruned = builder.prune()
    run.sense(builder.dense, pruned)
    with run.clock.stage("compiling"):
        made = pruned if builder.rest is None else builder.lower(pruned)
        del pruned  # a lowered one took its place
    run.made = made
    last = "masked" if builder.rest is None else "lowered"
    for quality in run.qualities:
        run.evaluate(quality, {"dense": builder.dense, "pruned": made})
    if run.planned is None:
        return
    with run.clock.stage("compiling"):
        models = {
            "dense": builder.dense,
            "masked": masked_stock(builder.dense, made),
            "dense_on_sparsec": builder.on_sparsec(),
        }
    models |= {} if builder.rest is None else {"lowered": made}
    run.time({name: model for name, model in models.items() if model is not None})
    if builder.rest is not None:
        run.time_layers(made, builder.dense)
    del models
    run.say("dense", builder.dense)
    run.say(last, made)


def _one_after_another(run: _Run, builder: Builder) -> None:
    """The dense model is measured, pruned in place and measured, lowered in place and measured."""
    dense = builder.dense
    keep: Any = KeptEmbeddings if run.loaded.is_encoder else KeptLogits
    kept = [keep(dense) for _ in run.qualities]
    for quality, each in zip(run.qualities, kept, strict=True):
        run.evaluate(quality, {"dense": each})
        each.forget()
    if run.planned is not None:
        own = builder.on_sparsec()
        run.time({"dense": dense} | ({} if own is None else {"dense_on_sparsec": own}), 0.4)
        del own
        memory.page_out(dense.parameters())
        run.say("dense", dense)
    stock = without_values(dense)  # its modules, which run on torch's kernels
    with run.clock.stage("compiling"):
        pruned = builder.prune(copy=False)
    run.time({"masked": filled(stock, pruned)}, 0.4)
    del stock
    made = pruned
    if builder.rest is not None:
        with run.clock.stage("compiling"):
            made = builder.lower(pruned)
    for quality, each in zip(run.qualities, kept, strict=True):
        run.evaluate(quality, {"dense": each, "pruned": made}, quality.found["dense"].windows)
    if builder.rest is not None:
        run.time({"lowered": made}, 0.4)
        run.time_layers(made, None)
    run.say("masked" if builder.rest is None else "lowered", made)
    run.made = made


def _on_layers(found: LayerTimes, effort: Effort, planned: StudyPlan, encoder: bool) -> str:
    on_gpu = planned.timed.device.type == "cuda"
    rows = f"{planned.timed.shape[1]} rows" if encoder else "one row"
    how = "replayed CUDA graphs of many cold copies" if on_gpu else "each through all of them as decoding does"
    return (
        f"measured speedup of a layer: {rows} through its module against the dense module, median of up to {effort.repeats} "
        f"rounds, {how}; {found.timed} of {found.products} lowered products were timed, equal ones have the median of their kind; "
        "layers of one fused product go together"
        + (
            f"; predicted for {ENCODED} rows, as lower(auto) weighs an encoder unless it is told `tokens`"
            if encoder
            else ""
        )
    )


def _on_sensitivity(
    found: dict[str, float] | None, finite: Mapping[str, float], windows: Windows, encoder: bool
) -> str:
    if found is None:
        return "sensitivity was not measured: memory does not hold the dense model beside the pruned one"
    what = "1 - cosine of the embedding" if encoder else "KL(dense || this) in nats a token"
    size = f"{windows.count} x {windows.length} tokens of {windows.text_name}"
    lost = f"; {len(found) - len(finite)} weights give NaN or inf alone" if len(finite) < len(found) else ""
    return f"sensitivity: {what}, of the dense model with one weight alone as pruning left it, on {size}{lost}"


def known_machine(model: nn.Module, progress: Progress | None) -> Found | None:
    """Makes the cost model known before anything is timed; None where it says nothing of such a model."""
    dtypes = {p.dtype for p in model.parameters() if p.dtype in VALUE_DTYPES}
    devices = sorted({p.device.type for p in model.parameters()})
    if not dtypes or unpredicted(devices):
        return None
    memory.page_out(model.parameters())  # at first use a GB is read to find out how fast
    found = machine_constants(sorted(dtypes, key=str), device=devices[0], progress=progress)
    memory.trim()
    assert found is not None
    return found


def _roofs(known: Found, model: nn.Module) -> Roofs | None:
    bandwidth, peak = known.constants.bandwidth, known.constants.peak(next(model.parameters()).dtype)
    return None if bandwidth is None or peak is None else Roofs(bandwidth, peak)


def _on_resident_memory(device: str) -> list[str]:
    notice = memory.resident_notice() if device == "cpu" else None
    where = "the process" if device == "cpu" else "what tensors take on the GPU"
    what = (
        f"resident memory: what loading (dense) or building (the others) added to {where}, masks included, and the tensors that a "
        "variant shares with dense"
    )
    return [what, notice] if notice else [what]
