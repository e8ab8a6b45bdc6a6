"""`--html`, `--png` and `--svg` of the commands that have something to draw."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from sparsec.console.output import STDOUT, writable, writable_folder, write_text
from sparsec.errors import DataError
from sparsec.page.drawing import Chart, need_library, save_charts


def check_pages(args: argparse.Namespace) -> bool:
    """Whether anything is to be drawn. DataError for what could not be written, MissingExtraError where nothing can draw."""
    if args.html == STDOUT:
        raise DataError("--html -: a page is written to a file, since the text goes to the standard output; name one")
    if args.html is not None:
        writable(args.html)
    for folder in (args.png, args.svg):
        if folder is not None:
            writable_folder(folder, "the charts cannot be written there")
    wanted = any((args.html, args.png, args.svg))
    if wanted:
        need_library()
    return wanted


def write_pages(args: argparse.Namespace, page: Callable[[], str], charts: Callable[[], Sequence[Chart]]) -> list[str]:
    """What was written, in words."""
    written = []
    if args.html:
        write_text(args.html, page())
        written.append(args.html)
    if args.png:
        written.append(f"{len(save_charts(charts(), Path(args.png), 'png'))} charts in {args.png}")
    if args.svg:
        written.append(f"{len(save_charts(charts(), Path(args.svg), 'svg'))} charts in {args.svg}")
    return written
