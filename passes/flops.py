"""FLOPs: arithmetic per token of every op, dense and as kept.

A multiply-add counts 2; look-ups, norms and pointwise ops count 0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from math import prod
from typing import ClassVar

from sparsec.ir.facts import MATRIX_KINDS, Op
from sparsec.ir.graph import Graph
from sparsec.pipeline.base import Context, Effect, Pass, PassResult
from sparsec.pipeline.options import check_positive


@dataclass(frozen=True)
class Flops(Pass):
    """Fills `Op.flops_dense` and `Op.flops`, both per token.

    A linear is 2 * out * in dense and 2 * nnz kept; attention is 2 * heads * head_dim * context for the scores and as much for the
    values, at the stated context length; an embedding look-up is 0. Fused experts count the experts that a token is sent to, at the
    mean density of all of them.
    """

    name: ClassVar[str] = "flops"
    examples: ClassVar[tuple[str, ...]] = ("magnitude(0.5),sparsity,flops", "flops(context=4096)")
    effect: ClassVar[Effect] = Effect.ANALYSIS
    produces: ClassVar[frozenset[str]] = frozenset({"flops"})

    context: int = field(default=1024, kw_only=True)

    def __post_init__(self) -> None:
        check_positive(self.context, "context")

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Ops whose cost the graph does not tell keep None and are named in the notes."""
        notes = []
        for name, op in list(graph.ops.items()):
            dense, kept = self._count(graph, op)
            if dense is None:
                notes.append(
                    f"%{name} ({op.kind}, {op.group}) is not counted: its shape does not tell the work per token"
                )
            graph.ops[name] = replace(op, flops_dense=dense, flops=kept)
        groups: dict[str, float] = {}
        for op in graph.ops.values():
            groups[op.group] = groups.get(op.group, 0) + (op.flops or 0)
        total = sum(op.flops or 0 for op in graph.ops.values())
        full = sum(op.flops_dense or 0 for op in graph.ops.values())
        parts = ", ".join(f"{g} {f / 1e6:.1f}" for g, f in groups.items() if f)
        return PassResult(
            changed=False,
            summary=f"{total / 1e6:.1f} MFLOP per token at context {self.context}, dense {full / 1e6:.1f} ({parts})",
            notes=tuple(notes),
        )

    def _count(self, graph: Graph, op: Op) -> tuple[float | None, float | None]:
        """(dense, kept); None where unknown."""
        weights = [graph.weights[name] for name in op.matrices if name in graph.weights]
        if op.members and len(weights) < len(op.members):
            return None, None  # traced from a compiled model, which does not tell
        weight = weights[0] if weights else None
        if weight is None and op.kind in (*MATRIX_KINDS, "grouped_linear"):
            return None, None  # its weight is computed, not stored
        if op.kind in MATRIX_KINDS and weight is not None:
            return 2.0 * sum(w.numel for w in weights), 2.0 * sum(graph.kept(w.name) for w in weights)
        if op.kind == "grouped_linear" and weight is not None:
            rows = _rows_per_token(op)
            each = 2.0 * prod(weight.shape[1:])
            share = graph.kept(weight.name) / max(1, weight.numel)
            return (None, None) if rows is None else (rows * each, rows * each * share)
        if op.kind == "attention":
            return self._twice(_width(op), 4.0)
        if op.kind == "matmul":
            width = _width(op)
            if width is None:  # scores [.., length, length]: as much work as the values that they weigh
                width = next((w for other in graph.ops.values() if _pair(op, other) and (w := _width(other))), None)
            return self._twice(width, 2.0)
        if op.kind == "other" and "conv" in str(graph.node(op.node).target):
            return None, None
        return 0.0, 0.0

    def _twice(self, width: int | None, factor: float) -> tuple[float | None, float | None]:
        flops = None if width is None else factor * width * self.context
        return flops, flops


def _width(op: Op) -> int | None:
    """heads * head_dim of an attention result [batch, heads, length, head_dim] or [heads * batch, length, head_dim]."""
    if op.shape is None or len(op.shape) < 3:
        return None
    first, *heads, _, last = op.shape
    if not isinstance(last, int):
        return None
    folded = re.fullmatch(r"(\d+)\*batch", str(first).replace(" ", ""))  # [heads * batch, length, head_dim]
    counts = [h for h in heads if isinstance(h, int)]
    return None if len(counts) < len(heads) else prod([last, *counts, int(folded.group(1)) if folded else 1])


def _pair(op: Op, other: Op) -> bool:
    return other.node != op.node and other.kind == "matmul" and other.owner == op.owner


def _rows_per_token(op: Op) -> int | None:
    """k of a result with `k*batch*length` rows: the experts that one token is sent to."""
    if op.shape is None:
        return None
    text = str(op.shape[0]).replace(" ", "")
    match = re.fullmatch(r"(?:(\d+)\*)?batch\*length", text)
    return int(match.group(1) or 1) if match else None
