"""Chains: what the operator computes, which nodes of a graph become one, and attention over a cache beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from architectures import tiny_model
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_inductor import KINDS, WIDTH, member
from torch import Tensor, fx, nn
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import DynamicCache, StaticCache

import sparsec
from sparsec.errors import KernelError
from sparsec.inductor import FuseProducts
from sparsec.inductor.attention import ATTENTION, read_cache_once
from sparsec.kernels import force_isa, status
from sparsec.kernels.attention import decode_attention, reference_attention
from sparsec.kernels.chain import CODES, DTYPES, PRODUCT, chain, reference_chain, single_chain
from sparsec.kernels.library.loader import library

pytestmark = pytest.mark.skipif(not status().built, reason="no native kernels")
ISAS = library().usable if status().built else []


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    force_isa(request.param)
    yield request.param
    force_isa(None)


def near(a: Tensor, b: Tensor) -> None:
    rtol = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[b.dtype]
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol, equal_nan=True)


# ---- the operator ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", range(3))
@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("name", CODES)
def test_every_instruction_computes_what_torch_does(isa: str, name: str, rows: int, dtype: int) -> None:
    """On rows, one row for all, one number a row and a constant, in any order."""
    generator = torch.Generator().manual_seed(rows)
    for width in (1, 7, 40):
        shapes = [(rows, width), (rows, width), (width,), (1, rows, 1), ()]
        inputs = [(torch.rand(s, generator=generator) * 3 + 0.2).to(DTYPES[dtype]) for s in shapes]
        if name not in ("sqrt", "rsqrt"):
            inputs[0] = -inputs[0]
        operands = (0, 1, 2, 3, 4, -1)
        pairs = [(a, b) for a in operands for b in operands if {a, b} & {0, 1}]
        if CODES[name] >= CODES["copy"]:
            pairs = [(0, 0), (1, 1)]
        program = [n for a, b in pairs for n in (CODES[name], dtype, a, b)]
        out = 1 if name in ("mean", "variance") else width
        results = [n for i in range(len(pairs)) for n in (len(inputs) + i, 2, rows, out)]
        arguments: Any = (inputs, [], rows, program, [1.5], results)
        for got, expected in zip(chain(*arguments), reference_chain(*arguments), strict=True):
            assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
            near(got, expected)


@pytest.mark.parametrize("dtype", [1, 2])
def test_what_stays_in_a_chain_is_rounded_to_its_dtype(isa: str, dtype: int) -> None:
    x = torch.rand(2, 40, generator=torch.Generator().manual_seed(dtype)) + 1
    program = [CODES["mul"], dtype, 0, 0, CODES["copy"], 0, 1, 1]
    (got,) = chain([x], [], 2, program, [], [2, 2, 2, 40])
    assert torch.equal(got, (x * x).to(DTYPES[dtype]).float())


@pytest.mark.parametrize(
    ("name", "bound", "relative"), [("exp", 2e-7, True), ("tanh", 4e-7, False), ("erf", 5e-7, False)]
)
def test_functions_are_right_over_their_whole_range(isa: str, name: str, bound: float, relative: bool) -> None:
    x = torch.cat([torch.linspace(-110, 100, 200_001), torch.linspace(-1e-3, 1e-3, 1001)])
    (got,) = chain([x], [], 1, [CODES[name], 0, 0, 0], [], [1, 1, len(x)])
    exact = getattr(x.double(), name)()
    infinite = exact > torch.finfo(torch.float32).max
    assert got[infinite].isinf().all()
    normal = ~infinite & ((exact > 1.2e-38) if relative else torch.ones_like(infinite))
    error = (got - exact).abs() / (exact.abs() if relative else 1.0)
    assert error[normal].max() < bound
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0])
    (ends,) = chain([special], [], 1, [CODES[name], 0, 0, 0], [], [1, 1, 5])
    torch.testing.assert_close(ends, getattr(special, name)(), equal_nan=True)


@settings(max_examples=40, deadline=None)
@given(
    kinds=st.lists(st.tuples(st.integers(0, len(KINDS) - 1), st.booleans()), min_size=1, max_size=4),
    rows=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(ISAS) if ISAS else st.none(),
    seed=st.integers(0, 99),
)
def test_products_in_a_chain_are_those_of_the_reference(kinds, rows: int, dtype, isa: str, seed: int) -> None:
    modules = [member(kind, 20, WIDTH, bias, dtype, seed + i) for i, (kind, bias) in enumerate(kinds)]
    parts = [m.part() for m in modules]
    tensors, layout = [t for p, _ in parts for t in p], [n for _, p in parts for n in p]
    generator = torch.Generator().manual_seed(seed)
    x, scale = (
        torch.randn(rows, WIDTH, generator=generator).to(dtype),
        torch.randn(WIDTH, generator=generator).to(dtype),
    )
    code = DTYPES.index(dtype)
    program = [CODES["mul"], code, 0, 1, PRODUCT, 2, len(tensors), len(layout), *layout, CODES["sigmoid"], code, 3, 3]
    outs = [m.out_features for m in modules]
    results = [n for i, out in enumerate(outs) for n in (3 + i, 2, rows, out)] + [3 + len(outs), 3, 1, rows, outs[0]]
    force_isa(isa)
    try:
        found = chain([x, scale], tensors, rows, program, [], results)
        with torch.no_grad():
            expected = [m(x * scale) for m in modules]
    finally:
        force_isa(None)
    for got, wanted in zip(found, [*expected, expected[0].sigmoid()[None]], strict=True):
        assert got.shape == wanted.shape
        near(got, wanted)


BAD: dict[str, tuple[Any, str]] = {
    "no such instruction": (lambda x, w: ([x], [], 2, [99, 0, 0, 0], [], [1, 2, 2, 8]), "instruction|none"),
    "no such dtype": (lambda x, w: ([x], [], 2, [1, 3, 0, 0], [], [1, 2, 2, 8]), "instruction|none"),
    "no such register": (lambda x, w: ([x], [], 2, [1, 0, 0, 7], [], [1, 2, 2, 8]), "register|none"),
    "no such constant": (lambda x, w: ([x], [], 2, [1, 0, 0, -2], [0.5], [1, 2, 2, 8]), "constant|none"),
    "the program ends": (lambda x, w: ([x], [], 2, [1, 0, 0], [], [0, 2, 2, 8]), "ends early|none"),
    "the layout ends": (lambda x, w: ([x], [w], 2, [0, 0, 1, 2, 0], [], [0, 2, 2, 8]), "ends early|layout|none"),
    "tensors left over": (lambda x, w: ([x], [w], 2, [1, 0, 0, 0], [], [1, 2, 2, 8]), "tensors"),
    "another number of rows": (lambda x, w: ([x], [], 3, [1, 0, 0, 0], [], [1, 2, 2, 8]), "rows"),
    "widths that do not fit": (
        lambda x, w: ([x, x[:, :3].contiguous()], [], 2, [1, 0, 0, 1], [], [2, 2, 2, 8]),
        "go together|size",
    ),
    "a result of another size": (lambda x, w: ([x], [], 2, [1, 0, 0, 0], [], [1, 2, 2, 9]), "numbers|shape"),
    "a dtype that is none": (
        lambda x, w: ([x.double()], [], 2, [1, 0, 0, 0], [], [1, 2, 2, 8]),
        "float32, bfloat16 or float16",
    ),
    "another dtype than the weight's": (
        lambda x, w: ([x.bfloat16()], [w], 2, [0, 0, 1, 2, 0, 0], [], [1, 2, 2, 8]),
        "dtype",
    ),
}


@pytest.mark.parametrize("implementation", [chain, reference_chain], ids=["native", "reference"])
@pytest.mark.parametrize("case", BAD)
def test_a_program_that_is_none_is_refused(case: str, implementation: Any) -> None:
    arguments, message = BAD[case]
    with pytest.raises((RuntimeError, KernelError), match=message):
        implementation(*arguments(torch.ones(2, 8), torch.ones(4, 8)))


# ---- the graph ------------------------------------------------------------------------------------------------------------------


class Soup(nn.Module):
    """Steps on a growing list of values, drawn at random: products, arithmetic, norms, and what no chain can compute."""

    def __init__(self, steps: list[tuple[str, int, int]], dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        self.steps = steps
        self.linears = nn.ModuleList(
            member(kind % len(KINDS), WIDTH, WIDTH, bool(kind % 2), dtype, seed + i)
            for i, (_, kind, _) in enumerate(steps)
        )
        self.norm = nn.LayerNorm(WIDTH, dtype=dtype)

    def forward(self, x: Tensor) -> list[Tensor]:
        values = [x]
        for linear, (step, a, b) in zip(self.linears, self.steps, strict=True):
            first, second = values[a % len(values)], values[b % len(values)]
            if step == "linear":
                values.append(linear(first)[..., :WIDTH] if linear.out_features != WIDTH else linear(first))
            elif step == "norm":
                values.append(self.norm(first))
            elif step == "rms":
                wide = first.float()
                values.append((wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-3)).to(first.dtype))
            elif step == "silu":
                values.append(nn.functional.silu(first) * second)
            elif step == "gelu":
                values.append(nn.functional.gelu(first, approximate="tanh" if b % 2 else "none"))
            elif step == "add":
                values.append(first + 0.5 * second)
            elif step == "middle":
                values.append(first * second.mean(-2, keepdim=True))  # one row for some of the others
            elif step == "broadcast":
                values.append(torch.maximum(first, second[..., :1]) - second.flatten(0, -2)[0])
            else:
                values.append(first.cumsum(-1) / 9 if step == "sum" else first.flip(0))
        return values[1:]


STEPS = ["linear", "linear", "linear", "norm", "rms", "silu", "gelu", "add", "middle", "broadcast", "sum", "flip"]


@settings(max_examples=60, deadline=None)
@example(steps=[("linear", 0, 0), ("middle", 1, 1), ("linear", 2, 0)], shape=(2, 3), dtype=torch.float32, seed=0)
@given(
    steps=st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=12),
    shape=st.sampled_from([(1,), (1, 1), (2, 3), (3, 1), (9,)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_a_graph_of_chains_computes_what_it_did(steps, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    module = Soup(steps, dtype, seed).eval()
    x = torch.randn(*shape, WIDTH).to(dtype)
    with torch.no_grad():
        traced = make_fx(module, decomposition_table=select_decomp_table())(x)
        for node in list(traced.graph.nodes):
            if node.target is torch.ops.aten.linear.default:
                node.target, node.args = torch.ops.sparsec.dense_linear.default, (*node.args, None)[:3]
        expected = traced(x)
        FuseProducts()(traced.graph)
        traced.graph.lint()
        traced.recompile()
        found = traced(x)
    kinds = [n.target for n in traced.graph.nodes]
    if x.numel() // WIDTH > 8:
        assert not {chain, single_chain} & set(kinds)
    elif steps[0][0] == "linear" and any(
        step in ("silu", "gelu") and a % (i + 1) == 1 for i, (step, a, _) in enumerate(steps)
    ):
        assert chain in kinds or single_chain in kinds
    for got, wanted in zip(found, expected, strict=True):
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        scale = wanted.abs().amax().float().item() if wanted.numel() else 1.0
        tolerance = (5e-2 if dtype == torch.bfloat16 else 1e-4) * max(1.0, scale)
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=tolerance, equal_nan=True)


def test_what_a_product_needs_as_its_weight_is_computed_before_the_chain() -> None:
    graph = fx.Graph()
    x, w, b = graph.placeholder("x"), graph.placeholder("w"), graph.placeholder("b")
    dense = torch.ops.sparsec.dense_linear.default
    first = graph.call_function(dense, (x, w, None))
    bias = graph.call_function(torch.ops.aten.mul.Tensor, (b, 2.0))
    act = graph.call_function(torch.ops.aten.relu.default, (first,))
    second = graph.call_function(dense, (act, w, bias))
    weight = graph.call_function(torch.ops.aten.add.Tensor, (second, w))
    third = graph.call_function(dense, (second, weight, bias))
    last = graph.call_function(torch.ops.aten.neg.default, (third,))
    graph.output((last, bias))
    module = fx.GraphModule({}, graph)
    arguments = torch.randn(1, 4), torch.randn(4, 4), torch.randn(4)
    for node, value in zip((x, w, b), arguments, strict=True):
        node.meta["val"] = value.to("cpu")
    for node in (first, bias, act, second, weight, third, last):
        node.meta["val"] = node.target(*fx.map_arg(node.args, lambda n: n.meta["val"]))
    FuseProducts()(graph)
    graph.lint()
    module.recompile()
    found = module(*arguments)
    assert sum(n.target in (chain, single_chain) for n in graph.nodes) == 2
    torch.testing.assert_close(found[0], last.meta["val"])
    torch.testing.assert_close(found[1], arguments[2] * 2)


# ---- attention ------------------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(0, 3),
    shared=st.integers(1, 3),
    copies=st.integers(1, 7),
    length=st.sampled_from([1, 5, 63, 64, 65, 200]),
    width=st.sampled_from([1, 8, 16, 64, 72, 80]),
    value_width=st.sampled_from([1, 16, 64, 80]),
    mask=st.sampled_from(["none", "scores", "per head", "blind"]),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(ISAS) if ISAS else st.none(),
    seed=st.integers(0, 99),
)
def test_attention_is_that_of_the_reference(
    batch, shared, copies, length, width, value_width, mask, dtype, isa, seed
) -> None:
    generator = torch.Generator().manual_seed(seed)
    heads = shared * copies
    q = torch.randn(batch, heads, 1, width, generator=generator).to(dtype)
    k = torch.randn(batch, length, shared, width, generator=generator).to(dtype).transpose(1, 2)
    v = torch.randn(batch, shared, length, value_width, generator=generator).to(dtype)
    masks = {
        "none": None,
        "scores": torch.randn(1, 1, 1, length, generator=generator),
        "per head": torch.where(torch.rand(batch, heads, 1, length, generator=generator) > 0.3, 0.0, -torch.inf).to(
            dtype
        ),
        "blind": torch.full((batch, 1, 1, length), -torch.inf),
    }
    force_isa(isa)
    try:
        found = decode_attention(q, k, v, masks[mask], width**-0.5)
    finally:
        force_isa(None)
    near(found, reference_attention(q, k, v, masks[mask], width**-0.5))


def test_attention_that_does_not_fit_is_refused() -> None:
    q, k = torch.randn(1, 6, 1, 8), torch.randn(1, 4, 5, 8)
    for call in (decode_attention, reference_attention):
        with pytest.raises((RuntimeError, KernelError), match=r"decode_attention: .*(heads|go together)"):
            call(q, k, k, None, 1.0)
    with pytest.raises(RuntimeError, match="the mask must be"):
        decode_attention(q, k[:, :3], k[:, :3], torch.zeros(1, 1, 1, 4), 1.0)


@pytest.mark.parametrize("change", ["none", "causal", "prompt", "sums"])
def test_only_attention_of_one_query_per_head_is_rewritten(change: str) -> None:
    queries = 2 if change == "prompt" else 1

    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
        many = [t[:, :, None].expand(-1, -1, 3, -1, -1).reshape(2, 6, 9, 16) for t in (k, v)]
        if change == "causal":
            return ATTENTION(q, *many, 0.0, True)[0]
        both = ATTENTION(q, *many, attn_mask=mask)
        return both if change == "sums" else both[0]

    arguments = (torch.randn(2, 6, queries, 16), *torch.randn(2, 2, 2, 9, 16), torch.randn(2, 1, 1, 9))
    traced = make_fx(forward, tracing_mode="fake")(*arguments)
    expected = traced(*arguments)
    read_cache_once(traced.graph)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    rewritten = [n for n in traced.graph.nodes if n.target is decode_attention]
    assert len(rewritten) == (change == "none")
    if rewritten:
        assert [n.meta["val"].shape[1] for n in rewritten[0].args[1:3]] == [2, 2]  # nothing is copied for every head
    torch.testing.assert_close(traced(*arguments), expected)


# ---- models -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-neox", "gpt2"])
def test_a_model_decodes_as_it_did_in_one_call_between_two_attentions(name: str) -> None:
    model, call = tiny_model(name)
    compiled = sparsec.compile(model, "magnitude(0.5),freeze,fuse,lower(bitmap)")
    inputs = call(1, 6)["input_ids"]
    torch.compiler.reset()

    def decode(forward: Any) -> list[Tensor]:
        cache = StaticCache(config=model.config, max_cache_len=16)
        outs = []
        with torch.no_grad():
            compiled(inputs[:, :4], past_key_values=cache, use_cache=True)
            for i in (4, 5):
                outs.append(forward(inputs[:, i : i + 1], past_key_values=cache, use_cache=True).logits.clone())
        return outs

    expected = decode(compiled)
    found, code = run_and_get_code(lambda: decode(torch.compile(compiled, backend="sparsec")))
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    text = "".join(code)
    layers = model.config.num_hidden_layers
    assert (
        text.count("torch.ops.sparsec.chain.default(") + text.count("torch.ops.sparsec.single_chain.default(") >= layers
    )
    assert text.count("torch.ops.sparsec.decode_attention.default(") in (
        layers,
        2 * layers,
    )  # compiled again for another position
    assert "_scaled_dot_product" not in text.replace("cpp_fused__scaled", "")
    assert "sparsec.inference_" not in text


def test_a_cache_that_grows_is_left_to_inductor() -> None:
    """Its length is no number in the graph that is compiled for the second token."""
    model, call = tiny_model("llama")
    compiled = sparsec.compile(model, "magnitude(0.5),freeze,fuse,lower(bitmap)")
    inputs = call(2, 8, padded=2)
    torch.compiler.reset()

    def decode(forward: Any) -> list[Tensor]:
        cache, outs = DynamicCache(config=model.config), []
        with torch.no_grad():
            for begin, end in ((0, 4), (4, 5), (5, 6), (6, 7), (7, 8)):
                mask = inputs["attention_mask"][:, :end]
                step = compiled if begin == 0 else forward
                outs.append(step(inputs["input_ids"][:, begin:end], attention_mask=mask, past_key_values=cache).logits)
        return outs

    expected = decode(compiled)
    for got, wanted in zip(decode(torch.compile(compiled, backend="sparsec")), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
