"""Every pass and every way of lowering on a device that is not the CPU: one that exists without a GPU, in a child process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent
SPECS = {
    "magnitude(0.5),freeze,sparsity,flops,fuse,lower(auto)": "bitmap",
    "magnitude(0.5, allocation='alphapruning'),freeze,lower(csr)": "csr16",
    "magnitude(0.5, pattern='block:16x16'),freeze,lower(bsr16x16)": "bsr16x16",
    "magnitude(pattern='2:4'),freeze,lower(nm)": "nm2:4",
    "wanda(0.5, allocation='owl'),freeze,lower(bitmap)": "bitmap",
    "wanda(0.5, allocation='sensitivity'),freeze,lower(bitmap)": "bitmap",
    "sparsegpt(0.5),freeze,lower(csr32)": "csr32",
    "admm(0.5),freeze,lower(csr32)": "csr32",
}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which the other tests use")
def test_no_pass_mixes_devices_or_computes_something_else_there() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON")}
    command = [sys.executable, str(ROOT / "other_device.py"), *SPECS]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    *lines, last = ended.stdout.splitlines()
    assert [line.rpartition(": ")[::2] for line in lines] == list(SPECS.items())
    assert last.startswith("extend: ")


def test_a_tensor_of_the_cpu_is_seen_there() -> None:
    code = """
import torch
from other_device import Device, There
with Device():
    there = There(torch.ones(3))
    assert (there + 1).device.type == (torch.zeros(2, device=there.device)).device.type == "elsewhere"
    assert there.mul_(2) is there
    try:
        there + torch.ones(3)
    except RuntimeError as error:
        print(error)
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "aten::add.Tensor takes tensors of two devices: [(3,)] are on the CPU\n"
