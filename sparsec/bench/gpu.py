"""The kernel table of a GPU, after a check of every kernel on it: event timing of replayed graphs, weights cold in L2.

Every contender walks through copies of its weight that are together several times as large as the L2 cache. Ratios are taken
round by round against F.linear (cuBLAS) in the same run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from time import monotonic

import torch
from torch import Tensor

from sparsec.bench.cases import Case, Format, random_mask
from sparsec.command import DTYPES
from sparsec.cost import Calibration, Work
from sparsec.cost.replay import ROTATE_BYTES, Replay, dense_calls, packed_calls, take_turns
from sparsec.errors import FormatError, KernelError, SpecError
from sparsec.formats import FORMATS
from sparsec.formats.base import Packed
from sparsec.kernels import Problem, gpu, gpu_launch, select, tolerance
from sparsec.latency import Spread, ratio
from sparsec.progress import Progress

CHECKED = ("csr16", "csr32", "wcsr8", "wcsr16", "bitmap", "bsr16x16", "bsr64x64", "bsr128x128", "nm2:4", "nm4:8")
CHECKED_ROWS = {"bf16": (1, 2, 4, 9, 17, 65, 512), "fp16": (1, 9, 65), "fp32": (1, 9, 65)}
"""By type: rows of x on both sides of every switch; fewer where a type changes no more than conversions, as each is compiled."""


@dataclass(frozen=True)
class Checked:
    """One kernel against float64."""

    layout: str
    dtype: str
    rows: int
    error: float  # the largest, over what rounding allows: right up to 1


@dataclass(frozen=True)
class Line:
    """One line of the table; seconds per call."""

    case: Case
    layout: str
    kernel: str
    nbytes: int
    work: Work
    dense: Spread
    sparse: Spread
    speedup: Spread
    bytes_per_second: float
    config: int  # which of the kernel's configurations was the fastest; 0 for one that has none
    predicted: float | None = None  # seconds by the cost model, where it knows the kernel


class Deadline:
    """Says when the time is over that a run may take."""

    def __init__(self, seconds: float) -> None:
        self._end = monotonic() + seconds

    @property
    def over(self) -> bool:
        """Whether nothing more may begin."""
        return monotonic() >= self._end


def check(
    layouts: Sequence[str], dtypes: Sequence[str], rows: Sequence[int], device: torch.device, size: int = 1024
) -> Iterator[Checked]:
    """Every kernel on [size, 2 * size] with a bias, at every number of rows."""
    generator = torch.Generator(device).manual_seed(0)
    for label in layouts:
        wanted = Format.parse(label)
        assert wanted.pattern is not None
        for dtype in dtypes:
            packed, weight = _packed(wanted, size, 2 * size, 0.6, DTYPES[dtype], generator)
            bias = torch.randn(size, device=device, generator=generator).to(DTYPES[dtype])
            for count in rows:
                x = torch.randn(count, 2 * size, device=device, generator=generator).to(DTYPES[dtype])
                found = gpu.product(x, packed, bias).double()
                exact = x.double() @ weight.double().t() + bias.double()
                over = (found - exact).abs() / tolerance(x, weight, bias)
                # NaN is no error that a maximum would show.
                yield Checked(label, dtype, count, float(over.nan_to_num(nan=float("inf")).max()))


def _packed(
    wanted: Format, out_features: int, in_features: int, sparsity: float, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Packed, Tensor]:
    """A random weight in a format, and dense, zeros written; on the generator's device."""
    assert wanted.pattern is not None
    mask = random_mask(wanted.pattern, out_features, in_features, sparsity, generator)
    weight = torch.randn(mask.shape, generator=generator, device=generator.device).to(dtype).masked_fill_(~mask, 0)
    return FORMATS[wanted.name].pack(weight, mask, **wanted.options), weight  # type: ignore[attr-defined]


