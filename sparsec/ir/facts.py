"""What the passes know: one record per stored weight, one per executed op.

The dataflow is torch.fx's; these tables stand beside it. They are not kept in `node.meta`, because deepcopy shares what is in
there, and pickling or transforming a graph loses it. A record is never changed: a pass replaces it with a new one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from sparsec.formats.base import HALF_AND_SINGLE, Packed
from sparsec.formats.values import Codec, Codes

GroupName = Literal["attention", "mlp", "experts", "router", "lm_head", "embedding", "norm", "adapter", "other"]
GROUPS: tuple[GroupName, ...] = get_args(GroupName)

WeightKind = Literal["linear", "conv1d", "experts", "embedding", "bias", "other"]
"""`linear`: [out, in]. `conv1d`: a linear stored as [in, out] (GPT-2). `experts`: 3-D, one matrix per expert.
`other`: whatever is left, norms included."""

OpKind = Literal[
    "linear",
    "conv1d",
    "sparse_linear",
    "fused_linear",
    "grouped_linear",
    "embedding",
    "attention",
    "matmul",
    "norm",
    "other",
]
"""`fused_linear`: products of several weights with the same x in one call, dense and packed ones mixed."""

MATRIX_KINDS: tuple[OpKind, ...] = ("linear", "conv1d", "sparse_linear", "fused_linear")
"""Products with weight matrices: what can be pruned and lowered."""

Dim = int | str
"""A size, or the name of a symbolic one (`batch`, `length`)."""


@dataclass(frozen=True)
class Pruned:
    """How the mask of a weight came to be. Errors: mean square of the change of the layer's outputs over that of its dense outputs,
    on sampled tokens of the calibration; None where nothing was calibrated."""

    criterion: str  # the pass
    target: float  # the sparsity asked for, for this weight
    allocation: str = "uniform"  # how the target came to be
    measure: float | None = None  # what the allocation derived it from
    error_masked: float | None = None  # by the mask alone
    error: float | None = None  # with the weights that the pass left


@dataclass(frozen=True, eq=False)
class Rounded:
    """What the kept values of a weight were rounded to: numbers that codes stand for, so that packing loses nothing."""

    values: str  # name of the codec
    like: Codes  # scale and table; no codes
    error: float | None = None  # as in Pruned, over the outputs before rounding; None where nothing was calibrated

    def holds(self, matrix: Tensor, mask: Tensor) -> bool:
        """Whether a matrix [out, in] holds such numbers alone, as its dtype has them, where mask [out, in] is True."""
        if matrix.dtype not in HALF_AND_SINGLE or not bool(matrix.isfinite().all()):
            return False
        codec = Codec.parse(self.values)
        if self.like.scale.shape != codec.scale_shape(*matrix.shape):
            return False
        numbers = codec.decode(codec.encode(matrix, mask, self.like)).to(matrix.dtype)
        return torch.equal(numbers, matrix.masked_fill(~mask, 0))

    def to(self, device: torch.device) -> Rounded:
        """On a device."""
        held = (t.to(device) for t in (self.like.codes, self.like.scale, self.like.table))
        return replace(self, like=Codes(*held))


@dataclass(frozen=True, eq=False)
class Weight:
    """One stored parameter. Two names of one tensor are one weight; the first name is the key."""

    name: str
    aliases: tuple[str, ...]  # its other names, in the model's order
    kind: WeightKind
    group: GroupName
    shape: tuple[int, ...]  # as stored: [in, out] for conv1d, one matrix after the other for experts
    dtype: torch.dtype
    owners: tuple[str, ...] = ()  # paths of the modules that execute it, in order of execution
    transposed: bool = False  # stored as [..., in, out]
    mask: Tensor | None = (
        None  # bool, shape as stored, True where kept when it was made; `Graph.mask` tells what is kept now
    )
    pattern: str | None = None  # of the mask: "unstructured", ...
    pruned: Pruned | None = None  # how its mask was made
    frozen: bool = False  # the mask's zeros were written into the stored tensor
    grown: int = 0  # values that came back under its mask since, and were found to be kept
    trained: Literal["", "under", "before"] = (
        ""  # under its mask, or before that was made: the weight as the model came in is not what it stands for any more
    )
    nnz: int | None = None  # how many values are kept, once the sparsity pass (or a format) has counted them
    rounded: Rounded | None = None  # what its kept values were rounded to; `Graph.rounded` tells whether they still are
    packed: Packed | None = None  # once lowered; then mask is None and the dense tensor is gone
    reason: str | None = None  # why it was left dense, where that needs saying

    @property
    def numel(self) -> int:
        """Number of parameters, zeros included."""
        return int(torch.Size(self.shape).numel())

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out_features, in_features) of a linear or conv1d weight, or of each expert's."""
        assert len(self.shape) == (3 if self.kind == "experts" else 2), self.name
        rows, columns = self.shape[-2:]
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def nbytes_dense(self) -> int:
        """Bytes of the dense tensor."""
        return self.numel * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes held now, without the mask."""
        return self.packed.nbytes if self.packed is not None else self.nbytes_dense

    @property
    def nbytes_mask(self) -> int:
        """Bytes of the mask."""
        return self.mask.numel() if self.mask is not None else 0

    @property
    def sparsity(self) -> float | None:
        """Share of zeros, None while nobody has counted."""
        if self.nnz is None:
            return None
        return 1.0 - self.nnz / self.numel if self.numel else 0.0

    @property
    def format(self) -> str:
        """`dense`, or the packed format with its parameters."""
        return self.packed.describe() if self.packed is not None else "dense"


@dataclass(frozen=True)
class Op:
    """One executed call: a node of the graph."""

    node: str  # name of the fx node
    kind: OpKind
    owner: str  # path of the module that makes the call; "" for the root
    group: GroupName
    weights: tuple[str, ...] = ()  # keys into Graph.weights, the matrix first
    shape: tuple[Dim, ...] | None = None  # of the result
    block: str | None = None  # path of the repeated block that the owner is in, `model.layers.3`
    flops_dense: float | None = None  # per token, as if no weight were zero
    flops: float | None = None  # per token, counting only what is kept
    kernel: str | None = None  # once lowered
    members: tuple[str, ...] = ()  # of a fused product: its matrices, in the order of its results; else empty
    member_kernels: tuple[str | None, ...] = ()  # of a fused product: one per member
    routed: bool = False  # of a grouped product: its rows can be told apart by expert

    @property
    def matrices(self) -> tuple[str, ...]:
        """The weights that x is multiplied by: one, or those of a fused product."""
        return self.members or self.weights[:1]

    @property
    def owners(self) -> tuple[str, ...]:
        """Paths of the modules whose products these are, in the order of `matrices`."""
        return tuple(self.owner_of(member) for member in self.members) or (self.owner,)

    def owner_of(self, weight: str) -> str:
        """Path of the module that multiplies by one of its matrices; members of fused products go by the name of that module."""
        return weight.rpartition(".")[0] if self.members else self.owner

    def kernel_of(self, weight: str) -> str | None:
        """The kernel that multiplies by one of its matrices."""
        return self.member_kernels[self.members.index(weight)] if self.members else self.kernel

    def with_kernel(self, weight: str, kernel: str | None) -> Op:
        """The same op, with another kernel for one of its matrices."""
        if not self.members:
            return replace(self, kernel=kernel)
        pairs = zip(self.members, self.member_kernels, strict=True)
        return replace(self, member_kernels=tuple(kernel if name == weight else k for name, k in pairs))
