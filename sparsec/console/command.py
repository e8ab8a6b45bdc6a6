"""What several commands make of the options that they share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from sparsec import memory
from sparsec.calibrate import SELF, Sequences
from sparsec.calibrate.draw import Draw
from sparsec.data import LoadedModel, Text, load_text
from sparsec.data.text import DATASET_PREFIX, EMBEDDED, second_text
from sparsec.errors import DataError
from sparsec.pipeline import Pipeline
from sparsec.progress import Progress

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
