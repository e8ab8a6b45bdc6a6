"""Several processes: whoever shares the work gets what one process gets, and nobody waits for one that is gone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_calibrate import traced_llama

import sparsec
from sparsec.calibrate import samples
from sparsec.calibrate.data import spread
from sparsec.kernels import SparseLinear
from sparsec.ranks import ALONE, share_out

SCRIPT = Path(__file__).parent / "ranks_cases.py"


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start(case: str, count: int, folder: Path) -> list[subprocess.Popen[str]]:
    """So many processes of a case."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, SCRIPT, case, str(rank), str(count), port, folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]


def ended(ranks: list[subprocess.Popen[str]], seconds: float = 300) -> list[tuple[int, str]]:
    """(exit code, what it said) of each."""
    try:
        told = [each.communicate(timeout=seconds)[0] for each in ranks]
    finally:
        for each in ranks:
            each.kill()
    return [(each.returncode, text) for each, text in zip(ranks, told, strict=True)]


def run(case: str, count: int, folder: Path) -> None:
    found = ended(start(case, count, folder))
    assert [code for code, _ in found] == [0] * count, found


@given(sizes=st.lists(st.integers(0, 1000), max_size=40), count=st.integers(1, 9))
def test_every_job_is_done_once_and_loads_differ_by_the_largest_at_most(sizes: list[int], count: int) -> None:
    owners = share_out(sizes, count)
    assert len(owners) == len(sizes)
    loads = [sum(size for size, owner in zip(sizes, owners, strict=True) if owner == rank) for rank in range(count)]
    assert sum(loads) == sum(sizes)
    assert max(loads) - min(loads) <= max(sizes, default=0)


@given(size=st.integers(1, 9), jobs=st.integers(1, 40), count=st.integers(1, 9))
def test_equal_jobs_are_shared_out_evenly(size: int, jobs: int, count: int) -> None:
    owners = share_out([size] * jobs, count)
    counts = [owners.count(rank) for rank in range(count)]
    assert max(counts) - min(counts) <= 1


