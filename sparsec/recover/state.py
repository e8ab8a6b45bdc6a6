"""The folder that keeps the state of a training, so that a killed run goes on: safetensors and JSON, replaced as a whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsec import files
from sparsec.errors import RecoverError, briefly
from sparsec.ir.graph import Graph
from sparsec.recover.text import TrainingText

VERSION = 1
_STATE = "recover.json"


@dataclass
class StateFolder:
    """run: tells one training from another: the model and its masks, the text, the options."""

    path: Path
    run: str

    @classmethod
    def open(cls, path: str, graph: Graph, names: Iterable[str], text: TrainingText, options: str) -> StateFolder:
        """Raises RecoverError for a folder that holds the state of another run, or cannot be made."""
        folder = cls(Path(path).expanduser(), _fingerprint(graph, names, text, options))
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecoverError(f"checkpoint={path!r}: this folder cannot be made: {briefly(error)}") from error
        return folder

    def load(self, *needed: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """(tensors, numbers) as they were saved; None where nothing was. needed: what must be there. Raises RecoverError."""
        state = self.path / _STATE
        if not state.exists():
            return None
        try:
            numbers = json.loads(state.read_text("utf-8"))
            version, run, name = numbers["version"], numbers["run"], numbers["tensors"]
            if lacking := [each for each in needed if version == VERSION and each not in numbers]:
                raise ValueError(f"it has no {lacking[0]!r}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecoverError(
                f"{state}: this is no state of a training: {briefly(error)}; take another folder"
            ) from error
        if version != VERSION:
            raise RecoverError(
                f"{state}: version {version} of a state, this sparsec reads {VERSION}; take another folder"
            )
        if run != self.run:
            raise RecoverError(
                f"{state}: the state of another training (other weights, masks, text or options); give the options it was begun "
                "with, or another checkpoint="
            )
        try:
            return load_file(self.path / Path(str(name)).name), numbers
        except (OSError, SafetensorError) as error:
            raise RecoverError(
                f"{self.path / str(name)}: cannot be read: {briefly(error)}; empty the folder to begin anew"
            ) from error

    def save(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Replaces what was saved before. Raises RecoverError for a full disk and the like."""
        name = f"recover-{hashlib.sha256(json.dumps(dict(numbers), default=str).encode()).hexdigest()[:12]}.safetensors"
        made = self.path / f".{name}.tmp"
        try:
            # Names of tensors hold spaces and dots, which safetensors takes.
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, made)
            files.put_in_place(made, self.path / name)
            told = {"version": VERSION, "run": self.run, "tensors": name, **numbers}
            files.write(self.path / _STATE, json.dumps(told, indent=1).encode())
        except (OSError, SafetensorError) as error:
            made.unlink(missing_ok=True)
            raise RecoverError(f"checkpoint={str(self.path)!r}: the state cannot be saved: {briefly(error)}") from error
        for old in self.path.glob("recover-*.safetensors"):
            if old.name != name:
                old.unlink(missing_ok=True)


def _fingerprint(graph: Graph, names: Iterable[str], text: TrainingText, options: str) -> str:
    found = hashlib.sha256(options.encode())
    for name in names:
        tensor = graph.tensor(name).detach()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        found.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    for call in (*text.trained, *text.held):
        for tensor in call:
            found.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
