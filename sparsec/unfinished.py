"""The folder of a run that is not done: what it has made, and what it is of, so that it can go on after it was killed.

It stands beside the folder that the run is to write, which is there when all of it is, and not before.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sparsec import files
from sparsec.errors import DataError, SparsecError, SpillError, briefly, some
from sparsec.ir.graph import Graph
from sparsec.pipeline import Pass
from sparsec.progress import Progress
from sparsec.spill import Spill

ENDING = ".unfinished"
_CONFIG = "config.json"  # of the result: without it a folder is no saved model
_KEPT = "kept"
_RESULT = "result"
_RUN = "run.json"
_SCHEMA = "sparsec.unfinished/1"
_OWN = re.compile(rf"{_KEPT}|{_RESULT}|lock|rank [0-9]+|{re.escape(_RUN)}|\.{re.escape(_RUN)}-[0-9a-f]+\.tmp")
"""What lies in the folder of a run."""


@dataclass(frozen=True)
class _Seen:
    """file: its size, the time of its contents, which whoever writes may set back, and its number. changed: when anything of it
    was, its rights and its names too."""

    file: tuple[int, int, int]
    changed: int


@dataclass
class Unfinished:
    """place: of the result. path: of the folder beside it."""

    place: Path
    path: Path
    sources: dict[str, _Seen] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)  # SHA-256 of each file, by its path

    @classmethod
    def begun(cls, place: Path, resume: bool, rank: int = 0) -> Unfinished:
        """Makes the folder, or goes on with the one that is there. rank: of several processes; all but 0 keep theirs within it.

        Raises DataError for one that is there and shall not be gone on with, SpillError for one that cannot be made.
        """
        place = Path(os.path.realpath(place))
        path = place.with_name(f"{place.name}{ENDING}")
        path = path / f"rank {rank}" if rank else path
        try:
            if _is_run(path) and not resume:
                raise DataError(
                    f"{path} holds a run that was not done; --resume goes on with it, and deleting the folder begins anew"
                )
            (path / _KEPT).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SpillError(f"{path} cannot be made: {briefly(error)}; name another folder to save in") from error
        return cls(place, path)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Meanwhile no other process works there: DataError where one does. What a killed one had half written goes away, and
        where it never came to say what its run is of, all that it kept does: that may be of another source."""
        others: list[str] = []
        with files.lock(self.path / "lock", 0, others.append) as held:
            if others and not held:
                raise DataError(
                    f"{self.path}: process {others[0]} works there; wait until it is done, or name another folder to save in"
                )
            shutil.rmtree(self.path / _RESULT, ignore_errors=True)
            if not (self.path / _RUN).exists():
                shutil.rmtree(self.path / _KEPT, ignore_errors=True)
                (self.path / _KEPT).mkdir()
            yield

    @property
    def spill(self) -> Spill:
        """For what passes make."""
        return self.of_rank(None)

    def of_rank(self, rank: int | None) -> Spill:
        """The same of another rank on this machine; None: this one."""
        whole = self.place.with_name(f"{self.place.name}{ENDING}")
        return Spill((self.path if rank is None else whole / f"rank {rank}" if rank else whole) / _KEPT)

    def fits(self, of: Mapping[str, Any]) -> None:
        """Writes down what the run is of; where it goes on, DataError unless it is the same. Only names of JSON."""
        given = json.loads(json.dumps({"schema": _SCHEMA, **of}))
        known = self.path / _RUN
        if known.exists():
            try:
                before = json.loads(known.read_text("utf-8"))
            except (OSError, ValueError) as error:
                raise DataError(
                    f"{known} cannot be read: {briefly(error)}; delete {self.path} to begin anew"
                ) from error
            if differing := _differing(before, given):
                raise DataError(
                    f"{self.path} holds a run of something else: {some(differing)}; begin it as it was begun, or delete the folder "
                    "to begin anew"
                )
            return
        try:
            files.write(known, json.dumps(given, indent=1).encode())
        except OSError as error:
            raise SpillError(f"{known} cannot be written: {briefly(error)}; make room") from error

    def watched(self, sources: Iterable[Path]) -> None:
        """Files that are about to be read, which `hashed` and `unchanged` hold against what they are now."""
        self.sources |= {str(path): _seen(path) for path in {Path(path).resolve() for path in sources}}

    def hashed(self, sources: Iterable[Path], progress: Progress | None) -> dict[str, str]:
        """SHA-256 of each file of the source, by name, of several of one name by path; `unchanged` looks at the same files.
        DataError for one that is gone, or changed since it was read."""
        listed = sorted({Path(path).resolve() for path in sources})
        total = sum(_size(path) for path in listed)
        done = 0
        for path in listed:
            if progress is not None:
                progress("hashing the source", done, max(1, total))
            self.sources.setdefault(str(path), _seen(path))
            self.hashes[str(path)] = _sha256(path)
            done += _size(path)
        if progress is not None:
            progress("hashing the source", max(1, total), max(1, total))
        self.unchanged()
        names = Counter(path.name for path in listed)
        return {path.name if names[path.name] == 1 else str(path): self.hashes[str(path)] for path in listed}

    def unchanged(self) -> None:
        """Raises DataError where a file of the source is not the one that was hashed."""
        for name, before in self.sources.items():
            path = Path(name)
            now = _seen(path) if path.exists() else None
            if now is not None and now != before and now.file == before.file and _sha256(path) == self.hashes.get(name):
                self.sources[name] = now  # another name, other rights
            elif now != before:
                raise DataError(
                    f"{path} changed while it was read, so that nothing is written; give a source that stays as it is, and begin "
                    f"anew after deleting {self.path}"
                )

    @contextmanager
    def around(self, index: int, p: Pass, graph: Graph) -> Iterator[None]:
        """As an instrument of a pipeline: looks at the source before and after every pass."""
        self.unchanged()
        yield
        self.unchanged()

    @cached_property
    def result(self) -> Path:
        """Where to write: a folder that becomes `place` when it is whole, or `place`, where an earlier save is replaced."""
        if self.place.is_dir() and any(self.place.iterdir()):
            return self.place
        return self.path / _RESULT

    def done(self) -> None:
        """The result is whole: it goes to its place, and what was kept goes away. SpillError where something is there by now."""
        if self.result != self.place:
            try:
                self._put()
            except OSError as error:
                raise SpillError(
                    f"{self.place} was free when the run began, and the result cannot be put there: {briefly(error)}; it is whole "
                    f"in {self.result}: move it from there, and delete {self.path}"
                ) from error
        self._away()

    def forget(self) -> None:
        """Another rank has written the result: what this one kept goes away."""
        self._away()
        with suppress(OSError):  # another rank's are in it
            self.path.parent.rmdir()

    def _away(self) -> None:
        """What the run is of goes first: a process that is killed meanwhile leaves nothing that the next one would go on with."""
        with suppress(OSError):
            (self.path / _RUN).unlink()
        shutil.rmtree(self.path, ignore_errors=True)

    def _put(self) -> None:
        """At once; file by file, the one that makes a model of them last, where the empty folder that is there has to stay: a disk
        is mounted on it, or it is where this process was started."""
        empty = self.place.is_dir() and not any(self.place.iterdir())
        if not (empty and (self.place.is_mount() or self.place.samefile(os.curdir))):
            self.result.rename(self.place)
            return
        for path in sorted(self.result.iterdir(), key=lambda path: (path.name == _CONFIG, path.name)):
            shutil.move(path, self.place / path.name)


