"""A head that is packed, and the embedding that is tied to it: both read the same bytes, whatever becomes of the model."""

from __future__ import annotations

import copy
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

import sparsec
from sparsec import memory
from sparsec.emitter import unpackable
from sparsec.errors import CheckpointError, CompileError, EmitError, FormatError, WeightError
from sparsec.ir.printer import graph_text
from sparsec.ir.tracer import trace
from sparsec.kernels import SparseLinear
from sparsec.kernels.modules.packed_layer import PackedLayer
from sparsec.kernels.modules.sparse_embedding import SparseEmbedding, not_served

HEAD = "lower(dense, values='int8', digits=3, targets=('lm_head',))"
SPARSE = "magnitude(0.5, targets=('lm_head', 'mlp')),freeze,lower({})"
NEAR = {"rtol": 1e-4, "atol": 1e-4}
"""Three digits hold an x to some 20 bits."""


@cache
def made(name: str, spec: str = HEAD) -> Any:
    """A compiled model; only to be read."""
    return sparsec.compile(tiny_model(name)[0], spec)


def logits(model: Any, name: str = "llama") -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**tiny_model(name)[1](2, 6), use_cache=False).logits
    return found


def assert_tied(model: Any) -> tuple[SparseEmbedding, SparseLinear]:
    """Both ends of a model, which hold the very same tensors."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, SparseEmbedding)
    assert isinstance(head, SparseLinear)
    assert all(t is head.packed.tensors()[n] for n, t in table.packed.tensors().items())
    return table, head


def by_hand(name: str, compiled: Any) -> Any:
    """The model with every packed weight rounded as the packed one is, dense."""
    model = tiny_model(name)[0]
    with torch.no_grad():
        for weight in compiled.sparsec.graph.weights.values():
            if weight.packed is not None:
                matrix = weight.packed.unpack()
                model.get_parameter(weight.name).copy_(matrix.t() if weight.transposed else matrix)
    return model


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gemma3"])
@pytest.mark.parametrize(
    "spec", [HEAD, SPARSE.format("bitmap"), SPARSE.format("'bitmap:int4mg32', digits=3"), SPARSE.format("csr8")]
)
def test_logits_are_those_of_the_rounded_dense_model(name: str, spec: str) -> None:
    compiled = made(name, spec)
    assert_tied(compiled)
    torch.testing.assert_close(logits(compiled, name), logits(by_hand(name, compiled), name), **NEAR)


def test_an_untied_head_is_packed_alone() -> None:
    compiled = made("llama")
    assert type(compiled.get_input_embeddings()) is nn.Embedding
    assert isinstance(compiled.get_output_embeddings(), SparseLinear)
    torch.testing.assert_close(logits(compiled), logits(by_hand("llama", compiled)), **NEAR)


def test_the_bytes_of_both_are_counted_once_and_their_share_is_told() -> None:
    dense, compiled = tiny_model("llama-tied")[0], made("llama-tied")
    report = compiled.sparsec.report()
    (row,) = [row for row in report.layers if row.aliases]
    assert (row.format, row.name, row.aliases) == ("dense:int8", "model.embed_tokens.weight", ("lm_head.weight",))
    packed = compiled.get_input_embeddings().packed
    assert row.bytes_held == packed.nbytes
    saved = dense.model.embed_tokens.weight.nbytes - packed.nbytes
    assert memory.held(compiled).total == memory.held(dense).total - saved == report.bytes_held
    share = 100 * packed.nbytes / report.bytes_held
    said = f"embedding and head: {packed.nbytes / 1e6:.2f} MB as dense:int8, {share:.0f}% of the model's bytes"
    assert said in " ".join(str(report).split())


def test_the_graph_reads_as_what_runs_and_tracing_again_finds_the_same() -> None:
    compiled = made("llama-tied")
    graph = compiled.sparsec.graph
    (line,) = [line for line in graph_text(graph).splitlines() if "@model.embed_tokens" in line]
    assert line.startswith(
        "%model_embed_tokens = dense_int_embedding(%input_ids) @model.embed_tokens  # f32 [64x32] dense:int8"
    )
    again = trace(compiled, None)
    assert [(op.kind, op.owner) for op in again.ops.values()] == [(op.kind, op.owner) for op in graph.ops.values()]
    ids = tiny_model("llama-tied")[1](2, 6)
    with torch.no_grad():
        assert torch.equal(graph.run(*ids.values()).logits, logits(compiled))


def test_both_stay_tied_through_copies_pickles_moves_and_loading() -> None:
    compiled = made("llama-tied")
    before = logits(compiled)
    for twin in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        table, _ = assert_tied(twin)
        assert table.values is not compiled.lm_head.values
        assert torch.equal(logits(twin), before)
    twin = copy.deepcopy(compiled)
    assert twin.sparsec.graph.weights["model.embed_tokens.weight"].packed.values is twin.lm_head.values
    twin.to(torch.bfloat16)
    table, _ = assert_tied(twin)
    assert table(torch.tensor([3])).dtype == torch.bfloat16
    assert logits(twin).dtype == torch.bfloat16
    for assign in (False, True):
        other = sparsec.compile(tiny_model("llama-tied")[0], HEAD)
        other.load_state_dict({n: t.clone() for n, t in compiled.state_dict().items()}, assign=assign)
        assert torch.equal(logits(other), before)


@pytest.mark.parametrize("name", ["llama-tied", "gemma3"])
def test_a_saved_model_holds_them_once_and_loads_to_the_same_bits(name: str, tmp_path: Path) -> None:
    compiled = made(name)
    compiled.save_pretrained(tmp_path)
    stored = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert stored < memory.held(compiled).total + 20_000  # of headers
    for loaded in (sparsec.load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert_tied(loaded)
        assert torch.equal(logits(loaded, name), logits(compiled, name))
        loaded.tie_weights()
        assert_tied(loaded)
        again = tmp_path / "again"
        loaded.save_pretrained(again)
        assert torch.equal(logits(sparsec.load(again), name), logits(compiled, name))


def test_another_table_in_the_class_of_a_saved_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made("llama-tied").save_pretrained(tmp_path)
    monkeypatch.setattr(nn.Embedding, "__init__", _bounded(nn.Embedding.__init__))
    with pytest.raises(
        CheckpointError, match=r"layers names 'model\.embed_tokens', and no packed table can stand there"
    ):
        sparsec.load(tmp_path)


def _bounded(init: Any) -> Any:
    """Embeddings that scale their rows down in place."""

    def build(self: nn.Embedding, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        self.max_norm = 1.0

    return build


def test_the_way_back_is_a_model_whose_ties_transformers_knows_again() -> None:
    dense = made("llama-tied").sparsec.to_dense()
    assert type(dense.model.embed_tokens) is nn.Embedding
    assert dense.model.embed_tokens.weight is dense.lm_head.weight
    assert vars(dense).keys() == vars(tiny_model("llama-tied")[0]).keys()
    assert dense.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}
    dense.resize_token_embeddings(70)
    assert dense.lm_head.weight.shape == dense.model.embed_tokens.weight.shape == (70, 32)
    scaled = made("gemma3").sparsec.to_dense()
    assert type(scaled.model.embed_tokens).__name__ == "Gemma3TextScaledWordEmbedding"
    torch.testing.assert_close(logits(scaled), logits(made("gemma3")), **NEAR)


def test_resizing_is_refused_by_name_and_asking_for_what_is_there_is_not() -> None:
    compiled = copy.deepcopy(made("llama-tied"))
    assert compiled.resize_token_embeddings() is compiled.model.embed_tokens
    assert compiled.resize_token_embeddings(64, pad_to_multiple_of=16) is compiled.model.embed_tokens
    for arguments in ((65,), (60, 7)):
        with pytest.raises(
            CompileError, match=r"model\.embed_tokens is packed, with 64 rows, and cannot be made 6[35]"
        ):
            compiled.resize_token_embeddings(*arguments)
    with pytest.raises(WeightError, match=r"model\.embed_tokens: weight is for reading"):
        compiled.model.embed_tokens.weight.zero_()
    state = compiled.state_dict()
    state["model.embed_tokens.values"] = state["model.embed_tokens.values"][:1]
    with pytest.raises(FormatError, match=r"model\.embed_tokens: the state does not fit"):
        compiled.load_state_dict(state)


def test_generation_and_training_around_it_work() -> None:
    compiled = copy.deepcopy(made("llama-tied"))
    ids = torch.tensor([[3, 4, 5]])
    out = compiled.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 7)
    compiled.enable_input_require_grads()
    compiled(ids, labels=ids).loss.backward()
    assert all(t.grad is None for t in compiled.model.embed_tokens.buffers())


class Twice(nn.Module):
    """A table that a head is tied to."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table, self.head = table, nn.Linear(table.embedding_dim, table.num_embeddings, bias=False)
        self.head.weight = table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [batch, length] -> [batch, length, num_embeddings]."""
        return self.head(self.table(ids))


class Halved(nn.Embedding):
    """Does something of its own."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [...] -> [..., embedding_dim]."""
        return super().forward(ids) / 2


