"""`sparsec compress` of what is broken, changes, is in the way or is in use: refused by name, and what was there stays."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_resume_killed import small

from sparsec import beside, compress
from sparsec.checkpoint.checking import examine
from sparsec.data import load_model
from sparsec.passes import Freeze
from sparsec.spill import Spill
from sparsec.unfinished import Unfinished

PASSES = "magnitude(0.5),freeze,lower(csr)"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "a model ü"))


def run(model: Path, folder: Path, *options: str, passes: str = PASSES) -> int:
    return compress.main([str(model), str(folder), "--passes", passes, "--no-sample", "--dtype", "bf16", *options])


def dies(monkeypatch: pytest.MonkeyPatch, model: Path, folder: Path, *options: str, passes: str = PASSES) -> None:
    """A run that dies in its second pass."""
    write = Spill._write

    class Died(BaseException):
        pass

    def dying(self: Spill, path: Path, *given: Any) -> None:
        write(self, path, *given)
        if path.parent.name.startswith("02") or path.name.startswith("reached 00001"):
            raise Died

    with monkeypatch.context() as patched:
        patched.setattr(Spill, "_write", dying)
        with pytest.raises(Died):
            run(model, folder, *options, passes=passes)


def index(model: Path) -> dict[str, Any]:
    return json.loads((model / "model.safetensors.index.json").read_text())


def shards(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


BROKEN = ("truncated", "missing", "empty", "wrong shard", "nowhere", "no such file", "other shape", "twice")


@pytest.mark.parametrize("broken", BROKEN)
def test_a_source_that_is_broken_is_named_and_nothing_is_left(
    broken: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, *_ = shards(model)
    held = index(model)
    name = next(n for n, file in held["weight_map"].items() if file == first.name and "norm" not in n)
    if broken == "truncated":
        first.write_bytes(first.read_bytes()[:-100])
    elif broken == "missing":
        first.unlink()
    elif broken == "empty":
        first.write_bytes(b"")
    elif broken in ("other shape", "twice"):
        file = first if broken == "other shape" else second
        value = load_file(first)[name]
        changed = value[:-1].contiguous() if broken == "other shape" else value + 1
        save_file({**load_file(file), name: changed}, file, metadata={"format": "pt"})
    else:
        if broken == "nowhere":
            tensors = load_file(first)
            del tensors[name]
            save_file(tensors, first, metadata={"format": "pt"})
        held["weight_map"][name] = {"wrong shard": second.name, "no such file": "gone.safetensors"}.get(
            broken, first.name
        )
        (model / "model.safetensors.index.json").write_text(json.dumps(held))
    assert run(model, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert str(model) in said
    assert (name if broken in ("wrong shard", "nowhere", "other shape", "twice") else "") in said
    assert ("gone" if broken == "no such file" else "") in said
    assert sorted(path.name for path in tmp_path.iterdir()) == [model.name]


def test_an_index_that_lacks_a_tensor_loads_as_in_memory(model: Path, tmp_path: Path) -> None:
    held = index(model)
    del held["weight_map"]["model.norm.weight"]
    (model / "model.safetensors.index.json").write_text(json.dumps(held))
    here, there = load_model(model).model, load_model(model, spill=Spill.of(tmp_path / "spill")).model
    assert all(torch.equal(t, there.state_dict()[name]) for name, t in here.state_dict().items())


def test_a_tensor_that_two_files_hold_alike_is_no_fault(model: Path, tmp_path: Path) -> None:
    first, second, *_ = shards(model)
    save_file({**load_file(first), **load_file(second)}, second, metadata={"format": "pt"})
    assert run(model, tmp_path / "out") == 0


@pytest.mark.parametrize("how", ["in place", "in place, its time set back", "by rename", "gone"])
def test_a_source_that_changes_is_named_and_nothing_is_written(
    how: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, shard = Freeze.run, shards(model)[1]

    def changing(self: Any, *given: Any) -> Any:
        found = plain(self, *given)
        if how.startswith("in place"):
            before = shard.stat()
            with shard.open("r+b") as file:
                file.seek(-4, os.SEEK_END)
                file.write(b"\1\2\3\4")
            if "back" in how:
                os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
        elif how == "by rename":
            other = shard.with_name("other")
            other.write_bytes(shard.read_bytes())
            other.rename(shard)
        else:
            shard.unlink()
        return found

    monkeypatch.setattr(Freeze, "run", changing)
    assert run(model, tmp_path / "out") == 2
    assert f"{shard} changed while it was read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_name_and_other_rights_change_no_source(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, shard = Freeze.run, shards(model)[1]

    def linking(self: Any, *given: Any) -> Any:
        os.link(shard, tmp_path / "a backup")
        shard.chmod(0o400)
        return plain(self, *given)

    monkeypatch.setattr(Freeze, "run", linking)
    assert run(model, tmp_path / "out") == 0


def test_a_source_that_changes_between_reading_and_hashing_is_seen(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: what was converted was of the old file, and the hash of the new one."""
    plain = load_model

    def loading(*given: Any) -> Any:
        found = plain(*given)
        save_file(
            {n: t + 1 for n, t in load_file(shards(model)[0]).items()}, shards(model)[0], metadata={"format": "pt"}
        )
        return found

    monkeypatch.setattr(beside, "load_model", loading)
    assert run(model, tmp_path / "out", "--dtype", "fp32") == 2
    assert "changed while it was read" in capsys.readouterr().err


