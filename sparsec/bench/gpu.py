"""The kernel table of a GPU, after a check of every kernel on it: event timing of replayed graphs, weights cold in L2.

Every contender walks through copies of its weight that are together several times as large as the L2 cache. Ratios are taken
round by round against F.linear (cuBLAS) in the same run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from time import monotonic

import torch
from torch import Tensor

from sparsec import files
from sparsec.bench.cases import Case
from sparsec.console.command import DTYPES
from sparsec.cost import Constants, Work
from sparsec.errors import KernelError, SparsecError
from sparsec.formats.base import Packed
from sparsec.formats.layout import Layout
from sparsec.kernels import Problem, gpu, select, tolerance
from sparsec.kernels.gpu import launch as gpu_launch
from sparsec.kernels.registry import dispatch
from sparsec.progress import Progress, stage
from sparsec.timing.replay import ROTATE_BYTES, Replay, dense_calls, packed_calls
from sparsec.timing.spread import Spread, ratio
from sparsec.timing.turns import take_turns

CHECKED_ROWS = {"bf16": (1, 2, 4, 9, 17, 65, 512), "fp16": (1, 9, 65), "fp32": (1, 9, 65)}
"""By type: rows of x on both sides of every switch; fewer where a type changes no more than conversions, as each is compiled."""
LONG_ROWS = (96, 16384)
"""A shape with so few rows that each is split over programs."""
SPLIT = tuple(map(Layout.parse, ("csr16", "wcsr8", "wcsr16", "bitmap", "bsr16x16", "nm2:4")))


@dataclass(frozen=True)
class Checked:
    """One kernel against float64."""

    layout: str
    dtype: str
    rows: int
    error: float | None  # the largest, over what rounding allows: right up to 1; None for NaN, or without a result
    note: str = ""  # why it failed

    @property
    def wrong(self) -> bool:
        """Beyond what rounding allows, or no result at all."""
        return self.error is None or self.error > 1


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


@dataclass(frozen=True)
class GpuMeasured:
    """What one case, or many, gave."""

    lines: list[Line] = field(default_factory=list)
    checked: list[Checked] = field(default_factory=list)  # every configuration that was tried
    left_out: list[str] = field(default_factory=list)  # with the reason

    def add(self, other: GpuMeasured) -> None:
        """Takes in what another case gave."""
        self.lines.extend(other.lines)
        self.checked.extend(other.checked)
        self.left_out.extend(other.left_out)


class DeviceLostError(KernelError):
    """Nothing runs on the GPU any more in this process."""


class Deadline:
    """Says when the time is over that a run may take."""

    def __init__(self, seconds: float) -> None:
        self._end = monotonic() + seconds

    @property
    def over(self) -> bool:
        """Whether nothing more may begin."""
        return monotonic() >= self._end


def check_kernels(
    layouts: Sequence[Layout],
    dtypes: Sequence[str],
    rows: Sequence[int],
    device: torch.device,
    shape: tuple[int, int] = (1024, 2048),
) -> Iterator[Checked]:
    """Every kernel on a weight of a shape with a bias, at every number of rows; one that fails is wrong, and the others go on."""
    generator = torch.Generator(device).manual_seed(0)
    run = dispatch if device.type == "cuda" else gpu.product  # as a model does, or through Triton's interpreter
    for wanted in layouts:
        for dtype in dtypes:
            made = None
            for count in rows:
                try:
                    made = made or _packed(wanted, *shape, 0.6, DTYPES[dtype], generator)
                    packed, _ = made
                    bias, x = (
                        torch.randn(*size, device=device, generator=generator).to(DTYPES[dtype])
                        for size in (shape[:1], (count, shape[1]))
                    )
                    found = run(x, packed, bias)
                    yield Checked(str(wanted), dtype, count, _error(found, x, packed.exact(), bias))
                except Exception as error:  # of triton, of the driver, of torch
                    yield Checked(str(wanted), dtype, count, None, said(error))
                    go_on(f"{wanted} {dtype}, {count} rows", error, device)


def _error(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> float | None:
    """The largest over what rounding allows; None where there is NaN, or an infinite one."""
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    worst = float(((found.double() - exact).abs() / tolerance(x, weight, bias)).nan_to_num(nan=math.inf).max())
    return worst if math.isfinite(worst) else None


def go_on(what: str, error: Exception, device: torch.device) -> None:
    """Raises DeviceLostError where nothing runs on the device after an error, as after an illegal access or instruction."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except torch.AcceleratorError:
        raise DeviceLostError(f"{what}: {said(error)}; nothing runs on the GPU after that in this process") from error


def said(error: Exception) -> str:
    """The first line of an error."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _packed(
    wanted: Layout, out_features: int, in_features: int, sparsity: float, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Packed, Tensor]:
    """A random weight in a format, and dense, zeros written; on the generator's device."""
    mask = wanted.sample_mask((out_features, in_features), sparsity, generator)
    weight = torch.randn(mask.shape, generator=generator, device=generator.device).to(dtype).masked_fill_(~mask, 0)
    return wanted.pack(weight, mask), weight


