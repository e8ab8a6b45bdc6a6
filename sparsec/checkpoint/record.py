"""What a saved model says of itself in JSON: how each packed matrix lies, and where it comes from. Read with suspicion.

It stands in `config.json` as `quantization_config`. A file's text chooses among fixed tables only: no name in it is imported.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, Self, TypeVar

import torch

from sparsec.errors import CheckpointError, FormatError, SpecError
from sparsec.formats.base import Packed
from sparsec.formats.layout import Layout
from sparsec.transformers_hook import METHOD

T = TypeVar("T")
SCHEMA = "sparsec.checkpoint/1"
PREFIX = "sparsec."
"""Of every tensor's name in the files: no dense model has such names, so that nobody loads half of one without noticing."""
BUFFERS = "sparsec-buffer."
"""In place of PREFIX, of buffers that a module computes when it is made, such as rotary frequencies: they come back as they are."""
DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)} | {
    str(d).removeprefix("torch."): d
    for d in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
}


@dataclass(frozen=True)
class Stored:
    """One packed matrix in a file."""

    layout: str  # as `Layout` spells it
    order: int  # of the values, `Packed.order`
    scalars: Mapping[str, int]
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]  # name -> dtype, shape
    bias: str = ""  # its dtype; "" for none
    reason: str = ""  # why this layout

    @classmethod
    def of(cls, packed: Packed, bias: torch.Tensor | None, reason: str = "") -> Self:
        """Of a matrix that is held."""
        tensors = {n: (dtype_name(t), tuple(t.shape)) for n, t in packed.tensors().items()}
        return cls(
            str(Layout.of(packed)),
            packed.order,
            packed.scalars(),
            tensors,
            "" if bias is None else dtype_name(bias),
            reason,
        )

    @property
    def kind(self) -> type[Packed]:
        """The class of the matrix."""
        return Layout.parse(self.layout, offered=False).kind

    def on_meta(self) -> Packed:
        """The matrix without contents."""
        made = {n: torch.empty(shape, dtype=DTYPES[dtype], device="meta") for n, (dtype, shape) in self.tensors.items()}
        return self.kind.from_parts(made, self.scalars)


@dataclass(frozen=True)
class History:
    """How a model came to be what it is."""

    passes: tuple[Mapping[str, Any], ...] = ()  # spec, name, effect, summary of each that ran
    calibration: Mapping[str, str] = field(
        default_factory=dict
    )  # {"source": in words, "sha256": of the data}, or empty
    reasons: Mapping[str, str] = field(default_factory=dict)  # path of a packed linear -> why this layout
    report: bytes = b""  # the report's JSON document, or empty


