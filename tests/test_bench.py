"""The kernel table measures what it says, writes what it prints, and refuses what it cannot read."""

from __future__ import annotations

import csv
import itertools
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsec.bench import arguments, room
from sparsec.bench.__main__ import main
from sparsec.bench.cases import Case, asked, cases, pattern_of
from sparsec.bench.kernels import Measured, measure
from sparsec.bench.models import shapes
from sparsec.bench.output import SCHEMA, cells, doubts, record
from sparsec.cost import Constants, machine_constants
from sparsec.cost.model import Work
from sparsec.formats.layout import sample_mask
from sparsec.machine import machine
from sparsec.patterns import Pattern
from sparsec.timing.calls import SLOW_REPEATS, Contender, time_calls
from sparsec.timing.rotation import Protocol, Rotation
from sparsec.timing.spread import ratio

UNSTRUCTURED = ("csr8", "csr16", "csr32", "bitmap", "dense", "auto")
SMALL = Protocol(100_000)


def case(
    *labels: str, pattern: Pattern | None = None, dtype: str = "fp32", rows: int = 1, sparsity: float = 0.5
) -> Case:
    formats = tuple(map(asked, labels))
    return Case(64, 96, pattern or pattern_of(formats[0]) or Pattern(), sparsity, dtype, rows, formats)


def measured(wanted: Case, protocol: Protocol = SMALL, known: Constants | None = None) -> Measured:
    return measure(wanted, Rotation(protocol), repeats=3, constants=known)


@pytest.fixture(scope="module")
def known() -> Constants:
    found = machine_constants([torch.float32], measuring=False)
    assert found is not None
    return found.constants


