"""The folder that keeps the state of a training, so that a killed run goes on: safetensors and JSON, replaced as a whole."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from sparsec.recover.stretches import Read
from sparsec.recover.text import TrainingText

VERSION = 2
_STATE = "recover.json"
_WHOLE = frozenset({"steps", "skipped", "tokens", "stretches"})


@dataclass
class StateFolder:
    """run: tells one training from another: the model and its masks, the text, the options."""

    path: Path
    run: str

    @classmethod
    def open(cls, path: str, graph: Graph, teacher: Read | None, text: TrainingText, options: str) -> StateFolder:
        """Raises RecoverError for a folder that cannot be made or written to."""
        folder = cls(Path(path).expanduser(), "")
        doing = "made"
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            doing = "written to"
            with tempfile.NamedTemporaryFile(dir=folder.path, prefix=".recover-") as probe:
                probe.write(b"sparsec")
                probe.flush()
        except (OSError, ValueError) as error:
            raise RecoverError(
                f"checkpoint={path!r}: this folder cannot be {doing}: {briefly(error)}; name another one"
            ) from error
        folder.run = _fingerprint(graph, teacher, text, options)
        return folder

    @staticmethod
    def begun_with(path: str, name: str) -> object:
        """A number of the state in a folder, as far as there is one: what an option was settled to. `load` says what is wrong."""
        try:
            return json.loads((Path(path).expanduser() / _STATE).read_text("utf-8"))[name]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    @contextmanager
    def fitting(self) -> Iterator[None]:
        """Around what uses a state that was loaded. Raises RecoverError where its tensors are not those of the training."""
        try:
            yield
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise RecoverError(
                f"{self.path / _STATE}: the state does not fit the training: {briefly(error)}; empty the folder to begin anew"
            ) from error

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
            if wrong := [each for each in needed if version == VERSION and not _sound(each, numbers[each])]:
                raise ValueError(f"its {wrong[0]!r} is {str(numbers[wrong[0]])[:40]!r}")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
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
        held = self.path / Path(str(name)).name
        try:
            if _sha256(held) != numbers.get("sha256"):
                raise ValueError("its bytes are not those that were saved")
            return load_file(held), numbers
        except (OSError, ValueError, SafetensorError) as error:
            raise RecoverError(f"{held}: cannot be read: {briefly(error)}; empty the folder to begin anew") from error

    def save(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Replaces what was saved before. Raises RecoverError for a full disk and the like."""
        name = f"recover-{hashlib.sha256(json.dumps(dict(numbers), default=str).encode()).hexdigest()[:12]}.safetensors"
        made = self.path / f".{name}.tmp"
        try:
            # Names of tensors hold spaces and dots, which safetensors takes.
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, made)
            told = {"version": VERSION, "run": self.run, "tensors": name, "sha256": _sha256(made), **numbers}
            files.put_in_place(made, self.path / name)
            files.write(self.path / _STATE, json.dumps(told, indent=1).encode())
        except (OSError, SafetensorError) as error:
            made.unlink(missing_ok=True)
            raise RecoverError(f"checkpoint={str(self.path)!r}: the state cannot be saved: {briefly(error)}") from error
        for old in self.path.glob("recover-*.safetensors"):
            if old.name != name:
                old.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sound(name: str, value: Any) -> bool:
    """Whether a number that was saved can be one."""
    if name == "notes":
        return isinstance(value, list) and all(isinstance(note, str) for note in value)
    if isinstance(value, bool) or not isinstance(value, int if name in _WHOLE else int | float):
        return False
    return math.isfinite(value) and (value >= 0 or name in ("before", "best"))


def _fingerprint(graph: Graph, teacher: Read | None, text: TrainingText, options: str) -> str:
    """Of all weights and masks, trained or not, and of the teacher's where they differ."""
    found = hashlib.sha256(options.encode())

    def add(tensor: Tensor) -> None:
        found.update(f"{tensor.dtype} {list(tensor.shape)};".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)

    for name in graph.weights:
        own, mask = graph.tensor(name), graph.mask(name)
        taught = own if teacher is None else teacher(name)
        found.update(name.encode())
        add(own)
        if mask is not None:
            add(mask)
        if taught is not own and not torch.equal(taught, own):
            add(taught)
    for call in (*text.trained, *text.held):
        for tensor in call:
            add(tensor)
    return found.hexdigest()
