"""Guards over the project itself: what is packed, who imports whom, what may stand in a committed file."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
import zipfile
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from project import (
    FOLDERS,
    MODULES_OF_PRIVATE_NAMES,
    PYPROJECT,
    ROOT,
    build_wheel,
    clean_copy,
    imports,
    modules,
    text_files,
)

MODULES = modules()
IMPORTS = {name: imports(name, path, set(MODULES)) for name, path in MODULES.items()}

LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "arguments",
        "cache",
        "command_line",
        "config_guard",
        "counts",
        "defaults",
        "errors",
        "files",
        "kv_cache",
        "metrics",
        "offered",
        "options",
        "patterns",
        "private",
        "progress",
        "ranks",
        "reference",
        "serial",
        "imports",
        "transformers_hook",
        "watch",
    ),
    ("formats",),
    ("ir",),
    ("kernels",),
    ("holders", "machine", "memory", "spill"),
    ("timing",),
    ("cost",),
    ("data", "calibrate"),
    ("pipeline",),
    ("lowering", "recover"),
    ("passes",),
    ("planning",),
    ("console",),
    ("emitter", "evaluate", "inductor", "parallel", "program", "wrapped"),
    ("taught",),
    ("report",),
    ("checkpoint", "compiled", "compiler", "loading", "splitting", "training"),
    ("study",),
    ("sweep",),
    ("page",),
    ("opened",),
    (
        "",
        "__main__",
        "beside",
        "check",
        "overview",
        "compress",
        "generate",
        "glance",
        "plan",
        "evaluate.__main__",
        "report.__main__",
        "study.__main__",
        "cost.__main__",
        "bench",
        "testing",
        "unfinished",
    ),
)
"""Imports go to an earlier line or stay in their own. A name stands for all below it, the longest one wins."""

OUTSIDE = {"sparsec.packaging"}
"""Read by setuptools, imported by nobody."""

MAX_LINES = 400
HOSTS = {"www.apache.org", "arxiv.org"}
"""Hosts that a committed file may name: the licence's and the papers'."""

# Written in pieces, so that this file may be read by its own guard.
FORBIDDEN = {
    "a path of somebody's machine": re.compile(r"(?<![\w.$}~-])/(?:home|Users|root|work|opt|mnt|tmp)" + r"/[\w.]"),
    "unfinished work": re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|X" + r"XX)\b"),
    "a package index": re.compile(r"--(?:extra-)?index" + r"-url|--find" + r"-links"),
}
URL = re.compile(r"https?://([\w.-]+)")


def layer(module: str) -> int:
    """Index into LAYERS."""
    name = module.removeprefix("sparsec").removeprefix(".")
    places = [
        (len(p), i) for i, names in enumerate(LAYERS) for p in names if p == name or (p and name.startswith(p + "."))
    ]
    assert places, f"{module} stands in no layer: give it its place in LAYERS"
    return max(places)[1]


def offences(text: str) -> list[str]:
    """What a committed text may not hold."""
    found = [f"{what}: {m.group()!r}" for what, pattern in FORBIDDEN.items() for m in pattern.finditer(text)]
    return found + [f"host {host!r} is not in HOSTS" for host in URL.findall(text) if host not in HOSTS]


@pytest.mark.parametrize("name", sorted(n for n, path in MODULES.items() if path not in MODULES_OF_PRIVATE_NAMES))
def test_private_names_of_torch_stand_in_one_place(name: str) -> None:
    text = MODULES[name].read_text("utf-8")
    found = re.findall(
        r"(?<!optional\()(?<!\")torch(?:\.\w+)*?\._[A-Za-z]\w*(?:\.\w+)*|(?:from|import) torch[\w.]*\._\w+", text
    )
    assert [each for each in found if not each.startswith("torch.ops.aten.")] == []


def room(module: str) -> str:
    """The folder that a module stands in, or itself where it stands in none; a command is by itself, since nobody imports it."""
    parts = module.split(".")
    own = module.endswith("__main__") or (len(parts) < 3 and MODULES[module].name != "__init__.py")
    return module if own else ".".join(parts[:2])


def test_no_room_leads_back_to_itself() -> None:
    """A circle of folders is one that no list of layers shows: each of its imports may go down."""
    ways: dict[str, set[str]] = {}
    for name, others in IMPORTS.items():
        ways.setdefault(room(name), set()).update(room(other) for other in others)
    try:
        list(TopologicalSorter({name: others - {name} for name, others in ways.items()}).static_order())
    except CycleError as error:
        raise AssertionError(f"these rooms import each other: {' <- '.join(error.args[1])}") from error


SAME_MEANING = frozenset(
    (
        *("main", "parser", "document", "text", "table", "headlines"),  # of each command
        *(
            "add",
            "absent",
            "masked",
            "missing",
            "unsupported",
            "product",
            "measure",
            "measure_kernels",
            "measure_reads",
            "run",
        ),
        *("columns_at", "expand", "words_at"),  # parts of a Triton kernel
    )
)
"""Public functions of several modules that do the same for their own kind of thing."""


def test_a_public_name_means_one_thing() -> None:
    found: dict[str, list[str]] = {}
    for name, path in MODULES.items():
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(name)
    twice = {name: homes for name, homes in found.items() if len(homes) > 1}
    assert {name: homes for name, homes in twice.items() if name not in SAME_MEANING} == {}
    assert twice.keys() >= SAME_MEANING, "no longer several: take it out of the list"


def test_packages_list_names_every_package_on_disk() -> None:
    on_disk = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == on_disk


def test_every_module_lies_in_a_package() -> None:
    orphans = [str(p.relative_to(ROOT)) for p in MODULES.values() if not (p.parent / "__init__.py").exists()]
    assert orphans == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(clean_copy(tmp_path_factory.mktemp("wheel")))


def test_wheel_holds_every_module_and_native_source(wheel: Path) -> None:
    native = {
        f"sparsec/kernels/native/{p.name}"
        for p in (ROOT / "kernels" / "native").glob("*")
        if p.suffix in (".cpp", ".h")
    }
    wanted = {
        name.replace(".", "/") + ("/__init__.py" if p.name == "__init__.py" else ".py") for name, p in MODULES.items()
    }
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert (wanted | native | {"sparsec/py.typed"}) - packed == set()


def test_wheel_installs_nothing_but_sparsec(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    version = PYPROJECT["project"]["version"]
    assert tops == {"sparsec", f"sparsec-{version}.dist-info"}
    assert wheel.name == f"sparsec-{version}-py3-none-any.whl"


def test_wheel_with_a_library_is_for_one_platform(tmp_path: Path) -> None:
    source = clean_copy(tmp_path)
    native = source / "kernels" / "native"
    native.mkdir(exist_ok=True)
    (native / "planted.so").write_bytes(b"\x7fELF")
    wheel = build_wheel(source)
    assert re.fullmatch(r"sparsec-[\d.]+-py3-none-(?!any)\w+\.whl", wheel.name)
    assert "sparsec/kernels/native/planted.so" in zipfile.ZipFile(wheel).namelist()


def test_passes_and_kernels_are_not_importable_under_their_folder_names() -> None:
    script = "import importlib.util as u; print([n for n in ('passes', 'kernels') if u.find_spec(n)])"
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", sorted(MODULES.keys() - OUTSIDE))
def test_imports_go_to_the_left(name: str) -> None:
    wrong = [other for other in IMPORTS[name] if layer(other) > layer(name) or other in OUTSIDE]
    assert wrong == [], f"{name} may not import {wrong}"


def test_imports_form_no_circle() -> None:
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {' <- '.join(error.args[1])}")


def test_a_pass_never_imports_a_pass() -> None:
    passes = importlib.import_module("sparsec.passes").PASSES
    homes = {p.__module__ for p in passes}
    assert len(homes) == len(passes), "one file per pass"
    assert {h: IMPORTS[h] & homes for h in homes if IMPORTS[h] & homes} == {}


def test_a_kernel_never_imports_the_ir() -> None:
    kernels = {
        name: {o for o in found if o.startswith("sparsec.ir")} for name, found in IMPORTS.items() if ".kernels" in name
    }
    assert {name: found for name, found in kernels.items() if found} == {}


def test_public_names_are_documented() -> None:
    package = importlib.import_module("sparsec")
    objects = {name: getattr(package, name) for name in package.__all__}
    documented = (n for n, o in objects.items() if inspect.isclass(o) or inspect.isfunction(o))
    bare = [n for n in documented if not inspect.getdoc(objects[n])]
    assert bare == []


def test_modules_say_what_they_are() -> None:
    bare = [n for n, p in MODULES.items() if p.stat().st_size and not p.read_text("utf-8").lstrip().startswith('"""')]
    assert bare == []


