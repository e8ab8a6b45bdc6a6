"""One product at a time: sparse kernels against F.linear and torch.sparse, and against what the machine can do at most.

Baselines: F.linear of the dense weight, F.linear of the masked one, and sparsec's own kernel of the dense one.

Ratios only mean something within one run, so the contenders take turns, and medians and quartiles are shown. A layer that is
multiplied again and again sits in the cache, where no layer of a large model ever is; so every contender walks through copies
of its weight until more than a gigabyte has been read, unless told otherwise, and the table says which it was.

The roof of the bytes is measured by two readers that take their turns with the others: a sum, and the own dense kernel.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsec.bench.cases import Asked, Case
from sparsec.console.command import DTYPES
from sparsec.cost import Constants, Work
from sparsec.cost.choice import TORCH, Setting, choose
from sparsec.cost.model import Roof
from sparsec.errors import FormatError, KernelError, SpecError
from sparsec.formats.base import Packed
from sparsec.formats.layout import Layout, sample_mask
from sparsec.formats.parts import DENSE
from sparsec.kernels import Problem, SparseLinear, select
from sparsec.kernels.dense import NAME as DENSE_OPERATOR
from sparsec.kernels.dense import native_serves
from sparsec.kernels.modules.dense_linear import DTYPES as DTYPES_SERVED
from sparsec.kernels.modules.dense_linear import DenseLinear
from sparsec.timing.calls import CallTimes, Contender, time_calls
from sparsec.timing.rotation import Rotation
from sparsec.timing.spread import Spread, ratio

READ_BYTES = (
    1 << 26
)  # of one read, so that waking threads is no part of it; a small weight's calls are too short for that
READ_COLUMNS = 4096


@dataclass(frozen=True)
class Bound:
    """The highest of the roofs for one product: it cannot take less time than that."""

    roof: Roof
    seconds: float


@dataclass(frozen=True)
class Result:
    """One line of the table. `torch_sparse` is None where torch.sparse does not serve the type."""

    case: Case
    format: str  # as it describes itself
    asked: str  # as --formats names it
    kernel: str
    dense: CallTimes
    masked: CallTimes  # F.linear of the weight with the zeros
    dense_on_sparsec: CallTimes | None  # sparsec's dense kernel, of values stored alike; None where it is not built
    sparse: CallTimes
    torch_sparse: CallTimes | None
    bandwidth: float  # bytes per second, by plain reading in the same rounds
    bound: Bound
    predicted: float | None  # speedup by the cost model, of weights that lie in memory; None without constants

    @property
    def speedup(self) -> Spread:
        """Against F.linear."""
        return ratio(self.dense.rounds, self.sparse.rounds)

    @property
    def masked_speedup(self) -> Spread:
        """Of zeros that no kernel skips."""
        return ratio(self.dense.rounds, self.masked.rounds)

    @property
    def zeros_speedup(self) -> Spread | None:
        """Against sparsec's dense kernel of values stored alike: the part that zeros give."""
        return None if self.dense_on_sparsec is None else ratio(self.dense_on_sparsec.rounds, self.sparse.rounds)

    @property
    def torch_sparse_speedup(self) -> Spread | None:
        """Of torch.sparse against F.linear."""
        return None if self.torch_sparse is None else ratio(self.dense.rounds, self.torch_sparse.rounds)

    @property
    def speedup_bytes(self) -> float:
        """What reading fewer bytes can give at most."""
        return self.dense.nbytes / self.sparse.nbytes if self.sparse.nbytes else float("inf")

    @property
    def share(self) -> float:
        """Of the binding roof; 1 is as fast as the machine allows."""
        return self.bound.seconds / self.sparse.seconds.median


