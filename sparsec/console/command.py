"""Options that several commands share, and what they are read as."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from sparsec import memory
from sparsec.calibrate import LENGTH, SELF, SEQUENCES, Sequences
from sparsec.calibrate.draw import Draw
from sparsec.data import LoadedModel, Text, load_text
from sparsec.data.text import DATASET_PREFIX, EMBEDDED, second_text
from sparsec.errors import DataError
from sparsec.pipeline import Pipeline
from sparsec.progress import Progress

MAX_THREADS, MAX_WHOLE = 1024, 2**31 - 1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_device(p: argparse.ArgumentParser) -> None:
    """`--device`, for `check_device` and `on_device`."""
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="to run on; default: %(default)s")


def check_device(device: str) -> None:
    """DataError for a device that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise DataError("--device cuda: torch sees no CUDA device; leave it out to run on the CPU")


def on_device(loaded: LoadedModel, device: str) -> LoadedModel:
    """The same model, moved."""
    if device == "cpu":
        return loaded
    before = memory.resident(device)
    model = loaded.model.to(device)
    after = memory.resident(device)
    return replace(loaded, model=model, resident_bytes=None if before is None or after is None else after - before)


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
        "--calibration-sequences", type=positive, default=SEQUENCES, metavar="N", help="default: %(default)s"
    )
    learn.add_argument(
        "--calibration-length",
        type=positive,
        metavar="L",
        help=f"tokens of a sequence; default: {LENGTH}, or what the model takes",
    )


def calibration_text(args: argparse.Namespace, pipelines: Sequence[Pipeline]) -> Text | None:
    """What `--calibration` names, read before anything slow runs; None where no text is named or no pass learns from it.

    DataError for a file that is not there, whether or not a pass learns.
    """
    named = args.calibration
    if named is None:
        return None
    if any(pipeline.learning for pipeline in pipelines):
        return None if named == SELF else load_text(named, split="train")
    if named != SELF and not named.startswith(DATASET_PREFIX):  # which may be a download
        load_text(named)
    print(f"notice: no pass learns from data, so --calibration {named} is not used", file=sys.stderr)
    return None


def untrained_text(
    args: argparse.Namespace, pipelines: Sequence[Pipeline], text: Text, learnt: Text | None
) -> Text | None:
    """A text beside `text` to evaluate on, which no pass trains on; None where none trains. learnt: from `calibration_text`."""
    if not any(pipeline.training for pipeline in pipelines):
        return None
    trained = learnt.name if learnt is not None else "" if args.calibration == SELF else EMBEDDED
    return second_text(text.name, trained)


def calibration(
    loaded: LoadedModel,
    args: argparse.Namespace,
    pipelines: Sequence[Pipeline],
    text: Text | None,
    progress: Progress | None = None,
) -> Sequences | None:
    """Tokens to calibrate on, drawn by `args.seed`, and where they come from; None where no pass learns from them."""
    if not any(pipeline.learning for pipeline in pipelines):
        return None
    sequences, length = args.calibration_sequences, args.calibration_length
    draw = Draw(
        loaded.tokenizer, sequences, length, args.seed, args.bos, loaded.positions, None, loaded.model, progress
    )
    return draw.drawn(SELF if args.calibration == SELF else text)
