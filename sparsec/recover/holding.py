"""Holding: keeps the zeros of a pruned model while any program trains it.

A gradient loses what its mask prunes before it is added up, so that momentum holds nothing there. What an optimiser writes there
all the same is zero again when its step returns. What anybody else wrote there is zero again before the model runs, and before its
state dict is read. The model gets hooks for that, and nothing else: its parameters and their names stay what they are.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from sparsec import serial
from sparsec.errors import MaskError, RecoverError, SparsecWarning, some
from sparsec.ir.foreign import quantised_kind
from sparsec.ir.graph import Graph
from sparsec.private import is_traceable_wrapper_subclass
from sparsec.recover.regrow import under

_TABLES = ("_forward_pre_hooks", "_state_dict_pre_hooks", "_load_state_dict_post_hooks")
"""Where a module keeps the hooks that stand in for a Guard."""
_ORPHAN = (
    "this model, or a part of it, is a copy of a masked one that came without its masks: it was copied by itself, or comes from a "
    "pickle. Training brings pruned weights back. sparsec.masked(sparsec.compile(model, 'zeros,freeze')) goes on from its zeros"
)


class Guard:
    """A hook of a module: before it runs, and before its state is read.

    A copy of it has no masks, until the copy of the whole model gives it some; so has one that comes from a pickle.
    """

    def __init__(self, holding: Holding | None = None, of_whole: bool = False) -> None:
        self.holding, self.of_whole = holding, of_whole

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if self.holding is not None:
            self.holding.visit(self)
        elif module.training and torch.is_grad_enabled():
            warnings.warn(_ORPHAN, SparsecWarning, stacklevel=2)

    def __deepcopy__(self, memo: dict[int, Any]) -> Guard:
        return type(self)(None, self.of_whole)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (None, self.of_whole)


class LoadGuard(Guard):
    """The same after a state was loaded into the module, unless its masks are still to come."""

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if self.holding is None or not self.holding.waits:
            super().__call__(module)


class Holding:
    """Holds the zeros of one model. The masks are those of `graph`, as they are whenever they are needed.

    model: the one that the graph was traced from, or what became of it. Modules are known by themselves and not by name, so that
    others may be put around them. waits: after a state was loaded, until the model runs or is read, since its masks are loaded too.
    """

    waits: bool

    def __init__(self, graph: Graph, model: nn.Module) -> None:
        names = {id(graph.tensor(weight.name)): weight.name for weight in graph.masked()}
        found = [
            (names[id(parameter)], module, leaf)
            for module in model.modules()
            for leaf, parameter in module._parameters.items()
            if id(parameter) in names
        ]
        if lost := set(names.values()) - {name for name, _, _ in found}:
            raise MaskError(_gone_text(min(lost), "is in the model no more"))
        self._start(graph, [(name, weakref.ref(module), leaf) for name, module, leaf in found])
        strip(model)
        holders: dict[int, Any] = {id(model): model, **{id(module): module for _, module, _ in found}}
        for at, module in holders.items():
            guard = Guard(self, of_whole=at == id(model))
            self._guards[guard] = weakref.ref(module)
            module.register_forward_pre_hook(guard)
            module.register_state_dict_pre_hook(guard)
            if guard.of_whole:
                loaded = LoadGuard(self, of_whole=True)
                self._guards[loaded] = weakref.ref(module)
                module.register_load_state_dict_post_hook(loaded)
        self.hold()

    def _start(self, graph: Graph, places: Sequence[tuple[str, weakref.ref[nn.Module], str]]) -> None:
        self.graph, self._places = graph, list(places)
        self._guards: weakref.WeakKeyDictionary[Guard, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()
        self._visited: set[int] | None = None  # guards since the zeros were last looked at; None: they never were
        self._trained: set[str] = set()  # weights that a gradient came for since then, and no step that took it
        self.waits = False
        self._dense: dict[str, Tensor] | None = None  # sums of gradients before they are masked; None: nobody asked
        self._watched: dict[int, tuple[weakref.ref[Tensor], Any]] = {}  # by id: a tie that broke leaves two of one name
        me = weakref.ref(self)

        def before(optimiser: Optimizer, args: Any, kwargs: Any) -> None:
            if (holding := me()) is not None:
                holding.before_step(optimiser)

        def after(optimiser: Optimizer, args: Any, kwargs: Any) -> None:
            if (holding := me()) is not None:
                holding.after_step(optimiser)

        handles = (register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after))
        self._let_go = weakref.finalize(self, _remove, handles)

    def twin(self, graph: Graph, memo: Mapping[int, Any]) -> Holding:
        """The same for a copy of the model. memo: of `copy.deepcopy`, once it has copied all modules."""
        made = Holding.__new__(Holding)
        places = [(name, memo.get(id(module())), leaf) for name, module, leaf in self._places]
        made._start(graph, [(name, weakref.ref(module), leaf) for name, module, leaf in places if module is not None])
        for guard, module in self._guards.items():
            copied, holder = memo.get(id(guard)), memo.get(id(module()))
            if copied is not None and holder is not None:
                copied.holding = made
                made._guards[copied] = weakref.ref(holder)
        made.hold()
        return made

    def release(self) -> None:
        """Nothing is held any more, and no hook is left in the model."""
        self._let_go()
        for _, handle in self._watched.values():
            handle.remove()
        self._watched.clear()
        for guard, module in self._guards.items():
            guard.holding = None
            if (holder := module()) is not None:
                strip(holder)

    def visit(self, guard: Guard) -> None:
        """Holds the zeros once for each run of the model, whichever of its parts runs or is read first."""
        if guard.of_whole:
            self.hold()
            self._visited = set()
        elif self._visited is None or id(guard) in self._visited:
            self.hold()
            self._visited = {id(guard)}
        else:
            self._visited.add(id(guard))

    def hold(self) -> None:
        """Makes every pruned position zero, and has gradients masked of whatever the model holds now.

        Warns where something came back and no gradient had been there: a merged adapter, a loaded state. Raises MaskError for a
        weight that is no longer there to be held.
        """
        held = list(self.held())
        for name, parameter, _ in held:
            self._watch(name, parameter)
        found = [serial.grown(parameter, mask) for _, parameter, mask in held]
        back = {name: int(n) for (name, _, _), n in zip(held, found, strict=True) if int(n)}
        with torch.no_grad():
            for name, parameter, mask in held:
                if name in back:
                    serial.masked(parameter, mask, out=parameter)
        strange = {name: n for name, n in back.items() if name not in self._trained}
        self._trained.clear()
        if strange:
            warnings.warn(_strange_text(strange), SparsecWarning, stacklevel=3)

    @torch.no_grad()
    def before_step(self, optimiser: Optimizer) -> None:
        """Gradients may have been written to since they were computed: noise, averages over processes."""
        for _, parameter, mask in self._held_by(optimiser):
            if parameter.grad is not None and parameter.grad.layout == torch.strided:
                serial.masked(parameter.grad, mask, out=parameter.grad)

    @torch.no_grad()
    def after_step(self, optimiser: Optimizer) -> None:
        """What the optimiser wrote to pruned positions is zero again."""
        for name, parameter, mask in self._held_by(optimiser):
            serial.masked(parameter, mask, out=parameter)
            self._trained.discard(name)

    def _held_by(self, optimiser: Optimizer) -> Iterator[tuple[str, Tensor, Tensor]]:
        theirs = {id(parameter) for group in optimiser.param_groups for parameter in group["params"]}
        for name, parameter in self._present():
            if parameter is None or id(parameter) not in theirs:
                continue
            if (mask := self._mask(name, parameter)) is not None:
                yield name, parameter, mask

    def held(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, parameter and mask of what there is to hold. MaskError for what is there no more."""
        for name, parameter in self._present():
            if parameter is None:
                raise MaskError(_gone_text(name, "was taken away, computed from others or sharded"))
            if (mask := self._mask(name, parameter)) is not None:
                yield name, parameter, mask

    def _present(self) -> Iterator[tuple[str, nn.Parameter | None]]:
        """Each once; None for one that its module has no more."""
        seen = set[int]()
        for name, place, leaf in self._places:
            module = place()
            parameter = None if module is None else module._parameters.get(leaf)
            # A Tensor that is no Parameter stands there for one call, of torch.func say.
            passes = parameter is None or (isinstance(parameter, nn.Parameter) and not parameter.is_meta)
            if module is not None and passes and id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter

    def _mask(self, name: str, parameter: Any) -> Tensor | None:
        mask = self.graph.weights[name].mask
        if mask is None:
            return None
        if kind := quantised_kind(parameter):
            raise MaskError(_gone_text(name, f"is a {kind} now"))
        if is_traceable_wrapper_subclass(parameter):
            raise MaskError(_gone_text(name, "is sharded or of a library's own kind now"))
        if parameter.shape != mask.shape:
            raise MaskError(_gone_text(name, f"is {list(parameter.shape)} now, its mask {list(mask.shape)}"))
        if mask.device != parameter.device:
            mask = mask.to(parameter.device)
            self.graph.update(name, mask=mask)
        return mask

    def _watch(self, name: str, parameter: Any) -> None:
        """Has the gradients of a parameter masked from now on."""
        known = self._watched.get(id(parameter))
        if not parameter.requires_grad or (known is not None and known[0]() is parameter):
            return
        me = weakref.ref(self)

        def mask(gradient: Tensor) -> Tensor:
            holding = me()
            return gradient if holding is None else holding.masked_gradient(name, gradient)

        self._watched[id(parameter)] = weakref.ref(parameter), parameter.register_hook(mask)

    def masked_gradient(self, name: str, gradient: Tensor) -> Tensor:
        """A gradient of the weight `name`, exactly zero where that is pruned, whatever stood there."""
        self._trained.add(name)
        if self.graph.weights[name].trained != "under":
            self.graph.update(name, trained="under")
        mask = self.graph.weights[name].mask
        if mask is None:
            return gradient
        if self._dense is not None:
            before, whole = self._dense.get(name), gradient.detach().to_dense()
            self._dense[name] = whole if before is None else before + whole
        return under(mask.to(gradient.device), gradient)

    def record(self, on: bool = True) -> dict[str, Tensor]:
        """From now on, gradients are added up as they were before they are masked, or no more. Gives the sums so far, by name."""
        found, self._dense = self._dense or {}, {} if on else None
        return found


