"""`python -m sparsec.evaluate`: models, and what passes make of them, on a text: perplexity, agreement, divergence; of encoders,
how near their embeddings are to the first one's."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from sparsec.calibrate import Sequences
from sparsec.console.command import (
    DTYPES,
    calibration,
    calibration_text,
    check_device,
    on_device,
    untrained_text,
)
from sparsec.console.output import guarded, writable, write_text
from sparsec.console.progress import shown_progress
from sparsec.data import LoadedModel, Text, load_text
from sparsec.errors import DataError
from sparsec.evaluate.compare import Evaluation, compare
from sparsec.evaluate.embeddings import Encoding, compare_embeddings, left_out
from sparsec.evaluate.output import document, text
from sparsec.evaluate.saved import Saved, fingerprint
from sparsec.evaluate.windows import Windows, cut, cut_second
from sparsec.opened import open_model
from sparsec.options.evaluate import LENGTH, PROG, parser
from sparsec.pipeline import Pipeline
from sparsec.progress import stage
from sparsec.study.variants import compiled_by


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    args = parser(prog).parse_args(argv)
    return guarded(lambda: _run(args), args.traceback, args.json)


def _run(args: argparse.Namespace) -> None:
    pipelines = [Pipeline.parse(spec) for spec in args.passes]
    for pipeline in pipelines:
        pipeline.validate()
    check_device(args.device)
    for path in (args.json, args.resume):
        if path is not None:
            writable(path)
    content = _first_half(load_text()) if args.text is None else load_text(args.text)
    learnt = calibration_text(args, pipelines)
    untrained = untrained_text(args, pipelines, content, learnt)
    if args.threads:
        torch.set_num_threads(args.threads)
    with shown_progress(sys.stderr) as progress:
        with stage(progress, "loading"):
            dtype = None if args.dtype is None else DTYPES[args.dtype]
            loaded = [on_device(open_model(spec, dtype, progress), args.device) for spec in args.models or [None]]
        _check_kinds(loaded)
        tokenizer, sizes = _tokenizer(loaded), _sizes(args, loaded)
        windows = cut(content, tokenizer, *sizes, bos=args.bos)
        second = None if untrained is None else cut_second(untrained, tokenizer, *sizes, bos=args.bos)
        drawn = calibration(loaded[0], args, pipelines, learnt, progress)
        notes = [f"{each.name}: {note}" for each in loaded for note in (*each.notes, *left_out(each.model))]
        if loaded[0].is_encoder and len(loaded) + len(pipelines) == 1:
            notes.append("there is nothing to compare it with: give --passes, or a second model")
        notes += [f"calibrated on {drawn.source}"] if drawn is not None else []
        texts = [windows] if second is None else [windows, second]
        kept: list[Saved | None] = [None] * len(texts)
        if args.resume:
            kept = [
                Saved(f"{args.resume}{end}", _identity(args, loaded, each, pipelines, drawn))
                for each, end in zip(texts, ("", ".second"), strict=False)
            ]
        notes += [f"{s.done} windows were taken over from {s.path}" for s in kept if s is not None and s.done]
        names = _names(loaded, pipelines)
        models: Mapping[str, Any] = dict(zip(names, [each.model for each in loaded], strict=False))
        if any(s is None or s.done < each.count for s, each in zip(kept, texts, strict=True)):
            specs = dict(zip(names[len(loaded) :], pipelines, strict=True))
            built = compiled_by(specs, loaded[0].model, drawn, progress)
            models = {**models, **built}
            notes += _told(built)
        else:
            models = dict.fromkeys(names)  # nothing is left to run
        measure: Callable[..., Mapping[str, Evaluation | Encoding]]
        measure = compare_embeddings if loaded[0].is_encoder else compare
        found = measure(models, windows, progress, "evaluating windows", kept[0])
        beside = None
        if second is not None:
            beside = second, measure(models, second, progress, "evaluating windows of a second text", kept[1])
    print(text(found, windows, notes, beside))
    if args.json:
        write_text(args.json, json.dumps(document(found, windows, notes, beside), indent=1, allow_nan=False) + "\n")
        print(f"\nwritten: {args.json}")


def _check_kinds(loaded: Sequence[LoadedModel]) -> None:
    """DataError where encoders and causal language models stand side by side."""
    encoders, others = ([each.name for each in loaded if each.is_encoder is wanted] for wanted in (True, False))
    if encoders and others:
        raise DataError(
            f"{encoders[0]} is an encoder and {others[0]} a causal language model, whose outputs cannot be compared; evaluate each "
            "kind by itself"
        )


def _first_half(text: Text) -> Text:
    """Of the embedded text; passes calibrate on the other half of it."""
    return Text(f"{text.name}, first half", text.content[: len(text.content) // 2])


def _tokenizer(loaded: Sequence[LoadedModel]) -> Any:
    """The first model's, after a look at whether the others read text the same way."""
    first = loaded[0]
    probe = "The 2 quick brown foxes didn't jump over 13 lazy dogs; déjà vu."
    for each in loaded:
        if each.tokenizer is None:
            raise DataError(f"{each.name}: there is no tokenizer, so no text can be evaluated; add one to its folder")
        if each.tokenizer(probe)["input_ids"] != first.tokenizer(probe)["input_ids"]:  # type: ignore[misc]
            raise DataError(
                f"{each.name}: its tokenizer reads text differently from that of {first.name}; the two "
                "cannot be compared"
            )
    return first.tokenizer


def _sizes(args: argparse.Namespace, loaded: Sequence[LoadedModel]) -> tuple[int, int | None, int | None]:
    """(length, windows, limit)."""
    limit = min((each.positions for each in loaded if each.positions is not None), default=None)
    return args.length or min(LENGTH, limit or LENGTH), args.windows, limit


def _names(loaded: Sequence[LoadedModel], pipelines: Sequence[Pipeline]) -> list[str]:
    """One for every model; what is there twice is numbered."""
    plain = [each.name for each in loaded] + [str(pipeline) for pipeline in pipelines]
    return [n if plain.count(n) == 1 else f"{n} #{plain[: i + 1].count(n)}" for i, n in enumerate(plain)]


def _identity(
    args: argparse.Namespace,
    loaded: Sequence[LoadedModel],
    windows: Windows,
    pipelines: Sequence[Pipeline],
    drawn: Sequences | None,
) -> dict[str, Any]:
    """What a saved evaluation must be of, to be gone on with."""
    return {
        "text_sha256": windows.text_sha256,
        "text_tokens": windows.tokens_in_text,
        "window_length": windows.length,
        "bos": windows.beginning.token,
        "dtype": args.dtype or "fp32",
        "device": args.device,
        "models": [f"{each.name} {fingerprint(each.model)}" for each in loaded],
        "passes": [str(pipeline) for pipeline in pipelines],
        "calibration": None if drawn is None else drawn.source,
    }


def _told(built: Mapping[str, Any]) -> list[str]:
    """What the passes noted, each thing once."""
    found: dict[str, list[str]] = {}
    for name, model in built.items():
        for note in (note for record in model.sparsec.records for note in record.notes):
            found.setdefault(note, []).append(name)
    return [f"{'; '.join(names)}: {note}" for note, names in found.items()]


if __name__ == "__main__":
    sys.exit(main())
