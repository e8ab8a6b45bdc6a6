"""`python -m sparsec`: what there is: commands, passes with their options, formats, kernels, and the environment."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sparsec import __version__, private
from sparsec.console.command import guarded
from sparsec.console.commands import COMMANDS, find
from sparsec.console.table import heading, paragraph
from sparsec.errors import SparsecError
from sparsec.formats import FORMATS
from sparsec.kernels import known
from sparsec.machine import machine
from sparsec.pipeline.spec import signature
from sparsec.pipeline.table import known_passes
from sparsec.report.text import machine_lines

PROG = "python -m sparsec"
USAGE = """%(prog)s                          what there is: commands, passes, formats, kernels, this machine
       %(prog)s COMMAND [...]            runs a command
       %(prog)s COMMAND --help           its options
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
    return guarded(lambda: print(overview()))


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
    commands = [f"  {command.name:<{width}}  {command.text}" for command in COMMANDS]
    examples = [f"  {prog} {command.name} {command.example}" for command in COMMANDS]
    p = argparse.ArgumentParser(
        prog=prog,
        usage=USAGE,
        description="Prunes language models and runs them on sparse kernels.",
        epilog="\n".join(["commands:", *commands, "", "examples:", *examples]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--version", action="version", version=f"sparsec {__version__}")
    return p


def overview() -> str:
    """All of it. May build the native kernels, to say whether they can be."""
    here = machine()
    lines = [f"sparsec {__version__}", *heading("Commands (each takes --help)")]
    for command in COMMANDS:
        lines += paragraph(command.text, f"{'sparsec ' + command.name:<30}")
    lines += heading("Passes")
    for cls in known_passes().values():
        lines += paragraph(f"{cls.__doc__}".strip().splitlines()[0], f"{cls.name:<12}[{cls.effect.value}] ", " " * 12)
        lines += paragraph(signature(cls), " " * 12)
        needs = ", ".join(filter(None, (cls.wants, ", ".join(sorted(cls.requires))))) or "nothing"
        gives = ", ".join(sorted(cls.produces)) or "nothing"
        lines += paragraph(f"needs {needs}; gives {gives}", " " * 12)
    lines += heading("Formats")
    for name, kind in FORMATS.items():
        lines += paragraph(f"{kind.__doc__}".strip().splitlines()[0], f"{name:<12}")
    lines += heading("Kernels")
    for kernel in known():
        devices = ", ".join(kernel.devices) if kernel.devices else "every device"
        dtypes = ", ".join(str(d).removeprefix("torch.") for d in kernel.dtypes)
        text = f"{here.kernels[kernel.name]}: format {kernel.format}, {devices}, {dtypes}"
        lines += paragraph(text, f"{kernel.name:<18}")
    lines += [line for what in private.absent() for line in paragraph(what, "missing     ")]
    return "\n".join(lines + machine_lines(here))


if __name__ == "__main__":
    sys.exit(main())
