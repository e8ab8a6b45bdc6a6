"""What a report will measure, checked before anything slow runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsec.data import LoadedModel, Text
from sparsec.defaults import ALONE, Effort
from sparsec.errors import DataError
from sparsec.evaluate import Windows, cut, cut_second
from sparsec.study.sample import Prompt, read_prompt
from sparsec.timing.turns import WARM_UP

DEFAULT_LENGTH = 512


@dataclass(frozen=True, eq=False)
class StudyPlan:
    """What will be measured on what, checked before anything slow runs."""

    windows: Windows
    timed: torch.Tensor  # the prompt of the timing: token ids [1, prompt tokens]
    prompt: Prompt | None  # of the sample; None where the model writes no text
    effort: Effort
    alone: Windows | None = None  # for the sensitivity of each weight; None where it is not asked for
    second: Windows | None = None  # of a text that was not trained on, where a pass trains


def plan(loaded: LoadedModel, text: Text, effort: Effort, bos: bool = True, second: Text | None = None) -> StudyPlan:
    """bos: as in `cut`. second: another text, of which as many windows are taken as there are, or as of the first.

    An encoder has no prompt to continue.

    Raises DataError when the model has no tokenizer, or the text, the prompt or the model's positions do not suffice.
    """
    if loaded.tokenizer is None:
        raise DataError(
            f"{loaded.name}: there is no tokenizer, so no text can be evaluated; add one, or use --no-measure"
        )
    limit = loaded.positions
    length = effort.length or min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH)
    windows = cut(text, loaded.tokenizer, length, effort.windows, limit, bos)
    other = None if second is None else cut_second(second, loaded.tokenizer, length, effort.windows, limit, bos)
    alone = None
    if effort.sensitivity:
        short = min(ALONE, limit or ALONE)
        alone = cut(text, loaded.tokenizer, short, effort.sensitivity, limit, bos)
    tokens = windows.tokens.flatten()
    if effort.prompt_tokens > len(tokens):
        raise DataError(
            f"a prompt of {effort.prompt_tokens} tokens is cut from the {len(tokens)} evaluated ones; "
            f"take a shorter prompt, or more or longer windows"
        )
    if limit is not None and effort.prompt_tokens > limit:
        raise DataError(
            f"a prompt of {effort.prompt_tokens} tokens needs as many positions, the model has {limit}; take fewer"
        )
    if loaded.is_encoder:
        return StudyPlan(windows, tokens[: effort.prompt_tokens][None], None, effort, alone, other)
    needed = effort.prompt_tokens + WARM_UP + max(effort.repeats, effort.new_tokens) + 1
    if limit is not None and needed > limit:
        raise DataError(
            f"prompt and decoded tokens need {needed} positions, the model has {limit}; take fewer of either"
        )
    prompt = read_prompt(loaded.tokenizer, effort.prompt, effort.new_tokens, limit)
    return StudyPlan(windows, tokens[: effort.prompt_tokens][None], prompt, effort, alone, other)
