"""The parts of recover: stretches, losses in parts, gradients, masks that move."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from architectures import VOCABULARY, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sparsec
from sparsec.calibrate import CalibrationData
from sparsec.errors import DataError
from sparsec.ir.graph import Graph
from sparsec.ir.tracer import trace
from sparsec.metrics import first_tensor
from sparsec.patterns import Pattern
from sparsec.pipeline.base import Context
from sparsec.recover.losses import head_loss
from sparsec.recover.precision import precision
from sparsec.recover.regrow import moved
from sparsec.recover.stretches import Stretches
from sparsec.recover.student import Whole
from sparsec.recover.text import training_text
from sparsec.recover.whole import Towards, WholeModel


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "bert", "mlp"])
def test_stretches_compute_what_the_graph_does(name: str) -> None:
    model, example = tiny_model(name)
    inputs = example()
    graph = trace(model, inputs if name == "mlp" else None)
    cut = Stretches(graph)
    call = tuple(inputs[key] for key in graph.inputs)
    values: dict[Any, Any] = {}
    with torch.no_grad():
        for stretch in cut.stretches:
            values = cut.run(stretch.start, stretch.end, call, values, graph.read)
        made = cut.outputs(values)[0]
        wanted = graph.run(*call)
    assert torch.equal(made, first_tensor(wanted))
    assert (len(cut.stretches) >= 4) == (name != "mlp")


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 3), st.integers(2, 40), st.floats(0, 1), st.floats(0.5, 3), st.floats(0.1, 2))
def test_the_loss_in_parts_is_the_loss(
    sequences: int, length: int, share: float, temperature: float, scale: float
) -> None:
    torch.manual_seed(sequences * length)
    head, old = (torch.randn(11, 6, dtype=torch.float64) for _ in range(2))
    head.requires_grad_()
    hidden, of_teacher = (torch.randn(sequences, length, 6, dtype=torch.float64) for _ in range(2))
    ids = torch.randint(0, 11, (sequences, length))
    apart, missed_here, gradient = head_loss(
        hidden,
        of_teacher,
        lambda x: x @ head.t(),
        lambda x: x @ old.t(),
        ids[:, 1:],
        cross_entropy=share,
        temperature=temperature,
        scale=scale,
    )
    found = (1 - share) * apart + share * missed_here
    mine, own = head.grad, hidden.clone().requires_grad_()
    head.grad = None
    q = (own @ head.t() / temperature).log_softmax(-1)
    p = (of_teacher @ old.t() / temperature).log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1).mean() * temperature**2
    missed = nn.functional.cross_entropy((own @ head.t())[:, :-1].reshape(-1, 11), ids[:, 1:].reshape(-1))
    whole = (1 - share) * divergence + share * missed
    (whole * scale).backward()
    assert abs(found - float(whole.detach())) < 1e-4 * max(1, abs(float(whole.detach())))
    assert gradient is not None
    assert own.grad is not None
    assert mine is not None
    assert head.grad is not None
    assert torch.allclose(gradient, own.grad, atol=1e-5)
    assert torch.allclose(mine, head.grad, atol=1e-4)


def test_gradients_are_those_of_the_whole_model() -> None:
    model = tiny_model("llama")[0]
    compiled = sparsec.compile(model, "magnitude(0.5),freeze")
    graph = compiled.sparsec.graph
    names = [w.name for w in graph.masked()]
    student = Whole(graph, names, Context())
    ids = torch.randint(3, VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(0))
    calls = [(row[None], torch.ones_like(row[None])) for row in ids]
    dense = dict(model.named_parameters())
    whole = WholeModel(
        Stretches(graph), calls, student.read, lambda t: dense[t].detach() if t in dense else graph.read(t), Towards(),
        precision("fp32", graph)[1],
    )  # fmt: skip
    loss, tokens = whole.gradients([0, 1, 2])
    student.clean()
    assert tokens == ids.numel()
    with torch.no_grad():
        wanted = model(ids).logits.log_softmax(-1)
    own = compiled(ids).logits.log_softmax(-1)
    other = (wanted.exp() * (wanted - own)).sum(-1).mean()
    other.backward()
    assert abs(float(other.detach()) - loss) < 1e-6
    for name in names:
        mask, gradient = graph.weights[name].mask, compiled.get_parameter(name).grad
        found = student.leaves[name].grad
        assert mask is not None
        assert gradient is not None
        assert found is not None
        assert torch.allclose(found, gradient * mask, atol=1e-6), name


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["unstructured", "2:4", "4:8", "1:4", "block:2x4", "block:4x4"]),
    st.integers(1, 4),
    st.integers(1, 4),
    st.floats(0, 1),
    st.floats(0.1, 0.9),
    st.integers(0, 1000),
)
def test_masks_move_and_keep_their_counts_and_patterns(
    name: str, rows: int, columns: int, share: float, zeros: float, seed: int
) -> None:
    torch.manual_seed(seed)
    pattern, shape = Pattern.parse(name), (4 * rows, 8 * columns)
    mask = pattern.mask(torch.randn(shape), zeros if pattern.sparsity is None else pattern.sparsity)
    values, growth = torch.randn(shape) * mask, torch.rand(shape)
    new = moved(mask, values, growth, pattern, share)
    assert new.dtype == torch.bool
    assert pattern.holds(new)
    assert int(new.sum()) == int(mask.sum())
    if pattern.nm is not None:
        groups = pattern.nm[1]
        assert torch.equal(new.reshape(-1, groups).sum(1), mask.reshape(-1, groups).sum(1))
    gone, come = mask & ~new, new & ~mask
    assert int(gone.sum()) == int(come.sum())
    if pattern == Pattern() and bool(come.any()):
        # The weakest went, and of those that could come the ones that wanted most did.
        count = min(round(share * int(mask.sum())), int((~mask).sum()))
        assert values[gone].abs().max() <= values[mask].abs().sort().values[count - 1]
        left = growth[~new & ~mask]
        assert not len(left) or growth[come].min() >= left.max()


def text(sequences: int = 8, length: int = 16) -> Tensor:
    """Token ids that repeat themselves."""
    start = torch.randint(3, VOCABULARY, (sequences, 1), generator=torch.Generator().manual_seed(0))
    return (start + 5 * torch.arange(length)) % (VOCABULARY - 3) + 3


@pytest.mark.parametrize("way", ["rigl", "set"])
@pytest.mark.parametrize("pattern", ["0.8", "pattern='2:4'", "0.5, pattern='block:4x4'"])
def test_moved_masks_are_the_graphs_and_what_went_is_zero(way: str, pattern: str) -> None:
    model = tiny_model("llama")[0]
    before = sparsec.compile(model, f"magnitude({pattern}, scope='layer'),freeze" if "nm" not in pattern else pattern)
    spec = (
        f"magnitude({pattern}, scope='layer'),freeze,recover(cross_entropy=1.0, regrow='{way}', regrow_every=2, steps=12, "
        "batch=4, learning_rate=0.01),sparsity"
    )
    after = sparsec.compile(model, spec, calibration=text(), verify="facts")
    moved_ones = 0
    for weight in after.sparsec.graph.masked():
        old, new = before.sparsec.graph.weights[weight.name].mask, weight.mask
        assert old is not None and new is not None  # noqa: PT018
        assert int(old.sum()) == int(new.sum())
        assert Pattern.parse(weight.pattern or "unstructured").holds(new)
        tensor = after.sparsec.graph.tensor(weight.name).detach()
        assert not tensor[~new].any()
        moved_ones += int((new & ~old).sum())
        assert bool(tensor[new & ~old].any()) == bool((new & ~old).any())
    assert moved_ones
    fast = sparsec.extend(after, "lower(csr)")
    ids = text(2)
    with torch.no_grad():
        assert torch.allclose(fast(ids).logits, after(ids).logits, atol=1e-4)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 20), st.integers(2, 40), st.integers(2, 50) | st.none())
def test_a_text_is_cut_for_training_and_whole_where_it_is_looked_at(
    sequences: int, long: int, length: int | None
) -> None:
    graph = _tiny_graph()
    rows = torch.arange(sequences * long).view(sequences, long)
    call = tuple(rows if name == "input_ids" else torch.ones_like(rows) for name in graph.inputs)
    place = graph.inputs.index("input_ids")
    short = length is None or length >= long
    if sequences == 1 and (short or long < 4):
        with pytest.raises(DataError, match="at least 2"):
            training_text(graph, CalibrationData((call,), "a text"), length, 1)
        return
    text = training_text(graph, CalibrationData((call,), "a text"), length, 1)
    held = [c[place].flatten().tolist() for c in text.held]
    trained = [c[place].flatten().tolist() for c in text.trained]
    assert sequences == 1 or all(len(each) == long for each in held)
    most = max(length or long, 3)  # three tokens cannot be two pieces
    assert all(2 <= len(each) <= most for each in trained)
    assert sorted(token for each in held + trained for token in each) == list(range(sequences * long))


@cache
def _tiny_graph() -> Graph:
    model, example = tiny_model("llama")
    return trace(model, example())
