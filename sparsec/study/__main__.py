"""`python -m sparsec.study`: many passes on one model, cell by cell: quality, bytes and time against one dense reference."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from sparsec.calibrate import Sequences
from sparsec.console.command import (
    DTYPES,
    calibration,
    calibration_text,
    check_device,
    on_device,
)
from sparsec.console.output import STDOUT, guarded, writable, write_text
from sparsec.console.progress import shown_progress
from sparsec.console.table import terminal_width
from sparsec.data import LoadedModel, load_model, load_text
from sparsec.defaults import Effort
from sparsec.errors import DataError, SpecError
from sparsec.evaluate.saved import fingerprint
from sparsec.machine import Machine, machine
from sparsec.options.study import PROG, parser
from sparsec.page.options import check_pages, write_pages
from sparsec.page.pages import study_page
from sparsec.page.study_charts import study_charts
from sparsec.progress import stage
from sparsec.study.plan import StudyPlan, plan
from sparsec.sweep import tables
from sparsec.sweep.chart import chart
from sparsec.sweep.energy import EnergyMeter
from sparsec.sweep.grid import axis, grid_cells
from sparsec.sweep.planners import Asked, FixedCells
from sparsec.sweep.presets import PRESETS
from sparsec.sweep.run import DENSE, measure_cells, renamed
from sparsec.sweep.store import Store


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser(prog).parse_args(words)
    if args.plan is None:
        return guarded(lambda: _run(args), args.traceback, args.json)
    planned: list[str] = []
    code = guarded(lambda: planned.extend(plan_words(args.plan, parser(prog))), args.traceback)
    if code:
        return code
    both = parser(prog).parse_args([*planned, *words])
    return guarded(lambda: _run(both), args.traceback, both.json)


def plan_words(path: str, known: argparse.ArgumentParser) -> list[str]:
    """A plan's options as words of the command line. DataError for a file that is none, or a key that is no option."""
    try:
        # Texts alone, as on the command line: YAML's own numbers would make 124 of 2:4, which is 2 minutes and 4 seconds.
        found = yaml.load(Path(path).read_text("utf-8"), yaml.BaseLoader)
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: this plan cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: a plan must be a mapping of options, got {type(found).__name__}")
    options = {o.removeprefix("--"): a for a in known._actions for o in a.option_strings if o.startswith("--")}
    words = []
    for key, value in found.items():
        if key == "model":
            words.append(str(value))
            continue
        if key not in options or key in ("plan", "help"):
            near = difflib.get_close_matches(str(key), [*options, "model"], n=1, cutoff=0.5)
            raise DataError(f"{path}: {key!r} is no option of a study{f'; did you mean {near[0]!r}?' if near else ''}")
        words += _words(path, key, value, options[key])
    return words


def _words(path: str, key: str, value: Any, action: argparse.Action) -> list[str]:
    if action.nargs == 0:  # a switch
        if value not in ("true", "false"):
            raise DataError(f"{path}: {key} is true or false, got {value!r}")
        return [f"--{key}"] if value == "true" else []
    if key == "grid":
        if not isinstance(value, dict):
            raise DataError(f"{path}: grid must be a mapping of placeholders to lists of values, got {value!r}")
        rows = {name: each if isinstance(each, list) else [each] for name, each in value.items()}
        return [f"--grid={name}={','.join(map(str, each))}" for name, each in rows.items()]
    values = value if isinstance(value, list) else [value]
    if any(isinstance(each, dict | list) or not each for each in values) or (len(values) != 1 and key != "passes"):
        raise DataError(f"{path}: {key} must have one value, got {value!r}")
    return [f"--{key}={each}" for each in values]


def _run(args: argparse.Namespace) -> None:
    asked = _asked(args)
    pipelines = [cell.pipeline for cell in asked.planner.candidates]
    check_device(args.device)
    for path in (args.json, args.csv, args.markdown):
        if path is not None:
            writable(path)
    check_pages(args)
    text = load_text(args.text)
    learnt = calibration_text(args, pipelines)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    with shown_progress(sys.stderr) as progress:
        with stage(progress, "loading the model"):
            loaded = on_device(load_model(args.model, DTYPES[args.dtype], progress, args.seed), args.device)
        if loaded.is_encoder and args.preset and (lacks := PRESETS[args.preset].lacks):
            raise DataError(
                f"{loaded.name}: {type(loaded.model).__name__} is an encoder, and --preset {args.preset} tells by {lacks}, which "
                "it has not; --preset frontier goes by the cosine of its embeddings, and so do --passes with --grid"
            )
        planned = plan(loaded, text, _effort(args), args.bos)
        drawn = calibration(loaded, args, pipelines, learnt, progress)
        here = machine()
        store = Store(
            _identity(args, loaded, planned, drawn, here), here, _notes(loaded, planned, args), _path(args.json)
        )
        measure_cells(loaded, asked.planner, planned, drawn, store.results, store.keep, progress)
    _write(args, asked, store)


