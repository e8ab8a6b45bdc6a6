"""Lets a model's forward run a program where it is asked for one more token, and its own code everywhere else.

The program serves a call that gives just tokens [batch, 1], positions, a mask of two dimensions and a growing cache, with
gradients off, on a CPU, while the model is what the program was made from: the same modules, tensors and no hooks. All of that is
asked at every call; whatever else is wanted runs as the model's own code does, on the same cache.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from sparsec import private
from sparsec.errors import SparsecError
from sparsec.kernels.derivatives import transformed
from sparsec.kernels.library.loader import has_native
from sparsec.kernels.program import NAME, Program
from sparsec.kv_cache import cache_argument
from sparsec.parallel.shares import processes_of
from sparsec.program.operators import OPERATORS
from sparsec.program.served import NotServedError
from sparsec.program.standing import AsItStood
from sparsec.program.tape import check_alike, record_step
from sparsec.program.writer import Writer, Written
from sparsec.reference import ModelReference

BATCH = 8
"""Sequences at most; beyond, the model's own code runs."""
WRAPPED = "_old_forward"
"""Where accelerate keeps the forward that its hooks stand around."""
_IGNORED = frozenset(("use_cache", "return_dict", "output_attentions", "output_hidden_states", "logits_to_keep"))
_ATTENTIONS = {"eager", "sdpa"}
"""Names of transformers whose attention is that of a program."""
_PROBES = ((0, 3), (1, 7))
"""Tokens and positions of the two steps that are recorded."""


def decode_natively(model: nn.Module) -> None:
    """Lets a causal model of transformers decode by programs: its `forward` asks for one first. Other models stay as they are."""
    own = vars(model)
    if not decodes(model):
        return
    if "forward" not in own:
        object.__setattr__(model, "forward", StepForward(model))
    elif getattr(own.get(WRAPPED), "__func__", None) is type(model).forward:
        object.__setattr__(model, WRAPPED, StepForward(model))


def decode_plainly(model: nn.Module) -> None:
    """Takes that back."""
    own = vars(model)
    if isinstance(own.get("forward"), StepForward):
        del own["forward"]
    if isinstance(own.get(WRAPPED), StepForward):
        object.__setattr__(model, WRAPPED, MethodType(type(model).forward, model))


def decodes(model: nn.Module) -> bool:
    """Whether a model writes text with a cache."""
    can = getattr(model, "can_generate", None)
    return callable(can) and bool(can()) and not getattr(model.config, "is_encoder_decoder", False)


def write_program(model: nn.Module, batch: int) -> tuple[Written, Any]:
    """The program of one step of a model, and the model's kind of output. NotServedError names what stood in the way."""
    names = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
    tapes = [record_step(model, batch, token, position) for token, position in _PROBES]
    writers = [Writer(tape, names, OPERATORS) for tape in tapes]
    first, second = (w.needed() for w in writers)
    check_alike(first, second, [w.varies for w in writers])
    return writers[0].write(), type(tapes[0].output)


