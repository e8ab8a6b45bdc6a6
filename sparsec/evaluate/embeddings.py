"""Encoders side by side on the same windows of a text: how near the embeddings of one are to those of the reference.

The embedding of a window is the mean over its tokens of the last hidden state, as sentence-transformers pools unless its model says
otherwise. A head behind the body (masked language modelling, a classifier) is not looked at. Perplexity has no meaning here: an
encoder sees the tokens that it would predict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsec.arguments import checked
from sparsec.errors import DataError
from sparsec.evaluate.compare import check_model
from sparsec.evaluate.saved import Saved
from sparsec.evaluate.windows import Windows
from sparsec.ir.parts import is_encoder
from sparsec.progress import Progress

PROTOCOL = "an embedding is the mean over a window's tokens of the last hidden state"


@dataclass(frozen=True)
class Encoding:
    """What one encoder does on the windows. Of the reference itself, the cosine is 1 and the error 0."""

    cosines: tuple[float, ...]  # per window: of its embedding and the reference's
    errors: tuple[float, ...]  # per window: |embedding - reference's| / |reference's|
    dtype: str  # of the states

    @property
    def windows(self) -> int:
        """That were run."""
        return len(self.cosines)

    @property
    def cosine(self) -> float:
        """Mean over windows."""
        return sum(self.cosines) / len(self.cosines)

    @property
    def cosine_min(self) -> float:
        """Of the window that is furthest off; nan where any is."""
        return float(torch.tensor(self.cosines, dtype=torch.float64).min())

    @property
    def embedding_error(self) -> float:
        """Mean over windows."""
        return sum(self.errors) / len(self.errors)


@runtime_checkable
class Embedder(Protocol):
    """What gives embeddings by itself."""

    def embedding(self, window: Tensor) -> tuple[Tensor, str]:
        """[hidden], and the dtype of the states. window: tokens [length]."""
        ...


@torch.inference_mode()
@checked
def compare_embeddings(
    models: Mapping[str, Any],
    windows: Windows,
    progress: Progress | None = None,
    what: str = "evaluating",
    saved: Saved | None = None,
    seconds: float | None = None,
) -> dict[str, Encoding]:
    """Runs encoders of transformers over the windows, in turn on each.

    models: by name, the reference first. saved, seconds: as in `compare`. Raises DataError for no models, for one that gives no
    hidden states, and for embeddings of different sizes.
    """
    if not models:
        raise DataError("models: at least one is compared, by name, and there is none")
    tallies = {name: _Tally() for name in models}
    done = 0 if saved is None else saved.restore(tallies, windows.count)
    begin = perf_counter()
    for name, model in models.items() if done < windows.count else ():
        if not isinstance(model, Embedder):
            check_model(name, model)
    for index in range(done, windows.count):
        if seconds is not None and index > 0 and perf_counter() - begin > seconds:
            break
        if progress is not None:
            progress(what, index, windows.count)
        reference: Tensor | None = None
        for name, model in models.items():
            found, tallies[name].dtype = embedding(name, model, windows.tokens[index])
            reference = found if reference is None else reference
            if found.shape != reference.shape:
                raise DataError(
                    f"{name}: its embeddings have {len(found)} numbers, those of {next(iter(models))} have {len(reference)}; only "
                    "encoders of one size can be compared"
                )
            tallies[name].add(found, reference)
        if saved is not None:
            saved.keep(tallies, index + 1)
    if progress is not None:
        progress(what, windows.count, windows.count)
    return {name: tally.encoding() for name, tally in tallies.items()}


def embedding(name: str, model: Any, window: Tensor) -> tuple[Tensor, str]:
    """float64 [hidden] on the CPU, and the dtype of the states. DataError for a model that gives no hidden states."""
    if isinstance(model, Embedder):
        return model.embedding(window)
    body = getattr(model, "base_model", model)
    try:
        states = getattr(body(input_ids=window[None].to(next(model.parameters()).device)), "last_hidden_state", None)
    except TypeError as error:
        raise DataError(
            f"{name}: an encoder of transformers is evaluated; {type(model).__name__} is none ({error})"
        ) from error
    if not isinstance(states, Tensor) or states.dim() != 3:
        raise DataError(
            f"{name}: {type(body).__name__} gives no last_hidden_state, so it has no embeddings to compare; measure it by "
            "its own task"
        )
    return states[0].double().mean(dim=0).cpu(), str(states.dtype).removeprefix("torch.")


def left_out(model: Any) -> list[str]:
    """What of an encoder no embedding tells, in words; nothing where there is no head, and of what is no encoder."""
    if not is_encoder(model) or getattr(model, "base_model", model) is model:
        return []
    return [
        f"what the head of {type(model).__name__} makes of the last hidden state is not looked at: it is measured by the task that "
        "it was trained for"
    ]


class _Tally:
    """Of one model, over windows; nothing of it goes by position."""

    def __init__(self) -> None:
        self.windows: list[list[float]] = []  # cosine, error
        self.positions = torch.zeros(3, 0)
        self.dtype = ""

    def add(self, found: Tensor, reference: Tensor) -> None:
        """One window."""
        same = found is reference
        cosine = 1.0 if same else float(F.cosine_similarity(found, reference, dim=0))
        error = 0.0 if same else float((found - reference).norm() / reference.norm())
        self.windows.append([cosine, error])

    def encoding(self) -> Encoding:
        """All windows."""
        cosines, errors = zip(*self.windows, strict=True)
        return Encoding(cosines, errors, self.dtype)
