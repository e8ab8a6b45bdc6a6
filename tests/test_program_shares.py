"""Where a token's time goes: every nanosecond of the program is told once, the bytes are those that a token reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparsec
from sparsec.bench.end_to_end import Mode, Recipe
from sparsec.bench.session import Session
from sparsec.bench.steps import model_bytes, step_of
from sparsec.data.tiny import tiny_model
from sparsec.errors import KernelError
from sparsec.formats.parts import Part, flatten
from sparsec.kernels import status
from sparsec.kernels.chain import CODES, PRODUCT
from sparsec.kernels.program import ATTEND, JOIN, LOOK_UP, TENSOR, VIEW, Program
from sparsec.program import shares
from sparsec.program.decoder import StepForward
from sparsec.program.shares import instructions, step_bytes, step_shares
from sparsec.program.writer import Written

native = pytest.mark.skipif(not status().built, reason="there are no native kernels")


def _compiled(passes: str = "magnitude(0.5),freeze,fuse,lower(bitmap)") -> tuple[Any, Session]:
    model = sparsec.compile(tiny_model(), passes)
    session = Session(model, torch.arange(5)[None], 100)
    session.prefill()
    session.decode(1)
    return model, session


@st.composite
def programs(draw: st.DrawFn) -> tuple[Written, list[tuple[int, int]]]:
    """Code that the native library never sees, and of each instruction its kind and how many tensors it reads."""
    number = st.integers(-5, 200)
    code: list[int] = []
    tensors: list[torch.Tensor] = []
    wanted: list[tuple[int, int]] = []
    kinds = [PRODUCT, LOOK_UP, VIEW, TENSOR, JOIN, ATTEND, *CODES.values()]
    for kind in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=12)):
        own: list[torch.Tensor] = [torch.zeros(1)] if kind == TENSOR else []
        words: list[int] = []
        if kind in (PRODUCT, LOOK_UP):
            biases = draw(st.lists(st.booleans(), min_size=1, max_size=3))
            own, layout = flatten(
                [Part("dense", (torch.zeros(2, 2),), torch.zeros(2) if bias else None) for bias in biases]
            )
            words = [draw(number), len(own), len(layout), *layout]
        elif kind == JOIN:
            joined = draw(st.lists(number, min_size=1, max_size=4))
            words = [len(joined), *joined]
        elif kind != TENSOR:
            words = [draw(number) for _ in range({VIEW: 8, ATTEND: 11}.get(kind, 3))]
        code += (kind, *words)
        tensors += own
        wanted.append((kind, len(own)))
    return Written(tensors, code, [], 0), wanted


@given(programs())
@settings(max_examples=60, deadline=None)
def test_instructions_are_those_that_were_written(program: tuple[Written, list[tuple[int, int]]]) -> None:
    written, wanted = program
    assert [(each.kind, len(each.tensors)) for each in instructions(written)] == wanted
    assert [t for each in instructions(written) for t in each.tensors] == written.tensors


@given(programs(), st.sampled_from(["longer", "tensor", "unknown"]))
@settings(max_examples=30, deadline=None)
def test_code_that_is_none_is_refused(program: tuple[Written, list[tuple[int, int]]], how: str) -> None:
    written, _ = program
    if how == "longer":
        written.code += (VIEW, 1)
    elif how == "tensor":
        written.tensors.append(torch.zeros(1))
    else:
        written.code.append(1000)
    with pytest.raises(KernelError, match="a program"):
        list(instructions(written))


@native
def test_times_go_to_the_part_that_took_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's times are replaced by ones that tell what each instruction is."""
    model, session = _compiled()
    forward = model.forward
    assert isinstance(forward, StepForward)
    kinds = [each.kind for each in instructions(forward.prepared().written) if each.kind != VIEW]  # type: ignore[union-attr]
    products = [i for i, kind in enumerate(kinds) if kind == PRODUCT]
    told = {PRODUCT: 10**6, ATTEND: 10**3}
    given = torch.tensor([told.get(kind, 1) for kind in kinds])
    given[products[-1]] = 10**9
    step = Program.step

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        out = step(self, *args, **options)
        if self._times is not None:
            self._times.copy_(given)
        return out

    monkeypatch.setattr(Program, "step", counted)
    found = step_shares(forward, lambda: session.decode(1), 3)
    assert found is not None
    assert found.lm_head == 1.0
    assert found.linears == pytest.approx(1e-3 * (len(products) - 1))
    assert found.attention == pytest.approx(1e-6 * kinds.count(ATTEND))
    assert found.rest == pytest.approx(1e-9 * (len(kinds) - len(products) - kinds.count(ATTEND)))
    assert found.around is not None
    assert found.total == pytest.approx(found.lm_head + found.linears + found.attention + found.rest + found.around)


