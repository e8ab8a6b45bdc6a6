"""Every kind of derivative of every product is that of the dense masked twin, or refused; none is zero in silence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from format_cases import LAYOUTS, some
from torch import Tensor, nn

import sparsec
from sparsec.errors import KernelError
from sparsec.formats.parts import FORMAT_NUMBERS
from sparsec.kernels import SparseLinear
from sparsec.kernels.attention import decode_attention
from sparsec.kernels.chain import chain, single_chain
from sparsec.kernels.dense import dense_linear
from sparsec.kernels.fused import fused_linear, inference_linear, inference_single
from sparsec.kernels.modules.dense_linear import DenseLinear

Function = Callable[[Tensor], Tensor]
torch.manual_seed(0)
X, T = torch.randn(2, 3, 32), torch.randn(2, 3, 32)


def cubed(f: Function) -> Function:
    return lambda x: (f(x) ** 3).sum()


def dual(f: Function) -> Tensor:
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(f(forward_ad.make_dual(X, T))).tangent
        return torch.zeros(()) if out is None else out


def twice(f: Function) -> Tensor:
    x = X.clone().requires_grad_()
    (first,) = torch.autograd.grad(cubed(f)(x), x, create_graph=True)
    return torch.autograd.grad((first * T).sum(), x)[0]


def grad(f: Function) -> Tensor:
    x = X.clone().requires_grad_()
    return torch.autograd.grad(cubed(f)(x), x)[0]


KINDS: dict[str, Callable[[Function], Tensor]] = {
    "backward": grad,
    "double backward": twice,
    "dual": dual,
    "func.jvp": lambda f: torch.func.jvp(f, (X,), (T,))[1],
    "func.grad": lambda f: torch.func.grad(cubed(f))(X),
    "func.vjp": lambda f: torch.func.vjp(cubed(f), X)[1](torch.tensor(2.0))[0],
    "func.grad of grad": lambda f: torch.func.grad(lambda x: (torch.func.grad(cubed(f))(x) * T).sum())(X),
    "forward over reverse": lambda f: torch.func.jvp(torch.func.grad(cubed(f)), (X,), (T,))[1],
    "reverse over forward": lambda f: torch.func.grad(lambda x: torch.func.jvp(cubed(f), (x,), (T,))[1])(X),
    "jacrev": lambda f: torch.func.jacrev(f)(X[0, 0]),
    "jacfwd": lambda f: torch.func.jacfwd(f)(X[0, 0]),
    "vmap": lambda f: torch.vmap(f, in_dims=1)(X),
    "vmap of grad": lambda f: torch.vmap(torch.func.grad(cubed(f)))(X),
}


def agree(kind: str, ours: Function, twin: Function) -> None:
    want = KINDS[kind](twin)
    assert want.abs().max() > 0
    modes = (torch.enable_grad,) if "backward" in kind else (torch.enable_grad, torch.no_grad)
    for mode in modes:
        with mode():
            torch.testing.assert_close(KINDS[kind](ours), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_has_the_derivatives_of_its_dense_twin(kind: str) -> None:
    for name in ("csr8", "csr16", "bitmap", "bsr16x16", "nm2:4", "wcsr8"):
        packed, dense = some(LAYOUTS[name], 16, 32, 0.5, torch.float32)
        bias = torch.randn(16)
        module = SparseLinear(packed, bias)
        agree(kind, lambda x, m=module: m(x), lambda x, w=dense, b=bias: F.linear(x, w, b))
    tensors, layout = list(packed.tensors().values()), [FORMAT_NUMBERS["wcsr"], 1, *packed.scalars().values()]
    both, words = [*tensors, bias, dense], [*layout, FORMAT_NUMBERS["dense"], 0]
    agree(kind, lambda x: fused_linear(x, both, words)[0], lambda x: F.linear(x, dense, bias))
    agree(kind, lambda x: fused_linear(x, both, words)[1], lambda x: F.linear(x, dense))
    agree(kind, lambda x: dense_linear(x, dense, bias), lambda x: F.linear(x, dense, bias))
    linear = nn.Linear(32, 16).requires_grad_(False)
    agree(kind, DenseLinear(linear), linear)


@pytest.mark.parametrize("kind", ["dual", "func.jvp", "func.grad", "vmap"])
def test_a_fused_model_has_the_derivatives_of_its_twin(kind: str) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 16), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * self.b(x)

    spec = "magnitude(0.5,targets='*'),freeze"
    torch.manual_seed(1)
    model = Pair().eval()
    twin = sparsec.compile(model, spec, example_inputs=X)
    agree(kind, sparsec.compile(model, spec + ",fuse,lower(csr)", example_inputs=X), twin)


def test_packed_values_have_no_derivative_of_any_kind() -> None:
    module = SparseLinear(some(LAYOUTS["csr16"], 16, 32, 0.5, torch.float32)[0])

    def of_values(values: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"values": values}, (X,)).sum()

    v = module.values
    for ask in (
        lambda: of_values(v.clone().requires_grad_()),
        lambda: torch.func.grad(of_values)(v),
        lambda: torch.func.jvp(of_values, (v,), (v,)),
    ):
        with pytest.raises(KernelError, match="packed values are constants"):
            ask()


def test_operators_of_compiled_graphs_refuse_every_derivative() -> None:
    packed, _ = some(LAYOUTS["csr16"], 32, 32, 0.5, torch.float32)
    tensors, layout = list(packed.tensors().values()), [FORMAT_NUMBERS["csr"], 0, *packed.scalars().values()]
    program, row = [0, 0, 3, len(layout), *layout], X[0, :1]
    k = torch.randn(1, 2, 5, 16)
    for name, call in {
        "chain": lambda x: chain([x], tensors, 1, program, [], [1, 2, 1, 32])[0],
        "single_chain": lambda x: single_chain([x], tensors, 1, program, [], [1, 2, 1, 32]),
        "inference_linear": lambda x: inference_linear(x, tensors, layout)[0],
        "inference_single": lambda x: inference_single(x, tensors, layout),
        "decode_attention": lambda x: decode_attention(x.view(1, 2, 1, 16), k, k, None, 1.0),
    }.items():
        with torch.no_grad():
            assert call(row).abs().max() > 0
        for ask in (
            lambda call=call: call(row.clone().requires_grad_()),
            lambda call=call: torch.func.grad(lambda x: call(x).sum())(row),
            lambda call=call: torch.func.jvp(call, (row,), (row,)),
            lambda call=call: torch.vmap(call)(row[None]),
        ):
            with pytest.raises(KernelError, match=f"^{name}: has no derivative"):
                ask()
