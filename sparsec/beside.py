"""What several ranks of `sparsec compress` do beside each other: the first one speaks and writes, others share what is learnt."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from sparsec.calibrate import Sequences
from sparsec.compiler import compile
from sparsec.console.command import DTYPES
from sparsec.data import LoadedModel, load_model
from sparsec.data.folders import local_path
from sparsec.data.mapped import checkpoint_files
from sparsec.pipeline import Pipeline
from sparsec.pipeline.instruments import First
from sparsec.progress import Progress
from sparsec.ranks import Ranks, first_here
from sparsec.unfinished import Unfinished


def begun(args: argparse.Namespace, ranks: Ranks) -> Unfinished:
    """The first rank's folder stands around those of the others."""
    place = Path(args.folder).expanduser()
    found = Unfinished.begun(place, args.resume) if ranks.first else None
    ranks.told(None)
    return found or Unfinished.begun(place, args.resume, ranks.number)


def loaded_once(
    args: argparse.Namespace, ranks: Ranks, progress: Progress, unfinished: Unfinished | None
) -> LoadedModel:
    """What has to be converted is converted once on each machine, and mapped by all of its ranks."""
    leader = first_here(ranks)
    if leader != ranks.number:
        ranks.told(None)
    spill = None if unfinished is None else unfinished.of_rank(leader)
    if unfinished is not None and (place := local_path(args.model)) is not None:
        unfinished.watched(checkpoint_files(place))
    loaded = load_model(args.model, DTYPES[args.dtype], progress, args.seed, spill)
    if leader == ranks.number:
        ranks.told(None)
    return loaded


def helped(
    loaded: LoadedModel,
    pipeline: Pipeline,
    drawn: Sequences | None,
    ranks: Ranks,
    unfinished: Unfinished | None,
    begin: Callable[[], None],
) -> None:
    """What another rank than the first does: its share of what is learnt, while the first one does the rest and writes.

    begin: what all of them do before the first pass.
    """
    assert unfinished is not None
    if pipeline.learning_part is None:
        begin()
    else:
        folder = unfinished.spill.folder
        compile(
            *(loaded.model, pipeline.learning_part),
            calibration=drawn,
            copy=False,
            spill=folder,
            instruments=(First(begin), unfinished),
        )
    ranks.told("written")
    unfinished.forget()
