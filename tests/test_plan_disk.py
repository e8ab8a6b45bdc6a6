"""Files that a streamed run keeps: how many bytes a plan tells, and a disk that is too small for them."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from architectures import tiny_model
from streamed import saved, streamed, text
from traces import traced as trace

import sparsec
from sparsec.errors import CompileError, DataError
from sparsec.pipeline import Pipeline
from sparsec.planning.foretell import meta_calls
from sparsec.planning.memory import peak

Usage = namedtuple("Usage", "total used free")
TAIL = ",freeze,sparsity,flops,fuse,lower(bitmap)"
RUNS = (
    "magnitude(0.5)",
    "zeros",
    "wanda(0.5)",
    "sparsegpt(0.5)",
    "admm(0.5)",
    "magnitude(0.5),admm",
    "magnitude(0.5),round('int8')",
    "magnitude(0.5),round('int8', method='nearest')",
    "magnitude(0.5),freeze,recover('blocks', steps=2)",
    "magnitude(0.5),freeze,recover(steps=2)",
)


def _tail(spec: str) -> str:
    return TAIL.replace(",freeze", "") if "freeze" in spec else TAIL


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("spec", RUNS)
def test_a_plan_tells_the_bytes_that_a_run_keeps(spec: str, tmp_path: Path) -> None:
    """Beside packed weights, whose bytes a plan tells with the result."""
    pipeline = Pipeline.parse(spec + _tail(spec))
    graph, tokens = trace(tiny_model("llama")[0]), text() if pipeline.learning else None
    data = None if tokens is None else meta_calls(graph, *tokens.shape)
    found = peak(graph, pipeline, data, streaming=True)
    passing = max(moment.phase.passing for moment in found.moments)
    place = tmp_path / "kept"
    streamed(
        saved("llama", tmp_path / "model"),
        place,
        spec + _tail(spec),
        **({} if tokens is None else {"calibration": tokens}),
    )
    kept = [path for path in place.rglob("*.safetensors") if not path.name.startswith("packed")]
    numbers = sum(path.stat().st_size for path in kept) - sum(header(path) for path in kept)
    assert found.files - passing <= numbers <= found.files


def test_a_disk_that_is_too_small_is_refused_before_any_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, place = saved("llama", tmp_path / "model"), tmp_path / "kept"
    passes = "magnitude(0.5)" + TAIL
    need = peak(trace(tiny_model("llama")[0]), Pipeline.parse(passes), streaming=True).files
    free = [need - 1]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(1 << 40, 1 << 40, free[0]))
    said = (
        r"kept: this run keeps .* MB of files there until it is done.* MB are free: make room, or save on another disk"
    )
    with pytest.raises(CompileError, match=said):
        streamed(source, place, passes)
    assert on_disk(place) == 0
    free[0] = need
    assert streamed(source, place, passes).sparsec.lowered
    free[0] = 0  # what is there already is of the same run
    assert streamed(source, place, passes).sparsec.lowered


def test_a_model_in_memory_is_not_refused_for_files_that_it_never_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(1 << 40, 1 << 40, 1))
    assert sparsec.compile(tiny_model("llama")[0], "magnitude(0.5)" + TAIL, spill=tmp_path).sparsec.lowered


def header(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_a_conversion_that_does_not_fit_is_refused_before_a_weight_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, place = saved("llama", tmp_path / "model"), tmp_path / "kept"
    weights = dict(tiny_model("llama")[0].named_parameters())
    need = sum(weight.numel() for weight in {id(w): w for w in weights.values()}.values()) * 2
    free = [need - 1]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(1 << 40, 1 << 40, free[0]))
    said = "kept.*: the checkpoint has torch.float32, .* is converted to torch.bfloat16, .* take the dtype of the checkpoint"
    with pytest.raises(DataError, match=said):
        streamed(source, place, "magnitude(0.5)" + TAIL, torch.bfloat16)
    assert on_disk(place) == 0
    free[0] = 1 << 30
    assert streamed(source, place, "magnitude(0.5)" + TAIL, torch.bfloat16).sparsec.lowered


def test_tied_weights_that_are_converted_need_no_more_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: the second name of a tied weight was counted as if it were to be written, at every start."""
    source, place = saved("gemma3", tmp_path / "model"), tmp_path / "kept"
    passes = "magnitude(0.5)" + TAIL
    assert streamed(source, place, passes, torch.bfloat16).sparsec.lowered
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(1 << 40, 1 << 40, 0))
    assert streamed(source, place, passes, torch.bfloat16).sparsec.lowered
