"""Reads a saved model: files are mapped, modules made without weights, and every packed matrix checked before a kernel reads it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsec.arguments import checked
from sparsec.checkpoint.embeddings import guard_embeddings
from sparsec.checkpoint.folder import CONFIG, read_json, read_whole, saved_report
from sparsec.checkpoint.loaded import Loaded
from sparsec.checkpoint.pretrained import guard_saving
from sparsec.checkpoint.record import BUFFERS, Record, Stored, dtype_name
from sparsec.counts import check_saved_counts
from sparsec.data.kinds import named_class
from sparsec.data.unowned import remember_unowned
from sparsec.emitter import conv1d_type
from sparsec.errors import CheckpointError, briefly, some
from sparsec.formats.base import Packed
from sparsec.formats.layout import Layout
from sparsec.formats.seen import remember
from sparsec.kernels import SparseLinear
from sparsec.kernels.modules.dense_linear import DenseLinear
from sparsec.kernels.modules.group import Group, Grouped
from sparsec.kernels.modules.loading import guard_loading
from sparsec.kernels.modules.packed_layer import PackedLayer
from sparsec.kernels.modules.sparse_embedding import SparseEmbedding, not_served
from sparsec.program.decoder import decode_natively

_NOT_OURS = frozenset(
    {"quantization_config", "auto_map"} | {f"{_}{of}_implementation" for _ in ("", "_") for of in ("attn", "experts")}
)
"""Of a config.json, what no model is made by: an implementation may be the name of code on the hub."""


@checked
def load_saved(folder: str | os.PathLike[str], *, into: nn.Module | None = None) -> nn.Module:
    """The model that `save` or `save_pretrained` wrote into a folder, on the CPU, ready to run.

    into: for a module that is not from transformers: one of the same structure as was compiled, on meta or not, which is filled.
    Files are mapped, so that memory is taken as they are read, and they must stay. Raises CheckpointError for what is missing,
    damaged or does not fit; `into` then is as it was.
    """
    place = Path(folder)
    content, record, tensors = read_whole(place)
    model = into if into is not None else empty_model(place, content, len(tensors))
    fill(model, record, tensors, str(place))
    if into is None:
        model.eval()
        if hasattr(model, "generation_config"):
            model.generation_config = generation_of(place) or model.generation_config
    say_loaded(model, record, str(place), saved_report(place, record))
    return model


def say_loaded(model: nn.Module, record: Record, place: str, report: bytes) -> None:
    """Gives a model its `.sparsec`, and the way of saving that keeps what is packed."""
    loaded = Loaded(record, place, model, report)
    object.__setattr__(model, "sparsec", loaded)
    remember_unowned(model, record.unowned)
    guard_saving(model, loaded)
    guard_embeddings(model)
    decode_natively(model)


def fill(model: nn.Module, record: Record, tensors: Mapping[str, Tensor], where: str) -> None:
    """Puts tensors into a model made for them: packed layers for dense ones, groups, dense kernels. All is checked before."""
    refuse(where, tied_faults(record, tensors) + dense_faults(record, tensors))
    named, computed = by_name(record, tensors)
    layers = {path: _packed_layer(model, path, record, named, where) for path in record.layers}
    rest = record.unpacked(named)
    refuse(where, rest_faults(model, record, rest) + joint_faults(model, record) + computed_faults(model, computed))
    for path, layer in layers.items():
        model.set_submodule(path, layer)
    put_computed(model, computed, where)
    shared: dict[int, nn.Parameter] = {}
    for name, tensor in rest.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in module._buffers:
            module._buffers[leaf] = tensor
        else:
            module._parameters[leaf] = shared.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=False))
    join(model, record)


def by_name(record: Record, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of the files by every name in the module, and apart from them the buffers that it would compute."""
    named = {n: t for n, t in tensors.items() if not n.startswith(BUFFERS)}
    named.update({name: named[first] for name, first in record.tied.items() if first in named})
    return named, {n: t for n, t in tensors.items() if n.startswith(BUFFERS)}


