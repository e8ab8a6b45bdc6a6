"""Names of torch's compiler that are no promise of torch's; as sparsec/private.py, and imported with this backend alone."""

from __future__ import annotations

import torch

from sparsec.errors import TorchVersionError
from sparsec.private import TESTED

try:
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
    from torch._inductor.exc import InductorError
    from torch._inductor.pattern_matcher import stable_topological_sort
except ImportError as error:
    raise TorchVersionError(
        f'torch.compile(backend="sparsec") does not run with torch {torch.__version__} ({error}): call the model itself, or '
        f'torch.compile(backend="inductor"); {TESTED} are tested'
    ) from error

__all__ = [
    "CustomGraphPass",
    "InductorError",
    "compile_fx",
    "get_hash_for_files",
    "list_mode_options",
    "stable_topological_sort",
]
