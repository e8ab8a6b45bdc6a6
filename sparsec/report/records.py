"""What a report holds: plain facts, ready to be printed or written. Nothing here measures or prints.

Conventions: sparsity is the share of zeros by mask, never by looking for values that are 0. A multiply-add is 2 FLOPs, and FLOPs
are per token. Bytes are those of the tensors held. None means: not known, because the pass or measurement that tells did not run.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sparsec.machine import Machine
from sparsec.pipeline.base import PassRecord
from sparsec.report.layer import LayerRow, total
from sparsec.report.variant import Variant
from sparsec.report.views import LayerView


@dataclass(frozen=True)
class GroupRow:
    """The weights and ops of one group. FLOPs go by the op: a tied head's product counts under lm_head, its weight under
    embedding."""

    group: str
    parameters: int
    nnz: int
    flops_per_token: float | None
    flops_dense: float | None
    bytes_dense: int
    bytes_held: int
    share: float  # of all parameters

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return 1.0 - self.nnz / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class ModelFacts:
    """The model that was compiled."""

    name: str
    architecture: str
    source: str
    source_precision: str
    dtype: str
    encoder: bool = False  # encodes text, and generates none: there is no decoding, perplexity or sample


@dataclass(frozen=True)
class EvaluationFacts:
    """What a perplexity, or the cosine of embeddings, was computed on."""

    text: str
    text_sha256: str
    text_tokens: int
    windows: int
    window_length: int
    dtype: str
    bos: str | None = None  # what every window begins with
    protocol: str = ""  # of that, in words


@dataclass(frozen=True)
class LatencyFacts:
    """How latency was measured."""

    prompt_tokens: int
    threads: int
    prefill_repeats: int  # rounds that were run: fewer than asked for where the time budget ended
    decode_repeats: int | None  # None of encoders
    busy_cores: float | None = None  # by others meanwhile; None where the system does not tell
    disturbed: bool = False  # they left too few for the threads: the times are marked with `?`
    window_tokens: int | None = None  # of encoders, and the rounds of it
    window_repeats: int | None = None


@dataclass(frozen=True)
class Roofs:
    """What this machine reaches, with all threads, by what the cost model measured."""

    bytes_per_second: float  # plain reading from memory
    flops_per_second: float  # of the fastest kernel at many rows


@dataclass(frozen=True)
class Stage:
    """One part of the work that takes time, and how much of what was wanted fitted into its share of the time budget."""

    name: str
    seconds: float
    done: int | None = None  # of `wanted`; None where nothing is counted
    wanted: int | None = None
    unit: str = ""  # windows, rounds, ...

    @property
    def cut(self) -> bool:
        """Whether less was done than wanted."""
        return self.done is not None and self.wanted is not None and self.done < self.wanted


@dataclass(frozen=True)
class Sample:
    """A greedy continuation of one prompt."""

    prompt: str
    chat: bool  # went through the model's chat template
    new_tokens: int
    texts: dict[str, str]  # by variant, and by the specification of what was measured beside it


@dataclass(frozen=True)
class ReportData:
    """A whole report. The parts that need a measurement are None where nothing was measured."""

    passes: tuple[PassRecord, ...]
    layers: tuple[LayerRow, ...]
    groups: tuple[GroupRow, ...]
    bytes_buffers: int  # beside the weights: rotary tables, position numbers, ...
    linears_dense_ms: float | None = None  # per decoded token, by the cost model, with F.linear
    linears_ms: float | None = None  # as they are executed now
    flops_without_weights: float | None = None  # per token: attention scores and values
    notes: tuple[str, ...] = ()
    machine: Machine | None = None
    model: ModelFacts | None = None
    summary: dict[str, Variant] = field(default_factory=dict)  # by key of VARIANTS, in that order
    in_turn: bool = True  # False: variants were measured one after another, since memory does not hold them together
    stages: tuple[Stage, ...] = ()  # in order: how long each took, and what was sampled
    evaluation: EvaluationFacts | None = None
    latency: LatencyFacts | None = None
    sample: Sample | None = None
    remarks: tuple[str, ...] = ()  # on how it was measured
    beside: dict[str, float] = field(
        default_factory=dict
    )  # perplexity on the same windows by other passes; of encoders the cosine
    second: EvaluationFacts | None = None  # where a pass trained: of a text that was not trained on
    beside_second: dict[str, float] = field(default_factory=dict)  # as `beside`, on that text
    roofs: Roofs | None = None
    views: tuple[LayerView, ...] = ()  # of what was pruned, where they were asked for
    decoding: str | None = None  # what computes a token, of a lowered model on a CPU that writes text

    @property
    def encoder(self) -> bool:
        """Of what kind the model is."""
        return self.model is not None and self.model.encoder

    @property
    def doubt(self) -> str:
        """What stands behind a measured time: `?` where the machine was busy."""
        return "?" if self.latency is not None and self.latency.disturbed else ""

    @property
    def parameters(self) -> int:
        """Dense count, tied weights once."""
        return sum(row.parameters for row in self.layers)

    @property
    def nnz(self) -> int:
        """Of all weights."""
        return sum(row.nnz for row in self.layers)

    @property
    def sparsity(self) -> float:
        """Share of zeros among all parameters."""
        return 1.0 - self.nnz / self.parameters if self.parameters else 0.0

    @property
    def bytes_dense(self) -> int:
        """Of all tensors if no weight were packed, masks left out."""
        return sum(row.bytes_dense for row in self.layers) + self.bytes_buffers

    @property
    def bytes_held(self) -> int:
        """Of all tensors, masks left out."""
        return sum(row.bytes_held for row in self.layers) + self.bytes_buffers

    @property
    def bytes_masks(self) -> int:
        """Of the masks that are still there."""
        return sum(row.bytes_mask for row in self.layers)

    @property
    def flops_dense(self) -> float | None:
        """Per token, of all groups."""
        return total([row.flops_dense for row in self.groups])

    @property
    def flops_per_token(self) -> float | None:
        """Per token, as executed, of all groups."""
        return total([row.flops_per_token for row in self.groups])
