"""`python -m sparsec.check`: looks at a saved model, every file and tensor, and says what is wrong where."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from sparsec.checkpoint.checking import Examined, examine
from sparsec.console.output import guarded, writable, write_text
from sparsec.console.progress import shown_progress
from sparsec.options.check import PROG, parser

SCHEMA = "sparsec.check/1"
SHOWN = 100
"""Faults that are printed; a file has all."""


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Returns the exit code: 0, 1 where something is wrong with the model, 2 for bad input."""
    args = parser(prog).parse_args(argv)
    return guarded(lambda: _run(args), json=args.json)


def _run(args: argparse.Namespace) -> int:
    if args.json is not None:
        writable(args.json)
    with shown_progress(sys.stderr) as progress:
        found = examine(args.folder, progress=progress)
    if args.json is not None:
        write_text(args.json, document(found))
    print("\n".join(text(found)))
    return 1 if found.faults else 0


def document(found: Examined) -> str:
    """JSON of all that was found."""
    return json.dumps({"schema": SCHEMA, "fine": not found.faults, **asdict(found)}, indent=2) + "\n"


def text(found: Examined) -> list[str]:
    """Lines for a person."""
    layouts = ", ".join(f"{count} {layout}" for layout, count in found.layouts.items())
    packed = f"{sum(found.layouts.values())} packed layers{f' ({layouts})' * bool(layouts)}"
    by = ", ".join(f"{name} {number}" for name, number in found.versions.items()) or "no known version"
    lines = [
        f"{found.folder}: {found.architecture or 'a module'}, {packed}, {found.nbytes / 1e6:,.1f} MB in {found.files} "
        f"file{'s' * (found.files != 1)}, saved with {by}"
    ]
    lines += [f"notice: {notice}" for notice in found.notices]
    lines += [f"fault: {fault}" for fault in found.faults[:SHOWN]]
    if len(found.faults) > SHOWN:
        lines.append(f"and {len(found.faults) - SHOWN} more; --json FILE has all")
    count = len(found.faults)
    return [*lines, f"{count} fault{'s' * (count != 1)}" if count else "nothing is wrong"]


if __name__ == "__main__":
    sys.exit(main())
