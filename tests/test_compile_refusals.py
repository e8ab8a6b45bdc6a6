"""What compile() refuses, before anything is changed, and with which words."""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock
from typing import ClassVar

import pytest
import torch
from architectures import tiny_model
from torch import nn
from torch.nn.utils import prune

import sparsec
from sparsec.data import load_model
from sparsec.errors import (
    CompileError,
    MaskError,
    PipelineError,
    SelectionError,
    SpecError,
    TraceError,
    VerifyError,
    WeightError,
)
from sparsec.pipeline import Context, Effect, Pass, PassResult


class Locked(nn.Module):
    """Cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = Lock()


SPEC = "magnitude(0.4),freeze,sparsity,flops,lower(csr)"


@pytest.mark.parametrize(
    ("build", "passes", "error", "message"),
    [
        (lambda: "gpt2", None, CompileError, "got str; load a folder or hub id first: sparsec.data.load_model"),
        (lambda: load_model("tiny"), None, CompileError, "got LoadedModel; give its .model"),
        (lambda: nn.LayerNorm(4), None, CompileError, "no linear layer whose weight is a plain parameter"),
        (lambda: nn.ReLU(), None, CompileError, "no parameters"),
        (lambda: torch.compile(nn.Linear(4, 4)), None, CompileError, "went through torch.compile"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), "magnitud(0.5)", SpecError, "did you mean 'magnitude'"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), "magnitude(0.5),lower(csr)", PipelineError, "needs 'frozen'"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), "magnitude(1.5)", SpecError, r"in \[0, 1\)"),
        (lambda: nn.Sequential(nn.Linear(4, 4)).to(torch.float8_e4m3fn), SPEC, sparsec.SparsecError, "float8_e4m3fn"),
        (lambda: nn.Sequential(nn.Linear(4, 4)).to("meta"), SPEC, CompileError, "0.weight is on the meta device"),
        (lambda: nn.Sequential(prune.identity(nn.Linear(4, 4), "weight")), SPEC, CompileError, r"prune\.remove"),
        (
            lambda: nn.Sequential(nn.Linear(4, 4)).append(Locked()),
            SPEC,
            CompileError,
            "cannot be copied: .*lock.*copy=False",
        ),
        (lambda: nn.Sequential(nn.Linear(4, 4)), 3, SpecError, "got int: 3"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), [], SpecError, "an empty list"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), "# nothing", SpecError, "no pass in"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), "magnitude(0.5, ignore='')", SpecError, "ignore must be a pattern"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), "magnitude(0.5, ignore=mlp)", SelectionError, "leave no linear layer"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), "magnitude(" + "9" * 400 + ")", SpecError, r"in \[0, 1\)"),
        (
            lambda: nn.Sequential(nn.Linear(4, 4)),
            SPEC + ",magnitude(0.7)",
            PipelineError,
            "cannot follow pass 5 'lower'",
        ),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_the_reason(build, passes, error, message: str) -> None:
    with pytest.raises(error, match=message):
        sparsec.compile(build(), passes, example_inputs=torch.randn(3, 4))


@pytest.mark.parametrize(
    ("masks", "message"), [({}, "needs masks"), ([torch.ones(4, 4).bool()], "must map .* got list")]
)
def test_masks_that_are_none_or_no_mapping_do_not_fall_back_to_pruning(masks: object, message: str) -> None:
    with pytest.raises(MaskError, match=message):
        sparsec.compile(nn.Sequential(nn.Linear(4, 4)), example_inputs=torch.randn(3, 4), masks=masks)  # type: ignore[arg-type]


def test_an_unknown_verify_level_is_refused() -> None:
    with pytest.raises(SpecError, match="verify must be one of none, structure, facts, probe, got 'all'"):
        sparsec.compile(nn.Sequential(nn.Linear(4, 4)), example_inputs=torch.randn(3, 4), verify="all")  # type: ignore[arg-type]


def test_compiling_twice_is_refused_with_the_reason() -> None:
    with pytest.raises(
        CompileError, match=r"compiled already and lowered \(model\.layers\.0\.self_attn\.q_proj is packed\)"
    ):
        sparsec.compile(sparsec.compile(tiny_model("llama")[0], SPEC))
    pruned = sparsec.compile(tiny_model("llama")[0], "magnitude(0.5)")
    with pytest.raises(CompileError, match="compiled already"):
        sparsec.compile(pruned)


def test_a_model_that_cannot_be_traced_says_which_rung_failed() -> None:
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) if x.sum() > 0 else x

    with pytest.raises(TraceError, match="static"):
        sparsec.compile(Moody(), example_inputs=torch.randn(3, 4))


def test_a_dtype_that_no_kernel_serves_names_layer_kernels_and_way_out() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4).to(torch.complex64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x)

    for spec in ("zeros,freeze,lower(csr)", "magnitude(0.5),freeze,lower(csr)"):
        with pytest.raises(
            WeightError, match=r"linear\.weight: is torch\.complex64, which no format or kernel serves; .*ignore="
        ):
            sparsec.compile(Half(), spec, example_inputs=torch.randn(3, 4, dtype=torch.complex64))


def test_a_pass_that_breaks_its_promise_is_caught() -> None:
    @dataclass(frozen=True)
    class Liar(Pass):
        name: ClassVar[str] = "liar"
        effect: ClassVar[Effect] = Effect.EXACT

        def run(self, graph: sparsec.Graph, context: Context) -> PassResult:
            with torch.no_grad():
                for weight in graph.weights.values():
                    graph.tensor(weight.name).mul_(1.5)
            return PassResult(True, "scaled")

    with pytest.raises(VerifyError, match=r"(?s)after pass 1 'liar'.*declared exact.*not bit-identical"):
        sparsec.compile(tiny_model("llama")[0], [Liar()], verify="probe")
