"""From a model to a Graph: export it, tidy the dataflow, give nodes readable names, and write down what each op and weight is.

The graph returns what the model returns (`graph.run(input_ids=..., attention_mask=...).logits` for a causal LM), takes the tensors
of the example call by name, and shares its parameters with the model, which is left as it was. sparsec/ir/export.py has the ladder.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsec.arguments import checked_but
from sparsec.errors import TraceError
from sparsec.ir.example_inputs import ExampleInputs, example_call
from sparsec.ir.export import Exported, export
from sparsec.ir.facts import Op, Weight
from sparsec.ir.graph import Graph, fetch
from sparsec.ir.groups import Structure
from sparsec.ir.isolation import hooked, under_autocast
from sparsec.ir.names import node_names
from sparsec.ir.output import OutputCodeGen
from sparsec.ir.recognise import LINEAR_KINDS, as_one_layout, op_name, read, transposed_weight, without_views
from sparsec.ir.shapes import shape_of, size_names
from sparsec.ir.tables import Findings, naming_path, ops_table, weights_table

_ASSERTIONS = frozenset(
    {
        "_assert_tensor_metadata",
        "_assert_scalar",
        "_assert_async",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
    }
)


@checked_but("example_inputs")
def trace(model: nn.Module, example_inputs: ExampleInputs | None = None) -> Graph:
    """Traces a model, in eval mode.

    `example_inputs`: a tensor, a tuple of tensors, or a dict by argument name; not needed for a Hugging Face model that takes
    `input_ids`. Raises TraceError with the reason of each rung when the model cannot be traced, and on encoder-decoder models.
    """
    _check_names(model)
    call = example_call(model, example_inputs)
    exported = export(model, call)
    parameters = _tidy(exported.module, model)
    findings = _findings(model, exported, parameters)
    graph, new = _rebuild(exported, call.tensors, findings)
    ops = ops_table(findings, {old: node.name for old, node in new.items()})
    weights, notes = weights_table(findings)
    if model.training:
        notes.append(
            f"{type(model).__name__} was in train mode and is traced in eval mode: dropout does nothing in the graph"
        )
    if under_autocast(model) is not None:
        notes.append(
            "accelerate's autocast around the model is no part of the graph; it stays in the compiled model and runs there"
        )
    notes += [*_hooks_note(model), *_unread_note(weights), *_experts_note(weights, ops)]
    inputs = tuple(name for name in exported.inputs if name is not None)
    example = tuple(call.tensors[name] for name in inputs)
    module = _module(model, exported.module, graph)
    return Graph(module, weights, ops, inputs, exported.rung, notes=notes, example=example)


def _check_names(model: nn.Module) -> None:
    """A part that cannot be got by its name is nobody's to swap or to save: `self.forward = nn.Linear(...)` makes one."""
    for path, module in model.named_modules():
        for name, part in (*module._modules.items(), *module._parameters.items(), *module._buffers.items()):
            if part is not None and getattr(module, name, None) is not part:
                raise TraceError(
                    f"{path or type(model).__name__}: its part {name!r} cannot be read by that name, which stands for something "
                    f"else in {type(module).__name__}; give the part another name"
                )


def _hooks_note(model: nn.Module) -> list[str]:
    """What a hook changes in the outputs of its module is no part of the graph; that must not go unsaid."""
    found = hooked(model)
    if not found:
        return []
    named = ", ".join(path or "the model itself" for path in list(found)[:3]) + (", ..." if len(found) > 3 else "")
    return [
        f"{sum(found.values())} forward hooks ({named}) are no part of the graph, which does not know what they change; they "
        "stay in the compiled model and run there"
    ]


def _unread_note(weights: dict[str, Weight]) -> list[str]:
    """A linear that the example call does not reach is not pruned: a decoder's cross-attention without an encoder's states, say."""
    unread = [w.name for w in weights.values() if w.kind == "linear" and not w.owners]
    if not unread:
        return []
    named = ", ".join(unread[:3]) + (", ..." if len(unread) > 3 else "")
    return [
        f"{len(unread)} linear weights ({named}) stay dense: the traced call does not reach them; give example_inputs that do"
    ]


def _experts_note(weights: dict[str, Weight], ops: dict[str, Op]) -> list[str]:
    """Most of an MoE model's weights are fused experts; where they cannot be pruned, that must not go unsaid."""
    unknown = {op.weights[0] for op in ops.values() if op.kind == "grouped_linear" and op.weights and not op.routed}
    fused = [w for w in weights.values() if w.kind == "experts" and w.name in unknown]
    if not fused:
        return []
    share = sum(w.numel for w in fused) / sum(w.numel for w in weights.values())
    which = f"{100 * share:.0f} % of all parameters; {fused[0].name}, ..."
    return [
        f"{len(fused)} fused expert weights ({which}) stay dense: how their product sorts rows by expert is not recognised"
    ]


