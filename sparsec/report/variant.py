"""One of the compared models. Each of its figures is one field: type, what it is, how it is shown, where it comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from functools import partial
from typing import Any

from sparsec.console.table import mega, percent, times
from sparsec.evaluate import Encoding, Evaluation
from sparsec.timing.spread import Spread

VARIANTS = {
    "dense": "dense",
    "masked": "masked",
    "dense_on_sparsec": "dense on sparsec's kernels",
    "lowered": "lowered",
}
"""The compared models, by key, as they are shown. dense: as it was loaded. masked: zeros, on torch's kernels, so expected to be as
fast as dense. dense_on_sparsec: no zeros, `fuse,lower(dense)`. lowered: what all the passes made."""


@dataclass(frozen=True)
class Metric:
    """What there is to say of a figure beside its value."""

    doc: str  # in the JSON's schema
    title: str  # of its row in the report
    show: Callable[[Any], str]  # of a value that is known
    measured: Callable[[Evaluation], Any] | None = None
    """Of quality: from the evaluation of dense, or of what was pruned."""
    encoded: Callable[[Encoding], Any] | None = None
    """The same of an encoder."""
    second: bool = False  # of quality: on the second text

    def quality(self, found: Evaluation | Encoding | None) -> Any:
        """Of one model; None where this has no meaning for it, and where nothing was found."""
        if found is None:
            return None
        if isinstance(found, Encoding):
            return None if self.encoded is None else self.encoded(found)
        return None if self.measured is None else self.measured(found)


def short_perplexity(value: float) -> str:
    """Four digits or so."""
    return f"{value:.2f}" if value < 1000 else f"{value:.4g}"


def _spread(unit: str, spread: Spread) -> str:
    digits = 2 if spread.median < 100 else 0
    return f"{spread.median:.{digits}f}{unit} ({spread.lower:.{digits}f}-{spread.upper:.{digits}f})"


def metric(
    doc: str,
    title: str,
    show: Callable[[Any], str],
    measured: Callable[[Evaluation], Any] | None = None,
    encoded: Callable[[Encoding], Any] | None = None,
    second: bool = False,
) -> dict[str, Metric]:
    """The metadata of a field of Variant."""
    return {"metric": Metric(doc, title, show, measured, encoded, second)}


_count, _mb, _speed, _ms = "{:,}".format, mega, partial(_spread, "x"), partial(_spread, "")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One of the compared models, see VARIANTS. Model bytes are found by walking every tensor that it holds.

    Quality is that of the function: measured once for dense, which `dense_on_sparsec` shares, and once for what was pruned, which
    `masked` and `lowered` share. A field with a Metric is in the report's table and in its JSON, in this order.
    """

    parameters: int = field(metadata=metric("dense count", "parameters (zeros included)", _count))
    nnz: int = field(metadata=metric("kept", "kept (nnz)", _count))
    sparsity: float = field(
        init=False,
        metadata=metric(
            "share of zeros among all parameters", "sparsity of all parameters", partial(percent, digits=2)
        ),
    )
    bytes: int = field(metadata=metric("of every tensor held by the model, each storage once", "model bytes, MB", _mb))
    bytes_masks: int = field(metadata=metric("of the masks beside it", "  masks beside it, MB", _mb))
    resident_bytes: int | None = field(
        default=None,
        metadata=metric(
            "that building it added to the process, masks included",
            "resident memory added, MB",
            partial(mega, digits=0),
        ),
    )
    perplexity: float | None = field(
        default=None,
        metadata=metric(
            "see evaluation; measured once for dense (and dense_on_sparsec) and once for what was pruned (masked and lowered); a "
            "number beyond floating point is null",
            "perplexity",
            short_perplexity,
            lambda e: e.perplexity,
        ),
    )
    top1: float | None = field(
        default=None,
        metadata=metric(
            "share of positions at which the most likely next token is that of dense",
            "top-1 agreement with dense",
            "{:.4f}".format,
            lambda e: e.top1,
        ),
    )
    top5: float | None = field(
        default=None,
        metadata=metric(
            "share of positions at which that of dense is among the five most likely",
            "top-5 agreement with dense",
            "{:.4f}".format,
            lambda e: e.top5,
        ),
    )
    kl: float | None = field(
        default=None,
        metadata=metric(
            "KL(dense || this) of the next token, in nats, mean over positions; null where not finite",
            "KL(dense || this), nats",
            "{:.4g}".format,
            lambda e: e.kl,
        ),
    )
    cosine: float | None = field(
        default=None,
        metadata=metric(
            "of encoders, which have no perplexity: the cosine of a window's embedding (mean of the last hidden state over tokens) "
            "and that of dense, mean over windows",
            "cosine of embeddings to dense",
            "{:.4f}".format,
            encoded=lambda e: e.cosine,
        ),
    )
    cosine_min: float | None = field(
        default=None,
        metadata=metric(
            "of the window that is furthest off",
            "  least of a window",
            "{:.4f}".format,
            encoded=lambda e: e.cosine_min,
        ),
    )
    embedding_error: float | None = field(
        default=None,
        metadata=metric(
            "|embedding - that of dense| / |that of dense|, mean over windows",
            "relative error of embeddings",
            "{:.4g}".format,
            encoded=lambda e: e.embedding_error,
        ),
    )
    perplexity_second: float | None = field(
        default=None,
        metadata=metric(
            "as perplexity, on a text that was not trained on, see second; null where no pass trained",
            "perplexity, second text",
            short_perplexity,
            lambda e: e.perplexity,
            second=True,
        ),
    )
    top1_second: float | None = field(
        default=None,
        metadata=metric(
            "as top1, on that text",
            "top-1 agreement, second text",
            "{:.4f}".format,
            lambda e: e.top1,
            second=True,
        ),
    )
    cosine_second: float | None = field(
        default=None,
        metadata=metric(
            "as cosine, on that text", "cosine, second text", "{:.4f}".format, encoded=lambda e: e.cosine, second=True
        ),
    )
    flops_per_token: float | None = field(
        default=None, metadata=metric("as executed", "MFLOP per token", partial(mega, digits=1))
    )
    prefill_ms: Spread | None = field(
        default=None, metadata=metric("median, of one forward", "prefill, ms (quartiles)", _ms)
    )
    window_ms: Spread | None = field(
        default=None, metadata=metric("of encoders: median of one forward of a window", "window, ms (quartiles)", _ms)
    )
    decode_ms: Spread | None = field(
        default=None, metadata=metric("median, per token", "decode, ms per token (quartiles)", _ms)
    )
    speedup_theoretical: float | None = field(
        default=None, metadata=metric("by FLOPs", "theoretical speedup, FLOPs", times)
    )
    speedup_theoretical_bytes: float | None = field(
        default=None, metadata=metric("by model bytes", "theoretical speedup, bytes", times)
    )
    linears_ms: float | None = field(
        default=None,
        metadata=metric(
            "of a decoded token in linear layers, by the cost model",
            "predicted, ms per token in linears",
            "{:.2f}".format,
        ),
    )
    speedup_predicted: float | None = field(
        default=None,
        metadata=metric(
            "of decoding: what the cost model saves, taken from the measured dense time",
            "predicted speedup, decode",
            times,
        ),
    )
    speedup_prefill: Spread | None = field(
        default=None,
        metadata=metric("measured: median over rounds of dense / this", "measured speedup, prefill", _speed),
    )
    speedup_window: Spread | None = field(
        default=None,
        metadata=metric(
            "of encoders, measured: median over rounds of dense / this", "measured speedup, window", _speed
        ),
    )
    speedup_decode: Spread | None = field(
        default=None,
        metadata=metric("measured: median over rounds of dense / this", "measured speedup, decode", _speed),
    )
    zeros_speedup_prefill: Spread | None = field(
        default=None,
        metadata=metric(
            "of lowered, the part that zeros give: median over rounds of dense_on_sparsec / this",
            "  by zeros alone, prefill",
            _speed,
        ),
    )
    zeros_speedup_decode: Spread | None = field(
        default=None, metadata=metric("the same of decoding", "  by zeros alone, decode", _speed)
    )

    @property
    def speedup(self) -> Spread | None:
        """Measured: of decoding, or of an encoder's window; None where neither was timed."""
        return self.speedup_decode or self.speedup_window

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", 1.0 - self.nnz / self.parameters if self.parameters else 0.0)


def metrics() -> dict[str, tuple[Field[Any], Metric]]:
    """By name."""
    return {f.name: (f, f.metadata["metric"]) for f in fields(Variant)}
