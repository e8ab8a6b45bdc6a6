"""masked(): a pruned model for anybody's own training program, whose zeros survive it."""

from __future__ import annotations

import warnings
from typing import TypeVar

from torch import nn

from sparsec.compiler import inside
from sparsec.errors import CompileError, SparsecWarning
from sparsec.ir.settle import settle
from sparsec.recover.holding import Holding

Model = TypeVar("Model", bound=nn.Module)


def masked(model: Model) -> Model:
    """The same model, changed in place: from now on what its masks prune stays exactly zero, whoever trains it and how.

    model: what `sparsec.compile` gave back, pruned and not lowered, alone or in other modules, such as those of peft.

    Gradients of pruned weights are exactly zero, and so are an optimiser's moments of them. What a step of an optimiser of torch
    writes there is zero again when the step returns; what anything else writes there, before the model runs and before its state
    dict is read. Where no gradient came before, as when an adapter is merged or a state is loaded, a SparsecWarning tells of it.
    Parameters, their names and `save_pretrained` stay what they were. A copy of the whole model is held too; a pickle has the zeros
    and not the masks. Under torch.compile gradients and steps are held, and nothing else.

    `sparsec.extend(model, "lower(auto)")` goes on with the trained model. Raises CompileError for a model that was not compiled, is
    lowered, has no masks, or shares its tensors (`copy="changed"`).
    """
    path, compiled = inside(model, "masked")
    graph = compiled.graph
    if "lowered" in graph.facts:
        raise CompileError(
            "this model is lowered already: its dense weights are gone; train it under its masks before the pass lower runs: "
            "masked(sparsec.compile(model, 'wanda(0.5),freeze', ...)), then sparsec.extend(model, 'lower(auto)')"
        )
    if not any(graph.masked()):
        raise CompileError(
            f"this model has no masks: {compiled.pipeline} prunes nothing; compile it with a pass that prunes and freeze, or with "
            "'zeros,freeze' for the zeros that it has"
        )
    if compiled.shares:
        raise CompileError(
            "this model shares its tensors with the one that it was compiled from, and training would change both; compile it "
            "with copy=True"
        )
    for note in settle(graph):
        warnings.warn(note, SparsecWarning, stacklevel=2)
    if compiled.holding is None:
        compiled.holding = Holding(graph, model.get_submodule(path))
    return model
