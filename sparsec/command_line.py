"""The parser of a command's words: examples stay as they are written, and an option that is not there is answered by a near one."""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any


def laid_out(text: str) -> str:
    """Prose, folded to the terminal's width. Lines that are set in stay whole; a comment too far right goes above its line."""
    width, lines = max(40, shutil.get_terminal_size().columns), []
    for line in text.splitlines():
        if not line.startswith(" "):
            lines += textwrap.wrap(line, width - 2, break_on_hyphens=False) or [""]
        elif len(line) > width and (found := re.fullmatch(r"( +)(\S.*?) {2,}# (.*)", line)):
            lines += [f"{found[1]}# {found[3]}", f"{found[1]}{found[2]}"]
        else:
            lines.append(line)
    return "\n".join(lines)


class CommandLine(argparse.ArgumentParser):
    """argparse's own, but for the two."""

    def __init__(self, prog: str, description: str, epilog: str, usage: str | None = None) -> None:
        super().__init__(
            prog=prog,
            usage=usage,
            description=laid_out(description),
            epilog=laid_out(epilog),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def parse_args(  # type: ignore[override]  # argparse has two overloads, for one that is given a namespace
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """Ends the process with a message and exit code 2 where a word is none of the command's."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            words = [word for word in unknown if not word.startswith("-")]
            quotes = "; what has several words goes in quotes" if words == unknown else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._nearest(unknown)}{quotes}")
        return found

    def _nearest(self, words: Sequence[str]) -> str:
        options = [option for action in self._actions for option in action.option_strings]
        given = [word.partition("=")[0] for word in words if word.startswith("-")]
        near = [difflib.get_close_matches(word, options, n=1, cutoff=0.5) for word in given]
        guesses = list(dict.fromkeys(option for found in near for option in found))
        return f"; did you mean {' and '.join(guesses)}?" if guesses else ""
