"""What one step of a model does: every operator that runs when it reads one token of each sequence, with its results.

The step runs on a twin, modules of the same tensors, whose attention is a function of ours and whose cache says what it is given.
Two steps that differ in the token, the position and the length of the cache show what is constant: a model that computes a number
from any of these in Python, and not with tensors, gives another tape, and is not served.
"""

from __future__ import annotations

import contextvars
import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsec.kernels.modules.group import Grouped
from sparsec.kv_cache import cache_argument
from sparsec.private import TorchDispatchMode
from sparsec.program.served import NotServedError

IMPLEMENTATION = "sparsec_step"
"""The name of our attention in transformers' registries."""


@dataclass(frozen=True)
class Attention:
    """One query a head over the cache of a layer."""

    layer: int
    scale: float
    cap: float  # of the scores, softly; 0: none
    window: int  # positions that it sees at most; 0: all


@dataclass(eq=False)
class Executed:
    """One operator's call, or attention."""

    target: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[Any, ...]


@dataclass(eq=False)
class Tape:
    """The calls of a step, in order."""

    ids: Tensor  # [batch, 1]
    positions: Tensor  # [batch, 1]
    calls: list[Executed] = field(default_factory=list)
    output: Any = None  # of the model's class

    @property
    def logits(self) -> Tensor:
        """[batch, 1, words]."""
        found: Tensor = self.output.logits
        return found


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, tape: Tape) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tape = tape
        self._paused = False
        self._windows: list[tuple[Tensor, int]] = []  # of each mask
        self.cached: dict[int, int] = {}  # id of keys or values -> layer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._paused:
            return out
        if func._schema.is_mutable:
            raise NotServedError(f"{func} writes in place")
        results = tuple(out) if isinstance(out, list | tuple) else (out,)
        if not any(each is given for each in results for given in args):  # what is given back as it is made no tensor
            self._tape.calls.append(Executed(str(func), tuple(args), dict(kwargs or {}), results))
        return out

    def mask(self, batch_size: int, kv_length: int, mask_function: Callable[..., Tensor], **how: Any) -> Tensor:
        """What transformers calls in the place of a mask: zeros by which attend() knows what a layer sees."""
        window = how.get("local_size")
        self._paused = True
        try:
            if not _is_window(mask_function, window):
                raise NotServedError("a layer sees neither all positions nor the last ones")
            made = torch.zeros(batch_size, 1, 1, kv_length, device="cpu")
        finally:
            self._paused = False
        self._windows.append((made, window or 0))
        return made

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        **more: Any,
    ) -> tuple[Tensor, None]:
        """What transformers calls in the place of attention."""
        kind = type(module).__name__
        layer = self.cached.get(id(key))
        if layer is None or layer != self.cached.get(id(value)):
            raise NotServedError(f"{kind} attends to keys that are not those of a cache")
        odd = [name for name, given in more.items() if isinstance(given, Tensor) and name not in ("position_ids",)]
        windows = [window for made, window in self._windows if made is mask]
        if odd or not windows:
            raise NotServedError(f"{kind} adds {', '.join(odd) or 'a mask of its own'} to its attention")
        if query.shape[2] != 1:
            raise NotServedError(f"{kind} attends with {query.shape[2]} queries")
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        out = query.new_zeros(query.shape[0], 1, query.shape[1], value.shape[-1])
        how = Attention(layer, scale, float(softcap or 0), windows[0])
        self._tape.calls.append(Executed("attend", (query, key, value, how), {}, (out,)))
        return out, None


_RECORDER: contextvars.ContextVar[_Recorder] = contextvars.ContextVar("recorder")
"""Of the step that this thread records: transformers' registries are the process's."""


def record_step(model: nn.Module, batch: int, token: int, position: int) -> Tape:
    """The tape of one step. NotServedError with the reason where there is none."""
    twin = _twin(model)
    with torch.inference_mode(False), torch.no_grad():
        tape = Tape(torch.full((batch, 1), token, device="cpu"), torch.full((batch, 1), position, device="cpu"))
        recorder = _Recorder(tape)
        given = {
            "attention_mask": torch.ones(batch, position + 1, dtype=torch.int64, device="cpu"),
            "position_ids": tape.positions,
            cache_argument(twin): _cache(twin.config, recorder, position),
        }
        with _attention(recorder), recorder:
            tape.output = twin.forward(input_ids=tape.ids, use_cache=True, **given)
    found = {name for name, value in tape.output.items() if value is not None}
    if found - {"past_key_values", "cache"} != {"logits"}:
        raise NotServedError(f"{type(model).__name__} gives {', '.join(sorted(found))}")
    return tape


