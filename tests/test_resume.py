"""A run that dies while it keeps something, and is begun again, makes what an uninterrupted one makes, and does nothing twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from streamed import differing, saved, streamed, text, told

import sparsec
from sparsec.calibrate import walk
from sparsec.data import load_model
from sparsec.errors import SpillError
from sparsec.pipeline.pruning import CalibratedPruning
from sparsec.recover.blocks import BlockByBlock
from sparsec.recover.loop import Training
from sparsec.spill import Keep, Spill

PIPELINES = (
    "magnitude(0.5),freeze,sparsity,fuse,lower(csr)",
    "wanda(0.5),freeze,lower(bitmap)",
    "wanda(0.5, order='true'),freeze,lower(bitmap)",
    "sparsegpt(0.5, feed='dense'),freeze,round('int8'),lower(csr, values='int8')",
    "wanda(0.4, allocation='owl'),admm(0.5),freeze,lower(auto)",
    "wanda(0.5),freeze,recover(method='blocks', steps=2),round('int8', method='nearest'),lower(csr, values='int8')",
    "magnitude(0.3),freeze,recover(steps=3, regrow='set', regrow_every=2),zeros,freeze,lower(bitmap)",
)
KINDS = ("gpt2", "bert", "mamba", "qwen2-moe")


class Died(BaseException):
    """As SIGKILL: nobody handles it."""


class Dying:
    """Stands for `Spill._write`, and dies with one of its calls, before or after it: files stay as they are."""

    def __init__(self, call: int, late: bool) -> None:
        self.left, self.late, self.write = call, late, Spill._write

    def __get__(self, spill: Any, kind: Any = None) -> Callable[..., None]:
        def write(*given: Any) -> None:
            self.left -= 1
            if not self.left and not self.late:
                raise Died
            self.write(spill, *given)
            if not self.left:
                raise Died

        return write


@contextmanager
def dying(call: int, late: bool) -> Iterator[None]:
    with patch.object(Spill, "_write", Dying(call, late)):
        yield


def run(folder: Path, spill: Path, passes: str, dtype: torch.dtype | None = torch.float32) -> Any:
    learning = {"calibration": text()} if sparsec.Pipeline.parse(passes).learning else {}
    return streamed(folder, spill, passes, dtype, **learning)


def gone_on(folder: Path, spill: Path, passes: str, deaths: list[int], late: bool, **options: Any) -> Any:
    """The model, after a death for each number: with so many writes of one run."""
    for call in deaths:
        with dying(call, late):
            try:
                return run(folder, spill, passes, **options)
            except Died:
                pass
    return run(folder, spill, passes, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """Of a pipeline: the folder of a model, and what it makes of that without a death."""
    folder = saved("llama", tmp_path_factory.mktemp("llama"), torch.bfloat16)

    @cache
    def find(passes: str) -> tuple[Path, Any]:
        return folder, run(folder, tmp_path_factory.mktemp("whole"), passes)

    return find


@settings(max_examples=6)
@given(st.sampled_from(PIPELINES), st.lists(st.integers(1, 40), min_size=1, max_size=3), st.booleans())
def test_whenever_a_run_dies_the_next_one_makes_the_same_bits(
    made: Any, tmp_path_factory: Any, passes: str, deaths: list[int], late: bool
) -> None:
    folder, whole = made(passes)
    again = gone_on(folder, tmp_path_factory.mktemp("died"), passes, deaths, late)
    assert differing(whole, again) == []
    assert told(whole) == told(again)


@pytest.mark.parametrize("passes", ["magnitude(0.5),freeze", "zeros,freeze", "magnitude(0.5, scope='row'),freeze"])
def test_some_of_the_masks_are_those_of_the_run_that_died(passes: str, made: Any, tmp_path: Path) -> None:
    folder, whole = made(passes)
    write = Spill._write

    def dies(self: Spill, path: Path, *given: Any) -> None:
        write(self, path, *given)
        if len(list(path.parent.glob("mask *"))) == 3:
            raise Died

    with patch.object(Spill, "_write", dies), pytest.raises(Died):
        run(folder, tmp_path, passes)
    assert differing(whole, run(folder, tmp_path, passes)) == []


@pytest.mark.slow
@pytest.mark.parametrize("passes", PIPELINES)
def test_a_run_that_dies_with_every_write_comes_to_its_end(passes: str, made: Any, tmp_path: Path) -> None:
    """The next write after the death before: one further, each time."""
    folder, whole = made(passes)
    for late in (False, True):
        deaths = [1] * 400 if late else [2] * 400
        again = gone_on(folder, tmp_path / str(late), passes, deaths, late)
        assert differing(whole, again) == []
        assert told(whole) == told(again)


@pytest.mark.parametrize("name", ["mixtral", *(pytest.param(each, marks=pytest.mark.slow) for each in KINDS)])
def test_of_every_kind_of_model(name: str, tmp_path: Path) -> None:
    passes = "wanda(0.5),sparsegpt(0.6),freeze"
    folder = saved(name, tmp_path / "model")
    whole = run(folder, tmp_path / "whole", passes, torch.bfloat16)
    again = gone_on(folder, tmp_path / "died", passes, [9, 8, 7], late=True, dtype=torch.bfloat16)
    assert differing(whole, again) == []
    assert told(whole) == told(again)


@pytest.mark.parametrize("order", ["block", "true"])
def test_no_site_is_learnt_twice_and_no_span_is_run_again_that_was_left(order: str, made: Any, tmp_path: Path) -> None:
    passes = f"wanda(0.5, order='{order}'),freeze"
    folder, whole = made(passes)
    learnt, begins, plain = Counter[str](), list[int](), CalibratedPruning._learnt

    def counted(self: Any, graph: Any, context: Any, shares: Any, site: Any, statistics: Any) -> Any:
        learnt[site.key] += 1
        return plain(self, graph, context, shares, site, statistics)

    class Watched(walk.Walker):
        def run(self, start: int, *given: Any, **options: Any) -> None:
            begins.append(start)
            super().run(start, *given, **options)

    with patch.object(CalibratedPruning, "_learnt", counted), patch.object(walk, "Walker", Watched):
        once = run(folder, tmp_path / "once", passes)
        sites, runs = dict(learnt), list(begins)
        learnt.clear()
        begins.clear()
        again = gone_on(folder, tmp_path / "died", passes, [30, 7, 5, 6], late=True)
    assert learnt == sites
    assert set(sites.values()) == {1}
    assert begins == sorted(begins)
    assert len(begins) <= len(runs) + 4
    assert differing(once, again) == differing(whole, again) == []


def test_what_is_alive_between_two_spans_is_kept_once(made: Any, tmp_path: Path) -> None:
    """Activations of a span that was left take no more room."""
    folder, _ = made(PIPELINES[1])
    most = 0
    made_by, calls = Spill.made, len(text())

    def watched(self: Spill, key: str, make: Any) -> Any:
        nonlocal most
        found = made_by(self, key, make)
        most = max(most, len(list(tmp_path.rglob("at *"))))
        return found

    with patch.object(Spill, "made", watched):
        run(folder, tmp_path, PIPELINES[1])
    assert 0 < most <= 2 * (calls + 1)
    assert not list(tmp_path.rglob("at *"))


def test_no_stretch_is_trained_twice(made: Any, tmp_path: Path) -> None:
    passes = "magnitude(0.5),freeze,recover(method='blocks', steps=2)"
    folder, whole = made(passes)
    trained, train = Counter[str](), BlockByBlock._train

    def counted(self: Any, stretch: Any, *given: Any) -> None:
        trained[stretch.name] += 1
        train(self, stretch, *given)

    with patch.object(BlockByBlock, "_train", counted):
        run(folder, tmp_path / "once", passes)
        once = dict(trained)
        trained.clear()
        again = gone_on(folder, tmp_path / "died", passes, [50, 9, 8, 7, 3, 2, 1], late=True)
    assert trained == once
    assert differing(whole, again) == []


def test_the_activations_after_a_trained_stretch_are_not_made_from_the_beginning(made: Any, tmp_path: Path) -> None:
    """Regression: a run that died right after a stretch was trained ran all stretches before it again."""
    passes = "magnitude(0.5),freeze,recover(method='blocks', steps=2)"
    folder, _ = made(passes)
    moved, move, write = list[str](), BlockByBlock._moved, Spill._write

    def counted(self: Any, stretch: Any, *given: Any) -> Any:
        moved.append(stretch.name)
        return move(self, stretch, *given)

    def dies(self: Spill, path: Path, *given: Any) -> None:
        write(self, path, *given)
        if path.name.startswith("stretch 00003"):
            raise Died

    with patch.object(Spill, "_write", dies), pytest.raises(Died):
        run(folder, tmp_path, passes)
    with patch.object(BlockByBlock, "_moved", counted):
        run(folder, tmp_path, passes)
    assert len(set(moved)) == 2, moved  # the third of four, of which the student's were to be made, and the fourth


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["blocks", "distill"])
def test_a_training_that_the_user_stopped_stays_stopped(method: str, made: Any, tmp_path: Path) -> None:
    """Regression: the next run trained on, under what later passes had kept of the weights as they were when it was stopped."""
    passes = f"magnitude(0.5),freeze,recover(method='{method}', steps=4),lower(csr)"
    folder = made("magnitude(0.5),freeze")[0]
    step = Training._step

    def stopping() -> Any:
        taken = 0

        def stopped(self: Training, batch: Any) -> bool:
            nonlocal taken
            taken += 1
            if taken == 3:
                raise KeyboardInterrupt
            return step(self, batch)

        return patch.object(Training, "_step", stopped)

    with stopping():
        whole = run(folder, tmp_path / "whole", passes)
    write = Spill._write

    def dies(self: Spill, path: Path, *given: Any) -> None:
        write(self, path, *given)
        if len(list(path.parent.glob("packed*"))) == 3:
            raise Died

    with stopping(), patch.object(Spill, "_write", dies), pytest.raises(Died):
        run(folder, tmp_path / "died", passes)
    again = run(folder, tmp_path / "died", passes)
    assert differing(whole, again) == []
    assert told(whole) == told(again)


def test_files_of_a_store_are_whole_or_not_there(tmp_path: Path) -> None:
    store = Spill.of(tmp_path / "a b ü")
    value = torch.randn(3, 4)
    held = {"whole": value, "view": value[1:], "turned": value.t(), "wide": value[:1].expand(5, 4), "none": value[:0]}
    tensors, facts = store.made("a/b: *?\n", lambda: (held, {"é": [1, None, 0.1]}))
    again, told_again = Spill.of(tmp_path / "a b ü").made("a/b: *?\n", lambda: pytest.fail("made anew"))
    for found in (tensors, again):
        assert {name: t.tolist() for name, t in found.items()} == {name: t.tolist() for name, t in held.items()}
    assert facts == told_again == {"é": [1, None, 0.1]}
    again["whole"].zero_()
    assert torch.equal(store.made("a/b: *?\n", Keep().made)[0]["whole"], value), "a write went into the file"
    store.drop("a/b: *?\n")
    assert not store.has("a/b: *?\n")
    assert store.made("x" * 500, lambda: ({}, {"n": 1})) != store.made("x" * 501, lambda: ({}, {"n": 2}))
    with pytest.raises(SpillError, match="cannot be made"):
        Spill.of(tmp_path / "a b ü" / next((tmp_path / "a b ü").iterdir()).name / "inside")


@pytest.mark.parametrize("damage", [b"", b"\x00" * 100, b"\xff" * 7])
def test_a_damaged_file_is_named(damage: bytes, made: Any, tmp_path: Path) -> None:
    folder, _ = made(PIPELINES[0])
    with dying(40, late=True), pytest.raises(Died):
        run(folder, tmp_path, PIPELINES[0])
    hurt = sorted(tmp_path.rglob("mask *"))[1]
    hurt.write_bytes(damage)
    with pytest.raises(SpillError, match="is damaged"):
        run(folder, tmp_path, PIPELINES[0])
    hurt.write_bytes(hurt.with_name(sorted(p.name for p in tmp_path.rglob("mask *"))[0]).read_bytes()[:-1])
    with pytest.raises(SpillError, match="is damaged") as told_of:
        run(folder, tmp_path, PIPELINES[0])
    assert str(hurt) in str(told_of.value)


def test_weights_of_a_model_in_memory_stay_what_they_are(tmp_path: Path) -> None:
    model = load_model("tiny").model
    before = {name: t.clone() for name, t in model.state_dict().items()}
    sparsec.compile(model, "magnitude(0.5),freeze,lower(csr)", spill=tmp_path)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    """Regression: the second model got the weights of the first one."""
    passes = "magnitude(0.5),freeze"

    def run(seed: int = 0, passes: str | None = passes, **options: Any) -> Any:
        return sparsec.compile(load_model("tiny", seed=seed).model, passes, spill=tmp_path, **options)

    first = run()
    assert differing(first, run()) == []
    for what, again in {
        "values of the weights": lambda: run(seed=1),
        "passes": lambda: run(passes="magnitude(0.7),freeze"),
        "calibration": lambda: run(passes="wanda(0.5),freeze", calibration=text()),
    }.items():
        with pytest.raises(SpillError, match=what):
            again()
    assert differing(first, run()) == []


def test_other_masks_are_another_run(tmp_path: Path) -> None:
    def run(kept: bool) -> Any:
        mask = torch.full((64, 64), kept)
        mask[0] = not kept
        given = {"model.layers.0.self_attn.q_proj": mask}
        return sparsec.compile(load_model("tiny").model, "mask,freeze", masks=given, spill=tmp_path)

    run(True)
    with pytest.raises(SpillError, match="masks"):
        run(False)


@pytest.mark.parametrize("name", ["mixtral", "gpt2"])
def test_what_is_converted_of_two_sources_is_kept_apart(name: str, tmp_path: Path) -> None:
    """Regression: the second model was loaded with what was converted of the first one."""
    spill, folders = Spill.of(tmp_path / "spill"), []
    for number in range(2):
        folders.append(saved(name, tmp_path / str(number), torch.bfloat16))
        for path in folders[number].glob("*.safetensors"):
            save_file({n: t + number for n, t in load_file(path).items()}, path, metadata={"format": "pt"})
    for folder in folders:
        here, there = load_model(folder).model, load_model(folder, spill=spill).model
        assert all(torch.equal(t, there.state_dict()[n]) for n, t in here.state_dict().items())


def test_what_one_process_has_mapped_is_not_written_by_the_next_one(tmp_path: Path) -> None:
    """Regression: of a model with experts each rank wrote the files anew that the others had mapped."""
    folder, spill = saved("mixtral", tmp_path / "model"), Spill.of(tmp_path / "spill")

    def seen() -> dict[Path, tuple[int, int]]:
        return {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in spill.folder.rglob("*.safetensors")}

    load_model(folder, spill=spill)
    before = seen()
    load_model(folder, spill=spill)
    assert seen() == before
    assert before
    assert not list(spill.folder.rglob("*.tmp"))
