"""The two tables beside the dataflow: what each op is, and what each stored weight is.

The table of ops holds every product, norm and reader of parameters. The tensors that an attention or a plain matrix product
multiplies, and weights that are computed, are in it too (as `other`), so that the shapes of all operands are known without
looking at the model again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx, nn

from sparsec.ir.experts import grouped_product
from sparsec.ir.facts import Dim, GroupName, Op, Weight, WeightKind
from sparsec.ir.groups import Structure
from sparsec.ir.recognise import Recognised, op_name, owner_of, sources

_LEADING: tuple[WeightKind, ...] = ("conv1d", "embedding", "linear", "experts", "bias", "other")
"""The kind of a weight that is read in several ways is the first of these: a tied head is an embedding."""


@dataclass(frozen=True, eq=False)
class Findings:
    """What was recognised in an exported graph."""

    model: nn.Module
    structure: Structure
    reads: tuple[Recognised, ...]  # in order of execution
    parameters: Mapping[fx.Node, str]  # get_attr nodes, and the first names of what they get
    shapes: Mapping[fx.Node, tuple[Dim, ...] | None]

    def names(self, r: Recognised) -> tuple[str, ...]:
        """First names of the parameters that an op reads, the matrix first; none where the matrix is not a stored parameter."""
        if r.kind == "fused_linear":
            biases = [p for p in r.parameters if p not in r.members]
            known = all(p in self.parameters for p in r.members)
            return tuple(self.parameters[p] for p in (*r.members, *biases)) if known else ()
        matrix_kind = r.kind in ("linear", "sparse_linear", "embedding")
        return () if matrix_kind and r.matrix is None else tuple(self.parameters[p] for p in r.parameters)

    def members(self, r: Recognised) -> tuple[str, ...]:
        """Names of the matrices of a fused product; a packed one goes by the name that it had when it was dense."""
        return tuple(self.parameters.get(p) or f"{str(p.target).rpartition('.')[0]}.weight" for p in r.members)

    def owner_of(self, r: Recognised, name: str) -> str:
        """The path of the module that calls a product with this parameter."""
        return name.rpartition(".")[0] if r.kind == "fused_linear" else self.owner(r)

    def owner(self, r: Recognised) -> str:
        """The first path of the module that makes the call."""
        return self.structure.canonical(r.owner)


def naming_path(r: Recognised, findings: Findings) -> str:
    """The path that names a node: its parameter where the owner calls it by itself (`mlp.experts.down_proj`), else its owner."""
    owner = findings.owner(r)
    names = findings.names(r)
    inside = [n for n in names[:1] if n.startswith(owner + ".") and not n.endswith((".weight", ".bias"))]
    path = inside[0] if inside and r.kind != "norm" else owner
    if not names and r.kind in ("attention", "matmul"):
        path = f"{owner}.{'sdpa' if r.kind == 'attention' else 'matmul'}" if owner else r.kind
    return path or r.kind


def ops_table(findings: Findings, names: Mapping[fx.Node, str]) -> dict[str, Op]:
    """Ops by node name, in order of execution. `names` are the nodes' names in the graph."""
    experts = _expert_counts(findings)
    fused = {r.node for r in findings.reads if r.kind == "fused_linear"}
    found = {r.node: _op(r, findings, names, experts) for r in findings.reads}
    for r in findings.reads:
        operands = (
            r.node.all_input_nodes[:3] if r.kind in ("attention", "matmul") else [r.computed] if r.computed else []
        )
        for node in operands:
            if node.op == "call_function" and node not in found and not fused.intersection(node.all_input_nodes[:1]):
                owner = findings.structure.canonical(owner_of(node, findings.structure.modules))
                found[node] = Op(
                    names[node], "other", owner, findings.structure.group(owner), (), findings.shapes[node]
                )
    order = {node: i for i, node in enumerate(findings.shapes)}
    return {found[node].node: found[node] for node in sorted(found, key=order.__getitem__)}


def _op(r: Recognised, findings: Findings, names: Mapping[fx.Node, str], experts: dict[str, int]) -> Op:
    owner = findings.owner(r)
    group, members = _group(r, findings, experts), findings.members(r)
    block = findings.structure.block(owner)
    op = Op(names[r.node], r.kind, owner, group, findings.names(r), findings.shapes[r.node], block)
    routed = r.kind == "grouped_linear" and r.matrix is not None and grouped_product(r.node) is not None
    return replace(op, members=members, member_kernels=(None,) * len(members), routed=routed)


def _group(r: Recognised, findings: Findings, experts: dict[str, int]) -> GroupName:
    owner = findings.owner(r)
    if any(findings.structure.adapter(name) for name in findings.names(r)[:1]):
        return "adapter"
    if r.kind == "embedding":
        return "embedding"
    if r.kind == "norm":
        return "norm"
    if r.kind == "grouped_linear":
        return "experts"
    group = findings.structure.group(owner)
    shape = findings.shapes[r.node]
    if (
        r.kind == "linear"
        and group == "mlp"
        and shape
        and shape[-1] in (1, findings.structure.experts_beside(owner, experts))
    ):
        return "router" if findings.structure.experts_beside(owner, experts) is not None else group
    return group


