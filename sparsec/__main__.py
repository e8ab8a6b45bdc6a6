"""`python -m sparsec`: what there is: commands, passes with their options, formats, kernels, and the environment."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from sparsec import __version__
from sparsec.errors import SparsecError
from sparsec.formats import FORMATS
from sparsec.kernels import KERNELS
from sparsec.machine import machine
from sparsec.pipeline.spec import signature
from sparsec.pipeline.table import known_passes
from sparsec.report.table import heading, paragraph
from sparsec.report.text import machine_lines

COMMANDS = {
    "sparsec": "this overview; --version",
    "sparsec.report": "compiles a model and reports it per pass, layer and group, dense / masked / lowered compared",
    "sparsec.evaluate": "perplexity of models, or of what passes make of one, and how far they are from the first",
    "sparsec.bench": "times kernels against dense and against torch.sparse, and whole models in tokens per second",
    "sparsec.cost": "calibrates the cost model to this machine, and shows what it knows",
    "sparsec.kernels.build": "builds the native kernels ahead of time, into the package",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 where the environment asks for what there is not."""
    parser = argparse.ArgumentParser(
        prog="python -m sparsec", description="Lists commands, passes, formats and kernels."
    )
    parser.add_argument("--version", action="version", version=f"sparsec {__version__}")
    parser.parse_args(argv)
    try:
        print(overview())
    except SparsecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def overview() -> str:
    """All of it. May build the native kernels, to say whether they can be."""
    here = machine()
    lines = [f"sparsec {__version__}", *heading("Commands (each takes --help)")]
    for module, text in COMMANDS.items():
        if find_spec(module) is not None:
            lines += paragraph(text, f"{'python -m ' + module:<34}")
    lines += heading("Passes")
    for cls in known_passes().values():
        lines += paragraph(f"{cls.__doc__}".strip().splitlines()[0], f"{cls.name:<12}[{cls.effect.value}] ", " " * 12)
        lines += paragraph(signature(cls), " " * 12)
        lines += paragraph(f"needs {_facts(cls.requires)}; gives {_facts(cls.produces)}", " " * 12)
    lines += heading("Formats")
    for name, kind in FORMATS.items():
        lines += paragraph(f"{kind.__doc__}".strip().splitlines()[0], f"{name:<12}")
    lines += heading("Kernels")
    for kernel in KERNELS:
        devices = ", ".join(kernel.devices) if kernel.devices else "every device"
        dtypes = ", ".join(str(d).removeprefix("torch.") for d in kernel.dtypes)
        text = f"{here.kernels[kernel.name]}: format {kernel.format}, {devices}, {dtypes}"
        lines += paragraph(text, f"{kernel.name:<18}")
    return "\n".join(lines + machine_lines(here))


def _facts(facts: frozenset[str]) -> str:
    return ", ".join(sorted(facts)) or "nothing"


if __name__ == "__main__":
    sys.exit(main())
