"""An end-to-end run as text, JSON (schema `sparsec.bench.end_to_end/2`) and records for CSV."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sparsec.bench.end_to_end import SHARE_TOKENS, AgainstPeer, DecodingEffort, Headline, Mode, against_peers, headlines
from sparsec.bench.steps import Step
from sparsec.console.table import fitted, mega, paragraph, terminal_width, times
from sparsec.machine import Machine
from sparsec.timing.spread import Spread, ratio

SCHEMA = "sparsec.bench.end_to_end/2"
PARTS = ("linears", "lm_head", "attention", "rest")
HEADER = ("mode", "cache", "prefill ms", "quartiles", "speedup", "ms/token", "quartiles", "speedup", "tokens/s")
SHARES_HEADER = (
    "of a token, ms",
    "products",
    "head",
    "attention",
    "rest",
    "around",
    "total",
    "MB read",
    "limit ms",
    "native",
)
PEERS_HEADER = ("mode", "best peer", "its ms/token", "decode", "best peer", "its prefill ms", "prefill")
LEGEND = (
    "Modes take turns in every round; times are medians, speedups medians over rounds of dense eager / this. masked: the zeros of "
    "the first sparse variant on torch's kernels, which skip none. dense on sparsec's kernels: fuse,lower(dense), no zeros; "
    "dense:int8 and dense:int4g64: the same with quantised values. "
    f"Where the time goes, {SHARE_TOKENS} tokens apart from the timed ones: where a token is one native call, the medians of what "
    "its instructions take, and around them Python and the choice of the token; else forward hooks on the eager modes, attention "
    "and rest without the linears inside of them; a model whose attention has no module of that name has it in the rest. MB read: "
    "of weights, for a token. limit: what reading these takes at least, at the bandwidth that python -m sparsec.cost measured here."
)


@dataclass(frozen=True)
class Run:
    """One model in one dtype."""

    model: str
    origin: str
    dtype: str
    effort: DecodingEffort
    modes: tuple[Mode, ...]
    peers: dict[str, str] = field(default_factory=dict)  # versions, by package
    said: tuple[str, ...] = ()  # of peers that are not there, or went, and why


def text(run: Run) -> list[str]:
    """All that is shown of it."""
    effort, base = run.effort, run.modes[0]
    lines = [
        f"{run.model} ({run.origin}), {run.dtype}, prompt of {effort.prompt_tokens} tokens, then {effort.new_tokens} tokens a "
        f"round, {effort.repeats} rounds, batch 1"
    ]
    width, parts = terminal_width(), [_parts(m.name, m.step) for m in run.modes if m.step is not None]
    lines = [*paragraph(lines[0]), *fitted(HEADER, [_cells(base, m) for m in run.modes], width, left=(0, 1)), ""]
    lines += [*fitted(SHARES_HEADER, parts, width), ""]
    for reason, names in _reasons(run.modes).items():
        lines += [*paragraph(f"not one native call, by its own code instead: {', '.join(names)}: {reason}"), ""]
    for h in headlines(run.modes):
        lines += paragraph(_headline(h))
        lines += paragraph(h.sparse.bound or "", "  ")
    if found := against_peers(run.modes, run.dtype):
        lines += ["", *fitted(PEERS_HEADER, [_against(each) for each in found], width, left=(0, 1, 4))]
        lines += paragraph("peers: " + ", ".join(f"{name} {version}" for name, version in run.peers.items()))
    for note in run.said:
        lines += paragraph(note, "peer: ")
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
                "against_peers": [
                    {
                        "mode": a.mode.name,
                        "precision": a.peer.variant.peer,
                        "peer": a.peer.name,
                        "decode_speedup": asdict(a.decode),
                        "prefill_peer": a.prefill_peer.name,
                        "prefill_speedup": asdict(a.prefill),
                    }
                    for a in against_peers(run.modes, run.dtype)
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
            **{f"{part}_ms": _milliseconds(mode, part) for part in (*PARTS, "around")},
            "native": None if mode.step is None else mode.step.native,
            "bytes_per_token": None if mode.step is None else mode.step.nbytes,
            "limit_ms": None if mode.step is None else mode.step.limit_ms,
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


def _against(found: AgainstPeer) -> tuple[str, ...]:
    return (
        found.mode.name,
        found.peer.name,
        *_ratio(found.peer.decode_ms, found.decode),
        found.prefill_peer.name,
        *_ratio(found.prefill_peer.prefill_ms, found.prefill),
    )


def _ratio(peer_ms: Sequence[float], faster: Spread) -> tuple[str, str]:
    return f"{Spread.of(peer_ms).median:.2f}", f"{times(faster.median)} ({faster.lower:.2f}-{faster.upper:.2f})"


def _parts(name: str, step: Step) -> tuple[str, ...]:
    own = step.shares
    spent = [None if own is None else getattr(own, part) for part in (*PARTS, "around", "total")]
    limit = "-" if step.limit_ms is None else f"{step.limit_ms:.2f}"
    return name, *map(_milli, spent), mega(step.nbytes), limit, "yes" if step.native else "no"


def _reasons(modes: Sequence[Mode]) -> dict[str, list[str]]:
    """Why tokens are no native calls -> the modes."""
    found: dict[str, list[str]] = {}
    for mode in modes:
        if mode.step is not None and mode.step.reason:
            found.setdefault(mode.step.reason, []).append(mode.name)
    return found


def _milli(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.2f}"


def _milliseconds(mode: Mode, part: str) -> float | None:
    shares = None if mode.step is None else mode.step.shares
    seconds = None if shares is None else getattr(shares, part)
    return None if seconds is None else 1e3 * seconds


def _spread(name: str, spread: Spread) -> dict[str, float]:
    return {name: spread.median, f"{name}_lower": spread.lower, f"{name}_upper": spread.upper}
