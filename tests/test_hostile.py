"""Every public function with every hostile value in the place of every argument: it works, or it is refused in words."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import hostile
import hostile_calls
import pytest
from torch import nn

import sparsec
from sparsec import calibrate, cost, data, evaluate, formats, kernels, passes, pipeline
from sparsec.arguments import checked
from sparsec.errors import ArgumentError

TARGETS = hostile_calls.targets()
PUBLIC = (sparsec, data, evaluate, calibrate, cost, kernels, pipeline, passes, formats)


@pytest.fixture(autouse=True)
def _apart(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In a folder of its own, since names are given in the place of files; torch logs what a trace trips over."""
    monkeypatch.chdir(tmp_path_factory.mktemp("apart"))
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.filterwarnings("ignore")
def test_any_value_is_served_or_refused_in_words(name: str, folder: Path) -> None:
    target = TARGETS[name]
    assert hostile.outcome(target, target.arguments()) == ""
    found = []
    for argument in target.arguments().keys() - target.skip:
        for label, value in hostile.values(folder).items():
            if argument not in hostile.CALLBACKS or not isinstance(value, nn.Module):
                said = hostile.outcome(target, target.arguments() | {argument: value})
                found += [f"{argument}={label}: {said}"] if said else []
    assert found == []


@pytest.mark.parametrize("module", PUBLIC, ids=lambda m: m.__name__)
def test_every_public_function_is_in_the_table(module: Any) -> None:
    of_methods = {
        pipeline.Instrument,
        sparsec.Pipeline,
        sparsec.PrintIR,
        sparsec.DumpIR,
        formats.Packed,
        *formats.FORMATS.values(),
    }
    known = {inspect.unwrap(t.function) for t in TARGETS.values()} | hostile_calls.RECORDS | of_methods
    known |= {inspect.unwrap(data.load_model)}  # without its default
    public = {n: inspect.unwrap(getattr(module, n)) for n in module.__all__}
    assert [
        n for n, each in public.items() if (inspect.isclass(each) or inspect.isfunction(each)) and each not in known
    ] == []


@pytest.mark.parametrize("name", TARGETS)
def test_every_argument_of_a_public_function_is_tried(name: str) -> None:
    """Regression: what came to a function later was tried by nobody."""

    def called(target: hostile.Target) -> Any:
        return getattr(inspect.unwrap(target.function), "__func__", inspect.unwrap(target.function))

    calls = [each for each in TARGETS.values() if called(each) == called(TARGETS[name])]
    tried = {argument for each in calls for argument in (*each.arguments(), *each.skip)}
    parameters = inspect.signature(TARGETS[name].function).parameters.values()
    assert {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)} - tried == set()


def test_a_message_names_the_argument_the_rule_and_the_value() -> None:
    @checked
    def f(
        n: int,
        share: float = 0.5,
        words: Sequence[str] = (),
        how: Literal["a", "b"] = "a",
        progress: Callable[[str, int, int], None] | None = None,
    ) -> int:
        return n

    assert f(3) == f(n=3, words=["x"], how="b", progress=lambda what, done, total: None) == 3
    for arguments, message in (
        (("3",), "n must be a whole number, got str '3'"),
        ((True,), "n must be a whole number, got bool True"),
        ((3, "x"), "share must be a number, got str 'x'"),
        ((3, 0.5, "ab"), "words must be a sequence of string, got str 'ab'"),
        ((3, 0.5, [4]), "words must be a sequence of string, got list [4]"),
        ((3, 0.5, (), "c"), "how must be one of 'a', 'b', got str 'c'"),
        ((3, 0.5, (), "a", 3), "progress must be a function of 3 arguments or None, got int 3"),
        ((3, 0.5, (), "a", len), "progress must be a function of 3 arguments or None, got"),
    ):
        with pytest.raises(ArgumentError, match="f: ") as refused:
            f(*arguments)
        assert message in str(refused.value)
    with pytest.raises(TypeError, match="missing"):
        f()
