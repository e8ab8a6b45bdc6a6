"""Bytes held: every storage once, whoever shares it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
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
def test_pages_of_a_mapped_file_go_back_and_no_value_changes(tmp_path: Path) -> None:
    path, count = tmp_path / "weights", 8 << 20
    whole = torch.randn(2 * count)
    path.write_bytes(whole.numpy().tobytes())
    mapped = torch.from_file(str(path), shared=False, size=2 * count)
    mapped[:count].mul_(2)
    assert float(mapped.sum()) != 0  # all of it is read
    before = memory.resident()
    memory.page_out([mapped])
    after = memory.resident()
    assert before is not None
    assert after is not None
    assert before - after > 0.9 * mapped[count:].nbytes
    assert torch.equal(mapped[:count], 2 * whole[:count])
    assert torch.equal(mapped[count:], whole[count:])


@pytest.mark.parametrize("kept", [True, False])
def test_a_mapped_file_is_not_written_to_when_its_model_is_pruned_in_place(tmp_path: Path, kept: bool) -> None:
    """Regression: each written page stayed until the last tensor of the file was gone, beside the packed weights."""

    def linear() -> nn.Sequential:
        return nn.Sequential(nn.Linear(1024, 2048, bias=False), nn.Linear(2048, 8, bias=False)).eval()

    torch.save(linear().state_dict(), tmp_path / "weights.pt")
    state = torch.load(tmp_path / "weights.pt", mmap=True)
    model = linear()
    model.load_state_dict(state, assign=True)
    first = model[0].weight.detach()  # what is left of it
    with torch.no_grad():
        model[0].weight.mul_(3)
    wanted = first.clone()
    held = state if kept else None
    del state
    made = sparsec.compile(
        model, "magnitude(0.5),freeze,lower(bitmap)", example_inputs=torch.randn(2, 1024), copy=False
    )
    mask = made[0].weight != 0
    assert 0.4 < float(mask.float().mean()) < 0.6
    assert torch.equal(made[0].weight[mask], wanted[mask])
    assert torch.equal(first, wanted), "trained values, zeros or the file's came into memory that somebody reads"
    if held is not None:
        assert torch.equal(held["0.weight"], wanted)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
@pytest.mark.parametrize("mode", ["r", "r+", "c"])
@pytest.mark.parametrize("passes", ["magnitude(0.5)", "magnitude(0.5),freeze", "sparsegpt(0.5),freeze"])
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_no_mapping_is_written_to_whoever_it_belongs_to(tmp_path: Path, mode: str, passes: str) -> None:
    """Regression: one for reading ended the process, a shared one took the zeros into the user's file."""
    path = tmp_path / "weight.npy"
    np.save(path, np.random.default_rng(0).standard_normal((512, 256)).astype("f4"))
    before = path.read_bytes()
    model = nn.Sequential(nn.Linear(256, 512))
    model[0].weight = nn.Parameter(torch.from_numpy(np.load(path, mmap_mode=mode)))
    x = torch.randn(512, 256)
    given = {"calibration": [(x,)]} if "gpt" in passes else {}
    made = sparsec.compile(model, passes, example_inputs=x[:2], copy=False, **given)
    assert int((made[0].weight == 0).sum()) == 256 * 256
    assert path.read_bytes() == before


LENDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "NumPy": lambda t: torch.from_numpy(t.numpy().copy()),
    "NumPy, transposed": lambda t: torch.from_numpy(t.t().contiguous().numpy().copy().T),
    "a buffer": lambda t: torch.frombuffer(bytearray(t.numpy().tobytes()), dtype=t.dtype).view(t.shape),
    "DLPack": lambda t: torch.from_dlpack(t.numpy().copy()),
    "an array taken of it": lambda t: torch.from_numpy(t.clone().numpy()),
    "other processes": lambda t: t.clone().share_memory_(),
}


@pytest.mark.parametrize("lender", LENDERS)
@pytest.mark.parametrize("passes", ["magnitude(0.5)", "magnitude(0.5),freeze", "sparsegpt(0.5),freeze"])
def test_memory_that_somebody_lent_is_not_written_to(lender: str, passes: str) -> None:
    """Regression: the zeros came into the user's array, without a word. What is trained stays what is trained."""
    model = nn.Sequential(nn.Linear(8, 16))
    before = model[0].weight.detach().clone()
    lent = LENDERS[lender](before.clone())
    storage, strides = lent.untyped_storage(), lent.stride()
    model[0].weight = nn.Parameter(lent)
    del lent  # a tensor that was kept would be reason enough
    x = torch.randn(32, 8)
    given = {"calibration": [(x,)]} if "gpt" in passes else {}
    made = sparsec.compile(model, passes, example_inputs=x[:2], copy=False, **given)
    assert int((made[0].weight == 0).sum()) == 64
    assert torch.equal(torch.tensor([]).set_(storage, 0, before.shape, strides), before)
    assert made[0].weight.requires_grad


def test_torchs_own_memory_is_overwritten_however_often_it_was_read() -> None:
    """What reads weights must not mark them as lent."""
    model = nn.Sequential(nn.Linear(8, 16))
    own = model[0].weight
    made = sparsec.compile(model, "zeros,magnitude(0.5),freeze", example_inputs=torch.randn(2, 8), copy=False)
    assert made[0].weight is own


def test_a_backward_through_what_was_pruned_in_place_is_refused() -> None:
    """Regression: NumPy wrote past torch's count of writes, so that the gradient was silently another one."""
    model = nn.Sequential(nn.Linear(64, 64))
    x = torch.randn(2, 64)
    out = model(x.clone().requires_grad_()).sum()
    sparsec.compile(model, "magnitude(0.5),freeze", example_inputs=x, copy=False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()
