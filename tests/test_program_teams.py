"""A token's threads: those of one region, which its products share, give the numbers of one thread (native/team.h)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from programs import step_forward
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import sparsec
from sparsec.kernels import status
from sparsec.kernels.library.loader import library

pytestmark = pytest.mark.skipif(not status().built, reason="programs are native")
SPECS = {
    "bitmap": "magnitude(0.5),freeze,fuse,lower(bitmap)",
    "csr": "magnitude(0.8),freeze,fuse,lower(csr)",
    "dense": "fuse,lower(dense)",
    "int8": "fuse,lower(dense,values='int8')",
    "bitmap:int4": "magnitude(0.5),freeze,fuse,lower(bitmap,values='int4g64')",
}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    library().force_helpers(None)
    torch.set_num_threads(before)


@cache
def large(spec: str, dtype: torch.dtype) -> Any:
    """A model whose products are worth several threads each; others of the tests' are multiplied by one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, vocab_size=600
    )  # fmt: skip
    return sparsec.compile(LlamaForCausalLM(config).eval().to(dtype), SPECS[spec])


@torch.no_grad()
def steps(model: Any, threads: int, count: int = 4, batch: int = 1) -> list[Tensor]:
    """Logits of some tokens after a prompt, which is read by one thread: torch's own products differ by their number."""
    torch.set_num_threads(1)
    cache_ = DynamicCache(config=model.config)
    model(torch.arange(3, 90).expand(batch, -1), past_key_values=cache_, use_cache=True)
    torch.set_num_threads(threads)
    assert step_forward(model).reason(batch) == ""
    tokens = torch.tensor([[7 * i + b for b in range(batch)] for i in range(count)])
    return [model(t[:, None], past_key_values=cache_, use_cache=True).logits for t in tokens]


@given(
    spec=st.sampled_from(list(SPECS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    threads=st.integers(2, 6),
    batch=st.sampled_from([1, 1, 2, 5]),
    helpers=st.sampled_from([None, None, True]),
)
def test_the_number_of_threads_changes_no_bit(
    spec: str, dtype: torch.dtype, threads: int, batch: int, helpers: bool | None
) -> None:
    model = large(spec, dtype)
    right = steps(model, 1, batch=batch)
    library().force_helpers(helpers)
    found = steps(model, threads, batch=batch)
    library().force_helpers(None)
    assert all(map(torch.equal, found, right))


def test_callers_at_once_have_teams_of_their_own() -> None:
    models = [large(spec, torch.float32) for spec in SPECS]
    right = [steps(model, 1) for model in models]
    torch.set_num_threads(3)
    wrong = []

    @torch.no_grad()
    def call(i: int) -> None:
        for _ in range(10):
            cache_ = DynamicCache(config=models[i].config)
            models[i](torch.arange(3, 90)[None], past_key_values=cache_, use_cache=True)
            for n, logits in enumerate(right[i]):
                found = models[i](torch.tensor([[7 * n]]), past_key_values=cache_, use_cache=True).logits
                if not torch.allclose(found, logits, atol=1e-4):
                    wrong.append((i, n))

    callers = [threading.Thread(target=call, args=(i,)) for i in range(len(models))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def test_a_step_that_fails_lets_its_threads_go() -> None:
    """Regression against waiting for ever: the token that is none is found out within the region."""
    model = large("bitmap", torch.float32)
    right = steps(model, 3)
    with torch.no_grad():
        cache_ = DynamicCache(config=model.config)
        model(torch.arange(3, 90)[None], past_key_values=cache_, use_cache=True)
        for _ in range(20):
            with pytest.raises(IndexError):
                model(torch.tensor([[600]]), past_key_values=cache_, use_cache=True)
    assert all(map(torch.equal, steps(model, 3), right))


def test_beside_processes_that_compute_all_the_time_no_bit_changes() -> None:
    """Late threads are noticed in the middle of a token, whose rest is done by helpers."""
    model = large("bitmap", torch.float32)
    right = steps(model, 1, 12)
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        for _ in range(12):
            assert all(map(torch.equal, steps(model, 2, 12), right))
    finally:
        for other in others:
            other.kill()
            other.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="a process that has used threads may be forked on Linux")
def test_a_fork_decodes_and_ends() -> None:
    model = large("bitmap", torch.float32)
    right = steps(model, 2)
    child = os.fork()
    if not child:
        signal.alarm(60)  # ends a child that hangs
        same = all(map(torch.equal, steps(model, 2), right))
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_threads_may_be_changed_between_tokens(threads: int) -> None:
    model = large("int8", torch.bfloat16)
    right = steps(model, 1)
    assert all(map(torch.equal, steps(model, 2), right))
    assert all(map(torch.equal, steps(model, threads), right))


@torch.no_grad()
def test_the_last_position_is_asked_for_by_index() -> None:
    """A slice of a row makes torch copy a frozen head in bf16, at every prompt."""
    model = large("bitmap", torch.bfloat16)
    ids, rows = torch.arange(3, 90).expand(2, -1), []
    taken = model.lm_head.register_forward_pre_hook(lambda module, args: rows.append(args[0]))
    try:
        last = model(ids, logits_to_keep=1).logits
        whole = model(ids).logits
    finally:
        taken.remove()
    assert rows[0].shape == (2, 1, 512)
    assert rows[0].is_contiguous()
    assert torch.allclose(last.float(), whole[:, -1:].float(), atol=2e-2)
    assert model(ids, logits_to_keep=3).logits.shape[1] == 3


class Told(torch.nn.Module):
    """A part that looks at what is asked for, as those of some architectures do."""

    def forward(self, x: Tensor, logits_to_keep: int = 0) -> Tensor:
        """x."""
        assert isinstance(logits_to_keep, int)
        return x


@torch.no_grad()
def test_a_part_that_is_told_how_many_gets_a_number() -> None:
    model = sparsec.compile(LlamaForCausalLM(large("bitmap", torch.float32).config).eval(), SPECS["bitmap"])
    model.model.add_module("told", Told())
    ids, rows = torch.arange(3, 90).expand(2, -1), []
    model.lm_head.register_forward_pre_hook(lambda module, args: rows.append(args[0]))
    model(ids, logits_to_keep=1)
    assert not rows[0].is_contiguous() or rows[0].stride(0) != 512
