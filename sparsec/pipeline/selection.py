"""Which weights a pass works on: one mechanism for all passes.

`targets=` and `ignore=` take groups (`attention`, `mlp`, ...) and globs over module paths. A glob is compared with the path,
with each of its ends after a dot, and with the paths of the modules around it: `layers.1.*`, `layers.1` and `*.1.mlp` all work,
and none of them matches `layers.10`. A pattern that matches nothing is an error: a typo must not prune less than was asked for.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from sparsec.arguments import checked
from sparsec.errors import SelectionError, WeightError, some
from sparsec.formats.csr import VALUE_DTYPES
from sparsec.ir.facts import GROUPS, Weight
from sparsec.ir.graph import Graph

DEFAULT_TARGETS: tuple[str, ...] = ("attention", "mlp", "experts")


@checked
def select_weights(graph: Graph, targets: Sequence[str] | None, ignore: Sequence[str]) -> list[Weight]:
    """Weights of linear products that a pass works on, in the order of the table.

    targets: patterns, or None for attention, MLP and experts. Raises SelectionError for a pattern that matches nothing, or nothing
    that could be pruned.
    """
    for pattern in ignore:
        _matches(graph, pattern, "ignore")
    ignored = {w.name for pattern in ignore for w in graph.weights.values() if matches(graph, w, pattern)}
    if targets is None:
        chosen = {w.name for w in graph.weights.values() if w.group in DEFAULT_TARGETS and graph.prunable(w.name)}
    else:
        chosen = set()
        for pattern in targets:
            found = _matches(graph, pattern, "targets")
            prunable = [w for w in found if graph.prunable(w.name)]
            if not prunable:
                raise SelectionError(
                    f"targets: {pattern!r} matches {some(w.name for w in found)}, but no weight of a linear layer"
                    f"{_why(found)}; linear layers are in the groups {_groups(graph)}"
                )
            chosen.update(w.name for w in prunable)
    if not chosen - ignored:
        raise SelectionError(
            f"{'targets: ' + ', '.join(targets) if targets else 'the default targets, ' + ' and '.join(DEFAULT_TARGETS)}"
            f"{', less what ignore takes away,' if chosen else ''} leave no linear layer to work on; linear layers are in "
            f"the groups {_groups(graph)}; name others with targets=..."
        )
    selected = [w for w in graph.weights.values() if w.name in chosen - ignored]
    for weight in selected:
        check_dtype(weight)
    return selected


def check_dtype(weight: Weight) -> None:
    """Raises WeightError for a dtype whose values cannot be masked and packed."""
    if weight.dtype not in VALUE_DTYPES:
        served = ", ".join(str(d).removeprefix("torch.") for d in VALUE_DTYPES)
        raise WeightError(
            f"{weight.name}: is {weight.dtype}, which no format or kernel serves; those serve {served}; convert the model first, "
            f"for instance with model.float(), or leave it out with ignore=({(weight.owners or (weight.name,))[0]!r},)"
        )


def matches(graph: Graph, weight: Weight, pattern: str) -> bool:
    """Whether a pattern names this weight, by group or by path."""
    if pattern in GROUPS:
        return pattern == weight.group or any(op.group == pattern for op in graph.ops_of(weight.name))
    return any(path_matches(path, pattern) for path in (weight.name, *weight.aliases, *weight.owners))


def path_matches(path: str, pattern: str) -> bool:
    """Whether a glob names a path, one of its ends, or a module around it."""
    parts = path.split(".")
    starts = range(len(parts))
    ends = range(1, len(parts) + 1)
    return any(fnmatchcase(".".join(parts[i:j]), pattern) for i in starts for j in ends if i < j)


def _matches(graph: Graph, pattern: str, option: str) -> list[Weight]:
    found = [w for w in graph.weights.values() if matches(graph, w, pattern)]
    if not found and pattern in GROUPS:
        there = ", ".join(dict.fromkeys(w.group for w in graph.weights.values()))
        raise SelectionError(f"{option}: no weight of this model is in the group {pattern!r}; there are {there}")
    if not found:
        paths = list(dict.fromkeys(o for w in graph.weights.values() for o in (w.owners or (w.name,))))
        words = [*GROUPS, *paths, *dict.fromkeys(p.rpartition(".")[2] for p in paths)]
        near = difflib.get_close_matches(pattern, words, n=4, cutoff=0.5) or paths[:3]
        raise SelectionError(
            f"{option}: {pattern!r} matches nothing in this model; near names: {', '.join(map(repr, near))}; "
            f"groups: {', '.join(GROUPS)}"
        )
    return found


def _why(found: Iterable[Weight]) -> str:
    kinds = sorted({w.kind for w in found})
    return f" (found: {', '.join(kinds)})"


def _groups(graph: Graph) -> str:
    groups = dict.fromkeys(w.group for w in graph.weights.values() if graph.prunable(w.name))
    return ", ".join(groups) or "none: the model has no linear layer"