def holding_of(model: nn.Module) -> Holding:
    """What holds the zeros of a model, or of the one in it. RecoverError where nothing does."""
    hooks = [
        hook for module in model.modules() for hook in module._forward_pre_hooks.values() if isinstance(hook, Guard)
    ]
    found = {id(hook.holding): hook.holding for hook in hooks if hook.holding is not None}
    if len(found) != 1:
        what = "holds several masked models; train each by itself" if found else "has no masks that are held"
        raise RecoverError(
            f"this model ({type(model).__name__}) {what}: RegrowCallback moves the masks of what sparsec.masked gave back, as in "
            "model = sparsec.masked(sparsec.compile(model, 'magnitude(0.9),freeze'))"
        )
    return next(iter(found.values()))


def strip(model: nn.Module) -> None:
    """Takes the guards out of a model, those without masks too."""
    for module in model.modules():
        for table in (getattr(module, name) for name in _TABLES):
            for key in [key for key, hook in table.items() if isinstance(hook, Guard)]:
                del table[key]


def _remove(handles: Sequence[Any]) -> None:
    for handle in handles:
        handle.remove()


def _strange_text(back: Mapping[str, int]) -> str:
    where = some([f"{n:,} in {name}" for name, n in back.items()])
    return (
        f"{sum(back.values()):,} pruned values were written past every optimiser, as by a merged adapter or a loaded state, and "
        f"are zero again: {where}. So the model is not what was merged or loaded. The pass recover(method='lora') trains an "
        "adapter that merges without loss; another one keeps what it learnt beside the lowered model: sparsec.extend takes both"
    )


def _gone_text(name: str, what: str) -> str:
    return (
        f"{name} {what}, so that its zeros cannot be held; call sparsec.masked on a model whose weights are plain parameters, keep "
        "each of them whole (torch's DistributedDataParallel does), and change the model after it was trained"
    )
