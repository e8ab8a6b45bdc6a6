"""Where passes keep what they make: in memory, or in files that are mapped and outlive the process.

What is kept in files is no memory of the process, since the system may take its pages back at any time; and a run that was killed
finds there what it had made, and makes the rest.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsec.errors import SpillError, briefly
from sparsec.memory import apart, trim

Made = tuple[Mapping[str, Tensor], Mapping[str, Any]]
"""Tensors by name, and what else is to be known of them, as JSON has it."""
Make = Callable[[], Made]
_FACTS = "facts"
_LONGEST = 120


class Keep:
    """Keeps nothing: what is asked for is made."""

    lasting = False
    """Whether what was made is there again when another process asks for it."""

    def made(self, key: str, make: Make) -> Made:
        """What stands under a key, made where there is nothing yet."""
        return make()

    def has(self, key: str) -> bool:
        """Whether something stands under a key."""
        return False

    def drop(self, key: str) -> None:
        """Takes it away, where there is something; whoever holds the tensors keeps them."""

    def within(self, place: str) -> Keep:
        """The same store, for keys of one place among others."""
        return self


@dataclass(frozen=True)
class Spill(Keep):
    """Keeps everything in files of one folder, which is there. Every file is whole or not there, whenever the process is killed.

    Tensors come back contiguous and mapped: a write to one of them is not written to the file.
    """

    folder: Path
    lasting = True

    @classmethod
    def of(cls, folder: str | os.PathLike[str]) -> Spill:
        """In a folder, which is made where it is not there. Raises SpillError where that fails."""
        place = Path(folder).expanduser()
        try:
            place.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise SpillError(
                f"spill={str(folder)!r}: this folder cannot be made: {briefly(error)}; name another"
            ) from error
        return cls(place)

    def made(self, key: str, make: Make) -> Made:
        """As of `Keep`. Raises SpillError where the folder cannot be written or a file is damaged."""
        path = self._path(key)
        if not path.exists():
            tensors, facts = make()
            self._write(path, tensors, facts)
            nbytes = sum(tensor.nbytes for tensor in tensors.values())
            del tensors
            _tidied(nbytes)
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads(file.metadata()[_FACTS])
                return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118 - no dictionary
        except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
            raise SpillError(f"{path} is damaged: {briefly(error)}; delete {self.folder} and begin anew") from error

    def has(self, key: str) -> bool:
        return self._path(key).exists()

    def drop(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)

    def within(self, place: str) -> Spill:
        folder = self.folder / _file_name(place)
        return Spill.of(folder)

    def _path(self, key: str) -> Path:
        return self.folder / f"{_file_name(key)}.safetensors"

    def _write(self, path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        made = path.with_name(f".{secrets.token_hex(8)}.tmp")
        try:
            whole = apart({name: tensor.detach().contiguous() for name, tensor in tensors.items()})
            save_file(whole, made, metadata={_FACTS: json.dumps(dict(facts))})
            made.replace(path)
        except (OSError, SafetensorError) as error:
            raise SpillError(
                f"{self.folder}: what a pass made cannot be kept there: {briefly(error)}; make room and go on"
            ) from error
        finally:
            made.unlink(missing_ok=True)


_UNTIDY = 1 << 27
"""Bytes that are made until freed memory goes back to the system."""
_made = 0


def _tidied(nbytes: int) -> None:
    """What was made lay between what stays: without this the heap grows by half of the model."""
    global _made
    _made += nbytes
    if _made >= _UNTIDY:
        _made = 0
        trim()


def _file_name(key: str) -> str:
    """Of a key, which may hold whatever names of weights may."""
    name = quote(key, safe=" ,=()")
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 17]}-{sha256(key.encode()).hexdigest()[:16]}"
