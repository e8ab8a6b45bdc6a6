"""Options that several commands share, and what they are read as."""

from __future__ import annotations

import argparse

from sparsec.defaults import CALIBRATION_LENGTH, CALIBRATION_SEQUENCES

MAX_THREADS, MAX_WHOLE = 1024, 2**31 - 1
DTYPES = ("fp32", "bf16", "fp16")


def add_device(p: argparse.ArgumentParser) -> None:
    """`--device`, for `check_device` and `on_device`."""
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="to run on; default: %(default)s")


def positive(text: str) -> int:
    """Type of an argument: a whole number of at least 1."""
    return _whole(text, 1, MAX_WHOLE)


def threads(text: str) -> int:
    """Type of an argument: a number of threads. Where more are asked for than can be made, OpenMP ends the process."""
    return _whole(text, 1, MAX_THREADS)


def seed(text: str) -> int:
    """Type of an argument: what torch's generators take."""
    return _whole(text, 0, 2**63 - 1)


def number(text: str) -> float:
    """Type of an argument: a number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text[:40]!r}") from None


def _whole(text: str, least: int, most: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"must be a whole number from {least} to {most}, got {text[:40]!r}")
    return value


def add_bos(p: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """`--no-bos`: `args.bos` is what `cut` and `windows` take."""
    p.add_argument(
        "--no-bos",
        dest="bos",
        action="store_false",
        help="as in the papers: texts are tokenised once as one string; default: where the tokenizer begins texts with a BOS, so "
        "does every window, of evaluation and calibration",
    )


def add_calibration(p: argparse.ArgumentParser) -> None:
    """The options of `calibration`."""
    learn = p.add_argument_group("calibration, for passes such as wanda and admm")
    learn.add_argument(
        "--calibration",
        metavar="FILE",
        help="as --text, of a dataset its split train; or self: a text that the model writes, which takes minutes once; default: "
        "the second half of the embedded text",
    )
    learn.add_argument(
        "--calibration-sequences",
        type=positive,
        default=CALIBRATION_SEQUENCES,
        metavar="N",
        help="default: %(default)s",
    )
    learn.add_argument(
        "--calibration-length",
        type=positive,
        metavar="L",
        help=f"tokens of a sequence; default: {CALIBRATION_LENGTH}, or what the model takes",
    )


def add_pages(out: argparse._ArgumentGroup) -> None:
    """The options."""
    out.add_argument("--html", metavar="FILE", help="a page with charts and tables; one file, needs no network")
    out.add_argument("--png", metavar="DIR", help="the charts as pictures for a paper's column, 300 dots an inch")
    out.add_argument("--svg", metavar="DIR", help="the same as SVG")
