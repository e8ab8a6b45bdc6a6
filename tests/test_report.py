"""What a report counts, and what it says."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import report_cases
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5EncoderModel

import sparsec
from sparsec import memory
from sparsec.data.tiny import byte_tokenizer
from sparsec.errors import DataError
from sparsec.report import schema
from sparsec.report.notes import merged, tied_table
from sparsec.report.roles import by_role, middle, most
from sparsec.report.summary import summary_lines
from sparsec.report.text import render
from sparsec.report.variant import metrics
from sparsec.report.words import dense_reason, pays_from, slower, storage
from sparsec.study.sample import read_prompt
from sparsec.timing import others
from sparsec.timing.others import in_the_way
from sparsec.timing.spread import Spread

GOLDEN = Path(__file__).parent / "golden" / "report.txt"


@pytest.fixture(scope="module")
def compiled() -> Any:
    return report_cases.compiled()


@pytest.fixture(scope="module")
def full() -> Any:
    return report_cases.report()


def test_text_of_a_whole_report(full: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    text = str(full) + "\n"
    if request.config.getoption("--refresh-goldens"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")


def test_text_is_ascii_and_at_most_120_columns_wide(full: Any) -> None:
    text = render(full)
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 120


def screen(report: Any) -> list[str]:
    """The lines of the summary."""
    return render(report).split("\n\n== ")[0].splitlines()


def test_the_summary_fits_a_screen_whatever_there_is_to_say(full: Any) -> None:
    long = replace(
        full,
        model=replace(full.model, name="a/very-" + "long-" * 40 + "name"),
        passes=tuple(replace(p, spec=p.spec * 9, notes=("word " * 200, "x" * 300)) for p in full.passes),
        evaluation=replace(full.evaluation, text="word " * 99),
    )
    for report in (full, long, replace(full, summary={}), replace(full, summary={}, passes=(), model=None)):
        lines = screen(report)
        assert lines[0].startswith("== Summary ==")
        assert len(lines) <= 24
        assert max(map(len, lines)) <= 80
        assert sum(line.startswith("- ") for line in lines) <= 4  # three notes, and how many more there are


def test_the_summary_names_every_baseline_and_the_price(full: Any) -> None:
    text = " ".join(" ".join(screen(full)).split())
    assert "dense masked dense on sparsec lowered" in text
    assert "speed against dense 1.00x 0.50x 0.33x 0.25x" in text
    assert (
        "a token 0.25x as fast as the stock dense model: 0.33x by sparsec's dense kernels, 1.30x over these by the zeros"
        in text
    )
    assert "quality perplexity 96.50 before, 1234 after; 2346 by magnitude(0.4) (8 x 64 tokens of a text)" in text
    assert "to lose less, prune with admm" in text
    assert "- a toy this small cannot show a gain" in text


def test_a_line_for_every_role_or_for_every_weight(full: Any) -> None:
    short, every = render(full), render(full, layers=True)
    assert "mlp.down_proj x2 " in short
    assert "model.layers.1.mlp.down_proj" not in short.split("== Layers")[1].split("(a) dense")[0]
    for row in full.layers:
        assert row.name.removesuffix(".weight")[-26:] in every
    assert len(schema.document(full)["layers"]) == len(full.layers)


def test_a_role_adds_up_and_mixed_formats_are_counted() -> None:
    rows = [row for row in report_cases.report().layers if row.name.endswith("mlp.up_proj.weight")]
    mixed = [rows[0], replace(rows[0], format="dense", nnz=rows[0].parameters), replace(rows[0], shape=(1, 2))]
    assert [(name, len(members)) for name, members in by_role(mixed)] == [("mlp.up_proj", 2), ("mlp.up_proj", 1)]
    assert most(["a", "b", "b"]) == "b x2, a x1"
    assert most(["a", "a"]) == "a"
    assert middle([None, 1.0, 3.0]) == 2.0
    assert middle([None]) is None


def test_equal_notes_are_one_with_a_count() -> None:
    notes = ["a.0: too small", "once", "a.1.weight: too small", "b: too small", "once"]
    assert merged(notes, ["a.0.weight", "a.1.weight"]) == [
        "too small (2 times, first a.0)",
        "once (2 times)",
        "b: too small",
    ]


def test_a_tied_table_that_is_most_of_the_model_is_named_with_a_way_out_that_works() -> None:
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**small, vocab_size=2048, tie_word_embeddings=True))
    passes = "magnitude(0.5, targets={}),freeze,lower(bitmap)"
    said = tied_table(sparsec.compile(model, passes.format("('attention', 'mlp')")).sparsec.report())
    assert said is not None
    assert said.startswith("model.embed_tokens.weight is 0.13 of 0.14 MB and stays dense: embedding and head share it")
    assert "torch.bfloat16 to halve it" in said
    advice = said.partition("add the pass ")[2]
    packed = sparsec.compile(model, f"{passes.format(('attention', 'mlp'))},{advice}").sparsec
    assert packed.graph.weights["model.embed_tokens.weight"].format == "dense:int8"
    assert tied_table(packed.report()) is None


def test_a_table_with_two_names_and_no_head_is_none_of_these() -> None:
    config = T5Config(vocab_size=2048, d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2)
    found = sparsec.compile(T5EncoderModel(config), "magnitude(0.5),freeze,lower(bitmap)").sparsec.report()
    (table,) = (row for row in found.layers if row.aliases)
    assert (table.name, table.aliases) == ("shared.weight", ("encoder.embed_tokens.weight",))
    assert table.bytes_held > found.bytes_dense / 2
    assert dense_reason(table) == "embedding: looked up, not multiplied"
    assert tied_table(found) is None


@pytest.mark.parametrize(
    ("spec", "tied"),
    [
        (report_cases.SPEC, True),
        (report_cases.SPEC.split(",lower")[0], True),
        ("magnitude(0.5),freeze,lower(csr)", True),
        ("magnitude(0.5)", False),
    ],
)
def test_bytes_are_those_found_by_walking_the_emitted_model(spec: str, tied: bool) -> None:
    model = report_cases.compiled(spec, tied)
    report = model.sparsec.report()
    assert report.bytes_held == memory.held(model).total
    assert report.bytes_masks == sum(w.mask.numel() for w in model.sparsec.graph.masked())


def test_rows_add_up_to_the_model(compiled: Any) -> None:
    report, dense = compiled.sparsec.report(), report_cases.model()
    assert report.parameters == sum(p.numel() for p in dense.parameters())
    assert report.bytes_dense == memory.held(dense).total
    for key in ("parameters", "nnz", "bytes_dense", "bytes_held"):
        assert sum(getattr(g, key) for g in report.groups) == sum(getattr(row, key) for row in report.layers), key
    assert sum(g.share for g in report.groups) == pytest.approx(1.0)


def test_nnz_is_the_masks_sum_and_not_a_count_of_values(compiled: Any) -> None:
    """The arithmetic weights hold a zero of their own; the masks are exact to one weight per matrix set."""
    pruned = [row for row in compiled.sparsec.report().layers if row.packed]
    total = sum(row.parameters for row in pruned)
    assert len(pruned) == 10
    assert sum(row.parameters - row.nnz for row in pruned) == round(0.3 * total)


def test_a_tied_weight_is_one_row_and_its_product_counts_under_lm_head(compiled: Any) -> None:
    report = compiled.sparsec.report()
    (row,) = [row for row in report.layers if row.aliases]
    groups = {g.group: g for g in report.groups}
    assert (row.name, row.aliases) == ("model.embed_tokens.weight", ("lm_head.weight",))
    assert groups["embedding"].parameters == 96 * 32
    assert groups["lm_head"].parameters == 0
    assert groups["lm_head"].flops_per_token == 2 * 96 * 32
    assert groups["embedding"].flops_per_token == 0


def test_flops_scale_with_nnz_only_where_a_sparse_kernel_runs() -> None:
    lowered = report_cases.compiled().sparsec.report()
    masked = report_cases.compiled(report_cases.SPEC.split(",lower")[0]).sparsec.report()
    for row, before in zip(lowered.layers, masked.layers, strict=True):
        assert row.nnz == before.nnz
        assert before.flops_per_token == before.flops_dense
        assert row.flops_per_token == (2 * row.nnz if row.packed else row.flops_dense)
    attention = next(g for g in lowered.groups if g.group == "attention")
    assert lowered.flops_without_weights == 2 * 2 * (2 * 32 * 32)  # layers, scores and values, heads*head_dim*context
    assert attention.flops_dense == lowered.flops_without_weights + 2 * 2 * (2 * 32 * 32 + 2 * 16 * 32)


def test_flops_that_nobody_counted_are_unknown_not_zero() -> None:
    report = report_cases.compiled("magnitude(0.5),freeze,lower(csr)").sparsec.report()
    assert report.flops_per_token is None
    assert {row.flops_per_token for row in report.layers} == {None}
    assert "FLOPs are not counted: add the pass flops" in str(report)
    assert schema.check_report(schema.document(report)) == []


def test_larger_than_dense_is_called_larger(compiled: Any) -> None:
    """CSR with 32-bit columns at 30 % holds 1.4 times the bytes of fp32."""
    (text,) = storage(compiled.sparsec.report().layers)
    assert "10 of them are LARGER than dense" in text
    assert "so the packed weights are LARGER than dense" in text
    (smaller,) = storage(report_cases.compiled("magnitude(0.9),freeze,lower(csr)").sparsec.report().layers)
    assert "LARGER" not in smaller


def test_csr_with_32_bit_columns_pays_from_about_half_zeros(compiled: Any) -> None:
    rows = [row for row in compiled.sparsec.report().layers if row.packed]
    assert pays_from(rows) == pytest.approx(0.5, abs=0.04)  # beside 8 bytes per kept weight there are row pointers


def test_every_dense_row_has_a_reason_and_no_packed_one(compiled: Any) -> None:
    rows = schema.document(compiled.sparsec.report())["layers"]
    assert all((row["reason"] is None) == (row["format"] != "dense") for row in rows)
    reasons = {row["name"]: row["reason"] for row in rows}
    assert reasons["model.layers.1.self_attn.q_proj.weight"] == "no pass pruned it"
    assert "tied" in reasons["model.embed_tokens.weight"]


def test_a_linear_that_the_trace_never_executed_is_said_to_be() -> None:
    """Regression: it was said that no pass had pruned it."""
    model = report_cases.model()
    model.model.layers[0].unused = torch.nn.Linear(32, 32, bias=False)
    rows = sparsec.compile(model, "magnitude(0.5, ignore=('lm_head',)),freeze").sparsec.report().layers
    reasons = {row.name: dense_reason(row) for row in rows}
    assert reasons["model.layers.0.unused.weight"] == "not executed in the traced call"
    assert reasons["model.layers.0.mlp.up_proj.weight"] == "it has a mask, but no pass lowered it"


def test_a_prompt_goes_through_the_chat_template_and_leaves_room_for_the_answer() -> None:
    tokenizer = byte_tokenizer()
    assert read_prompt(tokenizer, "Why?", 4, limit=8).tokens.tolist() == [list(tokenizer("Why?")["input_ids"])]
    with pytest.raises(DataError, match="4 tokens, which with 5 new ones need 9 positions, the model has 8"):
        read_prompt(tokenizer, "Why?", 5, limit=8)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}{% endfor %};"
    found = read_prompt(tokenizer, "Why?", 4)
    assert found.chat
    assert tokenizer.decode(found.tokens[0]) == "user:Why?;"


def test_json_holds_to_its_schema_and_is_plain_json(full: Any) -> None:
    found = json.loads(json.dumps(schema.document(full), allow_nan=False))
    assert schema.check_report(found) == []
    assert found["schema"] == "sparsec.report/1"
    assert list(found["summary"]) == ["dense", "masked", "dense_on_sparsec", "lowered"]
    assert found["summary"]["lowered"]["decode_ms"] == 4.0
    assert found["summary"]["lowered"]["decode_ms_quartiles"] == [3.5, 150.0]
    assert found["passes"][0]["effect"] == "lossy"
    assert {"out_features", "in_features", "nnz", "kernel", "speedup_predicted"} <= found["layers"][0].keys()


def test_json_takes_a_perplexity_beyond_floating_point(full: Any) -> None:
    broken = replace(full, summary={"dense": replace(full.summary["dense"], perplexity=float("inf"))})
    found = json.loads(json.dumps(schema.document(broken), allow_nan=False))
    assert found["summary"]["dense"]["perplexity"] is None


@given(data=st.data())
def test_check_finds_what_is_missing_or_of_the_wrong_type(data: st.DataObject) -> None:
    found = json.loads(REPORT_JSON)
    places = [found, found["passes"][0], found["layers"][3], found["groups"][0], found["summary"]["masked"]]
    places.append(found["stages"][0])
    tables = [schema.SCHEMA, schema.PASS, schema.LAYER, schema.GROUP, schema.VARIANT, schema.STAGE]
    index = data.draw(st.integers(0, len(tables) - 1))
    key = data.draw(st.sampled_from(sorted(tables[index])))
    if data.draw(st.booleans()):
        del places[index][key]
    else:
        places[index][key] = {"neither": "number"} if key not in ("summary", "machine", "model") else 3
    if isinstance(places[index].get(key), dict) and dict in tables[index][key][0]:
        places[index][key] = "no object"
    assert any(key in problem for problem in schema.check_report(found))


REPORT_JSON = json.dumps(schema.document(report_cases.report()))


def test_csv_has_one_line_per_weight(full: Any) -> None:
    rows = list(csv.DictReader(io.StringIO(schema.layers_csv(full))))
    assert [row["name"] for row in rows] == [row.name for row in full.layers]
    packed = next(row for row in rows if row["name"] == "model.layers.0.mlp.up_proj.weight")
    assert (packed["out_features"], packed["in_features"], packed["format"]) == ("48", "32", "csr32")
    assert (packed["shape"], packed["reason"]) == ("48 32", "")
    assert int(packed["nnz"]) == next(r.nnz for r in full.layers if r.name == packed["name"])


def test_a_report_holds_no_tensor(compiled: Any) -> None:
    """It outlives the model, so it must not keep the model's memory."""
    seen: list[Any] = [compiled.sparsec.report()]
    while seen:
        item = seen.pop()
        assert not isinstance(item, torch.Tensor | torch.nn.Module)
        if isinstance(item, tuple | list):
            seen.extend(item)
        elif isinstance(item, dict):
            seen.extend(item.values())
        elif is_dataclass(item):
            seen.extend(getattr(item, f.name) for f in fields(item))


