"""What the README and docs/ tell a newcomer to type works: their Python runs, their commands run, their make targets exist.

A command that would run the default model (minutes) runs the same options on the small random one and measures nothing; CI
runs `make demo` itself.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
from project import ROOT

from sparsec.__main__ import main
from sparsec.passes import PASSES
from sparsec.pipeline import Pipeline

README = (ROOT / "README.md").read_text("utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text("utf-8") for page in PAGES)
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
SHELL = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines() if line.strip()]
COMMANDS = list({line: shlex.split(line, comments=True) for line in SHELL}.values())
MODULES = [words for words in COMMANDS if words[:2] == ["python", "-m"] or words[0] == "sparsec"]
TARGETS = [words for words in COMMANDS if words[0] == "make"]


@pytest.mark.parametrize("source", [block for kind, block in BLOCKS if kind == "python"])
def test_python_of_the_readme_runs(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(source, "README.md", "exec"), {"__name__": "readme"})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all commands, as a reader has: what one saves, the next one loads."""
    return tmp_path_factory.mktemp("reader")


@pytest.mark.parametrize("words", MODULES, ids=" ".join)
def test_commands_of_the_readme_run(
    words: list[str], place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, which has paid for the imports: `sparsec X`, `python -m sparsec X` and `python -m sparsec.X` are one."""
    monkeypatch.chdir(place)
    package, *arguments = words if words[0] == "sparsec" else words[2:]
    arguments = [*package.split(".")[1:], *arguments]
    if arguments[:1] == ["report"] and (len(arguments) == 1 or arguments[1].startswith("-")):
        arguments += ["tiny", "--no-measure"]
    try:
        status: object = main(arguments)
    except SystemExit as end:
        status = end.code
    said = capsys.readouterr()
    assert status in (0, None), said.err
    assert said.out.strip()
    assert "Traceback" not in said.err


@pytest.mark.parametrize("words", TARGETS, ids=" ".join)
def test_make_targets_of_the_readme_exist(words: list[str]) -> None:
    done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("given", "training"), [([], "minutes=2"), (["MODEL=tiny", "ARGS=--quick"], "steps=5")])
def test_the_demo_trains_for_minutes_and_a_small_random_model_for_a_moment(given: list[str], training: str) -> None:
    """Its pair is what shows recovery: the same pruning with it and without."""
    done = subprocess.run(["make", "-n", "demo", *given], cwd=ROOT, capture_output=True, text=True, check=True)
    (line,) = (line for line in done.stdout.splitlines() if "sparsec.report" in line)
    words = shlex.split(line)
    passes, beside = (Pipeline.parse(words[words.index(option) + 1]) for option in ("--passes", "--beside"))
    passes.validate()
    assert passes.training == ("recover",)
    assert f"recover(distill, {training})" in str(passes)
    assert str(passes).startswith(f"{beside},freeze,recover")
    assert "--quick" in words or not given


def test_everything_that_can_be_run_is_run() -> None:
    assert {"demo", "test"} <= {words[1] for words in TARGETS}
    assert [words for words in COMMANDS if words not in MODULES and words not in TARGETS] == []
    assert {kind for kind, _ in BLOCKS} <= {"sh", "python", "toml"}


def test_files_that_the_pages_name_exist() -> None:
    named = set(re.findall(r"`((?:docs|examples|kernels|passes|sparsec|tests|\.ci)/[\w./-]*)`", TEXT))
    assert named, "no page names a file"
    assert [name for name in named if not (ROOT / name).exists()] == []
    listed = {p.name for p in (ROOT / "examples").glob("*.py")}
    assert listed == {Path(name).name for name in named if name.startswith("examples/")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)", page.read_text("utf-8"))
    assert [link for link in links if not (page.parent / link.partition("#")[0]).is_file()] == []


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    assert len(README.splitlines()) <= 110
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= set(re.findall(r"\]\(([^)]+)\)", README))


def test_the_readme_answers_in_the_order_of_a_newcomer() -> None:
    wanted = [
        "What to expect",
        "Install",
        "In Python",
        "Supported models",
        "Which method, which layout",
        "Limits",
        "More",
    ]
    assert re.findall(r"^## (.*)$", README, flags=re.MULTILINE) == wanted


def test_every_option_of_every_pass_is_explained() -> None:
    """`scope`, `feed` and six more stood in no page."""
    told = (ROOT / "docs" / "passes.md").read_text("utf-8").partition("## Options")[2]
    options = {option.name for cls in PASSES for option in fields(cls)}
    assert options <= set(re.findall(r"`(\w+)`", told))
