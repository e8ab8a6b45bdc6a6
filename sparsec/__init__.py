"""sparsec: a sparsity compiler for PyTorch transformer language models.

compiled = sparsec.compile(model, passes="magnitude(0.5),freeze,sparsity,flops,lower(csr)")
compiled.generate(...)
print(compiled.sparsec.report())
"""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

if find_spec("sparsec.passes") is None:
    raise ImportError(
        "sparsec is not installed: its folders passes/ and kernels/ are mapped to sparsec.passes and sparsec.kernels by the installation; "
        "run `pip install -e .` in the checkout"
    )

try:
    __version__ = version("sparsec")
except PackageNotFoundError:  # pragma: no cover - a copy put on the path by hand
    __version__ = "0+unknown"
