"""Layout: how a matrix is laid out, as one word. Lower, bench, cost model, reports, tests and files all spell it the same.

    csr8 csr16 csr32 csr   bitmap   bsr16x16 bsr   nm2:4 nm   wcsr8 wcsr16   dense

A format without its parameters leaves them to the mask: `nm` reads N and M, `csr` takes the fewest bits that reach all columns.
Values that are not plain follow a colon, `bitmap:int8`, `dense:int4g64` (sparsec/formats/values.py).
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from sparsec.errors import FormatError, OfferedError, SpecError
from sparsec.formats import FORMATS, QUANTISED, kinds, take_offered
from sparsec.formats.base import Packed, Plan
from sparsec.formats.faults import check_pack
from sparsec.formats.parts import DENSE
from sparsec.formats.positions import bits_of
from sparsec.formats.promises import kept, sound
from sparsec.formats.quantised import Quantised
from sparsec.formats.seen import remember
from sparsec.formats.values import Codec, Codes
from sparsec.patterns import Pattern

CALIBRATED = ("int8", "int4g64")
"""Quantised values that the cost model measures; others of as many bits are taken to be alike."""
NEAR = 0.15
"""How far from a wanted sparsity a pattern that fixes its own may be, to stand for it."""
_NUMBER = "(?:0|[1-9][0-9]{0,8})"  # one spelling for one layout; a bound of its own refuses 0
_SPELLING = re.compile(
    rf"(?P<format>[a-z_]+)(?P<parameters>{_NUMBER}(?:x{_NUMBER})*(?::{_NUMBER})?)?(?::(?P<values>[a-z][a-z0-9]*))?"
)


@dataclass(frozen=True)
class Layout:
    """Positions (a format and its parameters) times values (a codec). `str()` of it is what `parse` reads."""

    format: str  # a key of FORMATS, or "dense"
    parameters: str = ""  # 8, 16x16, 2:4; empty where the format has none or leaves them to the mask
    values: str = ""  # the name of a codec; empty where they are plain

    @classmethod
    def parse(cls, text: str, *, offered: bool = True) -> Self:
        """From its spelling. SpecError, with the nearest right one, for what is no layout.

        offered: False imports no formats that packages offer, as a text from a file must not.
        """
        if offered:
            take_offered()
        found = _SPELLING.fullmatch(text) if isinstance(text, str) else None
        name = found["format"] if found is not None else None
        if found is None or name not in (DENSE, *FORMATS):
            near = difflib.get_close_matches(str(text), spellings(offered), n=1, cutoff=0.5)
            hint = f", did you mean {near[0]!r}" if near else ""
            listed = dict.fromkeys((*FORMATS, *spellings(offered)))  # without parameters too: the mask settles them
            raise SpecError(f"{text!r} is no layout{hint}; layouts: {', '.join(listed)}")
        layout = cls(name, found["parameters"] or "", found["values"] or "")
        try:
            layout = replace(layout, values=Codec.parse(layout.values).name)
        except SpecError as error:
            raise SpecError(f"{text!r}: {error}") from error
        if layout.values and name not in QUANTISED:
            held = ", ".join(QUANTISED)
            raise SpecError(f"{text!r}: {name} holds plain values only; layouts with quantised values: {held}")
        if name == DENSE and layout.parameters:
            raise SpecError(f"dense has no parameters, got {text!r}")
        _ = layout.options  # refuses wrong parameters
        return layout

    @classmethod
    def of(cls, packed: Packed) -> Self:
        """That of a packed matrix."""
        # Its format is there: what packages offer is imported for a name alone that nobody knows.
        return cls.parse(packed.describe(), offered=packed.format not in kinds())

    @classmethod
    def candidates(cls, mask: Tensor, device: str, values: str = "") -> Iterator[Self]:
        """Those worth a look for a mask [out, in] on a type of device, where the best is to be chosen. values: of their codec."""
        take_offered()
        for name, kind in (QUANTISED if values else FORMATS).items():
            try:
                found = kept(kind, "candidates", lambda kind=kind: tuple(kind.candidates(mask, device)), tuple)  # type: ignore[misc]
            except OfferedError as error:
                warnings.warn(f"{error}; no layout of it is considered", stacklevel=2)
                continue
            yield from (cls(name, parameters, values) for parameters in found)

    @classmethod
    def calibrated(cls, device: str, sparsity: float) -> Iterator[Self]:
        """Those that the cost model measures at a sparsity on a type of device."""
        take_offered()
        known = [cls(n, p) for n, kind in FORMATS.items() for p in kind.calibrated.get(device, ())]
        known += [
            cls(n, p, v) for n, kind in QUANTISED.items() for p in kind.calibrated.get(device, ()) for v in CALIBRATED
        ]
        for layout in known:
            own = layout.pattern.sparsity
            if own is None or abs(own - sparsity) <= NEAR:
                yield layout

    @classmethod
    def checked(cls) -> tuple[Self, ...]:
        """Those that are compiled ahead of time for GPUs, and checked on them."""
        plain = [cls(n, p) for n, kind in FORMATS.items() for p in kind.checked]
        coded = [cls(n, p, v) for n, kind in QUANTISED.items() for p in kind.checked for v in kind.codecs]
        return (*plain, *coded)

    def __str__(self) -> str:
        return f"{self.format}{self.parameters}{self.values and ':'}{self.values}"

    @property
    def kind(self) -> type[Packed]:
        """The class of its packed matrices. FormatError for plain dense, which packs nothing."""
        if self.values:
            return QUANTISED[self.format]
        if self.stays:
            raise FormatError("dense packs nothing: the weight stays what it is")
        return FORMATS[self.format]

    @property
    def stays(self) -> bool:
        """Whether it packs nothing: dense with plain values."""
        return self.format == DENSE and not self.values

    @property
    def codec(self) -> Codec:
        """How values are stored."""
        return Codec.parse(self.values)

    @cached_property
    def options(self) -> dict[str, Any]:
        """What its format's `pack` and `plan` take. SpecError for parameters that the format does not know."""
        if self.stays:
            return {}
        options = kept(self.kind, "options", lambda: self.kind.options(self.parameters), dict)
        return {**options, "codec": self.codec} if self.values else options

    @property
    def pattern(self) -> Pattern:
        """What a mask must follow; nothing but the free one where any mask can be held."""
        if self.stays:
            return Pattern()
        return kept(self.kind, "pattern", lambda: self.kind.pattern(self.parameters), Pattern)

    @property
    def cost_family(self) -> str:
        """The layouts that share its constants in the cost model."""
        return str(replace(self, parameters="") if not self.stays and self.kind.one_cost else self)

    def plan(self, mask: Tensor, dtype: torch.dtype) -> Plan:
        """What packing a weight of `dtype` with this mask [out, in] would give. FormatError for what `pack` would refuse."""
        plan: Any = self.kind.plan  # type: ignore[attr-defined]
        found: Plan = kept(self.kind, "plan", lambda: plan(mask, dtype, **self.options), Plan)
        return found

    def planned(self, mask: Tensor, dtype: torch.dtype) -> tuple[Layout, Plan]:
        """The layout with the parameters that the mask settles, and its plan. FormatError as there."""
        plan = self.plan(mask, dtype)
        return replace(self, parameters=plan.parameters), plan

    def pack(self, weight: Tensor, mask: Tensor, like: Codes | None = None, digits: int = 2) -> Packed:
        """weight [out, in] where mask [out, in] is True: bit for bit, or in the nearest codes. FormatError for what the layout
        cannot hold. like: of a weight that was rounded before, its codes' scale and table. digits: of a quantised
        matrix."""
        pack: Any = self.kind.pack  # type: ignore[attr-defined]
        options = {**self.options, "like": like, "digits": digits} if self.values else self.options
        packed = sound(kept(self.kind, "pack", lambda: pack(weight, mask, **options), self.kind), tuple(mask.shape))
        if self.kind.__module__.startswith("sparsec."):  # what a stranger's packs is looked at
            remember(packed)
        return packed

    def misfits(self, weight: Tensor, mask: Tensor) -> list[str]:
        """Why a weight [out, in] with this mask cannot be held; empty when it can."""
        try:
            check_pack(self.kind.title, self.kind.dtypes, weight, mask)
            self.plan(mask, weight.dtype)
        except FormatError as error:
            return [str(error)]
        return []

    def sample_mask(self, shape: tuple[int, int], sparsity: float, generator: torch.Generator) -> Tensor:
        """A random mask [out, in], True where kept, that the layout is made for; on the generator's device.

        Blocks and N:M hold their sparsity exactly; SpecError where they do not divide.
        """
        return sample_mask(self.pattern, shape, sparsity, generator)


