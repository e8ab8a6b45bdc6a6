"""A call of every public function that works, for hostile values to be put into."""

from __future__ import annotations

import copy
import inspect
import io
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hostile import Target
from torch import Tensor, nn

import sparsec
from sparsec import calibrate, cost, data, evaluate, formats, kernels, pipeline
from sparsec.data import tiny
from sparsec.formats.layout import Layout
from sparsec.ranks import ALONE

RECORDS = {
    sparsec.Compiled, sparsec.Context, sparsec.Effect, sparsec.Graph, sparsec.Pass, sparsec.PassRecord, sparsec.PassResult,
    sparsec.SparsecError,
    calibrate.Profile, calibrate.Site, calibrate.Standing, calibrate.Statistics, calibrate.CalibrationData, calibrate.Sequences,
    cost.Constants, cost.Found, cost.KernelCost, cost.Prediction, cost.Work,
    data.LoadedModel, data.Text, evaluate.Encoding, evaluate.Evaluation, evaluate.Windows,
    kernels.NativeStatus, kernels.Kernel, kernels.Problem,
}  # fmt: skip
"""Classes that hold what they are given: whoever uses them looks at it."""


class Plain(nn.Module):
    """The least that can be compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.a(x)
        return result


class Words(nn.Module):
    """The least that can be calibrated on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.a = nn.Embedding(300, 8), nn.Linear(8, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        result: Tensor = self.a(self.embed(input_ids))
        return result


@cache
def words() -> sparsec.Graph:
    """Of a module that takes tokens."""
    return sparsec.trace(Words(), torch.ones(2, 8, dtype=torch.int64))


@cache
def pruned() -> nn.Module:
    """A small module with a frozen mask."""
    return sparsec.compile(Plain(), "magnitude(0.5,targets='*'),freeze", example_inputs=torch.ones(2, 8))


@cache
def causal() -> nn.Module:
    """A compiled model of transformers."""
    return sparsec.compile(tiny.tiny_model(), "lower(dense)")


def packed() -> formats.Packed:
    """A small matrix."""
    return formats.CSR.pack(torch.ones(4, 4), torch.eye(4, dtype=torch.bool))


@cache
def graph() -> sparsec.Graph:
    """Of a small module; nobody may change it."""
    return sparsec.trace(Plain(), torch.ones(2, 8))


@cache
def tokenizer() -> Any:
    """Bytes as tokens."""
    return tiny.byte_tokenizer()


@cache
def saved() -> Path:
    """A folder with a saved module, for the whole run."""
    folder = Path(tempfile.mkdtemp())
    sparsec.save(Plain(), folder)
    return folder


@cache
def zeros() -> Path:
    """A folder of transformers with a model that others pruned, for the whole run."""
    folder, model = Path(tempfile.mkdtemp()), tiny.tiny_model()
    for parameter in model.parameters():
        parameter.data[parameter.abs() < parameter.abs().median()] = 0
    model.save_pretrained(folder)
    return folder


def quantised() -> nn.Module:
    """A layer whose values have 4 bits, a scale and a middle."""
    return sparsec.SparseLinear(Layout.parse("bitmap:int4mg64").pack(torch.ones(4, 64), torch.ones(4, 64).bool()))


TEXT = data.Text("a text", "Every layer says why it is dense. " * 20)


def _compared() -> dict[str, Any]:
    """What both comparisons take."""
    windows = evaluate.cut(TEXT, tokenizer(), 8, 1)
    return {
        "models": {"a": tiny.tiny_model()},
        "windows": windows,
        "progress": None,
        "what": "x",
        "saved": None,
        "seconds": None,
    }


def compile_arguments() -> dict[str, Any]:
    """Every argument of compile."""
    return {
        "model": Plain(), "passes": "wanda(0.5, targets='*')", "example_inputs": torch.ones(2, 8), "masks": None,
        "calibration": [(torch.ones(2, 8),)], "tokenizer": None, "calibration_sequences": 2, "calibration_length": 8, "bos": True,
        "seed": 0, "copy": True, "spill": None, "max_memory": None, "verify": "structure", "progress": None, "instruments": (),
    }  # fmt: skip


def extend_arguments() -> dict[str, Any]:
    """Every argument of extend."""
    own = ("calibration", "tokenizer", "calibration_sequences", "calibration_length", "bos", "seed", "copy", "verify")
    given = {name: value for name, value in compile_arguments().items() if name in (*own, "progress", "instruments")}
    return {"compiled": pruned(), "passes": "wanda(0.7, targets='*'),freeze", "teacher": None, **given}


def text_arguments() -> dict[str, Any]:
    """What compile is given to calibrate a language model on strings."""
    return {
        "model": Words(), "passes": "magnitude(0.5, targets='*')", "example_inputs": torch.ones(2, 8, dtype=torch.int64),
        "calibration": ["Some text that is long enough.", "Another one."], "tokenizer": tokenizer(), "calibration_length": 8,
    }  # fmt: skip


def load_model(**given: Any) -> None:
    """data.load_model without its default, which takes seconds."""
    if given["spec"] is not None:
        data.load_model(**given)


def no_prune(site: Any, made: Any) -> None:
    """Prunes nothing."""


def targets() -> dict[str, Target]:
    """Every public function by name, with a call of it that works. Classes are here by what makes one."""
    ones = torch.ones(2, 8)
    mask = torch.eye(4, dtype=torch.bool)
    matrix = {"weight": torch.ones(4, 4), "mask": mask}
    found = {
        "sparsec.compile": Target(sparsec.compile, compile_arguments, skip=frozenset({"tokenizer"})),
        "sparsec.compile with masks": Target(
            sparsec.compile,
            lambda: {"model": Plain(), "example_inputs": ones, "masks": {"a": torch.eye(8, dtype=torch.bool)}},
            skip=frozenset({"model", "example_inputs"}),
        ),
        "sparsec.compile on texts": Target(
            sparsec.compile, text_arguments, skip=frozenset({"model", "passes", "example_inputs"})
        ),
        "sparsec.extend": Target(
            sparsec.extend, lambda: {"compiled": pruned(), "passes": "lower(csr)", "verify": "facts"}
        ),
        "sparsec.extend with calibration": Target(sparsec.extend, extend_arguments, skip=frozenset({"tokenizer"})),
        "sparsec.masked": Target(sparsec.masked, lambda: {"model": copy.deepcopy(pruned())}),
        "sparsec.RegrowCallback": Target(
            sparsec.RegrowCallback, lambda: {"way": "rigl", "share": 0.3, "every": 20, "seed": 0}
        ),
        "sparsec.save": Target(
            sparsec.save,
            lambda: {"module": pruned(), "folder": Path("saved"), "max_shard_size": "1GB", "progress": None},
        ),
        "sparsec.load": Target(sparsec.load, lambda: {"place": saved(), "into": Plain()}),
        "sparsec.load of others' zeros": Target(
            sparsec.load, lambda: {"place": zeros(), "passes": "zeros,freeze", "dtype": torch.float32, "progress": None}
        ),
        "save_pretrained": Target(
            lambda **given: causal().save_pretrained(**given),
            lambda: {
                "folder": Path("saved"),
                "dense": False,
                "is_main_process": True,
                "tokenizer": None,
                "report": None,
                "max_shard_size": "1GB",
                "progress": None,
                "state_dict": None,
                "safe_serialization": True,
                "save_function": None,
                "variant": None,
            },
        ),
        "a report's text": Target(pruned().sparsec.report().text, lambda: {"layers": False, "width": 80}),
        "sparsec.tensor_parallel": Target(
            sparsec.tensor_parallel, lambda: {"model": copy.deepcopy(causal()), "distributed_config": None}
        ),
        "sparsec.trace": Target(sparsec.trace, lambda: {"model": Plain(), "example_inputs": ones}),
        "sparsec.graph_text": Target(sparsec.graph_text, lambda: {"graph": graph()}),
        "sparsec.Pipeline": Target(sparsec.Pipeline, lambda: {"passes": ()}),
        "sparsec.Pipeline.of": Target(sparsec.Pipeline.of, lambda: {"passes": "freeze"}),
        "sparsec.Pipeline.parse": Target(sparsec.Pipeline.parse, lambda: {"text": "freeze"}),
        "sparsec.Pipeline.before": Target(sparsec.Pipeline.parse("freeze").before, lambda: {"name": "freeze"}),
        "sparsec.Pipeline.with_first": Target(
            sparsec.Pipeline.parse("freeze").with_first, lambda: {"first": sparsec.passes.Magnitude(0.5)}
        ),
        "sparsec.Pipeline.validate": Target(
            sparsec.Pipeline.parse("magnitude(0.5)").validate, lambda: {"facts": frozenset()}
        ),
        "sparsec.Pipeline.run": Target(
            sparsec.Pipeline.parse("sparsity").run,
            lambda: {"graph": graph(), "context": None, "verify": "none", "instruments": (), "first": 1},
        ),
        "sparsec.PrintIR": Target(
            lambda **given: sparsec.Pipeline.parse("sparsity").run(graph(), instruments=[sparsec.PrintIR(**given)]),
            lambda: {"when": "after", "stream": io.StringIO()},
        ),
        "sparsec.DumpIR": Target(
            lambda folder: sparsec.Pipeline.parse("sparsity").run(graph(), instruments=[sparsec.DumpIR(folder)]),
            lambda: {"folder": Path("ir")},
        ),
        "sparsec.Timing": Target(sparsec.Timing, dict),
        "sparsec.SparseLinear": Target(sparsec.SparseLinear, lambda: {"packed": packed(), "bias": None}),
        "sparsec.SparseLinear.forward": Target(sparsec.SparseLinear(packed()), lambda: {"x": torch.ones(1, 4)}),
        "a lowered model": Target(sparsec.extend(pruned(), "lower(csr)"), lambda: {"x": ones}),
        "a quantised model": Target(sparsec.extend(pruned(), "lower(bitmap, values='int4mg64')"), lambda: {"x": ones}),
        "a quantised layer's load_state_dict": Target(
            lambda **given: quantised().load_state_dict(given), lambda: dict(quantised().state_dict())
        ),
        "calibrate.calibrate": Target(
            calibrate.calibrate,
            lambda: {
                "graph": graph(),
                "data": calibrate.CalibrationData(((ones,),), "ones"),
                "weights": ["a.weight"],
                "learn": lambda site, statistics: ({}, {}),
                "settle": no_prune,
                "gram": False,
                "feed": "pruned",
                "order": "block",
                "step": None,
                "store": None,
                "ranks": ALONE,
            },
        ),
        "calibrate.own_text": Target(
            calibrate.own_text,
            lambda: {
                "model": tiny.tiny_model(),
                "tokenizer": tokenizer(),
                "sequences": 1,
                "length": 4,
                "seed": 0,
                "limit": 16,
                "bos": True,
                "progress": None,
            },
        ),
        "calibrate.samples": Target(
            calibrate.samples,
            lambda: {"graph": words(), "tokens": torch.full((2, 8), 5), "source": "fives"},
        ),
        "calibrate.sequences": Target(
            calibrate.sequences,
            lambda: {"given": ["some text"], "tokenizer": tokenizer(), "length": 8, "limit": 16, "bos": True, "pad": 0},
        ),
        "calibrate.takes_tokens": Target(calibrate.takes_tokens, lambda: {"graph": words()}),
        "calibrate.strings": Target(
            calibrate.strings,
            lambda: {"texts": ["some text"], "tokenizer": tokenizer(), "length": 8, "limit": 16, "bos": True},
        ),
        "calibrate.windows": Target(
            calibrate.windows,
            lambda: {
                "text": TEXT,
                "tokenizer": tokenizer(),
                "sequences": 2,
                "length": 8,
                "seed": 0,
                "limit": None,
                "bos": True,
            },
        ),
        "cost.machine_constants": Target(
            cost.machine_constants,
            lambda: {"dtypes": [torch.float32], "device": "cpu", "measuring": False, "progress": None},
            skip=frozenset({"force", "measuring"}),
        ),
        "data.load_model": Target(
            load_model, lambda: {"spec": "tiny", "dtype": torch.float32, "progress": None, "seed": 0, "spill": None}
        ),
        "data.load_text": Target(data.load_text, lambda: {"spec": None, "split": "test"}),
        "evaluate.cut": Target(
            evaluate.cut,
            lambda: {"text": TEXT, "tokenizer": tokenizer(), "length": 8, "count": 2, "limit": 16, "bos": True},
        ),
        "evaluate.cut_second": Target(
            evaluate.cut_second,
            lambda: {"text": TEXT, "tokenizer": tokenizer(), "length": 8, "most": 2, "limit": 16, "bos": True},
        ),
        "evaluate.evaluate": Target(
            evaluate.evaluate,
            lambda: {
                "model": tiny.tiny_model(),
                "windows": evaluate.cut(TEXT, tokenizer(), 8, 1),
                "progress": None,
                "what": "x",
            },
        ),
        "evaluate.compare": Target(evaluate.compare, _compared),
        "evaluate.compare_embeddings": Target(evaluate.compare_embeddings, _compared),
        "kernels.add": Target(kernels.add, lambda: {"kernel": kernels.KERNELS[0]}),
        "kernels.known": Target(kernels.known, dict),
        "formats.add": Target(formats.add, lambda: {"kind": formats.CSR}),
        "kernels.force_isa": Target(kernels.force_isa, lambda: {"name": None}),
        "kernels.operator": Target(kernels.operator, lambda: {"packed": packed()}),
        "kernels.operator_args": Target(kernels.operator_args, lambda: {"packed": packed(), "bias": None}),
        "kernels.select": Target(
            kernels.select, lambda: {"problem": kernels.Problem.of(packed()), "kernels": kernels.KERNELS}
        ),
        "kernels.Problem.of": Target(kernels.Problem.of, lambda: {"packed": packed(), "tokens": 1}),
        "kernels.status": Target(kernels.status, dict),
        "kernels.tolerance": Target(
            kernels.tolerance, lambda: {"x": torch.ones(1, 4), "weight": torch.ones(4, 4), "bias": None}
        ),
        "pipeline.known_passes": Target(pipeline.known_passes, dict),
        "pipeline.select_weights": Target(
            pipeline.select_weights, lambda: {"graph": graph(), "targets": ("*",), "ignore": ()}
        ),
    }
    for name, kind in formats.FORMATS.items():
        for method in (kind.pack, kind.plan):
            options = {
                n: p.default for n, p in inspect.signature(method).parameters.items() if p.kind == p.KEYWORD_ONLY
            }
            arguments = {**(matrix if method == kind.pack else {"mask": mask, "dtype": torch.float32}), **options}
            found[f"formats.{name}.{method.__name__}"] = Target(method, lambda arguments=arguments: dict(arguments))
    for kind in sparsec.passes.PASSES:
        found[f"passes.{kind.name}"] = Target(kind, lambda kind=kind: example_options(kind))
    return found


def example_options(kind: type[sparsec.Pass]) -> dict[str, Any]:
    """Every option of a pass as its first example has it."""
    return vars(pipeline.Pipeline.parse(kind.examples[0]).passes[-1]).copy()
