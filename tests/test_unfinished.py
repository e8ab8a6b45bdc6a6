"""The folder of a run that is not done, and the one that it becomes: what is there is never taken for a run's, nor deleted."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from test_streaming_input import model, run, whole

from sparsec.checkpoint.checking import examine
from sparsec.unfinished import Unfinished

__all__ = ["model", "whole"]  # fixtures


def test_files_of_one_name_are_hashed_each(tmp_path: Path) -> None:
    """Regression: of links to files of one name in several folders one hash was kept."""
    files = [tmp_path / name / "model.safetensors" for name in ("a", "b")]
    for number, path in enumerate(files):
        path.parent.mkdir()
        path.write_bytes(bytes([number]))
        (tmp_path / f"{number}.safetensors").symlink_to(path)
    unfinished = Unfinished(tmp_path / "out", tmp_path / "out.unfinished")
    found = unfinished.hashed([tmp_path / "0.safetensors", tmp_path / "1.safetensors"], None)
    assert len({*found.values()}) == 2


@pytest.mark.parametrize("what", ["the source", "a file", "a folder of the user's"])
def test_what_is_no_run_is_never_taken_for_one(
    what: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Regression: `compress m.unfinished m --resume` deleted the model that it had read."""
    there = tmp_path / "out.unfinished"
    if what == "the source":
        shutil.copytree(model, there)
    elif what == "a file":
        there.write_text("mine")
    else:
        there.mkdir()
        (there / "mine").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for more in ((), ("--resume",)):
        assert run(there if what == "the source" else model, tmp_path / "out", *more) == 2
        assert "none of a run" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["n" * 250, "n/../out"])
def test_odd_names_of_the_folder(name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run(model, tmp_path / name)
    told = capsys.readouterr()
    if ".." in name:
        assert code == 0
        assert f"generate {tmp_path / 'out'}" in told.out
    else:
        assert code == 2
        assert "name too long" in told.err


def test_a_run_that_is_killed_while_it_clears_away_is_begun_anew(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: the next one went on with the half that was left of what had been kept."""
    remove, spec = shutil.rmtree, "wanda(0.5),freeze,lower(csr)"
    drawn = ("--calibration-sequences", "2", "--calibration-length", "16")

    class Died(BaseException):
        pass

    def dying(path: Any, *given: Any, **options: Any) -> None:
        if str(path).endswith(".unfinished"):
            for kept in Path(path).rglob("attention*"):
                kept.unlink()
            for kept in Path(path).rglob("*self_attn*"):
                kept.unlink()
            raise Died
        remove(path, *given, **options)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", dying)
        with pytest.raises(Died):
            run(model, tmp_path / "out", *drawn, passes=spec)
    assert run(model, tmp_path / "out", "--resume", *drawn, passes=spec) == 0
    assert examine(tmp_path / "out").faults == []
    assert not (tmp_path / "out.unfinished").exists()
