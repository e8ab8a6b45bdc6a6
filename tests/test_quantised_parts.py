"""Products of quantised matrices beside others: in a model, in a fused product, under the backend."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import sparsec
from sparsec.formats.layout import Layout
from sparsec.formats.parts import Part, flatten
from sparsec.kernels import SparseLinear
from sparsec.kernels.fused import fused_linear


class Attention(nn.Module):
    """Three products of one value, and one of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(64, 64), nn.Linear(64, 32), nn.Linear(64, 32, bias=False)
        self.o = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.relu(self.q(x) + torch.cat([self.k(x), self.v(x)], -1)))


def lowered(passes: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A compiled model, the dense model of the same weights, and an x."""
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(3, 64)
    compiled = sparsec.compile(model, passes, example_inputs=(x,))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, layer in compiled.named_modules():
            if isinstance(layer, SparseLinear):
                twin.get_submodule(name).weight.copy_(layer.packed.exact())
    return compiled, twin, x


@pytest.mark.parametrize("fuse", ["", "fuse,"])
@pytest.mark.parametrize("layout", ["bitmap, values='int8'", "bsr16x16, values='int8'", "csr8, values='int4g64'"])
def test_products_of_one_value_are_right_where_the_library_knows_no_such_format(fuse: str, layout: str) -> None:
    pattern = ", pattern='block:16x16'" if "bsr" in layout else ""
    compiled, twin, x = lowered(f"magnitude(0.5{pattern}),freeze,{fuse}lower({layout})")
    with torch.no_grad():
        wanted = twin(x)
        torch.testing.assert_close(compiled(x), wanted, rtol=1e-2, atol=1e-2)
        assert ("fused_linear" in str(compiled.sparsec.graph)) == bool(fuse)
        torch.testing.assert_close(compiled.sparsec.graph.module(x), wanted, rtol=1e-2, atol=1e-2)
        fast = torch.compile(compiled, backend="sparsec")
        torch.testing.assert_close(fast(x), wanted, rtol=1e-2, atol=1e-2)
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_fused_product_of_any_formats_is_that_of_its_parts(mode: type) -> None:
    """Regression: the native library refused the number of a format that it does not know."""
    mask = torch.rand(2, 2).repeat_interleave(8, 0).repeat_interleave(16, 1) < 0.6
    packed = [
        Layout.parse(name).pack(torch.randn(16, 32), mask) for name in ("csr8:int8", "bsr8x16:int4g64", "bitmap:int8")
    ]
    packed.append(Layout.parse("wcsr8").pack(torch.randn(16, 32), torch.rand(16, 32) < 0.5))
    packed.append(Layout.parse("bitmap").pack(torch.randn(16, 32), torch.rand(16, 32) < 0.5))
    parts = [Part(p.format, tuple(p.tensors().values()), None, tuple(p.scalars().values())) for p in packed]
    with mode():
        x = torch.randn(3, 32)
        for found, each in zip(fused_linear(x, *flatten(parts)), packed, strict=True):
            torch.testing.assert_close(found, x @ each.exact().t(), rtol=1e-2, atol=1e-2)
