"""`python -m sparsec.cost`: measures this machine's constants for the cost model and shows them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from sparsec.console.command import DTYPES
from sparsec.console.output import STDOUT, guarded, writable, write_text
from sparsec.console.progress import shown_progress
from sparsec.console.table import fitted, heading, paragraph, terminal_width
from sparsec.cost.constants import Constants, Found, machine_constants, save_file, to_json
from sparsec.errors import DataError, KernelError
from sparsec.kernels import gpu
from sparsec.options.cost import PROG, parser
from sparsec.options.shared import MAX_THREADS

HEADER = (
    "kernel",
    "format",
    "dtype",
    "call us",
    "output ns",
    "GB/s",
    "value ps",
    "position ps",
    "rows: value|position ps",
    "fits",
)


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    args = parser(prog).parse_args(argv)
    return guarded(lambda: _run(args), json=args.json)


def _run(args: argparse.Namespace) -> None:
    names = args.dtypes.split(",")
    unknown = [n for n in names if n not in DTYPES]
    if unknown:
        raise DataError(f"--dtypes takes {', '.join(DTYPES)}, got {unknown[0]!r}")
    if args.threads is not None:
        if not 1 <= args.threads <= MAX_THREADS:
            raise DataError(f"--threads must be at least 1, got {args.threads}; at most {MAX_THREADS} are made")
        torch.set_num_threads(args.threads)
    if args.json:
        writable(args.json)
    if args.device == "cuda" and (reasons := gpu.missing()):
        raise KernelError(f"--device cuda: {'; '.join(reasons)}; without it the CPU's kernels are measured")
    left: list[str] = []
    if args.show:
        asked, names = names, [n for n in names if _known(n, args.device)]
        if not names:
            raise DataError(
                f"nothing is known of {', '.join(asked)} on this machine with {torch.get_num_threads()} threads; leave out --show "
                "to measure it"
            )
        left = [n for n in asked if n not in names]
    with shown_progress(sys.stderr) as progress:
        dtypes = [DTYPES[n] for n in names]
        found = machine_constants(
            dtypes, device=args.device, force=args.force, measuring=not args.show, progress=progress
        )
    assert found is not None
    print("\n".join(lines(found)))
    if left:
        print("\n".join(paragraph(f"not measured yet: {', '.join(left)}; without --show it is", "- ")))
    if args.json and str(args.json) == STDOUT:
        write_text(args.json, to_json(found.constants))
    elif args.json:
        save_file(found.constants, args.json)


def _known(dtype: str, device: str) -> bool:
    return machine_constants([DTYPES[dtype]], device=device, measuring=False) is not None


def lines(found: Found) -> list[str]:
    """The constants as text."""
    known = found.constants
    shown = heading("Constants of this machine")
    for title, text in (
        (known.key.device, known.key.processor),
        ("isa", known.key.isa),
        ("threads", known.key.threads),
        ("torch", known.key.torch),
    ):
        shown += paragraph(str(text), f"{title:<9}")
    shown += paragraph(found.source, f"{'source':<9}")
    reads = ", ".join(f"{_size(r.nbytes)} {1e-9 / r.per_byte:.0f}" for r in known.reads)
    shown += paragraph(f"{reads} GB/s", f"{'reading':<9}")
    if known.member is not None:
        shown += paragraph(f"{1e6 * known.member:.1f} us for a further member of a fused product", f"{'groups':<9}")
    shown += ["", *fitted(HEADER, _rows(known), terminal_width(), left=(0, 1, 2, 8), keys=3)]
    shown += paragraph(
        "seconds = call + output x out_features + max(bytes / GB/s, decoding per value and position, multiplying per value and "
        "position with so many rows); fits: 9 in 10 of its own measurements lie within this share of what it predicts"
    )
    return shown[1:] + [line for notice in found.notices for line in paragraph(notice, "- ")]


def _rows(known: Constants) -> list[tuple[str, ...]]:
    return [
        (
            k.kernel,
            k.format,
            k.dtype,
            f"{1e6 * k.call:.1f}",
            f"{1e9 * k.per_output:.1f}",
            f"{1e-9 / k.per_byte:.1f}" if k.per_byte else "-",
            f"{1e12 * k.decode.per_stored:.0f}",
            f"{1e12 * k.decode.per_position:.0f}",
            " ".join(
                f"{r.rows}: {1e12 * r.rate.per_stored:.0f}|{1e12 * r.rate.per_position:.0f}"
                for r in k.rows
                if r.rows in (8, 512)
            ),
            f"{k.error:.0%}",
        )
        for k in known.kernels
    ]


def _size(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KiB"


if __name__ == "__main__":
    sys.exit(main())
