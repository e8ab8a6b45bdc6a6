"""A save that is killed, or finds the disk full, at any moment: the old model or the new one loads."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from collections import Counter
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from format_cases import LAYOUTS, some
from torch import nn

import sparsec
from sparsec import files
from sparsec.checkpoint.checking import examine
from sparsec.errors import CheckpointError
from sparsec.kernels import SparseLinear

SIDE = 512


def model(fill: float) -> nn.Sequential:
    """A packed and a dense layer that can be told apart."""
    packed = some(LAYOUTS["csr16"], SIDE, SIDE, 0.5, torch.float32)[0]
    made = nn.Sequential(SparseLinear(packed), nn.Linear(SIDE, SIDE))
    with torch.no_grad():
        made[0].values.fill_(fill)
        made[1].weight.fill_(fill)
    return made


def which(folder: Path) -> float:
    """The number that fills the model which loads; all of it."""
    empty = nn.Sequential(nn.Linear(SIDE, SIDE, bias=False, device="meta"), nn.Linear(SIDE, SIDE, device="meta"))
    loaded: Any = sparsec.load(folder, into=empty)
    (found,) = {*loaded[0].values.unique().tolist(), *loaded[1].weight.unique().tolist()}
    return float(found)


def killed(folder: Path, models: list[nn.Sequential], after: float) -> None:
    """Saves one after the other in a process of its own, until that is killed."""
    child = os.fork()
    if not child:
        while True:
            for each in models:
                sparsec.save(each, folder, max_shard_size="600KB")
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.filterwarnings("ignore:.*fork.*")
@pytest.mark.parametrize("times", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_a_save_that_is_killed_leaves_the_old_or_the_new_model(times: int, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rng = random.Random(times)
    models = [model(1.0), model(2.0)]
    sparsec.save(models[0], tmp_path, max_shard_size="600KB")
    seen = Counter[float]()
    for _ in range(times):
        killed(tmp_path, models, rng.uniform(0, 0.1 if times < 50 else 0.8))
        seen[which(tmp_path)] += 1
        assert examine(tmp_path).faults == []
    torch.set_num_threads(threads)
    assert set(seen) <= {1.0, 2.0}
    print(dict(seen), sum("left of a save" in notice for notice in examine(tmp_path).notices), "files left")


def test_what_a_killed_save_left_is_removed_by_a_later_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: safetensors' own temporary file lay in the folder itself, under a name that no later save knew."""

    def interrupted(tensors: dict[str, torch.Tensor], path: Path, **options: Any) -> None:
        path.with_name(".tmpabc123").write_bytes(b"half")
        raise KeyboardInterrupt

    sparsec.save(model(1.0), tmp_path)
    with monkeypatch.context() as killed:  # which cleans nothing up
        killed.setattr("sparsec.checkpoint.writing.save_file", interrupted)
        killed.setattr("sparsec.checkpoint.writing.shutil.rmtree", lambda *given, **options: None)
        with pytest.raises(KeyboardInterrupt):
            sparsec.save(model(2.0), tmp_path)
    (left,) = tmp_path.glob(".*")
    os.utime(left, (0, 0))
    sparsec.save(model(2.0), tmp_path)
    assert not list(tmp_path.glob(".*"))
    assert which(tmp_path) == 2.0


def test_a_full_disk_leaves_the_old_model(tmp_path: Path) -> None:
    sparsec.save(model(1.0), tmp_path)
    reversed_model = nn.Sequential(
        nn.Linear(8, 8), nn.Linear(SIDE, SIDE, bias=False)
    )  # a small shard, then one that fails
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for room in (0, 100, 10_000, 300_000, 700_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
            with pytest.raises(CheckpointError, match="could not be written"):
                sparsec.save(model(2.0), tmp_path)
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert which(tmp_path) == 1.0
            assert examine(tmp_path).notices[1:] == []
            before = sorted(tmp_path.iterdir())
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
            with pytest.raises(CheckpointError, match="could not be written"):  # regression: finished shards stayed
                sparsec.save(reversed_model, tmp_path, max_shard_size="600KB")
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert sorted(tmp_path.iterdir()) == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sparsec.save(model(1.0), tmp_path)
    put = files.put_in_place

    def refused(made: Path, path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(files, "put_in_place", refused)
    with pytest.raises(CheckpointError, match="Permission denied"):
        sparsec.save(model(2.0), tmp_path)
    monkeypatch.setattr(files, "put_in_place", put)
    assert which(tmp_path) == 1.0


def test_who_loads_beside_a_saver_gets_one_whole_model(tmp_path: Path) -> None:
    """Regression: files were gone that the config.json which was read a moment before had named."""
    models = [model(1.0), model(2.0)]
    sparsec.save(models[0], tmp_path)

    def often() -> None:
        for _ in range(15):
            for each in models:
                sparsec.save(each, tmp_path)

    saver = Thread(target=often)
    saver.start()
    seen = {which(tmp_path)}
    while saver.is_alive():
        seen.add(which(tmp_path))
    assert seen == {1.0, 2.0}
