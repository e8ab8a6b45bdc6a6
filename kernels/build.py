"""python -m sparsec.kernels.build: builds the native kernels ahead of time, or checks that a compiler accepts them.

Without this, they are built at first use into the user's cache folder ($XDG_CACHE_HOME/sparsec, by default ~/.cache/sparsec).
Built here they lie in the package, so that an image or a wheel carries them and the machine that runs it needs no compiler.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sparsec.errors import SparsecError
from sparsec.kernels.library import toolchain
from sparsec.kernels.library.loader import NativeStatus, status
from sparsec.options.kernels_build import PROG, parser

__all__ = ["NativeStatus", "main", "status"]


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Returns the exit status: 0, or 1 with the reason on stderr."""
    options = parser(prog).parse_args(argv)
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
    target = (options.output or toolchain.SOURCES) / toolchain.library_name()
    chain.build(target, options.timeout)
    return f"built {target} with {chain.version} for {chain.machine}"


if __name__ == "__main__":
    sys.exit(main())
