"""`python -m sparsec.generate`: a model continues a text, which is written as it comes, and says how many tokens a second."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch

from sparsec.console.command import DTYPES, check_device, on_device
from sparsec.console.output import guarded, writable, write_text
from sparsec.console.progress import shown_progress
from sparsec.data import LoadedModel
from sparsec.data.tiny import RANDOM
from sparsec.defaults import Effort
from sparsec.errors import DataError
from sparsec.machine import cores
from sparsec.opened import open_model
from sparsec.options.generate import PROG, parser
from sparsec.progress import stage
from sparsec.study.sample import check_prompt, generated, read_prompt
from sparsec.timing.others import Others, in_the_way

COLDEST = 1e-6
"""Of temperatures: by less than this no logit can be divided."""
REPEATED = 16
"""Tokens, from which on a text that is three quarters one of them is called none."""


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Returns the exit code: 0, 2 for bad input, or 130 when interrupted."""
    args = parser(prog).parse_args(argv)
    return guarded(lambda: _run(args), args.traceback, args.json)


def _run(args: argparse.Namespace) -> None:
    _check(args)
    check_device(args.device)
    if args.json is not None:
        writable(args.json)
    text = _prompt(args.prompt)
    if args.threads:
        torch.set_num_threads(args.threads)
    with shown_progress(sys.stderr) as progress, stage(progress, "loading the model"):
        dtype = None if args.dtype is None else DTYPES[args.dtype]
        try:
            loaded = on_device(open_model(args.model, dtype, progress, args.seed), args.device)
        except DataError as error:
            if args.prompt is not None or args.model is None or os.path.exists(args.model):
                raise
            raise DataError(
                f"{error}. If {args.model!r} is the text: MODEL comes before it, {_ordered(args.model)}"
            ) from error
    prompt = read_prompt(check_generates(loaded), text, args.new_tokens, loaded.positions, args.chat)
    torch.manual_seed(args.seed)
    drawn = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p} if args.temperature else {}
    told = Told(loaded.tokenizer)
    try:
        generated(loaded.model, loaded.tokenizer, prompt.tokens, args.new_tokens, told, **drawn)
    finally:
        print("\n".join(["", str(told), *says_little(loaded, told.tokens)]), file=sys.stderr)
    if args.json:
        found = {"model": loaded.name, "source": loaded.source, "prompt": text, "chat": prompt.chat, **told.document()}
        write_text(args.json, json.dumps(found, indent=1) + "\n")


def _check(args: argparse.Namespace) -> None:
    if args.prompt is None and args.model is not None and " " in args.model and not os.path.exists(args.model):
        raise DataError(f"{args.model!r} is read as MODEL, which comes before TEXT: {_ordered(args.model)}")
    if not (args.temperature == 0 or COLDEST <= args.temperature < float("inf")):
        raise DataError(
            f"--temperature must be 0, which takes the most likely token, or at least {COLDEST:g}, got {args.temperature}"
        )
    if not 0 < args.top_p <= 1:
        raise DataError(f"--top-p must be above 0 and at most 1, got {args.top_p}; 1 draws from all tokens")
    if args.top_p < 1 and not args.temperature:
        raise DataError("--top-p chooses what is drawn from, and nothing is drawn; add --temperature 1")


def _ordered(text: str) -> str:
    return f"sparsec generate smollm2 {shlex.quote(text)}"


def _prompt(given: str | None) -> str:
    try:
        text = Effort().prompt if given is None else sys.stdin.read().removesuffix("\n") if given == "-" else given
        check_prompt(text)
        text.encode()
    except UnicodeError as error:  # bytes that are no UTF-8 arrive as surrogates, on the command line too
        raise DataError("the prompt must be UTF-8 text; convert it, with iconv say") from error
    return text


def check_generates(loaded: LoadedModel) -> Any:
    """The tokenizer of a model that writes text. DataError for any other model."""
    kind = type(loaded.model).__name__
    if not loaded.model.can_generate():
        raise DataError(f"{loaded.name}: {kind} writes no text; sparsec evaluate compares the embeddings of encoders")
    if loaded.tokenizer is None:
        raise DataError(
            f"{loaded.name}: there is no tokenizer, so no text can be read or written; add one to its folder, "
            "tokenizer.save_pretrained(folder)"
        )
    return loaded.tokenizer


def says_little(loaded: LoadedModel, tokens: Sequence[int]) -> list[str]:
    """Why what a model wrote is no text, where that is so."""
    if loaded.source.startswith(RANDOM):
        return ["this model has random weights, which nobody trained: what it writes means nothing"]
    if len(tokens) >= REPEATED and Counter(tokens).most_common(1)[0][1] >= 0.75 * len(tokens):
        return ["it writes one token over and over: random weights do that (`tiny` has them), or too much was pruned"]
    return []


class Told:
    """What a model has written so far, and when: transformers calls it with the prompt and then with every token.

    shown: whether to write the text to the standard output as it comes.
    """

    def __init__(self, tokenizer: Any, shown: bool = True) -> None:
        from transformers import TextStreamer

        self._streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if shown else None
        self._tokenizer = tokenizer
        self.prompt_tokens = 0
        self.tokens: list[int] = []
        self.times = [perf_counter()]  # of the start, then of every token
        self._others = Others()

    def put(self, value: torch.Tensor) -> None:
        """The prompt, then a token."""
        if not self.prompt_tokens:
            self.prompt_tokens = value.numel()
        else:
            self.tokens += value.flatten().tolist()
            self.times.append(perf_counter())
        if self._streamer is not None:
            self._streamer.put(value)

    def end(self) -> None:
        """No token comes any more."""
        if self._streamer is not None:
            self._streamer.end()

    @property
    def text(self) -> str:
        """All of it."""
        return str(self._tokenizer.decode(self.tokens, skip_special_tokens=True))

    @property
    def first_seconds(self) -> float | None:
        """From the start to the first token."""
        return self.times[1] - self.times[0] if len(self.times) > 1 else None

    @property
    def tokens_per_second(self) -> float | None:
        """Of those after the first."""
        return (len(self.times) - 2) / (self.times[-1] - self.times[1]) if len(self.times) > 2 else None

    @property
    def disturbed(self) -> bool:
        """Whether other processes left too few cores meanwhile, so that times say little."""
        return in_the_way(self._others.cores(), torch.get_num_threads(), cores())

    def document(self) -> dict[str, Any]:
        """The figures, for JSON."""
        return {
            "text": self.text,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": len(self.tokens),
            "first_token_seconds": self.first_seconds,
            "tokens_per_second": self.tokens_per_second,
            "disturbed": self.disturbed,
        }

    def __str__(self) -> str:
        if self.first_seconds is None:
            return "no token was written"
        speed = "" if self.tokens_per_second is None else f", then {self.tokens_per_second:.1f} tokens/s"
        first = f"the first of {len(self.tokens)} new ones after {self.first_seconds:.2f} s"
        busy = "; the machine was busy, so these times say little" if self.disturbed else ""
        return f"{self.prompt_tokens} tokens of prompt; {first}{speed}{busy}"


if __name__ == "__main__":
    sys.exit(main())
