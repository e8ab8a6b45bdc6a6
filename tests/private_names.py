"""Looks up every private name of torch that sparsec takes in an unpacked wheel of torch, which need not run here.

python tests/private_names.py FOLDER
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

from project import MODULES_OF_PRIVATE_NAMES

import sparsec.private


def wanted() -> set[str]:
    """Dotted names: what the two modules import, and what is optional."""
    found = set(sparsec.private.OPTIONAL)
    for path in MODULES_OF_PRIVATE_NAMES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
                found |= {f"torch.{node.attr}"} if node.attr.startswith("_") and node.attr != "__version__" else set()
    return found


def lacking(folder: Path) -> list[str]:
    """Those that no source or stub in a folder that holds `torch/` names where they should stand."""
    return sorted(name for name in wanted() if not _stands(folder, name))


def _stands(folder: Path, dotted: str) -> bool:
    module, _, name = dotted.rpartition(".")
    place = folder.joinpath(*module.split("."))
    files = [f for end in (".py", ".pyi", "/__init__.py", "/__init__.pyi") if (f := Path(f"{place}{end}")).is_file()]
    if module == "torch":  # its functions are written down with the extension module
        files += folder.joinpath("torch", "_C").glob("*.pyi")
    # Where an extension module has no stub of its own, whoever uses it names it.
    files = files or [*folder.joinpath("torch").rglob("*.py"), *folder.joinpath("torch").rglob("*.pyi")]
    if place.joinpath(f"{name}.py").is_file():
        return True
    return any(re.search(rf"\b{re.escape(name)}\b", file.read_text("utf-8", errors="replace")) for file in files)


if __name__ == "__main__":
    missing = lacking(Path(sys.argv[1]))
    print(f"{len(wanted())} private names looked up in {sys.argv[1]}: {', '.join(missing) or 'all there'}")
    needed = [name for name in missing if name not in sparsec.private.OPTIONAL]
    sys.exit(f"needed and not there: {', '.join(needed)}" if needed else 0)
