"""What the cost model knows of one machine: measured once in some seconds, kept in the cache folder, read from then on.

They hold for a processor (a CPU or a GPU), an instruction set, a number of threads, a torch and the kernels; anything
else is another file. A file that is damaged, or was put there from elsewhere, is said to be so and measured anew, and so is one
that was measured while the machine was busy, once it is idle. SPARSEC_CALIBRATION names a file to be used instead, whatever
machine it is from.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sparsec import cache, files
from sparsec.arguments import checked
from sparsec.cost import measure_gpu
from sparsec.cost.measure import measure_kernels, measure_member, measure_reads
from sparsec.cost.model import KernelCost, Prediction, Rate, ReadRate, RowsRate, Work
from sparsec.errors import CacheError, ConstantsError, KernelError
from sparsec.kernels import gpu, status
from sparsec.machine import cores, cpu_name, load_average
from sparsec.progress import Progress

SCHEMA = "sparsec.cost/3"
VARIABLE = "SPARSEC_CALIBRATION"
POOR_FIT = 0.3


@dataclass(frozen=True)
class Key:
    """What the constants depend on."""

    device: str  # its type: "cpu" or "cuda"
    processor: str
    isa: str  # of the native kernels, "none" where there are none; the compute capability of a GPU
    threads: int  # that make the calls; one for a GPU
    torch: str
    kernels: str  # digest of what they are made from: the native library, or the sources of the Triton kernels and its version

    @classmethod
    def here(cls, device: str = "cpu") -> Key:
        """Of this process, now. May build the native library."""
        if device == "cuda":
            return cls(device, *gpu.identity(), 1, torch.__version__, gpu.digest())
        native = status()
        library = "none" if native.path is None else _digest(Path(native.path).read_bytes())
        return cls(device, cpu_name(), native.isa or "none", torch.get_num_threads(), torch.__version__, library)

    def file(self) -> Path:
        """Where its constants are kept. CacheError where there is no such place."""
        return cache.folder("calibration") / f"{_digest(repr(self).encode())}.json"


@dataclass(frozen=True)
class Constants:
    """The constants of every kernel that runs on a machine."""

    key: Key
    load: float  # processes that ran or waited when it was measured; 0 where the system does not tell
    reads: tuple[ReadRate, ...]  # ascending in bytes
    member: float | None  # seconds of a fused product's further member beside its work; None: each is a call of its own
    kernels: tuple[KernelCost, ...]

    @property
    def dtypes(self) -> frozenset[str]:
        """Those that were measured."""
        return frozenset(k.dtype for k in self.kernels)

    def cost(self, kernel: str, format_name: str, dtype: torch.dtype) -> KernelCost | None:
        """The constants of a kernel for a format as it describes itself, else those of a relative: another block or N:M, or
        quantised values in other groups."""
        name = str(dtype).removeprefix("torch.")
        known = [k for k in self.kernels if k.kernel == kernel and k.dtype == name]
        return max(known, key=lambda k: _common(k.format, format_name), default=None)

    def predict(
        self,
        kernel: str,
        format_name: str,
        dtype: torch.dtype,
        work: Work,
        rows: int = 1,
        working_set: int | None = None,
    ) -> Prediction | None:
        """None for a kernel or dtype that was not measured. working_set: bytes that are read in turn with these; None: many."""
        cost = self.cost(kernel, format_name, dtype)
        return None if cost is None else cost.predict(work, rows, self.reach(working_set))

    @property
    def bandwidth(self) -> float | None:
        """Bytes a second of plain reading from memory; None where that was not measured."""
        return 1 / self.reads[-1].per_byte if self.reads and self.reads[-1].per_byte else None

    def peak(self, dtype: torch.dtype) -> float | None:
        """FLOPs a second of the fastest dense kernel at the most rows that were measured; None where none was."""
        name = str(dtype).removeprefix("torch.")
        rates = [k.rows[-1] for k in self.kernels if k.dtype == name and k.format == "dense" and k.rows]
        seconds = [(r.rate.per_stored + r.rate.per_position) / r.rows for r in rates]
        return max((2 / each for each in seconds if each > 0), default=None)

    def reach(self, working_set: int | None) -> float:
        """How many times as fast as from memory so many bytes come when they are read again and again; at least 1."""
        if working_set is None or not self.reads:
            return 1.0
        memory = self.reads[-1]
        held = next((r for r in self.reads if r.nbytes >= working_set), memory)
        return max(1.0, memory.per_byte / held.per_byte)


@dataclass(frozen=True)
class Found:
    """Constants and what has to be said about it."""

    constants: Constants
    source: str  # "measured now", or the file
    notices: tuple[str, ...] = ()


@checked
def machine_constants(
    dtypes: Sequence[torch.dtype],
    *,
    device: str = "cpu",
    force: bool = False,
    measuring: bool = True,
    progress: Progress | None = None,
) -> Found | None:
    """This machine's constants for these dtypes, from the file that SPARSEC_CALIBRATION names, from the cache, or measured now.

    device: the type, "cpu" or "cuda". force: measure anew. measuring: False measures nothing, and gives None where not all of
    it is known. A file that is named is taken as it is, whatever machine it is from; ConstantsError where it cannot be used,
    as for another type of device. KernelError where a GPU has to be measured that no kernel runs on.
    """
    named = os.environ.get(VARIABLE)
    if named and not force:
        return _named(Path(named), device)
    key, notices = Key.here(device), list[str]()
    known, file = None, _place(key, notices)
    if not force and file is not None and file.exists():
        try:
            known = _kept(key, file)
            if measuring and busy(known.load) and not busy(load_average() or 0.0):
                known = None
        except ConstantsError as error:
            notices.append(f"{error}; it is measured anew")
    missing = [d for d in dtypes if known is None or str(d).removeprefix("torch.") not in known.dtypes]
    source = str(file)
    if missing:
        if not measuring:
            return None
        measured = measure_machine(key, missing, progress)
        known = measured if known is None else _merged(known, measured)
        source = "measured now"
        try:
            if file is not None:
                save_file(known, file)
        except OSError as error:
            notices.append(f"it cannot be kept in {file} ({error.strerror}), so every run measures it again")
    assert known is not None
    return Found(known, source, (*notices, *remarks(known)))


def measure_machine(key: Key, dtypes: Sequence[torch.dtype], progress: Progress | None = None) -> Constants:
    """Measures every kernel that serves one of the dtypes on the key's device."""
    if key.device == "cuda":
        if reasons := gpu.missing():
            raise KernelError(f"no kernel can be measured on a GPU: {'; '.join(reasons)}")
        there, sizes = torch.device("cuda"), measure_gpu.Sizes()
        roofs = measure_gpu.measure_reads(there, sizes, progress)
        found = measure_gpu.measure_kernels(dtypes, there, roofs[-1].per_byte, sizes, progress)
        return Constants(key, load_average() or 0.0, roofs, None, tuple(found))
    reads = measure_reads(progress)
    kernels = measure_kernels(dtypes, reads[-1].per_byte, progress)
    return Constants(key, load_average() or 0.0, reads, measure_member(dtypes[0]), tuple(kernels))


