"""What the README tells a newcomer to type works: its Python runs, its commands run, its make targets exist.

A command that would run the default model (minutes) runs the same options on the small random one and measures nothing; CI
runs `make demo` itself.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from project import ROOT

README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
SHELL = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines() if line.strip()]
COMMANDS = [shlex.split(line, comments=True) for line in SHELL]
MODULES = [words for words in COMMANDS if words[:2] == ["python", "-m"]]
TARGETS = [words for words in COMMANDS if words[0] == "make"]


@pytest.mark.parametrize("source", [block for kind, block in BLOCKS if kind == "python"])
def test_python_of_the_readme_runs(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(source, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("words", MODULES, ids=" ".join)
def test_commands_of_the_readme_run(words: list[str], tmp_path: Path) -> None:
    arguments = words[1:]
    if arguments[1] == "sparsec.report":
        takes_model = len(arguments) > 2 and not arguments[2].startswith("-")
        arguments += [] if takes_model else ["tiny", "--no-measure"]
    done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", TARGETS, ids=" ".join)
def test_make_targets_of_the_readme_exist(words: list[str]) -> None:
    done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_everything_that_can_be_run_is_run() -> None:
    assert {"demo", "test"} <= {words[1] for words in TARGETS}
    assert [words for words in COMMANDS if words not in MODULES and words not in TARGETS] == []
    assert {kind for kind, _ in BLOCKS} <= {"sh", "python"}


def test_files_that_the_readme_names_exist() -> None:
    named = set(re.findall(r"`((?:examples|kernels|passes|sparsec|tests|\.ci)/[\w./-]*)`", README))
    assert named, "the README names no file"
    assert [name for name in named if not (ROOT / name).exists()] == []
    listed = {p.name for p in (ROOT / "examples").glob("*.py")}
    assert listed == {Path(name).name for name in named if name.startswith("examples/")}
