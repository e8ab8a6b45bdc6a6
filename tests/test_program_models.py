"""Models that decode by programs are models as before: changed, copied, saved, hooked, wrapped, in threads, after a fork."""

from __future__ import annotations

import copy
import os
import pickle
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import BITMAP, counted, decode, fresh, near, own_code, step_forward, tokens
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

import sparsec
from sparsec.kernels import status
from sparsec.kv_cache import cache_argument

CODES = "magnitude(0.5),freeze,fuse,lower(bitmap, values='int4mg64')"

pytestmark = pytest.mark.skipif(not status().built, reason="no native kernels")


def agrees(model: Any, served: bool = True) -> None:
    """A model gives what its own code gives, by a program or not."""
    ids = tokens(2, 7)
    with counted() as steps:
        found = decode(model, ids, 4, DynamicCache())
    assert len(steps) == (3 if served else 0), step_forward(model).reason(2)
    with own_code(model):
        near(found, decode(model, ids, 4, DynamicCache()))


# ---- what changes ---------------------------------------------------------------------------------------------------------------


def _half(model: Any) -> None:
    model.to(torch.bfloat16).to(torch.float32)


def _data(model: Any) -> None:
    model.model.norm.weight.data = torch.rand(32)


def _larger(name: str, tensor: Tensor) -> Tensor:
    """Values and scales; these are bits of bf16, of which 128 stand for twice the number."""
    if name.endswith(".scale"):
        return tensor.where(tensor == 0, tensor + 128)
    return tensor * 2 if tensor.is_floating_point() else tensor


def _inside(model: Any) -> None:
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
        for name, tensor in model.model.layers[0].mlp.state_dict().items():
            tensor.copy_(_larger(name, tensor))


def _state(model: Any) -> dict[str, Tensor]:
    return {name: _larger(name, tensor).clone() for name, tensor in model.state_dict().items()}


def _loaded(model: Any) -> None:
    model.load_state_dict(_state(model))


def _assigned(model: Any) -> None:
    model.load_state_dict(_state(model), assign=True)


def _replaced(model: Any) -> None:
    model.lm_head = nn.Linear(32, 64, bias=False)


def _norm(model: Any) -> None:
    model.model.norm = copy.deepcopy(model.model.norm)
    model.model.norm.variance_epsilon = 1.0


def _parameter(model: Any) -> None:
    model.model.norm.weight = nn.Parameter(torch.rand(32))


def _fewer(model: Any) -> None:
    model.config.num_hidden_layers = 1
    model.model.layers = model.model.layers[:1]


def _eager(model: Any) -> None:
    model.set_attn_implementation("eager")


@pytest.mark.parametrize("spec", [BITMAP, CODES], ids=["plain values", "codes"])
@pytest.mark.parametrize(
    "change", [_half, _data, _inside, _loaded, _assigned, _replaced, _norm, _parameter, _fewer, _eager]
)
def test_what_is_changed_is_what_decodes(change: Callable[[Any], None], spec: str) -> None:
    model = fresh(spec=spec)
    agrees(model)
    before = decode(model, tokens(2, 7), 4, DynamicCache())
    change(model)
    model.eval()
    agrees(model)
    if change not in (_half, _eager):
        assert (before[-1] - decode(model, tokens(2, 7), 4, DynamicCache())[-1]).abs().max() > 1e-3


def test_a_model_in_training_and_one_whose_module_was_patched_run_their_own_code() -> None:
    model = fresh()
    agrees(model)
    model.train()
    agrees(model, served=False)
    model.eval()
    agrees(model)
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: type(mlp).forward(mlp, x) * 2
    agrees(model, served=False)
    del mlp.forward
    agrees(model)


def test_a_number_of_a_module_that_is_changed_by_hand_counts_from_the_next_text_on() -> None:
    model = fresh()
    agrees(model)
    first = step_forward(model).prepared(2)
    agrees(model)
    assert step_forward(model).prepared(2) is first  # nothing is prepared again for a text that begins
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.5
    agrees(model)
    assert step_forward(model).prepared(2) is not first
    model.model.layers[0].self_attn.scaling *= 3
    agrees(model)


def test_hooks_inside_are_called_by_the_models_own_code_which_is_said_once() -> None:
    model, seen = fresh(), []
    agrees(model)
    hook = model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    ids = tokens(2, 7)
    with counted() as steps, pytest.warns(RuntimeWarning, match="LlamaForCausalLM has forward hooks inside") as said:
        decode(model, ids, 4, DynamicCache())
    assert len(said) == 1
    assert not len(steps)
    assert len(seen) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        agrees(model, served=False)
    hook.remove()
    agrees(model)
    called = []
    model.register_forward_hook(lambda *_: called.append(1))  # the model's own is around the program
    agrees(model)
    assert len(called) == 8


