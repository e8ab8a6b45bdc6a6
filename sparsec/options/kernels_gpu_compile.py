"""The options of `sparsec kernels.gpu_compile`."""

from __future__ import annotations

import argparse

from sparsec.command_line import CommandLine

PROG = "python -m sparsec.kernels.gpu_compile"


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The command line."""
    p = CommandLine(
        prog=prog,
        description="Compiles every Triton kernel ahead of time, without a GPU, and says what each costs: registers, "
        "spills, instructions.",
        epilog=f"example:\n  {prog} --arch 90 --layouts wcsr16,bitmap --dtypes bf16",
    )
    p.add_argument("--arch", type=int, nargs="+", default=[80, 90], help="compute capabilities; default: 80 90")
    p.add_argument("--layouts", help="by commas; default: all that are checked")
    p.add_argument("--dtypes", default="bf16,fp16,fp32", help="by commas; default: %(default)s")
    p.add_argument("--every-config", action="store_true", help="all configurations, not only those used untuned")
    return p
