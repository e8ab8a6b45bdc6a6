"""The IR as text: one line per op, stable, readable, the same on every machine.

    %mlp_up_proj_3 = linear(%norm_3) @model.layers.3.mlp.up_proj  # f32 [1536x576] csr16[csr_cpu] 50.0% zero, ...

What stands before the `#` is the dataflow; behind it are the facts known so far.
"""

from __future__ import annotations

import difflib
import operator
from typing import Any

import torch
from torch import fx

from sparsec import private
from sparsec.arguments import checked
from sparsec.ir.facts import MATRIX_KINDS, Op, Weight
from sparsec.ir.graph import Graph

_DTYPES = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float64: "f64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "bool",
}


@checked
def graph_text(graph: Graph) -> str:
    """The whole graph, a line per op, ending in a newline."""
    return "".join(f"{_printable(line)}\n" for node in graph.module.graph.nodes if (line := _line(graph, node)))


def diff_text(old: str, new: str) -> str:
    """Only the lines that differ, as `-` and `+`; "" where none does."""
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), lineterm="", n=0)
    return "".join(f"{line}\n" for line in lines if not line.startswith(("---", "+++", "@@")))


def dtype_text(dtype: torch.dtype) -> str:
    """`f32`, `bf16`, ..."""
    return _DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def amount(value: float, unit: str) -> str:
    """`1.83 MB` from 10,000 up, `128 B` below."""
    return f"{value / 1e6:.2f} M{unit}" if value >= 1e4 else f"{value:.0f} {unit}"


def _printable(line: str) -> str:
    """The names of modules may hold anything, line ends too."""
    return line if line.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def _line(graph: Graph, node: fx.Node) -> str:
    match node.op:
        case "get_attr":
            return ""
        case "placeholder":
            return f"%{node.name} = input"
        case "output":
            return f"return {_argument(node.args[0])}"
    if _fused(graph, node) is not None:
        return ""  # one of the results on the fused product's line
    op = graph.ops.get(node.name)
    hidden = _held_tensors(graph, op)
    arguments = [
        _argument(a) for a in node.args if not (isinstance(a, fx.Node) and a.op == "get_attr" and a.target in hidden)
    ]
    if op is not None and (op.kind in MATRIX_KINDS or _packed(graph, op)):
        # the bias and the sizes are the owner's
        arguments = [_argument(a) for a in node.args if isinstance(a, fx.Node) and a.op != "get_attr"]
    arguments += [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
    owner = f" @{_owners_text(op)}" if op is not None and op.owner else ""
    facts = _facts_text(graph, op) if op is not None else ""
    return f"{_results(graph, node)} = {_target(node.target)}({', '.join(arguments)}){owner}" + (
        f"  # {facts}" if facts else ""
    )


def _fused(graph: Graph, node: fx.Node) -> Op | None:
    """The fused product that this node is a result of."""
    source = node.args[0] if node.target is operator.getitem else None
    op = graph.ops.get(source.name) if isinstance(source, fx.Node) else None
    return op if op is not None and op.members else None


def _results(graph: Graph, node: fx.Node) -> str:
    """`%name`; all results of a fused product, `_` for one that nobody reads."""
    op = graph.ops.get(node.name)
    if op is None or not op.members:
        return f"%{node.name}"
    names = {user.args[1]: f"%{user.name}" for user in node.users if user.target is operator.getitem}
    return ", ".join(names.get(i, "_") for i in range(len(op.members)))


def _owners_text(op: Op) -> str:
    """The owner's path; of a fused product all, later ones without what they share with the first."""
    first, *rest = op.owners
    beside = first.rpartition(".")[0] + "."
    return " + ".join((first, *(path.removeprefix(beside) for path in rest)))


def _facts_text(graph: Graph, op: Op) -> str:
    if op.members:
        return _fused_text(graph, op)
    weight = graph.weights.get(op.weights[0]) if op.weights else None
    parts = [_weight_text(weight, op)] if weight is not None else []
    flops = op.flops if op.flops is not None else op.flops_dense
    if flops:
        parts.append(f"{amount(flops, 'FLOP')}/token")
    if weight is not None:
        if weight.packed is not None:
            parts.append(f"{amount(weight.nbytes, 'B')} (dense {amount(weight.nbytes_dense, 'B')})")
        else:
            parts.append(amount(weight.nbytes, "B"))
        if weight.reason:
            parts.append(f"dense: {weight.reason}")
    return ", ".join(parts)


def _fused_text(graph: Graph, op: Op) -> str:
    """What is known of each matrix, then the sums."""
    weights = [graph.weights[name] for name in op.members if name in graph.weights]
    parts = [" + ".join(_weight_text(weight, op) for weight in weights)] if weights else []
    flops = op.flops if op.flops is not None else op.flops_dense
    if flops:
        parts.append(f"{amount(flops, 'FLOP')}/token")
    if weights:
        held = amount(sum(w.nbytes for w in weights), "B")
        dense = amount(sum(w.nbytes_dense for w in weights), "B")
        parts.append(f"{held} (dense {dense})" if any(w.packed is not None for w in weights) else held)
    parts += [f"{w.name} dense: {w.reason}" for w in weights if w.reason]
    return ", ".join(parts)


def _weight_text(weight: Weight, op: Op) -> str:
    text = f"{dtype_text(weight.dtype)} [{'x'.join(map(str, weight.shape))}]"
    if op.kind not in MATRIX_KINDS and weight.packed is None:
        return text
    text += f" {weight.format}"
    if kernel := op.kernel_of(weight.name):
        text += f"[{kernel}]"
    if weight.mask is not None:
        text += f" {weight.pattern} mask" + (", frozen" if weight.frozen else "")
    if weight.rounded is not None:
        text += f" rounded to {weight.rounded.values}"
    if weight.sparsity is not None:
        text += f" {100 * weight.sparsity:.1f}% zero"
    return text


def _packed(graph: Graph, op: Op) -> bool:
    return any(name in graph.weights and graph.weights[name].packed is not None for name in op.matrices)


def _held_tensors(graph: Graph, op: Op | None) -> set[str]:
    return set(op.weights) if op is not None else set()


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return str(value.target) if value.op == "get_attr" else f"%{value.name}"
    if isinstance(value, list | tuple):
        inner = ", ".join(_argument(v) for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_argument(v)}" for k, v in value.items()) + "}"
    if isinstance(value, torch.dtype):
        return dtype_text(value)
    return str(value)


def _target(target: Any) -> str:
    if isinstance(target, private.OpOverload):
        return target._schema.name.partition("::")[2]
    return str(getattr(target, "__name__", target))
