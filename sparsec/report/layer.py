"""One stored weight in a report. Each of its figures is one field: type, what it is, where it comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from typing import Any

from sparsec.cost.model import Roof
from sparsec.ir.facts import Op, Pruned, Weight
from sparsec.ir.graph import Graph


@dataclass(frozen=True)
class Traced:
    """What the figures of a weight are taken from."""

    graph: Graph
    weight: Weight
    ops: list[Op]  # that read it
    expected: tuple[float, Roof, float] | None  # (speedup, the roof that binds, milliseconds), by the cost model


@dataclass(frozen=True)
class Figure:
    """What there is to say of a figure beside its value."""

    doc: str  # in the JSON's schema
    of: Callable[[Traced], Any] | None  # None: computed from other figures, or measured later


def figure(doc: str, of: Callable[[Traced], Any] | None = None) -> dict[str, Figure]:
    """The metadata of a field of LayerRow."""
    return {"figure": Figure(doc, of)}


def _pruned(doc: str, value: Callable[[Pruned], Any]) -> dict[str, Figure]:
    """Of what a pass left; None where none pruned the weight."""
    return figure(doc, lambda s: None if s.weight.pruned is None else value(s.weight.pruned))


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One stored weight. A tied weight is one row, with its other names in `aliases`.

    Every field is in the JSON and the CSV, in this order.
    """

    name: str = field(metadata=figure("of the stored weight", lambda s: s.weight.name))
    aliases: tuple[str, ...] = field(metadata=figure("its other names, where it is tied", lambda s: s.weight.aliases))
    kind: str = field(metadata=figure("linear, conv1d, experts, embedding, bias or other", lambda s: s.weight.kind))
    group: str = field(
        metadata=figure(
            "attention, mlp, experts, router, lm_head, embedding, norm, adapter or other", lambda s: s.weight.group
        )
    )
    shape: tuple[int, ...] = field(metadata=figure("as stored", lambda s: s.weight.shape))
    out_features: int | None = field(
        metadata=figure(
            "of a matrix [out, in]; the length of a vector; null for more dimensions", lambda s: _features(s.weight)[0]
        )
    )
    in_features: int | None = field(metadata=figure("of a matrix; else null", lambda s: _features(s.weight)[1]))
    parameters: int = field(metadata=figure("zeros included", lambda s: s.weight.numel))
    nnz: int = field(metadata=figure("kept by the mask", lambda s: s.graph.kept(s.weight.name)))
    sparsity: float = field(init=False, metadata=figure("share of zeros, 0 to 1"))
    flops_per_token: float | None = field(
        metadata=figure(
            "as executed; a multiply-add is 2", lambda s: total([executed_share(s.weight, op) for op in s.ops])
        )
    )
    flops_dense: float | None = field(
        metadata=figure("as if nothing were zero", lambda s: total([_dense_share(s.weight, op) for op in s.ops]))
    )
    bytes_dense: int = field(metadata=figure("of the dense tensor", lambda s: s.weight.nbytes_dense))
    bytes_held: int = field(metadata=figure("of the tensors held instead, without the mask", lambda s: s.weight.nbytes))
    bytes_mask: int = field(metadata=figure("of the mask, while there is one", lambda s: s.weight.nbytes_mask))
    criterion: str | None = field(
        metadata=figure("the pass that pruned it; null where none did", lambda s: _criterion(s.weight))
    )
    sparsity_target: float | None = field(
        metadata=_pruned("the share of zeros that it was asked to reach", lambda p: p.target)
    )
    block: str | None = field(
        metadata=figure(
            "path of the repeated block that it is in; null outside of the blocks",
            lambda s: next((op.block for op in s.ops), None),
        )
    )
    allocation: str | None = field(
        metadata=_pruned(
            "how the target came to be: uniform, global, owl, alphapruning, sensitivity or table; null where no pass pruned it",
            lambda p: p.allocation,
        )
    )
    allocation_measure: float | None = field(
        metadata=_pruned(
            "of its block, what that was derived from: share of outliers, exponent of the spectra, divergence; else null",
            lambda p: p.measure,
        )
    )
    error_masked: float | None = field(
        metadata=_pruned(
            "of its outputs on sampled calibration tokens: mean square of the change over that of the dense outputs, "
            "by the mask alone",
            lambda p: p.error_masked,
        )
    )
    error: float | None = field(metadata=_pruned("the same with the weights that the pass left", lambda p: p.error))
    format: str = field(metadata=figure("dense, csr16, csr32, ...", lambda s: s.weight.format))
    kernel: str | None = field(metadata=figure("that executes it; null where only torch does", lambda s: _kernel(s)))
    reason: str | None = field(
        metadata=figure("why it is dense, or why lower(auto) chose its format", lambda s: s.weight.reason)
    )
    speedup_theoretical: float | None = field(init=False, metadata=figure("by FLOPs: flops_dense / flops_per_token"))
    speedup_theoretical_bytes: float | None = field(init=False, metadata=figure("bytes_dense / bytes_held"))
    speedup_predicted: float | None = field(
        metadata=figure(
            "by the cost model, one row, of encoders as many as lower(auto) takes; of a fused product, of all its weights together",
            lambda s: None if s.expected is None else s.expected[0],
        )
    )
    binds: str | None = field(
        metadata=figure(
            "the roof that binds by the cost model: bytes, decode, flops or call",
            lambda s: None if s.expected is None else s.expected[1],
        )
    )
    ms_predicted: float | None = field(
        metadata=figure(
            "milliseconds by the cost model as it is executed now; of a fused product, its share by FLOPs",
            lambda s: None if s.expected is None else s.expected[2],
        )
    )
    speedup_measured: float | None = field(
        default=None,
        metadata=figure(
            "one row, of encoders the prompt, against the dense layer, in rotation over all layers; fused ones together"
        ),
    )
    ms_dense: float | None = field(
        default=None,
        metadata=figure("milliseconds measured for the dense layer; of a fused product, its share by FLOPs"),
    )
    ms: float | None = field(default=None, metadata=figure("the same as it is executed now"))
    sensitivity: float | None = field(
        default=None,
        metadata=figure(
            "KL divergence of the model's predictions where this weight alone is pruned, in nats a token; of encoders 1 - cosine"
        ),
    )
    value_bytes: int = field(metadata=figure("of one value", lambda s: s.weight.dtype.itemsize))
    executed: bool = field(metadata=figure("whether the traced call read it", lambda s: bool(s.ops)))
    multiplied: bool = field(
        metadata=figure(
            "whether a linear product multiplies by it; a table too, where it is tied to a head",
            lambda s: s.graph.is_linear(s.weight.name),
        )
    )

    def __post_init__(self) -> None:
        computed = {
            "sparsity": 1.0 - self.nnz / self.parameters if self.parameters else 0.0,
            "speedup_theoretical": known_ratio(self.flops_dense, self.flops_per_token),
            "speedup_theoretical_bytes": known_ratio(self.bytes_dense, self.bytes_held),
        }
        for name, value in computed.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, source: Traced) -> LayerRow:
        """What the graph and the cost model know of a weight."""
        return cls(**{name: f.of(source) for name, (_, f) in figures().items() if f.of is not None})

    @property
    def packed(self) -> bool:
        """Whether it is stored in a sparse format."""
        return self.format != "dense"


