"""The graph as text: as it was traced, and what each pass changed.

python examples/inspect_ir.py [MODEL]
"""

from __future__ import annotations

import sys

import sparsec
from sparsec.data import load_model
from sparsec.ir.printer import graph_text
from sparsec.pipeline import PrintIR


def main(name: str = "tiny") -> sparsec.Graph:
    model = load_model(name).model
    # A graph is independent of the model only after copy(): traced parameters are the model's own.
    graph = sparsec.trace(model).copy()
    print(f"# traced, {graph.rung} shapes\n{graph_text(graph)}")

    pipeline = sparsec.Pipeline.parse("magnitude(0.5, targets=mlp),freeze,sparsity,flops,lower(csr)")
    pipeline.run(graph, instruments=[PrintIR(when="changed")])
    return graph


if __name__ == "__main__":
    main(*sys.argv[1:])
