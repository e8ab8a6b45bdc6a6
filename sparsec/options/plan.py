"""The options of `sparsec plan`."""

from __future__ import annotations

import argparse
from pathlib import Path

from sparsec.command_line import CommandLine
from sparsec.defaults import CALIBRATION_LENGTH, CALIBRATION_SEQUENCES, DEFAULT_PASSES
from sparsec.options.shared import DTYPES, positive

PROG = "python -m sparsec.plan"
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
        "model",
        metavar="MODEL_OR_CONFIG",
        help="a folder with a config.json, that file, a .gguf file, a hub id, or `tiny`",
    )
    p.add_argument("--passes", default=DEFAULT_PASSES, metavar="SPEC", help="default: %(default)s")
    p.add_argument("--dtype", choices=DTYPES, help="of the weights; default: as the config says, else bf16")
    p.add_argument(
        "--ranks", type=positive, default=1, metavar="N", help="processes that share the work; default: %(default)s"
    )
    p.add_argument("--memory", metavar="SIZE", help="that each of them has, such as 64GB: does it fit?")
    p.add_argument(
        "--calibration-sequences",
        type=positive,
        default=CALIBRATION_SEQUENCES,
        metavar="N",
        help="default: %(default)s",
    )
    p.add_argument(
        "--calibration-length",
        type=positive,
        metavar="L",
        help=f"tokens of one; default: {CALIBRATION_LENGTH}, or what the model takes",
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