def figures() -> dict[str, tuple[Field[Any], Figure]]:
    """By name."""
    return {f.name: (f, f.metadata["figure"]) for f in fields(LayerRow)}


def total(values: list[float | None]) -> float | None:
    """Sum of what is known; None when nothing is."""
    known = [v for v in values if v is not None]
    return sum(known) if known else None


def known_ratio(dense: float | None, now: float | None) -> float | None:
    """dense / now; None where unknown or meaningless."""
    return dense / now if dense and now else None


def executed_share(weight: Weight, op: Op) -> float | None:
    """FLOPs per token of one weight in an op."""
    if not op.members:
        return op.flops if weight.packed is not None else op.flops_dense
    return 2.0 * (weight.numel if weight.packed is None else weight.packed.nnz) if op.flops is not None else None


def _dense_share(weight: Weight, op: Op) -> float | None:
    return 2.0 * weight.numel if op.members and op.flops_dense else op.flops_dense


def _kernel(source: Traced) -> str | None:
    kernels = (op.kernel_of(source.weight.name) for op in source.ops)
    return ", ".join(dict.fromkeys(k for k in kernels if k is not None)) or None


def _criterion(weight: Weight) -> str | None:
    """The pass, and the pattern where there is one."""
    if weight.pruned is None:
        return None
    free = weight.pattern in (None, "unstructured")
    return weight.pruned.criterion if free else f"{weight.pruned.criterion} {weight.pattern}"


def _features(weight: Weight) -> tuple[int | None, int | None]:
    if weight.kind == "conv1d":
        return weight.matrix_shape
    match weight.shape:
        case (out_features,):
            return out_features, None
        case (out_features, in_features):
            return out_features, in_features
    return None, None
