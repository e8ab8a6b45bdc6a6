"""What sparsec takes of torch without a promise: an error or a cost in words where it is missing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from private_names import lacking, wanted
from project import PYPROJECT

from sparsec import private


def said(gone: str, call: str) -> str:
    """What a process says, in which torch has lost a name, of a call."""
    owner, _, name = gone.rpartition(".")
    script = f"import torch, {owner}\ndelattr({owner}, {name!r})\n{call}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.mark.parametrize("gone", ["torch._C._AutoDispatchBelowAutograd", "torch._has_compatible_shallow_copy_type"])
def test_a_torch_without_what_is_needed_is_named_with_those_that_are_tested(gone: str) -> None:
    last = said(gone, "import sparsec; sparsec.compile").strip().splitlines()[-1]
    assert last.startswith(f"sparsec.errors.TorchVersionError: sparsec does not run with torch {torch.__version__} (")
    assert gone.rpartition(".")[2] in last
    assert f"{private.TESTED} are tested: install one of them" in last


def test_a_compiler_without_what_is_needed_is_named() -> None:
    call = "m = torch.compile(torch.nn.Linear(2, 2), backend='sparsec'); m(torch.ones(1, 2))"
    found = said("torch._inductor.exc.InductorError", call)
    assert 'torch.compile(backend="sparsec") does not run with torch' in found
    assert 'call the model itself, or torch.compile(backend="inductor")' in found


def test_what_is_missing_and_not_needed_is_listed_with_its_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "torch.fx.config.do_not_emit_stack_traces"
    assert not any(path in line for line in private.absent())
    monkeypatch.delattr(torch.fx.config, "do_not_emit_stack_traces")
    assert (
        f"torch {torch.__version__} has no {path}: tracing takes longer: every node keeps the stack it came from"
        in (private.absent())
    )
    assert private.optional(path) is None


def test_the_tested_releases_are_those_that_are_admitted() -> None:
    (bounds,) = [each for each in PYPROJECT["project"]["dependencies"] if each.startswith("torch>")]
    oldest, newest = re.fullmatch(r"torch 2\.(\d+) to 2\.(\d+)", private.TESTED).groups()
    assert bounds == f"torch>=2.{oldest},<2.{int(newest) + 1}"


def test_names_are_looked_up_in_an_unpacked_wheel(tmp_path: Path) -> None:
    """As .ci/run does with the oldest torch that is admitted, here with the one that runs."""
    installed = Path(torch.__file__).parent.parent
    assert [name for name in lacking(installed) if name not in private.OPTIONAL] == []
    assert {"torch._C._AutoDispatchBelowAutograd", "torch._inductor.exc.InductorError"} <= wanted()
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "_ops.py").write_text("class OpOverload: ...")
    assert "torch._ops.OpOverload" not in lacking(tmp_path)
    assert "torch._ops.HigherOrderOperator" in lacking(tmp_path)