class Scaled(nn.Embedding):
    """As transformers' scaled embeddings."""

    def __init__(self, *sizes: int, embed_scale: float = 1.7) -> None:
        super().__init__(*sizes)
        self.embed_scale = embed_scale

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [...] -> [..., embedding_dim]."""
        return super().forward(ids) * self.embed_scale


IDS = torch.randint(20, (2, 5), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("table", [nn.Embedding(20, 16, padding_idx=3), Scaled(20, 16)])
def test_tables_of_plain_modules_are_packed(table: nn.Embedding) -> None:
    model = Twice(table)
    compiled = sparsec.compile(model, "lower('dense:int8', digits=3, targets='head')", example_inputs=IDS)
    assert isinstance(compiled.table, SparseEmbedding)
    assert compiled.table.values is compiled.head.values
    with torch.no_grad():
        matrix = compiled.head.packed.unpack()
        expected = nn.functional.embedding(IDS, matrix) * getattr(table, "embed_scale", 1) @ matrix.t()
        torch.testing.assert_close(compiled(IDS), expected, **NEAR)
        with pytest.raises(IndexError, match="ids must lie from 0 to 19"):
            compiled(torch.tensor([[20]]))


@pytest.mark.parametrize(
    ("table", "why"),
    [
        (
            nn.Embedding(20, 16, max_norm=1.0),
            "it is an embedding's table too, and the Embedding scales its rows to max_norm",
        ),
        (Halved(20, 16), "Halved does more than to look rows up and to multiply them by embed_scale"),
    ],
)
def test_what_no_packed_table_can_do_stays_dense_with_the_reason(table: nn.Embedding, why: str) -> None:
    model = Twice(table)
    compiled = sparsec.compile(model, "lower('dense:int8', targets='head')", example_inputs=IDS)
    (weight,) = (w for w in compiled.sparsec.graph.weights.values() if w.aliases)
    assert weight.packed is None
    assert why in (weight.reason or "")
    assert not any(isinstance(m, PackedLayer) for m in compiled.modules())
    with torch.no_grad():
        assert torch.equal(compiled(IDS), model(IDS))


def test_a_table_that_is_summed_as_well_stays_dense() -> None:
    class Bags(Twice):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(nn.functional.embedding_bag(ids, self.table.weight))

    compiled = sparsec.compile(Bags(nn.Embedding(20, 16)), "lower('dense:int8', targets='head')", example_inputs=IDS)
    (weight,) = (w for w in compiled.sparsec.graph.weights.values() if w.aliases)
    assert weight.packed is None
    assert weight.reason


def test_a_module_that_changed_after_tracing_is_refused_by_name() -> None:
    model = Twice(nn.Embedding(20, 16))
    graph = trace(model, IDS)
    assert unpackable(model, graph) == {}
    model.table.max_norm = 1.0
    assert "scales its rows" in unpackable(model, graph)["table.weight"]
    model.table = Halved(20, 16)
    model.table.weight = model.head.weight
    assert not_served(model.table)
    packed = sparsec.compile(
        Twice(nn.Embedding(20, 16)), "lower('dense:int8', targets='head')", example_inputs=IDS
    ).sparsec.graph
    with pytest.raises(EmitError, match="table is a Halved, which cannot be swapped for a SparseEmbedding"):
        sparsec.emitter.emit(model, packed)