def test_one_alone_does_all_and_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch.distributed.new_group")
    order: list[int] = []
    results = ALONE.each([1, 2, 3], lambda job: order.append(job) or job)
    assert next(results) == 0
    assert order == [0]  # one after the other, so that no more than one result is held
    assert ALONE.told("x") == ["x"]
    ALONE.agree(lambda: {"passes": str(1 // 0)})


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_sums_jobs_and_what_is_told(count: int, tmp_path: Path) -> None:
    run("sums", count, tmp_path)


@pytest.mark.parametrize("count", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_weights_in_training_lie_in_shares(count: int, tmp_path: Path) -> None:
    run("shares", count, tmp_path)


SPECS = [
    ("llama", "wanda(0.5)"),
    ("llama", "sparsegpt(0.5),freeze,round('int8g32')"),
    ("gpt2", "admm(0.5, pattern='2:4')"),
    ("llama", "wanda(0.4, order='true'),freeze,admm"),
    ("llama", "sparsegpt(0.5, feed='dense', allocation='sensitivity')"),
    ("qwen2-moe", "sparsegpt(0.5)"),
    ("mixtral", "wanda(0.5, allocation='owl')"),
    ("gpt2", "wanda(0.5, allocation='alphapruning')"),
]


@pytest.mark.slow
def test_masks_and_weights_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    found: dict[int, list[list[dict[str, Any]]]] = {}
    for count in (1, 2, 3, 5):  # of four calls: one has none at all
        folder = tmp_path / str(count)
        folder.mkdir()
        torch.save(SPECS, folder / "specs.pt")
        run("passes", count, folder)
        found[count] = [[torch.load(folder / f"{i}-{r}.pt") for r in range(count)] for i in range(len(SPECS))]
    for i, spec in enumerate(SPECS):
        (one,) = found[1][i]
        for count in (2, 3, 5):
            first = found[count][i][0]
            for other in found[count][i][1:]:  # all ranks hold the same, to the bit
                assert other["notes"] == first["notes"], spec
                assert all(torch.equal(m, other["masks"][n]) for n, m in first["masks"].items()), spec
                assert all(torch.equal(t, other["tensors"][n]) for n, t in first["tensors"].items()), spec
            assert first["masks"].keys() == one["masks"].keys()
            equal = sum(int((m == first["masks"][n]).sum()) for n, m in one["masks"].items())
            assert equal >= 0.9999 * sum(m.numel() for m in one["masks"].values()), (spec, count)
            assert first["notes"] == one["notes"], spec
            for name, error in one["errors"].items():
                assert first["errors"][name] == pytest.approx(error, rel=0.05, abs=1e-6), (spec, name)


SHARED = "wanda(0.5),freeze,recover(steps=4, batch=3, optimizer='sgd', learning_rate=0.05, shard=True"
TRAININGS = [
    ("llama", "wanda(0.5),freeze,recover(steps=4, batch=3, optimizer='sgd', learning_rate=0.05)"),
    ("gpt2", "wanda(0.5),freeze,recover(steps=4, batch=3, regrow='rigl', regrow_every=2, regrow_share=0.1)"),
    ("qwen2-moe", "magnitude(0.5),freeze,recover(steps=3, batch=3, checkpoint='CHECKPOINT')"),
    ("llama", "magnitude(0.5),freeze,recover(method='blocks', steps=3, batch=3, checkpoint='CHECKPOINT')"),
    ("llama-tied", f"{SHARED}, recompute=True, length=5)"),  # pieces of 5 and 2 tokens: not all ranks run as many calls
    ("qwen2-moe", "wanda(0.5),freeze,recover(steps=3, batch=3, hidden=0.1, shard=True)"),
    (
        "llama",
        "magnitude(0.5),freeze,recover(minutes=0.03, batch=2)",
    ),  # by the clock, which is not the same for two runs
]


@pytest.mark.slow
def test_a_training_by_several_ranks_is_that_of_one(tmp_path: Path) -> None:
    found: dict[int, dict[str, list[dict[str, Any]]]] = {}
    for count in (1, 2, 3):
        folder = tmp_path / str(count)
        folder.mkdir()
        torch.save(TRAININGS, folder / "specs.pt")
        run("recovered", count, folder)
        runs = [f"{i}-{again}" for i, (_, spec) in enumerate(TRAININGS) for again in range(1 + ("CHECK" in spec))]
        found[count] = {name: [torch.load(folder / f"{name}-{r}.pt") for r in range(count)] for name in runs}
    for name, (one,) in found[1].items():
        for count in (2, 3):
            first, *others = found[count][name]
            for other in others:
                assert all(torch.equal(t, other["tensors"][n]) for n, t in first["tensors"].items()), name
                assert all(torch.equal(m, other["masks"][n]) for n, m in first["masks"].items()), name
                assert other["steps"] == first["steps"] > 0
            assert any("had a share" in note for note in first["notes"]) == ("shard=" in TRAININGS[int(name[0])][1])
            if "minutes" in TRAININGS[int(name[0])][1]:
                continue
            assert (first["steps"], first["tokens"]) == (one["steps"], one["tokens"])
            differ = sum(int((m != first["masks"][n]).sum()) for n, m in one["masks"].items())
            assert differ <= 1e-3 * sum(m.numel() for m in one["masks"].values()), name
            for n, tensor in one["tensors"].items():
                if "sgd" in TRAININGS[int(name[0])][1]:
                    torch.testing.assert_close(first["tensors"][n], tensor, rtol=1e-4, atol=1e-6)
                # AdamW takes a step of the same size where a gradient is nothing but rounding.
                assert (first["tensors"][n] - tensor).norm() <= 0.01 * tensor.norm() + 1e-6, (name, n)


@pytest.mark.slow
def test_ranks_that_were_given_different_things_are_refused(tmp_path: Path) -> None:
    run("other_text", 3, tmp_path)
    texts = {path.stem: path.read_text() for path in tmp_path.glob("*.txt")}
    assert len(texts) == 6
    for what, named in (("text", "calibration"), ("passes", "passes")):
        assert texts[f"{what}-0"].startswith(f"rank 1 differs from rank 0 in {named}")
        assert texts[f"{what}-1"].startswith(f"rank 0 differs from rank 1 in {named}")
        assert "rank 1" in texts[f"{what}-2"]
    assert "wanda(0.4)" in texts["passes-0"]
    assert "wanda(0.5)" in texts["passes-0"]


def test_the_failure_of_one_is_said_by_all(tmp_path: Path) -> None:
    run("failing", 3, tmp_path)
    told = [(tmp_path / f"{rank}.txt").read_text() for rank in range(3)]
    assert told[1].startswith("ZeroDivisionError")
    for other in (told[0], told[2]):
        assert other.startswith("RanksError: rank 1 stopped: ZeroDivisionError")


@pytest.mark.slow
def test_a_rank_that_ends_while_weights_lie_in_shares_is_named(tmp_path: Path) -> None:
    """Regression: the others told of torch's own exchange that a connection was closed, by an address."""
    found = ended(start("sharded_ends", 3, tmp_path), 100)
    assert [code for code, _ in found] == [0, -9, 0], found
    for rank in (0, 2):
        assert (tmp_path / f"{rank}.txt").read_text().startswith("rank 1 is gone")


def test_a_rank_may_work_by_itself(tmp_path: Path) -> None:
    run("by_itself", 2, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.txt", "1.txt"]


COMPRESS = (
    *("tiny", "--passes", "sparsegpt(0.5),freeze,lower(bitmap)", "--no-sample"),
    *("--calibration-sequences", "8", "--calibration-length", "600"),
)


def compressing(
    how: str, place: str, rank: int, count: int, folder: Path, more: Sequence[str] = ()
) -> list[subprocess.Popen[str]]:
    """`sparsec compress` in so many plain processes, one of which ends itself at a place."""
    port = free_port()
    return [
        subprocess.Popen(
            [
                *(sys.executable, SCRIPT.with_name("killed_rank.py"), how, place, str(rank)),
                *("compress", COMPRESS[0], folder, *COMPRESS[1:], *more),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ
            | {"RANK": str(number), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        )
        for number in range(count)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "place", "rank"),
    [
        ("SIGKILL", "calibration", 2),
        ("SIGKILL", "calibration", 0),
        ("SIGKILL", "solving", 1),
        ("SIGKILL", "writing", 0),
        ("SIGSTOP", "calibration", 3),
        ("SIGSTOP", "calibration", 0),
    ],
)
def test_a_rank_that_ends_or_hangs_ends_all_within_a_minute(how: str, place: str, rank: int, tmp_path: Path) -> None:
    ranks = compressing(how, place, rank, 4, tmp_path / "made")
    try:
        assert ranks[rank].stdout is not None
        said = ""
        while "ending" not in said:
            line = ranks[rank].stdout.readline()
            assert line, said
            said += line
        begun = time.monotonic()
        others = [each for number, each in enumerate(ranks) if number != rank]
        told = [each.communicate(timeout=90)[0] for each in others]
        assert time.monotonic() - begun < 60
    finally:
        for each in ranks:
            each.kill()
    for each, text in zip(others, told, strict=True):
        assert each.returncode == 2, text
        assert f"error: rank {rank} {'hangs' if how == 'SIGSTOP' else 'is gone'}" in text
        assert "Traceback" not in text
    assert not (tmp_path / "made").exists()


@pytest.mark.slow
def test_the_command_in_several_processes_writes_what_one_writes(tmp_path: Path) -> None:
    for count in (1, 3):
        found = ended(compressing("SIGKILL", "writing", -1, count, tmp_path / str(count)))
        assert [code for code, _ in found] == [0] * count, found
        assert all(text == "" for _, text in found[1:])
        assert "Saved" in found[0][1]
    one, several = ({n: m.weight != 0 for n, m in packed(tmp_path / folder).items()} for folder in ("1", "3"))
    assert one.keys() == several.keys()
    differ = sum(int((mask != several[name]).sum()) for name, mask in one.items())
    assert differ <= 1e-4 * sum(mask.numel() for mask in one.values())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "3"]


@pytest.mark.slow
def test_ranks_go_on_together_after_one_was_killed(tmp_path: Path) -> None:
    killed = ended(compressing("SIGKILL", "solving", 1, 3, tmp_path / "again"))
    assert [code for code, _ in killed] == [2, -9, 2]
    for folder, more in (("again", ["--resume"]), ("once", [])):
        found = ended(compressing("SIGKILL", "solving", -1, 3, tmp_path / folder, more))
        assert [code for code, _ in found] == [0] * 3, found
    again, once = packed(tmp_path / "again"), packed(tmp_path / "once")
    assert all(torch.equal(m.weight, once[name].weight) for name, m in again.items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "once"]


def packed(folder: Path) -> dict[str, Any]:
    """The packed layers of a saved model, by name."""
    return {name: m for name, m in sparsec.load(folder).named_modules() if isinstance(m, SparseLinear)}


@given(lengths=st.lists(st.integers(2, 6), min_size=1, max_size=9), count=st.integers(1, 4))
def test_calls_are_cut_so_that_every_rank_has_some(lengths: list[int], count: int) -> None:
    graph = traced_llama()[1]
    data = samples(graph, [torch.full((n,), 3 + i) for i, n in enumerate(lengths)], "test")
    cut = spread(data, graph, count)
    rows = [sorted(r.tolist() for call in each.calls for r in call[0]) for each in (data, cut)]
    assert rows[0] == rows[1]
    assert count == 1 or len(cut.calls) >= min(count, len(lengths))
    masks = {call[1].shape: call[1] for call in cut.calls}
    assert all(masks[call[1].shape] is call[1] for call in cut.calls)  # what is the same for all calls is computed once
