"""A report as JSON and CSV. The JSON's schema is the table `SCHEMA` below, which `check` holds a document against.

`schema` names the version, `sparsec.report/1`. A new key keeps the version, since readers skip what they do not know; a key that
goes away or changes its meaning takes the next one. null stands for what is not known: a pass or measurement did not run.
"""

from __future__ import annotations

import csv
import io
import math
from dataclasses import asdict
from typing import Any

from sparsec.pipeline.base import PassRecord
from sparsec.pipeline.trained import FIGURES
from sparsec.report.layer import LayerRow, figures
from sparsec.report.records import GroupRow, ReportData
from sparsec.report.variant import Variant, metrics
from sparsec.report.words import dense_reason
from sparsec.timing.spread import Spread

VERSION = "sparsec.report/1"

NUMBER = (int, float)
NONE = type(None)
Keys = dict[str, tuple[tuple[type, ...], str]]

PASS: Keys = {
    "index": ((int,), "from 1"),
    "spec": ((str,), "canonical text with options"),
    "name": ((str,), "of the pass"),
    "effect": ((str,), "analysis, exact, numeric or lossy"),
    "seconds": (NUMBER, "wall time"),
    "changed": ((bool,), "whether the computation or its masks changed"),
    "summary": ((str,), "one line"),
    "notes": ((list,), "strings: what was left alone, and why"),
    "training": ((dict, NONE), "of TRAINING, of a pass that trains"),
    "spent": ((dict,), "seconds by kind of work, of a pass that calibrates"),
}
TRAINING: Keys = {
    "method": ((str,), "as in the pass's options"),
    "steps": ((int,), "of the optimiser"),
    "tokens": ((int,), "trained on, as often as they came"),
    "seconds": (NUMBER, "of training, without what is looked at before and after"),
    "dtype": ((str,), "of the products"),
    "held_out": (
        (dict,),
        "of TRAINED_TEXT: sequences of the text that was trained on, which were not trained on themselves",
    ),
    "second": (
        (dict, NONE),
        "of TRAINED_TEXT: another text, which was not trained on; null where there was no tokenizer",
    ),
}
TRAINED_TEXT: Keys = {
    "text": ((str,), "what it is"),
    "sequences": ((int,), "looked at"),
    **{
        f"{name}_{when}": ((*NUMBER, NONE), f"{title}, {when} training; null where not known or not finite")
        for name, title in FIGURES.items()
        for when in ("before", "after")
    },
}


def _types(annotation: Any) -> tuple[type, ...]:
    """As JSON has them; a spread is its median."""
    kind = str(annotation)
    known = {"int": (int,), "bool": (bool,), "str": (str,), "tuple": (list,)}
    return known.get(kind.partition(" ")[0].partition("[")[0], NUMBER) + ((NONE,) if kind.endswith("None") else ())


LAYER: Keys = {name: (_types(own.type), figure.doc) for name, (own, figure) in figures().items()}
GROUP: Keys = {
    "group": ((str,), "as in a layer"),
    "parameters": ((int,), "stored in it"),
    "nnz": ((int,), "kept"),
    "sparsity": (NUMBER, "share of zeros"),
    "flops_per_token": ((*NUMBER, NONE), "executed by its ops, those without weights included"),
    "flops_dense": ((*NUMBER, NONE), "as if nothing were zero"),
    "bytes_dense": ((int,), "dense"),
    "bytes_held": ((int,), "held"),
    "share": (NUMBER, "of all parameters"),
}


def _variant_keys() -> Keys:
    """From the fields of Variant; a spread is its median and its quartiles."""
    found: Keys = {}
    for name, (own, metric) in metrics().items():
        found[name] = (_types(own.type), metric.doc)
        if "Spread" in str(own.type):
            found[f"{name}_quartiles"] = ((list, NONE), "[lower, upper]")
    return found


VARIANT: Keys = _variant_keys()
STAGE: Keys = {
    "name": ((str,), "what took the time"),
    "seconds": (NUMBER, "wall time"),
    "done": ((int, NONE), "how much of it fitted into its share of the time budget; null where nothing is counted"),
    "wanted": ((int, NONE), "how much was asked for"),
    "unit": ((str,), "of done and wanted: windows, rounds, ..."),
}
SCHEMA: Keys = {
    "schema": ((str,), f"{VERSION!r}"),
    "machine": (
        (dict, NONE),
        "cpu, isa, cores, memory_bytes, gpu, system, python, versions, commit, threads, kernels, native, load",
    ),
    "model": ((dict, NONE), "name, architecture, source, source_precision, dtype, encoder"),
    "passes": ((list,), "of PASS, in order"),
    "layers": ((list,), "of LAYER, one per stored weight"),
    "groups": ((list,), "of GROUP"),
    "bytes_buffers": ((int,), "beside the weights"),
    "flops_without_weights": (
        (*NUMBER, NONE),
        "per token, of attention scores and values at the context of the pass flops",
    ),
    "linears_dense_ms": ((*NUMBER, NONE), "of a decoded token in linear layers with F.linear, by the cost model"),
    "linears_ms": ((*NUMBER, NONE), "the same as they are executed now"),
    "summary": (
        (dict,),
        "of VARIANT under dense, masked, dense_on_sparsec and lowered; empty where nothing was compared",
    ),
    "evaluation": ((dict, NONE), "text, text_sha256, text_tokens, windows, window_length, dtype, bos, protocol"),
    "latency": (
        (dict, NONE),
        "prompt_tokens, threads, prefill_repeats, decode_repeats, busy_cores (of others), disturbed, window_tokens, window_repeats",
    ),
    "in_turn": (
        (bool,),
        "whether the variants took turns; false: one after another, since memory does not hold them together",
    ),
    "sample": ((dict, NONE), "prompt, chat, new_tokens, texts by variant and by specification of beside"),
    "stages": ((list,), "of STAGE, in order"),
    "notes": ((list,), "strings of tracing and emission"),
    "remarks": ((list,), "strings on how it was measured"),
    "beside": (
        (dict,),
        "perplexity (of encoders: cosine) on the same windows by other passes, by their specification; null beyond floating point",
    ),
    "second": (
        (dict, NONE),
        "where a pass trained: as evaluation, of a text that was not trained on, for the figures of VARIANT that end in _second",
    ),
    "beside_second": ((dict,), "as beside, on that text"),
    "decoding": (
        (str, NONE),
        "what computes a token: one native call, or the model's own code and why; null for what is not lowered, writes no text or "
        "is not on a CPU",
    ),
}


