"""Value codecs: how stored values stand for weights. A codec knows nothing of positions, a position format nothing of codecs.

Plain values are the weights themselves, of the dtype of x, bias and result (fp32, bf16, fp16, and fp64 for CSR). In a layout's
string a codec follows a colon; plain values are left out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor


class Codec(ABC):
    """Turns weights into what a position format stores, and back."""

    name: ClassVar[str]
    """In a layout's string, after a colon."""

    @abstractmethod
    def encode(self, weight: Tensor, mask: Tensor) -> Tensor:
        """The codes [out, in] of a weight [out, in] where mask [out, in] is True; others do not matter."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """The weight [out, in] that codes [out, in] stand for; code 0 stands for 0."""

    @abstractmethod
    def dtype(self, stored: torch.dtype) -> torch.dtype:
        """Of x, bias and result, where codes are of the dtype `stored`."""


class Plain(Codec):
    """The weights themselves, bit for bit."""

    name: ClassVar[str] = ""

    def encode(self, weight: Tensor, mask: Tensor) -> Tensor:
        return weight

    def decode(self, codes: Tensor) -> Tensor:
        return codes

    def dtype(self, stored: torch.dtype) -> torch.dtype:
        return stored


PLAIN = Plain()
CODECS: dict[str, Codec] = {codec.name: codec for codec in (PLAIN,)}
