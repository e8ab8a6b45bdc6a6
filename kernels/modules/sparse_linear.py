"""SparseLinear: the module that takes the place of a linear whose weight has been packed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsec import private
from sparsec.errors import KernelError
from sparsec.formats.base import Packed
from sparsec.formats.parts import format_number
from sparsec.kernels.derivatives import transformed
from sparsec.kernels.fused import alone
from sparsec.kernels.modules.group import Grouped
from sparsec.kernels.modules.packed_layer import PackedLayer
from sparsec.kernels.ops import explain, operator
from sparsec.kernels.registry import Problem, select


class SparseLinear(Grouped, PackedLayer):
    """y = x @ W.T + bias with a packed W [out, in]; x is [..., in] in W's dtype.

    The packed tensors are buffers under the names that the format gives them; the bias stays the given Parameter.
    Gradients flow to x and bias, never to W. Not an nn.Linear, because there is no weight that could be written to: `weight` is
    for reading, and a write to it raises WeightError.

    Of the packed tensors `values` may be written to. Where those that say where values stand (`row_ptr`, `col_idx`, `bits`, ...)
    are written to or replaced, the next call looks at them first: FormatError for what is no valid matrix.

    Activations are assumed finite: at a pruned weight, inf or NaN in x becomes NaN in the result of the reference and of the
    native product of many rows, as in the masked dense model, while the native product of few rows skips it.
    """

    takes_place_of: type[nn.Module] = nn.Linear
    """The class of the dense layer that stood here: nn.Linear, one derived from it, or transformers' Conv1D."""

    def __init__(self, packed: Packed, bias: Tensor | None = None) -> None:
        """Raises KernelError when the format has no operator, or the bias does not fit the matrix."""
        super().__init__()
        if not isinstance(packed, Packed):
            raise KernelError(
                f"SparseLinear takes a packed matrix, such as CSR.pack gives, got {type(packed).__name__}"
            )
        out_features = packed.shape[0]
        if bias is not None and not isinstance(bias, Tensor):
            raise KernelError(f"SparseLinear: bias must be a Tensor or None, got {type(bias).__name__}")
        if bias is not None and (tuple(bias.shape) != (out_features,) or bias.dtype != packed.dtype):
            raise KernelError(
                f"SparseLinear: bias must be {packed.dtype} [{out_features}] as the packed matrix, "
                f"got {bias.dtype} {list(bias.shape)}; convert it with .to(dtype)"
            )
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self._hold(packed, bias)

    def _operator(self, packed: Packed) -> private.OpOverload:
        return operator(packed)

    def _take(self, packed: Packed) -> None:
        super()._take(packed)
        number = format_number(packed.format)
        self._layouts = tuple((number, has_bias, *self._scalar_args) for has_bias in (0, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]. KernelError when x does not fit the weight in size, dtype or device."""
        # torch.compile puts a guard, to be checked at every call, on every attribute that is read: those of the group are not.
        if not torch.compiler.is_dynamo_compiling() and self._group is not None:
            shared = self._group.product(self._index, self, x)
            if shared is not None:
                return shared
        # Looked up in the dictionaries at every call: nn.Module's attribute access costs 1 us a tensor, and a tuple
        # kept from an earlier call would go stale after .to(), load_state_dict(assign=True) or functional_call.
        buffers = self._buffers
        try:
            bias = self._parameters["bias"]
        except KeyError:  # one that torch.nn.utils compute from others
            bias = self.bias
        args = (*[buffers.get(n) for n in self._names], bias, *self._scalar_args)
        out: Tensor
        if torch.compiler.is_compiling():
            out = self._op(x, *args)
            return out
        self._check_quickly()
        try:
            if torch.is_grad_enabled() or transformed():
                out = self._op(x, *args)
            else:
                # Without gradients the operator's autograd layer (in Python, 10 us and more) has nothing to do.
                with private.below_autograd():
                    out = self._op(x, *args)
        except RuntimeError as error:
            explain(self.format, error, x, args)
            raise
        return out

    def part(self) -> tuple[list[Tensor], tuple[int, ...]]:
        """What a group multiplies by for this module. KeyError where it has to compute by itself; FormatError as `check`."""
        if alone(self.format):
            raise KeyError(self.format)
        if not torch.compiler.is_compiling():
            self._check_quickly()
        buffers = self._buffers
        tensors = [buffers[n] for n in self._names]
        bias = self._parameters["bias"]
        if bias is None:
            return tensors, self._layouts[0]
        return [*tensors, bias], self._layouts[1]

    def extra_repr(self) -> str:
        packed = self.packed
        problem = Problem.of(packed)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{packed.describe()}, {packed.sparsity:.1%} zero, {select(problem).name}"
            f"{f', {self.share}' if self.share is not None else ''}"
        )
