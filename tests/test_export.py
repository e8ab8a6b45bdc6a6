"""Exported models: a .pt2 of a lowered model runs elsewhere, with the same results, once sparsec is imported."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_model
from format_cases import LAYOUTS, some
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import sparsec
from sparsec.kernels import SparseLinear
from sparsec.kernels.modules.dense_linear import DenseLinear

DTYPES = (torch.float32, torch.bfloat16)


def layers(dtype: torch.dtype) -> nn.Module:
    """One of every layout that holds the dtype, and sparsec's dense kernel; each takes what the one before gives."""
    names = [name for name, case in LAYOUTS.items() if case.kind.format != "wcsr" and dtype in case.kind.dtypes]
    made: list[nn.Module] = []
    width = 48
    for seed, name in enumerate(names):
        out, _ = LAYOUTS[name].fit(48, 48)
        columns = LAYOUTS[name].fit(48, width)[1]
        if columns != width:
            made.append(nn.Linear(width, columns, dtype=dtype))
        packed, _ = some(LAYOUTS[name], out, columns, 0.5, dtype, seed)
        made.append(SparseLinear(packed, torch.zeros(packed.shape[0], dtype=dtype) if seed % 2 else None))
        made.append(nn.LayerNorm(packed.shape[0], dtype=dtype))
        width = packed.shape[0]
    return nn.Sequential(*made, DenseLinear(nn.Linear(width, 8, dtype=dtype))).eval()


class Readers(nn.Module):
    """Linears of one value, whose products are one call once they are fused."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(32, 32, bias=i == 1) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.parts
        return first(x) + second(x) * third(x)


def exported(model: nn.Module, x: Tensor) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model, (x,), dynamic_shapes=({0: Dim("rows", min=2, max=64)},), strict=False)


def reread(program: ExportedProgram) -> Any:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_every_layout_is_exported_and_read_again(dtype: torch.dtype) -> None:
    model = layers(dtype)
    read = reread(exported(model, torch.randn(4, 48).to(dtype)))
    for rows in (2, 7, 64):
        x = torch.randn(rows, 48).to(dtype)
        assert torch.equal(read(x), model(x))


@torch.no_grad()
def test_a_group_is_one_operator_of_the_exported_model() -> None:
    model = sparsec.compile(
        Readers().eval(), "magnitude(0.5, targets='*'),freeze,fuse,lower(csr)", example_inputs=torch.ones(3, 32)
    )
    program = exported(model, torch.randn(4, 32))
    assert [str(n.target) for n in program.graph.nodes if "sparsec" in str(n.target)] == [
        "sparsec.fused_linear.default"
    ]
    x = torch.randn(9, 32)
    assert torch.equal(reread(program)(x), model(x))


class Logits(nn.Module):
    """What a model says, as a plain tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.model(ids, use_cache=False).logits
        return found


@pytest.mark.slow
@torch.no_grad()
def test_another_process_needs_no_more_than_sparsec(tmp_path: Path) -> None:
    compiled: Any = sparsec.compile(tiny_model("llama")[0].eval(), "magnitude(0.5),freeze,fuse,lower(bitmap)")
    ids = torch.arange(14).view(2, 7)
    shapes = ({1: Dim("length", min=2, max=64)},)
    program = torch.export.export(Logits(compiled), (ids,), dynamic_shapes=shapes, strict=False)
    torch.export.save(program, tmp_path / "model.pt2")
    longer = torch.arange(22).view(2, 11)
    torch.save((longer, compiled(longer, use_cache=False).logits), tmp_path / "case.pt")
    for first in ("import sparsec, torch", "import torch, torch._export.serde.serialize, sparsec"):
        code = (
            f"{first}\ntorch.set_num_threads({torch.get_num_threads()})\nids, logits = torch.load({str(tmp_path / 'case.pt')!r})\n"
            f"model = torch.export.load({str(tmp_path / 'model.pt2')!r}).module()\n"
            "print(torch.equal(model(ids), logits))"
        )
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], capture_output=True, text=True, env=dict(os.environ), check=False
        )
        assert done.stdout.split()[-1:] == ["True"], done.stderr[-2000:]