def sample_mask(pattern: Pattern, shape: tuple[int, int], sparsity: float, generator: torch.Generator) -> Tensor:
    """A random mask [out, in] of a pattern, True where kept, on the generator's device. SpecError where it does not divide."""
    for why in pattern.misfits(*shape):
        raise SpecError(why)
    scores = torch.rand(shape, generator=generator, device=generator.device)
    return scores >= sparsity if pattern == Pattern() else pattern.mask(scores, sparsity)


def for_device(packed: Packed, device: str, before: str = "") -> Packed:
    """The same matrix in the format that a type of device has kernels for; the very same object where it is that already.

    CSR is laid out for one kind of machine. before: the parameters of what `packed` was made from, where another format than it
    holds more (csr32). What comes back is what went: csr8 and -0.0 stay what they are, and as many weights
    are kept; which of the other zeros were kept is not told from padding, so that a zero may count for another one.
    """
    table: Mapping[str, Any] = QUANTISED if isinstance(packed, Quantised) else FORMATS
    kind = table.get(packed.twins.get(device, ""))
    if kind is None or packed.dtype not in kind.dtypes or (kind.widest is not None and packed.shape[1] > kind.widest):
        return packed.ordered(device)
    known = [p for p in (before, Layout.of(packed).parameters) if p in kind.parameters]
    parameters = known[0] if known else ""
    if isinstance(packed, Quantised):
        try:
            return packed.in_format(kind, **kind.options(parameters))
        except FormatError:  # its values need one that is 0.0; whoever multiplies by it says that no kernel does
            return packed.ordered(device)
    dense = packed.unpack()
    kept = bits_of(dense) != 0
    zeros = packed.nnz - int(kept.count_nonzero())
    if zeros:
        kept.view(-1)[(~kept).view(-1).nonzero()[:zeros, 0]] = True
    return Layout(kind.format, parameters).pack(dense, kept)


def spellings(offered: bool = True) -> tuple[str, ...]:
    """Layouts that are often used, for messages and lists."""
    if offered:
        take_offered()
    named = [f"{name}{parameters}" for name, kind in FORMATS.items() for parameters in kind.parameters]
    coded = [f"{name}:{values}" for name in QUANTISED for values in CALIBRATED]
    return (*named, DENSE, *coded)
