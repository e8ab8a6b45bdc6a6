"""What a checkpoint is loaded as: a causal language model, or an encoder, by the class of transformers that its config names.

That class keeps what stands behind an encoder's body (a masked-language-model head, a classifier), which AutoModel would drop.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sparsec.errors import DataError, some
from sparsec.ir.parts import advice, has_towers

TEXT = "input_ids"
"""What a model of text calls its main input."""


def named_class(config: Any, name: str) -> Any | None:
    """The class of this name that transformers' own tables have for a config; None where they have none."""
    from transformers.models.auto import modeling_auto

    for title, table in list(vars(modeling_auto).items()):
        if title.startswith("MODEL_") and title.endswith("MAPPING") and type(config) in table:
            found = table[type(config)]
            for kind in found if isinstance(found, tuple) else (found,):
                if kind.__name__ == name:
                    return kind
    return None


@dataclass(frozen=True)
class Kind:
    """A class of transformers that loads a checkpoint, an Auto class too, and what it is called with."""

    of: Any
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the class."""
        name: str = self.of.__name__
        return name

    def empty(self, config: Any) -> nn.Module:
        """A model of it with random weights, without any on torch's device meta."""
        auto = not isinstance(self.of, type) or not issubclass(self.of, nn.Module)
        made: nn.Module = (
            self.of.from_config(config, trust_remote_code=False)
            if auto
            else self.of._from_config(config, **self.options)
        )
        return made


def kind_of(where: str, config: Any) -> Kind:
    """What a checkpoint of this config is loaded as. DataError for an encoder-decoder."""
    import transformers
    from transformers.models.auto import modeling_auto

    names = config.architectures or []
    encodes = set(modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.values()).intersection(names)
    if config.is_encoder_decoder and not encodes:
        raise DataError(
            f"{where}: {config.model_type} is an encoder-decoder model, which nothing here can measure; from Python, load it and "
            "compile its encoder: sparsec.compile(model.get_encoder())"
        )
    if names:
        generates = bool(set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()).intersection(names))
    else:  # BERT and its kin stand in the table of causal models too
        masked = type(config) in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
        generates = type(config) in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING and not masked
    if generates:
        return Kind(transformers.AutoModelForCausalLM)
    found = next((kind for name in names if (kind := named_class(config, name)) is not None), None)
    return Kind(found or _body(config) or transformers.AutoModel)


def simpler_kinds(kind: Kind, config: Any) -> list[Kind]:
    """What to load an encoder's checkpoint as that lacks weights of `kind`: its body, and that without a pooler."""
    body = _body(config)
    if kind.name == "AutoModelForCausalLM" or body is None:
        return []
    pooled = "add_pooling_layer" in inspect.signature(body.__init__).parameters
    return [Kind(body)] * (body is not kind.of) + [Kind(body, {"add_pooling_layer": False})] * pooled


def _body(config: Any) -> Any | None:
    """The class without a head; None where transformers has none."""
    from transformers.models.auto import modeling_auto

    found = modeling_auto.MODEL_MAPPING.get(type(config), None)
    return found[0] if isinstance(found, tuple) else found


def loaded_as(kind: Kind, missing: Collection[str], model: nn.Module, left: Collection[str]) -> str:
    """In words: what a checkpoint lacks, what it was loaded as, and what of it that has no place for."""
    without = "" if kind.name != type(model).__name__ else " without these"
    return (
        f"the checkpoint lacks {len(missing)} weights of {kind.name} ({some(sorted(missing))}), so it was loaded as "
        f"{type(model).__name__}{without}"
        + (f", which leaves out {len(left)} of its tensors ({some(sorted(left))})" if left else "")
    )


def check_kind(where: str, model: nn.Module) -> None:
    """DataError for a model, on meta too, that does not read text, or not text alone."""
    if has_towers(model):
        way = advice(model) or "compile its parts"
        raise DataError(
            f"{where}: {type(model).__name__} is made of several models, and no command can measure it; from Python, {way}"
        )
    takes = getattr(model, "main_input_name", TEXT)
    if takes != TEXT:
        raise DataError(
            f"{where}: {type(model).__name__} reads {takes} and no text, so no command can measure it; from Python, "
            f"sparsec.compile(model, example_inputs={{{takes!r}: ...}}) takes it"
        )
