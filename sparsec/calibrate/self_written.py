"""Text that a model writes itself, to calibrate on where there is no other: sampled from the model's own distribution.

Data-free calibration as in LLM-QAT (Liu et al. 2023, arXiv:2305.17888): each sequence begins with a token drawn at random from the
vocabulary, which makes sequences differ, and goes on by sampling at temperature 1. What was written is kept in the user's cache
folder, by everything that it depends on.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsec import cache, files
from sparsec.arguments import check_seed, checked
from sparsec.calibrate.sequences import MOST
from sparsec.data.quiet import quiet
from sparsec.data.tokens import NOTHING, beginning
from sparsec.defaults import CALIBRATION_LENGTH, CALIBRATION_SEQUENCES
from sparsec.errors import CacheError, DataError, SparsecWarning, briefly
from sparsec.ir.parts import is_encoder, is_encoder_decoder, is_hugging_face
from sparsec.progress import Progress

SELF = "self"
"""What users give in the place of a text."""
_STAGE = "writing text to calibrate on"
_TOKENS_AT_ONCE = 32 * 1024
_LAYOUT = b"sparsec own text 1"  # of what is kept; a change takes the next number
_WAY_OUT = "give calibration= a text file, or token ids"


@checked
def own_text(
    model: nn.Module,
    tokenizer: Any = None,
    sequences: int = CALIBRATION_SEQUENCES,
    length: int | None = None,
    seed: int = 0,
    limit: int | None = None,
    bos: bool = True,
    progress: Progress | None = None,
) -> tuple[Tensor, str]:
    """Token ids [sequences, length] that a causal language model writes, and in words where they come from.

    tokenizer: first tokens are drawn from its vocabulary without special tokens, after the BOS where it begins texts with one;
    without one they are drawn from the model's vocabulary. length: None takes 1024, or what the model takes (`limit`) if that is
    less. An end of text is a token like others: the model goes on behind it. The same arguments give the same ids on one machine.

    The random state of torch, the model's mode and its generation settings stay what they were. Raises DataError for a model that
    generates no text, and for sizes that are none.
    """
    _refuse(model)
    length = min(CALIBRATION_LENGTH, limit or CALIBRATION_LENGTH) if length is None else length
    if limit is not None and length > limit:
        raise DataError(f"calibration length {length} is more than the model's {limit} positions; take {limit} or less")
    start = NOTHING if tokenizer is None else beginning(tokenizer, bos)
    if sequences < 1 or length < len(start) + 2:
        raise DataError(
            f"calibration needs at least 1 sequence of at least {len(start) + 2} tokens, got {sequences!r} of {length!r}; take more"
        )
    if sequences * length > MOST:
        raise DataError(
            f"calibration='self' writes at most {MOST:,} tokens, got {sequences!r} sequences of {length!r}; some ten thousand are "
            "enough"
        )
    generator = torch.Generator().manual_seed(check_seed(seed))
    known = _first_tokens(model, tokenizer)
    first = known[torch.randint(len(known), (sequences, 1), generator=generator)]
    starts = torch.cat((torch.tensor(start.ids, dtype=torch.int64).expand(sequences, -1), first), dim=1)
    name = _name(model, starts, length, seed)
    ids = _kept(name, sequences, length)
    if ids is None:
        ids = _written(model, starts, length, seed, progress)
        _keep(name, ids)
    digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]
    source = (
        f"{sequences} sequences of {length} tokens that the model wrote itself (sampled at temperature 1 after a random first "
        f"token, sha256 {digest}, seed {seed})"
    )
    return ids, f"{source}, {start.protocol}" if start.ids else source


def _refuse(model: nn.Module) -> None:
    kind = type(model).__name__
    if is_encoder(model) or is_encoder_decoder(model):
        what = "encodes text and writes none" if is_encoder(model) else "answers a text and writes none by itself"
        raise DataError(f"calibration='self': a {kind} {what}; {_WAY_OUT}")
    if not is_hugging_face(model) or not callable(getattr(model, "generate", None)):
        raise DataError(
            f"calibration='self' is for language models of transformers, whose generate writes, and a {kind} is none; give "
            "calibration= what the model is called with"
        )


def _first_tokens(model: Any, tokenizer: Any) -> Tensor:
    """Ids that a text may begin with: int64, in order."""
    table = model.get_input_embeddings().weight.shape[0]
    special = {getattr(model.config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    known: set[int] = set(range(table))
    if tokenizer is not None:
        if callable(getattr(tokenizer, "get_vocab", None)):
            known &= set(tokenizer.get_vocab().values())
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special |= {*getattr(tokenizer, "all_special_ids", ()), *(i for i, token in added.items() if token.special)}
    flat = {i for each in special for i in (each if isinstance(each, list | tuple) else (each,))}
    found = sorted(known - flat) or sorted(known) or [0]
    return torch.tensor(found, dtype=torch.int64)


def _written(model: Any, starts: Tensor, length: int, seed: int, progress: Progress | None) -> Tensor:
    """int64 [sequences, length], a few sequences at a time."""
    device = next(model.parameters()).device
    total = starts.shape[0] * (length - starts.shape[1])
    rows: list[Tensor] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), _ready(model), quiet():
        torch.manual_seed(seed)
        for batch in torch.split(starts, max(1, _TOKENS_AT_ONCE // length)):
            tell = partial(_tell, progress, sum(map(len, rows)) * (length - starts.shape[1]), starts.shape[1], total)
            rows.append(_sampled(model, batch.to(device), length, tell))
    return torch.cat(rows)


@torch.no_grad()
def _sampled(model: Any, ids: Tensor, length: int, tell: Callable[..., Tensor]) -> Tensor:
    """tell: called with all tokens after each new one."""
    try:
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=length - ids.shape[1],
            stopping_criteria=[tell],
        )
    except (RuntimeError, ValueError, TypeError) as error:
        raise DataError(
            f"calibration='self': the {type(model).__name__} cannot write {len(ids)} sequences of {length} tokens "
            f"({briefly(error)}); take fewer or shorter ones, or {_WAY_OUT}"
        ) from error
    return found.to("cpu", torch.int64)  # type: ignore[no-any-return]


def _tell(progress: Progress | None, before: int, start: int, total: int, ids: Tensor, *_: Any, **__: Any) -> Tensor:
    """What `generate` asks after every token: which sequences are at their end. None is before its length."""
    if progress is not None:
        progress(_STAGE, before + len(ids) * (ids.shape[1] - start), total)
    return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


@contextmanager
def _ready(model: nn.Module) -> Iterator[None]:
    """In eval mode, and with settings that only sample: a model's own may penalise, cut off or end a text."""
    from transformers import GenerationConfig

    modes = [(module, module.training) for module in model.modules()]
    settings = [
        (module, vars(module)["generation_config"]) for module, _ in modes if "generation_config" in vars(module)
    ]
    plain = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0)
    model.eval()
    try:
        for module, _ in settings:
            vars(module)["generation_config"] = plain
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module, own in settings:
            vars(module)["generation_config"] = own


