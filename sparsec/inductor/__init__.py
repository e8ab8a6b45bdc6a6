"""The backend "sparsec" of torch.compile: inductor, with as few calls as there can be around products, past autograd.

`torch.compile(model, backend="sparsec")` takes what inductor takes (mode=, options=, dynamic=). Products that read the same value
become one call; where there are few rows, so do all products between two attentions with the norms and activations between them
(chains.py), and attention of one query per head reads its cache once (attention.py).

In the compiled graph nothing is written in place, so that products of the same node are products of the same value, whatever
modules or hooks they came from. Autograd is done with such a graph, and its operators need not ask again whether gradients are
wanted. Under inductor itself every product stays a call of its own: as right, and slower where layers are small.
"""

from __future__ import annotations

import operator
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from sparsec import kernels, private
from sparsec.errors import CompileError, KernelError
from sparsec.formats import parts
from sparsec.formats.parts import DENSE, Part, flatten, in_library, tensor_count
from sparsec.inductor import attention, chains
from sparsec.inductor.looked import Matrices
from sparsec.inductor.names import CustomGraphPass, InductorError, compile_fx, get_hash_for_files, list_mode_options
from sparsec.kernels.attention import NAME as ATTENTION
from sparsec.kernels.chain import NAME as CHAIN
from sparsec.kernels.dense import dense_linear
from sparsec.kernels.derivatives import transformed
from sparsec.kernels.fused import inference_linear, inference_single
from sparsec.kernels.library.loader import has_native
from sparsec.kernels.ops import OPERATORS
from sparsec.kernels.registry import foreign, others
from sparsec.private import OpOverload

SLOT = "post_grad_custom_pre_pass"
_FORMATS: dict[Any, str] = {
    dense_linear: DENSE,
    **{op: name for name, op in OPERATORS.items() if in_library(name)},
}


def sparsec(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """What torch.compile calls. CompileError when the options take the place of this backend's own pass.

    A graph that cannot be compiled with that pass is left to inductor alone, and a RuntimeWarning says why.
    """
    if options and SLOT in options:
        raise CompileError(
            f'torch.compile(backend="sparsec"): the option {SLOT} is taken by sparsec itself; leave it out, or use '
            'backend="inductor"'
        )
    # Sizes are known by torch.compile's guards and the operators' own checks: asking again takes half a millisecond a token.
    patches = {"size_asserts": False, **(list_mode_options(mode) if mode else {}), **(options or {})}
    compiled: Callable[..., Any]
    try:
        compiled = compile_fx(module, example_inputs, config_patches={**patches, SLOT: FuseProducts()})
    except InductorError as error:
        # Where it is inductor that fails, it fails again, and that is what is raised.
        compiled = compile_fx(module, example_inputs, config_patches=patches)
        reason = str(error).partition("\n")[0]
        warnings.warn(
            'torch.compile(backend="sparsec") leaves a graph to inductor, as right and slower: its products and what stands '
            f"between them could not be made one call ({reason})",
            RuntimeWarning,
            stacklevel=2,
        )
    return _past_autograd(compiled, Matrices(module.graph))


def _past_autograd(compiled: Callable[..., Any], matrices: Matrices) -> Callable[..., Any]:
    """Where no gradient is wanted, the operators are not asked at every call. KernelError for derivatives that would be lost,
    FormatError for a packed matrix that was changed and is not valid."""

    def call(*args: Any) -> Any:
        if transformed():
            raise KernelError(
                'torch.compile(backend="sparsec"): a compiled graph has no forward-mode derivative and no transform of '
                "torch.func; differentiate the model itself, without torch.compile"
            )
        matrices.look(args)
        if torch.is_grad_enabled():
            return compiled(*args)
        with private.below_autograd():
            return compiled(*args)

    return call


class FuseProducts(CustomGraphPass):  # type: ignore[misc]
    """Makes one `inference_linear` of all calls of products with the same x, and weights that are there by the first.

    Then attention and chains, where the native kernels have been loaded: without them inductor's own are faster.
    """

    def __call__(self, graph: fx.Graph) -> None:
        order = {node: i for i, node in enumerate(graph.nodes)}
        readers: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            if _is_product(node):
                readers.setdefault(node.args[0], []).append(node)
        for nodes in readers.values():
            first = order[nodes[0]]
            # A stored tensor, as inductor's freezing leaves them, can be got anywhere.
            early = [n for n in nodes if all(a.op == "get_attr" or order[a] < first for a in n.all_input_nodes)]
            for members in (early, *[[n] for n in nodes if n not in early]):
                place = order[members[0]]
                order |= dict.fromkeys(_fuse(graph, members), place)
        if has_native(ATTENTION):
            attention.read_cache_once(graph)
        if has_native(CHAIN):
            chains.make_chains(graph)

    def uuid(self) -> Any:
        """For inductor's cache of compiled graphs."""
        files = [
            module.__file__
            for module in (sys.modules[__name__], attention, chains, kernels.chain, kernels.fused, parts)
        ]
        return get_hash_for_files(tuple(files)), has_native(ATTENTION), has_native(CHAIN), [k.name for k in others()]


def _is_product(node: fx.Node) -> bool:
    """Of a format that the native library alone computes."""
    name = _FORMATS.get(node.target) if node.op == "call_function" and not node.kwargs else None
    return name is not None and not foreign(name, "cpu")


def _fuse(graph: fx.Graph, members: Sequence[fx.Node]) -> list[fx.Node]:
    """The members' results, each in its member's place."""
    x = members[0].args[0]
    tensors, layout = flatten([_part(node) for node in members])
    for node in tensors:
        if node.op == "get_attr":
            members[0].prepend(node)
    with graph.inserting_before(members[0]):
        if len(members) == 1:
            results = [graph.call_function(inference_single, (x, tensors, layout))]
        else:
            fused = graph.call_function(inference_linear, (x, tensors, layout))
            fused.meta["val"] = [node.meta["val"] for node in members]
            results = [graph.call_function(operator.getitem, (fused, i)) for i in range(len(members))]
    for node, result in zip(members, results, strict=True):
        # Not the rest of what is known of the node, such as the strides of its own arguments.
        result.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(result)
        graph.erase_node(node)
    return results


def _part(node: fx.Node) -> Part[fx.Node]:
    """Of a call op(x, *tensors, bias, *scalars)."""
    assert isinstance(node.target, OpOverload)
    name = _FORMATS[node.target]
    arguments: Any = node.args[1:]
    count = tensor_count(name)
    return Part(name, tuple(arguments[:count]), arguments[count], tuple(arguments[count + 1 :]))
