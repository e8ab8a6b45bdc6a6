"""The way back: a model of the same class with dense linears that hold the zeros, and a checkpoint of it that loads everywhere."""

from __future__ import annotations

import copy
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from sparsec import files
from sparsec.checkpoint.card import is_card
from sparsec.checkpoint.embeddings import unguard_embeddings
from sparsec.checkpoint.folder import CONFIG
from sparsec.checkpoint.writing import own_files, shard_bytes
from sparsec.emitter import HOOKS
from sparsec.errors import CheckpointError
from sparsec.kernels.modules.dense_linear import DenseLinear
from sparsec.kernels.modules.loading import unguard_loading
from sparsec.kernels.modules.packed_layer import PackedLayer
from sparsec.kernels.modules.sparse_embedding import SparseEmbedding
from sparsec.memory import computed
from sparsec.parallel.shares import refuse_share
from sparsec.program.decoder import decode_plainly
from sparsec.recover.holding import strip
from sparsec.transformers_hook import METHOD

Model = TypeVar("Model", bound=nn.Module)
WEIGHTS = "model.safetensors"
_SHARD = re.compile(r"model-[0-9]{5}-of-[0-9]{5}\.safetensors")
_INDEX = f"{WEIGHTS}.index.json"
_OURS = ("sparsec", "save_pretrained", "push_to_hub")
"""What sparsec leaves in a module besides its layers."""
_LOADED = (
    *("hf_quantizer", "is_quantized", "quantization_method", "_weight_conversions"),
    *("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected"),
)
"""What transformers leaves in a model that it loaded packed."""


def dense_copy(model: Model, *, share: bool = False) -> Model:
    """A copy whose packed layers are dense again, of the classes that they had, with nothing of sparsec left in it.

    Tied weights are tied, hooks and modes are kept. New weights ask for gradients if any Parameter of the model does.
    share: over the very tensors of the model, the packed ones apart: for reading.
    """
    refuse_share(model)
    memo: dict[int, Any] = dict(computed(model))
    if share:
        memo |= {id(t): t for t in (*model.parameters(), *model.buffers())}
    trained = any(p.requires_grad for p in model.parameters())
    weights: dict[tuple[int, ...], nn.Parameter] = {}
    for module in model.modules():
        if (kept := vars(module).get("sparsec")) is not None:
            memo[id(kept)] = _Gone()
        if isinstance(module, PackedLayer):
            memo[id(module)] = _unpacked(module, weights, memo, trained)
        elif type(module) is DenseLinear:
            memo[id(module)] = _plain(module, memo)
    for module in model.modules():
        if isinstance(module, (PackedLayer, DenseLinear)) and id(module) in memo:
            made = memo[id(module)]
            made.train(module.training)
            for name in HOOKS:  # once every layer is known: a hook may hold some of them
                setattr(made, name, copy.deepcopy(getattr(module, name), memo))
            made._is_full_backward_hook = module._is_full_backward_hook
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        for name in _OURS:
            vars(module).pop(name, None)
        decode_plainly(module)
        _forget_loading(module)
        unguard_embeddings(module)
    unguard_loading(twin)
    strip(twin)
    return twin


class _Gone:
    """Stands for `.sparsec` while a model is copied."""


def _unpacked(
    layer: PackedLayer, weights: dict[tuple[int, ...], nn.Parameter], memo: dict[int, Any], trained: bool
) -> Any:
    kind = layer.takes_place_of
    made: Any = kind.__new__(kind)
    nn.Module.__init__(made)
    packed = layer.packed
    stored_as_is = issubclass(kind, nn.Linear | nn.Embedding)
    key = (stored_as_is, *map(id, packed.tensors().values()))
    if key not in weights:
        with torch.no_grad():
            matrix = packed.unpack()
            weights[key] = nn.Parameter(matrix if stored_as_is else matrix.t().contiguous(), requires_grad=trained)
    made.weight = weights[key]
    if isinstance(layer, SparseEmbedding):
        layer.give_back(made, memo)
        return made
    made.bias = _own(layer.bias, memo)
    if stored_as_is:
        made.in_features, made.out_features = layer.in_features, layer.out_features
    else:  # transformers' Conv1D
        made.nx, made.nf = layer.in_features, layer.out_features
    return made


