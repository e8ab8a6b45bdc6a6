"""An end-to-end run as text, JSON (schema `sparsec.bench.end_to_end/1`) and records for CSV."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sparsec.bench.end_to_end import SHARE_TOKENS, DecodingEffort, Headline, Mode, headlines
from sparsec.console.table import paragraph, table, times
from sparsec.machine import Machine
from sparsec.timing.spread import Spread, ratio

SCHEMA = "sparsec.bench.end_to_end/1"
HEADER = ("mode", "cache", "prefill ms", "quartiles", "speedup", "ms/token", "quartiles", "speedup", "tokens/s")
SHARES_HEADER = ("of a token, ms", "linears", "lm_head", "attention", "rest", "total")
LEGEND = (
    "Modes take turns in every round; times are medians, speedups medians over rounds of dense eager / this. masked: the zeros of "
    "the first sparse variant on torch's kernels, which skip none. dense on sparsec's kernels: fuse,lower(dense), no zeros; "
    "dense:int8 and dense:int4g64: the same with quantised values. "
    f"Where the time goes: forward hooks on the eager modes, {SHARE_TOKENS} tokens, apart from the timed ones; attention and rest "
    "are without the linears inside of them; a model whose attention has no module of that name has it in the rest."
)


@dataclass(frozen=True)
class Run:
    """One model in one dtype."""

    model: str
    origin: str
    dtype: str
    effort: DecodingEffort
    modes: tuple[Mode, ...]


def text(run: Run) -> list[str]:
    """All that is shown of it."""
    effort, base = run.effort, run.modes[0]
    lines = [
        f"{run.model} ({run.origin}), {run.dtype}, prompt of {effort.prompt_tokens} tokens, then {effort.new_tokens} tokens a "
        f"round, {effort.repeats} rounds, batch 1"
    ]
    lines = [*paragraph(lines[0]), *table(HEADER, [_cells(base, m) for m in run.modes], left=(0, 1)), ""]
    shown = [(m.name, m.shares) for m in run.modes if m.shares is not None]
    parts = [
        (name, *(_milli(s) for s in (own.linears, own.lm_head, own.attention, own.rest, own.total)))
        for name, own in shown
    ]
    lines += [*table(SHARES_HEADER, parts), ""]
    for h in headlines(run.modes):
        lines += paragraph(_headline(h))
        lines += paragraph(h.sparse.bound or "", "  ")
    return [*lines, "", *paragraph(LEGEND)]


def document(runs: Sequence[Run], found: Machine) -> str:
    """JSON: `machine`, and for each of `runs` its `modes` with all rounds in milliseconds, and its `headlines`."""
    content = {
        "schema": SCHEMA,
        "machine": asdict(found),
        "runs": [
            {
                **asdict(run),
                "modes": [{"name": m.name, "tokens_per_second": m.tokens_per_second, **asdict(m)} for m in run.modes],
                "headlines": [
                    {
                        "variant": h.variant.name,
                        "sparse": h.sparse.name,
                        "dense": h.dense.name,
                        "decode_speedup": asdict(h.decode),
                        "prefill_speedup": asdict(h.prefill),
                        "zeros_decode_speedup": None if h.zeros is None else asdict(h.zeros),
                    }
                    for h in headlines(run.modes)
                ],
            }
            for run in runs
        ],
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def records(run: Run) -> list[dict[str, Any]]:
    """One for each mode, in milliseconds."""
    base = run.modes[0]
    return [
        {
            "model": run.model,
            "dtype": run.dtype,
            "prompt_tokens": run.effort.prompt_tokens,
            "mode": mode.name,
            "passes": mode.variant.passes,
            "cache": mode.cache,
            **_spread("prefill_ms", Spread.of(mode.prefill_ms)),
            **_spread("prefill_speedup", ratio(base.prefill_ms, mode.prefill_ms)),
            **_spread("decode_ms", Spread.of(mode.decode_ms)),
            **_spread("decode_speedup", ratio(base.decode_ms, mode.decode_ms)),
            "tokens_per_second": mode.tokens_per_second,
            **{f"{part}_ms": _milliseconds(mode, part) for part in ("linears", "lm_head", "attention", "rest")},
        }
        for mode in run.modes
    ]


def _cells(base: Mode, mode: Mode) -> tuple[str, ...]:
    prefill, decode = Spread.of(mode.prefill_ms), Spread.of(mode.decode_ms)
    return (
        mode.name,
        mode.cache,
        f"{prefill.median:.2f}",
        f"{prefill.lower:.2f}-{prefill.upper:.2f}",
        times(ratio(base.prefill_ms, mode.prefill_ms).median),
        f"{decode.median:.2f}",
        f"{decode.lower:.2f}-{decode.upper:.2f}",
        times(ratio(base.decode_ms, mode.decode_ms).median),
        f"{mode.tokens_per_second:.1f}",
    )


def _headline(h: Headline) -> str:
    zeros = (
        ""
        if h.zeros is None
        else f"; zeros alone, over dense of the same values on sparsec's kernels: decode {times(h.zeros.median)}"
    )
    return (
        f"{h.variant.name}: decode {times(h.decode.median)} ({h.decode.lower:.2f}-{h.decode.upper:.2f}), {h.sparse.name} "
        f"{h.sparse.tokens_per_second:.1f} tokens/s against {h.dense.name} {h.dense.tokens_per_second:.1f}; prefill "
        f"{times(h.prefill.median)} ({h.prefill.lower:.2f}-{h.prefill.upper:.2f}){zeros}"
    )


def _milli(seconds: float | None) -> str:
    return "n/a" if seconds is None else f"{1e3 * seconds:.2f}"


def _milliseconds(mode: Mode, part: str) -> float | None:
    seconds = None if mode.shares is None else getattr(mode.shares, part)
    return None if seconds is None else 1e3 * seconds


def _spread(name: str, spread: Spread) -> dict[str, float]:
    return {name: spread.median, f"{name}_lower": spread.lower, f"{name}_upper": spread.upper}
