"""2:4 with many rows of x: the sparse matrix units of a GPU, through the library that torch carries for them, cuSPARSELt.

Its form of a weight is its own and nothing else reads it, so it is held beside the packed one, by which few rows are multiplied:
from the first product of many rows on, such a weight takes 9/16 of its dense bytes more. SPARSEC_SEMI_STRUCTURED=0 keeps it
out. Imports no triton.
"""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sparsec import private
from sparsec.formats.base import Packed
from sparsec.formats.nm import NM

NAME = "nm_cusparselt"
"""Of the kernel."""
MANY = 64
"""Rows of x from which on it serves; fewer go by gathers or through an expanded matrix."""
LAYOUTS = ("nm1:4", "nm2:4")
DTYPES = (torch.bfloat16,)
"""Not float16: with torch 2.11 on an H200, 72 rows of x by a weight of 1024x2048 ended in an illegal instruction, after which
nothing runs on the GPU in the process."""
SIDE, FILLED = 16, 8
"""What the sizes of a weight are multiples of, and what rows of x are filled up to a multiple of."""
SWITCH = "SPARSEC_SEMI_STRUCTURED"

Algorithm = tuple[int, int, int]
"""The library's algorithm, into how many parts it splits the columns, and how it adds them up."""
UNTRIED: Algorithm = (0, 1, -1)

_refused: list[str] = []
"""What the library said when it did not take a weight: it is not asked again."""
_twins: WeakIdKeyDictionary = WeakIdKeyDictionary(ref_type=weakref.ref)
"""By memory, and within it by place, the versions of packed tensors and the library's form of their weight."""
_plans: dict[tuple[object, ...], Algorithm] = {}
"""The fastest by weight size, type and rows."""
_off = False


def absent() -> list[str]:
    """Why the library is not there, or not wanted; empty when it is."""
    if os.environ.get(SWITCH) == "0":
        return [f"{SWITCH}=0 turns it off"]
    there = torch.backends.cusparselt.is_available() and private.optional("torch._cslt_sparse_mm") is not None
    return [] if there else ["this torch was built without cuSPARSELt"]


def missing() -> list[str]:
    """Why the library does not serve on this machine; empty when it does."""
    return ["it is turned off for a measurement"] if _off else absent() or _refused[:1]


@contextmanager
def turned_off() -> Iterator[None]:
    """Products within go the way that they go without the library."""
    global _off
    _off = True
    try:
        yield
    finally:
        _off = False


def unsupported(layout: str, dtype: torch.dtype, shape: tuple[int, int], tokens: int) -> str:
    """Why it is not for such a product, "" where it is. layout: as the packed weight [out, in] describes itself."""
    if tokens < MANY:
        return f"serves {MANY} rows of x and more, not {tokens}"
    if layout not in LAYOUTS:
        return f"serves {' and '.join(LAYOUTS)}, not {layout or 'an unknown pattern'}"
    if dtype not in DTYPES:
        return f"serves bfloat16, not {str(dtype).removeprefix('torch.')}"
    if any(n % SIDE for n in shape):
        return f"takes sizes that are multiples of {SIDE}, not {shape[0]}x{shape[1]}"
    return ""


def held_bytes(packed: Packed) -> int:
    """What many rows of x make a weight take beside the packed one; 0 where the library does not serve it."""
    if _type_of(packed) != "cuda" or unsupported(packed.describe(), packed.dtype, packed.shape, MANY) or missing():
        return 0
    return packed.shape[0] * packed.shape[1] * packed.dtype.itemsize * 9 // 16


def _type_of(packed: Packed) -> str:
    return next(iter(packed.tensors().values())).device.type