def test_a_measurement_counts_bytes_and_copies_of_every_format() -> None:
    found = measured(case(*UNSTRUCTURED))
    assert found.left_out == ()
    labels = [r.format for r in found.results]
    assert labels[:5] == ["csr8", "csr16", "csr32", "bitmap", "dense"]
    assert [r.asked for r in found.results] == list(UNSTRUCTURED)
    dense = 64 * 96 * 4
    for r in found.results:
        assert r.dense.nbytes == dense
        assert r.dense.copies == -(-100_000 // dense)
        assert r.sparse.copies == -(-100_000 // r.sparse.nbytes)
        assert r.speedup_bytes == dense / r.sparse.nbytes
        assert r.torch_sparse is not None
        assert r.dense_on_sparsec is None or r.dense_on_sparsec.nbytes == dense
        assert (r.zeros_speedup is None) == (r.dense_on_sparsec is None)
        for timing in (r.dense, r.masked, r.sparse, r.torch_sparse):
            assert 0 < timing.seconds.lower <= timing.seconds.median <= timing.seconds.upper
            assert timing.seconds.repeats == len(timing.rounds) == 3
    by_label = dict(zip(labels, found.results, strict=False))
    assert by_label["csr8"].sparse.nbytes < by_label["csr16"].sparse.nbytes < by_label["csr32"].sparse.nbytes
    assert by_label["dense"].sparse.nbytes == dense


def test_the_highest_roof_binds_and_its_share_is_of_the_time_taken(known: Constants) -> None:
    for rows in (1, 8):
        for r in measured(case("bitmap", "csr8", "dense", rows=rows), known=known).results:
            stored = known.predict(r.kernel, r.format, torch.float32, _work(r.format, r.sparse.nbytes), rows)
            assert stored is not None
            roofs = {"bytes": r.sparse.nbytes / r.bandwidth, "decode": stored.decode, "flops": stored.multiply}
            assert r.bound.seconds >= roofs["bytes"]
            if r.format != "csr8":  # how many values that one holds is not known here
                assert r.bound.seconds == pytest.approx(max(roofs.values()))
                assert roofs[r.bound.roof] == max(roofs.values())
            assert r.share == r.bound.seconds / r.sparse.seconds.median


def _work(label: str, nbytes: int) -> Work:
    stored = 64 * 96 if label == "dense" else (nbytes - 2 * 4 * 96 - 4 * 5) // 4
    return Work(64, 96, stored, nbytes)


def test_without_constants_bytes_are_the_only_roof_and_auto_takes_the_smallest() -> None:
    results = measured(case("csr16", "bitmap", "auto")).results
    assert {r.bound.roof for r in results} == {"bytes"}
    assert results[2].format == "bitmap"
    assert results[2].sparse.nbytes == min(r.sparse.nbytes for r in results)


@pytest.mark.parametrize(("label", "kept"), [("bsr16x16", 12), ("bsr8x8", 48), ("bsr32x32", 3)])
def test_block_masks_keep_whole_blocks_and_hold_their_sparsity(label: str, kept: int) -> None:
    wanted = case(label)
    mask = sample_mask(wanted.pattern, (64, 96), 0.5, torch.Generator().manual_seed(0))
    assert int(mask.sum()) * 2 == mask.numel()
    (result,) = measured(wanted).results
    r, c = wanted.pattern.block
    assert result.format == label
    assert result.sparse.nbytes == kept * (r * c * 4 + 2) + 4 * (64 // r + 1)


@pytest.mark.parametrize("label", ["nm2:4", "nm4:8", "nm1:4"])
def test_nm_masks_have_their_own_sparsity(label: str) -> None:
    n, m = map(int, label[2:].split(":"))
    (wanted,) = cases({(64, 96): None}, [asked(label)], [0.5, 0.7], ["fp32"], [1])
    assert wanted.sparsity == 1 - n / m
    mask = sample_mask(wanted.pattern, (64, 96), 0.1, torch.Generator().manual_seed(0))
    assert (mask.view(64, -1, m).sum(-1) == n).all()
    (result,) = measured(wanted).results
    assert cells(result)[1:3] == (f"{n}:{m}", f"{1 - n / m:.0%}")


def test_every_mask_gets_the_formats_that_fit_it() -> None:
    labels = ["csr8", "bsr16x16", "bitmap", "nm2:4", "dense", "auto"]
    found = cases({(64, 96): 3}, [asked(f) for f in labels], [0.5, 0.9], ["fp32", "bf16"], [1, 8])
    assert len(found) == 2 * 2 * (2 + 2 + 1)
    tried = {(str(c.pattern), c.sparsity): [str(f) for f in c.formats] for c in found}
    assert tried == {
        ("unstructured", 0.5): ["csr8", "bitmap", "dense", "auto"],
        ("unstructured", 0.9): ["csr8", "bitmap", "dense", "auto"],
        ("block:16x16", 0.5): ["bsr16x16", "dense", "auto"],
        ("block:16x16", 0.9): ["bsr16x16", "dense", "auto"],
        ("2:4", 0.5): ["nm2:4", "dense", "auto"],
    }
    assert [c.rows for c in found[:10]] == [1] * 5 + [8] * 5


def test_what_cannot_hold_a_shape_is_left_out_with_the_reason() -> None:
    assert measured(Case(63, 96, Pattern(block=(16, 16)), 0.5, "fp32", 1, (asked("bsr16x16"),))).left_out == (
        "63x96: block:16x16 does not divide 63x96",
    )
    wide = Case(1, 65537, Pattern(), 0.5, "fp32", 1, (asked("csr8"), asked("csr32")))
    found = measured(wide, Protocol())
    assert [r.format for r in found.results] == ["csr32"]
    assert "1x65537 as csr8" in found.left_out[0]


def test_torch_sparse_may_not_serve_a_type(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> torch.Tensor:
        raise RuntimeError("not implemented")

    monkeypatch.setattr(torch.sparse, "mm", refuse)
    (result,) = measured(case("bitmap")).results
    assert result.torch_sparse is None
    assert cells(result)[-1] == "n/a"
    assert record(result)["torch_sparse_seconds"] is None


def test_slow_contenders_run_a_few_times_only_and_all_take_turns() -> None:
    order: list[str] = []

    def slow() -> torch.Tensor:
        order.append("slow")
        time.sleep(0.51)
        return torch.empty(0)

    def fast() -> torch.Tensor:
        order.append("fast")
        time.sleep(0.002)
        return torch.empty(0)

    timings = time_calls([Contender([fast], 1), Contender([slow], 1)], repeats=6)
    assert [t.seconds.repeats for t in timings] == [6, SLOW_REPEATS]
    assert timings[1].slow
    assert not timings[0].slow
    assert [x for x in order[-9:] if x == "fast"] == ["fast"] * 6


def test_a_stack_is_run_as_a_whole_and_rotations_walk_on() -> None:
    order: list[int] = []

    def call(i: int) -> torch.Tensor:
        order.append(i)
        time.sleep(0.0011)
        return torch.empty(0)

    calls = [lambda i=i: call(i) for i in range(5)]
    time_calls([Contender(calls, 1)], repeats=3, whole_stacks=True)
    assert order[-15:] == [0, 1, 2, 3, 4] * 3
    order.clear()
    time_calls([Contender(calls, 1)], repeats=7)
    walked = order[5:]  # after what came before the timing
    assert walked == [i % 5 for i in range(len(walked))]


def test_speedups_are_per_round() -> None:
    found = ratio([2.0, 4.0, 6.0], [1.0, 1.0, 6.0])
    assert (found.median, found.repeats) == (2.0, 3)
    assert ratio([2.0, 4.0, 6.0], [1.0]).median == 2.0


def test_copies_are_equal_lie_apart_and_use_the_memory_again() -> None:
    rotation = Rotation(Protocol(1000))
    tensors = [torch.randn(3, 5), torch.arange(7, dtype=torch.int16)]
    twins = rotation.copies("a", tensors)
    assert len(twins) == -(-1000 // (60 + 14))
    assert all(torch.equal(a, b) for pair in twins for a, b in zip(pair, tensors, strict=True))
    places = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for pair in twins for t in pair)
    assert all(begin % 64 == 0 for begin, _ in places)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(places))
    other = rotation.copies("b", [torch.ones(4)])
    assert all(torch.equal(a, b) for pair in twins for a, b in zip(pair, tensors, strict=True))
    again = rotation.copies("a", [torch.ones(4)])
    assert again[0][0].data_ptr() == twins[0][0].data_ptr() != other[0][0].data_ptr()
    assert len(Rotation(Protocol()).copies("a", tensors)) == 1
    assert len(Rotation(Protocol(layers=6)).copies("a", tensors)) == 6


def test_models_by_name_have_their_published_shapes() -> None:
    assert shapes("smollm2-135m") == {
        (576, 576): 60,
        (192, 576): 60,
        (1536, 576): 60,
        (576, 1536): 30,
        (49152, 576): 1,
    }
    assert shapes("opt-125m") == {(768, 768): 48, (3072, 768): 12, (768, 3072): 12, (50272, 768): 1}
    assert shapes("pythia-410m") == {
        (3072, 1024): 24,
        (1024, 1024): 24,
        (4096, 1024): 24,
        (1024, 4096): 24,
        (50304, 1024): 1,
    }
    assert shapes("llama-7b") == {(4096, 4096): 128, (11008, 4096): 64, (4096, 11008): 32, (32000, 4096): 1}
    assert arguments.read_shapes("opt-125m,8x9") == {**shapes("opt-125m"), (8, 9): None}


def test_the_command_writes_what_it_prints_in_80_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    files = ["--json", str(tmp_path / "b.json"), "--csv", str(tmp_path / "b.csv")]
    wanted = "--shapes 8x8,16x8 --sparsity 0.5 --dtypes fp32,bf16 --repeats 2 --rotate-mb 0 --formats csr16,bitmap"
    assert main([*wanted.split(), *files]) == 0
    printed = capsys.readouterr().out
    assert "cache-warm" in printed
    written = json.loads((tmp_path / "b.json").read_text())
    assert written["schema"] == SCHEMA
    assert written["protocol"] == {"rotate_bytes": 0, "layers": None}
    assert written["machine"]["commit"] in (None, *printed.replace(";", " ").split())
    assert {"cpu", "threads", "native", "versions"} <= set(written["machine"])
    assert [r["out_features"] for r in written["results"]] == [8, 8, 16, 16] * 2
    with (tmp_path / "b.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [{k: str(v) if v is not None else "" for k, v in r.items()} for r in written["results"]] == rows
    assert max(map(len, printed.splitlines())) <= 80
    assert "all lines: mask unstructured, zero 50%, rows 1" in printed
    lines = [line.split() for line in printed.splitlines()]
    for r in written["results"]:  # a table wider than the terminal goes on below, with what its lines are of
        names = [f"{r['out_features']}x{r['in_features']}", r["dtype"], r["format"]]
        cells = [cell for line in lines if line[:3] == names for cell in line[3:]]
        assert cells[:3] == [r["kernel"], f"{r['dense_seconds'] * 1e3:.3f}", f"{r['sparse_seconds'] * 1e3:.3f}"]
        assert cells[5] == f"{r['speedup']:.2f}x"
        assert len(cells) == 15


def test_a_stack_of_layers_is_named_in_the_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "b.json"
    assert (
        main(["--shapes", "16x16", "--layers", "3", "--repeats", "2", "--formats", "auto,bsr8x8", "--json", str(file)])
        == 0
    )
    assert "3 in a row" in capsys.readouterr().out
    written = json.loads(file.read_text())
    assert written["protocol"] == {"rotate_bytes": 0, "layers": 3}
    assert {r["sparse_copies"] for r in written["results"]} == {3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--shapes 8by8", "--shapes takes OUTxIN such as 11008x4096, or one of smollm2-135m"),
        ("--sparsity 1.0", "--sparsity must lie in [0, 1)"),
        ("--sparsity nan", "--sparsity must lie in [0, 1)"),
        ("--sparsity half", "--sparsity takes numbers"),
        ("--dtypes fp8", "--dtypes takes fp32, bf16, fp16, got 'fp8'"),
        ("--rows 0", "--rows must be from 1"),
        ("--rows 99999999999999999999", "--rows must be from 1"),
        ("--rows 999999999 --shapes 8x8 --rotate-mb 0", "needs about"),
        ("--formats ", "--formats names none; leave it out for the usual ones"),
        ("--repeats 1", "--repeats must be at least 2"),
        ("--threads 0", "--threads must be at least 1"),
        ("--layers 0", "--layers must be at least 1"),
        ("--rotate-mb -1", "--rotate-mb must be at least 0"),
        ("--layers 2 --rotate-mb 4", "--layers and --rotate-mb exclude each other"),
        ("--formats csr4", "there is no csr4; there are csr8, csr16, csr32"),
        (
            "--formats bsr5x5",
            "a block has a multiple of 8 rows and at least one column, as in bsr16x16 or bsr8x4; got bsr5x5",
        ),
        ("--formats bsr8x0", "at least one column, as in bsr16x16 or bsr8x4; got bsr8x0"),
        ("--formats nm4:4", "N:M is packed for M of 4 and 8 and 0 < N < M, as in nm2:4; got nm4:4"),
        ("--compile", "--compile says nothing here; it goes with --end-to-end"),
        ("--passes freeze", "--passes says nothing here; it goes with --end-to-end"),
        ("--end-to-end tiny --rows 8", "--rows says nothing here; leave it out with --end-to-end"),
        ("--json no-such-folder/b.json", "no-such-folder/b.json: cannot be written; a file there must be writable"),
    ],
)
def test_options_out_of_range_are_refused(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split(" ")) == 2
    assert message in capsys.readouterr().err


def test_a_busy_machine_is_said_to_be_so() -> None:
    here = machine()
    assert doubts(replace(here, load=0.5, cores=2)) == doubts(replace(here, load=None, cores=2)) == []
    assert "3.1 processes on 2 cores" in doubts(replace(here, load=3.1, cores=2))[0]


def test_more_copies_than_memory_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(room, "available_bytes", lambda: 1 << 30)
    assert main(["--shapes", "8x8"]) == 2
    assert "needs about 13.0 GiB, and 1.0 GiB are free; take fewer --formats" in capsys.readouterr().err
