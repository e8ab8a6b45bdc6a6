"""What must hold of every graph after every pass.

`problems` lists what is broken, in words; an empty list means that the graph is right.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.weak import TensorWeakRef

from sparsec import serial
from sparsec.errors import FormatError
from sparsec.formats.parts import unflatten
from sparsec.ir.facts import MATRIX_KINDS, Op, Weight
from sparsec.ir.graph import Graph, fetch
from sparsec.private import pytree


def problems(graph: Graph, recompute: bool = False) -> list[str]:
    """Broken invariants; with `recompute`, every fact that can be is also computed again."""
    found = [*_dataflow(graph), *_tables(graph)]
    if not found:  # what follows reads tensors through the tables
        for weight in graph.weights.values():
            found.extend(_weight(graph, weight))
            if recompute:
                found.extend(_facts(graph, weight))
        if recompute:
            for op in graph.ops.values():
                found.extend(_op_facts(graph, op))
    return found


class TensorState:
    """A tensor as it is now; equal to another of the same tensor in the same state. Keeps no tensor alive."""

    def __init__(self, tensor: Tensor) -> None:
        # Not its id, which another tensor may have once this one is gone.
        self._tensor = TensorWeakRef(tensor)
        self._state = (None if tensor.is_inference() else tensor._version, _pointer(tensor))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorState):
            return NotImplemented
        tensor = self._tensor()
        return tensor is not None and tensor is other._tensor() and self._state == other._state

    __hash__ = None  # type: ignore[assignment]


def snapshot(graph: Graph, contents: bool = False) -> tuple[Any, ...]:
    """Another than before when the dataflow, a mask or a stored tensor is; facts do not count. To be compared by ==.

    Tensors are told apart by identity and version, which `.data` can get around; with `contents` also by a hash of their values.
    """
    nodes = tuple((n.op, n.name, str(n.target), str(n.args), str(n.kwargs)) for n in graph.module.graph.nodes)
    held = [t for w in graph.weights.values() if w.packed is not None for t in w.packed.tensors().values()]
    masks = [w.mask for w in graph.weights.values() if w.mask is not None]
    tensors = [*graph.module.parameters(), *graph.module.buffers(), *held, *masks]
    hashes = tuple(map(_hash, tensors)) if contents else ()
    return nodes, tuple(map(TensorState, tensors)), hashes, tuple((w.name, w.frozen) for w in graph.weights.values())


def outputs_differ(before: Any, after: Any, exact: bool) -> str:
    """In words how two results differ, "" where they do not: not at all, or within what another order of summation explains.

    The second bound is for a whole model, whose depth amplifies rounding: 1000 eps of the dtype, relative to the largest
    output, at most a quarter.
    """
    old, new = _tensors(before), _tensors(after)
    if len(old) != len(new):
        return f"there are {len(new)} output tensors instead of {len(old)}"
    for i, (a, b) in enumerate(zip(old, new, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"output {i} is {b.dtype} {tuple(b.shape)} instead of {a.dtype} {tuple(a.shape)}"
        if not a.is_floating_point() or exact:
            if not torch.equal(torch.nan_to_num(a, nan=0.5), torch.nan_to_num(b, nan=0.5)) or not torch.equal(
                a.isnan(), b.isnan()
            ):
                return f"output {i} is not bit-identical"
            continue
        finite = a.isfinite() & b.isfinite()
        if not torch.equal(a[~finite].isnan(), b[~finite].isnan()):
            return f"output {i} has NaN or inf in other places"
        if finite.any():
            scale = float(a[finite].abs().max())
            gap = float((a[finite].double() - b[finite].double()).abs().max())
            bound = min(1000 * torch.finfo(a.dtype).eps, 0.25) * scale
            if gap > bound:
                return f"output {i} is off by {gap:.3g}, above {bound:.3g}"
    return ""


def _dataflow(graph: Graph) -> Iterator[str]:
    try:
        graph.module.graph.lint()
    except RuntimeError as error:
        yield f"torch.fx: {error}"
    for node in graph.module.graph.nodes:
        if node.op == "get_attr":
            try:
                fetch(graph.module, node.target)
            except AttributeError:
                yield f"%{node.name} reads {node.target}, which the module does not hold"
            except AssertionError:
                pass  # a submodule (a higher-order op's body), not a tensor


def _tables(graph: Graph) -> Iterator[str]:
    nodes = {n.name: n for n in graph.module.graph.nodes}
    for name, op in graph.ops.items():
        if name != op.node or name not in nodes:
            yield f"ops: {name!r} is not a node of the graph"
            continue
        for read in op.weights:
            if read not in graph.weights:
                yield f"%{name} names the weight {read!r}, which is not in the table"
        if op.kind == "fused_linear" and name in nodes:
            yield from _fused(graph, op, nodes[name])
    for name, weight in graph.weights.items():
        if name != weight.name:
            yield f"weights: the record of {name!r} says {weight.name!r}"


def _fused(graph: Graph, op: Op, node: fx.Node) -> Iterator[str]:
    """The parts of a fused product against the records of its members."""
    try:
        parts = unflatten(node.args[1], node.args[2])  # type: ignore[arg-type]
    except FormatError as error:
        yield f"%{op.node}: {error}"
        return
    if not len(parts) == len(op.members) == len(op.member_kernels):
        yield f"%{op.node} has {len(parts)} parts, but {len(op.members)} members and {len(op.member_kernels)} kernels"
        return
    for name, part in zip(op.members, parts, strict=True):
        weight = graph.weights.get(name)
        if weight is None:  # a compiled model that is traced again has no record of what is packed
            continue
        held = weight.packed.format if weight.packed is not None else "dense"
        if part.format != held:
            yield f"%{op.node}: the part of {name} is {part.format}, but the weight is {held}"
        elif weight.packed is None and getattr(part.tensors[0], "target", None) != name:
            yield f"%{op.node}: the part of {name} reads {part.tensors[0]}"


def _weight(graph: Graph, weight: Weight) -> Iterator[str]:
    name = weight.name
    if weight.packed is not None:
        if weight.mask is not None:
            yield f"{name}: packed, but it still holds a mask"
        if weight.packed.shape != weight.matrix_shape:
            yield f"{name}: packed as {weight.packed.shape}, but the matrix is {weight.matrix_shape}"
        if weight.nnz != weight.packed.nnz:
            yield f"{name}: nnz is {weight.nnz}, but the format holds {weight.packed.nnz}"
        try:
            fetch(graph.module, name)
        except AttributeError:
            return
        yield f"{name}: packed, but the graph still holds the dense tensor"
        return
    try:
        tensor = graph.tensor(name)
    except AttributeError:
        yield f"{name}: the graph does not hold it"
        return
    if tuple(tensor.shape) != weight.shape or tensor.dtype != weight.dtype:
        yield f"{name}: {tensor.dtype} {tuple(tensor.shape)}, but the table says {weight.dtype} {weight.shape}"
    if weight.mask is not None:
        if weight.mask.dtype != torch.bool or weight.mask.shape != tensor.shape:
            yield f"{name}: the mask is {weight.mask.dtype} {tuple(weight.mask.shape)}, not bool {tuple(tensor.shape)}"
        if weight.pattern is None:
            yield f"{name}: a mask without a pattern"
        if "frozen" in graph.facts and not weight.frozen:
            yield f"{name}: 'frozen' is said to hold, but its mask is not frozen"
    elif weight.frozen:
        yield f"{name}: frozen without a mask"


def _facts(graph: Graph, weight: Weight) -> Iterator[str]:
    if "sparsity" in graph.facts and weight.nnz is None:
        yield f"{weight.name}: 'sparsity' is said to hold, but nobody counted"
    if weight.packed is not None:
        try:
            weight.packed.check()
        except FormatError as error:
            yield f"{weight.name}: {error}"
        return
    if weight.mask is not None:
        kept = graph.kept(weight.name)
        if weight.nnz is not None and weight.nnz != kept:
            yield f"{weight.name}: nnz is {weight.nnz}, but {kept} are kept"
        if weight.frozen and kept != serial.count(weight.mask):
            yield f"{weight.name}: frozen, but a masked entry is not zero"
    elif weight.nnz is not None and weight.nnz != weight.numel:
        yield f"{weight.name}: nnz is {weight.nnz} of {weight.numel} without a mask"


def _op_facts(graph: Graph, op: Op) -> Iterator[str]:
    weights = [graph.weights[name] for name in op.matrices if name in graph.weights]
    if not weights or len(weights) < len(op.matrices) or op.kind not in MATRIX_KINDS:
        return
    kept, numel = sum(graph.kept(w.name) for w in weights), sum(w.numel for w in weights)
    if op.flops_dense not in (None, 2 * numel) or op.flops not in (None, 2 * kept):
        yield f"%{op.node}: FLOPs are {op.flops} of {op.flops_dense}, but 2 per weight are {2 * kept} of {2 * numel}"
    if "flops" in graph.facts and op.flops is None:
        yield f"%{op.node}: 'flops' is said to hold, but nobody counted"


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _hash(tensor: Tensor) -> int:
    return int(torch.hash_tensor(tensor.detach()).view(torch.int64)) if tensor.numel() else 0


def _pointer(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.device.type in ("cpu", "cuda") else 0
