"""A device that is not the CPU, on machines with none: its tensors lie on the CPU, and mixing the two is an error as on a GPU.

    python tests/other_device.py PASSES ...

compiles a small model there and on the CPU, and holds the two to each other. A script and not a fixture, since torch knows a device
for as long as a process lives.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

DEVICE = "elsewhere"
_setup_privateuseone_for_python_backend(DEVICE)


class There(torch.Tensor):
    """A tensor on the device; `here` has its contents."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        layout = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, here.shape, device=f"{DEVICE}:0", **layout)

    def __init__(self, here: Tensor) -> None:
        self.here = here

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["here"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *rest: Any) -> There:
        return There(inner["here"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """While it is on, tensors can be made on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})


def call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operator on what tensors of the device have; its results are there, where the arguments or device= say so."""
    leaves = pytree.tree_leaves((args, kwargs))
    there = [t for t in leaves if isinstance(t, There)]
    here = [t for t in leaves if isinstance(t, Tensor) and not isinstance(t, There)]
    wanted, name = kwargs.get("device"), func.name()
    goes_there = bool(there) if wanted is None else torch.device(wanted).type == DEVICE
    if name == "aten::copy_":
        goes_there = isinstance(args[0], There)
    elif (
        wanted is None and there and not name.startswith(("aten::index", "aten::_index")) and any(t.dim() for t in here)
    ):
        raise RuntimeError(f"{name} takes tensors of two devices: {[tuple(t.shape) for t in here]} are on the CPU")
    if goes_there and wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = pytree.tree_map(lambda t: t.here if isinstance(t, There) else t, (args, kwargs))
    same = {id(t.here): t for t in there}

    def placed(t: Any) -> Any:
        if not isinstance(t, Tensor) or isinstance(t, There):
            return t
        if id(t) in same:  # what was written in place is the very tensor
            return same[id(t)]
        return There(t) if goes_there else t

    return pytree.tree_map(placed, func(*args, **kwargs))


# What torch calls in C++ to make a tensor on a device, below the modes.
_LIBRARY = torch.library.Library("aten", "IMPL")
_LIBRARY.impl(
    "empty.memory_format", lambda size, *, dtype=None, **rest: There(torch.empty(size, dtype=dtype)), "PrivateUse1"
)
_LIBRARY.impl(
    "empty_strided",
    lambda size, stride, *, dtype=None, **rest: There(torch.empty_strided(size, stride, dtype=dtype)),
    "PrivateUse1",
)


def moved(model: nn.Module) -> nn.Module:
    """The model with all its tensors on the device; tied ones stay tied."""
    known: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fresh = nn.Parameter(There(parameter.data), requires_grad=False)
                module._parameters[name] = known.setdefault(id(parameter), fresh)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = There(buffer)
    return model


def main(specs: list[str]) -> None:
    """Raises where a tensor is on the wrong device, and where the device changes a result."""
    from architectures import tiny_model

    import sparsec

    generator = torch.Generator().manual_seed(0)
    ids, text = (torch.randint(0, 64, size, generator=generator) for size in ((2, 8), (6, 24)))
    for spec in specs:
        learns = (
            {"calibration": text} if any(name in spec for name in ("wanda", "sparsegpt", "admm", "sensitivity")) else {}
        )
        with torch.no_grad():
            expected = sparsec.compile(tiny_model("llama-tied")[0], passes=spec, **learns)(ids, use_cache=False).logits
            with Device():
                compiled = sparsec.compile(moved(tiny_model("llama-tied")[0]), passes=spec, **learns)
                found = compiled(There(ids), use_cache=False).logits
                again = compiled.sparsec.graph.run(There(ids), There(torch.ones_like(ids)))
        formats = {w.packed.describe() for w in compiled.sparsec.graph.weights.values() if w.packed is not None}
        assert found.device.type == DEVICE
        # What a layer of so small a model does to its outputs is hardly more than rounding, which differs with the kernels.
        near = {"atol": 0.1, "rtol": 0.1} if "sensitivity" in spec else {}
        torch.testing.assert_close(found.here, expected, **near)
        torch.testing.assert_close(pytree.tree_leaves(again)[0].here, found.here)
        print(f"{spec}: {', '.join(sorted(formats))}")
    with torch.no_grad():
        pruned = sparsec.compile(tiny_model("llama-tied")[0], passes="magnitude(0.5),freeze")
        expected = pruned(ids, use_cache=False).logits
        with Device():
            # Regression: masks stayed behind, and nobody could move them.
            extended = sparsec.extend(moved(pruned), "lower(csr)")
            torch.testing.assert_close(extended(There(ids), use_cache=False).logits.here, expected)
    print("extend: a model that was moved after it was pruned")


if __name__ == "__main__":
    main(sys.argv[1:])
