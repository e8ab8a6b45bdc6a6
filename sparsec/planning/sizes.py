"""Bytes of a matrix in a layout, from its shape and sparsity alone: a random mask of some of its rows tells."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch

from sparsec.cost.choice import OWN, TORCH, Candidate, Choice, Setting, choose
from sparsec.errors import FormatError, KernelError, SpecError
from sparsec.formats.base import Plan
from sparsec.formats.layout import Layout
from sparsec.kernels import Problem, select
from sparsec.patterns import Pattern

LOOKED_AT = 1 << 21
"""Weights of the mask."""


@cache
def sampled_mask(shape: tuple[int, int], sparsity: float, pattern: str) -> torch.Tensor:
    """A mask of a pattern with exactly this sparsity, of as many rows [some, in] of a matrix [out, in] as are looked at."""
    out_features, in_features = shape
    kept = Pattern.parse(pattern)
    high = kept.block[0] if kept.block is not None else 1
    step = 16 * high
    rows = min(out_features, max(step, LOOKED_AT // max(1, in_features) // step * step))
    scores = torch.rand(rows, in_features, generator=torch.Generator().manual_seed(0))
    return kept.mask(scores, sparsity)


@cache
def planned_bytes(
    layout: Layout, shape: tuple[int, int], dtype: torch.dtype, sparsity: float, pattern: str = "unstructured"
) -> Plan:
    """Of a matrix [out, in] whose mask has this sparsity and pattern. FormatError where the layout does not hold such a mask."""
    if layout.stays:
        return Plan(shape[0] * shape[1] * dtype.itemsize, shape[0] * shape[1])
    mask = sampled_mask(shape, sparsity, pattern)
    if layout.format == "dense":
        mask = torch.ones_like(mask)
    found = layout.plan(mask, dtype)
    share = shape[0] / len(mask)
    return replace(found, nbytes=round(share * found.nbytes), stored=round(share * found.stored))


def chosen_layout(
    layout: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    sparsity: float,
    pattern: str,
    setting: Setting,
) -> Choice:
    """What `lower` would make of a matrix [out, in]: the layout of that name, or the best by the cost model for `auto`."""
    matrix = torch.empty(shape, dtype=dtype, device="meta")
    if layout == "auto":
        return choose(matrix, sampled_mask(shape, sparsity, pattern), setting, (TORCH, OWN))
    wanted = Layout.parse(layout)
    plan = planned_bytes(wanted, shape, dtype, sparsity, pattern)
    settled = wanted if wanted.stays or not plan.parameters else replace(wanted, parameters=plan.parameters)
    try:
        kernel = (
            OWN
            if wanted.stays
            else select(
                Problem(settled.kind.format, *shape, setting.rows, dtype, setting.device, layout=str(settled))
            ).name
        )
    except (KernelError, SpecError) as error:
        raise FormatError(f"{layout}: {error}") from error
    return Choice(Candidate(settled, kernel, plan.nbytes, ()), f"{settled} was asked for")
