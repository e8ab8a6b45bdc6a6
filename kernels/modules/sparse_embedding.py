"""SparseEmbedding: the module that takes the place of an embedding whose table has been packed, mostly with the head tied to it."""

from __future__ import annotations

import copy
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsec import private
from sparsec.errors import KernelError
from sparsec.formats.base import Packed
from sparsec.kernels.derivatives import transformed
from sparsec.kernels.embedding import embedding_operator
from sparsec.kernels.modules.packed_layer import PackedLayer
from sparsec.private import OpOverload

SCALE = "embed_scale"
"""What transformers' embeddings call the number that they multiply rows by: a number, or a buffer."""
_PROBE = torch.tensor([[0, 3, 3], [1, 0, 2]])


class SparseEmbedding(PackedLayer):
    """Rows of a packed table [num_embeddings, embedding_dim] by token ids [...], as nn.Embedding gives them: [..., embedding_dim].

    Where several processes hold the table's rows, one gives zeros for the rows of others, and the sum is that of the table.

    Times `embed_scale` where the embedding that stood here multiplies by it. Only the rows of the ids are expanded. The table has
    no gradient. Not an nn.Embedding, because there is no weight that could be written to.
    """

    takes_place_of: type[nn.Module] = nn.Embedding
    """The class of the embedding that stood here."""

    num_embeddings: int
    embedding_dim: int
    kept: dict[str, Any]
    """What that one knew besides, for the way back."""

    def __init__(self, packed: Packed) -> None:
        """KernelError for what is no packed matrix."""
        super().__init__()
        if not isinstance(packed, Packed):
            raise KernelError(
                f"SparseEmbedding takes a packed matrix, such as CSR.pack gives, got {type(packed).__name__}"
            )
        self._hold(packed, None)
        self.num_embeddings, self.embedding_dim = packed.shape
        self.kept = {}

    @classmethod
    def of(cls, embedding: nn.Module, packed: Packed) -> Self:
        """In the place of an embedding, `not_served` of which is empty."""
        made = cls(packed)
        made.takes_place_of = type(embedding)
        known = ("training", "forward", "num_embeddings", "embedding_dim")
        made.kept = {n: v for n, v in vars(embedding).items() if not n.startswith("_") and n not in known}
        if isinstance(scale := getattr(embedding, SCALE, None), Tensor):
            made.register_buffer(SCALE, scale, persistent=SCALE not in embedding._non_persistent_buffers_set)
        return made

    def twin(self, packed: Packed) -> Self:
        """One like it over another table."""
        made = type(self)(packed)
        made.takes_place_of, made.kept = self.takes_place_of, dict(self.kept)
        if (scale := self._buffers.get(SCALE)) is not None:
            made.register_buffer(SCALE, scale, persistent=SCALE not in self._non_persistent_buffers_set)
        return made

    def give_back(self, embedding: Any, memo: dict[int, Any]) -> None:
        """Lets a bare module of the class that stood here know what that one knew, but for its weight."""
        vars(embedding).update(copy.deepcopy(self.kept, memo))
        embedding.num_embeddings, embedding.embedding_dim = self.num_embeddings, self.embedding_dim
        if (scale := self._buffers.get(SCALE)) is not None:
            persistent = SCALE not in self._non_persistent_buffers_set
            embedding.register_buffer(SCALE, copy.deepcopy(scale, memo), persistent=persistent)

    def _operator(self, packed: Packed) -> OpOverload:
        return embedding_operator(packed)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...], int32 or int64 -> [..., embedding_dim]. IndexError for an id that the table does not have."""
        if not torch.compiler.is_compiling():
            self._check_quickly()
        args = (*[self._buffers[n] for n in self._names], *self._scalar_args)
        others = None
        if self.share is not None and not self.share.dim:
            ids, others = self._own(ids, self.share.first, self.share.end)
        rows: Tensor
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or transformed():
            rows = self._op(ids, *args)
        else:
            with private.below_autograd():
                rows = self._op(ids, *args)
        if others is not None:
            rows = rows.masked_fill(others[..., None], 0.0)
        scale = self._buffers.get(SCALE, self.kept.get(SCALE))
        if scale is None:
            return rows
        return rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)

    def _own(self, ids: Tensor, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Numbers of the rows that are held here, 0 for others, and which are those of others: their processes look them up."""
        if ids.is_cpu and bool(((ids < 0) | (ids >= self.num_embeddings)).any()):
            raise IndexError(f"ids must lie from 0 to {self.num_embeddings - 1}, the last row of the table")
        others = (ids < first) | (ids >= end)
        return (ids - first).masked_fill(others, 0), others

    def extra_repr(self) -> str:
        packed = self.packed
        share = f", {self.share}" if self.share is not None else ""
        return f"{self.num_embeddings}, {self.embedding_dim}, {packed.describe()}, {packed.sparsity:.1%} zero{share}"


def not_served(embedding: nn.Module) -> str:
    """Why a SparseEmbedding cannot take an embedding's place, "" where it can."""
    kind = type(embedding)
    if not isinstance(embedding, nn.Embedding):
        return f"it is looked up inside {kind.__name__}, which is no nn.Embedding"
    patched = embedding.__dict__.get(
        "forward"
    )  # by accelerate, which leaves the class's own there when it is taken off
    if patched is not None and getattr(patched, "__func__", None) is not kind.forward:
        return f"a {kind.__name__} with a forward of its own looks it up"
    if embedding.max_norm is not None:
        return f"the {kind.__name__} scales its rows to max_norm, in place"
    more = [n for n, _ in (*embedding.named_parameters(), *embedding.named_buffers()) if n not in ("weight", SCALE)]
    if more:
        return f"the {kind.__name__} also holds {', '.join(more)}"
    if kind.forward is not nn.Embedding.forward and not _only_scales(embedding):
        return f"{kind.__name__} does more than to look rows up and to multiply them by {SCALE}"
    return ""


def _only_scales(embedding: nn.Embedding) -> bool:
    """Whether the class does to a small table what a SparseEmbedding would, bit for bit."""
    kind = type(embedding)
    scale = getattr(embedding, SCALE, None)
    if not isinstance(scale, int | float | Tensor):
        return False
    if isinstance(scale, Tensor):
        if scale.numel() != 1:
            return False
        scale = torch.full(scale.shape, 2.7182818, device="cpu")  # which no 16 bits hold
    numbers = torch.linspace(-1, 1, 12, device="cpu").view(4, 3)  # transformers makes models on meta
    for dtype in (torch.float32, torch.bfloat16):
        table = numbers.to(dtype)
        twin: Any = kind.__new__(kind)
        twin.__dict__.update(embedding.__dict__, padding_idx=None, num_embeddings=4, embedding_dim=3)
        twin.__dict__["_parameters"] = {"weight": nn.Parameter(table, requires_grad=False)}
        twin.__dict__["_buffers"] = {SCALE: scale} if isinstance(scale, Tensor) else {}
        rows = F.embedding(_PROBE, table)
        wanted = rows * (scale.to(dtype) if isinstance(scale, Tensor) else scale)
        try:
            found = kind.forward(twin, _PROBE)
        except Exception:  # whatever a class of others does with ids that it did not expect
            return False
        if not isinstance(found, Tensor) or found.dtype != dtype or not torch.equal(found, wanted):
            return False
    return True
