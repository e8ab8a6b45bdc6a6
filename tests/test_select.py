"""Which kernel serves a product depends on the machine, and on nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch

from sparsec.errors import KernelError
from sparsec.formats import FORMATS
from sparsec.formats.layout import Layout
from sparsec.kernels import Problem, known, select


def choices() -> dict[str, str]:
    """The kernel of every layout that is checked, by type, device and number of rows."""
    layouts = {
        *Layout.checked(),
        *Layout.calibrated("cpu", 0.5),
        *map(Layout.parse, ("dense", "csr8", "csr16", "csr32")),
    }
    found = {}
    for layout in sorted(layouts, key=str):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            for device in ("cpu", "cuda", "meta"):
                for rows in (1, 64):
                    problem = Problem(layout.format, 128, 256, rows, dtype, device, str(layout))
                    try:
                        found[str(problem)] = select(problem).name
                    except KernelError as error:
                        found[str(problem)] = str(error)
    return found


def test_another_process_chooses_the_same_kernels() -> None:
    """One with other hashes, and that imports everything in another order."""
    script = (
        "import sparsec.bench.kernels, sparsec.passes, json, sys;"
        f"sys.path.insert(0, {os.path.dirname(__file__)!r}); from test_select import choices, known, FORMATS;"
        "print(json.dumps([choices(), [k.name for k in known()], list(FORMATS)]))"
    )
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    there = json.loads(done.stdout.splitlines()[-1])
    assert there == [choices(), [k.name for k in known()], list(FORMATS)]
    assert {"bitmap", "csr", "dense"} <= {name.partition("_")[0] for name in there[0].values()}
