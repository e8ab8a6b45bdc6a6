"""An evaluation as text and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sparsec.console.table import heading, paragraph, table
from sparsec.evaluate.compare import Evaluation
from sparsec.evaluate.embeddings import PROTOCOL, Encoding
from sparsec.evaluate.windows import Windows

_DIGITS = 4
_NUMBERS = ("perplexity", "top1", "top5", "kl", "cosine", "cosine_min", "embedding_error")
_SERIES = {
    "window_losses": "losses",
    "window_kls": "kls",
    "loss_by_position": "loss_by_position",
    "kl_by_position": "kl_by_position",
    "top1_by_position": "top1_by_position",
    "window_cosines": "cosines",
    "window_embedding_errors": "errors",
}
_KEYS = {name: name for name in _NUMBERS} | _SERIES
"""Of a model in the JSON, and where they come from."""


def text(found: Mapping[str, Evaluation | Encoding], windows: Windows, notes: Sequence[str]) -> str:
    """Tables for a terminal. found: by model, the reference first; all of one kind."""
    dtypes = ", ".join(dict.fromkeys(e.dtype for e in found.values()))
    lines = heading("Evaluation")
    lines += paragraph(
        f"{windows.text_name} (sha256 {windows.text_sha256[:16]}, {windows.tokens_in_text:,} tokens): {windows.count} windows of "
        f"{windows.length} tokens that do not overlap, {dtypes}; {windows.beginning.protocol}"
    )
    lines += [line for note in notes for line in paragraph(note)]
    letters = {name: chr(ord("A") + i) if i < 26 else str(i) for i, name in enumerate(found)}
    causal = {name: e for name, e in found.items() if isinstance(e, Evaluation)}
    encoders = {name: e for name, e in found.items() if isinstance(e, Encoding)}
    return "\n".join([*lines[1:], *(_causal(causal, letters, windows) if causal else _encoders(encoders, letters))])


def _causal(found: Mapping[str, Evaluation], letters: Mapping[str, str], windows: Windows) -> list[str]:
    rows = [
        (letters[name], name, perplexity(e.perplexity), *_against(e, reference=i == 0))
        for i, (name, e) in enumerate(found.items())
    ]
    lines = ["", *table(("", "model", "perplexity", "top-1", "top-5", "KL, nats"), rows, left=(0, 1))]
    lines += paragraph(
        "perplexity: exp of the mean over windows of the mean loss; against A, at every position: top-1, the most likely next "
        "token is the same; top-5, that of A is among the five most likely; KL(A || model) of the next-token distributions"
    )
    lines += heading("By position in the window")
    names = list(found)
    loss = {f"loss {letters[n]}": found[n].loss_by_position for n in names}
    lines += _by_position(loss, windows.length)
    if names[1:]:
        lines += ["", *_by_position({f"KL {letters[n]}": found[n].kl_by_position for n in names[1:]}, windows.length)]
    return lines


def _encoders(found: Mapping[str, Encoding], letters: Mapping[str, str]) -> list[str]:
    rows = [
        (
            letters[n],
            n,
            *(("-", "-", "-") if i == 0 else (f"{e.cosine:.4f}", f"{e.cosine_min:.4f}", f"{e.embedding_error:.4g}")),
        )
        for i, (n, e) in enumerate(found.items())
    ]
    lines = ["", *table(("", "model", "cosine", "least", "error"), rows, left=(0, 1))]
    return lines + paragraph(
        f"{PROTOCOL}; against A: cosine of the two, its mean over windows and the least; error, |difference| / |A|, mean over "
        "windows. Encoders predict no next token, so there is no perplexity"
    )


def _by_position(columns: Mapping[str, Sequence[float]], length: int) -> list[str]:
    """Means over positions with 1, 2-3, 4-7, ... tokens seen."""
    body = [
        (f"{start + 1}-{end}", *[f"{_mean(values[start:end]):.{_DIGITS}f}" for values in columns.values()])
        for start, end in _buckets(length)
    ]
    return table(("tokens seen", *columns), body)


def document(found: Mapping[str, Evaluation | Encoding], windows: Windows, notes: Sequence[str]) -> dict[str, Any]:
    """For JSON; what is no finite number is null."""
    return {
        "schema": "sparsec.evaluation/1",
        "text": windows.text_name,
        "text_sha256": windows.text_sha256,
        "text_tokens": windows.tokens_in_text,
        "windows": windows.count,
        "window_length": windows.length,
        "bos": windows.beginning.token,
        "protocol": windows.beginning.protocol,
        "notes": list(notes),
        "reference": next(iter(found)),
        "models": {name: _model(e) for name, e in found.items()},
    }


def perplexity(value: float) -> str:
    """Digits enough to compare."""
    return f"{value:.4f}" if value < 1000 else f"{value:.7g}"


def _against(e: Evaluation, reference: bool) -> tuple[str, str, str]:
    return ("-", "-", "-") if reference else (f"{e.top1:.4f}", f"{e.top5:.4f}", f"{e.kl:.4g}")


def _buckets(length: int) -> list[tuple[int, int]]:
    """Positions [start, end) with 1, 2-3, 4-7, ... tokens seen; the last token predicts nothing."""
    ends = [min(2**i, length) - 1 for i in range(1, length.bit_length() + 1)]
    starts = [0, *ends[:-1]]
    return [(a, b) for a, b in zip(starts, ends, strict=True) if a < b]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _model(e: Evaluation | Encoding) -> dict[str, Any]:
    """What has no meaning for a kind of model is null."""
    return {"dtype": e.dtype, **{key: _finite(getattr(e, own, None)) for key, own in _KEYS.items()}}


def _finite(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_finite(each) for each in value]
    return value if value is not None and math.isfinite(value) else None