def test_what_is_refused_is_refused_before_files_are_hashed_and_samples_written(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Regression: a run that would hold too much hashed all files and wrote a sample first, hours for a large model."""
    known = [str(model), str(tmp_path / "out"), "--passes", PASSES, "--dtype", "bf16"]
    assert compress.main([*known, "--max-memory", "10MB"]) == 2
    said = capsys.readouterr().err
    assert "max_memory is 10.0 MB" in said
    assert "hashing" not in said
    assert "what it writes" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == [model.name]
    assert compress.main([*known, "--max-memory", "10GB", "--new-tokens", "2"]) == 0
    said = capsys.readouterr().err
    order = ["tracing", "hashing the source", "what it writes before", "pass 1", "what it writes after"]
    assert sorted(order, key=said.index) == order


def test_what_a_run_kept_is_gone_on_with_only_as_it_was_begun(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, spec = tmp_path / "out", "wanda(0.5),freeze,lower(csr)"
    drawn = ("--calibration-sequences", "2", "--calibration-length", "16")
    dies(monkeypatch, model, folder, *drawn, passes=spec)
    assert run(model, folder, *drawn, passes=spec) == 2
    assert "--resume goes on with it" in capsys.readouterr().err
    for options, passes, said in (
        ((*drawn,), "wanda(0.6),freeze,lower(csr)", "passes"),
        ((*drawn, "--seed", "1"), spec, "seed"),
        ((*drawn, "--dtype", "fp32"), spec, "dtype"),
        ((*drawn, "--threads", str(torch.get_num_threads() + 1)), spec, "threads"),
        (("--calibration-sequences", "3", "--calibration-length", "16"), spec, "calibration"),
    ):
        threads = torch.get_num_threads()
        assert run(model, folder, "--resume", *options, passes=passes) == 2, said
        torch.set_num_threads(threads)
        assert said in capsys.readouterr().err.split("holds a run of something else:")[1]
    with monkeypatch.context() as patched:
        patched.setattr(compress, "version", lambda name: "0.0.1")
        assert run(model, folder, "--resume", *drawn, passes=spec) == 2
    assert "versions: torch" in capsys.readouterr().err
    shard = shards(model)[0]
    before = shard.read_bytes()
    save_file({n: t + 1 for n, t in load_file(shard).items()}, shard, metadata={"format": "pt"})
    assert run(model, folder, "--resume", *drawn, passes=spec) == 2
    assert f"source: {shard.name}" in capsys.readouterr().err
    shard.write_bytes(before)
    assert not folder.exists()
    assert run(model, folder, "--resume", *drawn, passes=spec) == 0
    assert examine(folder).faults == []
    assert not (tmp_path / "out.unfinished").exists()


def test_resume_begins_where_nothing_is_and_an_earlier_save_is_replaced(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "er ü" / "out"
    assert run(model, folder, "--resume") == 0
    before = {path.name for path in folder.glob("*.safetensors")}
    assert run(model, folder, passes="magnitude(0.9),freeze,lower(csr)") == 0
    assert not before & {path.name for path in folder.glob("*.safetensors")}
    assert examine(folder).faults == []
    inside = model / "out"
    assert run(model, inside) == 0
    assert {path.name for path in inside.glob("*.safetensors")} == before


def test_a_folder_that_fills_while_a_run_works_stays_and_so_does_the_result(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: the result was deleted, since the folder to write in was looked at twice."""
    done, folder = Unfinished.done, tmp_path / "out"

    def filled(self: Unfinished) -> None:
        folder.mkdir()
        (folder / "mine").write_text("mine")
        done(self)

    monkeypatch.setattr(Unfinished, "done", filled)
    assert run(model, folder) == 2
    assert f"it is whole in {tmp_path / 'out.unfinished' / 'result'}" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in folder.iterdir()] == ["mine"]
    assert examine(tmp_path / "out.unfinished" / "result").faults == []


