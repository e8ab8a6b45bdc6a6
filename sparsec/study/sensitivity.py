"""How much each pruned weight matters: the dense model with that weight alone as pruning left it, against the dense model.

No copy of the model is made: the weight's pruned values stand in the dense model while it runs, and its own Parameter comes back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sparsec.emitter import put
from sparsec.evaluate import Windows, compare, compare_embeddings
from sparsec.ir.facts import Weight
from sparsec.ir.graph import Graph, fetch
from sparsec.progress import Progress, each_of
from sparsec.study.kept_embeddings import KeptEmbeddings
from sparsec.study.kept_logits import KeptLogits


def sensitivities(
    dense: Any, graph: Graph, windows: Windows, encoder: bool, progress: Progress | None = None
) -> dict[str, float]:
    """By name of every weight that was pruned: mean KL(dense || this) over the windows' positions in nats, of encoders 1 - cosine.

    graph: of the pruned model, not lowered yet. nan where the model gives nan. Raises what `compare` raises; the model is then
    what it was, too.
    """
    keep: Any = KeptEmbeddings if encoder else KeptLogits
    kept = keep(dense)
    run = compare_embeddings if encoder else compare
    run({"dense": kept}, windows)
    chosen = [weight for weight in graph.masked() if graph.kept(weight.name) < weight.numel]
    found: dict[str, float] = {}
    for weight in each_of(progress, "sensitivity", chosen):
        with _standing_in(dense, weight, graph.read(weight.name)):
            found[weight.name] = _divergence(kept.forget(), dense, windows, encoder)
    return found


def _divergence(reference: Any, model: Any, windows: Windows, encoder: bool) -> float:
    models = {"dense": reference, "pruned": model}
    if encoder:
        cosine = compare_embeddings(models, windows)["pruned"].cosine
        return cosine if math.isnan(cosine) else max(0.0, 1.0 - cosine)
    kl = compare(models, windows)["pruned"].kl
    return kl if math.isnan(kl) else max(0.0, kl)


@contextmanager
def _standing_in(model: nn.Module, weight: Weight, tensor: Tensor) -> Iterator[None]:
    """Within it the model holds another tensor under the weight's names."""
    own = fetch(model, weight.name)
    try:
        put(model, weight, tensor.detach())
        yield
    finally:
        put(model, weight, own)
