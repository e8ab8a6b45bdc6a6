"""Helpers that take the place of torch's threads where a machine is busy: the same numbers, whoever comes late (native/pool.h)."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from format_cases import LAYOUTS, some
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsec.formats import Packed
from sparsec.kernels import operator, operator_args, status
from sparsec.kernels.attention import decode_attention
from sparsec.kernels.library.loader import library

pytestmark = pytest.mark.skipif(not status().built, reason="the reference kernels run in torch's own threads")
BUSY = "while True: pass"
CPUS = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    library().force_helpers(None)
    torch.set_num_threads(before)


def product(packed: Packed, x: Tensor, bias: Tensor | None = None) -> Tensor:
    out = operator(packed)(x, *operator_args(packed, bias))
    assert isinstance(out, Tensor)
    return out


def in_one_thread(call: Callable[[], Tensor]) -> Tensor:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return call()
    finally:
        torch.set_num_threads(threads)


def large(tokens: int = 1) -> tuple[Packed, Tensor]:
    packed, kept = some(LAYOUTS["bitmap"], 768, 768, 0.5, torch.float32)
    return packed, torch.randn(tokens, kept.shape[1])


@given(
    name=st.sampled_from(list(LAYOUTS)),
    tokens=st.sampled_from([1, 2, 5, 17, 40]),
    threads=st.integers(2, 5),
    kind=st.integers(0, 3),
    biased=st.booleans(),
    late=st.booleans(),
)
def test_products_are_bit_equal_to_those_of_one_thread(
    name: str, tokens: int, threads: int, kind: int, biased: bool, late: bool
) -> None:
    """late: what helpers have begun is done again by the thread that called, while they are still at it."""
    layout = LAYOUTS[name]
    dtype = layout.kind.dtypes[kind % len(layout.kind.dtypes)]
    packed, kept = some(layout, 520, 400, 0.5, dtype)
    x, bias = torch.randn(tokens, kept.shape[1]).to(dtype), torch.randn(len(kept)).to(dtype) if biased else None
    right = in_one_thread(lambda: product(packed, x, bias))
    torch.set_num_threads(threads)
    library().force_helpers(True, late)
    for _ in range(5):
        assert torch.equal(product(packed, x, bias), right)


@pytest.mark.parametrize("late", [False, True], ids=["in time", "late"])
def test_attention_is_bit_equal_to_that_of_one_thread(late: bool) -> None:
    q, k, v = torch.randn(1, 6, 1, 64), torch.randn(1, 2, 900, 64), torch.randn(1, 2, 900, 64)
    right = in_one_thread(lambda: decode_attention(q, k, v, None, 0.125))
    library().force_helpers(True, late)
    for _ in range(50):
        assert torch.equal(decode_attention(q, k, v, None, 0.125), right)


@pytest.mark.parametrize("helpers", [True, None], ids=["helpers", "as the machine needs"])
def test_threads_that_call_at_once_all_get_the_right_numbers(helpers: bool | None) -> None:
    cases = [(*large(tokens), tokens) for tokens in (1, 1, 3, 40)]
    right = [in_one_thread(lambda p=packed, x=x: product(p, x)) for packed, x, _ in cases]
    library().force_helpers(helpers)
    wrong = []

    def call(i: int) -> None:
        packed, x, _ = cases[i]
        wrong.extend(i for _ in range(60) if not torch.equal(product(packed, x), right[i]))

    callers = [threading.Thread(target=call, args=(i,)) for i in range(len(cases))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def test_beside_processes_that_compute_all_the_time_the_numbers_stay_right() -> None:
    packed, x = large()
    right = in_one_thread(lambda: product(packed, x))
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(2)]
    try:
        for helpers in (True, None):
            library().force_helpers(helpers)
            until = time.perf_counter() + 0.4
            while time.perf_counter() < until:
                assert torch.equal(product(packed, x), right)
    finally:
        for other in others:
            other.kill()
            other.wait()


def test_a_helper_that_comes_late_writes_nothing_and_reads_nothing_that_is_gone() -> None:
    library().force_helpers(True, late=True)
    outs = []
    for _ in range(20):
        packed, x = large()
        outs.append(product(packed, x).fill_(7))
        del packed, x  # too large for memory that stays mapped
    time.sleep(0.01)
    assert all((out == 7).all() for out in outs)


@pytest.mark.skipif(CPUS < 2, reason="one CPU has no helpers")
def test_weights_are_held_as_long_as_a_helper_is_at_them() -> None:
    packed, x = large()
    library().force_helpers(True, late=True)
    until = time.perf_counter() + 10
    while time.perf_counter() < until:
        values: np.ndarray = packed.tensors()["values"].numpy().copy()
        gone = weakref.ref(values)
        product(dataclasses.replace(packed, values=torch.from_numpy(values)), x)
        del values
        if gone() is not None:
            break
    assert gone() is not None, "a late helper reads what is gone"
    while gone() is not None and time.perf_counter() < until:
        product(packed, x)  # lets go of what was left behind
    assert gone() is None


FORKED = """
import os, signal, sys, torch
sys.path.insert(0, {tests!r})
from test_helpers import large, library, product
torch.set_num_threads(2)
packed, x = large()
rows = torch.randn(40, x.shape[1])
for helpers in (False, True, None):  # the threads of both are there, and in the child neither are
    library().force_helpers(helpers)
    right, right_rows = product(packed, x), product(packed, rows).numpy()
child = os.fork()
signal.alarm(30)  # ends a child that hangs, whatever becomes of its parent
same = all(torch.equal(product(packed, x), right) for _ in range(50)) and (product(packed, rows).numpy() == right_rows).all()
if not child:
    os._exit(0 if same else 1)
assert same and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a process that has used threads may be forked on Linux")
def test_a_forked_process_computes_and_both_end_well() -> None:
    """In helpers of its own: torch's runtime would wait for threads that the child has not got."""
    code = FORKED.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


UNMAPPED = """
import mmap, sys, torch
import numpy as np
sys.path.insert(0, {tests!r})
from test_helpers import large, library, product
torch.set_num_threads(2)
packed, x = large()
library().force_helpers(True, late=True)
for _ in range(200):
    memory = mmap.mmap(-1, 4 * x.numel())
    lent = torch.from_numpy(np.frombuffer(memory, np.float32).reshape(1, -1))
    lent.copy_(x)
    product(packed, lent)
    del lent
    memory.close()  # nobody can read it from now on
"""


@pytest.mark.skipif(CPUS < 2, reason="one CPU has no helpers")
def test_x_may_go_while_a_helper_is_still_at_it() -> None:
    """A helper reads its own copy: one of the caller's memory would end the process here."""
    code = UNMAPPED.format(tests=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