class StepForward:
    """Stands as the `forward` of a model."""

    def __init__(self, model: nn.Module) -> None:
        self._take(model)

    def _take(self, model: nn.Module) -> None:
        self._model = ModelReference(model)
        self._kind = type(model)
        own = inspect.signature(self._kind.forward)
        self.__signature__ = own.replace(parameters=list(own.parameters.values())[1:])
        self.__name__ = "forward"
        self.__code__ = getattr(self._kind.forward, "__code__", None)  # torch.export names its inputs after it
        self._first = next(iter(self.__signature__.parameters), "")
        self._indexes: bool | None = None  # as long as nobody has asked: in a copy the parts come later
        self._cache = cache_argument(self._kind)
        self._programs: dict[tuple[int, int], _Prepared | _Refused] = {}
        self._lock = threading.Lock()
        self._said: set[str] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self._model()
        if not self._model.knows_parts:  # of a copy or a pickle, whose parts came after this
            self._model = ModelReference(model)
        found = self._step(model, args, kwargs)
        return self._kind.forward(model, *args, **self._by_index(model, args, kwargs)) if found is None else found

    def __deepcopy__(self, memo: dict[int, Any]) -> StepForward:
        model = self._model()
        return StepForward(memo.get(id(model), model))

    def __reduce__(self) -> tuple[Any, ...]:
        return StepForward.__new__, (StepForward,), {"model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._take(state["model"])

    def __repr__(self) -> str:
        return f"<forward of {self._kind.__name__}, a program where it decodes>"

    def reason(self, batch: int = 1) -> str:
        """Why steps of so many sequences run as the model's own code; "" where a program serves them. Prepares it."""
        found = self._prepared(self._model(), batch)
        return found.reason if isinstance(found, _Refused) else ""

    def prepared(self, batch: int = 1) -> _Prepared | None:
        """The program of so many sequences, prepared now if it is not yet; None where there is none."""
        found = self._prepared(self._model(), batch)
        return None if isinstance(found, _Refused) else found

    def _by_index(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Asks for the last position's logits by index in the place of a slice: the same numbers in a tensor of its own.

        For a slice of a frozen head torch takes a product of batches, which in bf16 copies the whole head first: 40 ms of a
        prompt of SmolLM2.
        """
        ids = args[0] if args else kwargs.get(self._first)
        if type(kwargs.get("logits_to_keep")) is not int or kwargs["logits_to_keep"] != 1:
            return kwargs
        if (
            type(ids) is not Tensor
            or ids.device.type != "cpu"
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
        ):
            return kwargs
        if self._indexes is None:
            self._indexes = self._takes_indices(model)
        return {**kwargs, "logits_to_keep": _LAST} if self._indexes else kwargs

    def _takes_indices(self, model: nn.Module) -> bool:
        """Not where a part of the model is told too, which may look for a number."""
        kept = self.__signature__.parameters.get("logits_to_keep")
        inside = {type(module).forward for module in model.modules() if module is not model}
        told = any("logits_to_keep" in inspect.signature(each).parameters for each in inside)
        return kept is not None and "Tensor" in str(kept.annotation) and not told

    # ---- one call ---------------------------------------------------------------------------------------------------------------

    def _step(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of a step; None for a call that the model's own code has to run."""
        given = {name: value for name, value in kwargs.items() if value is not None}
        if len(args) == 1 and self._first not in given:
            given[self._first] = args[0]
        elif args:
            return None
        ids, cache = given.pop("input_ids", None), given.pop("past_key_values", given.pop("cache", None))
        if (
            cache is None
            or type(ids) is not Tensor
            or ids.ndim != 2
            or ids.shape[1] != 1
            or not 0 < ids.shape[0] <= BATCH
        ):
            return None
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or transformed() or model.training:
            return None
        if private.any_autocast() or private.dispatch_modes():
            return None
        if not has_native(NAME) and not _load():
            return None
        mask, positions = given.pop("attention_mask", None), given.pop("position_ids", None)
        place = given.pop("cache_position", None)
        if not self._plain(model, given) or ids.device.type != "cpu" or ids.dtype != torch.int64:
            return None
        from sparsec.program.slabs import slabs_of

        layers = slabs_of(cache)
        prepared = self._prepared(model, ids.shape[0]) if layers else None
        if not isinstance(prepared, _Prepared) or layers is None:
            return None
        length = cache.get_seq_length()
        begins = prepared.next != (id(cache), length)
        if begins and not prepared.same_numbers():
            self._programs.clear()
            prepared = self._prepared(model, ids.shape[0])
        if not isinstance(prepared, _Prepared) or self._hooked(prepared, begins):
            return None
        if place is not None and place.tolist() != [length]:
            return None
        seen = _mask(mask, ids.shape[0], length)
        at = _positions(positions, ids.shape[0], length, seen)
        if seen is None or at is None:
            return None
        given_mask = seen if seen.numel() else None
        out = prepared.run(ids, at, given_mask, layers)
        prepared.next = (id(cache), length + 1)
        if out is None and not prepared.held():  # a tensor has moved
            again = self._prepared(model, ids.shape[0])
            out = again.run(ids, at, given_mask, layers) if isinstance(again, _Prepared) else None
        return None if out is None else prepared.output(**{"logits": out, self._cache: cache})

    def _plain(self, model: Any, given: dict[str, Any]) -> bool:
        """Whether what else a call asks for is what a program gives."""
        config = model.config
        if given.keys() - _IGNORED or not given.get("use_cache", getattr(config, "use_cache", True)):
            return False
        if not given.get("return_dict", getattr(config, "return_dict", True)):
            return False
        odd = [given.get(name, getattr(config, name, False)) for name in ("output_attentions", "output_hidden_states")]
        return not any(odd) and type(given.get("logits_to_keep", 0)) is int and given.get("logits_to_keep", 0) in (0, 1)

    def _hooked(self, prepared: _Prepared, begins: bool) -> bool:
        """Whether the model has hooks inside, which is said once. begins: whether a text begins, or goes on elsewhere.

        A forward that somebody put into a module, and parts in training, are looked for there alone: to ask all modules takes a
        tenth of a millisecond, as long as attention in four layers.
        """
        if not prepared.hooked(begins):
            return False
        self._say(
            f"{self._kind.__name__} has forward hooks inside, or forwards that somebody put there, which no program calls: it "
            "decodes by its own code"
        )
        return True

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            warnings.warn(f"sparsec: {text}", RuntimeWarning, stacklevel=5)

    def _prepared(self, model: nn.Module, batch: int) -> _Prepared | _Refused:
        key = batch, torch.get_num_threads()  # a program is cut for so many
        found = self._programs.get(key)
        if found is None or not found.held():
            with self._lock:
                found = self._programs.get(key)
                if found is None or not found.held():
                    found = self._programs[key] = _prepare(model, batch)
        return found


def _load() -> bool:
    from sparsec.kernels.library.loader import status

    return status().built


def _prepare(model: nn.Module, batch: int) -> _Prepared | _Refused:
    """A program, or why there is none. What it depends on is read first, so that a change meanwhile is seen."""
    holding = AsItStood(model)
    found = _made(model, batch, holding)
    return _Refused(holding, found) if isinstance(found, str) else found


def _made(model: nn.Module, batch: int, holding: AsItStood) -> _Prepared | str:
    if (processes := processes_of(model)) > 1:
        return f"{processes} processes hold its weights, and no program sums what they compute"
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        return "weights of it are offloaded, and come at every call"
    if holding.patched():
        return "it is in training, or a module inside has a forward of its own"
    device = {t.device.type for t in (*model.parameters(), *model.buffers())}
    if device - {"cpu"}:
        return f"it is on {', '.join(sorted(device))}"
    own = f"{type(model).__name__} computes attention in a way of its own"
    if not getattr(model, "_supports_attention_backend", False):
        return own
    if odd := set(holding.attentions()) - _ATTENTIONS:
        return f"{own}, {', '.join(sorted(map(str, odd)))}"
    if not has_native(NAME) and not _load():
        return "there are no native kernels"
    try:
        written, output = write_program(model, batch)
        program = Program(written.tensors, batch, written.code, written.constants, written.result)
    except NotServedError as reason:
        return str(reason)
    except (
        SparsecError,
        RuntimeError,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        IndexError,
        AssertionError,
    ) as error:
        return f"its step cannot be recorded ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    return _Prepared(holding, program, output, written)


@dataclass(frozen=True)
class _Refused:
    """Why a model has no program, as it was then."""

    holding: AsItStood
    reason: str

    def held(self) -> bool:
        """Whether the model still is what it was."""
        return self.holding.held() and self.holding.same_kinds()


class _Prepared:
    """A program of a model, and what it was made from."""

    def __init__(self, holding: AsItStood, program: Program, output: Callable[..., Any], written: Written) -> None:
        self._holding, self._program, self.output, self.written = holding, program, output, written
        self._moved = False
        self.next: tuple[int, int] | None = None  # the cache that it is likely to be given next, and its length

    def held(self) -> bool:
        """Whether the model still is what it was."""
        return not self._moved and self._holding.held()

    def same_numbers(self) -> bool:
        """Whether modules keep the plain numbers that they kept."""
        return self._holding.same_numbers()

    def hooked(self, thoroughly: bool = True) -> bool:
        """Whether something inside runs that no program knows."""
        return self._holding.hooked() or (thoroughly and self._holding.patched())

    def timed(self, times: Tensor) -> AbstractContextManager[Tensor]:
        """Inside, steps add the times of their instructions to these (kernels/program.py)."""
        return self._program.timed(times)

    def run(self, ids: Tensor, positions: Tensor, mask: Tensor | None, layers: list[Any]) -> Tensor | None:
        """The logits of one more token, which the cache holds then; None where the model's own code has to run."""
        slabs: list[Tensor] = []
        spans: list[int] = []
        for layer in layers:
            layer.room(1)
            slabs += layer.slabs
            spans += (layer.first, layer.last)
        try:
            out = self._program.step(ids.float(), positions, mask, slabs, spans)
        except RuntimeError:  # of a cache that does not fit the model, say: its own code says it better
            return None
        if out is None:
            self._moved = True
            return None
        for layer in layers:
            layer.advance()
        return out


_NOTHING = torch.empty(0)
_LAST = torch.tensor([-1], device="cpu")


def _mask(mask: Any, batch: int, length: int) -> Tensor | None:
    """What is added to the scores [batch, positions]: nothing, [0], where all is seen; None for a mask of another form."""
    if mask is None:
        return _NOTHING
    if (
        type(mask) is not Tensor
        or mask.shape != (batch, length + 1)
        or mask.is_floating_point()
        or mask.device.type != "cpu"
    ):
        return None
    if bool(mask.all()):
        return _NOTHING
    if not bool(mask[:, -1].all()):  # a token that does not see itself may see nothing
        return None
    return torch.zeros(mask.shape, dtype=torch.float32, device="cpu").masked_fill_(mask == 0, float("-inf"))


def _positions(positions: Any, batch: int, length: int, mask: Tensor | None) -> Tensor | None:
    """Positions [batch] as numbers; None where the model works them out in a way of its own."""
    if positions is None:
        alike = mask is not None and not mask.numel()
        return torch.full((batch,), float(length), dtype=torch.float32, device="cpu") if alike else None
    if (
        type(positions) is not Tensor
        or positions.dtype != torch.int64
        or positions.device.type != "cpu"
        or tuple(positions.shape) not in ((batch, 1), (1, 1))
    ):
        return None
    return positions.float().expand(batch, 1).contiguous().view(batch)
