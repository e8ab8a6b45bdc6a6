"""The factor of a Gram matrix's inverse, made block by block in place: the one that is made in one go."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsec.calibrate import Statistics, factor
from sparsec.errors import ActivationError


def gram_of(columns: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(2 * columns + 1, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x.t() @ x).to(dtype)


@given(st.integers(1, 40), st.integers(1, 45), st.integers(0, 99), st.sampled_from([torch.float32, torch.float64]))
def test_blocks_of_any_size_give_the_same_factor(columns: int, block: int, seed: int, dtype: torch.dtype) -> None:
    gram = gram_of(columns, seed, dtype)
    before = gram.clone()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(factor, "_BLOCK", block)
        found, dead, notes = factor.inverse_factor(gram, 0.01)
    assert torch.equal(gram, before)
    assert (found.dtype, bool(dead.any()), notes) == (dtype, False, [])
    whole = gram.double()
    whole.diagonal().add_(0.01 * whole.diagonal().mean())
    wanted = torch.linalg.cholesky(torch.linalg.inv(whole), upper=True).to(dtype)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))
    assert not found.tril(-1).any()


@given(st.integers(2, 30), st.integers(1, 8))
def test_what_cannot_be_factored_is_said_whatever_block_it_is_in(columns: int, block: int) -> None:
    gram = -gram_of(columns, 0, torch.float32)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(factor, "_BLOCK", block)
        with pytest.raises(ActivationError, match="cannot be factored"):
            factor.inverse_factor(gram, 0.01)


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 130, 300])
def test_both_triangles_of_a_gram_matrix_are_filled(columns: int) -> None:
    found, x = Statistics(columns, True, 4, 2, torch.device("cpu")), torch.randn(50, columns)
    found.add(x[:20])
    found.add(x[20:])
    found.settle()
    torch.testing.assert_close(found.gram, x.t() @ x, rtol=1e-4, atol=1e-3)
    assert torch.equal(found.gram, found.gram.t())