def tied_faults(record: Record, tensors: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with the further names of tensors."""
    return [
        f"{name} is tied to {first}, which is not in the files"
        for name, first in record.tied.items()
        if first not in tensors
    ]


def dense_faults(record: Record, tensors: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with the tensors that are not packed: one of another dtype than was saved does not go with those around it."""
    if record.dense is None:
        return []
    found = record.unpacked(tensors)
    missing, more = sorted(record.dense.keys() - found.keys()), sorted(found.keys() - record.dense.keys())
    faults = [f"{CONFIG} names {some(missing)}, not in the files"] if missing else []
    faults += [f"the files hold {some(more)}, which {CONFIG} does not name"] if more else []
    for name in found.keys() & record.dense.keys():
        if (dtype := dtype_name(found[name])) != record.dense[name]:
            faults.append(f"{name} is {dtype} in the file, and {record.dense[name]} in {CONFIG}")
    return sorted(faults)


def join(model: nn.Module, record: Record) -> None:
    """Gives linears sparsec's dense kernel, and makes groups of those whose products are one call; `joint_faults` comes before."""
    take_dense_kernels(model, record)
    make_groups(model, record.groups)


def take_dense_kernels(model: nn.Module, record: Record) -> None:
    """Gives linears sparsec's dense kernel."""
    for path in record.dense_kernels:
        model.set_submodule(path, DenseLinear(model.get_submodule(path)))  # type: ignore[arg-type]


def make_groups(model: nn.Module, groups: Iterable[tuple[str, ...]]) -> None:
    """Makes the products of modules one call, and has the model look at what is loaded into it."""
    for paths in groups:
        group = Group(len(paths))
        for i, path in enumerate(paths):
            member = model.get_submodule(path)
            assert isinstance(member, Grouped)
            member.join(group, i)
    guard_loading(model, PackedLayer)


def _packed_layer(model: nn.Module, path: str, record: Record, named: Mapping[str, Tensor], where: str) -> PackedLayer:
    stored = record.layers[path]
    try:
        old = model.get_submodule(path)
    except AttributeError as error:
        raise CheckpointError(
            f"{where}: layers names {path!r}, and {type(model).__name__} has no such module"
        ) from error
    packed, bias = stored_matrix(path, stored, named, where)
    check_shape(path, packed, old, where)
    layer = layer_for(old, path, packed, bias, where)
    layer.train(old.training)
    layer.lay_out("cpu")
    return layer


def layer_for(old: nn.Module, path: str, packed: Packed, bias: Tensor | None, where: str) -> PackedLayer:
    """The module that takes a linear's or an embedding's place. CheckpointError for an embedding whose place none can take."""
    layer: PackedLayer
    if isinstance(old, nn.Embedding):
        if reason := not_served(old):
            raise CheckpointError(f"{where}: layers names {path!r}, and no packed table can stand there: {reason}")
        layer = SparseEmbedding.of(old, packed)
    elif isinstance(old, SparseEmbedding):
        layer = old.twin(packed)
    else:
        layer = SparseLinear(packed, bias)
        layer.takes_place_of = dense_kind(old)
    layer.path = path
    return layer


def stored_matrix(
    path: str, stored: Stored, named: Mapping[str, Tensor], where: str, *, contents: bool = True
) -> tuple[Packed, Tensor | None]:
    """A packed matrix and its bias among the tensors of the files, checked, the contents of its tensors if wanted."""
    held = {}
    for name, (dtype, shape) in stored.tensors.items():
        tensor = named.get(f"{path}.{name}")
        if tensor is None:
            raise CheckpointError(f"{where}: {path}.{name} is not in the files")
        if str(tensor.dtype) != f"torch.{dtype}" or tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{where}: {path}.{name} is {tensor.dtype} {list(tensor.shape)} in the file, and {dtype} {list(shape)} in {CONFIG}"
            )
        held[name] = tensor
    packed = stored.kind.from_parts(held, stored.scalars)
    check_packed(path, stored, packed, where, contents=contents)
    bias = named.get(f"{path}.bias")
    if bool(stored.bias) != (bias is not None):
        raise CheckpointError(
            f"{where}: {path}.bias is {'not ' if bias is None else ''}in the files, against what {CONFIG} says"
        )
    if bias is not None and (bias.dtype != packed.dtype or tuple(bias.shape) != (packed.shape[0],)):
        raise CheckpointError(
            f"{where}: {path}.bias must be {packed.dtype} [{packed.shape[0]}], got {bias.dtype} {list(bias.shape)}"
        )
    return packed, bias


