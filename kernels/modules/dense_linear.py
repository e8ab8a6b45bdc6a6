"""DenseLinear: an nn.Linear whose product is computed by sparsec's own dense kernel where that one can."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsec import private
from sparsec.formats.parts import DENSE, FORMAT_NUMBERS
from sparsec.kernels.dense import NAME, check_dense_call, dense_linear, native_serves
from sparsec.kernels.derivatives import transformed
from sparsec.kernels.modules.group import Grouped

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernel serves."""
_LAYOUTS = tuple((FORMAT_NUMBERS[DENSE], has_bias) for has_bias in (0, 1))


class DenseLinear(Grouped, nn.Linear):
    """y = x @ weight.T + bias, as nn.Linear, with the Parameters of the nn.Linear that it takes the place of.

    Parameters are shared, not copied: tied weights stay tied and the state_dict stays what it was. The product is torch's own
    where a gradient may be asked for, under autocast and torch.export, on other devices than the CPU, for other types than
    fp32, bf16 and fp16, and without the native library.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        if not torch.compiler.is_dynamo_compiling() and self._group is not None:
            shared = self._group.product(self._index, self, x)
            if shared is not None:
                return shared
        # From the dictionary: nn.Module's attribute access costs 1 us a tensor.
        parameters = self._parameters
        try:
            weight, bias = parameters["weight"], parameters["bias"]
        except KeyError:  # one that torch.nn.utils compute from others
            return F.linear(x, self.weight, self.bias)
        assert weight is not None
        if (
            torch.compiler.is_exporting()
            or torch.is_grad_enabled()
            or (not torch.compiler.is_compiling() and transformed())
            or not x.is_cpu
            or weight.dtype not in DTYPES
            or private.any_autocast()
            or not weight.is_contiguous()
        ):
            return F.linear(x, weight, bias)
        if torch.compiler.is_compiling():  # which cannot look past the operator, nor at what the library serves
            compiled: Tensor = dense_linear(x, weight, bias)
            return compiled
        if not native_serves(NAME):
            return F.linear(x, weight, bias)
        try:
            with private.below_autograd():
                out: Tensor = dense_linear(x, weight, bias)
        except RuntimeError:
            check_dense_call(x, weight, bias)  # says it better than the native library
            raise
        return out

    def part(self) -> tuple[list[Tensor], tuple[int, ...]]:
        """What a group multiplies by for this module."""
        parameters = self._parameters
        weight, bias = parameters["weight"], parameters["bias"]
        assert weight is not None
        return ([weight], _LAYOUTS[0]) if bias is None else ([weight, bias], _LAYOUTS[1])