def test_an_attention_of_somebodys_own_is_not_replaced() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("twice", lambda *args, **kw: (sdpa_attention_forward(*args, **kw)[0] * 2, None))
    AttentionMaskInterface.register("twice", sdpa_mask)
    model = fresh()
    agrees(model)
    model.set_attn_implementation("twice")
    assert "computes attention in a way of its own, twice" in step_forward(model).reason()
    agrees(model, served=False)
    model.set_attn_implementation("sdpa")
    agrees(model)


# ---- copies ---------------------------------------------------------------------------------------------------------------------


def test_copies_decode_by_programs_of_their_own() -> None:
    model = fresh()
    agrees(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        agrees(other)
        with torch.no_grad():
            other.model.norm.weight.mul_(3)
        agrees(other)
    agrees(model)
    shallow = copy.copy(model)
    agrees(shallow)
    del model
    agrees(shallow)


def test_a_shallow_copy_of_a_deep_copy_outlives_it() -> None:
    """Regression: a model out of a copy or a pickle was not known to its forward when it was gone."""
    for make in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        model = make(fresh())
        agrees(model)
        shallow = copy.copy(model)
        del model
        agrees(shallow)


def test_a_saved_model_decodes_natively_and_a_dense_one_is_plain(tmp_path: Path) -> None:
    model = fresh()
    agrees(model)
    model.save_pretrained(tmp_path / "saved")
    agrees(sparsec.load(tmp_path / "saved"))
    assert "forward" not in vars(model.sparsec.to_dense())


# ---- around a call --------------------------------------------------------------------------------------------------------------


def test_gradients_autocast_and_modes_turn_programs_off() -> None:
    model, ids = fresh(), tokens(1, 5)
    agrees(model)
    cache = DynamicCache()
    decode(model, ids, 4, cache)
    name = cache_argument(model)
    with counted() as steps:
        out = model(ids[:, -1:], **{name: cache})
        assert out.logits.requires_grad == any(p.requires_grad for p in model.parameters())
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert model(ids[:, -1:], **{name: cache}).logits.dtype == torch.bfloat16
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(ids[:, -1:], **{name: cache})
        assert counter.get_total_flops() > 0
    assert not len(steps)
    with torch.inference_mode(), counted() as steps:
        model(ids[:, -1:], **{name: cache})
    assert len(steps) == 1
    with torch.no_grad(), counted() as steps:
        model(ids[:, -1:], **{name: cache})
    assert len(steps) == 1


def test_a_model_that_first_decodes_under_inference_mode_serves_both() -> None:
    model = fresh()
    with torch.inference_mode():
        agrees(model)
    agrees(model)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        agrees(model)


def test_a_default_device_or_dtype_changes_nothing() -> None:
    model = fresh()
    try:
        torch.set_default_dtype(torch.float64)
        agrees(model)
        with torch.device("meta"), counted() as steps, torch.no_grad():
            cache = DynamicCache()
            given = {cache_argument(model): cache, "use_cache": True}
            ids = torch.ones(1, 2, dtype=torch.int64, device="cpu")
            own = torch.arange(2, device="cpu")[None]
            model(ids, position_ids=own, **given)
        assert not len(steps)
    finally:
        torch.set_default_dtype(torch.float32)


def test_several_threads_decode_at_once() -> None:
    model = fresh()
    wanted = [decode(model, tokens(1 + i % 3, 12, i), 3, DynamicCache()) for i in range(6)]
    model = fresh()  # prepared by whoever comes first
    found: dict[int, list[Tensor]] = {}

    def run(i: int) -> None:
        found[i] = decode(model, tokens(1 + i % 3, 12, i), 3, DynamicCache())

    with counted() as steps:
        threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(steps) == 6 * 9
    for i, expected in enumerate(wanted):
        near(found[i], expected, 1e-5)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_process_that_was_forked_decodes() -> None:
    model, ids = fresh(), tokens(2, 8)
    wanted = decode(model, ids, 3, DynamicCache())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if not child:
        code = 1
        try:
            near(decode(model, ids, 3, DynamicCache()), wanted, 1e-5)
            near(decode(fresh(), ids, 3, DynamicCache()), wanted, 1e-5)
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    near(decode(model, ids, 3, DynamicCache()), wanted, 1e-5)


def test_torch_compile_and_export_take_the_models_own_code() -> None:
    model, ids = fresh(), tokens(1, 6)
    with torch.no_grad():
        wanted = model(ids).logits
        exported = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
        torch.testing.assert_close(exported.module()(ids, use_cache=False).logits, wanted)
    torch.compiler.reset()
    faster = torch.compile(model, backend="eager")
    with counted() as steps:
        near(decode(faster, ids, 4, DynamicCache()), decode(model, ids, 4, DynamicCache()))
    assert len(steps) == 2
    torch.compiler.reset()