def check_packed(path: str, stored: Stored, packed: Packed, where: str, *, contents: bool = True) -> None:
    """CheckpointError unless it is a valid matrix, as the record has it; on meta, or unless wanted, nobody looks at contents."""
    faults = packed.layout_faults()
    if not faults and contents and not packed.values.is_meta:
        faults = packed.content_faults()
    if faults:
        raise CheckpointError(f"{where}: {path}: {'; '.join(faults)}")
    if str(Layout.of(packed)) != stored.layout:
        raise CheckpointError(f"{where}: {path} is {Layout.of(packed)}, and {CONFIG} says {stored.layout}")
    if contents:
        remember(packed)


def check_shape(path: str, packed: Packed, module: nn.Module, where: str) -> None:
    """CheckpointError unless a matrix is of a module's size."""
    shape = _matrix_shape(module)
    if shape != packed.shape:
        raise CheckpointError(
            f"{where}: {path} holds a matrix [{packed.shape[0]}, {packed.shape[1]}], and the module there is "
            f"{type(module).__name__} {list(shape) if shape else ''}"
        )


def put_computed(model: nn.Module, computed: Mapping[str, Tensor], where: str) -> None:
    """Gives a model the buffers that it would compute, by their names in the files."""
    refuse(where, computed_faults(model, computed))
    for name, tensor in computed.items():
        owner, _, leaf = name.removeprefix(BUFFERS).rpartition(".")
        module = model.get_submodule(owner)
        held = module._buffers[leaf]
        assert held is not None
        module._buffers[leaf] = tensor if held.is_meta else tensor.to(held.device)


def dense_kind(module: nn.Module) -> type[nn.Module]:
    """The class of dense layer that a linear is, or stands for."""
    return module.takes_place_of if isinstance(module, PackedLayer) else type(module)


def _matrix_shape(module: nn.Module) -> tuple[int, int] | None:
    """Of the linear map or the table that a module is, [out, in]; None for another module."""
    if isinstance(module, (nn.Linear, PackedLayer)):
        return (module.out_features, module.in_features)
    if isinstance(module, nn.Embedding):
        return (module.num_embeddings, module.embedding_dim)
    if isinstance(module, conv1d_type()):
        rows, columns = module.weight.shape  # type: ignore[misc]
        return (int(columns), int(rows))
    return None


def joint_faults(model: nn.Module, record: Record) -> list[str]:
    """What is wrong with dense kernels and groups, which must be linears, each named once."""
    modules = dict(model.named_modules(remove_duplicate=False))
    joined = Counter([*record.layers, *record.dense_kernels])
    grouped = Counter(path for paths in record.groups for path in paths)
    kind = type(model).__name__
    faults = [
        f"dense_kernels names {path!r}, which is no linear of {kind}, or packed, or named twice"
        for path in record.dense_kernels
        if not isinstance(modules.get(path), nn.Linear) or joined[path] > 1
    ]
    faults += [
        f"groups must name packed linears, each once, got {', '.join(paths)}"
        for paths in record.groups
        if len(paths) < 2 or not joined.keys() >= set(paths) or any(grouped[path] > 1 for path in paths)
    ]
    return faults


def refuse(where: str, faults: list[str]) -> None:
    """CheckpointError where there are any."""
    if faults:
        raise CheckpointError(f"{where}: {some(faults)}")


def tie(model: nn.Module, record: Record, where: str) -> None:
    """Has every further name of a tensor that is stored once hold the very tensor, or Parameter, of the first."""
    for name, first in record.tied.items():
        held = [_holder(model, path, where) for path in (name, first)]
        (places, leaf), (origins, origin) = held
        if (found := origins.get(origin)) is not None and places.get(leaf) is not found:
            places[leaf] = found