def test_times_of_a_busy_machine_are_marked_at_the_number(full: Any) -> None:
    """A speedup stood in the summary as any other, and the doubt about it stood far below."""
    told = full
    assert told.latency is not None
    busy = replace(told, latency=replace(told.latency, busy_cores=1.0, disturbed=True))
    screen = "\n".join(summary_lines(busy))
    assert re.search(r"\d\.\d\dx\? as fast", screen)
    assert "the machine was busy; measure again idle" in screen
    assert re.search(r"measured speedup, decode .*\dx\? \(", busy.text())
    assert schema.document(busy)["latency"]["disturbed"] is True
    assert not schema.check_report(schema.document(busy))
    assert "?" not in "\n".join(line for line in summary_lines(told) if "speed" in line)


def test_others_are_in_the_way_only_where_they_leave_too_few_cores() -> None:
    assert in_the_way(1.0, threads=2, cores=2)
    assert in_the_way(1.5, threads=1, cores=2)
    assert not in_the_way(0.1, threads=2, cores=2)
    assert not in_the_way(1.0, threads=1, cores=2)
    assert not in_the_way(None, threads=2, cores=2)


def test_busy_cores_are_told_to_the_hundredth_that_the_system_counts_in(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([(0.0, 0.0, 0.0), (0.3, 0.4, 0.07)])
    monkeypatch.setattr(others, "_counts", lambda: next(counts))
    assert others.Others().cores() == 1.1


@pytest.mark.parametrize("name", metrics())
def test_a_metric_is_one_record(name: str, full: Any) -> None:
    """A field of Variant with what it is and how it is shown; the table, the JSON and its schema follow."""
    own, metric = metrics()[name]
    if all(getattr(v, name) is None for v in full.summary.values()):  # of encoders alone
        value = Spread(0.5, 0.25, 0.75, 3) if "Spread" in str(own.type) else 0.5
        full = replace(full, summary={key: replace(v, **{name: value}) for key, v in full.summary.items()})
    found = {key: getattr(v, name) for key, v in full.summary.items()}
    compared = full.text().partition("== Compared")[2]
    (line,) = (line for line in compared.splitlines() if line.startswith(f"{metric.title}  "))
    assert all(metric.show(value).split()[0] in line for value in found.values() if value is not None)
    assert schema.VARIANT[name][1] == metric.doc
    told = {key: each[name] for key, each in schema.document(full)["summary"].items()}
    assert told == {key: value.median if isinstance(value, Spread) else value for key, value in found.items()}


def test_a_layer_that_is_slower_than_dense_says_why(full: Any) -> None:
    row = replace(full.layers[0], speedup_measured=0.7, binds="call", kernel="csr_cpu")
    assert slower([row]) == [
        f"measured slower than dense: {row.name.removesuffix('.weight')}: so small a product is mostly the call of its kernel"
    ]
    assert slower([replace(row, speedup_measured=1.1)]) == []


def test_rows_of_a_sequential_are_named(compiled: Any) -> None:
    """Regression: a row whose role is numbers alone was named `*`."""
    row = compiled.sparsec.report().layers[1]
    names = ["0.weight", "0.bias", "2.bias", "4.0.weight", "layers.0.up.weight", "layers.1.up.weight"]
    rows = [replace(row, name=name, block="", shape=(len(name.split(".")),)) for name in names]
    assert [title for title, _ in by_role(rows)] == ["0", "0.bias .. 2.bias", "4.0", "layers.*.up"]


def test_why_a_weight_is_dense_is_said_once(full: Any) -> None:
    """In the table of layers, which has the figures beside it; the records of the passes keep it."""
    name, why = "model.layers.0.mlp.up_proj.weight", "bitmap predicted 0.9x of that"
    layers = tuple(replace(r, format="dense", reason=why) if r.name == name else r for r in full.layers)
    notes = (f"{name} stays dense: {why}", "another note")
    report = replace(full, layers=layers, passes=(*full.passes[:-1], replace(full.passes[-1], notes=notes)))
    text = " ".join(render(report).split())
    assert text.count(why) == 1
    assert f"dense because: {why}" in text
    assert "another note" in text
    assert why in json.dumps(schema.document(report))
