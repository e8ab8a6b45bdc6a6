"""The options of `sparsec kernels.build`."""

from __future__ import annotations

import argparse
from pathlib import Path

from sparsec.command_line import CommandLine
from sparsec.defaults import BUILD_SECONDS

PROG = "python -m sparsec.kernels.build"
EXAMPLES = """
examples:
  python -m sparsec.kernels.build                     # build into the installed package
  python -m sparsec.kernels.build --output build/     # build elsewhere; SPARSEC_NATIVE_LIBRARY=/its/path uses it
  python -m sparsec.kernels.build --status            # what runs in this environment, and why
  python -m sparsec.kernels.build --check --portable --compiler aarch64-linux-gnu-g++   # does this compiler take them?
"""


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The command line."""
    p = CommandLine(
        prog=prog,
        description="Builds the native CPU kernels ahead of time.",
        epilog=EXAMPLES.replace(PROG, prog),
    )
    p.add_argument("--compiler", help="C++ compiler; default: $CXX, then c++, g++, clang++")
    p.add_argument("--portable", action="store_true", help="only plain C++, no x86 instruction sets")
    p.add_argument("--simde", action="store_true", help="emulate AVX-512 with SIMDe (for tests on a CPU without)")
    p.add_argument(
        "--sanitize",
        action="store_true",
        help="with address and undefined-behaviour checks; run under LD_PRELOAD=$(c++ -print-file-name=libasan.so)",
    )
    p.add_argument("--output", type=Path, help="folder; default: the package")
    p.add_argument(
        "--timeout",
        type=float,
        default=BUILD_SECONDS,
        metavar="SECONDS",
        help="after which a compiler is ended; default: %(default)g",
    )
    action = p.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="compile every file, keep nothing")
    action.add_argument("--status", action="store_true", help="say what runs in this environment")
    return p