def _tidy(module: fx.GraphModule, model: nn.Module) -> dict[fx.Node, str]:
    """Removes assertions and dead code; reads every tensor by one node under its first name. Returns the nodes of parameters."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and op_name(node)[1] in _ASSERTIONS and not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    first = {id(t): name for name, t in [*model.named_buffers(), *model.named_parameters()]}
    kept: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        if not isinstance(attrgetter(str(node.target))(module), Tensor):
            block = next(iter(node.users)).target
            raise TraceError(
                f"{type(model).__name__}: its forward holds code in a block of its own ({block}, such as torch.cond), which has "
                "no place in a graph; compile the parts around it by themselves"
            )
        node.target = first.get(id(fetch(module, str(node.target))), node.target)
        if kept.setdefault(node.target, node) is not node:
            node.replace_all_uses_with(kept[node.target])
            graph.erase_node(node)
    names = {name for name, _ in model.named_parameters()}
    parameters = {node: name for name, node in kept.items() if name in names}
    _write_linears(graph, frozenset(parameters))
    return parameters


def _write_linears(graph: fx.Graph, parameters: frozenset[fx.Node]) -> None:
    """Writes `x @ weight.T` as the linear that it is (Falcon's layers, heads that share the embedding by hand)."""
    for node in list(graph.nodes):
        if node.op == "call_function" and (weight := transposed_weight(node, parameters)) is not None:
            with graph.inserting_after(node):
                linear = graph.call_function(torch.ops.aten.linear.default, (node.args[0], weight))
            linear.meta = node.meta
            node.replace_all_uses_with(linear)
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _findings(model: nn.Module, exported: Exported, parameters: dict[fx.Node, str]) -> Findings:
    """Recognises every node."""
    nodes = list(exported.module.graph.nodes)
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = [node for node in nodes if node.op == "call_function"]
    found = [r for node in calls if (r := read(node, frozenset(parameters), modules)) is not None]
    reads = as_one_layout(without_views(found))
    structure = Structure(model, [r.owner for r in reads if r.kind in LINEAR_KINDS])
    placeholders = {
        name: n for name, n in zip(exported.inputs, (n for n in nodes if n.op == "placeholder"), strict=True) if name
    }
    symbols = size_names(placeholders, exported.dims)
    shapes = {node: shape_of(node.meta.get("val"), symbols) for node in nodes}
    return Findings(model, structure, reads, parameters, shapes)


def _rebuild(
    exported: Exported, tensors: dict[str, Tensor], findings: Findings
) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A fresh graph with inputs first, then weights, then calls, under readable names and without meta; new nodes by old ones."""
    old = exported.module.graph
    placeholders = [node for node in old.nodes if node.op == "placeholder"]
    named = {r.node.name: naming_path(r, findings) for r in findings.reads}
    names = node_names(named, frozenset(node.name for node in old.nodes if node.name not in named))
    graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
    for name, node in zip(exported.inputs, placeholders, strict=True):
        if name is None:
            assert not node.users, node.name  # a constant argument: export has written its value where it is used
            continue
        new[node] = graph.create_node("placeholder", name, name=name)
    for name, node in zip(exported.inputs, placeholders, strict=True):
        expected = exported.fixed_sizes(name, tensors[name]) if name is not None else None
        if name is not None and expected is not None:
            new[node] = graph.call_function(expect_shape, (new[node], name, expected))
    for node in old.nodes:
        if node.op == "get_attr":
            new[node] = graph.create_node("get_attr", node.target, name=node.name)
    for node in old.nodes:
        if node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: new[n])
            new[node] = graph.create_node(node.op, node.target, args, kwargs, name=names.get(node.name, node.name))
        elif node.op == "output":
            graph.output(fx.map_arg(node.args[0], lambda n: new[n]))
        elif node.op not in ("placeholder", "get_attr"):
            raise TraceError(
                f"{type(findings.model).__name__}: node {node.name} is a {node.op} of {node.target}, which has no place in a graph"
            )
    graph.set_codegen(OutputCodeGen(exported.output))
    return graph, new


def _module(model: nn.Module, exported: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """The graph with the tensors it reads, and with the parameters that it does not read, all under the model's names."""
    held: dict[str, Any] = dict(model.named_parameters())
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in held:
            held[node.target] = fetch(exported, node.target)
    module = fx.GraphModule(
        {n.target: held[n.target] for n in graph.nodes if n.op == "get_attr"}, graph, type(model).__name__
    )
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        parent: nn.Module = module
        for part in owner.split(".") if owner else []:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.register_parameter(leaf, parameter)
    return module.eval()


def expect_shape(tensor: Tensor, name: str, sizes: tuple[int | None, ...]) -> Tensor:
    """Part of graphs whose inputs have sizes that are fixed: hands the input on, or raises TraceError where a size differs."""
    fits = tensor.dim() == len(sizes) and all(
        want in (None, have) for want, have in zip(sizes, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in sizes)
        raise TraceError(
            f"input {name!r}: the graph was traced for shape [{wanted}], got {list(tensor.shape)}; trace again with such inputs"
        )
    return tensor