def _holder(model: nn.Module, name: str, where: str) -> tuple[dict[str, Any], str]:
    """The parameters or buffers of the module that holds a tensor, and its name there."""
    owner, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError as error:
        raise CheckpointError(f"{where}: tied names {name!r}, and {type(model).__name__} has no such module") from error
    return (module._buffers if leaf in module._buffers else module._parameters), leaf


def rest_faults(model: nn.Module, record: Record, given: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with the tensors that are not packed: lacking, left over, or of another shape or dtype than the model's."""
    inside = tuple(f"{path}." for path in record.layers)
    wanted = {n: t for n, t in model.state_dict(keep_vars=True).items() if not n.startswith(inside)}
    missing, more = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    kind = type(model).__name__
    lists = [f"{what} {some(names)}" for what, names in (("lack", missing), ("hold besides", more)) if names]
    way = "make it as the saved one was made, and give it as into= of sparsec.load, or give from_pretrained those arguments"
    faults = [f"the files {' and '.join(lists)}, for {kind}; {way}"] if lists else []
    for name in sorted(wanted.keys() & given.keys()):
        found, tensor = given[name], wanted[name]
        if tuple(tensor.shape) != tuple(found.shape):
            faults.append(f"{name} is {list(found.shape)} in the file, and {list(tensor.shape)} in {kind}")
        elif not _same_kind(found, tensor):
            faults.append(f"{name} is {found.dtype} in the file, and {tensor.dtype} in {kind}")
    return faults


def _same_kind(found: Tensor, wanted: Tensor) -> bool:
    """Whether one may stand for the other: numbers may have more or fewer bits, integers must be of one type."""
    return found.dtype == wanted.dtype or (found.is_floating_point() and wanted.is_floating_point())


def computed_faults(model: nn.Module, computed: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with the buffers that the model would compute."""
    known = dict(model.named_buffers())
    faults = []
    for key, tensor in computed.items():
        name = key.removeprefix(BUFFERS)
        if name not in known or known[name].shape != tensor.shape or not _same_kind(tensor, known[name]):
            faults.append(f"the files hold a buffer {name} {list(tensor.shape)}, which {type(model).__name__} has not")
    return faults


def empty_model(place: Path, content: Mapping[str, Any], tensors: int) -> nn.Module:
    """A model of transformers on meta. Its class comes from transformers' own tables. tensors: in the files."""
    from transformers.models.auto import CONFIG_MAPPING

    architectures = content.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or not isinstance(architectures[0], str):
        raise CheckpointError(
            f"{place / CONFIG} names no class of transformers: load(folder, into=module) fills a module that you made; "
            "a model of transformers keeps its class where it is saved by its save_pretrained"
        )
    check_saved_counts(content, str(place / CONFIG), tensors)
    try:
        # Not AutoConfig.from_pretrained, which would read the file again, after another save perhaps, and knows of remote code.
        plain = {key: value for key, value in content.items() if key not in _NOT_OURS}
        config = CONFIG_MAPPING[plain["model_type"]].from_dict(plain)
        config._name_or_path = str(place)
    except Exception as error:  # a config's own checks, which differ by model
        raise CheckpointError(
            f"{place / CONFIG} is no config of a model that transformers knows: {briefly(error)}"
        ) from error
    kind = named_class(config, architectures[0])
    if kind is None:
        raise CheckpointError(f"{place / CONFIG}: transformers has no {architectures[0]!r} for {type(config).__name__}")
    return _on_meta(kind, config, str(place / CONFIG))


def _on_meta(kind: Any, config: Any, where: str) -> nn.Module:
    """A model of a class of transformers, as that makes it before it loads."""
    try:
        with torch.device("meta"):
            made: nn.Module = kind._from_config(config)
    except Exception as error:  # whatever a config's sizes make transformers and torch raise
        raise CheckpointError(f"{where}: no {kind.__name__} can be made of it: {briefly(error)}") from error
    return made


def generation_of(place: Path) -> Any:
    """The generation config beside the model; None where there is none."""
    from transformers import GenerationConfig

    path = place / "generation_config.json"
    if not path.exists():
        return None
    content = read_json(path)
    try:
        return GenerationConfig.from_dict(content)
    except Exception as error:  # transformers' own checks
        raise CheckpointError(f"{path} is no generation config: {briefly(error)}") from error