def _expert_counts(findings: Findings) -> dict[str, int]:
    """Number of experts by the path of the module that holds them stacked."""
    counts: dict[str, int] = {}
    for r in findings.reads:
        if r.kind == "grouped_linear" and r.matrix is not None:
            counts[findings.owner(r)] = int(r.matrix.meta["val"].shape[0])
    return counts


def weights_table(findings: Findings) -> tuple[dict[str, Weight], list[str]]:
    """Every parameter of the model by first name, in the model's order; and notes on what was recognised but left alone."""
    model = findings.model
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    readers: dict[str, list[Recognised]] = {}
    for r in findings.reads:
        for parameter_node in r.parameters:
            readers.setdefault(findings.parameters[parameter_node], []).append(r)
    computed, notes = _computed(findings)
    experts = _expert_counts(findings)
    table: dict[str, Weight] = {}
    for parameter in model.parameters():
        first, *aliases = names[id(parameter)]
        weight = Weight(first, tuple(aliases), "other", "other", tuple(parameter.shape), parameter.dtype)
        reads = readers.get(first, [])
        if reads:
            kind, reason = _kind(first, reads, findings)
            leading = next((r for r in reads if r.kind == "embedding"), reads[0])
            group = _group(leading, findings, experts)
            owners = tuple(dict.fromkeys(findings.owner_of(r, first) for r in reads))
            transposed = kind == "conv1d" or (kind == "experts" and any(_transposed(r) for r in reads))
            weight = replace(weight, kind=kind, group=group, owners=owners, reason=reason, transposed=transposed)
            if reason is not None:
                notes.append(f"{first}: left dense, {reason}")
        else:
            group = findings.structure.group(first.rpartition(".")[0])
            weight = replace(weight, kind=_unread_kind(model, first), group=group)
        if first in computed:
            weight = replace(
                weight,
                group=_group(computed[first], findings, experts),
                reason="the weight is computed from it at every call",
            )
        if findings.structure.adapter(first):
            weight = replace(weight, group="adapter")
        table[first] = weight
    return table, notes


def _kind(name: str, reads: list[Recognised], findings: Findings) -> tuple[WeightKind, str | None]:
    """The kind of a weight that is read; and where a matrix is also read by something else than its products, who that is."""
    kinds: dict[WeightKind, list[str]] = {}
    for r in reads:
        kind: WeightKind = "bias" if name.rpartition(".")[2].endswith("bias") else "other"
        if name in findings.members(r):
            kind = "linear"
        elif r.matrix is not None and findings.parameters[r.matrix] == name:
            match r.kind:
                case "linear" | "conv1d" | "embedding":
                    kind = r.kind
                case "grouped_linear":
                    kind = "experts"
        kinds.setdefault(kind, []).append(r.node.name)
    leading = next(k for k in _LEADING if k in kinds)
    others = kinds.get("other", [])
    if leading in ("linear", "conv1d") and others:
        return leading, f"it is also read as a plain tensor ({', '.join(others)})"
    return leading, None


def _transposed(r: Recognised) -> bool:
    """Whether the experts that it multiplies by are stored as [experts, in, out]."""
    product = grouped_product(r.node)
    return product is not None and product.transposed


def _unread_kind(model: nn.Module, name: str) -> WeightKind:
    """The kind of a parameter that no op reads, by the class of its module."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf == "weight" and isinstance(module, nn.Linear):
        return "linear"
    if leaf == "weight" and isinstance(module, nn.Embedding):
        return "embedding"
    return "bias" if leaf.endswith("bias") else "other"


def _computed(findings: Findings) -> tuple[dict[str, Recognised], list[str]]:
    """Parameters that weights are computed from, with the product that uses them; and a note for each such product."""
    found: dict[str, Recognised] = {}
    notes: list[str] = []
    for r in findings.reads:
        if r.computed is None:
            continue
        made_from = [findings.parameters[p] for p in sources(r.computed, frozenset(findings.parameters))]
        owner = findings.owner(r) or type(findings.model).__name__
        if r.computed.op == "get_attr":
            notes.append(f"{owner}: its weight {r.computed.target} is a buffer, not a parameter; left dense")
            continue
        found |= {name: r for name in made_from if name.startswith(owner + ".")}
        if op_name(r.computed)[1] in ("to", "_to_copy") and len(made_from) == 1:
            notes.append(
                f"{owner}: its weight is cast to another type at every call, by torch.autocast or .to() inside of forward, so "
                "that no product reads the stored matrix; take that out of forward, and run the compiled model under "
                "torch.autocast instead"
            )
            continue
        notes.append(
            f"{owner}: its weight is computed at every call from {', '.join(made_from) or 'its inputs'}, "
            f"so there is no stored matrix to prune; "
            f"make it plain first: {_plain_again(made_from)}"
        )
    return found, list(dict.fromkeys(notes))


def _plain_again(made_from: Sequence[str]) -> str:
    """The function of torch that makes a computed weight a stored one, by the names of what it is computed from."""
    leaves = [name.rpartition(".")[2] for name in made_from]
    if any("parametrizations." in name for name in made_from):
        return "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')"
    if any(leaf.endswith(("_g", "_v")) for leaf in leaves):
        return "torch.nn.utils.remove_weight_norm(module)"
    if any(leaf.endswith("_orig") for leaf in leaves):
        return "torch.nn.utils.prune.remove(module, 'weight'), or torch.nn.utils.remove_spectral_norm(module)"
    return "let forward multiply by a Parameter of its own"