def _asked(args: argparse.Namespace) -> Asked:
    axes: dict[str, list[str]] = {}
    for name, values in map(axis, args.grid):
        if name in axes:
            raise SpecError(f"--grid {name} is given twice; give all its values at once")
        axes[name] = values
    if args.preset:
        return PRESETS[args.preset].ask(args.passes, axes)
    if not args.passes:
        raise SpecError(
            'nothing to measure: give --passes, such as --passes "magnitude({zeros}),freeze" --grid zeros=0.3,0.5, or a --preset'
        )
    return Asked(FixedCells(grid_cells(args.passes, axes)))


def _effort(args: argparse.Namespace) -> Effort:
    return Effort(
        windows=args.windows,
        length=args.length,
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
        repeats=args.repeats,
        seconds=float(args.cell_seconds),
    )


def _identity(
    args: argparse.Namespace,
    loaded: LoadedModel,
    planned: StudyPlan,
    drawn: Sequences | None,
    here: Machine,
) -> dict[str, Any]:
    """What the results depend on, beside the passes."""
    return {
        "model": f"{loaded.name} {fingerprint(loaded.model)}",
        "source_precision": loaded.source_precision,
        "dtype": args.dtype,
        "device": args.device,
        "text": planned.windows.text_name,
        "text_sha256": planned.windows.text_sha256,
        "windows": planned.windows.count,
        "window_length": planned.windows.length,
        "bos": planned.windows.beginning.token,
        "prompt_tokens": args.prompt_tokens,
        "calibration": None if drawn is None else drawn.source,
        "cpu": here.cpu,
        "threads": torch.get_num_threads(),
    }


def _notes(loaded: LoadedModel, planned: StudyPlan, args: argparse.Namespace) -> tuple[str, ...]:
    windows = planned.windows
    how = f"prefill of {args.prompt_tokens} tokens, then decoding"
    if loaded.is_encoder:
        how = f"forwards of {args.prompt_tokens} tokens and of a window"
    notes = [
        f"{loaded.name}, from {loaded.source}; its weights are stored as: {loaded.source_precision}",
        f"quality on {windows.count} windows of {windows.length} tokens of {windows.text_name}, against dense on the same ones",
        f"times at batch 1, every cell by turns with dense: {how}; speedups are medians over rounds",
    ]
    if loaded.is_encoder:
        notes.append("energy: not measured, since it is that of a generated token and an encoder generates none")
    elif absent := EnergyMeter(args.device).absent:
        notes.append(f"energy: {absent}")
    return tuple(notes)


def _path(name: str | None) -> Path | None:
    return None if name in (None, STDOUT) else Path(str(name))


def _write(args: argparse.Namespace, asked: Asked, store: Store) -> None:
    found = renamed(store.results, asked.planner.candidates)
    specs = [DENSE, *(cell.spec for cell in asked.planner.candidates)]
    results = [found[spec] for spec in specs if spec in found]
    width = terminal_width()
    print(tables.text(results, store.notes, width))
    outcome = asked.outcome(found)
    told = [] if outcome is None else outcome.lines(found, width)
    for line in (*told, *chart(results, width)):
        print(line)
    if store.taken_over:
        print(f"{store.taken_over} cells were taken over from {store.path}")
    if args.csv:
        write_text(args.csv, tables.as_csv(results))
    if args.markdown:
        write_text(args.markdown, tables.markdown(results, store.notes))
    if args.json:
        findings = None if outcome is None else {"preset": args.preset} | asdict(outcome)
        write_text(args.json, json.dumps(store.document(findings), indent=1, allow_nan=False) + "\n")
    name = str(store.of["model"]).rpartition(" ")[0]
    drawn = write_pages(
        args,
        lambda: study_page(name, results, store.notes, store.machine, "\n".join(told).strip()),
        lambda: study_charts(results),
    )
    if written := [*(path for path in (args.json, args.csv, args.markdown) if path), *drawn]:
        print(f"\nwritten: {', '.join(written)}")


if __name__ == "__main__":
    sys.exit(main())
