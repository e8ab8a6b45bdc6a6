"""`sparsec NAME`, `python -m sparsec NAME` and `python -m sparsec.NAME`: one table, one call."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys

import pytest
from project import PYPROJECT, modules

import sparsec.__main__ as overview
from sparsec.console.commands import COMMANDS, Command, find
from sparsec.errors import SpecError

NAMES = [command.name for command in COMMANDS]


def helped(capsys: pytest.CaptureFixture[str], call: object) -> str:
    """What `--help` prints."""
    with pytest.raises(SystemExit) as exit_:
        call()  # type: ignore[operator]
    assert exit_.value.code == 0
    return capsys.readouterr().out


def test_every_module_that_can_be_run_is_in_the_table() -> None:
    runnable = {name for name, path in modules().items() if 'if __name__ == "__main__":' in path.read_text("utf-8")}
    others = {
        "sparsec.__main__",
        "sparsec.bench.peer_child",
    }  # the latter is run as text, by another environment's Python
    assert {command.module for command in COMMANDS} == runnable - others


@pytest.mark.parametrize("command", COMMANDS, ids=NAMES)
def test_a_command_is_the_module_of_its_name(
    command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command.module.removesuffix(".__main__") == f"sparsec.{command.name}"
    monkeypatch.setenv(
        "COLUMNS", "200"
    )  # where lines have room, no comment stands above one: their names differ in length
    main = importlib.import_module(command.module).main
    by_module = helped(capsys, lambda: main(["--help"]))
    by_name = helped(capsys, lambda: overview.main([command.name, "--help"], "sparsec"))
    assert by_module.startswith(f"usage: python -m sparsec.{command.name} ")
    assert by_name.startswith(f"usage: sparsec {command.name} ")
    assert f"python -m sparsec.{command.name}" not in by_name
    flat = " ".join(by_module.replace(f"python -m sparsec.{command.name}", f"sparsec {command.name}").split())
    assert flat == " ".join(by_name.split())


def test_help_names_every_command_in_one_line_with_an_example(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    out = helped(capsys, lambda: overview.main(["--help"], "sparsec"))
    for command in COMMANDS:
        (line,) = [line for line in out.splitlines() if line.startswith(f"  {command.name} ")]
        assert line.endswith(command.text)
        assert len(line) <= 110
        assert f"  sparsec {command.name} {command.example}" in out.splitlines()


@pytest.mark.parametrize("prog", ["sparsec", "python -m sparsec"])
def test_an_unknown_command_names_near_ones(prog: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert overview.main(["reprot", "tiny"], prog) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: there is no command 'reprot', did you mean 'report'; ")
    assert f"{prog} --help" in captured.err


@pytest.mark.parametrize("name", ["", "??", "Report ", "sparsec.report", "a" * 1000])
def test_what_is_no_command_is_refused(name: str) -> None:
    with pytest.raises(SpecError, match=re.escape(f"the commands are {', '.join(NAMES)}")):
        find(name)


def test_a_command_returns_its_own_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert overview.main(["report", "./no/such/model", "--no-measure"]) == 2
    assert "./no/such/model: there is no such folder or file" in capsys.readouterr().err


def test_the_installed_script_runs_the_same(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _, function = PYPROJECT["project"]["scripts"]["sparsec"].partition(":")
    script = getattr(importlib.import_module(module), function)
    assert not inspect.signature(script).parameters
    monkeypatch.setattr(sys, "argv", ["sparsec", "--version"])
    assert helped(capsys, script) == "sparsec 0.1.0\n"


def test_help_and_wrong_words_import_no_torch() -> None:
    """It takes seconds, which nobody waits for who asks what there is."""
    asked = [["--help"], ["--version"], ["reprot"]]
    asked += [[command.name, word] for command in COMMANDS for word in ("--help", "--no-such-option")]
    script = (
        "import sys, sparsec.__main__ as o\n"
        f"for words in {asked}:\n"
        "    try: o.main(words, 'sparsec')\n"
        "    except SystemExit: pass\n"
        "    slow = [name for name in ('torch', 'transformers', 'numpy', 'rich', 'yaml') if name in sys.modules]\n"
        "    if slow: sys.exit(f'{words} imports {slow}')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout.count("usage: ")) == (0, 1 + len(COMMANDS)), done.stderr


def test_what_help_names_is_what_there_is() -> None:
    """Help imports no torch, so it has the names of its own."""
    from sparsec.bench.models import CONFIGS
    from sparsec.console.command import DTYPES
    from sparsec.options import bench, shared, study
    from sparsec.sweep.presets import PRESETS

    assert (*CONFIGS,) == bench.MODELS
    assert (*DTYPES,) == shared.DTYPES
    assert (*PRESETS,) == (*study.PRESETS,)


def test_passes_are_imported_without_what_several_processes_need() -> None:
    script = "import sys, sparsec.compiler; sys.exit('torch.distributed.fsdp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0


def test_a_name_is_imported_when_it_is_asked_for() -> None:
    script = (
        "import sys, sparsec\n"
        "assert set(sparsec.__all__) <= set(dir(sparsec)) and 'SparsecError' not in vars(sparsec)\n"
        "from sparsec import SparsecError\n"
        "assert sparsec.offered is sys.modules['sparsec.offered']\n"
        "assert SparsecError is sparsec.errors.SparsecError is vars(sparsec)['SparsecError']\n"
        "assert not hasattr(sparsec, 'compil') and not hasattr(sparsec, '__wrapped__')\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_homes_of_the_public_names_are_all_of_them() -> None:
    import sparsec

    listed = [name for names in sparsec._HOMES.values() for name in names]
    assert sorted(listed) == sorted(set(sparsec.__all__) - {"__version__"})
