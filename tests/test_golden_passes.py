"""What every pass does to the IR, as whole texts: one tiny graph before and after it, in tests/golden/passes.

`pytest --refresh-goldens tests/test_golden_passes.py` writes the texts anew.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparsec.calibrate import CalibrationData
from sparsec.ir.graph import Graph
from sparsec.ir.printer import graph_text
from sparsec.ir.tracer import trace
from sparsec.kernels.library import loader
from sparsec.passes import PASSES
from sparsec.pipeline import Context, Pass, Pipeline

GOLDEN = Path(__file__).parent / "golden" / "passes"


class Net(nn.Module):
    """Two linears that read the same values, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(torch.relu(self.gate(x)) * self.up(x))
        return self.down(torch.cat([x, x], dim=-1))


@pytest.fixture(scope="module")
def traced() -> Graph:
    model = Net().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # eighths, some of them zero
        parameter.data = torch.randint(-9, 10, parameter.shape, generator=generator) / 8
    return trace(model, torch.ones(2, 4))


def text_of(graph: Graph) -> str:
    """The graph, and the masks by row."""
    masks = {w.name: graph.mask(w.name) for w in graph.masked()}
    rows = {name: ["".join("o" if kept else "." for kept in row) for row in mask] for name, mask in masks.items()}
    return graph_text(graph) + "".join(f"# mask of {name}: {' '.join(own)}\n" for name, own in rows.items())


@pytest.mark.parametrize("cls", PASSES, ids=lambda cls: cls.name)
def test_text_of_the_graph_before_and_after_a_pass(
    cls: type[Pass], traced: Graph, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    # the same on a machine with a compiler and on one without
    missing = replace(loader.status(), reason="not on this machine")
    monkeypatch.setattr(loader, "status", lambda: missing)
    x = torch.arange(16.0).reshape(4, 4) % 5 - 1
    context = Context(
        masks={"up": torch.arange(32).reshape(8, 4) % 3 > 0},
        calibration=CalibrationData(((x,), (x,)), "the example, twice"),
        dense={name: parameter.detach().clone() for name, parameter in traced.module.named_parameters()},
    )
    graph = traced.copy()
    *earlier, p = Pipeline.parse(cls.examples[0]).passes
    if earlier:
        Pipeline(tuple(earlier)).run(graph, context)
    before = text_of(graph)
    (record,) = Pipeline((p,)).run(graph, context)
    text = f"# before {record.spec}\n{before}\n# after {record.spec}\n{text_of(graph)}"
    path = GOLDEN / f"{cls.name}.txt"
    if request.config.getoption("--refresh-goldens"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.exists(), f"pytest --refresh-goldens {Path(__file__).name} writes the text of a new pass"
    assert text == path.read_text(), f"{path.name} differs; look at it, then run pytest --refresh-goldens"


def test_every_golden_is_of_a_pass() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == {cls.name for cls in PASSES}
