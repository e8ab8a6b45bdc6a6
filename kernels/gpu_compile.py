"""Compiles every Triton kernel ahead of time, without a GPU, and says what each costs: registers, spills, instructions.

Spills, and kernels that do not compile, end with exit status 1. Instructions are those of the kernel's largest loop, for each
stored weight (bitmap: for each position) that it passes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sparsec.errors import KernelError, SparsecError, SpecError
from sparsec.formats import Packed
from sparsec.formats.layout import Layout, for_device
from sparsec.kernels import gpu
from sparsec.kernels.gpu.launch import Config, Launch, interpreted, recording
from sparsec.options.kernels_gpu_compile import PROG, parser

ARCHITECTURES = (80, 90)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOKENS = (1, 4, 8, 16, 64, 70)
"""Rows of x on both sides of every switch."""
SHAPE = (256, 256)
"""Of W."""


@dataclass(frozen=True)
class Binary:
    """What one kernel takes on one architecture."""

    name: str
    layout: str
    dtype: str
    arch: int
    constants: str
    warps: int
    registers: int  # per thread
    spilled: int  # bytes per thread
    shared: int  # bytes per program
    per_element: float | None  # instructions of the largest loop; None where there is none


@dataclass(frozen=True)
class Specialisation:
    """A launch to be compiled."""

    layout: str
    dtype: str
    launch: Launch


def specialisations(
    layouts: Iterable[Layout], dtypes: Sequence[str], every_config: bool, shape: tuple[int, int] = SHAPE
) -> Iterator[Specialisation]:
    """Every launch that products of these layouts make; some are alike."""
    for layout in layouts:
        for dtype in dtypes:
            for launch in _launches(_sample(layout, DTYPES[dtype], shape)):
                for config in launch.choices if every_config and launch.choices else (launch.config,):
                    yield Specialisation(
                        str(layout), dtype, replace(launch, config=config, elements=_elements(launch, config))
                    )


def _launches(packed: Packed) -> list[Launch]:
    with recording() as launches:
        for tokens in TOKENS:
            # A bias changes the same few instructions in every kernel.
            bias = torch.zeros(packed.shape[0], dtype=packed.dtype) if tokens == TOKENS[0] else None
            gpu.product(torch.zeros(tokens, packed.shape[1], dtype=packed.dtype), packed, bias)
    return launches


def _sample(layout: Layout, dtype: torch.dtype, shape: tuple[int, int]) -> Packed:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    return for_device(layout.pack(weight, layout.sample_mask(shape, 0.5, generator)), "cuda")


def _elements(launch: Launch, config: Config) -> int:
    """Of a launch with another configuration in place of its own: what a program takes grows with its tiles."""
    elements = launch.elements
    for name, size in launch.config.constants.items():
        elements = elements // size * config.constants[name]
    return elements


@dataclass(frozen=True)
class _Pretended:
    """Stands in for the driver of a GPU: says what to compile for, and has nothing to launch on."""

    arch: int

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all(todo: Iterable[Specialisation], arch: int) -> Iterator[Binary]:
    """One for each machine code that differs.

    Launches are taken apart as on a GPU, so that a size of 1, or one that is a multiple of 16, is compiled in as it is there.
    Raises KernelError with the compiler's words where one does not compile.
    """
    from triton.runtime.driver import driver

    seen = set()
    driver.set_active(_Pretended(arch))
    try:
        for variant in todo:
            launch = variant.launch
            try:
                built = launch.kernel.warmup(grid=launch.grid, **launch.keywords())
            except Exception as error:  # the compiler has many kinds
                what = f"{launch.kernel.__name__} for sm_{arch}, {variant.layout} {variant.dtype}"
                raise KernelError(f"{what}: {error}") from error
            if built.hash not in seen:
                seen.add(built.hash)
                yield _compiled(variant, arch, built)
    finally:
        driver.set_active(None)


def _compiled(variant: Specialisation, arch: int, built: Any) -> Binary:
    launch, config = variant.launch, variant.launch.config
    registers, spilled, loop = _inspect(built.asm["cubin"])
    threads = 32 * config.warps
    per_element = loop * threads / launch.elements if loop and launch.elements else None
    constants = {**launch.constants, **config.constants}
    told = ", ".join(f"{n}={int(v)}" for n, v in constants.items() if n not in ("HAS_BIAS", "ALIGN", "WIDE"))
    return Binary(
        launch.kernel.__name__, variant.layout, variant.dtype, arch, told, config.warps, registers, spilled,
        built.metadata.shared, per_element,
    )  # fmt: skip


def _inspect(cubin: bytes) -> tuple[int, int, int]:
    """Registers and spilled bytes per thread, and instructions of the largest loop."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", str(file))
        code = _output(knobs.nvidia.nvdisasm.path, "-c", str(file))
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", usage)
    if found is None:
        raise KernelError(f"cuobjdump gave no resource usage: {usage.strip()}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local, _largest_loop(code)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _largest_loop(code: str) -> int:
    """Instructions between a label and the last branch back to it that holds no other such branch: an innermost loop."""
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    count = 0
    for line in code.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = count
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            count += 1
            back = re.search(r"\bBRA `?\(?(\.L_\w+)", instruction[1])
            if back and labels.get(back[1], count) < count - 1:
                loops.append((labels[back[1]], count))
    inner = [(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
    return max((b - a for a, b in inner), default=0)


def table(rows: Sequence[Binary]) -> str:
    """Markdown."""
    lines = [
        "| kernel | layout | type | sm | constants | warps | registers | spilled | shared | instr./element |",
        "|---" * 10 + "|",
    ]
    for row in rows:
        each = "" if row.per_element is None else f"{row.per_element:.1f}"
        lines.append(
            f"| {row.name} | {row.layout} | {row.dtype} | {row.arch} | {row.constants} | {row.warps} | {row.registers} | "
            f"{row.spilled} | {row.shared} | {each} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> int:
    """The command line."""
    os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(tempfile.gettempdir(), "sparsec-triton"))
    words = parser(prog)
    options = words.parse_args(arguments)
    dtypes = options.dtypes.split(",")
    if unknown := [name for name in dtypes if name not in DTYPES]:
        words.error(f"unknown type {unknown[0]!r}; known: {', '.join(DTYPES)}")
    try:
        named = options.layouts
        layouts = Layout.checked() if named is None else [Layout.parse(name) for name in named.split(",")]
    except SpecError as error:
        words.error(f"--layouts: {error}")
    if unserved := [why for layout in layouts if (why := gpu.unsupported(str(layout), torch.bfloat16))]:
        words.error(f"--layouts: {unserved[0]}")
    if interpreted():
        words.error("TRITON_INTERPRET=1 puts the interpreter in the place of the compiler; unset it")
    try:
        rows: list[Binary] = []
        for arch in options.arch:
            rows += compile_all(specialisations(layouts, dtypes, options.every_config), arch)
    except SparsecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(rows))
    spilled = [row for row in rows if row.spilled]
    for row in spilled:
        print(f"error: {row.name} {row.layout} {row.dtype} sm_{row.arch} spills {row.spilled} bytes", file=sys.stderr)
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