@dataclass(frozen=True)
class Measured:
    """All lines of one case, and what was left out with the reason."""

    results: tuple[Result, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class _Entry:
    """One format on one weight."""

    asked: str
    label: str
    kernel: str
    work: Work
    packed: Packed | None  # None: dense


@torch.no_grad()
def measure(case: Case, rotation: Rotation, repeats: int = 20, constants: Constants | None = None) -> Measured:
    """Times one product on the CPU with torch's present number of threads.

    constants: for `auto`, which goes by bytes without, and for the roofs of decoding and arithmetic.
    """
    generator = torch.Generator().manual_seed(0)
    dtype = DTYPES[case.dtype]
    shape = f"{case.out_features}x{case.in_features}"
    try:
        mask = sample_mask(case.pattern, (case.out_features, case.in_features), case.sparsity, generator)
    except SpecError as error:
        return Measured((), (f"{shape}: {error}",))
    plain = torch.randn(case.out_features, case.in_features, generator=generator).to(dtype)
    weight = plain.masked_fill(~mask, 0)
    x = torch.randn(case.rows, case.in_features, generator=generator).to(dtype)
    entries, left_out = [], []
    for wanted in case.formats:
        try:
            entries.append(_entry(wanted, weight, mask, case.rows, constants))
        except (FormatError, KernelError) as error:
            left_out.append(f"{shape} as {wanted}: {error}")
    if not entries:
        return Measured((), tuple(left_out))
    readers = _readers(weight.nbytes, rotation)
    baselines = [_torch_dense(plain, x, rotation, "dense"), _torch_dense(weight, x, rotation, "masked")]
    if native_serves(DENSE_OPERATOR) and plain.dtype in DTYPES_SERVED:
        baselines.append(_own_dense(plain, x, rotation, "own dense"))
    whole = _rounded_dense(plain, [e.packed.codec.name for e in entries if e.packed is not None], x, rotation)
    contenders = [*baselines, *readers, *whole.values()]
    contenders += [_contender(e, weight, x, rotation, str(i)) for i, e in enumerate(entries)]
    other = _torch_sparse(weight, x, rotation)
    contenders += [] if other is None else [other]
    timings = time_calls(contenders, repeats, whole_stacks=rotation.protocol.layers is not None)
    before = len(baselines) + len(readers)
    bandwidth = max(t.bytes_per_second for t in timings[:before])
    last = None if other is None else timings[-1]
    rounded = dict(zip(whole, timings[before:], strict=False))
    own = timings[before + len(whole) :]
    dense_timing = timings[2] if len(baselines) > 2 else None
    results = (
        Result(
            case,
            entry.label,
            entry.asked,
            entry.kernel,
            timings[0],
            timings[1],
            rounded.get("" if entry.packed is None else entry.packed.codec.name, dense_timing),
            timing,
            last,
            bandwidth,
            _bound(entry, dtype, case.rows, bandwidth, constants),
            _predicted(entry, dtype, case.rows, constants) if rotation.protocol.cold else None,
        )
        for entry, timing in zip(entries, own, strict=False)
    )
    return Measured(tuple(results), tuple(left_out))


def _entry(wanted: Asked, weight: Tensor, mask: Tensor, rows: int, constants: Constants | None) -> _Entry:
    out_features, in_features = weight.shape
    own = select(Problem(DENSE, out_features, in_features, rows, weight.dtype)).name
    if isinstance(wanted, Layout):
        layout, dense = wanted, own
    else:
        best = choose(weight, mask, Setting("latency", rows, constants), list(dict.fromkeys([TORCH, own]))).best
        layout, dense = best.layout, best.kernel
    if layout.stays:
        return _Entry(str(wanted), DENSE, dense, Work.dense(out_features, in_features, weight.dtype), None)
    packed = layout.pack(weight, mask)
    return _Entry(str(wanted), packed.describe(), select(Problem.of(packed, rows)).name, Work.of(packed), packed)


def _rounded_dense(weight: Tensor, codecs: Sequence[str], x: Tensor, rotation: Rotation) -> dict[str, Contender]:
    """The dense weight with each kind of quantised values."""
    everything = torch.ones_like(weight, dtype=torch.bool)
    found = {}
    for name in dict.fromkeys(filter(None, codecs)):
        packed = Layout(DENSE, values=name).pack(weight, everything)
        entry = _Entry("", packed.describe(), "", Work.of(packed), packed)
        found[name] = _contender(entry, weight, x, rotation, f"dense:{name}")
    return found


def _contender(entry: _Entry, weight: Tensor, x: Tensor, rotation: Rotation, place: str) -> Contender:
    packed = entry.packed
    if packed is None:
        own = _own_dense if entry.kernel != TORCH else _torch_dense
        return own(weight, x, rotation, place)
    names, scalars = list(packed.tensors()), packed.scalars()
    twins = (
        SparseLinear(type(packed).from_parts(dict(zip(names, tensors, strict=True)), scalars))
        for tensors in rotation.copies(place, list(packed.tensors().values()))
    )
    return Contender([functools.partial(twin, x) for twin in twins], packed.nbytes)


def _torch_dense(weight: Tensor, x: Tensor, rotation: Rotation, place: str) -> Contender:
    twins = rotation.copies(place, [weight])
    return Contender([functools.partial(F.linear, x, twin) for (twin,) in twins], weight.nbytes)


def _own_dense(weight: Tensor, x: Tensor, rotation: Rotation, place: str) -> Contender:
    modules = [_dense_module(twin) for (twin,) in rotation.copies(place, [weight])]
    return Contender([functools.partial(module, x) for module in modules], weight.nbytes)


def _dense_module(weight: Tensor) -> DenseLinear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return DenseLinear(linear)


def _readers(nbytes: int, rotation: Rotation) -> list[Contender]:
    """Plain reading under the same protocol: as many bytes as the dense weight, more where a rotation walks on anyway."""
    wanted = max(nbytes, READ_BYTES) if rotation.protocol.cold else nbytes
    matrix = torch.ones(max(1, wanted // (4 * READ_COLUMNS)), READ_COLUMNS)
    twins = [twin for (twin,) in rotation.copies("read", [matrix])]
    sums = [functools.partial(torch.sum, twin.view(torch.int64)) for twin in twins]
    readers = [Contender(sums, matrix.nbytes)]
    if native_serves(DENSE_OPERATOR):
        x = torch.ones(1, READ_COLUMNS)
        half = len(twins) // 2  # away from what the sum has just brought into the cache
        products = [functools.partial(_dense_module(t), x) for t in [*twins[half:], *twins[:half]]]
        readers.append(Contender(products, matrix.nbytes))
    return readers


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
    calls = [functools.partial(torch.sparse.mm, twin, columns) for twin in twins]
    return Contender(calls, sum(t.nbytes for t in parts))


def _bound(entry: _Entry, dtype: torch.dtype, rows: int, bandwidth: float, constants: Constants | None) -> Bound:
    roofs: list[tuple[float, Roof]] = [(entry.work.nbytes / bandwidth, "bytes")]
    known = constants and constants.predict(
        entry.kernel, Layout.parse(entry.label).cost_family, dtype, entry.work, rows
    )
    if known:
        roofs += [(known.decode, "decode"), (known.multiply, "flops")]
    seconds, roof = max(roofs, key=lambda r: r[0])
    return Bound(roof, seconds)


def _predicted(entry: _Entry, dtype: torch.dtype, rows: int, constants: Constants | None) -> float | None:
    if constants is None:
        return None
    plain = Work.dense(entry.work.out_features, entry.work.in_features, dtype)
    before = constants.predict(TORCH, "dense", dtype, plain, rows)
    now = constants.predict(entry.kernel, Layout.parse(entry.label).cost_family, dtype, entry.work, rows)
    return before.seconds / now.seconds if before and now else None
