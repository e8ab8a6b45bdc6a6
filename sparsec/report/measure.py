"""The measured part of a report: dense, masked and lowered built from one model and compared on one machine in one run.

masked is the pipeline up to `lower`, so that what pruning changes and what the kernels change can be told apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from sparsec import memory
from sparsec.compiler import compile, extend
from sparsec.cost import calibrate
from sparsec.data import LoadedModel, Text
from sparsec.errors import DataError
from sparsec.evaluate import Evaluation, Windows, cut
from sparsec.evaluate import compare as compare_outputs
from sparsec.formats.csr import VALUE_DTYPES
from sparsec.ir.facts import MATRIX_KINDS
from sparsec.latency import WARM_UP, Comparison, compare, layer_speedups
from sparsec.lowering.setting import unpredicted
from sparsec.machine import gpu_clock, machine
from sparsec.pipeline import Instrument, Pipeline
from sparsec.progress import Progress
from sparsec.report.collect import Report
from sparsec.report.records import EvaluationFacts, LatencyFacts, ModelFacts, Variant, ratio
from sparsec.report.sample import Prompt, read_prompt, sample

T = TypeVar("T")
MIN_REPEATS = 20


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    windows: int = 8
    length: int | None = None  # None: 512, or what the model takes
    prompt: str = "Explain in two sentences why the sky is blue."
    prompt_tokens: int = 64
    new_tokens: int = 40
    repeats: int = MIN_REPEATS


QUICK = Effort(windows=2, length=128, prompt_tokens=16, new_tokens=8, repeats=5)
DEFAULT_LENGTH = 512


@dataclass(frozen=True, eq=False)
class Plan:
    """What will be measured on what, checked before anything slow runs."""

    windows: Windows
    timed: torch.Tensor  # the prompt of the timing: token ids [1, prompt tokens]
    prompt: Prompt  # of the sample
    effort: Effort


def plan(loaded: LoadedModel, text: Text, effort: Effort) -> Plan:
    """Raises DataError when the model has no tokenizer, or the text, the prompt or the model's positions do not suffice."""
    if loaded.tokenizer is None:
        raise DataError(
            f"{loaded.name}: there is no tokenizer, so no text can be evaluated; add one, or use --no-measure"
        )
    limit = getattr(loaded.model.config, "max_position_embeddings", None)
    length = effort.length or min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH)
    windows = cut(text, loaded.tokenizer, length, effort.windows, limit)
    tokens = windows.tokens.flatten()
    if effort.prompt_tokens > len(tokens):
        raise DataError(
            f"a prompt of {effort.prompt_tokens} tokens is cut from the {len(tokens)} evaluated ones; "
            f"take a shorter prompt, or more or longer windows"
        )
    needed = effort.prompt_tokens + WARM_UP + max(effort.repeats, effort.new_tokens) + 1
    if limit is not None and needed > limit:
        raise DataError(
            f"prompt and decoded tokens need {needed} positions, the model has {limit}; take fewer of either"
        )
    prompt = read_prompt(loaded.tokenizer, effort.prompt, effort.new_tokens, limit)
    return Plan(windows, tokens[: effort.prompt_tokens][None], prompt, effort)