@native
def test_the_library_has_a_time_for_every_instruction() -> None:
    model, session = _compiled()
    forward = model.forward
    prepared = forward.prepared()
    count = sum(each.kind != VIEW for each in instructions(prepared.written))
    with prepared._program.timed(torch.zeros(count, dtype=torch.int64)) as times:
        session.decode(1)
    assert (times >= 0).all()
    assert times.sum() > 0
    before = times.clone()
    session.decode(1)
    assert torch.equal(times, before), "only inside"
    assert step_shares(forward, lambda: None, 1) is None, "no step ran"


@native
@pytest.mark.parametrize("passes", ["magnitude(0.5),freeze,fuse,lower(bitmap)", "fuse,lower(dense)"])
def test_bytes_are_those_that_a_token_reads(passes: str) -> None:
    """The embedding of tiny is the head too, so all of the model is read but buffers of positions."""
    model, _ = _compiled(passes)
    held = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    buffers = sum(b.nbytes for n, b in model.named_buffers() if "inv_freq" in n)
    assert sum(held.values()) - buffers <= step_bytes(model.forward.prepared().written) <= sum(held.values())
    assert model_bytes(model) == sum(held.values())


@pytest.mark.parametrize(
    ("passes", "bits"),
    [
        ("fuse,lower(dense)", 0),
        ("magnitude(0.5),freeze,fuse,lower('bitmap:int4g32')", 4),
        ("magnitude(0.5),freeze,lower(bitmap, values='int8')", 8),
        ("magnitude(0.5),freeze,lower(dense, values='int8', targets=('lm_head',)),lower(bitmap)", 0),
        ("magnitude(0.5),freeze,lower(dense, values='int8', targets=('lm_head',)),lower('bitmap:int4g64')", 4),
    ],
)
def test_bits_are_those_of_most_weights(passes: str, bits: int) -> None:
    model, session = _compiled(passes)
    found = step_of(model, session.decode, 1, compiled=False)
    assert found.bits == bits
    wanted = {0: "bf16", 4: "int4", 8: "int8"}[bits]
    assert Mode(Recipe("a mode", passes), False, "dynamic", (1.0,), (1.0,), found).precision("bf16") == wanted


@native
def test_a_table_of_which_a_row_is_read_is_not_counted() -> None:
    model = tiny_model()
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    made = sparsec.compile(model, "fuse,lower(dense)")
    prepared = made.forward.prepared()
    assert prepared is not None
    assert step_bytes(prepared.written) == step_bytes(_compiled("fuse,lower(dense)")[0].forward.prepared().written)


def test_an_embedding_that_no_product_reads_is_not_counted() -> None:
    model = tiny_model()
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    whole = model_bytes(model)
    head.weight = nn.Parameter(head.weight.detach().clone())
    assert model_bytes(model) == whole
    assert table.weight.data_ptr() != head.weight.data_ptr()


@native
def test_a_model_that_no_program_serves_says_why() -> None:
    model = sparsec.compile(tiny_model(), "fuse,lower(dense)")
    own = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: own(x)
    session = Session(model, torch.arange(5)[None], 100)
    session.prefill()
    found = step_of(model, session.decode, 2, compiled=False)
    assert not found.native
    assert found.reason == model.forward.reason()
    assert "a module inside has a forward of its own" in found.reason
    assert found.shares is not None
    assert found.shares.around is None
    model, session = _compiled()
    found = step_of(model, session.decode, 2, compiled=False)
    assert found.native
    assert found.reason == ""
    hook = model.model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.warns(RuntimeWarning, match="hooks"):
        found = step_of(model, session.decode, 2, compiled=False)
    hook.remove()
    assert not found.native
    assert "served no call" in found.reason
    assert shares.step_bytes(model.forward.prepared().written) > 0
