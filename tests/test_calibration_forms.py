"""The same sequences give the same masks, bit for bit, in whatever form, padding and batches they come."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from architectures import VOCABULARY, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from traces import traced as trace
from transformers import BatchEncoding

import sparsec
from sparsec.calibrate import samples, sequences
from sparsec.data.tiny import byte_tokenizer
from sparsec.errors import DataError


def padded(rows: Sequence[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Ids with nonsense where there is padding, and their attention mask."""
    most = max(map(len, rows))
    ids, mask = torch.full((len(rows), most), -100), torch.zeros(len(rows), most, dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(most - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


def batches(rows: Sequence[Tensor], side: str, size: int = 3) -> Iterator[dict[str, Tensor]]:
    for some in _batched(rows, size):
        yield dict(zip(("input_ids", "attention_mask"), padded(some, side), strict=True))


def _batched(rows: Sequence[Tensor], size: int) -> Iterator[Sequence[Tensor]]:
    return (rows[i : i + size] for i in range(0, len(rows), size))


FORMS: dict[str, Callable[[list[Tensor], str], Any]] = {
    "vectors": lambda rows, side: rows,
    "a tuple of vectors": lambda rows, side: tuple(rows),
    "lists": lambda rows, side: [row.tolist() for row in rows],
    "arrays": lambda rows, side: [row.numpy().astype(np.int32) for row in rows],
    "a generator": lambda rows, side: (row for row in rows),
    "shuffled": lambda rows, side: rows[::-1],
    "tensors of one row": lambda rows, side: [row[None] for row in rows],
    "a dict": lambda rows, side: next(batches(rows, side, len(rows))),
    "a BatchEncoding": lambda rows, side: BatchEncoding(next(batches(rows, side, len(rows)))),
    "a dict of lists": lambda rows, side: {k: v.tolist() for k, v in next(batches(rows, side, len(rows))).items()},
    "a dict of ragged lists": lambda rows, side: {"input_ids": [row.tolist() for row in rows]},
    "a dict of arrays": lambda rows, side: {k: v.numpy() for k, v in next(batches(rows, side, len(rows))).items()},
    "a dict for each": lambda rows, side: [{"input_ids": row, "labels": row} for row in rows],
    "rows of a dataset": lambda rows, side: [{k: v[0].tolist() for k, v in b.items()} for b in batches(rows, side, 1)],
    "batches": lambda rows, side: batches(rows, side),
    "a float mask": lambda rows, side: (padded(rows, side)[0], padded(rows, side)[1].float()),
    "a bool mask": lambda rows, side: (padded(rows, side)[0], padded(rows, side)[1].bool()),
    "a call": lambda rows, side: [padded(rows, side)],
    "calls": lambda rows, side: [(row[None], torch.ones_like(row)[None]) for row in rows],
    "a DataLoader": lambda rows, side: DataLoader(TensorDataset(*padded(rows, side)), batch_size=2, shuffle=True),
    "batches of lists": lambda rows, side: [[row.tolist() for row in some] for some in _batched(rows, 2)],
}
ROWS = st.lists(st.integers(1, 9), min_size=1, max_size=7).flatmap(
    lambda sizes: st.tuples(*(st.lists(st.integers(2, 60), min_size=n, max_size=n) for n in sizes))
)


@given(rows=ROWS, side=st.sampled_from(["left", "right"]), form=st.sampled_from(list(FORMS)))
@settings(max_examples=80)
def test_every_form_means_its_real_tokens(rows: tuple[list[int], ...], side: str, form: str) -> None:
    tensors = [torch.tensor(row) for row in rows]
    found = sequences(FORMS[form](tensors, side)).tokens
    assert sorted(ids.tolist() for ids in found) == sorted(rows)
    assert all(ids.dtype == torch.int64 for ids in found)


LENGTHS = (9, 5, 5, 5, 2, 9, 1)


@pytest.mark.parametrize(
    "passes",
    ["wanda(0.5)", "sparsegpt(0.5)", "magnitude(0.5, allocation='sensitivity')", "wanda(0.5, allocation='owl')"],
)
def test_the_same_sequences_give_the_same_masks(passes: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in LENGTHS]
    model, _ = tiny_model("llama")

    def masks(calibration: Any) -> dict[str, Tensor]:
        pruned = sparsec.compile(model, f"{passes},freeze", calibration=calibration)
        return {name: p for name, p in pruned.named_parameters() if "proj" in name}

    wanted = masks(rows)
    for form, side in (("a dict", "left"), ("a DataLoader", "right"), ("calls", "left")):
        found = masks(FORMS[form](rows, side))
        assert all(torch.equal(found[name], p) for name, p in wanted.items()), (form, side)


def test_a_plain_module_that_takes_tokens_is_calibrated_on_them_too() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.up = nn.Embedding(64, 16), nn.Linear(16, 16)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.up(self.table(input_ids))

    torch.manual_seed(0)
    rows, model = [torch.randint(2, 60, (n,)) for n in LENGTHS], Bag()
    found = [
        sparsec.compile(
            model, "wanda(0.5, targets='up'),freeze", example_inputs=torch.ones(2, 8, dtype=torch.int64), calibration=c
        )
        for c in (rows, padded(rows, "left"), {"input_ids": [row.tolist() for row in rows]})
    ]
    assert all(torch.equal(found[0].up.weight, each.up.weight) for each in found[1:])


def test_a_plain_module_takes_calls_by_position_and_by_name() -> None:
    model, example = tiny_model("mlp")
    inputs, x = example(), example(4)["x"]
    passes = "wanda(0.5, targets='up'),freeze"
    found = [
        sparsec.compile(model, passes, example_inputs=inputs, calibration=c).up.weight
        for c in ([(x,)], [{"x": x}], {"x": x})
    ]
    assert all(torch.equal(found[0], each) for each in found)
    for wrong, message in (
        ([(x, x)], "a calibration call has 2 tensors, the graph takes x"),
        (x, "this graph takes x"),
    ):
        with pytest.raises(DataError, match=message):
            sparsec.compile(model, passes, example_inputs=inputs, calibration=wrong)


def test_strings_are_what_their_tokenizer_makes_of_them() -> None:
    tokenizer, texts = byte_tokenizer(), ["one text", "another, longer one", "x"]
    wanted = [ids.tolist() for ids in sequences(tokenizer(texts, padding=True, return_tensors="pt")).tokens]
    for form in (texts, np.array(texts), iter(texts), [{"text": text} for text in texts], [{"text": texts}]):
        assert [ids.tolist() for ids in sequences(form, tokenizer).tokens] == wanted


def test_sequences_of_equal_length_share_calls() -> None:
    graph = trace(tiny_model("llama")[0])
    rows = [torch.full((n,), 3) for n in (20, 7, 20, 7, 7, 300, 20)]
    shapes = [tuple(call[0].shape) for call in samples(graph, rows, "test").calls]
    assert shapes == [(1, 300), (3, 20), (3, 7)]
    many = samples(graph, torch.full((61, 32), 3), "test").calls  # a prime number of them
    assert [len(call[0]) for call in many] == [31, 30]


IDS = torch.arange(3, 11).view(2, 4)
WRONG: dict[str, tuple[Any, str]] = {
    "a hole": (
        (IDS, torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0]])),
        "mask of calibration sequence 1 has a hole at position 1",
    ),
    "nothing but padding": (
        (IDS, torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])),
        "sequence 1 has no tokens; leave it out",
    ),
    "another width": ({"input_ids": IDS, "attention_mask": torch.ones(2, 3)}, "has 3 places for 4 tokens"),
    "another width as a tuple": ((IDS, torch.ones(2, 5, dtype=torch.int64)), "has 5 places for 4 tokens"),
    "another height": ({"input_ids": IDS, "attention_mask": torch.ones(3, 4)}, "mask of 3 rows stands beside 2"),
    "a packed mask": (
        {"input_ids": IDS, "attention_mask": IDS},
        "must be of 0 (padding) and 1 (real tokens), it holds 3",
    ),
    "a mask for heads": (
        {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 4, 4)},
        "must be [sequences, length], got [2, 1, 4, 4]",
    ),
    "a third tensor": ([(IDS, torch.ones_like(IDS), IDS)], "a calibration tuple has 3 tensors"),
    "no ids": ({"labels": IDS}, "a calibration dict needs input_ids"),
    "floats": (IDS.float(), "must be integers [sequences, length], got torch.float32"),
    "floats in lists": ([[1.0, 2.5]], "must be integers"),
    "bools": (IDS > 4, "must be integers"),
    "labels": (torch.tensor([[4, 5, -100]]), "id -100 is outside the model's vocabulary of 64; labels hold it"),
    "negative": ([[3, -1]], "id -1 is outside"),
    "another vocabulary": ([[3, 64]], "id 64 is outside the model's vocabulary of 64; was another tokenizer used?"),
    "beyond 64 bits": ([[3, 1 << 70]], "must be a vector of token ids"),
    "ragged by None": ([[3, None]], "calibration must be token ids"),
    "an empty sequence": ([[3, 4], []], "calibration sequence 1 has no tokens"),
    "an empty vector": ([IDS[0], IDS[0][:0]], "calibration sequence 1 has no tokens"),
    "nothing": ([], "holds no sequence"),
    "an exhausted iterator": (iter(()), "holds no sequence"),
    "one vector": (IDS[0], "must be [sequences, length], got [4]"),
    "a number": (7, "calibration must be token ids"),
    "bytes": ([b"text"], "calibration must be token ids"),
    "a stream without end": (itertools.repeat(torch.full((1, 1 << 16), 3)), "goes on after 4,194,304 tokens"),
    "strings alone": (["a text"], "calibration on strings needs a tokenizer"),
    "sparse": (IDS.to_sparse(), "torch.sparse_coo"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_sequence_is_refused_by_name(name: str) -> None:
    wrong, message = WRONG[name]
    with pytest.raises(DataError, match=re.escape(message)):
        sparsec.compile(tiny_model("llama")[0], "wanda(0.5)", calibration=wrong)


def test_what_the_user_may_not_have_meant_is_noted() -> None:
    model, _ = tiny_model("llama")
    ids = torch.tensor([[3, 4, 5, 0, 0], [6, 7, 8, 9, 3]])
    said = " ".join(sparsec.compile(model, "wanda(0.5)", calibration=ids).sparsec.notes)
    assert "1 of 2 sequences begin or end with token 0 again and again" in said
    with_mask = {"input_ids": ids, "attention_mask": (ids > 0).long(), "token_type_ids": (ids > 6).long()}
    said = " ".join(sparsec.compile(model, "wanda(0.5)", calibration=with_mask, calibration_length=4).sparsec.notes)
    assert "again and again" not in said
    assert "1 of 2 sequences were cut to 4 tokens" in said
    assert "token_type_ids are not read" in said