def _plain(layer: DenseLinear, memo: dict[int, Any]) -> nn.Linear:
    made = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(made)
    made.in_features, made.out_features = layer.in_features, layer.out_features
    made.weight = _own(layer.weight, memo)
    made.bias = _own(layer.bias, memo)
    return made


def _own(tensor: Tensor | None, memo: dict[int, Any]) -> Any:
    """The copy's Parameter."""
    if tensor is None or isinstance(tensor, nn.Parameter):
        return copy.deepcopy(tensor, memo)
    return nn.Parameter(tensor.detach().clone())  # one that torch.nn.utils compute from others


def _forget_loading(module: Any) -> None:
    config = getattr(vars(module).get("hf_quantizer"), "quantization_config", None)
    if getattr(config, "quant_method", None) == METHOD:
        for name in _LOADED:
            vars(module).pop(name, None)
    config = vars(module).get("config")
    said = getattr(config, "quantization_config", None)
    if getattr(said, "quant_method", None) == METHOD:
        del config.quantization_config
    if config is not None and hasattr(config, "transformers_weights"):
        del config.transformers_weights


def save_dense(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    max_shard_size: int | str = "50GB",
    **options: Any,
) -> None:
    """Saves a model as transformers saves a dense one, with its zeros. options: of transformers' own save_pretrained.

    Files are written aside and put in place, `config.json` last. What a packed model left in the folder is removed then.
    """
    if not callable(getattr(type(model), "save_pretrained", None)):
        raise CheckpointError(
            f"{type(model).__name__} is no model of transformers; for another one, torch.save the state_dict() of what "
            ".sparsec.to_dense() gives"
        )
    tensors = model.state_dict(keep_vars=True)
    if empty := next((name for name, t in tensors.items() if isinstance(t, Tensor) and t.is_meta), None):
        raise CheckpointError(
            f"{empty} is on meta, which has no contents: an offloaded model is saved once it is whole"
        )
    if any(isinstance(m, PackedLayer) for m in model.modules()):
        options.pop("state_dict", None)  # the model's own, in which no weight is dense
    size = shard_bytes(max_shard_size)
    twin: Any = dense_copy(model, share=True)
    place = Path(folder)
    try:
        _make(place)
        with files.alone_in(place):
            files.sweep(place, ".sparsec-*.tmp")
            made = place / f".sparsec-{secrets.token_hex(8)}.tmp"
            try:
                twin.save_pretrained(made, max_shard_size=size, **options)
                if tokenizer is not None and made.exists():
                    tokenizer.save_pretrained(made)
                if made.exists():
                    _put_in_place(made, place)
            finally:
                shutil.rmtree(made, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{place} could not be written: {why}; free some room or name another folder") from error


def _put_in_place(made: Path, place: Path) -> None:
    """config.json last: until then a packed model that was there before is the one that loads."""
    stale = own_files(place)
    card = place / "README.md"
    stale |= {card.name} if card.is_file() and is_card(card.read_text("utf-8", errors="replace")) else set()
    written = {path.name for path in made.iterdir()}
    if written & {WEIGHTS, _INDEX}:
        stale |= {p.name for p in place.iterdir() if p.name in (WEIGHTS, _INDEX) or _SHARD.fullmatch(p.name)}
    for path in sorted(made.iterdir(), key=lambda path: path.name == CONFIG):
        if path.is_dir():  # a tokenizer's templates
            shutil.copytree(path, place / path.name, dirs_exist_ok=True)
        else:
            files.put_in_place(path, place / path.name)
    for name in stale - written:
        (place / name).unlink(missing_ok=True)


def _make(place: Path) -> None:
    try:
        place.mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        raise CheckpointError(f"{str(place)!r}: no folder can have this name ({error}); give another") from error
