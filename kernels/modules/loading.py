"""Loading a state into packed layers: matrices that are whole and valid, or an error before anything is copied.

Kernels do not look at contents, so that a column outside the matrix would be read and written through. Why before: torch loads
module by module, and a refusal by the last one would leave the others changed. So every module above a packed layer looks first
(`guard_loading`), and a layer that is loaded by itself looks for itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsec.errors import FormatError
from sparsec.formats import kinds
from sparsec.formats.base import Packed, check_order
from sparsec.formats.seen import remember


def loadable(
    layer: str, held: Packed, bias: Tensor | None, state: Mapping[str, Any], prefix: str, assign: bool
) -> dict[str, Tensor]:
    """The packed tensors that a state has for a layer, by key; none where it has none. Copies nothing.

    held: what the layer holds. assign: as load_state_dict has it. Raises FormatError, naming layer and tensor, unless they form a
    valid matrix of the same sizes and layout.
    """
    layer = layer or "SparseLinear"
    if f"{prefix}weight" in state:
        raise FormatError(
            f"{layer}: the state has a dense weight, the layer is lowered and holds packed values; load it into the model "
            "before lowering, and extend or compile that one"
        )
    parts = held.tensors()
    given = {name: state[prefix + name] for name in parts if prefix + name in state}
    if not given:
        return {}
    faults = _missing(given, parts, state, prefix)
    if not faults:
        given, like = _in_order(given, held, assign)
        faults = [fault for name, new in given.items() if (fault := _misfit(name, new, like[name], assign))]
    new_bias = state.get(f"{prefix}bias")
    if not faults and assign and bias is not None:
        values, dtype = given["values"], type(held).from_parts(given, held.scalars()).dtype
        after = new_bias if isinstance(new_bias, Tensor) else bias
        if after.dtype != dtype or after.device != values.device:
            faults = [f"values and bias would be {dtype} on {values.device} and {after.dtype} on {after.device}"]
    if not faults and bias is not None and isinstance(new_bias, Tensor) and new_bias.shape != bias.shape:
        faults = [f"bias must be {list(bias.shape)}, got {list(new_bias.shape)}"]
    if faults:
        raise _refused(layer, held, "; ".join(faults))
    plain = {name: new.detach() for name, new in given.items()}
    if not assign:
        plain = {name: new.to(parts[name].device, parts[name].dtype) for name, new in plain.items()}
    found = type(held).from_parts(plain, held.scalars())
    faults = found.layout_faults()
    if not faults and all(type(t) is Tensor and not t.is_meta for t in plain.values()):
        faults = found.content_faults()
    if not faults and found.shape != held.shape:
        faults = [f"the matrix must be {list(held.shape)}, got {list(found.shape)}"]
    if faults:
        raise _refused(layer, held, "; ".join(faults))
    return {prefix + name: new for name, new in plain.items()}


def unpickled(state: dict[str, Any]) -> Packed:
    """The packed matrix of a layer that is copied, or comes from a pickle.

    FormatError unless it is valid, and the layer's bias fits. Takes the order of the values out of the state.
    """
    layer = state.get("path") or "SparseLinear"
    kind, order = state.get("_packed_type"), state.pop("order", 1)
    if not (isinstance(kind, type) and issubclass(kind, Packed) and kinds().get(kind.format) is kind):
        raise FormatError(f"{layer}: its pickle names {kind!r}, which is no packed format that is known")
    check_order(kind, order)
    buffers, scalars, bias = (
        state.get("_buffers", {}),
        state.get("_scalars", {}),
        state.get("_parameters", {}).get("bias"),
    )
    tensors = {name: t for name in kind.tensor_names if isinstance(t := buffers.get(name), Tensor)}
    if tuple(tensors) != kind.tensor_names or {*scalars} != {*kind.scalar_names}:
        whole = ", ".join((*kind.tensor_names, *kind.scalar_names))
        raise FormatError(f"{layer}: its pickle is not whole: {kind.format} has {whole}")
    packed = kind.from_parts(tensors, scalars)
    faults = packed.layout_faults()
    if not faults:
        packed = packed.ordered()
    plain = all(type(t) is Tensor and not t.is_meta for t in packed.tensors().values())
    if not faults and plain:
        faults = packed.content_faults()
    sizes, share = (state.get("out_features"), state.get("in_features")), state.get("share")
    if not faults and packed.shape != (sizes if share is None else share.sizes(*sizes)):
        faults = [f"the matrix is {list(packed.shape)}, and the layer another"]
    if not faults and isinstance(bias, Tensor) and (bias.shape != packed.shape[:1] or bias.dtype != packed.dtype):
        faults = [f"bias must be {packed.dtype} [{packed.shape[0]}], got {bias.dtype} {list(bias.shape)}"]
    if faults:
        raise FormatError(f"{layer}: its pickle is damaged: {'; '.join(faults)}")
    if plain:
        remember(packed)
    return packed


def _in_order(given: dict[str, Any], held: Packed, assign: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """A state, and tensors like those that it must have. Values of another floating dtype, or of a GPU, may be ordered in another
    way: they are rounded, and ordered as the layer's are; those that are assigned stay as they are, if they are a valid matrix."""
    parts, values = held.tensors(), given["values"]
    if not all(type(t) is Tensor and not t.is_meta for t in given.values()):
        return given, parts
    if values.dtype == held.values.dtype and values.shape[3:] == held.values.shape[3:]:
        return given, parts
    found = type(held).from_parts(given, held.scalars())
    if found.layout_faults() or found.content_faults():
        return given, parts
    if assign:
        return given, given
    rounded = {**given, "values": values.to(held.values.dtype)}
    return type(held).from_parts(rounded, held.scalars()).ordered(held.values.device.type).tensors(), parts