@dataclass(frozen=True)
class Record:
    """All that is said of a saved model."""

    files: Mapping[str, Mapping[str, Any]]  # name -> {"sha256": ..., "bytes": ...}
    layers: Mapping[str, Stored]  # by the path of the module that holds it
    dense: Mapping[str, str] | None = (
        None  # every other tensor in the files -> its dtype; None: saved before that was told
    )
    tied: Mapping[str, str] = field(default_factory=dict)  # name -> the name under which the tensor is stored
    dense_kernels: tuple[str, ...] = ()  # paths of linears on sparsec's dense kernel
    groups: tuple[tuple[str, ...], ...] = ()  # paths of linears whose products are one call
    passes: tuple[Mapping[str, Any], ...] = ()
    calibration: Mapping[str, str] = field(
        default_factory=dict
    )  # {"source": in words, "sha256": of the data}, or empty
    report: Mapping[str, Any] = field(default_factory=dict)  # {"file": ..., "sha256": ..., "bytes": ...}, or empty
    unowned: tuple[str, ...] = ()  # tensors of the source that no module owns, and that are therefore not in the files
    versions: Mapping[str, str] = field(default_factory=dict)

    def unpacked(self, named: Mapping[str, T]) -> dict[str, T]:
        """Of what stands by the names of tensors, that of no packed layer."""
        own = {f"{path}.{n}" for path, stored in self.layers.items() for n in (*stored.tensors, "bias")}
        return {n: t for n, t in named.items() if n not in own}

    @property
    def dtype(self) -> torch.dtype | None:
        """In which most of the packed matrices compute; where there is none, that of the first tensor with a point."""
        if kinds := Counter(stored.on_meta().dtype for stored in self.layers.values()):
            return kinds.most_common(1)[0][0]
        dense = (DTYPES.get(name) for name in (self.dense or {}).values())
        return next((dtype for dtype in dense if dtype is not None and dtype.is_floating_point), None)

    def below(self, prefix: str) -> Record:
        """Of the part of the model that stands under a name, as a model of its own. prefix: that name with its dot."""
        cut = len(prefix)
        return replace(
            self,
            layers=below(self.layers, prefix),
            dense=None if self.dense is None else below(self.dense, prefix),
            tied={n: first[cut:] for n, first in below(self.tied, prefix).items() if first.startswith(prefix)},
            dense_kernels=tuple(p[cut:] for p in self.dense_kernels if p.startswith(prefix)),
            groups=tuple(tuple(p[cut:] for p in g) for g in self.groups if all(p.startswith(prefix) for p in g)),
        )

    def without(self, paths: Iterable[str]) -> Record:
        """Of a model whose tied names within these modules are left aside."""
        inside = tuple(f"{path}." for path in paths)
        return replace(self, tied={n: first for n, first in self.tied.items() if not n.startswith(inside)})

    def json(self) -> dict[str, Any]:
        """What `read` takes."""
        layers = {
            path: {
                "layout": s.layout,
                "order": s.order,
                "scalars": dict(s.scalars),
                "tensors": {n: [dtype, list(shape)] for n, (dtype, shape) in s.tensors.items()},
                "bias": s.bias,
                "reason": s.reason,
            }
            for path, s in self.layers.items()
        }
        return {
            "quant_method": METHOD,
            "schema": SCHEMA,
            "versions": dict(self.versions),
            "passes": [dict(p) for p in self.passes],
            "calibration": dict(self.calibration),
            "report": dict(self.report),
            "unowned": list(self.unowned),
            "layers": layers,
            **({} if self.dense is None else {"dense": dict(self.dense)}),
            "tied": dict(self.tied),
            "dense_kernels": list(self.dense_kernels),
            "groups": [list(g) for g in self.groups],
            "files": {name: dict(facts) for name, facts in self.files.items()},
        }

    @classmethod
    def read(cls, found: Any, where: str, faults: list[str] | None = None) -> Self:
        """From `json()`. CheckpointError, naming the place and the rule, for anything else.

        faults: takes what is wrong with an entry, which is left out then.
        """
        reader = _Reader(where, faults)
        top = reader.mapping(found, "quantization_config")
        if top.get("quant_method") != METHOD:
            raise reader.error("quant_method", f"must be {METHOD!r}, got {top.get('quant_method')!r}")
        if top.get("schema") != SCHEMA:
            raise reader.error(
                "schema", f"must be {SCHEMA!r}, got {top.get('schema')!r}; load it with the version that saved it"
            )
        return cls(
            files=dict(reader.entries(top, "files", lambda n, f: (reader.file(n), reader.mapping(f, f"files[{n!r}]")))),
            layers=dict(
                reader.entries(
                    top,
                    "layers",
                    lambda p, s: (reader.text(p, "a path in layers"), reader.stored(s, f"layers[{p!r}]")),
                )
            ),
            dense=reader.part(lambda: reader.texts_by_text(top["dense"], "dense") if "dense" in top else None, None),
            tied=reader.part(lambda: reader.texts_by_text(top.get("tied", {}), "tied"), {}),
            dense_kernels=reader.part(lambda: reader.texts(top.get("dense_kernels", []), "dense_kernels"), ()),
            groups=reader.part(lambda: reader.listed(top, "groups", reader.texts), ()),
            passes=reader.part(lambda: reader.listed(top, "passes", reader.mapping), ()),
            calibration=reader.part(lambda: reader.texts_by_text(top.get("calibration", {}), "calibration"), {}),
            report=reader.part(lambda: reader.report(top.get("report", {})), {}),
            unowned=reader.part(lambda: reader.texts(top.get("unowned", []), "unowned"), ()),
            versions=reader.part(lambda: reader.texts_by_text(top.get("versions", {}), "versions"), {}),
        )