def test_what_a_killed_writing_left_is_not_in_the_result(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: files of a save that was killed lay beside those of the next one."""
    folder = tmp_path / "out"
    dies(monkeypatch, model, folder)
    left = tmp_path / "out.unfinished" / "result"
    left.mkdir()
    (left / "model-00001-of-00009-0123456789abcdef.safetensors").write_bytes(b"half")
    (left / ".sparsec-1.tmp").mkdir()
    assert run(model, folder, "--resume") == 0
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".") or "of-00009" in path.name]


def test_an_empty_folder_that_is_there_becomes_the_result(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert run(model, tmp_path / "link") == 0
    assert examine(tmp_path / "real").faults == []
    (tmp_path / "here").mkdir()
    number = (tmp_path / "here").stat().st_ino
    monkeypatch.chdir(tmp_path / "here")
    assert run(model, Path()) == 0
    assert (tmp_path / "here").stat().st_ino == number
    assert examine(tmp_path / "here").faults == []


def test_two_runs_do_not_mix(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    dies(monkeypatch, model, folder)
    child = subprocess.Popen(
        [sys.executable, "-c", _HOLDS, str(tmp_path / "out.unfinished" / "lock")],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
    )
    assert child.stdout is not None
    child.stdout.readline()
    before = sorted((tmp_path / "out.unfinished").rglob("*"))
    assert run(model, folder, "--resume") == 2
    assert f"process {child.pid} works there" in capsys.readouterr().err
    assert sorted((tmp_path / "out.unfinished").rglob("*")) == before
    child.communicate()
    assert run(model, folder, "--resume") == 0


_HOLDS = """
import sys
from pathlib import Path
from sparsec import files
with files.lock(Path(sys.argv[1]), 0, print):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_every_line_is_json_and_the_last_one_says_saved(model: Path, tmp_path: Path, capfd: Any) -> None:
    assert compress.main([str(model), str(tmp_path / "out"), "--passes", PASSES, "--json"]) == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [each["event"] for each in lines] == ["stage"] * (len(lines) - 1) + ["saved"]
    assert lines[-1]["folder"] == str(tmp_path / "out")
    assert {each["what"] for each in lines[:-1]} >= {"loading the model", "hashing the source", "tracing", "writing"}
    assert all(0 <= each["done"] <= each["total"] for each in lines[:-1])
    assert not [each for each in lines[:-1] if each["what"].startswith("what it writes")]  # nobody would read it


def test_a_run_whose_lines_nobody_reads_any_more_goes_on(model: Path, tmp_path: Path) -> None:
    """Regression: `--json | head` ended it in silence, with exit code 0 and no model."""
    words = ["compress", str(model), str(tmp_path / "out"), "--passes", PASSES, "--no-sample", "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-m", "sparsec", *words], **pipes) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.readline()
        child.stdout.close()
        said = child.stderr.read()
    assert child.returncode == 0, said
    assert said.count("nobody reads the lines") == 1
    assert examine(tmp_path / "out").faults == []


def test_a_full_disk_ends_it_by_name_and_it_goes_on_with_room(model: Path, tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "sparsec",
        "compress",
        str(model),
        str(tmp_path / "out"),
        "--passes",
        PASSES,
        "--no-sample",
    ]
    limited = f"import resource,sys; resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000)); {_MAIN}"
    ended = subprocess.run([sys.executable, "-c", limited, *words[4:]], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "File too large" in ended.stderr
    assert not (tmp_path / "out").exists()
    assert subprocess.run([*words, "--resume"], capture_output=True, timeout=300, check=False).returncode == 0
    assert examine(tmp_path / "out").faults == []


_MAIN = "from sparsec import compress; sys.exit(compress.main(sys.argv[1:]))"
