"""What is taken where nothing else is said. Imports no torch: help shows these, and is to be there at once."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_PASSES = "magnitude(0.5),freeze,sparsity,flops,fuse,lower(auto)"
CALIBRATION_SEQUENCES, CALIBRATION_LENGTH = 32, 1024
MIN_REPEATS = 20
ALONE = 256
"""Tokens of a window for the sensitivity of each weight, where the model takes as many."""
BUILD_SECONDS = 1200.0
"""That a build of the native kernels may take: a minute on two idle cores, and five where they are busy."""


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    windows: int = 8
    length: int | None = None  # None: 512, or what the model takes
    prompt: str = "Explain in two sentences why the sky is blue."
    prompt_tokens: int = 64
    new_tokens: int = 40
    repeats: int = MIN_REPEATS
    sensitivity: int = 0  # windows on which each pruned weight is tried alone; not within `seconds`
    seconds: float = 120.0  # for evaluating, timing and the sample; what does not fit is sampled, and said


QUICK = Effort(windows=2, length=128, prompt_tokens=16, new_tokens=8, repeats=5, seconds=40.0)
