"""GGUF files: de-quantised once into a folder that transformers loads in under a second.

transformers needs half a minute to de-quantise even a small file, holds all of it in memory, and leaves a model that believes
itself quantised. So the file is read tensor by tensor, and the result is an ordinary model in the user's cache folder, keyed by
the file's hash and the dtype.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from sparsec import cache, files
from sparsec.data.gguf_dense import write_dense
from sparsec.data.quiet import quiet
from sparsec.errors import DataError, MissingExtraError, first_words
from sparsec.progress import Progress

_FACTS = "sparsec_source.json"
_LAYOUT = "3"  # of the cached folder; a change of what is written there takes the next number
_MAGIC = b"GGUF"
_SCRATCH = ".converting-"


@dataclass(frozen=True)
class Converted:
    """A de-quantised model in the cache folder."""

    folder: Path
    precision: str  # what it was quantised as
    unowned: tuple[str, ...]  # its tensors that no module owns
    now: bool  # made by this call

    def discard(self) -> None:
        """Deletes it."""
        shutil.rmtree(self.folder, ignore_errors=True)


def converted(file: Path, dtype: torch.dtype, progress: Progress | None = None) -> Converted:
    """The de-quantised model. Converts on the first call.

    Raises DataError for a file that is no whole GGUF or a disk that is full, CacheError for a cache folder that cannot be used,
    MissingExtraError without gguf and accelerate.
    """
    with file.open("rb") as stream:
        if stream.read(4) != _MAGIC:
            raise DataError(
                f"{file}: a GGUF file begins with the bytes GGUF, this one does not; is the download whole?"
            )
        stream.seek(0)
        key = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    folder = cache.folder("models") / f"{key}-{str(dtype).removeprefix('torch.')}-{_LAYOUT}"
    facts = _kept(folder)
    now = facts is None
    if now:
        _convert(file, dtype, folder, progress)
        facts = _kept(folder)
    return Converted(folder, *(facts or ("unknown", ())), now)


def _kept(folder: Path) -> tuple[str, tuple[str, ...]] | None:
    """What a converted model was quantised as, and what of it no module owns; None where there is none, or one that is damaged,
    which is deleted."""
    if not folder.exists():
        return None
    try:
        facts = json.loads((folder / _FACTS).read_text("utf-8"))
        return str(facts["precision"]), tuple(map(str, facts["unowned"]))
    except (OSError, ValueError, KeyError, TypeError):
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _convert(file: Path, dtype: torch.dtype, folder: Path, progress: Progress | None) -> None:
    say = progress or (lambda what, done, total: None)
    what = f"converting {file.name} (once)"
    say(what, 0, 1)
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(f'{file}: GGUF files need the package gguf; `pip install "sparsec[gguf]"`') from error
    try:
        files.sweep(folder.parent, f"{_SCRATCH}*")
        # Written beside its place and then renamed: an interrupted conversion leaves nothing that looks whole.
        scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=folder.parent))
        try:
            with quiet():
                try:
                    types, left = write_dense(file, dtype, scratch, lambda done, total: say(what, done, total))
                except (OSError, SafetensorError, DataError):
                    raise
                except (
                    Exception
                ) as error:  # the readers trust the file: a damaged one ends in whatever its bytes lead to
                    if isinstance(error, OSError) and error.errno is not None:  # else it is transformers' own
                        raise
                    raise _damaged(file, error) from error
            kinds = ", ".join(f"{name} ({n} tensors)" for name, n in types.most_common())
            facts = {"file": file.name, "precision": f"de-quantised from {kinds}", "unowned": left}
            (scratch / _FACTS).write_text(json.dumps(facts), "utf-8")
            for path in scratch.iterdir():
                files.to_disk(path)
            _move(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{folder.parent}: the converted model cannot be kept there ({getattr(error, 'strerror', None) or error}); "
            f"make room, or {cache.WAY_OUT}"
        ) from error
    say(what, 1, 1)


def _move(scratch: Path, folder: Path) -> None:
    try:
        scratch.rename(folder)
    except OSError:
        if not (folder / _FACTS).is_file():  # else another process was faster, and its result is the same
            raise


def _damaged(file: Path, error: Exception) -> DataError:
    first = first_words(error)
    return DataError(
        f"{file}: this GGUF file cannot be read ({type(error).__name__}: {first}); "
        f"it may be damaged or cut off, or of an architecture that transformers does not read"
    )