def _name(model: Any, starts: Tensor, length: int, seed: int) -> str:
    """Of everything that a text depends on, as far as anybody can tell before it is written."""
    import transformers

    found = hashlib.sha256(_LAYOUT)
    facts = (
        *(torch.__version__, transformers.__version__, type(model).__name__, model.config.to_json_string()),
        *(length, seed, list(starts.shape), next(model.parameters()).device.type),
    )
    found.update(repr(facts).encode())
    found.update(starts.numpy().tobytes())
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]


def _kept(name: str, sequences: int, length: int) -> Tensor | None:
    """What was written before; None where nothing was, or it is damaged."""
    try:
        data = (cache.folder("texts") / name).read_bytes()
    except (OSError, CacheError):
        return None
    digest, ids = data[:32], data[32:]
    if len(ids) != 4 * sequences * length or hashlib.sha256(ids).digest() != digest:
        return None
    return torch.from_numpy(np.frombuffer(ids, dtype="<i4").astype(np.int64)).view(sequences, length)


def _keep(name: str, ids: Tensor) -> None:
    data = ids.numpy().astype("<i4").tobytes()
    try:
        files.write(cache.folder("texts") / name, hashlib.sha256(data).digest() + data)
    except (OSError, CacheError) as error:
        warnings.warn(
            f"the text that the model wrote is not kept for the next time: {briefly(error)}",
            SparsecWarning,
            stacklevel=4,
        )
