"""The shares of a model's packed layers: each process cuts its own out of matrices that it has mapped, or holds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from sparsec import private
from sparsec.errors import CheckpointError
from sparsec.formats.base import Packed
from sparsec.kernels.modules.group import Grouped
from sparsec.kernels.modules.packed_layer import HeldShare, PackedLayer


def await_shares(layers: Iterable[PackedLayer]) -> None:
    """Readies layers for a plan of transformers: they hold nothing until `take_shares`."""
    for layer in set(layers):
        layer.let_go()
        # How transformers knows a layer that computes on plain tensors, its share of the inputs or of the outputs.
        layer._hf_quantized_needs_local_tp = True


def take_shares(
    model: nn.Module,
    whole: Mapping[str, Packed],
    dims: Mapping[str, int | None],
    *,
    copy: bool = False,
    check: Callable[[str, Packed], None] | None = None,
) -> None:
    """Gives every packed layer the share of this process. whole: the matrices by the paths of their layers; layers of the very same
    tensors stay so. dims: as `split_dims` gives them. copy: no share keeps the whole in memory. check: looks at each share, of a
    matrix that nobody has looked at; CheckpointError for one that cannot be cut, since it is damaged."""
    rank, processes, device = private.tensor_mesh(model)
    cut: dict[tuple[int, ...], Packed] = {}
    for path, packed in whole.items():
        layer = model.get_submodule(path)
        assert isinstance(layer, PackedLayer)
        dim = dims[path]
        share = None if dim is None else HeldShare.of_rank(packed.shape, dim, rank, processes)
        key = (-1 if dim is None else dim, *map(id, packed.tensors().values()))
        if key not in cut:
            part = packed if share is None else _cut(path, packed, share)
            if check is not None:
                check(path, part)
            cut[key] = (
                part.from_parts({n: t.clone() for n, t in part.tensors().items()}, part.scalars()) if copy else part
            )
        layer.hold_share(cut[key], share)
        bias = layer._parameters["bias"]
        if bias is not None and not dim and is_split(bias):  # what is added to sums of several stays with transformers
            local: Any = bias
            layer._parameters["bias"] = nn.Parameter(local.to_local().detach(), requires_grad=bias.requires_grad)
        layer.to(device)
        layer.lay_out(layer.packed.values.device.type)


def _cut(path: str, packed: Packed, share: HeldShare) -> Packed:
    try:
        return share.cut(packed)
    except (RuntimeError, IndexError, ValueError) as error:  # of torch, where pointers point elsewhere
        raise CheckpointError(
            f"{path}: {packed.describe()} is damaged, and no share can be cut out of it: {error}"
        ) from error


def whole_groups(model: nn.Module, groups: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Those whose products are one call in this process too."""
    return [paths for paths in groups if all(_groups_here(model.get_submodule(path)) for path in paths)]


def leave_groups(model: nn.Module) -> None:
    """Takes groups apart whose members do not all give outputs of this process from packed tensors."""
    members: dict[int, list[Grouped]] = {}
    for module in model.modules():
        if isinstance(module, Grouped) and (group := module._group) is not None:
            members.setdefault(id(group), []).append(module)
    for own in members.values():
        if not all(map(_groups_here, own)):
            for member in own:
                member._group = None


def _groups_here(module: Any) -> bool:
    """Whether the product of a module may be computed with others: of plain tensors, and not one to be summed over processes."""
    if isinstance(module, PackedLayer) and module.share is not None and module.share.dim:
        return False
    return isinstance(module, Grouped) and not any(map(is_split, module._parameters.values()))


def refuse_share(model: nn.Module) -> None:
    """CheckpointError for a model of which this process holds a share."""
    if (processes := processes_of(model)) > 1:
        raise CheckpointError(
            f"{type(model).__name__} is split over {processes} processes, and this one holds a share of it; save or unpack the "
            "whole model, which sparsec.load or from_pretrained without distributed_config gives"
        )


def is_split(tensor: Tensor | None) -> bool:
    """Whether several processes hold a tensor together."""
    distributed = sys.modules.get("torch.distributed.tensor")  # nobody made one without it
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def placements(tensor: Tensor) -> tuple[Any, ...]:
    """How a tensor is split over processes; empty for one that is not."""
    held: Any = tensor
    return tuple(held.placements) if is_split(tensor) else ()


def processes_of(model: nn.Module) -> int:
    """How many processes hold a model's weights together; 1 where this one holds all."""
    shares = [m.share.processes for m in model.modules() if isinstance(m, PackedLayer) and m.share is not None]
    split: list[Any] = [p for p in model.parameters() if is_split(p)]
    return max([1, *shares, *(int(p.device_mesh.size()) for p in split)])
