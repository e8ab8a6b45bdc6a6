"""The parser of a command's words: help fits the terminal, and an option that is not there is answered by a near one."""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any


def help_columns() -> int:
    """That help may take, as argparse counts them."""
    return max(40, shutil.get_terminal_size().columns) - 2


def laid_out(text: str) -> str:
    """Prose and examples, folded to the terminal's width. A line that is set in is an example: `folded` says how it is broken."""
    width, lines = help_columns(), []
    for line in text.splitlines():
        if line.startswith(" "):
            lines += folded(line, width)
        else:
            lines += textwrap.wrap(line, width, break_on_hyphens=False) or [""]
    return "\n".join(lines)


def folded(example: str, width: int) -> list[str]:
    """A command too wide for a line: its comment above it, each option that has no room on a line below, as a shell takes it."""
    if len(example) <= width:
        return [example]
    indent = example[: len(example) - len(example.lstrip())]
    command, _, comment = map(str.strip, re.sub(r" {2,}# ", "\0", example, count=1).partition("\0"))
    lines = [f"{indent}# {comment}"] if comment else []
    first, *options = re.split(r" (?=--\w)", command)
    line = indent + first
    for option in options:
        if len(line) + len(option) + 3 > width:  # a space before it, a space and a backslash behind it
            lines.append(f"{line} \\")
            line = f"{indent}    {option}"
        else:
            line += f" {option}"
    return [*lines, line]


class _Help(argparse.RawDescriptionHelpFormatter):
    """A list of names too long for a line is broken behind its commas, and no word at its hyphens."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        mark = "\0"  # where a long word may be broken: nothing stands there in the end
        words = [word.replace(",", f",{mark} ") if len(word) > width else word for word in text.split()]
        lines = textwrap.wrap(" ".join(words), width, break_on_hyphens=False)
        return [line.replace(f"{mark} ", "").replace(mark, "") for line in lines]


class CommandLine(argparse.ArgumentParser):
    """argparse's own, but for the two."""

    def __init__(self, prog: str, description: str, epilog: str, usage: str | None = None) -> None:
        super().__init__(
            prog=prog,
            usage=usage,
            description=laid_out(description),
            epilog=laid_out(epilog),
            formatter_class=_Help,
        )

    def parse_args(  # type: ignore[override]  # argparse has two overloads, for one that is given a namespace
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """Ends the process with a message and exit code 2 where a word is none of the command's."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            words = [word for word in unknown if not word.startswith("-")]
            hint = "" if words != unknown else self._for_words()
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._nearest(unknown)}{hint}")
        return found

    def _for_words(self) -> str:
        if any(not action.option_strings for action in self._actions):
            return "; what has several words goes in quotes"
        return "; this command takes options alone, such as --help"

    def _nearest(self, words: Sequence[str]) -> str:
        options = [option for action in self._actions for option in action.option_strings]
        given = [word.partition("=")[0] for word in words if word.startswith("-")]
        near = [difflib.get_close_matches(word, options, n=1, cutoff=0.5) for word in given]
        guesses = list(dict.fromkeys(option for found in near for option in found))
        return f"; did you mean {' and '.join(guesses)}?" if guesses else ""
