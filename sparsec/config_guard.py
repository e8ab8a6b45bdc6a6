"""Has transformers look at the counts in a saved model's config.json before it makes a config of it (counts.py).

Imported once transformers' own module is: `from_pretrained` makes configs and models of any size before it asks a quantizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from sparsec.counts import check_saved_counts
from sparsec.transformers_hook import METHOD

_read = PreTrainedConfig.get_config_dict.__func__


@wraps(_read)
def _looked_at(kind: type, place: Any, *args: Any, **options: Any) -> Any:
    found = _read(kind, place, *args, **options)
    content = found[0] if isinstance(found[0], Mapping) else {}
    for holder in (content, *content.values()):  # transformers looks for it in the config of the text too
        held = holder.get("quantization_config") if isinstance(holder, Mapping) else None
        if isinstance(held, Mapping) and held.get("quant_method") == METHOD:
            check_saved_counts(content, f"{place}: config.json", _tensors(held))
    return found


def _tensors(record: Mapping[str, Any]) -> int:
    """How many a record names; it is not yet known to be one."""
    layers = record.get("layers")
    packed = (
        [each.get("tensors") for each in layers.values() if isinstance(each, Mapping)]
        if isinstance(layers, Mapping)
        else []
    )
    named = (*packed, record.get("dense"), record.get("tied"))
    return sum(len(each) for each in named if isinstance(each, Mapping))


PreTrainedConfig.get_config_dict = classmethod(_looked_at)
