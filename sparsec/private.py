"""Names of torch that are no promise of torch's, in one place: nobody else in sparsec names one.

What sparsec cannot do without is looked up when it is imported, and an error says which torch it was and which are tested. What
makes something faster or quieter is looked up when it is wanted; where it is missing, `absent()` says what that costs. Names of
torch's compiler: sparsec/inductor/names.py.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from sparsec.errors import TorchVersionError

TESTED = "torch 2.11 to 2.13"

try:
    from torch._C import (
        DisableTorchFunctionSubclass,
        DispatchKey,
        DispatchKeySet,
    )
    from torch._C import _AutoDispatchBelowAutograd as below_autograd
    from torch._C import _dispatch_has_kernel_for_dispatch_key as has_kernel
    from torch._C import _ExcludeDispatchKeyGuard as without_keys
    from torch._C import _is_any_autocast_enabled as any_autocast
    from torch._C import _len_torch_dispatch_stack as dispatch_modes
    from torch._C import _storage_Use_Count as storage_users
    from torch._C._functorch import is_functorch_wrapped_tensor, peek_interpreter_stack
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack as no_transforms
    from torch._ops import HigherOrderOperator, OpOverload
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.modules.module import _has_any_global_hook as global_hooks
    from torch.utils import _pytree as pytree
    from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
    from torch.utils._python_dispatch import _disable_current_modes as no_modes

    same_kind = torch._has_compatible_shallow_copy_type
except (ImportError, AttributeError) as error:
    raise TorchVersionError(
        f"sparsec does not run with torch {torch.__version__} ({error}); {TESTED} are tested: install one of them, or a newer "
        "sparsec"
    ) from error

OPTIONAL = {
    "torch.export._trace": "where a trace fails, torch prints what there was of the graph",
    "torch.fx._lazy_graph_module._use_lazy_graph_module": "tracing takes longer: code is written for every graph in between",
    "torch.fx.config.do_not_emit_stack_traces": "tracing takes longer: every node keeps the stack it came from",
    "torch.fx.graph._format_target": "a model with modules called by keywords of Python is not traced",
    "torch._cslt_compress": "2:4 weights are expanded for many rows of x on a GPU",
    "torch._cslt_sparse_mm": "2:4 weights are expanded for many rows of x on a GPU",
    "torch._C._cusparselt.mm_search": "cuSPARSELt takes its first algorithm, which may not be the fastest",
    "torch._dynamo.config": "sparsec bench --compile cannot compile many variants of one model",
}
"""What a missing one costs."""


def optional(path: str) -> Any:
    """A name of OPTIONAL; None where this torch has none."""
    assert path in OPTIONAL, path
    module, _, name = path.rpartition(".")
    try:
        held = importlib.import_module(module)
        return getattr(held, name) if hasattr(held, name) else importlib.import_module(path)
    except ImportError:  # built into torch, or not there
        built_in: Any = torch
        return functools.reduce(lambda held, part: getattr(held, part, None), path.split(".")[1:], built_in)


def absent() -> list[str]:
    """What this torch lacks, and what that costs. Imports all of it, which takes seconds."""
    wanted = {path: cost for path, cost in OPTIONAL.items() if torch.version.cuda is not None or "_cus" not in path}
    return [
        f"torch {torch.__version__} has no {path}: {cost}" for path, cost in wanted.items() if optional(path) is None
    ]


def tensor_mesh(model: Any) -> tuple[int, int, torch.device]:
    """Of a model that transformers split over processes: the number of this one, how many there are, and its device."""
    mesh = model._mesh_manager.get_mesh("tp")
    device = (
        torch.device("cpu")
        if mesh.device_type == "cpu"
        else torch.device(mesh.device_type, torch.accelerator.current_device_index())
    )
    return int(mesh.get_local_rank()), int(mesh.size()), device


def holders(tensor: torch.Tensor) -> int:
    """How many tensors hold the memory of one, itself among them."""
    storage = tensor.untyped_storage()
    return int(storage_users(storage._cdata)) - 1  # the storage itself is one


__all__ = [
    "DisableTorchFunctionSubclass",
    "DispatchKey",
    "DispatchKeySet",
    "FakeTensorMode",
    "HigherOrderOperator",
    "OpOverload",
    "TorchDispatchMode",
    "absent",
    "any_autocast",
    "below_autograd",
    "dispatch_modes",
    "global_hooks",
    "has_kernel",
    "holders",
    "is_functorch_wrapped_tensor",
    "is_traceable_wrapper_subclass",
    "no_modes",
    "no_transforms",
    "optional",
    "peek_interpreter_stack",
    "pytree",
    "same_kind",
    "tensor_mesh",
    "without_keys",
]
