"""`python -m sparsec.plan`: what passes would take and give on a model, told from its config alone: bytes, memory, time, speed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from sparsec.checkpoint.writing import shard_bytes
from sparsec.console.command import DTYPES
from sparsec.console.output import guarded, writable, write_text
from sparsec.console.progress import shown_progress
from sparsec.console.table import heading, paragraph, table
from sparsec.cost.constants import machine_constants
from sparsec.defaults import CALIBRATION_LENGTH
from sparsec.ir.parts import positions
from sparsec.ir.tracer import trace
from sparsec.memory import unmapped
from sparsec.options.plan import PROG, parser
from sparsec.pipeline import Pipeline
from sparsec.planning.foretell import Foretold, foretell, meta_calls
from sparsec.planning.memory import Footprint
from sparsec.planning.shape import shape_of_model
from sparsec.progress import stage

SCHEMA = "sparsec.plan/1"


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Returns the exit code: 0, 1 where it does not fit into --memory, 2 for bad input."""
    args = parser(prog).parse_args(argv)
    return guarded(lambda: _run(args), args.traceback, json=args.json)


def _run(args: argparse.Namespace) -> int:
    pipeline = Pipeline.parse(args.passes)
    pipeline.validate()
    room = None if args.memory is None else shard_bytes(args.memory, "--memory")
    if args.json is not None:
        writable(args.json)
    with shown_progress(sys.stderr) as progress:
        with stage(progress, "reading the config"):
            model, name = shape_of_model(args.model, DTYPES[args.dtype] if args.dtype else None)
        with stage(progress, "tracing"):
            graph = trace(model)
        data = None
        if pipeline.learning:
            length = args.calibration_length or min(CALIBRATION_LENGTH, positions(model) or CALIBRATION_LENGTH)
            data = meta_calls(graph, args.calibration_sequences, length)
        now = unmapped()  # measuring the machine takes more, and a run whose constants are known does not do that
        dtypes = list(dict.fromkeys((*(w.dtype for w in graph.weights.values()), torch.float32)))
        found = machine_constants(dtypes, progress=progress)
        assert found is not None
        with stage(progress, "planning"):
            told = foretell(
                graph,
                pipeline,
                data,
                found.constants,
                name=name,
                architecture=type(model).__name__,
                ranks=args.ranks,
                context=args.context,
                now=now,
            )
    machine = f"{found.constants.key.processor}, {found.constants.key.threads} threads"
    if args.json is not None:
        write_text(args.json, document(told, room, machine))
    notices = list(found.notices)
    if args.dtype is None and told.dtype != "float32":
        short = next(name for name, dtype in DTYPES.items() if str(dtype) == f"torch.{told.dtype}")
        notices.insert(
            0, f"planned in {told.dtype}, as of the model; sparsec compress then takes --dtype {short}, else it is fp32"
        )
    print("\n".join(text(told, room, machine, notices)))
    return 1 if room is not None and told.footprint.total > room else 0


def document(told: Foretold, room: int | None, machine: str) -> str:
    """JSON of all figures; bytes and seconds."""
    facts: dict[str, Any] = {k: v for k, v in asdict(told).items() if k not in ("footprint", "in_memory", "parts")}
    facts |= {
        "machine": machine,
        "parts": [asdict(part) for part in told.parts],
        "seconds": told.seconds,
        "peak_memory_bytes": told.footprint.total,
        "peak_memory": _worst(told.footprint),
        "peak_memory_in_memory_bytes": told.in_memory.total,
        "memory_bytes": room,
        "fits": None if room is None else told.footprint.total <= room,
    }
    return json.dumps({"schema": SCHEMA, **facts}, indent=2) + "\n"


def _worst(found: Footprint) -> dict[str, Any]:
    worst = found.worst
    if worst is None:
        return {"process": found.process}
    return {
        "pass": worst.spec,
        "what": worst.phase.what,
        "where": worst.phase.where,
        "process": found.process,
        **worst.phase.held,
    }


def text(told: Foretold, room: int | None, machine: str, notices: Sequence[str] = ()) -> list[str]:
    """Lines for a person."""
    lines = [
        *paragraph(
            f"{told.name}: {told.architecture}, {how_many(told.weights)} weights in {told.dtype}, "
            f"{how_many(told.pruned_weights)} of them in matrices that are pruned"
        ),
        *heading("Bytes"),
        *table(
            ["the model, pruned matrices as", "bytes", "of dense"],
            [
                [each, size(n), f"{n / told.bytes_dense:.2f}x"]
                for each, n in {"dense": told.bytes_dense, **_but(told.bytes_by_layout, "dense")}.items()
            ],
        ),
    ]
    layouts = ", ".join(f"{count} as {layout}" for layout, count in told.layouts_after.items())
    lines += paragraph(f"these passes: {size(told.bytes_after)}{f'; {layouts}' if layouts else '; nothing is packed'}")
    each = "" if told.ranks == 1 else f" of each of {told.ranks} ranks"
    lines += heading("Memory")
    lines += paragraph(f"streamed{each}, at most {told.footprint}")
    lines += paragraph(f"with all of the model in memory, at most {told.in_memory}")
    if room is not None:
        lines += paragraph(that_fits(told, room))
    lines += heading("Disk")
    lines += paragraph(
        f"the result {size(told.bytes_after)}; streamed{each}, {size(told.bytes_beside)} more are kept beside it until all is done"
    )
    lines += heading("Time")
    shared = "" if told.ranks == 1 else f", shared by {told.ranks} ranks that have such a machine each"
    learnt = f"calibrated on {told.tokens_of_text:,} tokens" if told.tokens_of_text else "without a text to learn from"
    lines += paragraph(f"on {machine}{shared}; {learnt}. Reading and writing files is not in it")
    rows = [[p.spec, p.what, f"{p.flops / 1e12:,.1f}" if p.flops else "", duration(p.seconds)] for p in told.parts]
    lines += table(["pass", "what", "TFLOP", "time"], [*rows, ["all", "", "", duration(told.seconds)]], left=(0, 1))
    lines += heading("Speed")
    lines += paragraph(
        f"decoding: {told.tokens_after:,.3g} tokens a second, dense {told.tokens_dense:,.3g}: products and what attention reads"
    )
    lines += [line for note in (*told.notes, *notices) for line in paragraph(note, "note: ")]
    return lines


def that_fits(told: Foretold, room: int) -> str:
    """Whether a rank has memory enough, and what to change where it has not."""
    needed = told.footprint.total
    if needed <= room:
        return f"fits into {size(room)}: {size(room - needed)} are left"
    worst = told.footprint.worst
    where = "" if worst is None else f" for {worst.spec}, {worst.phase.what} of {worst.phase.where}"
    return f"does not fit into {size(room)}: {size(needed)} are needed{where}; {', or '.join(told.footprint.ways)}"


def how_many(weights: int) -> str:
    """In the unit that fits."""
    return f"{weights / 1e9:,.2f} billion" if weights >= 1e9 else f"{weights / 1e6:,.2f} million"


def size(nbytes: int) -> str:
    """In the unit that fits."""
    return f"{nbytes / 1e9:,.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.2f} MB"


def duration(seconds: float) -> str:
    """In the unit that fits."""
    for size, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} s"


def _but(bytes_by_layout: dict[str, int], left: str) -> dict[str, int]:
    return {name: n for name, n in bytes_by_layout.items() if name != left}


if __name__ == "__main__":
    sys.exit(main())
