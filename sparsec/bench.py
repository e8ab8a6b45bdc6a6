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
import platform
import statistics
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
from sparsec.kernels import Problem, SparseLinear, select, status

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MIN_BATCH_SECONDS = 0.002  # shorter measurements are lost in the timer and in the waking of threads
SCHEMA = "sparsec.bench/1"


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
    """Seconds per call: median and quartiles over the repeats."""

    median: float
    lower: float
    upper: float
    nbytes: int  # of one weight
    copies: int  # that were rotated over

    @property
    def gigabytes_per_second(self) -> float:
        """Weight bytes read per second."""
        return self.nbytes / self.median / 1e9


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
        return self.dense.median / self.sparse.median

    @property
    def bound(self) -> float:
        """What reading fewer bytes can give at most."""
        return self.dense.nbytes / self.sparse.nbytes if self.sparse.nbytes else float("inf")


Contender = tuple[list[Callable[[], Tensor]], int]
"""One call per copy of the weight, and the bytes of one copy."""


def measure(case: Case, *, repeats: int = 20, rotate_bytes: int = 1 << 30, index_bits: int | None = None) -> Result:
    """Times one product on the CPU with torch's present number of threads.

    Every contender gets copies of its weight of `rotate_bytes` together; 0 keeps one copy, warm in the cache.
    """
    torch.manual_seed(0)
    dtype = DTYPES[case.dtype]
    weight = torch.randn(case.out_features, case.in_features).to(dtype)
    mask = torch.rand(weight.shape) >= case.sparsity
    weight = torch.where(mask, weight, 0)
    packed = CSR.pack(weight, mask, index_bits=index_bits)
    x = torch.randn(case.rows, case.in_features).to(dtype)

    def copies(nbytes: int) -> int:
        return max(1, -(-rotate_bytes // max(1, nbytes)))

    with torch.no_grad():
        contenders = [
            _dense(weight, x, copies(weight.nbytes)),
            _packed(packed, x, copies(packed.nbytes)),
        ]
        other = _torch_sparse(weight, x, copies)
        if other is not None:
            contenders.append(other)
        timings = _interleaved(contenders, repeats)
    kernel = select(Problem.of(packed, case.rows)).name
    return Result(case, packed.describe(), kernel, timings[0], timings[1], timings[2] if other else None)


def _dense(weight: Tensor, x: Tensor, copies: int) -> Contender:
    return [functools.partial(F.linear, x, weight.clone()) for _ in range(copies)], weight.nbytes


def _packed(packed: CSR, x: Tensor, copies: int) -> Contender:
    def twin() -> SparseLinear:
        tensors = {name: tensor.clone() for name, tensor in packed.tensors().items()}
        return SparseLinear(CSR.from_parts(tensors, packed.scalars()))

    return [functools.partial(twin(), x) for _ in range(copies)], packed.nbytes


def _torch_sparse(weight: Tensor, x: Tensor, copies: Callable[[int], int]) -> Contender | None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        matrix = weight.to_sparse_csr()
    nbytes = matrix.crow_indices().nbytes + matrix.col_indices().nbytes + matrix.values().nbytes
    columns = x.t().contiguous()
    try:
        torch.sparse.mm(matrix, columns)
    except RuntimeError:
        return None  # the table says n/a

    twins = [matrix.clone() for _ in range(copies(nbytes))]
    return [functools.partial(torch.sparse.mm, twin, columns) for twin in twins], nbytes


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
    timings = []
    for (calls, nbytes), times in zip(contenders, seconds, strict=True):
        lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
        timings.append(Timing(median, lower, upper, nbytes, len(calls)))
    return timings


def machine(rotate_bytes: int) -> dict[str, str | int]:
    """What the numbers depend on."""
    native = status()
    return {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "native": native.isa or f"reference kernels: {native.reason}",
        "weights": f"rotated over {rotate_bytes >> 20} MiB" if rotate_bytes else "cache-warm",
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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
    case, sparse = result.case, result.sparse
    other = result.torch_sparse
    return (
        f"{case.out_features}x{case.in_features}",
        f"{case.sparsity:.0%}",
        case.dtype,
        str(case.rows),
        f"{result.format}[{result.kernel}]",
        f"{result.dense.median * 1e3:.3f}",
        f"{sparse.median * 1e3:.3f}",
        f"{sparse.lower * 1e3:.3f}-{sparse.upper * 1e3:.3f}",
        f"{result.speedup:.2f}x",
        f"{result.bound:.2f}x",
        f"{sparse.gigabytes_per_second:.1f}",
        f"{result.dense.median / other.median:.2f}x" if other else "n/a",
    )


def table(results: Sequence[Result]) -> str:
    """All lines, columns aligned."""
    cells = [HEADER, *(line(r) for r in results)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(HEADER))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells)


def as_json(results: Sequence[Result], about: dict[str, str | int]) -> str:
    """Schema `sparsec.bench/1`: `machine`, and `results` with seconds per call."""
    rows = [{**asdict(r), "speedup": r.speedup, "bound": r.bound} for r in results]
    return json.dumps({"schema": SCHEMA, "machine": about, "results": rows}, indent=2)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    try:
        options = _parser().parse_args(argv)
        cases = _cases(options)
        if options.threads:
            torch.set_num_threads(options.threads)
        rotate_bytes = options.rotate_mb << 20
        about = machine(rotate_bytes)
        print("  ".join(f"{k}: {v}" for k, v in about.items()))
        results = []
        for i, case in enumerate(cases, 1):
            if sys.stderr.isatty():
                print(f"\r{i}/{len(cases)} {case}\x1b[K", end="", file=sys.stderr, flush=True)
            results.append(
                measure(case, repeats=options.repeats, rotate_bytes=rotate_bytes, index_bits=options.index_bits)
            )
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr)
        print(table(results))
        if options.json:
            options.json.write_text(as_json(results, about) + "\n")
        if options.csv:
            with options.csv.open("w", newline="") as file:
                csv.writer(file).writerows([HEADER, *(line(r) for r in results)])
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
