"""The options of `sparsec compress`."""

from __future__ import annotations

import argparse

from sparsec.command_line import CommandLine
from sparsec.defaults import DEFAULT_PASSES, Effort
from sparsec.options.shared import DTYPES, add_bos, add_calibration, positive, seed, threads

PROG = "python -m sparsec.compress"
NEW_TOKENS = 40
EXAMPLES = f"""
examples:
  python -m sparsec.compress facebook/opt-125m my-opt                        # {DEFAULT_PASSES}
  python -m sparsec.compress my-folder out --passes "wanda(0.5),freeze,sparsity,flops,fuse,lower(bitmap)" --calibration my.txt
  python -m sparsec.compress my-pruned-model out --passes "zeros,freeze,sparsity,flops,fuse,lower(auto)"
  python -m sparsec.compress my-model.gguf out --dtype bf16 --max-shard-size 2GB
  python -m sparsec.compress my-large-model out --dtype bf16 --max-memory 4GB --resume   # larger than memory, killed or not
  python -m sparsec.compress tiny out --measure                              # quality and speed go into the model card

Then: sparsec generate OUT, sparsec check OUT, or in Python sparsec.load("OUT").
"""


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The command line."""
    p = CommandLine(
        prog=prog,
        description="Compiles a model and saves it: packed weights, tokenizer, report and model card in one folder. "
        "Weights are read from their files block by block, so the model may be larger than memory.",
        epilog=EXAMPLES.replace(PROG, prog),
    )
    p.add_argument(
        "model",
        metavar="MODEL",
        help="a folder, a .gguf file, a hub id, or `tiny` (small, random); smollm2: the packaged one",
    )
    p.add_argument(
        "folder", metavar="DIR", help="to save in: a new one, an empty one, or one that sparsec saved before"
    )
    p.add_argument("--passes", default=DEFAULT_PASSES, metavar="SPEC", help="default: %(default)s")
    p.add_argument("--dtype", choices=DTYPES, default="fp32", help="to compute in; default: %(default)s")
    p.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="of one file at most, such as 500MB; default: %(default)s",
    )
    p.add_argument(
        "--resume",
        action="store_true",
        help="go on with a run that was killed; it keeps what it made in DIR.unfinished, which goes away in the end",
    )
    p.add_argument(
        "--max-memory",
        metavar="SIZE",
        help="such as 4GB: what would take more is refused before any work; mapped files do not count",
    )
    p.add_argument(
        "--json", action="store_true", help="lines of JSON on the standard output: every step, and the result"
    )
    p.add_argument("--threads", type=threads, metavar="N", help="threads of torch; default: as torch chooses")
    p.add_argument(
        "--seed", type=seed, default=0, help="seed of random weights and of what is drawn; default: %(default)s"
    )
    add_calibration(p)
    add_bos(p)
    how = p.add_argument_group("what is shown")
    how.add_argument(
        "--prompt",
        metavar="TEXT",
        help=f"for the model to continue; default: {Effort().prompt!r}",
    )
    how.add_argument(
        "--new-tokens",
        type=positive,
        default=NEW_TOKENS,
        metavar="N",
        help="to write for that sample; default: %(default)s",
    )
    either = how.add_mutually_exclusive_group()
    either.add_argument("--no-sample", action="store_true", help="save, and run no model")
    either.add_argument(
        "--measure", action="store_true", help="measure quality and speed as `report` does, minutes, for the model card"
    )
    how.add_argument("--text", metavar="FILE", help="to measure the quality on; default: an embedded text")
    p.add_argument("--traceback", action="store_true", help="for developers: errors with where they come from")
    return p