def _is_window(mask_function: Callable[..., Tensor], window: int | None) -> bool:
    """Whether the last query sees all positions up to its own, or the last `window` of these."""
    size = window or 1000
    for query in (0, 1, size - 1, size, size + 1, 2 * size - 1, 2 * size + size // 2):
        keys = torch.arange(query + 1, device="cpu")
        first = torch.zeros((), dtype=torch.int64, device="cpu")
        seen = mask_function(first, first, torch.tensor(query, device="cpu"), keys).expand(query + 1)
        if not torch.equal(seen, keys > query - window if window else torch.ones_like(seen)):
            return False
    return True


def check_alike(
    first: Sequence[Executed], second: Sequence[Executed], varies: Sequence[Callable[[Tensor], bool]]
) -> None:
    """Raises NotServedError where two steps differ in what no tensor tells. varies: whether a tensor of each is computed."""
    if [call.target for call in first] != [call.target for call in second]:
        raise NotServedError("its step takes other operators at another position")
    for a, b in zip(first, second, strict=True):
        for x, y in zip(_leaves((a.args, a.kwargs)), _leaves((b.args, b.kwargs)), strict=True):
            if isinstance(x, Tensor) and isinstance(y, Tensor):
                known = varies[0](x), varies[1](y)
                same = known[0] == known[1] and (known[0] or x is y or (x.shape == y.shape and bool((x == y).all())))
            else:
                same = x == y or (x != x and y != y)
            if not same:
                raise NotServedError(f"{a.target} is given another number at another position")


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [leaf for each in value for leaf in _leaves(each)]
    if isinstance(value, dict):
        return [leaf for each in value.values() for leaf in _leaves(each)]
    return [value]


def _twin(model: nn.Module) -> Any:
    """Modules of the same tensors and of copied configurations, with our attention."""
    from transformers import PreTrainedConfig

    memo: dict[int, Any] = {}
    made: dict[int, nn.Module] = {}

    def twin(module: nn.Module) -> nn.Module:
        if id(module) in made:
            return made[id(module)]
        new: nn.Module = type(module).__new__(type(module))
        made[id(module)] = new
        held = {k: copy.deepcopy(v, memo) if isinstance(v, PreTrainedConfig) else v for k, v in vars(module).items()}
        held["_modules"] = {name: part and twin(part) for name, part in module._modules.items()}
        held["_parameters"], held["_buffers"] = dict(module._parameters), dict(module._buffers)
        held.pop("forward", None)
        if isinstance(module, Grouped):
            held["_group"] = None
        vars(new).update(held)
        return new

    found: Any = twin(model)
    for config in [c for c in memo.values() if isinstance(c, PreTrainedConfig)]:
        config._attn_implementation = IMPLEMENTATION
    return found


@contextmanager
def _attention(recorder: _Recorder) -> Iterator[None]:
    """Lets transformers find our attention and its masks under its name, and these the recorder."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, lambda *args, **kwargs: _RECORDER.get().attend(*args, **kwargs))
    AttentionMaskInterface.register(IMPLEMENTATION, lambda *args, **kwargs: _RECORDER.get().mask(*args, **kwargs))
    before = _RECORDER.set(recorder)
    try:
        yield
    finally:
        _RECORDER.reset(before)


def _cache(config: Any, recorder: _Recorder, length: int) -> Any:
    from transformers import DynamicCache

    class Recorded(DynamicCache):  # type: ignore[misc]
        """A cache of `length` positions that holds none."""

        def update(
            self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
        ) -> Sequence[Tensor]:
            recorder.cached[id(key_states)] = recorder.cached[id(value_states)] = layer_idx
            return key_states, value_states

        def get_seq_length(self, *_: Any, **__: Any) -> int:
            return length

        def get_mask_sizes(self, query_length: int, *_: Any, **__: Any) -> tuple[int, int]:
            return length + query_length, 0

    return Recorded(config=config)
