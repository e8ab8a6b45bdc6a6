"""The checkout as the guards see it: its packages, its modules, who imports whom, a wheel built from a clean copy."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))

FOLDERS = {"sparsec": ROOT / "sparsec", "sparsec.passes": ROOT / "passes", "sparsec.kernels": ROOT / "kernels"}
"""Import name of each mapped folder."""

MODULES_OF_PRIVATE_NAMES = (ROOT / "sparsec" / "private.py", ROOT / "sparsec" / "inductor" / "names.py")
"""The only ones that name what is no promise of torch's."""


def modules() -> dict[str, Path]:
    """Every module of the package by its import name; a package is its `__init__.py`."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = path
    return found


def imports(name: str, path: Path, known: set[str]) -> set[str]:
    """Modules of the package that one of its modules imports, wherever in the file the import stands."""
    return set(_imports(ast.parse(path.read_text("utf-8")), name, path.name == "__init__.py", known)) - {name}


def _imports(tree: ast.AST, name: str, is_package: bool, known: set[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            here = name.split(".") if is_package else name.split(".")[:-1]
            base = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                yield from (m for m in (inner if inner in known else module,) if m in known)


def text_files() -> list[Path]:
    """Files of the checkout that are committed or about to be (not ignored), as far as they hold text."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    paths = [ROOT / name for name in listed.split("\0") if name]
    return [p for p in paths if p.is_file() and b"\0" not in p.read_bytes()[:4096]]


def clean_copy(target: Path) -> Path:
    """What the wheel is made of, copied: a build in the checkout itself would pack leftovers of earlier ones."""
    for folder in FOLDERS.values():
        shutil.copytree(
            folder, target / folder.name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.dylib", "*.dll")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    return target


def build_wheel(source: Path) -> Path:
    """Builds the wheel of a clean copy with the setuptools at hand, so that no network is needed."""
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "-w", "dist", "."], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    return wheel
