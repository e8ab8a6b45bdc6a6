"""`python -m sparsec.bench`: the kernel table, or whole models."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial

import torch

from sparsec.bench import arguments, busy, end_to_end_output, gpu_run, output
from sparsec.bench.cases import AUTO, Case, cases
from sparsec.bench.end_to_end import DecodingEffort, recipes, time_modes
from sparsec.bench.end_to_end_output import Run
from sparsec.bench.kernels import Result, measure
from sparsec.bench.peers import installed, peers_beside
from sparsec.bench.room import require_room
from sparsec.bench.sources import source
from sparsec.console.command import DTYPES
from sparsec.console.output import guarded, write_text
from sparsec.console.progress import shown_progress
from sparsec.console.table import paragraph
from sparsec.cost import Found, machine_constants
from sparsec.kernels import status
from sparsec.machine import machine
from sparsec.options.bench import FORMATS, PROG, ROTATE_MB, SHAPES, parser
from sparsec.progress import Progress, stage
from sparsec.report.text import machine_lines
from sparsec.timing.rotation import Protocol, Rotation


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    options = parser(prog).parse_args(argv)
    return guarded(lambda: _run(options), json=options.json)


def _run(options: argparse.Namespace) -> None:
    arguments.check(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    with shown_progress(sys.stderr) as progress:
        if options.busy:
            run_busy(options, progress)
        elif options.device == "cuda":
            gpu_run.run(options, progress)
        elif options.end_to_end is None:
            run_table(options, progress)
        else:
            run_models(options, progress)


def run_busy(options: argparse.Namespace, progress: Progress | None) -> None:
    """Measures and prints what a busy machine costs."""
    dtypes = [DTYPES[name] for name in arguments.read_dtypes(options.dtypes or "fp32")]
    shapes = arguments.read_shapes(options.shapes or busy.SHAPES)
    layers, repeats = options.layers or busy.LAYERS, options.repeats or 20
    require_room(max(2 * layers * out * columns * 4 for out, columns in shapes), "walking through layers", _SMALLER)
    found = machine()
    walks = [busy.products(shape, dtype, layers, repeats, progress) for shape in shapes for dtype in dtypes]
    passes = busy.pass_times(*busy.small_model(), progress)
    print("\n".join([*machine_lines(found), *output.doubts(found), "", *busy.text(walks, passes)]))


def run_table(options: argparse.Namespace, progress: Progress | None) -> None:
    """Measures and prints the kernel table, and writes its files."""
    rotate_mb = ROTATE_MB if options.rotate_mb is None else options.rotate_mb
    protocol = Protocol(0 if options.layers else rotate_mb << 20, options.layers)
    todo = cases(
        arguments.read_shapes(options.shapes or SHAPES),
        arguments.read_formats(options.formats or FORMATS),
        arguments.read_sparsities(options.sparsity),
        arguments.read_dtypes(options.dtypes or "fp32"),
        arguments.read_rows(options.rows or "1"),
    )
    require_room(max(_bytes(c, protocol) for c in todo), "walking through copies", _SMALLER)
    known = _constants(todo, progress)
    found = machine()
    source_of_constants = known.source if known else "none (sparsec cost measures it)"
    print("\n".join(output.about(found, str(protocol), source_of_constants)))
    print("".join(f"{line}\n" for line in output.doubts(found)), end="")
    for notice in known.notices if known else ():
        print("\n".join(paragraph(notice, "note: ")))
    rotation, results, left_out = Rotation(protocol), list[Result](), list[str]()
    for i, case in enumerate(todo, 1):
        with stage(
            progress, f"{i} of {len(todo)}: {case.out_features}x{case.in_features}, {case.rows} rows, {case.dtype}"
        ):
            measured = measure(case, rotation, options.repeats or 20, known.constants if known else None)
        results += measured.results
        left_out += measured.left_out
    print("\n".join([*output.text(results), *output.accuracy(results), *paragraph(output.LEGEND)]))
    for reason in dict.fromkeys(left_out):
        print("\n".join(paragraph(reason, "left out: ")))
    if options.json:
        written = {"rotate_bytes": protocol.nbytes, "layers": protocol.layers}
        write_text(options.json, output.document(results, found, written, left_out))
    if options.csv:
        output.write_csv(options.csv, [output.record(r) for r in results])


def run_models(options: argparse.Namespace, progress: Progress | None) -> None:
    """Measures and prints whole models, one dtype after the other, and writes the files."""
    dtypes = arguments.read_dtypes(options.dtypes or "fp32")
    wanted = recipes(options.passes, arguments.read_sparsities(options.sparsity))
    given = {
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "repeats": options.repeats,
        "compiled": options.compile,
    }
    effort = DecodingEffort(**{name: value for name, value in given.items() if value is not None})
    packages = None if options.peers is None else installed(options.peers)
    found, runs = machine(), []
    print("\n".join([*machine_lines(found), *output.doubts(found)]))
    for name in dtypes:
        loaded = source(options.end_to_end, DTYPES[name], len(wanted), options.layers, progress)
        said = list[str]()
        peers = None if packages is None else partial(peers_beside, packages, said=said, progress=progress)
        modes = time_modes(loaded.model, wanted, effort, progress, peers)
        versions = {} if packages is None else packages.versions
        runs.append(Run(loaded.name, loaded.origin, name, effort, tuple(modes), versions, tuple(said)))
        print("\n".join(["", *end_to_end_output.text(runs[-1])]))
    if options.json:
        write_text(options.json, end_to_end_output.document(runs, found))
    if options.csv:
        output.write_csv(options.csv, [r for done in runs for r in end_to_end_output.records(done)])


_SMALLER = "take fewer --formats, smaller --shapes, or a smaller --rotate-mb or --layers"


def _bytes(case: Case, protocol: Protocol) -> int:
    """At most, of what all contenders of a case walk through; torch.sparse holds 12 bytes and more for a kept weight."""
    dense = case.out_features * case.in_features * DTYPES[case.dtype].itemsize
    contenders = len(case.formats) + 5
    passing = case.rows * (case.in_features + case.out_features) * DTYPES[case.dtype].itemsize  # x, and a result
    return contenders * (max(protocol.nbytes, protocol.count(dense) * dense) + passing)


def _constants(todo: Sequence[Case], progress: Progress | None) -> Found | None:
    """Measured where `auto` has to choose by it, else only looked up; None without native kernels, which it is about."""
    if not status().built:
        return None
    choosing = any(f == AUTO for case in todo for f in case.formats)
    dtypes = list(dict.fromkeys(DTYPES[case.dtype] for case in todo))
    return machine_constants(dtypes, measuring=choosing, progress=progress)


if __name__ == "__main__":
    sys.exit(main())
