"""The options of `sparsec generate`."""

from __future__ import annotations

import argparse

from sparsec.command_line import CommandLine
from sparsec.defaults import Effort
from sparsec.options.shared import DTYPES, add_device, number, positive, seed, threads

PROG = "python -m sparsec.generate"
NEW_TOKENS = 128
EXAMPLES = """
examples:
  python -m sparsec.generate my-sparse-folder "Why is the sky blue?"
  python -m sparsec.generate my-sparse-folder --temperature 0.8 --top-p 0.95 --seed 1 --new-tokens 200
  echo "Once upon a time" | python -m sparsec.generate my-sparse-folder - --no-chat
  python -m sparsec.generate tiny "abc" --new-tokens 16 --json out.json

The text goes to the standard output, everything else to the standard error. The first token comes after the prompt was read.
"""


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The command line."""
    p = CommandLine(
        prog=prog,
        description="Continues a text with a model that sparsec saved, or any other, and says how fast.",
        epilog=EXAMPLES.replace(PROG, prog),
    )
    p.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a folder that sparsec saved, or what `report` takes; default: smollm2, the packaged SmolLM2-135M, dense",
    )
    p.add_argument(
        "prompt",
        nargs="?",
        metavar="TEXT",
        help=f"after MODEL, in quotes; - reads it from the input; default: {Effort().prompt!r}",
    )
    p.add_argument(
        "--new-tokens", type=positive, default=NEW_TOKENS, metavar="N", help="to write at most; default: %(default)s"
    )
    p.add_argument(
        "--no-chat", dest="chat", action="store_false", help="continue the text as it is, without the chat template"
    )
    p.add_argument(
        "--temperature",
        type=number,
        default=0.0,
        metavar="T",
        help="draw tokens at random, above 0; default: 0, always the most likely token",
    )
    p.add_argument(
        "--top-p",
        type=number,
        default=1.0,
        metavar="P",
        help="draw from the most likely tokens, whose chances add up to P",
    )
    p.add_argument("--seed", type=seed, default=0, help="seed of what is drawn, and of `tiny`; default: %(default)s")
    p.add_argument("--dtype", choices=DTYPES, help="to compute in; default: as it was saved, else fp32")
    add_device(p)
    p.add_argument("--threads", type=threads, metavar="N", help="threads of torch; default: as torch chooses")
    p.add_argument(
        "--json", metavar="FILE", help="the text and the figures; - is the standard output, then without the text"
    )
    p.add_argument("--traceback", action="store_true", help="for developers: errors with where they come from")
    return p