def test_import_without_install_says_what_to_do() -> None:
    """The checkout on the import path finds `sparsec`, but not the folders that are mapped into it."""
    script = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)];"
        "sys.path_hooks = [h for h in sys.path_hooks if 'ditable' not in repr(h)]; sys.path_importer_cache.clear();"
        f"sys.path = [p for p in sys.path if 'ditable' not in p]; sys.path.insert(0, {str(ROOT)!r}); import sparsec"
    )
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True)
    assert done.returncode != 0
    assert "pip install -e ." in done.stderr.splitlines()[-1]


def test_committed_files_name_no_machine_host_or_unfinished_work() -> None:
    found = {str(p.relative_to(ROOT)): offences(p.read_text("utf-8")) for p in text_files()}
    assert {name: f for name, f in found.items() if f} == {}


@pytest.mark.parametrize(
    "text",
    [
        "cd /ho" + "me/ann/x",
        "open('/tm" + "p/x')",
        "# TO" + "DO: later",
        "pip --index" + "-url x",
        "http" + "s://example.org/x",
    ],
)
def test_the_guard_sees(text: str) -> None:
    assert len(offences(text)) == 1


def test_the_guard_lets_pass() -> None:
    assert (
        offences(
            "#!/usr/bin/env bash\n/path/to/python $TMPDIR/tmp/x ./tmp/x a/root/b https:/" + "/arxiv.org/abs/2306.11695"
        )
        == []
    )


def test_no_source_file_is_too_long() -> None:
    sources = [p for p in text_files() if p.suffix in (".py", ".cpp", ".h")]
    long = {str(p.relative_to(ROOT)): n for p in sources if (n := len(p.read_text("utf-8").splitlines())) > MAX_LINES}
    assert long == {}, f"more than {MAX_LINES} lines: split by idea"


def test_folders_of_the_checkout_are_those_of_the_layout() -> None:
    tops = {p.relative_to(ROOT).parts[0] for p in text_files()}
    rooms = {
        "sparsec",
        "passes",
        "kernels",
        "tests",
        "examples",
        "docs",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "Makefile",
    }
    assert {t for t in tops if not t.startswith(".")} == rooms
    assert set(FOLDERS.values()) == {ROOT / n for n in ("sparsec", "passes", "kernels")}
