"""Counts in a config.json of transformers, held against what there is: transformers makes as many parts as are named, and looks
for their weights after. A list for 2**70 layers ends with the memory of the machine.

Found by giving the numbers of the configs of transformers 5.24 that read text, images and sound huge values, one at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from sparsec.errors import CheckpointError

MOST_PARTS = 2000
"""Layers of a model, or other parts that modules are made for."""
FEW_PARTS = 256
"""As many cost nothing to speak of: configs keep counts of parts that a small model does not have."""
_PARTS = re.compile(
    r"(?:\w+_)?(?:num|n)_(?:\w+_)?(?:layers?|blocks?|groups?|stages?|experts|codebooks|quantizers|inputs|flows)(?:_per_stack)?"
    r"|(?!max_)(?:\w+_)?layers|(?:\w+_)?depths?|(?:num_)?block_(?:sizes|repeats)|inner_group_num|attention_types"
    r"|[HL]_cycles|blocks_per_stage|n_codes_total|conv_symmetric_num|enc_res2net_scale|num_multimask_outputs"
)
_MOST = (
    (re.compile(r"num_labels"), 2**17),  # a name is made for each
    (re.compile(r"(?:\w+_)?(?:dim|hidden_size)|d_model|n_embd"), 2**24),  # some tables are computed on the CPU
    (re.compile(r"(?:\w+_)?(?:image|img)_size"), 2**14),  # a side, and a number is made for each patch
)
"""Others, and the most of each."""
_NO_PARTS = {"doge": "num_experts"}
"""By the type of a model: a number that no modules are made for; Doge's experts are rows of a table, 16,384 unless told."""


def counts_asked(content: object, parts: int) -> Iterator[tuple[str, int, int]]:
    """Of a config with all configs inside, every number that is too large: its dotted name, itself, and the most it may be.

    parts: that there may be of each kind.
    """
    parts = min(max(parts, FEW_PARTS), MOST_PARTS)
    waiting: list[tuple[str, object]] = [("", content)]
    while waiting:
        name, held = waiting.pop()
        if isinstance(held, Mapping):
            waiting += [
                (f"{name}.{key}".strip("."), value)
                for key, value in held.items()
                if key not in ("quantization_config", _NO_PARTS.get(str(held.get("model_type"))))
            ]
        elif isinstance(held, list):
            waiting += [(name, value) for value in held]
        elif type(held) is int and held > FEW_PARTS:
            leaf = name.rpartition(".")[2]
            limits = [parts] * (_PARTS.fullmatch(leaf) is not None)
            limits += [most for pattern, most in _MOST if pattern.fullmatch(leaf)]
            yield from ((name, held, most) for most in limits if held > most)


def check_saved_counts(content: Any, where: str, parts: int) -> None:
    """CheckpointError for the config.json of a saved model that asks for more than the files hold. parts: tensors in the files."""
    for name, number, most in counts_asked(content, parts):
        held = f"the files hold {parts} tensors" if most <= MOST_PARTS else f"no model has more than {most:,}"
        raise CheckpointError(f"{where}: {name} is {number}, and {held}")
