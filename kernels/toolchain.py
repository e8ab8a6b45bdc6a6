"""Turns the C++ in `native/` into one shared library: which compiler, which flags for which file.

No OpenMP is linked: threads are torch's own, through its stable ABI.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from sparsec.errors import BuildError

SOURCES = Path(__file__).parent / "native"
CANDIDATES = ("c++", "g++", "clang++")
WAY_OUT = (
    "install a C++17 compiler (Debian: apt install g++, macOS: xcode-select --install) or name one in CXX; "
    "SPARSEC_NATIVE=0 keeps the reference kernels without this notice"
)

_COMMON = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden"),
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
        digest = hashlib.sha256(f"{self} {torch.__version__} {source_key()}".encode())
        return digest.hexdigest()[:16]

    def check(self) -> None:
        """Compiles without keeping anything: does this compiler accept every file? Raises BuildError."""
        for name, flags in self.files.items():
            _run([*self.command, *_COMMON, "-Wall", *flags, "-fsyntax-only", str(SOURCES / name)])

    def build(self, target: Path) -> None:
        """Writes the library to `target`, whole or not at all. Raises BuildError with the compiler's own words."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            objects = [str(Path(folder, name).with_suffix(".o")) for name in self.files]
            extra = _SANITIZE if self.sanitize else ()
            commands = [
                [*self.command, *_COMMON, *extra, *flags, "-c", str(SOURCES / name), "-o", out]
                for (name, flags), out in zip(self.files.items(), objects, strict=True)
            ]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(_run, commands))
            linked = str(Path(folder, target.name))
            _run([*self.command, "-shared", *extra, *objects, "-o", linked, *_link_flags(self.machine)])
            os.replace(linked, target)


def find(
    compiler: str | None = None, *, portable: bool = False, simde: bool = False, sanitize: bool = False
) -> Toolchain:
    """The compiler that is named, else the one in CXX, else the first of c++, g++, clang++ that answers.

    Raises BuildError when a compiler that was named is missing or fails, or none of the others answers.
    """
    wanted = compiler or os.environ.get("CXX")
    failures = []
    for name in (wanted,) if wanted else CANDIDATES:
        command = tuple(shlex.split(name))
        if not command or not shutil.which(command[0]):
            continue
        try:
            version = _run([*command, "--version"]).splitlines()[:1]
            machine = _run([*command, "-dumpmachine"]).strip()
        except BuildError as error:
            if wanted:
                raise
            failures.append(f"{name}: {error}")  # such as the c++ of a macOS without its command line tools
            continue
        return Toolchain(command, " ".join(version), machine, portable, simde, sanitize)
    if failures:
        raise BuildError(f"none of {', '.join(CANDIDATES)} works:\n" + "\n".join(failures))
    where = (
        f"{wanted!r}, named in CXX or --compiler, was not found" if wanted else f"none of {', '.join(CANDIDATES)} found"
    )
    raise BuildError(f"no C++ compiler: {where}; {WAY_OUT}")


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
        return ["-undefined", "dynamic_lookup"]
    return [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"the compiler could not be started: {error}; {WAY_OUT}") from error
    if done.returncode != 0:
        said = "\n".join((done.stderr or done.stdout).splitlines()[:20])
        raise BuildError(
            f"the compiler failed (exit status {done.returncode}): {shlex.join(command)}\n{said}\n{WAY_OUT}"
        )
    return done.stdout


def platform_fault() -> str | None:
    """Why native kernels are not built on this platform, or None."""
    if sys.platform == "win32":
        return "native kernels are built on Linux and macOS; Windows uses the reference kernels"
    return None
