"""Loads the native kernels into this process, building them first where nobody has, and says what came of it.

Looked for in this order: the library named in SPARSEC_NATIVE_LIBRARY; one put into the package by
`python -m sparsec.kernels.build`; one in the cache folder; a new one, built into the cache folder under a lock.
SPARSEC_NATIVE=0 turns them off; SPARSEC_ISA=amx|vbmi2|avx512|avx2|portable|reference forces an instruction set.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sparsec.errors import BuildError, KernelError
from sparsec.kernels import toolchain

REFERENCE = "reference"
SYMBOLS = ("sparsec_isa", "sparsec_cpu_has", "sparsec_chosen", "sparsec_choose", "sparsec_force_half_product")
ISAS = ("amx", "vbmi2", "avx512", "avx2", "portable", REFERENCE)


@dataclass(frozen=True)
class NativeStatus:
    """Whether the native kernels run in this process, and if not, why."""

    built: bool
    path: str | None = None
    isa: str | None = None  # the instruction set in use
    compiler: str | None = None  # None for a library that was built ahead of time
    reason: str | None = None  # why not


class Library:
    """The C interface of the loaded library (end of native/library.cpp)."""

    def __init__(self, path: Path, compiler: str | None) -> None:
        try:
            self._c = ctypes.CDLL(str(path))
        except OSError as error:
            raise BuildError(f"{path} cannot be loaded: {error}; delete it and it is built again") from error
        missing = [name for name in SYMBOLS if not hasattr(self._c, name)]
        if missing:
            raise BuildError(
                f"{path} is no library of this version's kernels: it lacks {', '.join(missing)}; "
                "build one with python -m sparsec.kernels.build, or unset SPARSEC_NATIVE_LIBRARY"
            )
        self.path = path
        self.compiler = compiler
        self._c.sparsec_isa.restype = self._c.sparsec_chosen.restype = ctypes.c_char_p
        self._c.sparsec_isa.argtypes = self._c.sparsec_cpu_has.argtypes = self._c.sparsec_choose.argtypes = [
            ctypes.c_int64
        ]

    @property
    def isas(self) -> list[str]:
        """Instruction sets compiled in, best first."""
        names: list[str] = []
        while (name := self._c.sparsec_isa(len(names))) is not None:
            names.append(name.decode())
        return names

    @property
    def usable(self) -> list[str]:
        """Those that this CPU has."""
        return [name for i, name in enumerate(self.isas) if self._c.sparsec_cpu_has(i)]

    @property
    def isa(self) -> str:
        """The one in use."""
        return str(self._c.sparsec_chosen().decode())

    def choose(self, name: str) -> None:
        """Uses another one from now on, in all threads."""
        if name not in self.usable:
            raise KernelError(
                f"instruction set {name!r} cannot be used here: this CPU and library have {', '.join(self.usable)}; "
                f"set SPARSEC_ISA to one of these, or to {REFERENCE}, before the first use"
            )
        self._c.sparsec_choose(self.isas.index(name))

    def force_half_product(self, on: bool | None) -> None:
        """Whether many rows of a half type go through the dense product of that type; None: as the CPU has it. For tests."""
        self._c.sparsec_force_half_product(-1 if on is None else int(on))


def status() -> NativeStatus:
    """The state of the native kernels in this process; the first call loads, and may build, them.

    Raises KernelError when SPARSEC_ISA asks for an instruction set that is unknown or that the CPU lacks. A build that
    fails is no error: the reference kernels serve, and one RuntimeWarning says why.
    """
    loaded = _load()
    return loaded if isinstance(loaded, NativeStatus) else _describe(loaded)


def asked() -> bool:
    """Whether this process has tried to load them."""
    return _load.cache_info().currsize > 0


def force_isa(name: str | None) -> None:
    """Uses the instruction set `name` from now on, None the best one. KernelError when this cannot be."""
    loaded = _load()
    if isinstance(loaded, NativeStatus):
        raise KernelError(f"instruction set {name!r} cannot be forced: {loaded.reason}")
    loaded.choose(loaded.usable[0] if name is None else name)


def library() -> Library:
    """The loaded library. KernelError with the reason when there is none."""
    loaded = _load()
    if isinstance(loaded, NativeStatus):
        raise KernelError(f"no native kernels: {loaded.reason}")
    return loaded


@functools.cache
def _load() -> Library | NativeStatus:
    wanted = os.environ.get("SPARSEC_ISA") or None
    if wanted is not None and wanted not in ISAS:
        raise KernelError(f"SPARSEC_ISA must be one of {', '.join(ISAS)}, got {wanted!r}")
    if wanted == REFERENCE or os.environ.get("SPARSEC_NATIVE") == "0":
        variable = "SPARSEC_ISA=reference" if wanted == REFERENCE else "SPARSEC_NATIVE=0"
        return NativeStatus(built=False, reason=f"turned off by {variable}")
    fault = toolchain.platform_fault()
    if fault is not None:
        return NativeStatus(built=False, reason=fault)
    try:
        found = _locate()
    except (BuildError, OSError) as error:
        warnings.warn(f"sparsec runs on its slow reference kernels: {error}", RuntimeWarning, stacklevel=2)
        return NativeStatus(built=False, reason=str(error))
    if wanted is not None:
        found.choose(wanted)
    return found


def _describe(found: Library) -> NativeStatus:
    return NativeStatus(built=True, path=str(found.path), isa=found.isa, compiler=found.compiler)


def _locate() -> Library:
    named = os.environ.get("SPARSEC_NATIVE_LIBRARY")
    if named:
        return Library(Path(named), None)
    packaged = toolchain.SOURCES / toolchain.library_name()
    if packaged.exists():
        return Library(packaged, None)
    chain = toolchain.find()
    path = cache_folder() / "kernels" / chain.key() / toolchain.library_name()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            if not path.exists():  # another process may have built it while this one waited
                if sys.stderr.isatty():
                    print("sparsec: building the native kernels, once; this takes half a minute", file=sys.stderr)
                chain.build(path)
    return Library(path, f"{' '.join(chain.command)}: {chain.version}")


def cache_folder() -> Path:
    """The user's cache folder: $XDG_CACHE_HOME/sparsec, by default ~/.cache/sparsec."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "sparsec"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a file lock; processes that start together build once."""
    import fcntl  # not on Windows, which never comes here

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
