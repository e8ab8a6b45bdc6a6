"""The table of a busy machine: what it says of the figures, and that the process which keeps it busy always ends."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from architectures import tiny_model

from sparsec.bench import busy
from sparsec.bench.__main__ import main
from sparsec.bench.busy import PassTime, Products, text


def test_what_is_left_is_held_against_what_has_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, text([Products((1024, 1024), torch.bfloat16, 48, (0.02, 0.02), (0.01, 0.01))], []))) <= 80
    monkeypatch.setenv("COLUMNS", "200")
    walks = [
        Products((64, 32), torch.float32, 48, dense=(0.020, 0.020), sparse=(0.010, 0.0125)),
        Products((64, 32), torch.bfloat16, 48, dense=(0.020, 0.020), sparse=(0.010, 0.016)),
    ]
    lines = [
        " ".join(line.split()) for line in text(walks, [PassTime("freeze", 0.1, 0.24), PassTime("wanda", 0.1, 0.26)])
    ]
    assert "48 x 64x32 float32 20.00 10.00 20.00 12.50 2.00x 1.60x 0.80 met" in lines
    assert "48 x 64x32 bfloat16 20.00 10.00 20.00 16.00 2.00x 1.25x 0.62 not met" in lines
    assert "freeze 0.100 0.240 2.40x met" in lines
    assert "wanda 0.100 0.260 2.60x not met" in lines


def run(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The first words of the lines that say whether something was met."""
    assert main(["--busy", "--shapes", "32x48", "--layers", "2", "--repeats", "2", "--dtypes", "fp32,bf16"]) == 0
    return [line.split("  ")[0] for line in capsys.readouterr().out.splitlines() if line.endswith("met")]


def test_every_pass_is_named_once_with_its_fastest_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = iter([4.0, 9.0, 3.0, 8.0] * 2)

    def records(model: object, spec: str, calibration: object, busy: bool) -> list[SimpleNamespace]:
        return [SimpleNamespace(spec=name, seconds=next(seconds)) for name in spec.split(",")[:1]]

    monkeypatch.setattr(busy, "_records", records)
    monkeypatch.setattr(busy, "PIPELINES", ("freeze,x", "freeze,y"))
    monkeypatch.setattr(busy, "small_model", lambda: (None, None))
    assert busy.pass_times(*busy.small_model()) == [PassTime("freeze", 3.0, 8.0)]
    seconds = iter([1.0] * 8)
    assert run(capsys) == ["2 x 32x48 float32", "2 x 32x48 bfloat16", "freeze"]


@pytest.mark.slow
def test_passes_are_measured_in_both_states(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = tiny_model("llama")
    monkeypatch.setattr(busy, "PIPELINES", ("magnitude(0.5),freeze,lower(csr)",))
    monkeypatch.setattr(busy, "small_model", lambda: (model, torch.randint(0, 50, (2, 8))))
    assert run(capsys)[2:] == ["magnitude(0.5)", "freeze", "lower(csr)"]


@pytest.mark.parametrize("option", ["--rows 1", "--json f", "--end-to-end tiny", "--passes freeze", "--device cuda"])
def test_options_of_other_modes_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--busy", *option.split()]) == 2
    assert f"{option.split()[0]}: leave it out with --busy" in capsys.readouterr().err


def test_the_other_process_ends_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def popen(*args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
        started.append(real(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(busy.subprocess, "Popen", popen)
    with pytest.raises(ZeroDivisionError), busy.competitor():
        _ = 1 / (started[0].poll() or 0)
    assert started[0].poll() is not None


def test_the_other_process_ends_with_the_one_that_started_it() -> None:
    other = subprocess.Popen([sys.executable, "-c", busy._LOOP], stdin=subprocess.PIPE)
    assert other.stdin is not None
    other.stdin.close()  # as when its parent is killed
    assert other.wait(timeout=30) == 0