@torch.no_grad()
def measure(
    case: Case, device: torch.device, rounds: int, rotate_bytes: int = ROTATE_BYTES, tune: bool = True
) -> tuple[list[Line], list[str]]:
    """Lines of one case, and what was left out with the reason. The fastest configurations are preferred from then on."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = DTYPES[case.dtype]
    x = torch.randn(case.rows, case.in_features, device=device, generator=generator).to(dtype)
    named: list[tuple[str, str, Work, int, Replay]] = []
    left_out: list[str] = []
    dense: Replay | None = None
    for wanted in case.formats:
        try:
            packed, weight = _packed(wanted, case.out_features, case.in_features, case.sparsity, dtype, generator)
            select(Problem.of(packed, case.rows))
        except (FormatError, KernelError, SpecError) as error:
            left_out.append(f"{case.out_features}x{case.in_features} as {wanted.label}: {error}")
            continue
        if dense is None:
            dense = Replay(dense_calls(weight, x, rotate_bytes), device)
        config, replay = _fastest(packed_calls(packed, x, rotate_bytes), device, tune)
        # Asked once it has run: what a library refuses is known by then.
        kernel = select(Problem.of(packed, case.rows)).name
        named.append((packed.describe(), kernel, Work.of(packed), config, replay))
    if dense is None:
        return [], left_out
    base, *times = take_turns([dense, *(replay for *_, replay in named)], rounds)
    lines = []
    for (layout, kernel, work, config, _), own in zip(named, times, strict=True):
        spread = Spread.of(own)
        rate = work.nbytes / spread.median
        nbytes, faster = work.nbytes, ratio(base, own)
        lines.append(Line(case, layout, kernel, nbytes, work, Spread.of(base), spread, faster, rate, config))
    return lines, left_out


def predicted(lines: Sequence[Line], known: Calibration) -> list[Line]:
    """The same lines, with what the cost model says of each."""
    found = []
    for line in lines:
        said = known.predict(line.kernel, line.layout, DTYPES[line.case.dtype], line.work, line.case.rows)
        found.append(replace(line, predicted=None if said is None else said.seconds))
    return found


def _fastest(calls: Sequence[Callable[[], Tensor]], device: torch.device, tune: bool) -> tuple[int, Replay]:
    """The number of the fastest configuration, preferred from now on, and the calls with it."""
    gpu_launch.asked()
    found = Replay(calls, device)
    buckets = gpu_launch.asked()
    if len(buckets) != 1:
        return 0, found
    ((bucket, count),) = buckets.items()
    before = gpu_launch.preferred()
    if not tune or bucket in before:
        return before.get(bucket, 0), found
    tried = [(min(found.seconds() for _ in range(3)), 0, found)]
    for number in range(1, count):
        gpu_launch.prefer({**before, bucket: number})
        other = Replay(calls, device)
        tried.append((min(other.seconds() for _ in range(3)), number, other))
    _, best, replay = min(tried, key=lambda t: t[:2])
    gpu_launch.prefer({**before, bucket: best})
    return best, replay


def keep_tuned() -> str:
    """Writes the preferred configurations where the kernels look for them; returns the path."""
    file = gpu.tuned_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(gpu_launch.preferred(), indent=1) + "\n")
    return str(file)


def table_all(
    todo: Sequence[Case], device: torch.device, rounds: int, deadline: Deadline, progress: Progress | None
) -> tuple[list[Line], list[str]]:
    """All lines, as far as the time reaches; what was not begun is named."""
    lines: list[Line] = []
    left_out: list[str] = []
    for i, case in enumerate(todo):
        if progress is not None:
            progress(f"{case.out_features}x{case.in_features}, {case.rows} rows", i, len(todo))
        if deadline.over:
            left_out.append(f"no time was left for {len(todo) - i} of {len(todo)} cases; give more with --budget")
            break
        own, said = measure(case, device, rounds)
        lines += own
        left_out += said
    return lines, left_out