class _Reader:
    """Values of a JSON file, each of the kind that it must be."""

    def __init__(self, where: str, faults: list[str] | None = None) -> None:
        self.where, self.faults = where, faults

    def part(self, read: Callable[[], T], otherwise: T) -> T:
        """What is read; where faults are collected, another value for what cannot be."""
        try:
            return read()
        except CheckpointError as error:
            if self.faults is None:
                raise
            self.faults.append(str(error))
            return otherwise

    def entries(self, top: Mapping[str, Any], what: str, read: Callable[[str, Any], T]) -> Iterator[T]:
        """Of an object, each of its entries that can be read."""
        none: dict[str, Any] = {}
        unread: list[T] = []
        for name, found in self.part(lambda: self.mapping(top.get(what), what), none).items():
            yield from self.part(lambda: [read(name, found)], unread)  # noqa: B023 - called at once

    def listed(self, top: Mapping[str, Any], what: str, read: Callable[[Any, str], T]) -> tuple[T, ...]:
        """Of a list, which may be left out."""
        found = self.sequence(top.get(what, []), what)
        return tuple(read(entry, f"{what}[{i}]") for i, entry in enumerate(found))

    def error(self, what: str, why: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {what} {why}")

    def mapping(self, found: Any, what: str) -> dict[str, Any]:
        if not isinstance(found, dict):
            raise self.error(what, f"must be an object, got {type(found).__name__}")
        return found

    def sequence(self, found: Any, what: str) -> list[Any]:
        if not isinstance(found, list):
            raise self.error(what, f"must be a list, got {type(found).__name__}")
        return found

    def text(self, found: Any, what: str) -> str:
        if not isinstance(found, str):
            raise self.error(what, f"must be a text, got {type(found).__name__}")
        return found

    def texts(self, found: Any, what: str) -> tuple[str, ...]:
        return tuple(self.text(t, f"an entry of {what}") for t in self.sequence(found, what))

    def texts_by_text(self, found: Any, what: str) -> dict[str, str]:
        return {self.text(k, what): self.text(v, f"{what}[{k!r}]") for k, v in self.mapping(found, what).items()}

    def number(self, found: Any, what: str) -> int:
        if type(found) is not int or not 0 <= found < 2**62:
            raise self.error(what, f"must be a whole number from 0, got {found!r}")
        return found

    def file(self, name: Any, what: str = "files", ending: str = ".safetensors") -> str:
        """The name of a file in this very folder."""
        text = self.text(name, f"a name in {what}")
        if text != PurePosixPath(text).name or "\\" in text or text in ("", ".", "..") or not text.endswith(ending):
            raise self.error(what, f"must name {ending} files in the folder itself, got {text!r}")
        return text

    def report(self, found: Any) -> dict[str, Any]:
        given = self.mapping(found, "report")
        if not given:
            return {}
        return {
            "file": self.file(given.get("file"), "report", ".json"),
            "sha256": self.text(given.get("sha256"), "report.sha256"),
            "bytes": self.number(given.get("bytes"), "report.bytes"),
        }

    def stored(self, found: Any, what: str) -> Stored:
        given = self.mapping(found, what)
        spelled = self.text(given.get("layout"), f"{what}.layout")
        try:
            layout = Layout.parse(spelled, offered=False)
            kind = layout.kind
        except (SpecError, FormatError) as error:  # dense packs nothing
            raise self.error(
                f"{what}.layout",
                f"is none that is known: {error}; a format of another package is known once that is imported",
            ) from error
        scalars = {
            n: self.number(v, f"{what}.scalars[{n!r}]") for n, v in self.mapping(given.get("scalars"), what).items()
        }
        if set(scalars) != set(kind.scalar_names):
            raise self.error(f"{what}.scalars", f"must be {', '.join(kind.scalar_names)}, got {', '.join(scalars)}")
        order = self.number(given.get("order"), f"{what}.order")
        if order != kind.order:
            raise self.error(
                f"{what}.order", f"must be {kind.order}, got {order}; load it with the version that saved it"
            )
        tensors = self.mapping(given.get("tensors"), f"{what}.tensors")
        if tuple(tensors) != kind.tensor_names:
            raise self.error(f"{what}.tensors", f"must be {', '.join(kind.tensor_names)}, got {', '.join(tensors)}")
        shapes = {n: self._tensor(t, f"{what}.tensors[{n!r}]") for n, t in tensors.items()}
        bias = self.text(given.get("bias", ""), f"{what}.bias")
        if bias and bias not in DTYPES:
            raise self.error(f"{what}.bias", f"must be a dtype, got {bias!r}")
        return Stored(spelled, order, scalars, shapes, bias, self.text(given.get("reason", ""), f"{what}.reason"))

    def _tensor(self, found: Any, what: str) -> tuple[str, tuple[int, ...]]:
        pair = self.sequence(found, what)
        if len(pair) != 2 or type(pair[0]) is not str or pair[0] not in DTYPES:
            raise self.error(what, f"must be a dtype and a shape, got {found!r}")
        shape = tuple(self.number(n, what) for n in self.sequence(pair[1], what))
        if math.prod(max(n, 1) for n in shape) >= 2**59:  # bytes that no 64 bits count
            raise self.error(what, f"must be a shape that a tensor can have, got {list(shape)}")
        return pair[0], shape


def below(named: Mapping[str, T], prefix: str) -> dict[str, T]:
    """What stands under a name of a module, without it. Names of computed buffers keep what they begin with."""
    found = {}
    for name, value in named.items():
        kind, path = (BUFFERS, name.removeprefix(BUFFERS)) if name.startswith(BUFFERS) else ("", name)
        if path.startswith(prefix):
            found[kind + path.removeprefix(prefix)] = value
    return found


def dtype_name(tensor: torch.Tensor) -> str:
    """A tensor's dtype as it stands in a record."""
    return str(tensor.dtype).removeprefix("torch.")
