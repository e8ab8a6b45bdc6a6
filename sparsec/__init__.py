"""sparsec: a sparsity compiler for PyTorch transformer language models.

compiled = sparsec.compile(model, passes="magnitude(0.5),freeze,sparsity,flops,fuse,lower(auto)")
compiled.generate(...)
print(compiled.sparsec.report())
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sparsec import transformers_hook

if find_spec("sparsec.passes") is None:
    raise ImportError(
        "sparsec is not installed: the installation is what maps the folders passes/ and kernels/ to sparsec.passes and "
        "sparsec.kernels; run `pip install -e .` in the checkout"
    )

if TYPE_CHECKING:
    from sparsec.checkpoint import save
    from sparsec.compiled import Compiled
    from sparsec.compiler import compile, extend
    from sparsec.defaults import DEFAULT_PASSES
    from sparsec.errors import SparsecError
    from sparsec.ir.graph import Graph
    from sparsec.ir.printer import graph_text
    from sparsec.ir.tracer import trace
    from sparsec.kernels import SparseLinear
    from sparsec.loading import load
    from sparsec.pipeline import Context, DumpIR, Effect, Pass, PassRecord, PassResult, Pipeline, PrintIR, Timing
    from sparsec.recover.callback import RegrowCallback
    from sparsec.splitting import tensor_parallel
    from sparsec.training import masked

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
    "RegrowCallback",
    "SparseLinear",
    "SparsecError",
    "Timing",
    "__version__",
    "compile",
    "extend",
    "graph_text",
    "load",
    "masked",
    "save",
    "tensor_parallel",
    "trace",
]

_HOMES = {
    "sparsec.checkpoint": ("save",),
    "sparsec.compiled": ("Compiled",),
    "sparsec.compiler": ("compile", "extend"),
    "sparsec.defaults": ("DEFAULT_PASSES",),
    "sparsec.errors": ("SparsecError",),
    "sparsec.ir.graph": ("Graph",),
    "sparsec.ir.printer": ("graph_text",),
    "sparsec.ir.tracer": ("trace",),
    "sparsec.kernels": ("SparseLinear",),
    "sparsec.loading": ("load",),
    "sparsec.pipeline": (
        *("Context", "DumpIR", "Effect", "Pass", "PassRecord", "PassResult", "Pipeline", "PrintIR", "Timing"),
    ),
    "sparsec.recover.callback": ("RegrowCallback",),
    "sparsec.splitting": ("tensor_parallel",),
    "sparsec.training": ("masked",),
}


def __getattr__(name: str) -> Any:
    """A public name or a module, imported when it is first asked for: torch takes seconds, and `sparsec --help` needs none."""
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is not None:
        globals()[name] = found = getattr(import_module(home), name)
        return found
    if name.startswith("_") or find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


transformers_hook.install()
