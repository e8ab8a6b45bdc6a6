"""tensor_parallel: a model that is in memory, split over the processes of torchrun as transformers' own plan says."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparsec.arguments import checked_but, shown
from sparsec.checkpoint.loaded import Loaded
from sparsec.checkpoint.reading import say_loaded
from sparsec.checkpoint.saving import Saveable
from sparsec.checkpoint.writing import describe
from sparsec.errors import ArgumentError, CheckpointError
from sparsec.kernels.modules.packed_layer import PackedLayer
from sparsec.parallel.plan import processes_wanted, split_dims
from sparsec.parallel.shares import await_shares, leave_groups, placements, processes_of, take_shares


@checked_but("distributed_config")
def tensor_parallel(model: nn.Module, distributed_config: Any = None) -> nn.Module:
    """Splits a compiled or loaded model of transformers over the processes that torchrun started; the very same model.

    Every process calls it with the same model, and keeps its own share of each matrix: of a packed one as the model's `tp_plan`
    says of the layer, of the others as transformers does. distributed_config: of transformers, with a plan of your own, say;
    default: `DistributedConfig(tp_plan="auto")`. One process keeps all.

    A saved model is better split while it is read, by `from_pretrained(folder, distributed_config=...)`: no process ever holds more
    than its share. CheckpointError, before anything is changed, for a model or a layout that cannot be split so; names the layers.
    """
    whole_model: Any = model
    if not hasattr(type(model), "maybe_distribute_model"):
        raise CheckpointError(
            f"{type(model).__name__}: tensor_parallel splits models of transformers that were compiled or loaded"
        )
    if processes_of(model) > 1:
        raise CheckpointError(f"{type(model).__name__} is split over {processes_of(model)} processes already")
    saveable: Any = vars(model).get("sparsec")
    if not isinstance(saveable, Saveable):
        raise CheckpointError(
            f"{type(model).__name__} is not a compiled model; compile it, or let transformers split it"
        )
    from transformers.distributed import DistributedConfig

    kind: Any = type(model)
    config = DistributedConfig(tp_plan="auto") if distributed_config is None else distributed_config
    if not isinstance(config, DistributedConfig):
        raise ArgumentError(
            f"tensor_parallel: distributed_config must be a DistributedConfig of transformers or None, got {shown(config)}"
        )
    config, _, meshes = kind.prepare_distribute_model(config)
    if meshes is None:
        return model
    before = getattr(whole_model.config, "distributed_config", None)
    whole_model.config.distributed_config = config
    layers = {p: m for p, m in model.named_modules(remove_duplicate=False) if isinstance(m, PackedLayer)}
    whole = {path: layer.packed for path, layer in layers.items()}
    try:
        dims = split_dims(model, whole, processes_wanted(model))
    except CheckpointError:
        whole_model.config.distributed_config = before
        raise
    history = saveable.history()
    told = Loaded(describe(model, history), "memory", model, history.report, saveable.lowered)
    await_shares(layers.values())
    tied = _untie(model)
    kind.maybe_distribute_model(model, config, meshes)
    for name, first in tied.items():
        if placements(model.get_parameter(name)) == placements(held := model.get_parameter(first)):
            _set_parameter(model, name, held)
    take_shares(model, whole, dims, copy=True)
    leave_groups(model)
    say_loaded(model, told.record, told.place, told.history().report)
    return model


def _untie(model: nn.Module) -> dict[str, str]:
    """Gives every further name of a Parameter one of its own over the same memory, since transformers makes shares by name; tells
    of which name it was."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if (known := first.setdefault(id(parameter), name)) != name:
            tied[name] = known
            _set_parameter(model, name, nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad))
    return tied


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._parameters[leaf] = parameter
