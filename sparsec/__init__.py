"""sparsec: a sparsity compiler for PyTorch transformer language models.

compiled = sparsec.compile(model, passes="magnitude(0.5),freeze,sparsity,flops,fuse,lower(auto)")
compiled.generate(...)
print(compiled.sparsec.report())
"""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

if find_spec("sparsec.passes") is None:
    raise ImportError(
        "sparsec is not installed: the installation is what maps the folders passes/ and kernels/ to sparsec.passes and "
        "sparsec.kernels; run `pip install -e .` in the checkout"
    )

from sparsec.compiler import DEFAULT_PASSES, Compiled, compile, extend
from sparsec.errors import SparsecError
from sparsec.ir.graph import Graph
from sparsec.ir.printer import graph_text
from sparsec.ir.tracer import trace
from sparsec.kernels import SparseLinear
from sparsec.pipeline import Context, DumpIR, Effect, Pass, PassRecord, PassResult, Pipeline, PrintIR, Timing

try:
    __version__ = version("sparsec")
except PackageNotFoundError:  # pragma: no cover - a copy put on the path by hand
    __version__ = "0+unknown"

__all__ = [
    "DEFAULT_PASSES",
    "Compiled",
    "Context",
    "DumpIR",
    "Effect",
    "Graph",
    "Pass",
    "PassRecord",
    "PassResult",
    "Pipeline",
    "PrintIR",
    "SparseLinear",
    "SparsecError",
    "Timing",
    "__version__",
    "compile",
    "extend",
    "graph_text",
    "trace",
]