def remarks(found: Constants) -> list[str]:
    """What makes its predictions doubtful."""
    notes, threads = [], found.key.threads
    on_gpu = " --device cuda" if found.key.device == "cuda" else ""
    anew = f"measure it anew with sparsec cost{on_gpu} --force"
    if threads > cores():
        notes.append(
            f"{threads} threads share {cores()} cores, so times scatter widely; use torch.set_num_threads({cores()})"
        )
    if busy(found.load):
        notes.append(f"the machine was busy when it was measured (load {found.load:.1f} on {cores()} cores); {anew}")
    poor = [k for k in found.kernels if k.error > POOR_FIT]
    if poor:
        worst = max(poor, key=lambda k: k.error)
        notes.append(
            f"the cost model misses its own measurements of {worst.kernel} ({worst.format}, {worst.dtype}) by up to "
            f"{worst.error:.0%} in 9 of 10; on an idle machine {anew}"
        )
    return notes


def busy(load: float) -> bool:
    """Whether others kept the cores from being measured."""
    return load > cores() + 0.5


def save_file(found: Constants, path: Path) -> None:
    """Writes the file as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, to_json(found).encode())


def load_file(path: Path) -> Constants:
    """ConstantsError for a file that is missing, damaged, or of another version."""
    try:
        return from_json(path.read_text("utf-8"))
    except OSError as error:
        raise ConstantsError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConstantsError(f"{path}: is damaged ({error.reason})") from error
    except ConstantsError as error:
        raise ConstantsError(f"{path}: {error}") from None


def to_json(found: Constants) -> str:
    """With a checksum, so that a damaged constant is seen too."""
    content = {"schema": SCHEMA, **asdict(found)}
    return json.dumps({**content, "sha256": _checksum(content)}, indent=1) + "\n"


def from_json(text: str) -> Constants:
    """The inverse of `to_json`. ConstantsError for anything else."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConstantsError(f"is damaged: no JSON ({error})") from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        found = content.get("schema") if isinstance(content, dict) else type(content).__name__
        raise ConstantsError(f"holds no constants of this version ({SCHEMA!r}): {found!r}")
    if content.pop("sha256", None) != _checksum(content):
        raise ConstantsError("is damaged: its checksum does not fit its content")
    try:
        return Constants(
            key=Key(**content["key"]),
            load=_number(content["load"]),
            reads=tuple(ReadRate(int(r["nbytes"]), _number(r["per_byte"])) for r in content["reads"]),
            member=None if content["member"] is None else _number(content["member"]),
            kernels=tuple(_kernel(k) for k in content["kernels"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConstantsError(f"is damaged: {type(error).__name__}: {error}") from None


def _kernel(k: dict[str, Any]) -> KernelCost:
    rows = tuple(RowsRate(int(r["rows"]), _rate(r["rate"])) for r in k["rows"])
    numbers = {name: _number(k[name]) for name in ("call", "per_output", "per_byte", "error")}
    return KernelCost(
        kernel=str(k["kernel"]),
        format=str(k["format"]),
        dtype=str(k["dtype"]),
        decode=_rate(k["decode"]),
        rows=rows,
        **numbers,
    )


def _rate(r: dict[str, Any]) -> Rate:
    return Rate(_number(r["per_stored"]), _number(r["per_position"]))


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"expected a number of at least 0, got {value!r}")
    return float(value)


def _place(key: Key, notices: list[str]) -> Path | None:
    """Its file, or None and a notice more."""
    try:
        return key.file()
    except CacheError as error:
        notices.append(f"it cannot be kept, so every run measures it again: {error}")
        return None


def _kept(key: Key, file: Path) -> Constants:
    found = load_file(file)
    if found.key != key:
        raise ConstantsError(f"{file}: was measured elsewhere: {found.key}")
    return found


def _named(path: Path, device: str) -> Found:
    try:
        if not path.is_absolute():
            raise ConstantsError(f"{path}: must be an absolute path, such as {path.absolute()}")
        found = load_file(path)
        if found.key.device != device:
            raise ConstantsError(f"{path}: was measured on {found.key.device}, and {device} is asked for")
    except ConstantsError as error:
        raise ConstantsError(
            f"{VARIABLE}={error}; write it with python -m sparsec.cost --device {device} --json FILE, or unset {VARIABLE}"
        ) from None
    notices, here = remarks(found), Key.here(device)
    if found.key != here:
        differ = [
            f"{n} {getattr(found.key, n)}, here {getattr(here, n)}"
            for n in asdict(here)
            if getattr(found.key, n) != getattr(here, n)
        ]
        notices.append(f"{VARIABLE}={path} was measured elsewhere ({'; '.join(differ)}): the predictions are for there")
    return Found(found, str(path), tuple(notices))


def _merged(old: Constants, new: Constants) -> Constants:
    """Of both. What belongs to no dtype, how memory is read, is that of the calmer measurement."""
    kept = tuple(k for k in old.kernels if k.dtype not in new.dtypes)
    calm = min(new, old, key=lambda found: found.load)
    return replace(calm, load=max(old.load, new.load), kernels=(*kept, *new.kernels))


def _common(a: str, b: str) -> int:
    """How many characters two strings begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _checksum(content: Any) -> str:
    return _digest(json.dumps(content, sort_keys=True).encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
