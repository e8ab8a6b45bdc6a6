"""`python -m sparsec.compress`: a model compiled and saved in one go, with what it writes before and after."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch

from sparsec import memory
from sparsec.beside import begun, helped, loaded_once
from sparsec.calibrate import Sequences
from sparsec.checkpoint.places import saved_folder
from sparsec.checkpoint.words import saved_facts, saved_lines
from sparsec.checkpoint.writing import shard_bytes
from sparsec.compiler import compile
from sparsec.console.account import Account, rate, told_shares
from sparsec.console.command import (
    calibration,
    calibration_text,
    untrained_text,
)
from sparsec.console.events import Events
from sparsec.console.output import guarded, writable_folder
from sparsec.console.progress import shown_progress
from sparsec.console.table import heading, mega, paragraph
from sparsec.data import LoadedModel, Text, load_text
from sparsec.defaults import DEFAULT_PASSES, Effort
from sparsec.errors import DataError, SpecError
from sparsec.glance import Glance, lose_less
from sparsec.options.compress import PROG, parser
from sparsec.pipeline import Pipeline
from sparsec.pipeline.instruments import First
from sparsec.progress import Progress, stage
from sparsec.ranks import Ranks, launched
from sparsec.report.collect import Report
from sparsec.report.summary import summary_lines
from sparsec.study.measure import measured_report
from sparsec.study.plan import plan
from sparsec.study.sample import check_prompt
from sparsec.unfinished import Unfinished, cleared_away

WARM_UP = 3


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    args = parser(prog).parse_args(argv)
    if not args.json:
        return guarded(lambda: _launched(args, sys.stdout), args.traceback)
    told = sys.stdout
    with redirect_stdout(sys.stderr):  # what libraries print is no JSON
        return guarded(lambda: _launched(args, told), args.traceback)


def _launched(args: argparse.Namespace, out: TextIO) -> None:
    with launched() as ranks:
        _run(args, ranks, out)


def _run(args: argparse.Namespace, ranks: Ranks, out: TextIO) -> None:
    # What can be wrong is looked at before anything slow runs.
    pipeline = Pipeline.parse(args.passes)
    pipeline.validate()
    _check_places(args.model, args.folder)
    _check_lowers(pipeline)
    shard_bytes(args.max_shard_size)
    if args.max_memory is not None:
        args.max_memory = shard_bytes(args.max_memory, "--max-memory")
    if args.prompt is not None:
        check_prompt(args.prompt)
    if args.text is not None and not args.measure:
        raise DataError(
            "--text is what quality is measured on, and nothing is measured; add --measure, or leave it out"
        )
    if args.measure and (args.resume or args.max_memory is not None):
        raise DataError(
            "--measure compares models side by side in memory, so that nothing is kept to go on from; leave out --measure, and "
            "measure the saved model with: sparsec report " + args.folder
        )
    if args.measure and not ranks.alone:
        raise DataError(
            "--measure takes times, which several ranks on a machine would disturb; leave it out, and measure the saved model "
            "with: sparsec report " + args.folder
        )
    text = load_text(args.text) if args.measure else None
    learnt = calibration_text(args, [pipeline])
    second = None if text is None else untrained_text(args, [pipeline], text, learnt)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    unfinished = None if args.measure else begun(args, ranks)
    with cleared_away(unfinished), shown_progress(sys.stderr) as shown, memory.Peak() as peak:
        events = Events(out, shown) if args.json else None
        progress = Account(events or shown)
        with stage(progress, "loading the model"):
            loaded = loaded_once(args, ranks, progress, unfinished)
        drawn = calibration(loaded, args, [pipeline], learnt, progress)

        def begin() -> None:
            assert unfinished is not None
            of = _fingerprint(args, pipeline, loaded, drawn, unfinished.hashed(loaded.files, progress))
            unfinished.fits(of)
            ranks.agree(lambda: {name: str(value) for name, value in of.items() if name != "threads"})

        if not ranks.first:
            helped(loaded, pipeline, drawn, ranks, unfinished, begin)
            return
        place = Path(args.folder).expanduser() if unfinished is None else unfinished.result
        if text is not None:
            model, report, lines, better = _measured(loaded, pipeline, args, (text, second), drawn, progress)
        else:
            assert unfinished is not None
            model, report, lines, better = _compiled(loaded, pipeline, args, drawn, progress, unfinished, begin)
        # It is written elsewhere, and moved to its folder, whose name the card tells, once it is whole.
        model.sparsec.save_pretrained(
            place,
            tokenizer=loaded.tokenizer,
            max_shard_size=args.max_shard_size,
            report=report,
            progress=progress,
            name=Path(args.folder).expanduser().resolve().name,
        )
        taken, spent = progress.total, progress.by_kind(report.passes)
        source = sum(path.stat().st_size for path in loaded.files)
        then = "generate" if model.can_generate() else "check"
        if unfinished is not None:
            unfinished.unchanged()
            ranks.told("written")
            unfinished.done()
    folder = args.folder
    if unfinished is not None and not Path(folder).expanduser().exists():  # such as `new/../out`
        folder = str(unfinished.place)
    if events is not None:
        facts = saved_facts(folder, report)
        events.say("saved", **facts, peak_memory_bytes=peak.nbytes, source_bytes=source, spent=spent)
        return
    lines += saved_lines(folder, report, then)
    if peak.nbytes:
        lines.append(f"memory: {mega(peak.nbytes)} MB at most, mapped files aside")
    lines += paragraph(f"{rate(source, taken)}: {told_shares(spent, taken)}", "time: ")
    print("\n".join([*lines, *better]).lstrip("\n"))


def _fingerprint(
    args: argparse.Namespace, pipeline: Pipeline, loaded: LoadedModel, drawn: Sequences | None, source: dict[str, str]
) -> dict[str, Any]:
    """What the bytes of the result follow from, beside the machine."""
    names = ("sparsec", "torch", "transformers", "safetensors")
    text = "" if drawn is None else hashlib.sha256(repr([list(map(int, t)) for t in drawn.tokens]).encode()).hexdigest()
    return {
        "source": source,
        "config": loaded.model.config.to_json_string(),
        "revision": getattr(loaded.model.config, "_commit_hash", None),  # of a hub
        "calibration": text,
        "passes": str(pipeline),
        "dtype": args.dtype,
        "seed": args.seed,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in names},
    }


def _check_places(model: str, folder: str) -> None:
    """DataError for a model that cannot be compiled, or a folder that holds somebody else's model."""
    if saved_folder(model) is not None:
        raise DataError(
            f"{model}: this model was saved by sparsec, and its dense weights are gone; compress the one that it was made from"
        )
    place = Path(folder).expanduser()
    writable_folder(str(place), "no model can be saved there")
    if place.exists() and Path(model).exists() and place.samefile(model):
        raise DataError(f"{folder}: this folder is the model itself, which saving would break; give a new one")
    held = sorted(p.name for p in place.iterdir() if not p.name.startswith(".")) if place.is_dir() else []
    if held and saved_folder(place) is None:
        what = "another model" if "config.json" in held else held[0]
        raise DataError(
            f"{folder}: this folder holds {what}, and a model is saved in a new folder, an empty one, or over an earlier save"
        )


