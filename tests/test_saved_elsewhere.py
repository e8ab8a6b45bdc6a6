"""A model saved on a machine with other instructions loads here, and the other way round."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from architectures import tiny_model
from torch import Tensor, nn

import sparsec
from sparsec.kernels import status
from sparsec.kernels.library.loader import library

IDS = torch.arange(14).view(2, 7)
SCRIPT = """
import sys, torch, sparsec
from sparsec.kernels import status
*folders, last = sys.argv[1:]
models = [sparsec.load(folder) for folder in folders]
with torch.no_grad():
    torch.save([model(torch.arange(14).view(2, 7))[0] for model in models], last)
models[0].save_pretrained(last + "-again")
print(status().isa)
"""


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS)[0]
    return found


def loaded_under(isa: str, folders: list[Path], last: Path) -> list[Tensor]:
    """The logits of saved models in a process that is held to an instruction set; the first is saved again there."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, folders), str(last)],
        capture_output=True,
        text=True,
        env=os.environ | {"SPARSEC_ISA": isa},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [isa]
    found: list[Tensor] = torch.load(last)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_saved_with_the_best_instructions_loads_without_them(dtype: torch.dtype, tmp_path: Path) -> None:
    if not status().built:
        pytest.skip(f"no native kernels: {status().reason}")
    layouts = ["bitmap", "csr"]
    folders, right = [], []
    for layout in layouts:
        model = sparsec.compile(tiny_model("llama")[0].eval().to(dtype), f"magnitude(0.5),freeze,fuse,lower({layout})")
        model.save_pretrained(tmp_path / layout)  # type: ignore[operator]
        folders.append(tmp_path / layout)
        right.append(logits(model))
    bound = {torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype]
    for isa in [name for name in ("avx2", "portable") if name in library().usable]:
        last = tmp_path / isa
        for found, wanted in zip(loaded_under(isa, folders, last), right, strict=True):
            torch.testing.assert_close(found, wanted, rtol=bound, atol=bound)
        back = sparsec.load(f"{last}-again")
        assert torch.equal(logits(back), right[0])  # what lies in the files is the same, and here so are the kernels
