"""Models of several parts: which parts compile by themselves, and under what name a user finds them.

An encoder-decoder, a language model with a vision tower, two towers side by side, and whatever wraps a transformers model (a
SentenceTransformer, a module of one's own) have no single call that shows all of them to a trace.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import nn

from sparsec.ir.groups import of_peft
from sparsec.ir.names import is_plain

ENCODED = 32 * 128
"""A batch of sequences, as encoders get them."""


def is_hugging_face(model: nn.Module) -> bool:
    """Whether the model has a config and tells its output embeddings: the protocol of transformers' models."""
    return hasattr(model, "config") and callable(getattr(model, "get_output_embeddings", None))


def is_encoder(model: nn.Module) -> bool:
    """Whether it is a model of transformers that generates nothing: what it is for are the states that it gives its input."""
    generates = getattr(model, "can_generate", None)
    return is_hugging_face(model) and callable(generates) and not generates()


def usual_rows(model: nn.Module) -> int:
    """How many tokens a call of the model reads at once as it is mostly used: one where it generates, ENCODED in an encoder."""
    return ENCODED if is_encoder(model) else 1


def positions(model: nn.Module) -> int | None:
    """How many tokens a call may have; None where the model does not tell. RoBERTa and its kin count from behind the padding's."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    for path, module in model.named_modules():
        if not path.endswith("position_embeddings") or not isinstance(module, nn.Embedding):
            continue
        if module.num_embeddings == limit and module.padding_idx is not None:
            return limit - module.padding_idx - 1
    return limit


def arguments(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """What forward takes; of peft's wrappers, which hand on whatever they are given, what the model inside does."""
    inner = model
    while of_peft(inner) and (inside := inner._modules.get("base_model", inner._modules.get("model"))) is not None:
        inner = inside
    own = inspect.signature(model.forward).parameters
    handed_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in own.values())
    return {**inspect.signature(inner.forward).parameters, **own} if handed_on else own


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether it is the whole of one. Its encoder and its decoder have the same config."""
    marked = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return bool(marked) and "decoder_input_ids" in arguments(model)


def has_towers(model: nn.Module) -> bool:
    """Whether its config is made of those of several models: text and vision, say."""
    config = getattr(model, "config", None)
    towers = [name for name in getattr(config, "sub_configs", ()) if getattr(config, name, None) is not None]
    return is_hugging_face(model) and len(towers) > 1


def parts(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost transformers models inside of another module that are not made of several themselves, by path; the language
    model, or the encoder, first."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        whole = is_encoder_decoder(module) or has_towers(module)
        if path and not inside and is_hugging_face(module) and not whole:
            found[path] = module
    if is_encoder_decoder(model):
        return found
    return dict(sorted(found.items(), key=lambda part: "input_ids" not in arguments(part[1])))


def shows_itself(model: nn.Module) -> bool:
    """Whether what to call it with is known: tokens, or square images of the size that its config tells."""
    if not is_hugging_face(model):
        return False
    taken = arguments(model)
    return "input_ids" in taken or (
        "pixel_values" in taken and isinstance(getattr(model.config, "image_size", None), int)
    )


def advice(model: nn.Module) -> str:
    """How the parts are compiled, "" for a model that has none."""
    found = list(parts(model).items())
    if not found:
        return ""
    (path, first), *others = found
    more = f"; so do {', '.join(f'{as_python(p)} ({type(part).__name__})' for p, part in others)}" if others else ""
    taken = (
        ""
        if shows_itself(first)
        else f", example_inputs={{{getattr(first, 'main_input_name', 'input_ids')!r}: tensor}}"
    )
    return (
        f"its {type(first).__name__} compiles by itself: sparsec.compile({as_python(path)}{taken}, copy=False) leaves the "
        f"compiled part in its place{more}"
    )


def way_out(model: nn.Module) -> str:
    """What to do with a model that no trace follows: adapters of peft are merged, and of anything else a part is compiled."""
    if of_peft(model) and callable(getattr(model, "merge_and_unload", None)):
        return "merge its adapters first, model = model.merge_and_unload(), and compile what that gives"
    inside = advice(model)
    return "rewrite that part, or compile the submodule that holds the linear layers" + (
        f": {inside}" if inside else "."
    )


def as_python(path: str) -> str:
    """A module's path as Python: `model[0].auto_model`."""
    text = "model"
    for name in path.split("."):
        if name.isdigit():
            text += f"[{name}]"
        elif is_plain(name):
            text += f".{name}"
        else:
            text += f".get_submodule({name!r})"
    return text
