"""Packed tensors that are changed or replaced, in whatever way: a product takes what is valid, and refuses the rest unread."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import programs
import pytest
import torch
from format_cases import LAYOUTS, some
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import DynamicCache

from sparsec.errors import FormatError
from sparsec.formats.base import Packed
from sparsec.formats.layout import Layout
from sparsec.formats.seen import recall
from sparsec.kernels import SparseLinear, status
from sparsec.kernels.modules.group import Group
from sparsec.kernels.modules.packed_layer import PackedLayer
from sparsec.kernels.modules.sparse_embedding import SparseEmbedding

CODED = (
    "bitmap:int8",
    "bitmap:int4g32",
    "csr8:int8",
    "csr16:int4g32",
    "bsr16x16:int8g32",
    "nm2:4:int8",
    "dense:int4mg32",
)
NAMES = (*LAYOUTS, *CODED)
PATH = "model.layers.3.proj"


def packed_of(name: str, seed: int) -> Packed:
    """A small matrix in a layout."""
    generator = torch.Generator().manual_seed(seed)
    layout = LAYOUTS.get(name)
    if layout is not None:
        return some(layout, 40, 64, 0.5, torch.float32, seed)[0]
    layout = Layout.parse(name)
    mask = layout.sample_mask((48, 64), 0.5, generator)
    if layout.format == "dense":
        mask = torch.ones_like(mask)
    return layout.pack(torch.randn(48, 64, generator=generator), mask)


def places(packed: Packed) -> list[str]:
    """The tensors that say where values stand."""
    return [
        n
        for n, t in packed.tensors().items()
        if n in ("row_ptr", "col_idx", "bits", "panel_ptr", "index") and t.numel()
    ]


def changed(tensor: Tensor, rng: random.Random) -> Tensor:
    """A copy with one or two numbers that are others."""
    new = tensor.clone()
    flat, info = new.view(-1), torch.iinfo(tensor.dtype)
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(flat.numel())
        near = int(flat[at]) + rng.choice((-8, -1, 1, 8))
        flat[at] = min(max(rng.choice((near, near, info.max, info.min, 0)), info.min), info.max)
    return new


def hand(layer: PackedLayer, name: str, new: Tensor) -> PackedLayer:
    packed = layer.packed
    made = type(layer)(type(packed).from_parts({**packed.tensors(), name: new}, packed.scalars()))
    made.path = layer.path
    return made


def data(layer: PackedLayer, name: str, new: Tensor) -> PackedLayer:
    getattr(layer, name).data = new
    return layer


def attribute(layer: PackedLayer, name: str, new: Tensor) -> PackedLayer:
    setattr(layer, name, new)
    return layer


def table(layer: PackedLayer, name: str, new: Tensor) -> PackedLayer:
    layer._buffers[name] = new
    return layer


def registered(layer: PackedLayer, name: str, new: Tensor) -> PackedLayer:
    layer.register_buffer(name, new)
    return layer


def swapped(layer: PackedLayer, name: str, new: Tensor) -> PackedLayer:
    torch.utils.swap_tensors(getattr(layer, name), new)
    return layer


def written(layer: PackedLayer, name: str, new: Tensor) -> PackedLayer:
    getattr(layer, name).copy_(new)
    return layer


def written_under_inference(layer: PackedLayer, name: str, new: Tensor) -> PackedLayer:
    with torch.inference_mode():
        getattr(layer, name).copy_(new)
    return layer


def refilled(layer: PackedLayer, name: str, new: Tensor) -> PackedLayer:
    getattr(layer, name).set_(new)
    return layer


def called(layer: PackedLayer, name: str, new: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.func.functional_call(layer, {name: new}, x)


ROUTES = (hand, data, attribute, table, registered, swapped, written, written_under_inference, refilled, called)
MODES = (torch.no_grad, torch.enable_grad, torch.inference_mode)


@settings(max_examples=120, deadline=None)
@given(rng=st.randoms(use_true_random=False), data=st.data())
def test_whatever_changes_a_tensor_the_next_call_takes_it_or_names_it(rng: random.Random, data: st.DataObject) -> None:
    packed = packed_of(data.draw(st.sampled_from([n for n in NAMES if places(packed_of(n, 0))])), rng.randrange(4))
    route, mode = data.draw(st.sampled_from(ROUTES)), data.draw(st.sampled_from(MODES))
    of_table = data.draw(st.booleans())
    name = data.draw(st.sampled_from(places(packed)))
    layer: PackedLayer = SparseEmbedding(packed) if of_table else SparseLinear(packed)
    layer.path = PATH
    rows, columns = packed.shape
    x = torch.arange(rows)[None] if of_table else torch.randn(3, columns)
    if data.draw(st.booleans()):
        layer(x)
    new = changed(packed.tensors()[name], rng)
    then = type(packed).from_parts({n: t.clone() for n, t in {**packed.tensors(), name: new}.items()}, packed.scalars())
    faults = then.layout_faults() or then.content_faults()
    with mode():
        call = route(layer, name, new)
        for _ in range(2):
            if faults:
                with pytest.raises(FormatError) as caught:
                    call(x)
                assert str(caught.value).startswith(PATH)
                assert any(n in str(caught.value) for n in places(packed))
            else:
                wanted = then.unpack() if of_table else nn.functional.linear(x, then.exact())
                found = call(x)[0] if of_table else call(x)
                torch.testing.assert_close(
                    found, wanted, atol=0.02 if ":" in str(Layout.of(packed)) else 1e-5, rtol=1e-5
                )
    if faults and isinstance(call, PackedLayer):
        for way in (lambda: call.to(torch.bfloat16), lambda: call.weight, call.check):
            with pytest.raises(FormatError, match=PATH):
                way()


@pytest.mark.parametrize(
    "odd", [None, 3, nn.Parameter(torch.zeros(5)), torch.zeros(5), torch.zeros(9, dtype=torch.int64)], ids=repr
)
@pytest.mark.parametrize("route", [attribute, table, called])
def test_what_is_no_such_tensor_is_named(route: Callable[..., Any], odd: Any) -> None:
    layer = SparseLinear(packed_of("csr16", 0))
    layer.path, x = PATH, torch.randn(3, 64)
    for name in layer._names:
        before = layer._buffers[name]
        with pytest.raises((FormatError, TypeError), match=PATH if route is not called else None):
            route(layer, name, odd)(x)
        layer._buffers[name] = before
        layer(x)


def test_rows_of_another_matrix_are_refused() -> None:
    full = torch.ones(41, 64, dtype=torch.bool)
    full[40] = False
    layer, other = (SparseLinear(LAYOUTS["csr16"].pack(torch.randn(n, 64), full[:n])) for n in (40, 41))
    layer(torch.randn(1, 64))
    for name in layer._names:
        setattr(layer, name, getattr(other, name))
    with pytest.raises(FormatError, match=r"must form a matrix \[40, 64\], got \[41, 64\]"):
        layer(torch.randn(1, 64))


@pytest.mark.parametrize("in_place", [False, True])
def test_blocks_of_another_width_are_looked_at(in_place: bool) -> None:
    """Their columns are counted in blocks: which are right depends on the shape of the values."""
    packed = packed_of("bsr16x16", 0)
    layer = SparseLinear(packed)
    layer(torch.randn(1, 64))
    shape = (len(packed.values), 32, 16, 1)
    if in_place:
        layer.values.resize_(shape)
    else:
        layer.values = torch.zeros(shape)
    with pytest.raises(FormatError, match="col_idx must lie in"):
        layer(torch.randn(1, 64))


def test_values_may_be_written_to_and_places_are_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        layer = SparseLinear(packed_of(name, 1))
        x = torch.randn(2, layer.in_features)
        layer(x)
        with monkeypatch.context() as watched:
            watched.setattr(type(layer.packed), "content_faults", lambda _: pytest.fail("the contents were read again"))
            values = layer.values
            with torch.no_grad():
                (values.mul_(2) if values.is_floating_point() else values.copy_(values.clone()))
            layer(x)


def test_what_was_packed_loaded_or_copied_is_looked_at_no_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = SparseLinear(packed_of("bitmap", 1))
    twin = SparseLinear(packed_of("bitmap", 1))
    assert recall(layer.packed).marks[0][0] == "values"
    twin.load_state_dict({name: tensor.clone() for name, tensor in layer.state_dict().items()})
    with monkeypatch.context() as watched:
        watched.setattr(type(layer.packed), "content_faults", lambda _: pytest.fail("the contents were read again"))
        for module in (layer, twin):
            module(torch.randn(1, 64))
            module.to(torch.float32)(torch.randn(1, 64))


def test_memory_that_comes_again_is_looked_at() -> None:
    """An address, a version and an object that are those of before tell nothing where the memory in between was given back."""
    layer, x = SparseLinear(packed_of("csr32", 1)), torch.randn(1, 64)
    memory = bytearray(layer.col_idx.numpy().tobytes())
    layer.col_idx.data = torch.frombuffer(memory, dtype=torch.int32)
    layer(x)
    before = layer.col_idx.data_ptr(), layer.col_idx._version
    layer.col_idx.data = torch.zeros(0, dtype=torch.int32)
    memory[:4] = (1000).to_bytes(4, "little")
    layer.col_idx.data = torch.frombuffer(memory, dtype=torch.int32)
    assert before == (layer.col_idx.data_ptr(), layer.col_idx._version)
    with pytest.raises(FormatError, match="col_idx must lie in"):
        layer(x)


def test_a_tensor_without_versions_is_looked_at_when_it_is_replaced() -> None:
    with torch.inference_mode():
        layer = SparseLinear(packed_of("csr32", 1))
        x = torch.randn(1, 64)
        layer(x)
        layer.col_idx = torch.full_like(layer.col_idx, 1000)
        with pytest.raises(FormatError, match="col_idx"):
            layer(x)


def test_a_member_of_a_group_is_looked_at_before_the_product_of_all() -> None:
    torch.manual_seed(0)
    layers = [SparseLinear(packed_of("csr16", seed)) for seed in range(3)]
    group, x = Group(3), torch.randn(2, 64)
    for index, layer in enumerate(layers):
        layer.path = f"layers.{index}"
        layer.join(group, index)
    alone = [nn.functional.linear(x, layer.packed.unpack()) for layer in layers]
    for before in (False, True):
        with torch.no_grad():
            if before:
                for layer in layers:
                    layer(x)
            good = layers[1].col_idx.clone()
            layers[1].col_idx[5] = 30000
            for index in (0, 2):
                torch.testing.assert_close(layers[index](x), alone[index])
            assert not group._plans  # nobody multiplied by it
            with pytest.raises(FormatError, match=r"layers\.1: .*col_idx"):
                layers[1](x)
            layers[1].col_idx.copy_(good)
            for layer, right in zip(layers, alone, strict=True):
                torch.testing.assert_close(layer(x), right)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sparsec", "inductor", "eager"])
@torch.no_grad()
def test_a_compiled_graph_looks_too(backend: str) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(
        SparseEmbedding(packed_of("csr16", 0)), SparseLinear(packed_of("bitmap", 1)), nn.ReLU()
    ).eval()
    for path, layer in model.named_children():
        layer.path = path
    compiled, ids = torch.compile(model, backend=backend), torch.arange(6)[None]
    torch.testing.assert_close(compiled(ids), model(ids))
    for name, at in (("col_idx", 0), ("bits", 1)):
        layer: Any = model[at]
        tensor = getattr(layer, name)
        good = tensor.clone()
        tensor[0] = torch.iinfo(tensor.dtype).max
        with pytest.raises(FormatError, match=rf"^{at}: .*{name}" if backend == "sparsec" else name):
            compiled(ids)
        tensor.copy_(good)
        torch.testing.assert_close(compiled(ids), model(ids))
        setattr(layer, name, torch.full_like(good, 3))
        with pytest.raises(FormatError, match=name):
            compiled(ids)
        setattr(layer, name, good)
        torch.testing.assert_close(compiled(ids), model(ids))


@torch.no_grad()
def test_a_file_of_torch_export_that_was_altered_is_refused(tmp_path: Any) -> None:
    model = nn.Sequential(SparseEmbedding(packed_of("csr16", 0)), SparseLinear(packed_of("bitmap", 1))).eval()
    ids = torch.arange(6)[None]
    program = torch.export.export(model, (ids,))
    torch.testing.assert_close(program.module()(ids), model(ids))
    for name in ("0.col_idx", "1.panel_ptr"):
        good = program.state_dict[name].clone()
        program.state_dict[name].fill_(3)
        with warnings.catch_warnings(action="ignore"):
            torch.export.save(program, tmp_path / "model.pt2")
            found = torch.export.load(tmp_path / "model.pt2")
        with pytest.raises(FormatError, match=name.partition(".")[2]):
            found.module()(ids)
        program.state_dict[name].copy_(good)
    torch.testing.assert_close(program.module()(ids), model(ids))


@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_a_program_takes_no_step_with_what_was_written_to(fused: bool) -> None:
    model = programs.fresh("llama", programs.BITMAP if fused else programs.BITMAP.replace("fuse,", ""))
    if not status().built:
        pytest.skip("needs the native library: programs are its own")
    layer = model.model.layers[1].mlp.down_proj
    ids, cache = torch.tensor([[3, 4, 5]]), DynamicCache(config=model.config)

    def step(token: int) -> Tensor:
        logits: Tensor = model(torch.tensor([[token]]), past_key_values=cache).logits
        return logits

    model(ids, past_key_values=cache)
    with programs.counted() as steps:
        step(6)
        assert len(steps) == 1
        good = layer.bits.clone()
        layer.bits[0] = torch.iinfo(torch.int16).max
        with pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.down_proj: .*bits"):
            step(7)
        assert len(steps) == 1
        layer.bits.copy_(good)
        fresh = DynamicCache(config=model.config)
        model(ids, past_key_values=fresh)
        cache = fresh
        step(6)
        assert len(steps) == 2
        layer.values.mul_(2)  # which a program takes as it is
        step(7)
        assert len(steps) == 3


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "grad": lambda layer, x: torch.func.grad(lambda y: layer(y).sum())(x),
    "vmap": lambda layer, x: torch.vmap(layer)(x),
    "jvp": lambda layer, x: torch.func.jvp(layer, (x,), (x,)),
    "vmap of grad": lambda layer, x: torch.vmap(torch.func.grad(lambda y: layer(y).sum()))(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", ["csr8", "bitmap", "bsr16x16", "nm2:4", "bitmap:int8"])
def test_contents_are_looked_at_beside_a_transform_of_torch(name: str, transform: str) -> None:
    """Regression: what is read was wrapped by the transform, and has no memory then."""
    layer = SparseLinear(packed_of(name, 1))
    x = torch.randn(2, layer.in_features)
    tensor = getattr(layer, places(layer.packed)[0])
    for good in (True, False):
        tensor.copy_(tensor.clone() if good else torch.full_like(tensor, torch.iinfo(tensor.dtype).max))
        if good:
            TRANSFORMS[transform](layer, x)
        else:
            with pytest.raises(FormatError, match="SparseLinear"):
                TRANSFORMS[transform](layer, x)
