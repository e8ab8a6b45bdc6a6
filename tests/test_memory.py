"""Bytes held: every storage once, whoever shares it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import sparsec
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


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_pages_of_a_mapped_file_that_was_written_to_go_back_and_neighbours_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: lowering in place kept every pruned dense weight in memory, as long as another tensor of its file was there."""
    path, count = tmp_path / "weights", 8 << 20
    whole = torch.randn(2 * count)
    path.write_bytes(whole.numpy().tobytes())
    mapped = torch.from_file(str(path), shared=False, size=2 * count)
    first, second = mapped[:count], mapped[count:]
    mapped.mul_(2)
    monkeypatch.setattr(memory, "ALONE", 5)  # they are views of one tensor
    before = memory.resident()
    memory.let_go(first, [mapped[:5]])
    assert torch.equal(first, 2 * whole[:count]), "another tensor lies there"
    memory.let_go(first, [second])
    after = memory.resident()
    assert before is not None
    assert after is not None
    assert before - after > 0.9 * first.nbytes
    assert torch.equal(second, 2 * whole[count:])
    plain = torch.ones(count)
    memory.let_go(plain, [])
    assert bool((plain == 1).all()), "memory of no file is the allocator's"


@pytest.mark.parametrize("kept", [True, False])
def test_a_mapped_state_that_somebody_holds_stays_what_it_is(tmp_path: Path, kept: bool) -> None:
    """Regression: what was trained since loading was the file's again in a state dict that was loaded with assign=True."""

    def linear() -> nn.Sequential:
        return nn.Sequential(nn.Linear(1024, 2048, bias=False), nn.Linear(2048, 8, bias=False)).eval()

    torch.save(linear().state_dict(), tmp_path / "weights.pt")
    state = torch.load(tmp_path / "weights.pt", mmap=True)
    model = linear()
    model.load_state_dict(state, assign=True)
    with torch.no_grad():
        model[0].weight.mul_(3)
    wanted = model[0].weight.detach().clone()
    held = state["0.weight"] if kept else None
    del state
    gone: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "_of_a_file", lambda begin, end: bool(gone.append(end - begin)))
        made = sparsec.compile(
            model, "magnitude(0.5),freeze,lower(bitmap)", example_inputs=torch.randn(2, 1024), copy=False
        )
    assert len(gone) == (1 if kept else 2)
    mask = made[0].weight != 0
    assert torch.equal(made[0].weight[mask], wanted[mask])
    if held is not None:
        assert torch.equal(held[mask], wanted[mask])
