"""Readable names for the nodes of a graph: `mlp_up_proj_3` for the product of `model.layers.3.mlp.up_proj`.

Made from module paths alone, so they are the same on every machine and in every run.
"""

from __future__ import annotations

import keyword
import re
from collections import Counter
from collections.abc import Mapping


def node_names(paths: Mapping[str, str], taken: frozenset[str]) -> dict[str, str]:
    """New name by old name, all different and none in `taken`.

    `paths` maps old node names, in order of execution, to the module (or parameter) path that names them. The last two parts of
    the path and the layer's number are used; the whole path where those are ambiguous; `_call2` marks the second call at one path.
    """
    short = {path: _short(path) for path in dict.fromkeys(paths.values())}
    count = Counter(short.values())
    names: dict[str, str] = {}
    used = set(taken)
    for old, path in paths.items():
        base = short[path] if count[short[path]] == 1 else _identifier(path)
        name, call = base, 1
        while name in used:
            call += 1
            name = f"{base}_call{call}"
        used.add(name)
        names[old] = name
    return names


def _short(path: str) -> str:
    """At most two words, those behind the layer's number where there are any, then the numbers."""
    parts = path.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    behind = [p for p in parts[numbers[0] :] if not p.isdigit()] if numbers else []
    words = behind or [p for p in parts if not p.isdigit()]
    return _identifier("_".join(words[-2:] + [parts[i] for i in numbers]))


def _identifier(text: str) -> str:
    """A Python identifier that torch.fx accepts as a name."""
    name = re.sub(r"\W", "_", text).strip("_") or "root"
    return f"m_{name}" if name[0].isdigit() or keyword.iskeyword(name) or name == "self" else name


def is_plain(path: str) -> bool:
    """Whether a dotted path can be written in Python as it is."""
    return all(part.isidentifier() and not keyword.iskeyword(part) for part in path.split("."))


def lookup(base: str, path: str) -> str:
    """Python that reads what stands at a dotted path of any names."""
    for part in path.split("."):
        base = f"getattr({base}, {part!a})"
    return base