def _check_lowers(pipeline: Pipeline) -> None:
    if pipeline.before("lower") == pipeline:
        raise SpecError(
            f"{pipeline}: no pass lowers, so nothing would be packed; add lower(auto), as in {DEFAULT_PASSES!r}"
        )


def _compiled(
    loaded: LoadedModel,
    pipeline: Pipeline,
    args: argparse.Namespace,
    drawn: Sequences | None,
    progress: Progress,
    unfinished: Unfinished,
    begin: Callable[[], None],
) -> tuple[Any, Report, list[str], list[str]]:
    """The model, what is counted of it, and lines that show what it writes, and what would lose less."""
    glance = None
    if not args.no_sample and not args.json:
        glance = Glance(loaded, args.prompt, args.new_tokens, progress)

    def first() -> None:
        """Every file is read for its hash, and all weights for each word of a sample: only once nothing stands in the way."""
        begin()
        if glance is not None:
            glance.look("before", loaded.model)

    model = compile(
        loaded.model,
        pipeline,
        calibration=drawn,
        copy=False,
        spill=unfinished.spill.folder,
        max_memory=args.max_memory,
        progress=progress,
        instruments=(First(first), unfinished),
    )
    if glance is None:
        return model, model.sparsec.report(), [], lose_less(pipeline, None)
    glance.look("after", model)
    return model, model.sparsec.report(), glance.lines(), glance.advice(pipeline)


def _measured(
    loaded: LoadedModel,
    pipeline: Pipeline,
    args: argparse.Namespace,
    texts: tuple[Text, Text | None],
    drawn: Sequences | None,
    progress: Progress,
) -> tuple[Any, Report, list[str], list[str]]:
    """The same with a report that was measured on a text, and on a second one where a pass trains."""
    effort = (
        Effort(new_tokens=args.new_tokens)
        if args.prompt is None
        else Effort(prompt=args.prompt, new_tokens=args.new_tokens)
    )
    planned = plan(loaded, texts[0], effort, args.bos, texts[1])
    report, model = measured_report(loaded, pipeline, planned, (), progress, drawn)
    lines = summary_lines(report)
    if report.sample is not None:
        lines += heading(f"Before and after, of {report.sample.prompt!r}")
        names = {"dense": "before", "lowered": "after"}
        lines += [
            line for key, name in names.items() for line in paragraph(report.sample.texts[key].strip(), f"{name:<8}")
        ]
    return model, report, lines, []  # the summary tells it


if __name__ == "__main__":
    sys.exit(main())