@contextmanager
def cleared_away(unfinished: Unfinished | None) -> Iterator[None]:
    """Around a run, which is then alone in its folder: where it fails before any pass kept something, that goes away."""
    if unfinished is None:
        yield
        return
    with unfinished.alone():
        try:
            yield
        except BaseException as error:
            if not (unfinished.path / _RUN).exists() or isinstance(error, SparsecError):
                kept = unfinished.path / _KEPT
                with suppress(FileNotFoundError):  # the first rank's went away, and this one's with it
                    if not any(each.name[:2].isdigit() for each in kept.iterdir()):  # as the places of passes begin
                        shutil.rmtree(unfinished.path, ignore_errors=True)
            raise


def _is_run(path: Path) -> bool:
    """Whether a run's folder stands there. DataError where anything else does, which would go away with what runs keep."""
    if not os.path.lexists(path):
        return False
    others = [each.name for each in path.iterdir() if not _OWN.fullmatch(each.name)] if path.is_dir() else ["no folder"]
    if others:
        raise DataError(
            f"{path} is where a run keeps what it makes, and it is none of a run ({some(sorted(others))}); name another folder to "
            "save in"
        )
    return True


def _differing(before: Any, now: Mapping[str, Any]) -> list[str]:
    """In words what is not the same."""
    if not isinstance(before, dict):
        return ["its record is damaged"]
    found = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += [f"{key}: {name}" for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
        elif old != new:
            found.append(f"{key} was {str(old)[:80]}, now {str(new)[:80]}")
    return found


def _seen(path: Path) -> _Seen:
    found = path.stat()
    return _Seen((found.st_size, found.st_mtime_ns, found.st_ino), found.st_ctime_ns)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"{path} cannot be read: {briefly(error)}; is the model whole?") from error
