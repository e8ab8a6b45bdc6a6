"""The options of `sparsec cost`."""

from __future__ import annotations

import argparse
from pathlib import Path

from sparsec.command_line import CommandLine
from sparsec.options.shared import DTYPES

PROG = "python -m sparsec.cost"
EXAMPLES = """
examples:
  python -m sparsec.cost                      # measured once, then read from the cache folder
  python -m sparsec.cost --threads 1 --force  # anew, for one thread
  python -m sparsec.cost --show               # what is known, measuring nothing
  python -m sparsec.cost --device cuda        # the kernels on this machine's GPU
  python -m sparsec.cost --json my.json       # a file for SPARSEC_CALIBRATION
"""


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The command line."""
    p = CommandLine(
        prog=prog,
        description="Measures what the kernels reach on this machine, for lower(auto) and for the report's predictions.",
        epilog=EXAMPLES.replace(PROG, prog),
    )
    p.add_argument("--dtypes", default="fp32,bf16,fp16", help=f"of {', '.join(DTYPES)}, by commas; default: all")
    p.add_argument("--threads", type=int, metavar="N", help="threads of torch; default: as torch chooses")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="whose kernels; default: the CPU's")
    how = p.add_mutually_exclusive_group()
    how.add_argument("--force", action="store_true", help="measure, even where all constants are known")
    how.add_argument("--show", action="store_true", help="measure nothing; an error where nothing is known")
    p.add_argument("--json", type=Path, metavar="FILE", help="write it there too, - on the standard output")
    return p
