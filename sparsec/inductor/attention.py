"""Attention of one query per head, as in decoding, becomes an operator that reads the cache once (kernels/attention.py).

Models whose heads share keys and values copy these for every head before the attention, the whole cache at every token: the
copies are left out where there are such.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from sparsec.kernels.attention import decode_attention

aten = torch.ops.aten
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.clone.default)


def read_cache_once(graph: fx.Graph) -> None:
    """Rewrites every such attention."""
    for node in graph.find_nodes(op="call_function", target=ATTENTION):
        query, key, value = node.args[:3]
        causal = bool(node.args[4] if len(node.args) > 4 else node.kwargs.get("is_causal", False))
        dropout = node.args[3] if len(node.args) > 3 else node.kwargs.get("dropout_p", 0.0)
        mask, scale = node.kwargs.get("attn_mask"), node.kwargs.get("scale")
        sizes = _shape(query)
        # The second result, the logarithm of the sums, is for gradients; where somebody reads it, all stays.
        if (
            causal
            or dropout
            or len(sizes) != 4
            or sizes[2] != 1
            or any(user.args[1] != 0 and user.users for user in node.users)
        ):
            continue
        keys, values = _shared(key), _shared(value)
        if _shape(keys)[1:3] != _shape(values)[1:3]:
            keys, values = key, value
        if len(_shape(keys)) != 4 or len(_shape(values)) != 4:  # of a length that changes from call to call
            continue
        if mask is not None and not _fits(_shape(mask), (*sizes[:2], 1, _shape(keys)[2])):
            continue
        with graph.inserting_before(node):
            scale = sizes[3] ** -0.5 if scale is None else float(scale)
            out = graph.call_function(decode_attention, (query, keys, values, mask, scale))
        result = node.meta["val"][0]
        out.meta["val"] = result.new_empty(result.shape)
        for user in list(node.users):
            user.replace_all_uses_with(out)
            graph.erase_node(user)
        graph.erase_node(node)


def _fits(mask: tuple[int, ...], scores: tuple[int, ...]) -> bool:
    return len(mask) == 4 and all(
        m == s or (m == 1 and i < 3) for i, (m, s) in enumerate(zip(mask, scores, strict=True))
    )


def _shared(node: fx.Node) -> fx.Node:
    """[batch, shared, length, width] of which node [batch, heads, length, width] has a copy for every head, or the node itself."""
    at: Any = node
    while at.target in _VIEWS:
        at = at.args[0]
    if at.target is not aten.expand.default or len(_shape(at)) != 5:
        return node
    batch, shared, copies, length, width = _shape(at)
    source = at.args[0]
    if source.target is not aten.unsqueeze.default or source.args[1] != 2:
        return node
    found: fx.Node = source.args[0]
    fits = _shape(node) == (batch, shared * copies, length, width) and _shape(found) == (batch, shared, length, width)
    return found if fits else node


def _shape(node: Any) -> tuple[int, ...]:
    """Empty where sizes are not known."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    known = isinstance(value, Tensor) and all(isinstance(size, int) for size in value.shape)
    return tuple(value.shape) if known and isinstance(value, Tensor) else ()
