"""python -m sparsec.bench: one product at a time, sparse kernels against F.linear and torch.sparse.

Ratios only mean something within one run, so the contenders take turns, and medians and quartiles are shown. A layer that is
multiplied again and again sits in the cache, where no layer of a large model ever is; so every contender walks through copies
of its weight until more than a gigabyte has been read, unless told otherwise, and the table says which it was.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsec.errors import SparsecError, SpecError
from sparsec.formats import CSR
from sparsec.kernels import Problem, SparseLinear, select
from sparsec.latency import Spread
from sparsec.machine import Machine, machine
from sparsec.report.table import table, times
from sparsec.rotation import Rotation

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MIN_BATCH_SECONDS = 0.002  # shorter measurements are lost in the timer and in the waking of threads
SCHEMA = "sparsec.bench/2"


@dataclass(frozen=True)
class Case:
    """One product to be measured."""

    out_features: int
    in_features: int
    sparsity: float
    dtype: str
    rows: int


@dataclass(frozen=True)
class Timing:
    """One contender: seconds per call over the repeats."""

    seconds: Spread
    nbytes: int  # of one weight
    copies: int  # that were rotated over

    @property
    def gigabytes_per_second(self) -> float:
        """Weight bytes read per second."""
        return self.nbytes / self.seconds.median / 1e9


@dataclass(frozen=True)
class Result:
    """One line of the table. `torch_sparse` is None where torch.sparse does not serve the type."""

    case: Case
    format: str
    kernel: str
    dense: Timing
    sparse: Timing
    torch_sparse: Timing | None

    @property
    def speedup(self) -> float:
        """Against F.linear."""
        return self.dense.seconds.median / self.sparse.seconds.median

    @property
    def bound(self) -> float:
        """What reading fewer bytes can give at most."""
        return self.dense.nbytes / self.sparse.nbytes if self.sparse.nbytes else float("inf")


Contender = tuple[list[Callable[[], Tensor]], int]
"""One call per copy of the weight, and the bytes of one copy."""


def measure(case: Case, rotation: Rotation, *, repeats: int = 20, index_bits: int | None = None) -> Result:
    """Times one product on the CPU with torch's present number of threads."""
    torch.manual_seed(0)
    dtype = DTYPES[case.dtype]
    weight = torch.randn(case.out_features, case.in_features).to(dtype)
    mask = torch.rand(weight.shape) >= case.sparsity
    weight = torch.where(mask, weight, 0)
    packed = CSR.pack(weight, mask, index_bits=index_bits)
    x = torch.randn(case.rows, case.in_features).to(dtype)
    with torch.no_grad():
        contenders = [_dense(weight, x, rotation), _packed(packed, x, rotation)]
        other = _torch_sparse(weight, x, rotation)
        if other is not None:
            contenders.append(other)
        timings = _interleaved(contenders, repeats)
    kernel = select(Problem.of(packed, case.rows)).name
    return Result(case, packed.describe(), kernel, timings[0], timings[1], timings[2] if other else None)


def _dense(weight: Tensor, x: Tensor, rotation: Rotation) -> Contender:
    return [functools.partial(F.linear, x, twin) for (twin,) in rotation.copies("dense", [weight])], weight.nbytes


def _packed(packed: CSR, x: Tensor, rotation: Rotation) -> Contender:
    names, scalars = list(packed.tensors()), packed.scalars()
    twins = (
        SparseLinear(CSR.from_parts(dict(zip(names, tensors, strict=True)), scalars))
        for tensors in rotation.copies("packed", list(packed.tensors().values()))
    )
    return [functools.partial(twin, x) for twin in twins], packed.nbytes


def _torch_sparse(weight: Tensor, x: Tensor, rotation: Rotation) -> Contender | None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        matrix = weight.to_sparse_csr()
    columns = x.t().contiguous()
    try:
        torch.sparse.mm(matrix, columns)
    except RuntimeError:
        return None  # the table says n/a
    parts = [matrix.crow_indices(), matrix.col_indices(), matrix.values()]
    shared = functools.partial(torch.sparse_csr_tensor, size=weight.shape, check_invariants=False)
    twins = (shared(*twin) for twin in rotation.copies("torch.sparse", parts))
    return [functools.partial(torch.sparse.mm, twin, columns) for twin in twins], sum(t.nbytes for t in parts)


def _interleaved(contenders: Sequence[Contender], repeats: int) -> list[Timing]:
    """Every contender once per repeat, each time on the next copies of its weight."""
    batches = []
    for calls, _ in contenders:
        for call in calls[:3]:
            call()
        start = time.perf_counter()
        calls[-1]()
        batches.append(max(1, int(MIN_BATCH_SECONDS / max(1e-7, time.perf_counter() - start))))
    seconds: list[list[float]] = [[] for _ in contenders]
    positions = [0] * len(contenders)
    for _ in range(repeats):
        for i, (calls, _) in enumerate(contenders):
            chosen = [calls[(positions[i] + k) % len(calls)] for k in range(batches[i])]
            positions[i] += batches[i]
            start = time.perf_counter()
            for call in chosen:
                call()
            seconds[i].append((time.perf_counter() - start) / batches[i])
    return [
        Timing(Spread.of(times), nbytes, len(calls)) for (calls, nbytes), times in zip(contenders, seconds, strict=True)
    ]


