"""The options of `sparsec evaluate`."""

from __future__ import annotations

import argparse

from sparsec.command_line import CommandLine
from sparsec.options.shared import DTYPES, add_bos, add_calibration, add_device, positive, seed, threads

LENGTH = 2048
PROG = "python -m sparsec.evaluate"
EXAMPLES = """
examples:
  python -m sparsec.evaluate --windows 8 --length 512                    # SmolLM2-135M from its package, the embedded text
  python -m sparsec.evaluate --text wiki.test.raw --passes "magnitude(0.5)" --passes "wanda(0.5)" --calibration valid.txt
  python -m sparsec.evaluate facebook/opt-125m my-pruned-opt --text dataset:wikitext,wikitext-2-raw-v1
  python -m sparsec.evaluate --passes "wanda(0.5),freeze,lower(bitmap)" --passes "wanda(0.5),freeze,lower(csr)" --windows 8
  python -m sparsec.evaluate --text wiki.test.raw --resume run.json --json result.json     # stopped? run it again

The first model is the reference. A model is a folder, a .gguf file, a hub id, or `tiny`; passes are run on the first one.
"""


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The command line."""
    p = CommandLine(
        prog=prog,
        description="Perplexity of models on a text, and their agreement with the first and divergence from it; of encoders, the "
        "cosine of their embeddings to the first one's.",
        epilog=EXAMPLES.replace(PROG, prog),
    )
    p.add_argument("models", nargs="*", metavar="MODEL", help="default: the packaged SmolLM2-135M")
    p.add_argument(
        "--passes",
        action="append",
        default=[],
        metavar="SPEC",
        help="what to make of the first model; may be given again",
    )
    p.add_argument(
        "--text",
        metavar="FILE",
        help="UTF-8 file, or dataset:NAME[,CONFIG[,SPLIT[,COLUMN]]]; default: half of an embedded text",
    )
    add_bos(p)
    p.add_argument("--windows", type=positive, metavar="N", help="the first ones; default: all of the text")
    p.add_argument(
        "--length", type=positive, metavar="L", help=f"tokens of a window; default: {LENGTH}, or what the models take"
    )
    p.add_argument(
        "--dtype", choices=DTYPES, help="to compute in; default: fp32, and as it was saved for what sparsec saved"
    )
    add_device(p)
    p.add_argument("--threads", type=threads, metavar="N", help="threads of torch; default: as torch chooses")
    p.add_argument("--seed", type=seed, default=0, help="seed of what is drawn to calibrate on; default: %(default)s")
    p.add_argument(
        "--resume",
        metavar="FILE",
        help="kept up to date window by window; goes on from there if it exists; of a second text in FILE.second",
    )
    p.add_argument("--json", metavar="FILE", help="all figures, every window and position; - is the standard output")
    add_calibration(p)
    p.add_argument("--traceback", action="store_true", help="for developers: errors with where they come from")
    return p