def _missing(given: Mapping[str, Any], parts: Mapping[str, Tensor], state: Mapping[str, Any], prefix: str) -> list[str]:
    missing = [name for name in parts if name not in given]
    if not missing:
        return []
    others = [key.removeprefix(prefix) for key in state if key.startswith(prefix)]
    others = [name for name in others if name not in parts and name != "bias" and "." not in name]
    also = f" (and {', '.join(others)}, as of another format)" if others else ""
    return [f"the state has {', '.join(given)}{also}, but not {', '.join(missing)}: a packed matrix is loaded whole"]


def _misfit(name: str, new: Any, old: Tensor, assign: bool) -> str:
    """Why a tensor cannot take the place of another one, whatever their contents; "" when it can."""
    if not isinstance(new, Tensor):
        return f"{name} must be a tensor, got {type(new).__name__}"
    if new.layout != torch.strided or new.is_quantized:
        return f"{name} must be a plain tensor, got {new.layout} {new.dtype}"
    if new.shape != old.shape:
        return f"{name} must be {list(old.shape)}, got {list(new.shape)}"
    if new.is_meta and not old.is_meta:
        return f"{name} is on meta, which has no contents"
    if old.is_meta and not new.is_meta and not assign:
        return f"{name} is on meta here and takes no contents, load with assign=True"
    # Values are rounded, as torch does for every weight; a column of another width would be another column.
    rounded = old.is_floating_point() and new.is_floating_point()
    return "" if new.dtype == old.dtype or rounded else f"{name} must be {old.dtype}, got {new.dtype}"


def _refused(layer: str, held: Packed, why: str) -> FormatError:
    return FormatError(
        f"{layer}: the state does not fit the packed matrix ({held.describe()} {held.shape[0]}x{held.shape[1]}): {why}; nothing of "
        "this layer was loaded; load the state into a model that was pruned and lowered in the same way, or lower again"
    )


def guard_loading(root: nn.Module, kind: type[nn.Module]) -> None:
    """Has every module above a packed layer look at the whole state before anything is loaded. kind: the class of the layers."""
    above: dict[int, nn.Module] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        if isinstance(module, kind):
            names: Sequence[str] = path.split(".")[:-1] if path else ()
            for depth in range(len(names) + 1):
                parent = root.get_submodule(".".join(names[:depth]))
                above[id(parent)] = parent
    for module in above.values():
        hooks = module._load_state_dict_pre_hooks.values()
        if not any(getattr(hook, "hook", None) is look for hook in hooks):
            module.register_load_state_dict_pre_hook(look)  # type: ignore[no-untyped-call]


def unguard_loading(root: nn.Module) -> None:
    """Takes away what `guard_loading` gave."""
    for module in root.modules():
        for key, hook in list(module._load_state_dict_pre_hooks.items()):
            if getattr(hook, "hook", None) is look:
                del module._load_state_dict_pre_hooks[key]


def look(module: nn.Module, state: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any], *_: Any) -> None:
    """Raises FormatError where a packed layer below cannot take what the state has for it."""
    for path, layer in module.named_modules(remove_duplicate=False):
        if (admit := getattr(layer, "admit", None)) is not None and path:
            admit(state, f"{prefix}{path}.", bool(metadata.get("assign_to_params_buffers", False)))
