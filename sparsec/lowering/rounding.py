"""Which quantised values a weight may have: those whose error stays within a bound."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sparsec.formats.quantised import Quantised
from sparsec.formats.values import Codec
from sparsec.ir.facts import Rounded
from sparsec.kernels.registry import Kernel, dispatch

AUTO = "auto"
ORDER = ("int4g64", "int4mg64", "int8", "")
"""What `values='auto'` chooses among, the fewest bits first."""
BOUND = 0.15


def rounding_error(codec: Codec, weight: Tensor, mask: Tensor) -> float:
    """|rounded - weight| / |weight| over what mask [out, in] keeps of weight [out, in]: what random x would see of the outputs.

    FormatError for a weight that holds inf or NaN.
    """
    exact = weight.detach().float().masked_fill(~mask, 0.0)
    rounded = codec.decode(codec.encode(weight, mask))
    size = float(torch.linalg.vector_norm(exact))
    return float(torch.linalg.vector_norm(rounded - exact)) / size if size else 0.0


def admitted(
    values: str, bound: float, weight: Tensor, mask: Tensor, rounded: Rounded | None = None
) -> tuple[tuple[str, ...], str]:
    """The codecs that weight [out, in] may have where mask [out, in] is True, the fewest bits first, and what has to be said of it.

    values: a codec's name, "" for plain values, or `auto`. What a named one would spoil is kept in 8 bits, or plain. rounded: to
    what the weight was rounded before, by which it loses nothing more.
    """
    if not values:
        return ("",), ""
    if rounded is not None and values in (AUTO, rounded.values) and rounded.holds(weight, mask):
        return (rounded.values,), ""
    if values == AUTO:
        wanted = list(ORDER)
    else:
        codec = Codec.parse(values)
        wanted = [values, *([replace(codec, bits=8, middle=False).name] if codec.bits == 4 else []), ""]
    found, refused = [], []
    for name in wanted:
        error = rounding_error(Codec.parse(name), weight, mask) if name else 0.0
        if error <= bound:
            found.append(name)
            if values != AUTO:
                break
        else:
            refused.append(f"{name} would err by {100 * error:.2g}% of the weight")
    said = (
        f"{found[0] or 'plain'} values, since {' and '.join(refused)}, over the bound of {100 * bound:g}%"
        if refused
        else ""
    )
    return tuple(found), said


def digits_said(packed: Quantised, kernel: Kernel) -> str:
    """By how much digits change products with a packed matrix, measured with its kernel on random x; "" where it makes none."""
    if not packed.by_digits or kernel.name != f"{packed.format}_cpu":
        return ""
    x = torch.randn(4, packed.shape[1], generator=torch.Generator().manual_seed(0))
    weight = packed.exact().double()
    exact = x.double() @ weight.t()
    if not bool(exact.any()):
        return ""
    own, rounded = (
        float(torch.linalg.vector_norm(found - exact) / torch.linalg.vector_norm(exact))
        for found in (
            dispatch(x, packed.converted(torch.float32), None).double(),
            x.bfloat16().double() @ weight.t(),
        )
    )
    count = "1 digit" if packed.digits == 1 else f"{packed.digits} digits"
    return f"{count} of each number of x change products by {own:.1e} ({packed.describe()}, random x); bf16 would by {rounded:.1e}"
