"""How much memory a model takes: counted over the tensors it holds, and as the process's resident memory.

The two answer different questions. Counting says what has to be stored; resident memory shows that what was packed is
truly gone, which no amount of counting can.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import platform
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from sparsec.kernels.gpu.semi_structured import beside
from sparsec.private import is_traceable_wrapper_subclass

Model = TypeVar("Model", bound=nn.Module)

_STATM = Path(
    "/proc/self/statm"
)  # Linux; elsewhere the standard library knows only the peak, which says nothing of a difference
_MAPS = Path("/proc/self/maps")
_MEMINFO = Path("/proc/meminfo")
_PAGEOUT = 21  # of madvise: Linux 5.4 and later, others refuse it and change nothing


@dataclass(frozen=True)
class Held:
    """Bytes of the tensors that a module holds, each storage once."""

    parameters: int
    buffers: int

    @property
    def total(self) -> int:
        """Bytes of all of them."""
        return self.parameters + self.buffers


def held(module: nn.Module) -> Held:
    """Walks parameters and buffers (those left out of the state dict too); tied and shared storage counts once.

    A view holds its whole storage, so the storage is what counts; and what a library holds beside a packed weight counts too.
    """
    seen: set[tuple[str, int]] = set()
    parameters = sum(_fresh_bytes(p, seen) for p in _stored(module.parameters()))
    buffers = sum(_fresh_bytes(b, seen) for b in _stored(module.buffers()))
    return Held(parameters, buffers)


def _stored(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The tensors that have memory: one of another library's class (torchao's) may only hold others."""
    for tensor in tensors:
        wrapper: Any = tensor
        if is_traceable_wrapper_subclass(wrapper):
            yield from _stored(getattr(wrapper, name) for name in wrapper.__tensor_flatten__()[0])
        else:
            yield tensor


def _fresh_bytes(tensor: Tensor, seen: set[tuple[str, int]]) -> int:
    key, storage = _key(tensor), tensor.untyped_storage()
    if key in seen or not storage.nbytes():  # one without bytes may begin where another in the same file does
        return 0
    seen.add(key)
    return storage.nbytes() + beside(storage)


def _key(tensor: Tensor) -> tuple[str, int]:
    # On the meta device every storage has address 0: there only the tensor's identity tells two apart.
    return ("meta", id(tensor)) if tensor.is_meta else (str(tensor.device), tensor.untyped_storage().data_ptr())


def shared_copy(model: Model) -> Model:
    """A copy of the modules over the same memory: the very same buffers, Parameters of its own; a compiled model's masks too.

    So a write to one model's tensors is one to the other's, and `.to()` is none.
    """
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    graph = getattr(getattr(model, "sparsec", None), "graph", None)
    if graph is not None:
        tensors += [*graph.module.parameters(), *graph.module.buffers(), *(weight.mask for weight in graph.masked())]
    return copy.deepcopy(model, computed(model) | {id(tensor): _over_the_same_memory(tensor) for tensor in tensors})


def computed(model: nn.Module) -> dict[int, Tensor]:
    """For deepcopy: the weights that torch.nn.utils compute and leave in a module, without their history, which none can copy."""
    values = (value for module in model.modules() for value in vars(module).values())
    return {id(value): value.detach().clone() for value in values if isinstance(value, Tensor) and not value.is_leaf}


def _over_the_same_memory(tensor: Tensor) -> Tensor:
    if type(tensor) is not nn.Parameter:
        return tensor
    own = nn.Parameter(tensor.detach(), tensor.requires_grad)
    own.__dict__.update(tensor.__dict__)  # marks that libraries leave on Parameters
    return own


def shared(model: nn.Module, other: nn.Module) -> int:
    """Bytes of the tensors that both hold."""
    seen: set[tuple[str, int]] = set()
    for tensor in _stored((*model.parameters(), *model.buffers())):
        _fresh_bytes(tensor, seen)
    both = [t for t in _stored((*other.parameters(), *other.buffers())) if _key(t) in seen]
    counted: set[tuple[str, int]] = set()
    return sum(_fresh_bytes(tensor, counted) for tensor in both)