def measured_report(
    loaded: LoadedModel,
    pipeline: Pipeline,
    planned: Plan | None,
    instruments: Sequence[Instrument] = (),
    progress: Progress | None = None,
    calibration: tuple[torch.Tensor, str] | None = None,
) -> Report:
    """Compiles the masked and the lowered model and compares them with the dense one.

    planned: None leaves out everything that runs a model. calibration: tokens [sequences, length] for passes that need them, and
    where they come from. Raises what `compile` raises.
    """
    pipeline.validate()
    measuring = planned is not None
    doubts = _calibrate(loaded.model, progress) if measuring else ()
    if measuring:
        # The first trace and the first kernel pay for imports and a build, which are nobody's memory or time.
        warm_up = "magnitude(0.5),freeze,lower(csr)"  # not by the cost model, which may know a GPU alone
        compile(nn.Sequential(nn.Linear(8, 8)), warm_up, example_inputs=torch.ones(2, 8), copy=False)
    before = pipeline.before("lower")
    lowers = before != pipeline
    dense = loaded.model
    device = next(dense.parameters()).device.type
    models: dict[str, Any] = {"dense": dense}
    resident = {"dense": loaded.resident_bytes if measuring else None}
    watched: dict[str, Any] = {"instruments": instruments, "progress": progress}
    builds: dict[str, Callable[[], Any]] = {
        "masked": partial(compile, dense, before, calibration=calibration, **watched)
    }
    if lowers:  # from the masked one, so that pruning is done once
        rest = Pipeline(pipeline.passes[len(before.passes) :])
        builds["lowered"] = lambda: extend(models["masked"], rest, **watched)
    for name, build in builds.items():
        models[name], resident[name] = _resident(build, device) if measuring else (build(), None)
    reports = {name: models[name].sparsec.report() for name in models if name != "dense"}
    report: Report = reports["lowered" if lowers else "masked"]
    summary = {name: _counted(model, reports.get(name), report, resident[name]) for name, model in models.items()}
    facts = ModelFacts(
        loaded.name,
        type(dense).__name__,
        loaded.source,
        loaded.source_precision,
        str(next(dense.parameters()).dtype).removeprefix("torch."),
    )
    remarks = _on_resident_memory(device) if measuring else ["no model was run: nothing is measured"]
    remarks += doubts
    last = models["lowered" if lowers else "masked"].sparsec
    remarks.append(f"tracing took {last.trace_seconds:.1f} s, emission {last.emit_seconds:.2f} s")
    if not lowers:
        remarks.append("the passes hold no `lower`, so there is no lowered model")
    here = machine()
    if measuring and device == "cuda":
        remarks.append(f"on {here.gpu}, its clock before the timing: {gpu_clock()}")
    if measuring and here.load is not None and here.load > here.cores:
        remarks.append(
            f"the machine was busy before the timing ({here.load:.1f} processes on {here.cores} cores): "
            f"trust the ratios more than the milliseconds, and neither much"
        )
    report = replace(report, machine=here, model=facts, summary=summary, remarks=tuple(remarks))
    return report if planned is None else _measured(report, loaded, models, planned, progress)


def _measured(
    report: Report, loaded: LoadedModel, models: Mapping[str, Any], planned: Plan, progress: Progress | None
) -> Report:
    windows, effort = planned.windows, planned.effort
    evaluations = compare_outputs(models, windows, progress, "perplexity")
    decode_repeats = max(effort.repeats, effort.new_tokens)
    times = compare(models, planned.timed, effort.repeats, decode_repeats, progress)
    expected = report.linears_dense_ms
    summary = {n: _with_measurements(v, n, evaluations, times, expected) for n, v in report.summary.items()}
    remarks = [*report.remarks, *times.notes]
    layers = report.layers
    if "lowered" in models:
        products = _products(models["lowered"])
        pairs = {
            weights[0]: (
                [models["dense"].get_submodule(o) for o in owners],
                [models["lowered"].get_submodule(o) for o in owners],
            )
            for weights, owners in products.items()
        }
        times_of = layer_speedups(pairs, effort.repeats, progress)
        speed = {name: times_of[weights[0]] for weights in products for name in weights}
        layers = tuple(replace(row, speedup_measured=speed.get(row.name)) for row in layers)
        how = f"each through all {len(speed)} lowered layers as decoding does"
        if next(models["dense"].parameters()).is_cuda:
            how = "replayed CUDA graphs of many cold copies"
        remarks.append(
            f"measured speedup of a layer: one row through its module against the dense module, median of {effort.repeats} "
            f"rounds, {how}; layers of one fused product go together"
        )
    if effort.repeats < MIN_REPEATS:
        remarks.append(
            f"quick: {effort.repeats} repeats and {windows.count} windows of {windows.length} are too few to compare by"
        )
    shown = {name: model for name, model in models.items() if name != "masked" or "lowered" not in models}
    return replace(
        report,
        layers=layers,
        summary=summary,
        evaluation=EvaluationFacts(
            text=windows.text_name,
            text_sha256=windows.text_sha256,
            text_tokens=windows.tokens_in_text,
            windows=windows.count,
            window_length=windows.length,
            dtype=evaluations["dense"].dtype,
        ),
        latency=LatencyFacts(planned.timed.shape[1], torch.get_num_threads(), effort.repeats, decode_repeats),
        sample=sample(shown, loaded.tokenizer, planned.prompt, effort.new_tokens),
        remarks=tuple(remarks),
    )