def document(report: ReportData) -> dict[str, Any]:
    """The report as what `json.dumps(..., allow_nan=False)` takes."""
    return {
        "schema": VERSION,
        "machine": asdict(report.machine) if report.machine is not None else None,
        "model": asdict(report.model) if report.model is not None else None,
        "passes": [_pass(p) for p in report.passes],
        "layers": [_layer(row) for row in report.layers],
        "groups": [_group(row) for row in report.groups],
        "bytes_buffers": report.bytes_buffers,
        "flops_without_weights": report.flops_without_weights,
        "linears_dense_ms": report.linears_dense_ms,
        "linears_ms": report.linears_ms,
        "summary": {name: variant_document(v) for name, v in report.summary.items()},
        "evaluation": asdict(report.evaluation) if report.evaluation is not None else None,
        "latency": asdict(report.latency) if report.latency is not None else None,
        "sample": asdict(report.sample) if report.sample is not None else None,
        "in_turn": report.in_turn,
        "stages": [asdict(stage) for stage in report.stages],
        "notes": list(report.notes),
        "remarks": list(report.remarks),
        "beside": {spec: _finite(value) for spec, value in report.beside.items()},
        "second": asdict(report.second) if report.second is not None else None,
        "beside_second": {spec: _finite(value) for spec, value in report.beside_second.items()},
        "decoding": report.decoding,
    }


def layers_csv(report: ReportData) -> str:
    """The layers as CSV, a header line first; the columns are the keys of LAYER, lists joined with spaces."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(LAYER), lineterminator="\n")
    writer.writeheader()
    for row in report.layers:
        cells = _layer(row)
        writer.writerow({k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in cells.items()})
    return stream.getvalue()


def check_report(found: Any) -> list[str]:
    """How a document departs from the schema; empty when it does not. Unknown keys are allowed."""
    problems = _check("report", found, SCHEMA)
    if problems:
        return problems
    if found["schema"] != VERSION:
        problems.append(f"report.schema: expected {VERSION!r}, got {found['schema']!r}")
    for part, keys in (("passes", PASS), ("layers", LAYER), ("groups", GROUP), ("stages", STAGE)):
        for i, item in enumerate(found[part]):
            problems += _check(f"{part}[{i}]", item, keys)
    for i, item in enumerate(found["passes"]):
        if isinstance(item, dict) and item.get("training") is not None:
            problems += _check_training(f"passes[{i}].training", item["training"])
    for name, item in found["summary"].items():
        problems += _check(f"summary.{name}", item, VARIANT)
    return problems


def _check_training(where: str, found: Any) -> list[str]:
    problems = _check(where, found, TRAINING)
    texts = {} if problems else {name: found[name] for name in ("held_out", "second") if found[name] is not None}
    return problems + [p for name, text in texts.items() for p in _check(f"{where}.{name}", text, TRAINED_TEXT)]


def _check(where: str, found: Any, keys: Keys) -> list[str]:
    if not isinstance(found, dict):
        return [f"{where}: expected an object, got {type(found).__name__}"]
    problems = [f"{where}: lacks {key!r} ({doc})" for key, (_, doc) in keys.items() if key not in found]
    for key, (types, doc) in keys.items():
        # bool is an int to Python, but not to a reader of JSON
        wrong = key in found and (
            not isinstance(found[key], types) or (isinstance(found[key], bool) and bool not in types)
        )
        if wrong:
            names = " or ".join("null" if t is NONE else t.__name__ for t in types)
            problems.append(f"{where}.{key} ({doc}): expected {names}, got {found[key]!r}")
    return problems


def _pass(p: PassRecord) -> dict[str, Any]:
    found = asdict(p) | {"effect": p.effect.value, "notes": list(p.notes), "spent": dict(p.spent)}
    for text in ("held_out", "second") if p.training is not None else ():
        if found["training"][text] is not None:
            found["training"][text] = {k: _finite(v) for k, v in found["training"][text].items()}
    return found


def _finite(value: Any) -> Any:
    """null is what JSON has for what is beyond floating point."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _layer(row: LayerRow) -> dict[str, Any]:
    cells = {key: getattr(row, key) for key in LAYER}
    return cells | {"aliases": list(row.aliases), "shape": list(row.shape), "reason": dense_reason(row) or row.reason}


def _group(row: GroupRow) -> dict[str, Any]:
    return {key: getattr(row, key) for key in GROUP}


def variant_document(v: Variant) -> dict[str, Any]:
    """One of the compared models, as `VARIANT` has it."""
    cells: dict[str, Any] = {}
    for key in metrics():
        value = _finite(getattr(v, key))
        cells[key] = value.median if isinstance(value, Spread) else value
        if f"{key}_quartiles" in VARIANT:
            cells[f"{key}_quartiles"] = [value.lower, value.upper] if isinstance(value, Spread) else None
    return cells