def linear(x: Tensor, packed: NM, bias: Tensor | None, expand: Callable[[NM], Tensor]) -> Tensor | None:
    """x [tokens, in] @ W.T + bias -> [tokens, out] by the library; None where the product is not for it.

    expand: gives the dense matrix. What the library refuses is named in one warning, and it is not asked again.
    """
    if (
        _type_of(packed) != "cuda"
        or unsupported(packed.describe(), packed.dtype, packed.shape, x.shape[0])
        or missing()
    ):
        return None
    try:
        weight = _compressed(packed, expand)
        return None if weight is None else product(x, weight, bias)
    except torch.OutOfMemoryError:  # which says nothing of the library: the next product may have room again
        warnings.warn(
            f"no room for cuSPARSELt's form of a 2:4 weight, which is expanded instead; {SWITCH}=0 never asks for it",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    except torch.AcceleratorError:  # after which nothing works
        raise
    except RuntimeError as error:
        if _recording():
            raise
        said = str(error).partition("\n")[0]
        rows, (out_features, in_features) = x.shape[0], packed.shape
        _refused.append(f"cuSPARSELt refused {packed.describe()} of {out_features}x{in_features}, {rows} rows: {said}")
        text = f"2:4 products of many rows go through expanded weights: {_refused[0]}"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
        return None


def _compressed(packed: NM, expand: Callable[[NM], Tensor]) -> Tensor | None:
    """The library's form of a weight, made by the first product of many rows.

    None where a CUDA graph is being recorded, which would record the making as well: what is recorded is run once before. None for
    tensors of inference mode, too, which do not tell whether they were written to.
    """
    values, index = packed.values, packed.index
    if values.is_inference() or index.is_inference():
        return None
    memory, place = values.untyped_storage(), (values.storage_offset(), values.shape, packed.m)
    held: dict[object, tuple[object, Tensor]] = _twins.setdefault(memory, {})  # type: ignore[no-untyped-call]
    # A weight that was written to is another one; writes through `.data` are not seen, here as elsewhere in torch.
    versions = (values._version, index._version)
    known = held.get(place)
    if known is not None and known[0] == versions:
        return known[1]
    if _recording():
        return None
    found = _kept(partial(_compress, packed, expand), values)
    if known is not None and known[1].shape == found.shape:
        # Recorded graphs read it where it lies.
        found = known[1].copy_(found)
    held[place] = (versions, found)
    return found


def _compress(packed: NM, expand: Callable[[NM], Tensor]) -> Tensor:
    dense = expand(packed)
    with torch.cuda.device_of(dense):  # type: ignore[no-untyped-call]
        found: Tensor = private.optional("torch._cslt_compress")(dense)
        return found


@cache
def _thread() -> ThreadPoolExecutor:
    """One for all: the library keeps a handle for every thread that calls it."""
    return ThreadPoolExecutor(1)


def _kept(make: Callable[[], Tensor], near: Tensor) -> Tensor:
    """What a function makes, in memory of its own.

    Where torch.compile warms up a graph to be recorded (mode="reduce-overhead"), what its thread takes is from a pool that nothing
    may outlive. So another thread makes it.
    """
    if not near.is_cuda:
        return _thread().submit(make).result()
    torch.cuda.synchronize(near.device)
    found = _thread().submit(make).result()
    torch.cuda.synchronize(near.device)
    return found


def beside(memory: torch.UntypedStorage) -> int:
    """Bytes of the library's form of all weights whose packed values lie in this memory; 0 where none was made."""
    held: dict[object, tuple[object, Tensor]] = _twins.get(memory, {})  # type: ignore[no-untyped-call]
    return sum(found.nbytes for _, found in held.values())


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [tokens, in] @ W.T + bias -> [tokens, out]. weight: as the library holds it."""
    tokens = x.shape[0]
    turned = (F.pad(x, (0, 0, 0, -tokens % FILLED)) if tokens % FILLED else x).t()
    key = (*weight.shape, x.shape[1], x.dtype, (tokens - 1).bit_length(), bias is None, x.device)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        if key not in _plans and not _recording():
            _plans[key] = _search(weight, turned, bias)
        algorithm, splits, mode = _plans.get(key, UNTRIED)
        out: Tensor = private.optional("torch._cslt_sparse_mm")(
            weight, turned, bias=bias, transpose_result=True, alg_id=algorithm, split_k=splits, split_k_mode=mode
        )
    return out[:tokens]


def _search(weight: Tensor, turned: Tensor, bias: Tensor | None) -> Algorithm:
    search = private.optional("torch._C._cusparselt.mm_search")
    if search is None:
        return UNTRIED
    algorithm, splits, mode, _ = search(weight, turned, bias, None, None, True)
    return algorithm, splits, mode


def _recording() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
