"""Language models side by side on the same windows of a text.

Perplexity as in the SparseGPT and Wanda papers' code: mean cross-entropy over the length - 1 shifted tokens of a window; exp of the
mean over windows. Against the reference, at every position: whether the most likely next token is the same (top-1), whether the
reference's is among the model's five most likely (top-5), and KL(reference || model) of the two distributions in nats.

A part of one window's logits is in memory at a time (logits.py), of every model the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsec.arguments import checked, shown
from sparsec.errors import DataError
from sparsec.evaluate.logits import Partwise, logits_in_parts, part_rows
from sparsec.evaluate.saved import Saved
from sparsec.evaluate.windows import Windows
from sparsec.ir.parts import is_encoder
from sparsec.metrics import in_parts, kl_rows
from sparsec.progress import Progress

TOP = 5


@dataclass(frozen=True)
class Evaluation:
    """What one model does on the windows. Of the reference itself, agreement is 1 and divergence 0."""

    losses: tuple[float, ...]  # per window: mean negative log-likelihood in nats
    kls: tuple[float, ...]  # per window: mean KL(reference || model) in nats
    top1s: tuple[float, ...]  # per window: share of positions
    top5s: tuple[float, ...]
    loss_by_position: tuple[float, ...]  # [length - 1], of the prediction of the token after each position
    kl_by_position: tuple[float, ...]  # [length]
    top1_by_position: tuple[float, ...]
    dtype: str  # of the logits

    @property
    def perplexity(self) -> float:
        """exp of the mean loss; inf where that overflows, nan where the model gives nan."""
        mean = _mean(self.losses)
        return math.exp(mean) if mean < 700 or math.isnan(mean) else math.inf

    @property
    def windows(self) -> int:
        """That were run."""
        return len(self.losses)

    @property
    def kl(self) -> float:
        """Mean over all positions of all windows."""
        return _mean(self.kls)

    @property
    def top1(self) -> float:
        """Share of all positions at which the most likely next token is the reference's."""
        return _mean(self.top1s)

    @property
    def top5(self) -> float:
        """Share of all positions at which the reference's most likely next token is among the model's five."""
        return _mean(self.top5s)


@torch.inference_mode()
@checked
def compare(
    models: Mapping[str, Any],
    windows: Windows,
    progress: Progress | None = None,
    what: str = "evaluating",
    saved: Saved | None = None,
    seconds: float | None = None,
) -> dict[str, Evaluation]:
    """Runs causal language models (a call gives `.logits` [1, length, vocabulary]) over the windows, in turn on each.

    models: by name, the reference first. saved: takes over the windows that it holds, and gets every one that is done. seconds: no
    window but the first begins after so many; `losses` tells how many were run.
    Raises DataError for no models, and for models of different vocabularies.
    """
    if not models:
        raise DataError("models: at least one is compared, by name, and there is none")
    tallies = {name: _Tally(windows.length) for name in models}
    done = 0 if saved is None else saved.restore(tallies, windows.count)
    begin = perf_counter()
    for name, model in models.items() if done < windows.count else ():
        check_model(name, model)
        if is_encoder(model):
            raise DataError(
                f"{name}: {type(model).__name__} is an encoder and sees the tokens that it would predict, so perplexity has no "
                "meaning for it; compare_embeddings tells how near its embeddings are to those of another"
            )
    for index in range(done, windows.count):
        if seconds is not None and index > 0 and perf_counter() - begin > seconds:
            break
        if progress is not None:
            progress(what, index, windows.count)
        window = windows.tokens[index]
        rows = part_rows(next(iter(models.values())), len(window))
        parts = [
            logits_in_parts(name, model, window.to(next(model.parameters()).device), rows)
            for name, model in models.items()
        ]
        measured = {name: torch.zeros(len(_Tally.NAMES), len(window)) for name in models}
        place = 0
        for found in zip(*parts, strict=True):
            reference, here = found[0], slice(place, place + len(found[0]))
            for (name, out), logits in zip(measured.items(), found, strict=True):
                if reference.shape != logits.shape:
                    raise DataError(
                        f"{name}: its vocabulary is {logits.shape[-1]}, that of {next(iter(models))} is {reference.shape[-1]}; "
                        "only models with the same tokens can be compared"
                    )
                same = logits is reference
                out[:, here] = _rows(logits, window[place + 1 : here.stop + 1], None if same else reference)
                tallies[name].dtype = str(logits.dtype).removeprefix("torch.")
            place = here.stop
            del found, reference, logits  # before the next ones are computed
        for name, out in measured.items():
            tallies[name].add(out)
        if saved is not None:
            saved.keep(tallies, index + 1)
    if progress is not None:
        progress(what, windows.count, windows.count)
    return {name: tally.evaluation() for name, tally in tallies.items()}


