"""The commands, in one table: `sparsec NAME` and `python -m sparsec.NAME` are the same call of the same `main(argv, prog)`."""

from __future__ import annotations

import argparse
import difflib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparsec.errors import SpecError


@dataclass(frozen=True)
class Command:
    """One command: where its `main` lives, and what it does in one line."""

    name: str  # `python -m sparsec.NAME` runs it too
    module: str  # has `main(argv, prog) -> int`
    text: str
    example: str  # what stands after its name

    @property
    def options(self) -> str:
        """The module that has `parser(prog)`; it imports no torch."""
        return f"sparsec.options.{self.name.replace('.', '_')}"

    def parser(self, prog: str) -> argparse.ArgumentParser:
        """Of its words."""
        made: argparse.ArgumentParser = importlib.import_module(self.options).parser(prog)
        return made

    def run(self, argv: Sequence[str], prog: str) -> int:
        """The exit code. Help and wrong words end in the parser, before the module is imported, which takes seconds."""
        self.parser(prog).parse_args(argv)
        main: Callable[[Sequence[str], str], int] = importlib.import_module(self.module).main
        return main(argv, prog)


COMMANDS: tuple[Command, ...] = (
    Command(
        "report",
        "sparsec.report.__main__",
        "prunes a model and says what that gives: bytes, speed, quality, layer by layer",
        "tiny --quick",
    ),
    Command(
        "evaluate",
        "sparsec.evaluate.__main__",
        "perplexity of models, or of what passes make of one, side by side",
        'tiny --passes "magnitude(0.5)" --windows 8 --length 64',
    ),
    Command(
        "compress",
        "sparsec.compress",
        "prunes and packs a model and saves it in a folder, with what it writes before and after",
        "tiny my-folder",
    ),
    Command(
        "generate",
        "sparsec.generate",
        "continues a text with a saved model, as it comes, and says how many tokens a second",
        'tiny "abc" --new-tokens 16',
    ),
    Command(
        "study",
        "sparsec.study.__main__",
        "sweeps passes over a model: quality, bytes and time of each against dense, in one table",
        'tiny --passes "magnitude({zeros}),freeze,lower(csr)" --grid zeros=0.5,0.9',
    ),
    Command(
        "plan",
        "sparsec.plan",
        "bytes, memory, time and speed that passes would cost and give, from a config alone",
        'smollm2 --passes "wanda(0.5),freeze,lower(bitmap)"',
    ),
    Command(
        "bench",
        "sparsec.bench.__main__",
        "times kernels against dense and torch.sparse, and whole models in tokens per second",
        "--end-to-end smollm2",
    ),
    Command(
        "cost",
        "sparsec.cost.__main__",
        "measures this machine for lower(auto), once, and shows what it knows",
        "--show",
    ),
    Command(
        "check",
        "sparsec.check",
        "looks at every file and tensor of a saved model, and says what is wrong where",
        "my-folder",
    ),
    Command(
        "kernels.build",
        "sparsec.kernels.build",
        "builds the native kernels ahead of time, or says which of them run here",
        "--status",
    ),
    Command(
        "kernels.gpu_compile",
        "sparsec.kernels.gpu_compile",
        "for developers: compiles the Triton kernels without a GPU and counts registers",
        "--arch 90",
    ),
)


def find(name: str) -> Command:
    """The command of that name. Raises SpecError that names near ones, and all."""
    for command in COMMANDS:
        if command.name == name:
            return command
    names = [command.name for command in COMMANDS]
    near = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    guess = f", did you mean {' or '.join(map(repr, near))}" if near else ""
    raise SpecError(f"there is no command {name!r}{guess}; the commands are {', '.join(names)}")
