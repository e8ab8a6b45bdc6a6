"""From what was built and measured to the figures of each variant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sparsec.evaluate import Encoding, Evaluation
from sparsec.report.collect import Report
from sparsec.report.layer import known_ratio
from sparsec.report.variant import VARIANTS, Variant, metrics
from sparsec.study.variants import Built
from sparsec.timing.latency import Comparison
from sparsec.timing.spread import Spread


def counted(built: Built, measuring: bool, decodes: bool = True) -> dict[str, Variant]:
    final = built.report
    found = {}
    for name in VARIANTS:
        if name not in built.held:
            continue
        own = built.reports.get(name)
        pruned = name in ("masked", "lowered") and own is not None
        flops = final.flops_dense if own is None or name == "dense_on_sparsec" else own.flops_per_token
        if pruned and own is not None and flops is None and not any(row.packed for row in own.layers):
            flops = (
                final.flops_dense
            )  # the pass flops stands behind lower: a masked model executes what a dense one does
        found[name] = Variant(
            parameters=final.parameters,
            nnz=own.nnz if pruned and own is not None else final.parameters,
            bytes=built.held[name],
            bytes_masks=own.bytes_masks if own is not None else 0,
            flops_per_token=flops,
            speedup_theoretical=known_ratio(final.flops_dense, flops),
            speedup_theoretical_bytes=known_ratio(final.bytes_dense, built.held[name]),
            resident_bytes=built.resident.get(name) if measuring else None,
            linears_ms=_linears(final, own if name in ("lowered", "dense_on_sparsec") else None) if decodes else None,
        )
    return found


def _linears(final: Report, own: Report | None) -> float | None:
    return final.linears_dense_ms if own is None else own.linears_ms


def with_measurements(
    variant: Variant,
    name: str,
    evaluations: Mapping[str, Evaluation | Encoding],
    times: Comparison | None,
    longer: Comparison | None,
    dense_linears_ms: float | None,
    second: Mapping[str, Evaluation | Encoding] | None = None,
) -> Variant:
    """times: None leaves all that the clock tells unknown. second: as evaluations, on the second text."""
    if times is not None and name not in times.latencies:
        return variant
    of = "dense" if name in ("dense", "dense_on_sparsec") else "pruned"
    known: dict[str, Any] = {
        key: metric.quality((second or {}).get(of) if metric.second else evaluations[of])
        for key, (_, metric) in metrics().items()
        if metric.measured is not None or metric.encoded is not None
    }
    if times is None:
        return replace(variant, **known)
    decode_ms = times.latencies["dense"].decode_ms
    zeros: tuple[Spread | None, Spread | None] = (None, None)
    if name == "lowered" and "dense_on_sparsec" in times.latencies:
        zeros = times.over("dense_on_sparsec", name)
    return replace(
        variant,
        speedup_predicted=None
        if decode_ms is None
        else _predicted(decode_ms.median, dense_linears_ms, variant.linears_ms),
        **known,
        prefill_ms=times.latencies[name].prefill_ms,
        decode_ms=times.latencies[name].decode_ms,
        speedup_prefill=times.prefill_speedup[name],
        speedup_decode=times.decode_speedup.get(name),
        window_ms=None if longer is None else longer.latencies[name].prefill_ms,
        speedup_window=None if longer is None else longer.prefill_speedup[name],
        zeros_speedup_prefill=zeros[0],
        zeros_speedup_decode=zeros[1],
    )


def _predicted(dense_ms: float, dense_linears_ms: float | None, linears_ms: float | None) -> float | None:
    """Of decoding: what is saved in linear layers, taken from the measured time of the dense model; None where that makes no
    sense, since the model is too small for its linears to be seen."""
    if dense_linears_ms is None or linears_ms is None or dense_ms <= dense_linears_ms - linears_ms:
        return None
    return dense_ms / (dense_ms - dense_linears_ms + linears_ms)
