"""`python -m sparsec.report`: a model compiled, compared with itself and reported layer by layer."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from sparsec.calibrate import Sequences
from sparsec.compiler import compile
from sparsec.console.command import (
    DTYPES,
    calibration,
    calibration_text,
    check_device,
    on_device,
    untrained_text,
)
from sparsec.console.output import guarded, writable, writable_folder, write_text
from sparsec.console.progress import shown_progress
from sparsec.console.table import paragraph, terminal_width
from sparsec.data import LoadedModel, load_model, load_text
from sparsec.defaults import QUICK, Effort
from sparsec.errors import DataError
from sparsec.evaluate import Encoding, Evaluation, Windows, compare_embeddings, evaluate
from sparsec.opened import stored_report
from sparsec.options.report import PROG, parser
from sparsec.page.ir import KeptIR
from sparsec.page.options import check_pages, write_pages
from sparsec.page.pages import report_page
from sparsec.page.report_charts import report_charts
from sparsec.pipeline import DumpIR, Instrument, Pipeline, PrintIR
from sparsec.progress import Progress, stage
from sparsec.report.collect import Report
from sparsec.report.picture import drawable, pictures
from sparsec.report.records import EvaluationFacts
from sparsec.report.schema import document, layers_csv
from sparsec.study.measure import measured_report
from sparsec.study.plan import StudyPlan, plan
from sparsec.study.sample import continuation
from sparsec.study.variants import lossless, split
from sparsec.study.views import LayerViews

NOT_STORED = (
    "drawn from the report that was saved with the model: it holds no text of the graph, no pictures of single layers, and not "
    "what the machine reaches in a roofline; report the model that it was made from to see these"
)


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    args = parser(prog).parse_args(argv)
    return guarded(lambda: _run(args), args.traceback, args.json)


def _run(args: argparse.Namespace) -> None:
    if args.model is not None and (stored := stored_report(args.model)) is not None:
        _show_stored(args, stored)
        return
    # What can be wrong is looked at before anything slow runs.
    pipeline = Pipeline.parse(args.passes)
    beside = [Pipeline.parse(spec) for spec in args.beside]
    for each in (pipeline, *beside):
        each.validate()
    if args.sensitivity and args.no_measure:
        raise DataError("--sensitivity runs the model, and --no-measure runs none; leave one out")
    check_device(args.device)
    outputs = [writable(path) for path in (args.json, args.csv) if path is not None]
    if args.dump_ir is not None:
        writable_folder(args.dump_ir, "the IR cannot be dumped there")
    drawing = check_pages(args)
    text = None if args.no_measure else load_text(args.text)
    learnt = calibration_text(args, [pipeline, *beside])
    second = None if text is None else untrained_text(args, [pipeline, *beside], text, learnt)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    instruments: list[Instrument] = [] if args.print_ir == "none" else [PrintIR(args.print_ir)]
    if args.dump_ir:
        instruments.append(DumpIR(args.dump_ir))
    views, ir = LayerViews(), KeptIR()
    if args.picture or drawing:
        instruments.append(views)
    if drawing:
        instruments.append(ir)
    with shown_progress(sys.stderr) as progress:
        with stage(progress, "loading the model"):
            loaded = on_device(load_model(args.model, DTYPES[args.dtype], progress, args.seed), args.device)
        pictured = drawable(args.picture, [name for name, p in loaded.model.named_parameters() if p.dim() > 1])
        planned = None if text is None else plan(loaded, text, effort(args), args.bos, second)
        drawn = calibration(loaded, args, [pipeline, *beside], learnt, progress)
        others = {} if planned is None else {str(p): _beside(loaded, p, planned, drawn, progress) for p in beside}
        report, _ = measured_report(loaded, pipeline, planned, instruments, progress, drawn)
        report = replace(_with(report, others), views=views.found())
    print("\n".join([report.text(args.layers, terminal_width()), *pictures(report.views, pictured)]))
    _write(args, report)
    with shown_progress(sys.stderr) as progress:  # last: what could not be drawn takes nothing else along
        outputs += write_pages(args, lambda: report_page(report, ir, progress), lambda: report_charts(report))
    _named(outputs)


def _show_stored(args: argparse.Namespace, report: Report) -> None:
    """The report that was saved with a model. DataError for options that only a run could honour."""
    usual = vars(parser().parse_args([]))
    said = {"model", "layers", "json", "csv", "html", "png", "svg", "traceback"}
    given = [f"--{name.replace('_', '-')}" for name in usual if name not in said and getattr(args, name) != usual[name]]
    if given:
        raise DataError(
            f"{args.model}: sparsec saved this model, so the report that was saved with it is shown and nothing is run; leave out "
            f"{', '.join(given)}, or report the model that it was made from"
        )
    print(f"As {args.model} was saved; sparsec evaluate and sparsec bench measure it now.\n")
    outputs = [writable(path) for path in (args.json, args.csv) if path is not None]
    drawing = check_pages(args)
    print(report.text(args.layers, terminal_width()))
    _write(args, report)
    if drawing:
        report = replace(report, remarks=(*report.remarks, NOT_STORED))
        outputs += write_pages(args, lambda: report_page(report, None), lambda: report_charts(report))
        print("\n".join(["", *paragraph(NOT_STORED, width=terminal_width())]))
    _named(outputs)


def _write(args: argparse.Namespace, report: Report) -> None:
    if args.json:
        write_text(args.json, json.dumps(document(report), indent=1, allow_nan=False) + "\n")
    if args.csv:
        write_text(args.csv, layers_csv(report))


def _named(outputs: Sequence[str]) -> None:
    if outputs:
        print(f"\nwritten: {', '.join(outputs)}")


@dataclass(frozen=True)
class _Beside:
    """Of other passes: what was found on the text and on the second one; what the model writes."""

    found: Evaluation | Encoding
    second: Evaluation | Encoding | None
    text: str | None


def _quality(found: Evaluation | Encoding, windows: EvaluationFacts) -> float:
    """The perplexity, of an encoder the cosine, on the windows that the report's own models were run on: where time was short, the
    first few."""
    if isinstance(found, Encoding):
        return replace(found, cosines=found.cosines[: windows.windows]).cosine
    return replace(found, losses=found.losses[: windows.windows]).perplexity


def _beside(
    loaded: LoadedModel,
    pipeline: Pipeline,
    planned: StudyPlan,
    drawn: Sequences | None,
    progress: Progress,
) -> _Beside:
    """What other passes give on the same windows and after the same prompt; how they lower matters where values are quantised."""
    before, rest = split(pipeline)
    with stage(progress, f"beside it: {pipeline}"):
        pruned = compile(loaded.model, before if lossless(rest) else pipeline, calibration=drawn, progress=progress)

        def found(windows: Windows) -> Evaluation | Encoding:
            if loaded.is_encoder:
                both = {"dense": loaded.model, "pruned": pruned}
                return compare_embeddings(both, windows, progress, "its embeddings")["pruned"]
            return evaluate(pruned, windows, progress, "its perplexity")

        text = None
        if planned.prompt is not None:
            tokens, count = planned.prompt.tokens, planned.effort.new_tokens
            text = continuation(pruned, loaded.tokenizer, tokens, count, planned.effort.seconds)
        second = None if planned.second is None else found(planned.second)
        return _Beside(found(planned.windows), second, text)


def _with(report: Report, others: Mapping[str, _Beside]) -> Report:
    """The report with what other passes give; their texts stand behind that of the dense model."""
    sample = report.sample
    if sample is not None:
        dense, rest = {"dense": sample.texts["dense"]}, {n: t for n, t in sample.texts.items() if n != "dense"}
        written = {spec: other.text for spec, other in others.items() if other.text is not None}
        sample = replace(sample, texts=dense | written | rest)
    first, second = report.evaluation, report.second
    return replace(
        report,
        sample=sample,
        beside={} if first is None else {spec: _quality(other.found, first) for spec, other in others.items()},
        beside_second={
            spec: _quality(other.second, second)
            for spec, other in others.items()
            if second is not None and other.second is not None
        },
    )


def effort(args: argparse.Namespace) -> Effort:
    """How much to measure: the usual or `--quick`, with what was given in its place."""
    given = {
        "windows": args.eval_windows,
        "length": args.eval_length,
        "prompt": args.prompt,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "sensitivity": args.sensitivity,
    }
    return replace(QUICK if args.quick else Effort(), **{k: v for k, v in given.items() if v is not None})


if __name__ == "__main__":
    sys.exit(main())
