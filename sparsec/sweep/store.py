"""A study on disk: a JSON document that is brought up to date after every cell, and that a study which was stopped goes on from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sparsec import files
from sparsec.errors import DataError
from sparsec.machine import Machine
from sparsec.report.reread import restored
from sparsec.report.schema import variant_document
from sparsec.report.variant import Variant
from sparsec.sweep.run import CellResult

SCHEMA = "sparsec.study/1"


class Store:
    """The results so far, by specification; in a file too, where a path is given."""

    def __init__(
        self, of: Mapping[str, Any], machine: Machine, notes: tuple[str, ...], path: Path | None = None
    ) -> None:
        """of: what the results depend on. DataError for a file that holds anything else."""
        self.of, self.machine, self.notes, self.path = dict(of), machine, notes, path
        self.results: dict[str, CellResult] = {}
        if path is not None and path.exists():
            self._read(path)
        self.taken_over = len(self.results)

    def keep(self, result: CellResult) -> None:
        """Adds one, and writes all."""
        self.results[result.spec] = result
        if self.path is None:
            return
        try:
            files.write(self.path, json.dumps(self.document(), indent=1, allow_nan=False).encode())
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written ({error.strerror or error}); give another file") from error

    def document(self, findings: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """All of it, as JSON has it. findings: what a preset made of the cells, once they are measured."""
        return {
            "schema": SCHEMA,
            "of": self.of,
            "machine": asdict(self.machine),
            "notes": list(self.notes),
            "cells": [_cell(result) for result in self.results.values()],
            "findings": findings,
        }

    def _read(self, path: Path) -> None:
        try:
            found = json.loads(path.read_bytes())
            if found["schema"] != SCHEMA:
                raise DataError(f"its schema is {found['schema']!r}, and this version writes {SCHEMA!r}")
            of, cells = dict(found["of"]), [_result(cell) for cell in found["cells"]]
        except (OSError, ValueError, KeyError, TypeError, RecursionError, DataError) as error:
            raise DataError(
                f"{path}: is no study that can be gone on with ({error}); delete it, or give another file"
            ) from error
        for key in dict.fromkeys((*self.of, *of)):
            if self.of.get(key) != of.get(key):
                there, here = of.get(key), self.of.get(key)
                raise DataError(
                    f"{path}: is of another study: {key} is {there!r} there and {here!r} here; give another file, or delete it"
                )
        self.results = {result.spec: result for result in cells}


def _cell(result: CellResult) -> dict[str, Any]:
    figures = None if result.figures is None else variant_document(result.figures)
    return asdict(result) | {"values": dict(result.values), "figures": figures}


def _result(cell: Mapping[str, Any]) -> CellResult:
    values = {str(name): str(value) for name, value in dict(cell["values"]).items()}
    figures = None if cell["figures"] is None else restored(Variant, cell["figures"], "figures")
    plain = restored(CellResult, {**cell, "values": [], "figures": None}, "cell")
    return replace(plain, values=tuple(values.items()), figures=figures)
