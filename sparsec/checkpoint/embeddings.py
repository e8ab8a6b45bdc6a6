"""What transformers does with embeddings and heads, where these are packed: it ties none anew, and cannot resize them."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from sparsec.errors import CompileError
from sparsec.kernels.modules.packed_layer import PackedLayer

_RESIZE = "resize_token_embeddings"
_TIES = ("_tied_weights_keys", "all_tied_weights_keys")
_BEFORE = "_sparsec_ties"
"""Where a model keeps the ties that transformers knew, for the way back."""


def guard_embeddings(model: nn.Module) -> None:
    """Has `tie_weights` leave packed layers alone, which hold the same tensors where they are tied, and resizing refuse by name."""
    for part in model.modules():
        whole: Any = part
        if not callable(getattr(type(part), "get_expanded_tied_weights_keys", None)):
            continue
        ties: dict[str, str] = whole.get_expanded_tied_weights_keys(all_submodels=False)
        left = {name: source for name, source in ties.items() if not _packed(part, name) and not _packed(part, source)}
        known: dict[str, str] = vars(part).get("all_tied_weights_keys") or {}
        if len(left) < len(ties):
            vars(part).setdefault(_BEFORE, {name: vars(part)[name] for name in _TIES if name in vars(part)})
            vars(part)["_tied_weights_keys"] = left
        if any(_packed(part, name) for pair in known.items() for name in pair):
            vars(part).setdefault(_BEFORE, {"all_tied_weights_keys": known})
            pairs = ((n, s) for n, s in known.items() if not _packed(part, n) and not _packed(part, s))
            vars(part)["all_tied_weights_keys"] = dict(pairs)
        table = _input_embeddings(whole)
        if isinstance(table, PackedLayer):
            vars(part)[_RESIZE] = partial(_refuse_resizing, type(part).__name__, table)


def unguard_embeddings(part: nn.Module) -> None:
    """Takes away what `guard_embeddings` gave one module."""
    vars(part).pop(_RESIZE, None)
    before: dict[str, Any] | None = vars(part).pop(_BEFORE, None)
    if before is not None:
        vars(part).pop("_tied_weights_keys", None)
        vars(part).update(before)


def _packed(model: nn.Module, name: str) -> bool:
    """Whether the weight of that name belongs to a packed layer."""
    try:
        return isinstance(model.get_submodule(name.rpartition(".")[0]), PackedLayer)
    except AttributeError:
        return False


def _input_embeddings(model: Any) -> Any:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # a model of pictures, say
        return None


def _refuse_resizing(
    kind: str, table: PackedLayer, new_num_tokens: int | None = None, *args: Any, **options: Any
) -> PackedLayer:
    """The table where it stays as it is. CompileError for another size."""
    multiple = args[0] if args else options.get("pad_to_multiple_of")
    rows = table.out_features
    wanted = rows if new_num_tokens is None else new_num_tokens
    if multiple:
        wanted = -(-wanted // multiple) * multiple
    if wanted == rows:
        return table
    raise CompileError(
        f"{kind}.{_RESIZE}: {table.path or 'the table'} is packed, with {rows} rows, and cannot be made {wanted}; resize the "
        "dense model and compile that one, or resize model.sparsec.to_dense()"
    )
