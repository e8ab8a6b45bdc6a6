"""Loads the native kernels into this process, building them first where nobody has, and says what came of it.

Looked for in this order: the library named in SPARSEC_NATIVE_LIBRARY; one put into the package by
`python -m sparsec.kernels.build`; one in the cache folder; a new one, built into the cache folder under a lock.
SPARSEC_NATIVE=0 turns them off; SPARSEC_ISA=amx|avx512_bf16|vbmi2|avx512|avx2|portable|reference forces an instruction set.

A library whose hash is not the one that its build wrote beside it is never opened, and one in the cache folder is built anew.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

from sparsec import cache, files, private
from sparsec.arguments import checked
from sparsec.errors import BuildError, CacheError, KernelError, UnsafeCacheError
from sparsec.kernels.library import toolchain

REFERENCE = "reference"
SYMBOLS = (
    "sparsec_isa",
    "sparsec_cpu_has",
    "sparsec_chosen",
    "sparsec_choose",
    "sparsec_numbers",
    "sparsec_end_program",
    "sparsec_force_half_product",
    "sparsec_force_helpers",
)
ISAS = ("amx", "avx512_bf16", "vbmi2", "avx512", "avx2", "portable", REFERENCE)
WAYS_OUT = (
    "or name a library in SPARSEC_NATIVE_LIBRARY, or build one into the package with python -m sparsec.kernels.build; "
    "SPARSEC_NATIVE=0 keeps the reference kernels without this notice"
)
_LOADING = threading.RLock()


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
            raise BuildError(
                f"{path} cannot be loaded: {error}; where its disk lets nothing run, {cache.WAY_OUT}; else build another with "
                "python -m sparsec.kernels.build"
            ) from error
        missing = [name for name in SYMBOLS if not hasattr(self._c, name)]
        if missing:
            raise BuildError(
                f"{path} is no library of this version's kernels: it lacks {', '.join(missing)}; "
                "build one with python -m sparsec.kernels.build, or unset SPARSEC_NATIVE_LIBRARY"
            )
        self.path = path
        self.compiler = compiler
        self._c.sparsec_isa.restype = self._c.sparsec_chosen.restype = self._c.sparsec_numbers.restype = ctypes.c_char_p
        self._c.sparsec_isa.argtypes = self._c.sparsec_cpu_has.argtypes = self._c.sparsec_choose.argtypes = (
            self._c.sparsec_end_program.argtypes
        ) = [ctypes.c_int64]

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

    @property
    def numbers(self) -> list[str]:
        """What the library and Python number alike: lines such as "format csr 1 3 2". For tests."""
        return str(self._c.sparsec_numbers().decode()).splitlines()

    def end_program(self, number: int) -> None:
        """Lets go of a program (kernels/program.py)."""
        self._c.sparsec_end_program(number)

    def choose(self, name: str | None) -> None:
        """Uses another one from now on, in all threads; None: the one that was taken at first."""
        if name is not None and name not in self.usable:
            raise KernelError(
                f"instruction set {name!r} cannot be used here: this CPU and library have {', '.join(self.usable)}; "
                f"set SPARSEC_ISA to one of these, or to {REFERENCE}, before the first use"
            )
        self._c.sparsec_choose(-1 if name is None else self.isas.index(name))

    def force_half_product(self, on: bool | None) -> None:
        """Whether many rows of a half type go through the dense product of that type; None: as the CPU has it. For tests."""
        self._c.sparsec_force_half_product(-1 if on is None else int(on))

    def force_helpers(self, on: bool | None, late: bool = False) -> None:
        """Whether helpers that nobody waits for take the place of torch's threads (native/pool.h); None: as the machine needs it.

        late: they dawdle, and the calling thread does again what they have begun. For tests.
        """
        self._c.sparsec_force_helpers(-1 if on is None else 2 if on and late else int(on))


def status() -> NativeStatus:
    """The state of the native kernels in this process; the first call loads, and may build, them.

    Raises KernelError when SPARSEC_ISA asks for an instruction set that is unknown or that the CPU lacks, and UnsafeCacheError
    when there is no safe place to build into. A build that fails is no error, and neither is a place that cannot be written to:
    the reference kernels serve, and one RuntimeWarning says why.
    """
    loaded = _loaded()
    return loaded if isinstance(loaded, NativeStatus) else _describe(loaded)


def has_native(name: str) -> bool:
    """Whether the loaded native library implements the operator `sparsec::name`; loads nothing."""
    return bool(private.has_kernel(f"sparsec::{name}", "CPU"))


def was_asked() -> bool:
    """Whether this process has tried to load them."""
    return _load.cache_info().currsize > 0


@checked
def force_isa(name: str | None) -> None:
    """Uses the instruction set `name` from now on, None the best one. KernelError when this cannot be."""
    loaded = _loaded()
    if isinstance(loaded, NativeStatus):
        raise KernelError(f"instruction set {name!r} cannot be forced: {loaded.reason}")
    loaded.choose(name)


def library() -> Library:
    """The loaded library. KernelError with the reason when there is none."""
    loaded = _loaded()
    if isinstance(loaded, NativeStatus):
        raise KernelError(f"no native kernels: {loaded.reason}")
    return loaded


def _loaded() -> Library | NativeStatus:
    with _LOADING:
        return _load()


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
    except UnsafeCacheError as error:
        raise UnsafeCacheError(f"native kernels have no safe place to be built into: {error}; {WAYS_OUT}") from error
    except (BuildError, CacheError, OSError) as error:
        ways = f"; {WAYS_OUT}" if isinstance(error, CacheError | OSError) else ""
        warnings.warn(f"sparsec runs on its slow reference kernels: {error}{ways}", RuntimeWarning, stacklevel=4)
        return NativeStatus(built=False, reason=str(error))
    if wanted is not None:
        found.choose(wanted)
    return found


def _describe(found: Library) -> NativeStatus:
    return NativeStatus(built=True, path=str(found.path), isa=found.isa, compiler=found.compiler)


def _locate() -> Library:
    named = os.environ.get("SPARSEC_NATIVE_LIBRARY")
    if named:
        if not os.path.isabs(named):
            raise BuildError(
                f"SPARSEC_NATIVE_LIBRARY={named!r} must be an absolute path, such as {os.path.abspath(named)}: nothing is run from "
                "the folder that a process happens to stand in"
            )
        return _checked(Path(named), None)
    packaged = toolchain.SOURCES / toolchain.library_name()
    if packaged.exists():
        if not (reasons := toolchain.faults(packaged, own=False)):
            return Library(packaged, None)
        warnings.warn(
            f"{packaged} is not used, since {'; '.join(reasons)}: build it again with python -m sparsec.kernels.build",
            RuntimeWarning,
            stacklevel=5,
        )
    chain = toolchain.find_compiler()
    path = cache.folder("kernels", chain.key()) / toolchain.library_name()
    if not _is_built(path):
        with files.lock(path.with_suffix(".lock"), toolchain.PATIENCE, _say_waiting) as held:
            if not _is_built(path):  # another process may have built it while this one waited
                _say_building(path, chain)
                chain.build(path, alone=held)
    return _checked(path, f"{' '.join(chain.command)}: {chain.version}")


def _is_built(path: Path) -> bool:
    return path.is_file() and not toolchain.faults(path, own=True)


def _checked(path: Path, compiler: str | None) -> Library:
    if reasons := toolchain.faults(path, own=compiler is not None):
        raise BuildError(
            f"{path} is not the library that was built: {'; '.join(reasons)}; build it again with python -m sparsec.kernels.build"
        )
    return Library(path, compiler)


def _say_building(path: Path, chain: toolchain.Toolchain) -> None:
    why = f"the library in {path.parent} is damaged or not sparsec's; " if path.exists() else ""
    print(
        f"sparsec: {why}building the native kernels with {' '.join(chain.command)}, once; this takes a minute, and is given up "
        f"after {toolchain.PATIENCE / 60:.0f}; SPARSEC_NATIVE=0 does without",
        file=sys.stderr,
        flush=True,
    )


def _say_waiting(process: str) -> None:
    print(
        f"sparsec: waiting for process {process}, which builds the native kernels, for {toolchain.PATIENCE / 60:.0f} minutes at "
        "most",
        file=sys.stderr,
        flush=True,
    )
