"""Lower: linear ops over frozen masks become sparse ops over packed weights. The one place where formats meet kernels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from sparsec.errors import FormatError, KernelError
from sparsec.formats import FORMATS
from sparsec.formats.base import Packed
from sparsec.ir.facts import Weight
from sparsec.ir.graph import Graph
from sparsec.kernels import Problem
from sparsec.kernels import select as select_kernel
from sparsec.lowering import dense_readers, lower_weight
from sparsec.pipeline.base import Context, Effect, Pass, PassResult
from sparsec.pipeline.options import check_choice, check_ignore, check_patterns
from sparsec.pipeline.selection import select


@dataclass(frozen=True)
class Lower(Pass):
    """Packs every weight that has a frozen mask and rewrites its ops; the dense weight and the mask leave the graph.

    format: `csr`. index_bits: width of a column number, 16 or 32; None takes the smallest that fits. A weight that must stay dense
    says so in its record, with the reason.
    """

    name: ClassVar[str] = "lower"
    effect: ClassVar[Effect] = Effect.NUMERIC
    requires: ClassVar[frozenset[str]] = frozenset({"mask", "frozen"})
    produces: ClassVar[frozenset[str]] = frozenset({"lowered"})

    format: str = "csr"
    index_bits: int | None = field(default=None, kw_only=True)
    targets: tuple[str, ...] | None = field(default=None, kw_only=True)
    ignore: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        check_choice(self.format, "format", FORMATS)
        if self.index_bits is not None:
            check_choice(self.index_bits, "index_bits", (16, 32))
        object.__setattr__(self, "targets", check_patterns(self.targets, "targets"))
        object.__setattr__(self, "ignore", check_ignore(self.ignore))

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Raises KernelError or FormatError, naming the weight, for a dtype, device or width that cannot be served."""
        chosen = self._chosen(graph)
        reasons = {w.name: context.keep_dense.get(w.name) or _stays_dense(graph, w) for w in chosen}
        for weight in chosen:  # what will be refused is refused before any dense weight is gone
            if not reasons[weight.name]:
                self._pack(graph, weight, rows=0)
        notes, dense, packed = [], 0, 0
        if not chosen:
            notes.append("no selected weight has a mask, so nothing was packed")
        for i, weight in enumerate(chosen):
            context.step("lower", i, len(chosen))
            if reasons[weight.name]:
                graph.update(weight.name, reason=reasons[weight.name])
                notes.append(f"{weight.name} stays dense: {reasons[weight.name]}")
                continue
            done = self._lower(graph, weight, context)
            dense += done.nbytes_dense
            packed += done.nbytes
        graph.module.graph.lint()
        graph.module.recompile()
        if packed > dense:
            notes.append(
                f"the packed weights are larger than the dense ones, {packed / 1e6:.1f} MB against {dense / 1e6:.1f} MB: at "
                "this sparsity the column numbers cost more than the zeros save; prune further or keep these layers dense"
            )
        count = sum(1 for w in chosen if graph.weights[w.name].packed is not None)
        ratio = f", {packed / dense:.2f}x of dense" if dense else ""
        return PassResult(
            changed=count > 0,
            summary=f"{count} weights packed as {self.format}: {dense / 1e6:.1f} MB -> {packed / 1e6:.1f} MB{ratio}",
            notes=tuple(notes),
        )

    def _chosen(self, graph: Graph) -> list[Weight]:
        masked = {w.name for w in graph.masked()}
        if self.targets is None and not self.ignore:
            return list(graph.masked())
        everything = self.targets or tuple(dict.fromkeys(w.group for w in graph.masked()))
        return [w for w in select(graph, everything, self.ignore) if w.name in masked]

    def _lower(self, graph: Graph, weight: Weight, context: Context) -> Weight:
        packed = self._pack(graph, weight)
        kernel = select_kernel(Problem.of(packed))
        return lower_weight(graph, weight.name, packed, kernel.name, free=context.owns_weights)

    def _pack(self, graph: Graph, weight: Weight, rows: int | None = None) -> Packed:
        """The first `rows` rows, None for all; none at all still asks format and kernel whether they serve this weight."""
        matrix, mask = graph.matrix(weight.name), graph.mask_matrix(weight.name)
        assert mask is not None
        options: dict[str, Any] = {"index_bits": self.index_bits} if self.index_bits is not None else {}
        try:
            packed: Packed = FORMATS[self.format].pack(matrix[:rows], mask[:rows], **options)  # type: ignore[attr-defined]
            select_kernel(Problem.of(packed))
        except (FormatError, KernelError) as error:
            owner = weight.owners[0] if weight.owners else weight.name
            way_out = f"or leave it dense with lower({self.format}, ignore=({owner!r},))"
            raise type(error)(f"{weight.name}: {error}; {way_out}") from error
        return packed


def _stays_dense(graph: Graph, weight: Weight) -> str:
    """Why a weight cannot be packed at all, "" when it can."""
    others = dense_readers(graph, weight.name)
    if others:
        return f"it is also read as a dense tensor, by %{', %'.join(others)} (a tied embedding table, for instance)"
    return ""
