"""Bytes held: every storage once, whoever shares it."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from sparsec import memory


@given(
    sizes=st.lists(st.integers(0, 50), min_size=1, max_size=5),
    uses=st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.booleans()), max_size=12),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_held_counts_each_storage_once(
    sizes: list[int], uses: list[tuple[int, bool, bool]], dtype: torch.dtype
) -> None:
    """Tensors are placed at random: as parameters or buffers, whole or as a view of their second half."""
    tensors = [torch.zeros(size, dtype=dtype) for size in sizes]
    module = nn.ModuleList(nn.Module() for _ in uses)
    used: dict[int, str] = {}
    for child, (index, as_buffer, half) in zip(module, uses, strict=True):
        index %= len(sizes)
        tensor = tensors[index][sizes[index] // 2 :] if half else tensors[index]
        if as_buffer:
            child.register_buffer("buffer", tensor, persistent=False)
            used.setdefault(index, "buffer")
        else:
            child.register_parameter("parameter", nn.Parameter(tensor))
            used[index] = "parameter"  # parameters are walked first
    found = memory.held(module)
    for kind, nbytes in (("parameter", found.parameters), ("buffer", found.buffers)):
        assert nbytes == sum(sizes[i] * dtype.itemsize for i, k in used.items() if k == kind)
    assert found.total == found.parameters + found.buffers


def test_a_tensor_that_holds_others_counts_as_those() -> None:
    """Regression: torchao's have no memory of their own, and asking for it raised."""
    model = nn.Linear(4, 4, bias=False)
    model.weight = nn.Parameter(TwoTensor(torch.zeros(4, 4), torch.ones(4, 4)))
    assert memory.held(model).total == 2 * 64
    assert memory.shared(model, model) == 2 * 64


def test_tied_weights_count_once_on_the_meta_device_too() -> None:
    """Every storage there has address 0."""
    first, second = (nn.Linear(4, 4, bias=False, device="meta") for _ in range(2))
    assert memory.held(nn.ModuleList([first, second])).total == 2 * 64
    second.weight = first.weight
    assert memory.held(nn.ModuleList([first, second])).total == 64


def test_resident_memory_follows_what_is_held_and_freed() -> None:
    before = memory.resident()
    if before is None or memory.resident_notice() is not None:
        assert memory.resident_notice() is not None
        return
    size = 64 << 20
    layer = nn.Linear(size // 4, 1, bias=False)
    memory.touch(layer)
    held = memory.resident()
    del layer
    after = memory.resident()
    assert held is not None
    assert after is not None
    assert 0.9 * size < held - before < 1.5 * size
    assert after - before < 0.1 * size
