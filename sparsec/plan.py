"""`python -m sparsec.plan`: what passes would take and give on a model, told from its config alone: bytes, memory, time, speed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sparsec.calibrate import LENGTH, SEQUENCES
from sparsec.checkpoint.writing import shard_bytes
from sparsec.command_line import CommandLine
from sparsec.compiler import DEFAULT_PASSES
from sparsec.console.command import DTYPES, positive
from sparsec.console.output import guarded, writable, write_text
from sparsec.console.progress import shown_progress
from sparsec.console.table import heading, paragraph, table
from sparsec.cost.constants import machine_constants
from sparsec.ir.parts import positions
from sparsec.ir.tracer import trace
from sparsec.pipeline import Pipeline
from sparsec.planning.foretell import Foretold, foretell, meta_calls
from sparsec.planning.memory import Footprint
from sparsec.planning.shape import shape_of_model
from sparsec.progress import stage

PROG = "python -m sparsec.plan"
SCHEMA = "sparsec.plan/1"
EXAMPLES = """
examples:
  python -m sparsec.plan smollm2 --passes "wanda(0.5),freeze,lower(bitmap)"
  python -m sparsec.plan my-70B/config.json --passes "sparsegpt(0.5),freeze,lower(auto)" --ranks 8 --memory 64GB
  python -m sparsec.plan my-folder --calibration-sequences 128 --json plan.json      # - is the standard output

No weight is read or downloaded. Times are of this machine, or of the one whose constants SPARSEC_CALIBRATION names.
"""


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The command line."""
    p = CommandLine(
        prog=prog,
        description="Tells what passes would take and give on a model: bytes in each layout, the most memory, arithmetic and time "
        "of every pass, tokens a second. From the config alone.",
        epilog=EXAMPLES.replace(PROG, prog),
    )
    p.add_argument(
        "model", metavar="MODEL_OR_CONFIG", help="a folder with a config.json, that file, a .gguf file, a hub id"
    )
    p.add_argument("--passes", default=DEFAULT_PASSES, metavar="SPEC", help="default: %(default)s")
    p.add_argument("--dtype", choices=DTYPES, help="of the weights; default: as the config says, else bf16")
    p.add_argument(
        "--ranks", type=positive, default=1, metavar="N", help="processes that share the work; default: %(default)s"
    )
    p.add_argument("--memory", metavar="SIZE", help="that each of them has, such as 64GB: does it fit?")
    p.add_argument(
        "--calibration-sequences", type=positive, default=SEQUENCES, metavar="N", help="default: %(default)s"
    )
    p.add_argument(
        "--calibration-length",
        type=positive,
        metavar="L",
        help=f"tokens of one; default: {LENGTH}, or what the model takes",
    )
    p.add_argument(
        "--context",
        type=positive,
        default=1024,
        metavar="L",
        help="tokens that a decoded one attends to; default: %(default)s",
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too, - on the standard output")
    p.add_argument("--traceback", action="store_true", help="for developers: errors with where they come from")
    return p


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
            length = args.calibration_length or min(LENGTH, positions(model) or LENGTH)
            data = meta_calls(graph, args.calibration_sequences, length)
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
            )
    machine = f"{found.constants.key.processor}, {found.constants.key.threads} threads"
    if args.json is not None:
        write_text(args.json, document(told, room, machine))
    print("\n".join(text(told, room, machine, found.notices)))
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
        f"{told.name}: {told.architecture}, {told.weights / 1e9:,.2f} billion weights in {told.dtype}, of which "
        f"{told.pruned_weights / 1e9:,.2f} are pruned",
        *heading("Bytes"),
        *table(
            ["pruned weights in", "GB", "of dense"],
            [
                [each, f"{n / 1e9:,.2f}", f"{n / told.bytes_dense:.2f}x"]
                for each, n in {"as they are": told.bytes_dense, **_but(told.bytes_by_layout, "dense")}.items()
            ],
        ),
    ]
    layouts = ", ".join(f"{count} as {layout}" for layout, count in told.layouts_after.items())
    lines += paragraph(
        f"these passes: {told.bytes_after / 1e9:,.2f} GB{f'; {layouts}' if layouts else '; nothing is packed'}"
    )
    each = "" if told.ranks == 1 else f" of each of {told.ranks} ranks"
    lines += heading("Memory")
    lines += paragraph(f"streamed{each}, at most {told.footprint}")
    lines += paragraph(f"with all of the model in memory, at most {told.in_memory}")
    if room is not None:
        lines += paragraph(that_fits(told, room))
    lines += heading("Time")
    shared = "" if told.ranks == 1 else f", shared by {told.ranks} ranks that have such a machine each"
    lines += paragraph(
        f"on {machine}{shared}; calibrated on {told.tokens_of_text:,} tokens. Reading and writing files is not in it"
    )
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
        return f"fits into {room / 1e9:,.2f} GB: {(room - needed) / 1e9:,.2f} GB are left"
    worst = told.footprint.worst
    ways = ["give more memory"]
    if worst is not None and worst.phase.solve is not None:
        ways.append(
            "prune with wanda, which needs no Gram matrix" if worst.phase.held["statistics"] else "prune with magnitude"
        )
        ways.append("leave the widest layers out with ignore=")
    elif worst is not None and "activations of one call" in worst.phase.held:
        ways.append("take a shorter --calibration-length")
    if worst is not None and worst.phase.held.get("activations between blocks"):
        ways.append("take fewer --calibration-sequences, or more --ranks")
    where = "" if worst is None else f" for {worst.spec}, {worst.phase.what} of {worst.phase.where}"
    return f"does not fit into {room / 1e9:,.2f} GB: {needed / 1e9:,.2f} GB are needed{where}; {', or '.join(ways)}"


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
