"""The options of `sparsec check`."""

from __future__ import annotations

import argparse
from pathlib import Path

from sparsec.command_line import CommandLine

PROG = "python -m sparsec.check"
EXAMPLES = """
examples:
  python -m sparsec.check my-folder                  # exit code 0: nothing is wrong, 1: something is, 2: no saved model
  python -m sparsec.check my-folder --json faults.json
  python -m sparsec.check my-folder --json -         # on the standard output, words on the standard error
"""


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The command line."""
    p = CommandLine(
        prog=prog,
        description="Looks at a saved model: structure, hashes, versions, every index of a packed tensor, and whether names and "
        "shapes are those of the model's class. Nothing in the folder is executed or changed.",
        epilog=EXAMPLES.replace(PROG, prog),
    )
    p.add_argument("folder", metavar="DIR", help="that save_pretrained or sparsec.save wrote")
    p.add_argument("--json", type=Path, metavar="FILE", help="write all findings there too, - on the standard output")
    return p
