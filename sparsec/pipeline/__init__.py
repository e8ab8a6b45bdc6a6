"""Passes, the text that names them, and how a sequence of them runs."""

from sparsec.pipeline.base import FACTS, Context, Effect, Pass, PassRecord, PassResult
from sparsec.pipeline.instruments import DumpIR, Instrument, PrintIR, Timing
from sparsec.pipeline.pipeline import Pipeline, Verify
from sparsec.pipeline.selection import DEFAULT_TARGETS, select_weights
from sparsec.pipeline.table import known_passes
from sparsec.progress import Progress

__all__ = [
    "DEFAULT_TARGETS",
    "FACTS",
    "Context",
    "DumpIR",
    "Effect",
    "Instrument",
    "Pass",
    "PassRecord",
    "PassResult",
    "Pipeline",
    "PrintIR",
    "Progress",
    "Timing",
    "Verify",
    "known_passes",
    "select_weights",
]
