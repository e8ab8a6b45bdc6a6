"""From a graph and the records of its passes to a report: counted, not measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sparsec import memory
from sparsec.arguments import checked
from sparsec.console.table import LEAST, WIDTH, terminal_width
from sparsec.cost.model import Roof
from sparsec.errors import ArgumentError
from sparsec.ir.facts import GROUPS, Op, Weight
from sparsec.ir.graph import Graph
from sparsec.pipeline.base import PassRecord
from sparsec.report.layer import LayerRow, Traced, executed_share, total
from sparsec.report.predict import Predicted, by_weight
from sparsec.report.records import GroupRow, ReportData
from sparsec.report.text import render


@dataclass(frozen=True)
class Report(ReportData):
    """A report that prints as text. See also `sparsec.report.schema` for JSON and CSV."""

    @checked
    def text(self, layers: bool = False, width: int = WIDTH) -> str:
        """The report as text. layers: one line for every weight, instead of one for all of a role. width: columns.

        Raises ArgumentError for fewer than 40.
        """
        if width < LEAST:
            raise ArgumentError(f"Report.text: width must be at least {LEAST} columns, got {width}")
        return render(self, layers, width)

    def __str__(self) -> str:
        return self.text(width=max(80, terminal_width()))


def collect(
    graph: Graph,
    records: Sequence[PassRecord] = (),
    notes: Iterable[str] = (),
    model_bytes: int | None = None,
    predicted: Sequence[Predicted] = (),
    decoding: str | None = None,
) -> Report:
    """What the graph knows of its weights and ops, per weight and per group.

    model_bytes: of all tensors of the model that runs. It may hold buffers that the graph never reads; None takes the graph's.
    predicted: what the cost model expects of its products. decoding: what computes a token, in words.
    """
    expected = by_weight(predicted)
    layers = tuple(_layer(graph, weight, expected.get(weight.name)) for weight in graph.weights.values())
    held = memory.held(graph.module).total if model_bytes is None else model_bytes
    return Report(
        passes=tuple(records),
        layers=layers,
        groups=tuple(_groups(graph, layers)),
        bytes_buffers=held - sum(row.bytes_held for row in layers),
        linears_dense_ms=1e3 * sum(p.dense for p in predicted) if predicted else None,
        linears_ms=1e3 * sum(p.seconds for p in predicted) if predicted else None,
        flops_without_weights=total([op.flops_dense for op in graph.ops.values() if not op.weights]),
        notes=tuple(notes),
        decoding=decoding,
    )


def _layer(graph: Graph, weight: Weight, expected: tuple[float, Roof, float] | None) -> LayerRow:
    return LayerRow.of(Traced(graph, weight, graph.ops_of(weight.name), expected))


def _executed(graph: Graph, op: Op) -> float | None:
    """A mask alone saves no work: a dense kernel multiplies by the zeros too."""
    if op.members:
        return total([executed_share(graph.weights[name], op) for name in op.members])
    if op.weights and graph.weights[op.weights[0]].packed is not None:
        return op.flops
    return op.flops_dense


def _groups(graph: Graph, layers: Sequence[LayerRow]) -> Iterable[GroupRow]:
    parameters = sum(row.parameters for row in layers)
    for group in GROUPS:
        members = [row for row in layers if row.group == group]
        ops = [op for op in graph.ops.values() if op.group == group]
        executed = total([_executed(graph, op) for op in ops])
        if not members and not executed:
            continue
        count = sum(row.parameters for row in members)
        yield GroupRow(
            group=group,
            parameters=count,
            nnz=sum(row.nnz for row in members),
            flops_per_token=executed,
            flops_dense=total([op.flops_dense for op in ops]),
            bytes_dense=sum(row.bytes_dense for row in members),
            bytes_held=sum(row.bytes_held for row in members),
            share=count / parameters if parameters else 0.0,
        )