def _counted(model: Any, own: Report | None, final: Report, resident: int | None) -> Variant:
    """own: the report of this variant; None for dense, whose counts are those of any of them without zeros."""
    held = memory.held(model).total
    flops = final.flops_dense if own is None else own.flops_per_token
    if own is not None and flops is None and not any(row.packed for row in own.layers):
        flops = final.flops_dense  # the pass flops stands behind lower: a masked model executes what a dense one does
    return Variant(
        parameters=final.parameters,
        nnz=final.parameters if own is None else own.nnz,
        bytes=held,
        bytes_masks=0 if own is None else own.bytes_masks,
        flops_per_token=flops,
        speedup_theoretical=ratio(final.flops_dense, flops),
        speedup_theoretical_bytes=ratio(final.bytes_dense, held),
        resident_bytes=resident,
        linears_ms=final.linears_ms if own is final else final.linears_dense_ms,
    )


def _with_measurements(
    variant: Variant,
    name: str,
    evaluations: Mapping[str, Evaluation],
    times: Comparison,
    dense_linears_ms: float | None,
) -> Variant:
    dense_ms = times.latencies["dense"].decode_ms.median
    return replace(
        variant,
        speedup_predicted=_predicted(dense_ms, dense_linears_ms, variant.linears_ms),
        perplexity=evaluations[name].perplexity,
        top1=evaluations[name].top1,
        top5=evaluations[name].top5,
        kl=evaluations[name].kl,
        prefill_ms=times.latencies[name].prefill_ms,
        decode_ms=times.latencies[name].decode_ms,
        speedup_prefill=times.prefill_speedup[name],
        speedup_decode=times.decode_speedup[name],
    )


def _products(lowered: Any) -> dict[tuple[str, ...], tuple[str, ...]]:
    """weights -> owners of every product that runs on kernels of sparsec, in order of execution; a weight goes once."""
    graph = lowered.sparsec.graph
    products = [op for op in graph.ops.values() if op.kind in MATRIX_KINDS]
    return {op.matrices: op.owners for op in products if any(op.kernel_of(name) for name in op.matrices)}


def _predicted(dense_ms: float, dense_linears_ms: float | None, linears_ms: float | None) -> float | None:
    """Of decoding: what is saved in linear layers, taken from the measured time of the dense model; None where that makes no
    sense, since the model is too small for its linears to be seen."""
    if dense_linears_ms is None or linears_ms is None or dense_ms <= dense_linears_ms - linears_ms:
        return None
    return dense_ms / (dense_ms - dense_linears_ms + linears_ms)


def _calibrate(model: nn.Module, progress: Progress | None) -> tuple[str, ...]:
    """Makes the cost model known before anything is timed; what there is to say about it."""
    dtypes = {p.dtype for p in model.parameters() if p.dtype in VALUE_DTYPES}
    devices = sorted({p.device.type for p in model.parameters()})
    if not dtypes or unpredicted(devices):
        return ()
    found = calibrate(sorted(dtypes, key=str), device=devices[0], progress=progress)
    assert found is not None
    return found.notices


def _on_resident_memory(device: str) -> list[str]:
    notice = memory.resident_notice() if device == "cpu" else None
    where = "the process" if device == "cpu" else "what tensors take on the GPU"
    what = f"resident memory: what loading (dense) or building as a copy (masked, lowered) added to {where}, masks included"
    return [what, notice] if notice else [what]


def _resident(build: Callable[[], T], device: str) -> tuple[T, int | None]:
    before = memory.resident(device)
    built = build()
    after = memory.resident(device)
    return built, None if before is None or after is None else after - before
