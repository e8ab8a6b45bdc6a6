"""python -m sparsec.kernels.build: builds the native kernels ahead of time, or checks that a compiler accepts them.

Without this, they are built at first use into the user's cache folder ($XDG_CACHE_HOME/sparsec, by default ~/.cache/sparsec).
Built here they lie in the package, so that an image or a wheel carries them and the machine that runs it needs no compiler.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sparsec.command_line import CommandLine
from sparsec.errors import SparsecError
from sparsec.kernels.library import toolchain
from sparsec.kernels.library.loader import NativeStatus, status

__all__ = ["NativeStatus", "main", "status"]

PROG = "python -m sparsec.kernels.build"
_EXAMPLES = """
examples:
  python -m sparsec.kernels.build                     # build into the installed package
  python -m sparsec.kernels.build --output build/     # build elsewhere; SPARSEC_NATIVE_LIBRARY=/its/path uses it
  python -m sparsec.kernels.build --status            # what runs in this environment, and why
  python -m sparsec.kernels.build --check --portable --compiler aarch64-linux-gnu-g++   # does this compiler take them?
"""


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Returns the exit status: 0, or 1 with the reason on stderr."""
    parser = CommandLine(
        prog=prog,
        description="Builds the native CPU kernels ahead of time.",
        epilog=_EXAMPLES.replace(PROG, prog),
    )
    parser.add_argument("--compiler", help="C++ compiler; default: $CXX, then c++, g++, clang++")
    parser.add_argument("--portable", action="store_true", help="only plain C++, no x86 instruction sets")
    parser.add_argument("--simde", action="store_true", help="emulate AVX-512 with SIMDe (for tests on a CPU without)")
    parser.add_argument(
        "--sanitize",
        action="store_true",
        help="with address and undefined-behaviour checks; run under LD_PRELOAD=$(c++ -print-file-name=libasan.so)",
    )
    parser.add_argument("--output", type=Path, default=toolchain.SOURCES, help="folder; default: the package")
    parser.add_argument(
        "--timeout",
        type=float,
        default=toolchain.PATIENCE,
        metavar="SECONDS",
        help="after which a compiler is ended; default: %(default)g",
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="compile every file, keep nothing")
    action.add_argument("--status", action="store_true", help="say what runs in this environment")
    options = parser.parse_args(argv)
    try:
        print(_act(options))
    except (SparsecError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _act(options: argparse.Namespace) -> str:
    if options.status:
        now = status()
        by = f", built by {now.compiler}" if now.compiler else ", built ahead of time"
        return f"{now.isa} kernels from {now.path}{by}" if now.built else f"reference kernels: {now.reason}"
    chain = toolchain.find_compiler(
        options.compiler, portable=options.portable, simde=options.simde, sanitize=options.sanitize
    )
    if options.check:
        chain.check()
        return f"{chain.version} for {chain.machine} accepts {', '.join(chain.files)}"
    target = options.output / toolchain.library_name()
    chain.build(target, options.timeout)
    return f"built {target} with {chain.version} for {chain.machine}"


if __name__ == "__main__":
    sys.exit(main())
