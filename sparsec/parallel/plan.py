"""What a plan of transformers says of packed layers: whose rows are split over processes, and whose columns, and what cannot be.

transformers wraps each module that its plan names: a column-wise linear gives its own outputs, a row-wise one takes its own inputs
and the results are summed, an embedding's rows are summed or gathered. It does so for a module that is marked as one that
computes on plain tensors of its own share, and that still tells the sizes of the whole. The shares are cut here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from torch import nn

from sparsec.errors import CheckpointError, some
from sparsec.formats.base import Packed
from sparsec.formats.faults import cut_faults
from sparsec.kernels.modules.packed_layer import HeldShare

STYLES: Mapping[str, int | None] = {
    "colwise": 0,
    "colwise_rep": 0,
    "colwise_gather_output": 0,
    "rowwise": 1,
    "rowwise_rep": 1,
    "rowwise_split_input": 1,
    "embedding_rowwise": 0,
    "embedding_colwise": 1,
    "replicate": None,
    "replicated_with_grad_allreduce": None,
    "mla_kv_a_proj": None,
}
"""Rules of transformers' plans that packed layers follow: which dimension of the matrix is split, None where none is."""
LEAST = "5.21"
"""Of transformers: earlier ones wrap modules in ways that know linears alone."""


def processes_wanted(model: Any) -> int:
    """Over how many processes transformers is about to split a model that it loads; 1 where it is not.

    CheckpointError for ways to split a model that packed layers cannot follow.
    """
    config = getattr(model.config, "distributed_config", None)
    if config is None:
        return 1
    odd = [
        f"{name}={size}"
        for name in ("fsdp_size", "dp_replicate_size", "pp_size", "ep_size")
        if (size := getattr(config, name, None) or 1) > 1
    ]
    if odd:
        raise CheckpointError(
            f"{type(model).__name__}: {', '.join(odd)}: a model with packed layers is split by tensor parallelism alone; give "
            "distributed_config tp_size or tp_plan='auto', and nothing else"
        )
    processes = int(getattr(config, "tp_size", None) or 1)
    if processes > 1 and importlib.util.find_spec("transformers.distributed.tensor_parallel") is None:
        from transformers import __version__

        raise CheckpointError(
            f"{type(model).__name__}: packed layers are split over processes with transformers {LEAST} or later, this is "
            f"{__version__}"
        )
    return processes


def split_dims(model: Any, layers: Mapping[str, Packed], processes: int) -> dict[str, int | None]:
    """Which dimension of each packed matrix is split, by the path of its layer; None: every process holds all of it.

    CheckpointError, naming the layers, the rule and the way out, where the plan or a layout does not allow it.
    """
    from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

    plan = _rules(model)
    dims: dict[str, int | None] = {}
    faults: list[str] = []
    for path, packed in layers.items():
        style = plan.get(replace_layer_number_by_wildcard(path), "replicate")
        if style not in STYLES:
            raise CheckpointError(
                f"{path}: the plan's rule {style!r} is for dense layers alone; keep this one dense (ignore= of the passes), or "
                "give distributed_config a tp_plan with another rule for it"
            )
        dims[path] = dim = STYLES[style]
        if dim is not None:
            faults += [f"{path}: {why}" for why in _share_faults(model, path, packed, dim, processes)]
    if faults:
        raise CheckpointError(
            f"{type(model).__name__} cannot be split over {processes} processes: {some(faults)}; take a number of processes that "
            "divides all of it, or lower these layers to a layout without blocks and groups of columns, such as bitmap"
        )
    return dims


def _rules(model: Any) -> dict[str, str]:
    """The plan of a model, with what its user gave instead, as transformers joins them."""
    given = getattr(model.config.distributed_config, "tp_plan", None)
    plan = dict(model.tp_plan or {})
    if not isinstance(given, dict):
        return plan
    return {**plan, **given} if given else {}


def _share_faults(model: nn.Module, path: str, packed: Packed, dim: int, processes: int) -> list[str]:
    """Why a matrix cannot be split so."""
    shares = [HeldShare.of_rank(packed.shape, dim, rank, processes) for rank in range(processes)]
    layout = f"{packed.describe()} [{packed.shape[0]}x{packed.shape[1]}]"
    what, step, size = "columns" if dim else "rows", packed.cut_steps[dim], packed.shape[dim]
    for share in shares:
        if faults := cut_faults(what, share.first, share.end, step, size):
            return [f"{layout}: {'; '.join(faults)}"]
    head = getattr(model.get_submodule(path.rpartition(".")[0]), "head_dim", None)
    if not dim and isinstance(head, int) and any((share.end - share.first) % head for share in shares):
        return [f"{layout}: its rows are those of {size // head} heads, which {processes} processes cannot share alike"]
    return []
