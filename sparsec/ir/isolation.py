"""What a trace changes in the model and in the process, and puts back: modes, flags, and hooks, which must see no fake tensor.

torch.export has state of the whole process, so that one trace runs at a time. Other threads may go on using other models.
"""

from __future__ import annotations

import gc
import logging
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.fx.config as fx_config
import torch.fx.graph as fx_graph
from torch import nn
from torch.nn.modules import module as torch_module

from sparsec import private
from sparsec.ir.names import is_plain, lookup

_LOCK = threading.RLock()
_WRITES_NAME, _NO_STACKS = "_format_target", "do_not_emit_stack_traces"
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_HOOKS_OF_ALL = (
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
    "_global_buffer_registration_hooks",
    "_global_module_registration_hooks",
    "_global_parameter_registration_hooks",
)


def hooked(model: nn.Module) -> dict[str, int]:
    """Path -> number of the user's hooks that run in the forward of a module."""
    found = {}
    for path, module in model.named_modules():
        own = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        count = sum(not _of_torch(hook) for hook in own)
        if count:
            found[path] = count
    return found


def under_autocast(model: nn.Module) -> Callable[..., Any] | None:
    """The forward of a model that accelerate has put torch.autocast around, as its `prepare` and transformers' Trainer do."""
    own: Callable[..., Any] | None = vars(model).get("_original_forward")
    return own if "forward" in vars(model) and getattr(own, "__self__", None) is model else None


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """The settings of the process that a trace needs; the second of two threads waits for the first."""
    with _LOCK, ExitStack() as stack:
        # Nothing reads where a node came from in the source, and little of what a trace makes is garbage: a seventh or more in all.
        traces, collects = private.optional(f"torch.fx.config.{_NO_STACKS}"), gc.isenabled()
        if traces is not None:
            setattr(fx_config, _NO_STACKS, True)
            stack.callback(setattr, fx_config, _NO_STACKS, traces)
        gc.disable()
        if collects:
            stack.callback(gc.enable)
        if (
            threading.active_count() == 1
        ):  # filters are the process's: another thread might save ours and put them back later
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        stack.enter_context(_no_logs_of_torch())
        stack.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):  # the caller's; a model's own stands in its forward
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(_hooks_of_all_for_others())
        stack.enter_context(_names_of_any_kind())
        yield


@contextmanager
def traceable(model: nn.Module) -> Iterator[None]:
    """Eval mode, no cache, none of the user's hooks; all of it put back afterwards."""
    # Modules keep plain attributes too: a pruning hook, for one, leaves a fake tensor in `weight`.
    before = [(module, dict(vars(module))) for module in model.modules()]
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    try:
        model.eval()
        if use_cache:
            config.use_cache = False  # type: ignore[union-attr]
        if (own := under_autocast(model)) is not None:
            vars(model)["forward"] = own
        for module in model.modules():
            for name in _HOOKS:
                hooks: Mapping[int, Any] = vars(module).get(name) or {}
                if not all(map(_of_torch, hooks.values())):
                    vars(module)[name] = OrderedDict((i, hook) for i, hook in hooks.items() if _of_torch(hook))
        yield
    finally:
        if use_cache:
            config.use_cache = use_cache  # type: ignore[union-attr]
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


@contextmanager
def _no_logs_of_torch() -> Iterator[None]:
    """What torch logs and prints of a rung that fails, tracebacks and all: the reason stands in the TraceError.

    In this thread alone; what somebody asked for by TORCH_LOGS is below a warning and goes on.
    """
    mine = threading.get_ident()

    def unheard(record: logging.LogRecord) -> bool:
        return not (record.thread == mine and record.levelno >= logging.WARNING and record.name.startswith("torch"))

    loggers = [
        each for name, each in list(logging.root.manager.loggerDict.items()) if name.partition(".")[0] == "torch"
    ]
    handlers = {h for each in (logging.root, *loggers) if isinstance(each, logging.Logger) for h in each.handlers}
    for handler in handlers:
        handler.addFilter(unheard)
    printing = private.optional("torch.export._trace")  # prints, of a graph that fails, what there is of it
    if printing is not None:
        vars(printing)["print"] = lambda *args, **how: None if threading.get_ident() == mine else print(*args, **how)
    try:
        yield
    finally:
        if printing is not None:
            vars(printing).pop("print", None)
        for handler in handlers:
            handler.removeFilter(unheard)


def _of_torch(hook: Callable[..., Any]) -> bool:
    """Whether a hook is a part of the model's computation: those of torch.nn.utils compute a weight from its parts."""
    kinds = [cls.__module__ for cls in type(hook).__mro__]
    return any(kind.startswith("torch.nn.utils") for kind in (*kinds, str(getattr(hook, "__module__", ""))))


@contextmanager
def _names_of_any_kind() -> Iterator[None]:
    """Code that torch.fx writes looks modules up by name where `self.class.weight` would be no Python; export has it written."""
    written: Callable[[str, str], str] | None = private.optional(f"torch.fx.graph.{_WRITES_NAME}")
    if written is None:
        yield
        return
    setattr(
        fx_graph, _WRITES_NAME, lambda base, target: written(base, target) if is_plain(target) else lookup(base, target)
    )
    try:
        yield
    finally:
        setattr(fx_graph, _WRITES_NAME, written)


@contextmanager
def _hooks_of_all_for_others() -> Iterator[None]:
    """Hooks on all modules of the process go on in other threads, and are silent in this one."""
    mine = threading.get_ident()
    put_back: list[tuple[dict[int, Any], int, Any, Any]] = []
    try:
        for name in _HOOKS_OF_ALL:
            hooks: dict[int, Any] = getattr(torch_module, name, {})
            for key, hook in list(hooks.items()):
                hooks[key] = silent = _silent_in(mine, hook)
                put_back.append((hooks, key, hook, silent))
        yield
    finally:
        for hooks, key, hook, silent in put_back:
            if hooks.get(key) is silent:  # not one that was removed meanwhile
                hooks[key] = hook


def _silent_in(thread: int, hook: Callable[..., Any]) -> Callable[..., Any]:
    def other_threads(*args: Any, **kwargs: Any) -> Any:
        return None if threading.get_ident() == thread else hook(*args, **kwargs)

    return other_threads
