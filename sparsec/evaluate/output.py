"""An evaluation as text and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sparsec.console.table import fitted, heading, paragraph, terminal_width
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


Found = Mapping[str, Evaluation | Encoding]
"""By model, the reference first; all of one kind."""
Second = tuple[Windows, Found]
"""The same on a text that was not trained on, where a pass trains."""


def text(found: Found, windows: Windows, notes: Sequence[str], second: Second | None = None) -> str:
    """Tables for a terminal."""
    dtypes = ", ".join(dict.fromkeys(e.dtype for e in found.values()))
    lines = heading("Evaluation")
    lines += paragraph(
        f"{windows.text_name} (sha256 {windows.text_sha256[:16]}, {windows.tokens_in_text:,} tokens): {windows.count} windows of "
        f"{windows.length} tokens that do not overlap, {dtypes}; {windows.beginning.protocol}"
    )
    if second is not None:
        lines += paragraph(
            f"second text, not trained on: {second[0].text_name} (sha256 {second[0].text_sha256[:16]}, "
            f"{second[0].tokens_in_text:,} tokens): {second[0].count} windows of {second[0].length} tokens"
        )
    lines += [line for note in notes for line in paragraph(note)]
    letters = {name: chr(ord("A") + i) if i < 26 else str(i) for i, name in enumerate(found)}
    causal = {name: e for name, e in found.items() if isinstance(e, Evaluation)}
    encoders = {name: e for name, e in found.items() if isinstance(e, Encoding)}
    beside = {} if second is None else {name: _second(e) for name, e in second[1].items()}
    rest = _causal(causal, letters, windows, beside) if causal else _encoders(encoders, letters, beside)
    return "\n".join([*lines[1:], *rest])


def _second(e: Evaluation | Encoding) -> str:
    return perplexity(e.perplexity) if isinstance(e, Evaluation) else f"{e.cosine:.4f}"


def _causal(
    found: Mapping[str, Evaluation], letters: Mapping[str, str], windows: Windows, second: Mapping[str, str]
) -> list[str]:
    rows = [
        (
            letters[name],
            name,
            perplexity(e.perplexity),
            *([second[name]] if second else []),
            *_against(e, reference=i == 0),
        )
        for i, (name, e) in enumerate(found.items())
    ]
    header = ("", "model", "perplexity", *(["second text"] if second else []), "top-1", "top-5", "KL, nats")
    lines = ["", *fitted(header, rows, terminal_width(), left=(0, 1))]
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


def _encoders(found: Mapping[str, Encoding], letters: Mapping[str, str], second: Mapping[str, str]) -> list[str]:
    rows = []
    for i, (n, e) in enumerate(found.items()):
        cells = [f"{e.cosine:.4f}", *([second[n]] if second else []), f"{e.cosine_min:.4f}", f"{e.embedding_error:.4g}"]
        rows.append((letters[n], n, *(["-"] * len(cells) if i == 0 else cells)))
    header = ("", "model", "cosine", *(["second text"] if second else []), "least", "error")
    lines = ["", *fitted(header, rows, terminal_width(), left=(0, 1))]
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
    return fitted(("tokens seen", *columns), body, terminal_width())


def document(found: Found, windows: Windows, notes: Sequence[str], second: Second | None = None) -> dict[str, Any]:
    """For JSON; what is no finite number is null."""
    return {
        "schema": "sparsec.evaluation/1",
        **_on(windows),
        "notes": list(notes),
        "reference": next(iter(found)),
        "models": {name: _model(e) for name, e in found.items()},
        "second": None
        if second is None
        else {**_on(second[0]), "models": {name: _model(e) for name, e in second[1].items()}},
    }


def _on(windows: Windows) -> dict[str, Any]:
    return {
        "text": windows.text_name,
        "text_sha256": windows.text_sha256,
        "text_tokens": windows.tokens_in_text,
        "windows": windows.count,
        "window_length": windows.length,
        "bos": windows.beginning.token,
        "protocol": windows.beginning.protocol,
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
