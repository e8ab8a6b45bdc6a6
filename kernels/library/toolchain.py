"""Turns the C++ in `native/` into one shared library: which compiler, which flags for which file.

No OpenMP is linked: threads are torch's own, through its stable ABI, or plain ones (native/pool.h).
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from sparsec import cache, files
from sparsec.defaults import BUILD_SECONDS
from sparsec.errors import BuildError
from sparsec.kernels.library import programs

SOURCES = Path(__file__).parents[1] / "native"
CANDIDATES = ("c++", "g++", "clang++")
WAY_OUT = (
    "install a C++17 compiler (Debian: apt install g++, macOS: xcode-select --install) or name one in CXX; "
    "SPARSEC_NATIVE=0 keeps the reference kernels without this notice"
)
PATIENCE = BUILD_SECONDS
_PATIENCE_TO_ANSWER = 60.0
_SCRATCH = ".building-"

_COMMON = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread"),
    # ISO C++ alone would leave a product and its sum two instructions.
    "-ffp-contract=fast",
    # Vector types wider than the registers draw notes about passing them between functions; none leaves its file.
    "-Wno-psabi",
)
# torch 2.10 is the first with parallel_for in the stable ABI.
_TORCH = ("-DTORCH_TARGET_VERSION=0x020a000000000000",)
# A fault ends the process: the tests must not go on as if nothing had happened.
_SANITIZE = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")


@dataclass(frozen=True)
class Toolchain:
    """A C++ compiler and what it builds for."""

    command: tuple[str, ...]  # the program, then arguments that CXX may carry
    version: str
    machine: str  # "x86_64-linux-gnu"
    portable: bool = False  # only plain C++, whatever the machine
    simde: bool = False  # AVX-512 emulated by SIMDe, for tests on a CPU without
    sanitize: bool = False  # for a process that has preloaded the address sanitizer

    @property
    def files(self) -> dict[str, tuple[str, ...]]:
        """The flags of every source file."""
        library: tuple[str, ...] = (*_TORCH, "-isystem", str(Path(torch.__file__).parent / "include"))
        if self.portable or not self.machine.startswith(("x86_64", "amd64")):
            return {"library.cpp": (*library, "-DSPARSEC_PORTABLE"), "isa_portable.cpp": ()}
        emulated = ("-DSPARSEC_SIMDE",) if self.simde else ()
        return {
            "library.cpp": (*library, *emulated),
            "isa_portable.cpp": (),
            "isa_avx2.cpp": _AVX2,
            "isa_avx512.cpp": (*_AVX2, *emulated) if self.simde else _AVX512,
        }

    def key(self) -> str:
        """Changes whenever a library built earlier must not be used."""
        # Where torch lies makes no other library.
        flags = str((_COMMON, self.files, _link_flags(self.machine))).replace(str(Path(torch.__file__).parent), "")
        digest = hashlib.sha256(f"{self} {flags} {torch.__version__} {source_key()}".encode())
        return digest.hexdigest()[:16]

    def check(self) -> None:
        """Compiles without keeping anything: does this compiler accept every file? Raises BuildError."""
        commands = [
            [*self.command, *_COMMON, "-Wall", *flags, "-fsyntax-only", str(SOURCES / name)]
            for name, flags in self.files.items()
        ]
        _run(commands, PATIENCE)

    def build(self, target: Path, patience: float = PATIENCE, alone: bool = False) -> None:
        """Writes the library to `target`, whole or not at all, and its hash beside it. Raises BuildError and OSError.

        patience: seconds after which a compiler is ended. alone: nobody else builds in that folder now.
        """
        target = target.absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        files.sweep(target.parent, f"{_SCRATCH}*", 0.0 if alone else max(files.STALE, 2 * patience))
        with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=target.parent, ignore_cleanup_errors=True) as folder:
            self._build(Path(folder), target, patience)

    def _build(self, folder: Path, target: Path, patience: float) -> None:
        extra = _SANITIZE if self.sanitize else ()
        objects = [(folder / name).with_suffix(".o") for name in self.files]
        commands = [
            [*self.command, *_COMMON, *extra, *flags, "-c", str(SOURCES / name), "-o", str(out)]
            for (name, flags), out in zip(self.files.items(), objects, strict=True)
        ]
        linked = folder / target.name
        link = [*self.command, "-shared", *extra, *map(str, objects), "-o", str(linked), *_link_flags(self.machine)]
        _run(commands, patience, folder)
        _run([link], patience, folder)
        if not linked.is_file() or not linked.stat().st_size:
            raise BuildError(f"the compiler ended well and left no library: {shlex.join(link)}; {WAY_OUT}")
        record = folder / "record"
        record.write_text(f"{_digest(linked)}  {target.name}\n")
        for made, place in ((linked, target), (record, _record(target))):
            made.chmod((made.stat().st_mode | 0o600) & ~0o022)  # whatever the umask
            files.put_in_place(made, place)


def faults(library: Path, own: bool) -> list[str]:
    """Why a library that is there must not be opened: it is not the one that was built.

    own: it lies in the user's cache folder, where its hash has to stand beside it and both have to be this user's; elsewhere a
    library without a hash is whoever's who put it there. What is checked stays so until it is opened: nobody else can enter the
    folder (sparsec/cache.py), and a library is replaced by another file, never written to.
    """
    record = _record(library)
    if not record.exists():
        return ["no hash stands beside it"] if own else []
    found = []
    if own and not all(cache.owned(path.lstat()) for path in (library, record)):
        found.append("it is not this user's alone")
    if record.read_bytes().split()[:1] != [_digest(library).encode()]:
        found.append("its hash is not the one that stands beside it")
    return found


def _record(library: Path) -> Path:
    return library.with_name(f"{library.name}.sha256")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_compiler(
    compiler: str | None = None, *, portable: bool = False, simde: bool = False, sanitize: bool = False
) -> Toolchain:
    """The compiler that is named, else the one in CXX, else the first of c++, g++, clang++ that answers.

    Raises BuildError when a compiler that was named is missing or fails, or none of the others answers.
    """
    wanted = compiler or os.environ.get("CXX")
    failures = []
    for name in (wanted,) if wanted else CANDIDATES:
        command = _command(name)
        # Of those that nobody named, none that lies where the process happens to stand.
        if command is None or not (wanted or os.path.isabs(shutil.which(name) or "")):
            continue
        try:
            version = _run([[*command, "--version"]], _PATIENCE_TO_ANSWER).splitlines()[:1]
            machine = _run([[*command, "-dumpmachine"]], _PATIENCE_TO_ANSWER).split()[-1:]
        except BuildError as error:
            if wanted:
                raise
            failures.append(f"{name}: {error}")  # such as the c++ of a macOS without its command line tools
            continue
        return Toolchain(command, " ".join(version), " ".join(machine), portable, simde, sanitize)
    if failures:
        raise BuildError(f"none of {', '.join(CANDIDATES)} works:\n" + "\n".join(failures))
    where = (
        f"{wanted!r}, named in CXX or --compiler, was not found" if wanted else f"none of {', '.join(CANDIDATES)} found"
    )
    raise BuildError(f"no C++ compiler: {where}; {WAY_OUT}")


def _command(name: str) -> tuple[str, ...] | None:
    """The program that is named, by its path where that is relative, and its arguments; None where it is not there."""
    try:
        words = [name] if shutil.which(name) else shlex.split(name)
    except ValueError as error:
        raise BuildError(f"{name!r}, named in CXX or --compiler, cannot be read: {error}; {WAY_OUT}") from error
    if not words or not shutil.which(words[0]):
        return None
    return (os.path.abspath(words[0]) if os.path.dirname(words[0]) else words[0], *words[1:])


def source_key() -> str:
    """Hash of the C++ sources."""
    digest = hashlib.sha256()
    for path in sorted((*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h"))):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def library_name() -> str:
    """File name of a library built from the present sources."""
    return f"libsparsec-{source_key()}.so"


def _link_flags(machine: str) -> list[str]:
    if "darwin" in machine:
        return ["-pthread", "-undefined", "dynamic_lookup"]
    # Where a compiler takes in libstdc++ itself, that copy stays this library's own: half of it bound to the process's other copy
    # ended every refusal in a segmentation fault.
    return ["-pthread", "-Wl,--exclude-libs,ALL", f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]


def _run(commands: list[list[str]], patience: float, folder: Path | None = None) -> str:
    try:
        return "".join(programs.run(commands, patience, folder))
    except BuildError as error:
        way_out = f"make room, or {cache.WAY_OUT}" if "No space left" in str(error) else WAY_OUT
        raise BuildError(f"{error}\n{way_out}") from error


def platform_fault() -> str | None:
    """Why native kernels are not built on this platform, or None."""
    if sys.platform == "win32":
        return "native kernels are built on Linux and macOS; Windows uses the reference kernels"
    return None