def resident(device: str = "cpu") -> int | None:
    """Bytes of resident memory after garbage collection, or None where the system does not tell; of "cuda" what tensors take there.

    With glibc, freed memory is first handed back to the system; other allocators keep some, see `resident_notice`.
    """
    if device == "cuda":
        gc.collect()
        return torch.cuda.memory_allocated()
    if not _STATM.exists():
        return None
    gc.collect()
    trim()
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """The most memory that the process held, mapped files aside: looked at some times a second, while a `with` runs."""

    EVERY = 0.02
    """Seconds."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        self._watch.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._over.set()
        self._watch.join()

    def _look(self) -> None:
        while _STATM.exists() and not self._over.wait(self.EVERY):
            self.nbytes = max(self.nbytes, unmapped() or 0)


def unmapped() -> int | None:
    """Bytes that the process holds now, mapped files aside, or None where the system does not tell."""
    if not _STATM.exists():
        return None
    _, held, mapped, *_ = _STATM.read_text().split()
    return (int(held) - int(mapped)) * os.sysconf("SC_PAGE_SIZE")


def free(device: torch.device) -> int | None:
    """Bytes that a process may still take on a device; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in _MEMINFO.read_text().splitlines() if _MEMINFO.exists() else ():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None


def resident_notice() -> str | None:
    """Why resident memory is unknown or rough here; None where it can be trusted."""
    if not _STATM.exists():
        return f"resident memory is not measured on {platform.system()}: it is read from /proc/self/statm"
    if platform.libc_ver()[0] != "glibc":
        return "resident memory is rough: malloc_trim is glibc's, so freed memory may not be handed back before reading"
    return None


def touch(module: nn.Module) -> None:
    """Reads every page of the module's tensors, so that a lazily mapped file becomes resident."""
    page = 4096
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.device.type == "cpu" and tensor.numel():
            tensor.detach().flatten()[:: max(1, page // tensor.element_size())].double().sum()


def trim() -> None:
    """Hands freed memory back to the system, where the C library can: with glibc, also what lies between tensors that stay."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def is_own(tensor: Tensor) -> bool:
    """Whether torch allocated a tensor's memory in this process, and for tensors alone.

    False for what others lent: a mapped file, an array of NumPy, a buffer, DLPack, memory that processes share.
    """
    storage = tensor.untyped_storage()
    return storage.resizable() and not (tensor.device.type == "cpu" and storage.is_shared())


def apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, with a copy of each that shares its memory with one before: safetensors writes none of those."""
    seen: set[tuple[Any, int]] = set()
    for name, tensor in tensors.items():
        memory = (tensor.device, tensor.untyped_storage().data_ptr())
        if tensor.numel() and memory in seen:
            tensors[name] = tensor.clone()
        seen.add(memory)
    return tensors


def page_out(tensors: Iterable[Tensor]) -> None:
    """Hands the pages of mapped files back to the system, which reads them again when somebody asks.

    No value changes: what was written to such a tensor is no page of the file any more, and stays.
    """
    library = _glibc()
    for tensor in tensors:
        pages = _pages(tensor)
        if pages is not None and library is not None:
            library.madvise(ctypes.c_void_p(pages[0]), ctypes.c_size_t(pages[1] - pages[0]), _PAGEOUT)


def _pages(tensor: Tensor) -> tuple[int, int] | None:
    """First and last address of the whole pages of a tensor in one private mapping of a file."""
    if (
        tensor.layout != torch.strided
        or tensor.device.type != "cpu"
        or not tensor.is_contiguous()
        or not _MAPS.exists()
    ):
        return None
    size, start = os.sysconf("SC_PAGE_SIZE"), tensor.data_ptr()
    begin, end = -(-start // size) * size, (start + tensor.nbytes) // size * size
    if begin >= end:
        return None
    for line in _MAPS.read_text(errors="replace").splitlines():
        place, rights, _, _, inode, *_ = line.split()
        low, high = (int(number, 16) for number in place.split("-"))
        if low <= begin < high:
            return (begin, end) if end <= high and inode != "0" and rights.endswith("p") else None
    return None


@cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
