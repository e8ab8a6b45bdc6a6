"""What there is, in words: commands, passes with their options, formats, kernels, and the environment."""

from __future__ import annotations

from dataclasses import replace

from sparsec import __version__, private
from sparsec.console.commands import COMMANDS
from sparsec.console.table import heading, paragraph
from sparsec.formats import FORMATS
from sparsec.kernels import known
from sparsec.machine import machine
from sparsec.pipeline.spec import signature
from sparsec.pipeline.table import known_passes
from sparsec.report.text import machine_lines


def overview() -> str:
    """All of it. May build the native kernels, to say whether they can be."""
    here = machine()
    lines = [f"sparsec {__version__}", *heading("Commands (each takes --help)")]
    for command in COMMANDS:
        lines += paragraph(command.text, f"{'sparsec ' + command.name:<30}")
    lines += heading("Passes")
    for cls in known_passes().values():
        lines += paragraph(f"{cls.__doc__}".strip().splitlines()[0], f"{cls.name:<12}[{cls.effect.value}] ", " " * 12)
        lines += paragraph(signature(cls), " " * 12)
        needs = ", ".join(filter(None, (cls.wants, ", ".join(sorted(cls.requires))))) or "nothing"
        gives = ", ".join(sorted(cls.produces)) or "nothing"
        example = f"; as in {cls.examples[0]}" if cls.examples else ""
        lines += paragraph(f"needs {needs}; gives {gives}{example}", " " * 12)
    lines += heading("Formats")
    for name, kind in FORMATS.items():
        lines += paragraph(f"{kind.__doc__}".strip().splitlines()[0], f"{name:<12}")
    lines += heading("Kernels")
    for kernel in known():
        devices = ", ".join(kernel.devices) if kernel.devices else "every device"
        dtypes = ", ".join(str(d).removeprefix("torch.") for d in kernel.dtypes)
        text = f"{here.kernels[kernel.name]}: format {kernel.format}, {devices}, {dtypes}"
        lines += paragraph(text, f"{kernel.name:<21}")
    lines += [line for what in private.absent() for line in paragraph(what, "missing     ")]
    return "\n".join(lines + machine_lines(replace(here, kernels={})))  # which stand above