def about(found: Machine, rotate_bytes: int) -> str:
    """What the numbers depend on, in one line."""
    facts = {
        "cpu": found.cpu,
        "threads": found.threads,
        "torch": found.versions["torch"],
        "native kernels": found.native,
        "commit": found.commit or "unknown",
        "weights": f"rotated over {rotate_bytes >> 20} MiB" if rotate_bytes else "cache-warm",
    }
    return "  ".join(f"{k}: {v}" for k, v in facts.items())


HEADER = (
    "shape",
    "zero",
    "dtype",
    "rows",
    "format",
    "F.linear ms",
    "sparse ms",
    "quartiles",
    "speedup",
    "bound",
    "GB/s",
    "torch.sparse",
)


def line(result: Result) -> tuple[str, ...]:
    """The cells of one line, as in HEADER. `torch.sparse` is its speedup against F.linear."""
    case, sparse = result.case, result.sparse.seconds
    dense, other = result.dense.seconds.median, result.torch_sparse
    return (
        f"{case.out_features}x{case.in_features}",
        f"{case.sparsity:.0%}",
        case.dtype,
        str(case.rows),
        f"{result.format}[{result.kernel}]",
        f"{dense * 1e3:.3f}",
        f"{sparse.median * 1e3:.3f}",
        f"{sparse.lower * 1e3:.3f}-{sparse.upper * 1e3:.3f}",
        times(result.speedup),
        times(result.bound),
        f"{result.sparse.gigabytes_per_second:.1f}",
        times(dense / other.seconds.median) if other else "n/a",
    )


def as_json(results: Sequence[Result], found: Machine, rotate_bytes: int) -> str:
    """Schema `sparsec.bench/2`: `machine`, `rotate_bytes`, and `results` with seconds per call."""
    rows = [{**asdict(r), "speedup": r.speedup, "bound": r.bound} for r in results]
    content = {"schema": SCHEMA, "machine": asdict(found), "rotate_bytes": rotate_bytes, "results": rows}
    return json.dumps(content, indent=2)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    try:
        options = _parser().parse_args(argv)
        cases = _cases(options)
        if options.threads:
            torch.set_num_threads(options.threads)
        rotate_bytes = options.rotate_mb << 20
        found = machine()
        print(about(found, rotate_bytes))
        rotation = Rotation(rotate_bytes)
        results = []
        for i, case in enumerate(cases, 1):
            if sys.stderr.isatty():
                print(f"\r{i}/{len(cases)} {case}\x1b[K", end="", file=sys.stderr, flush=True)
            results.append(measure(case, rotation, repeats=options.repeats, index_bits=options.index_bits))
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr)
        lines = [line(r) for r in results]
        print("\n".join(table(HEADER, lines, left=(0, 2, 4))))
        if options.json:
            options.json.write_text(as_json(results, found, rotate_bytes) + "\n")
        if options.csv:
            with options.csv.open("w", newline="") as file:
                csv.writer(file).writerows([HEADER, *lines])
    except (SparsecError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sparsec.bench",
        description="Time sparse products against F.linear and torch.sparse on the CPU.",
        epilog="example: python -m sparsec.bench --shapes 576x576,11008x4096 --sparsity 0.5,0.9 --dtypes fp32,bf16",
    )
    parser.add_argument("--shapes", default="576x576,1536x576,768x3072,4096x1024,11008x4096", help="OUTxIN, by commas")
    parser.add_argument("--sparsity", default="0.5,0.7,0.9", help="shares of zeros, by commas")
    parser.add_argument("--dtypes", default="fp32", help=f"of {', '.join(DTYPES)}, by commas")
    parser.add_argument("--rows", default="1", help="rows of x (tokens), by commas")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--index-bits", type=int, choices=(16, 32), help="default: the smallest that fits")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--rotate-mb", type=int, default=1024, help="weights to rotate over; 0: one copy, cache-warm")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--csv", type=Path)
    return parser


def _cases(options: argparse.Namespace) -> list[Case]:
    if options.repeats < 2 or options.rotate_mb < 0 or (options.threads is not None and options.threads < 1):
        raise SpecError("--repeats must be at least 2, --rotate-mb at least 0 and --threads at least 1")
    dtypes = options.dtypes.split(",")
    unknown = [d for d in dtypes if d not in DTYPES]
    if unknown:
        raise SpecError(f"--dtypes takes {', '.join(DTYPES)}, got {unknown[0]!r}")
    shapes = [_shape(s) for s in options.shapes.split(",")]
    shares = [_number("--sparsity", s, float) for s in options.sparsity.split(",")]
    rows = [int(_number("--rows", r, int)) for r in options.rows.split(",")]
    if any(not 0 <= s < 1 for s in shares) or any(r < 1 for r in rows):
        raise SpecError(
            f"--sparsity must lie in [0, 1) and --rows be at least 1, got {options.sparsity} and {options.rows}"
        )
    return [Case(o, i, s, d, r) for d in dtypes for o, i in shapes for s in shares for r in rows]


def _shape(text: str) -> tuple[int, int]:
    parts = text.split("x")
    if len(parts) != 2 or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise SpecError(f"--shapes takes OUTxIN such as 11008x4096, got {text!r}")
    return int(parts[0]), int(parts[1])


def _number(option: str, text: str, kind: Callable[[str], float]) -> float:
    try:
        return kind(text)
    except ValueError:
        raise SpecError(f"{option} takes numbers by commas, got {text!r}") from None


if __name__ == "__main__":
    sys.exit(main())