@checked
def evaluate(model: Any, windows: Windows, progress: Progress | None = None, what: str = "evaluating") -> Evaluation:
    """One model, by itself."""
    return compare({"model": model}, windows, progress, what)["model"]


def check_model(name: str, model: Any) -> None:
    """DataError for what has no weights or cannot be called, and for an encoder-decoder."""
    weights = getattr(model, "parameters", None)
    called = callable(model) and not isinstance(model, type | torch.jit.ScriptModule)
    if not (called or isinstance(model, Partwise)) or not callable(weights) or next(model.parameters(), None) is None:
        raise DataError(f"{name}: a language model (a torch.nn.Module with weights) is evaluated, got {shown(model)}")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise DataError(
            f"{name}: {type(model).__name__} is an encoder-decoder model, whose predictions need two texts; only causal language "
            "models and encoders are evaluated here. Compile its parts (model.get_encoder()), and measure the whole by its own task"
        )


def _rows(logits: Tensor, targets: Tensor, reference: Tensor | None) -> Tensor:
    """Loss, KL, top-1 and top-5 of each row of logits, float32 [4, rows].

    targets: the token that follows each row; the last row of a window has none, and a loss of 0. reference: logits to compare with;
    None for the reference itself, whose KL is 0 and whose agreement is 1.
    """
    found = torch.ones(4, len(logits))
    found[:2] = 0
    found[0, : len(targets)] = token_losses(logits[: len(targets)], targets.to(logits.device)).cpu()
    if reference is not None:
        reference = reference.to(logits.device)
        found[1] = kl_rows(reference, logits).cpu()
        first, among = agreement(logits, reference)
        found[2], found[3] = first.cpu(), among.cpu()
    return found


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of the target [rows] of each row in nats, float32 [rows].

    logits [rows, vocabulary] of any float dtype.
    """
    losses = torch.empty(len(targets), device=logits.device)
    for rows, wanted, found in in_parts(logits, targets, losses, vocabulary=logits.shape[-1]):
        found.copy_(F.cross_entropy(rows.float(), wanted, reduction="none"))
    return losses


def agreement(logits: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Per row whether the most likely token is the reference's, and whether that is among the TOP most likely; bool [rows].

    logits, reference: [rows, vocabulary]. NaN is not among them.
    """
    first, among = (torch.empty(len(logits), dtype=torch.bool, device=logits.device) for _ in range(2))
    for rows, others, equal, near in in_parts(logits, reference, first, among, vocabulary=logits.shape[-1]):
        wanted = others.argmax(dim=-1)
        equal.copy_(rows.argmax(dim=-1) == wanted)
        value = rows.gather(1, wanted[:, None])
        above = (rows <= value).logical_not_().sum(dim=-1)
        near.copy_((above < TOP) & ~value[:, 0].isnan())
    return first, among


class _Tally:
    """Sums of one model over windows."""

    NAMES = ("losses", "kls", "top1s", "top5s")

    def __init__(self, length: int) -> None:
        self.windows: list[list[float]] = []  # of NAMES
        self.positions = torch.zeros(
            3, length, dtype=torch.float64
        )  # loss (its last unused), KL, top-1: sums over windows
        self.dtype = ""

    def add(self, found: Tensor) -> None:
        """One window. found: loss (its last unused), KL, top-1 and top-5 of each row [4, length]."""
        self.positions += found[:3].double()
        losses, *others = found.double()
        self.windows.append([float(each.mean()) for each in (losses[:-1], *others)])

    def evaluation(self) -> Evaluation:
        """Means."""
        means = (self.positions / len(self.windows)).tolist()
        columns = {n: tuple(w[i] for w in self.windows) for i, n in enumerate(self.NAMES)}
        return Evaluation(
            **columns,
            loss_by_position=tuple(means[0][:-1]),
            kl_by_position=tuple(means[1]),
            top1_by_position=tuple(means[2]),
            dtype=self.dtype,
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