@torch.no_grad()
def measure(
    case: Case, device: torch.device, rounds: int, rotate_bytes: int = ROTATE_BYTES, tune: bool = True
) -> GpuMeasured:
    """One case; a format that fails is left out. The fastest configurations are preferred from then on."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = DTYPES[case.dtype]
    x = torch.randn(case.rows, case.in_features, device=device, generator=generator).to(dtype)
    named: list[tuple[str, str, Work, int, Replay]] = []
    found = GpuMeasured()
    dense: Replay | None = None
    for wanted in case.formats:
        assert isinstance(wanted, Layout)  # auto is refused where options are read
        try:
            packed, weight = _packed(wanted, case.out_features, case.in_features, case.sparsity, dtype, generator)
            select(Problem.of(packed, case.rows))
            dense = dense or Replay(dense_calls(weight, x, rotate_bytes), device)
            config, replay, tried = _fastest(packed, x, rotate_bytes, tune)
        except DeviceLostError:
            raise
        except Exception as error:  # of the formats, of triton, of the driver, of torch
            go_on(f"{case.out_features}x{case.in_features} as {wanted}, {case.rows} rows", error, device)
            why = str(error) if isinstance(error, SparsecError) else said(error)
            found.left_out.append(f"{case.out_features}x{case.in_features} as {wanted}, {case.rows} rows: {why}")
            continue
        found.add(tried)
        # Asked once it has run: what a library refuses is known by then.
        kernel = select(Problem.of(packed, case.rows)).name
        named.append((packed.describe(), kernel, Work.of(packed), config, replay))
    if dense is None:
        return found
    try:
        base, *times = take_turns([r.seconds for r in (dense, *(replay for *_, replay in named))], rounds, warm_up=1)
    except Exception as error:  # of the driver, of torch
        where = f"{case.out_features}x{case.in_features}, {case.rows} rows"
        go_on(where, error, device)
        found.left_out.append(f"{where}: {said(error)}")
        return found
    for (layout, kernel, work, config, _), own in zip(named, times, strict=True):
        spread = Spread.of(own)
        rate = work.nbytes / spread.median
        faster = ratio(base, own)
        found.lines.append(Line(case, layout, kernel, work.nbytes, work, Spread.of(base), spread, faster, rate, config))
    return found


def predicted(lines: Sequence[Line], known: Constants) -> list[Line]:
    """The same lines, with what the cost model says of each."""
    found = []
    for line in lines:
        said = known.predict(
            line.kernel, Layout.parse(line.layout).cost_family, DTYPES[line.case.dtype], line.work, line.case.rows
        )
        found.append(replace(line, predicted=None if said is None else said.seconds))
    return found


def _fastest(packed: Packed, x: Tensor, rotate_bytes: int, tune: bool) -> tuple[int, Replay, GpuMeasured]:
    """The number of the fastest configuration, preferred from now on, the calls with it, and what was found of all on the way.

    A configuration that fails, or computes something wrong, is none of the choice. Raises what the first one raises.
    """
    calls, found = packed_calls(packed, x, rotate_bytes), GpuMeasured()
    gpu_launch.take_asked()
    first = Replay(calls, x.device)
    buckets = gpu_launch.take_asked()
    if len(buckets) != 1:
        return 0, first, found
    ((bucket, count),) = buckets.items()
    before = gpu_launch.preferred()
    if not tune or bucket in before:
        return before.get(bucket, 0), first, found
    tried: list[tuple[float, int, Replay]] = []
    dtype = next(name for name, known in DTYPES.items() if known == x.dtype)
    for number in range(count):
        gpu_launch.prefer({**before, bucket: number})
        try:
            error = _error(calls[0](), x, packed.exact(), None)
            found.checked.append(
                Checked(f"{packed.describe()}, configuration {number} of {bucket!r}", dtype, x.shape[0], error)
            )
            if not found.checked[-1].wrong:
                replay = Replay(calls, x.device) if number else first
                tried.append((min(replay.seconds() for _ in range(3)), number, replay))
        except Exception as failed:  # of triton, of the driver, of torch
            go_on(f"configuration {number} of {bucket!r}", failed, x.device)
            found.left_out.append(f"configuration {number} of {bucket!r}: {said(failed)}")
    gpu_launch.prefer(before)
    if not tried:
        return 0, first, found
    _, best, replay = min(tried, key=lambda t: t[:2])
    gpu_launch.prefer({**before, bucket: best})
    return best, replay, found


def keep_tuned() -> str:
    """Writes the preferred configurations where the kernels look for them; returns the path. CacheError, OSError."""
    file = gpu.tuned_file()
    files.write(file, (json.dumps(gpu_launch.preferred(), indent=1) + "\n").encode())
    return str(file)


def table_all(
    todo: Sequence[Case], device: torch.device, rounds: int, deadline: Deadline, progress: Progress | None
) -> Iterator[GpuMeasured]:
    """Case by case, as far as the time reaches; what was not begun is named."""
    for i, case in enumerate(todo):
        if deadline.over:
            yield GpuMeasured(
                left_out=[f"no time was left for {len(todo) - i} of {len(todo)} cases; give more with --budget"]
            )
            return
        with stage(
            progress, f"{i + 1} of {len(todo)}: {case.out_features}x{case.in_features}, {case.rows} rows, {case.dtype}"
        ):
            try:
                measured = measure(case, device, rounds)
            except DeviceLostError:
                raise
            except Exception as error:  # of the driver, of torch
                where = f"{case.out_features}x{case.in_features}, {case.rows} rows"
                go_on(where, error, device)
                measured = GpuMeasured(left_out=[f"{where}: {said(error)}"])
        yield measured
