"""`python -m sparsec` and `sparsec`: a command by its name; without one, what there is. Help and version need no torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from sparsec import __version__
from sparsec.command_line import CommandLine, help_columns
from sparsec.console.commands import COMMANDS, find
from sparsec.console.output import guarded
from sparsec.console.table import paragraph
from sparsec.errors import SparsecError

PROG = "python -m sparsec"
USAGE = """%(prog)s                    what there is: passes, formats, kernels
       %(prog)s COMMAND [...]      runs a command
       %(prog)s COMMAND --help     its options
       %(prog)s --version"""


def script() -> int:
    """The entry point of the command `sparsec`."""
    return main(prog="sparsec")


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Runs a command, or shows what there is. Returns the exit code: the command's, 0, or 2 for bad input."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):
        return _command(words, prog)
    parser(prog).parse_args(words)
    return guarded(_overview)


def _overview() -> None:
    print(import_module("sparsec.overview").overview())  # torch takes seconds to import


def _command(words: Sequence[str], prog: str) -> int:
    try:
        command = find(words[0])
    except SparsecError as error:
        print(f"error: {error}; {prog} --help says what they do", file=sys.stderr)
        return 2
    return command.run(words[1:], f"{prog} {command.name}")


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """Of what stands before a command."""
    width = max(len(command.name) for command in COMMANDS)
    commands = [line for c in COMMANDS for line in paragraph(c.text, f"  {c.name:<{width}}  ", width=help_columns())]
    examples = [f"  {prog} {command.name} {command.example}" for command in COMMANDS]
    p = CommandLine(
        prog=prog,
        usage=USAGE,
        description="Prunes language models and runs them on sparse kernels.",
        epilog="\n".join(["commands:", *commands, "", "examples:", *examples]),
    )
    p.add_argument("--version", action="version", version=f"sparsec {__version__}")
    return p


if __name__ == "__main__":
    sys.exit(main())
