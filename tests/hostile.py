"""What a careless or hostile user may hand to any public function, and a valid call of each function to put it into."""

from __future__ import annotations

import copy
import io
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsec
from sparsec import calibrate, cost, data, evaluate, formats, kernels, pipeline
from sparsec.data import tiny
from sparsec.errors import SparsecError

RECORDS = {
    sparsec.Compiled, sparsec.Context, sparsec.Effect, sparsec.Graph, sparsec.Pass, sparsec.PassRecord, sparsec.PassResult,
    sparsec.SparsecError,
    calibrate.Profile, calibrate.Site, calibrate.Standing, calibrate.Statistics, calibrate.CalibrationData, calibrate.Sequences,
    cost.Constants, cost.Found, cost.KernelCost, cost.Prediction, cost.Work,
    data.LoadedModel, data.Text, evaluate.Encoding, evaluate.Evaluation, evaluate.Windows,
    kernels.NativeStatus, kernels.Kernel, kernels.Problem,
}  # fmt: skip
"""Classes that hold what they are given: whoever uses them looks at it."""


class Odd:
    """Of a class that nobody knows."""


def closed_file() -> io.StringIO:
    """A stream that takes nothing any more."""
    stream = io.StringIO()
    stream.close()
    return stream


@cache
def values(folder: Path) -> dict[str, Any]:
    """Hostile values by name. Some are right for some arguments; then the call has to work."""
    (folder / "binary").write_bytes(bytes(range(256)))
    (folder / "empty").write_text("")
    numbers = {
        "True": True, "3": 3, "0": 0, "-1": -1, "huge": 2**70, "1.5": 1.5, "NaN": math.nan, "-inf": -math.inf, "1j": 1j,
    }  # fmt: skip
    strings = {
        "''": "", "a word": "surely-no-such-thing", "NUL": "a\0b", "surrogate": "\udce9", "long": "x" * 20000, "bytes": b"x",
    }  # fmt: skip
    empty = {
        "None": None,
        "[]": [],
        "()": (),
        "{}": {},
        "[None]": [None],
        "[[]]": [[]],
        "['']": [""],
        "(None,)": (None,),
    }
    odd = {
        "[3]": [3],
        "{3: 4}": {3: 4},
        "{'a': None}": {"a": None},
        "a set": {None},
        "a range": range(3),
        "object": Odd(),
    }
    code = {"a class": int, "a function": len, "an error": ValueError("x"), "a dtype": torch.int8}
    modules = {"a module": nn.ReLU(), "a script": torch.jit.script(nn.Linear(4, 4))}
    files = {
        "a folder": folder, "its name": str(folder), "a binary file": folder / "binary", "an empty file": str(folder / "empty"),
        "no file": folder / "missing" / "file", "a closed file": closed_file(),
    }  # fmt: skip
    tensors = {
        "no elements": torch.zeros(0), "a number": torch.tensor(3), "NaN tensor": torch.full((4, 4), math.nan),
        "ids": torch.full((2, 4), 10**9), "sparse": torch.eye(4).to_sparse(), "meta": torch.zeros(4, 4, device="meta"),
        "complex": torch.zeros(4, 4, dtype=torch.complex64), "five axes": torch.zeros(1, 1, 1, 1, 1),
    }  # fmt: skip
    return {**numbers, **strings, **empty, **odd, **code, **modules, **files, **tensors}


@dataclass(frozen=True)
class Target:
    """A public function, how to make the arguments of a call that works, and arguments that are left alone."""

    function: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]
    skip: frozenset[str] = field(default=frozenset())


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


TEXT = data.Text("a text", "Every layer says why it is dense. " * 20)


def compile_arguments() -> dict[str, Any]:
    """Every argument of compile."""
    return {
        "model": Plain(), "passes": "wanda(0.5, targets='*')", "example_inputs": torch.ones(2, 8), "masks": None,
        "calibration": [(torch.ones(2, 8),)], "tokenizer": None, "calibration_sequences": 2, "calibration_length": 8, "seed": 0,
        "copy": True, "verify": "structure", "progress": None, "instruments": (),
    }  # fmt: skip


def text_arguments() -> dict[str, Any]:
    """What compile is given to calibrate a language model on strings."""
    return {
        "model": Words(), "passes": "magnitude(0.5, targets='*')", "example_inputs": torch.ones(2, 8, dtype=torch.int64),
        "calibration": ["Some text that is long enough.", "Another one."], "tokenizer": tokenizer(), "calibration_length": 8,
    }  # fmt: skip


CALLBACKS = frozenset({"learn", "progress", "settle", "step"})
"""Arguments for which modules are no hostile value: they can be called, and what comes of that is their own error."""


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
            sparsec.extend,
            lambda: {
                "compiled": pruned(),
                "passes": "lower(csr)",
                "verify": "facts",
                "progress": None,
                "instruments": (),
            },
        ),
        "sparsec.masked": Target(sparsec.masked, lambda: {"model": copy.deepcopy(pruned())}),
        "sparsec.RegrowCallback": Target(
            sparsec.RegrowCallback, lambda: {"way": "rigl", "share": 0.3, "every": 20, "seed": 0}
        ),
        "sparsec.save": Target(
            sparsec.save, lambda: {"module": pruned(), "folder": Path("saved"), "max_shard_size": "1GB"}
        ),
        "sparsec.load": Target(sparsec.load, lambda: {"place": saved(), "into": Plain()}),
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
            lambda: {"given": ["some text"], "tokenizer": tokenizer(), "length": 8, "limit": 16, "bos": True},
        ),
        "calibrate.takes_tokens": Target(calibrate.takes_tokens, lambda: {"graph": words()}),
        "calibrate.strings": Target(
            calibrate.strings, lambda: {"texts": ["some text"], "tokenizer": tokenizer(), "length": 8, "limit": 16}
        ),
        "calibrate.windows": Target(
            calibrate.windows,
            lambda: {"text": TEXT, "tokenizer": tokenizer(), "sequences": 2, "length": 8, "seed": 0, "limit": None},
        ),
        "cost.machine_constants": Target(
            cost.machine_constants,
            lambda: {"dtypes": [torch.float32], "device": "cpu", "measuring": False, "progress": None},
            skip=frozenset({"measuring"}),
        ),
        "data.load_model": Target(
            load_model, lambda: {"spec": "tiny", "dtype": torch.float32, "progress": None, "seed": 0}
        ),
        "data.load_text": Target(data.load_text, lambda: {"spec": None, "split": "test"}),
        "evaluate.cut": Target(
            evaluate.cut, lambda: {"text": TEXT, "tokenizer": tokenizer(), "length": 8, "count": 2, "limit": 16}
        ),
        "evaluate.cut_second": Target(
            evaluate.cut_second, lambda: {"text": TEXT, "tokenizer": tokenizer(), "length": 8, "most": 2, "limit": 16}
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
        "evaluate.compare": Target(
            evaluate.compare,
            lambda: {
                "models": {"a": tiny.tiny_model()},
                "windows": evaluate.cut(TEXT, tokenizer(), 8, 1),
                "progress": None,
                "what": "x",
                "saved": None,
            },
        ),
        "evaluate.compare_embeddings": Target(
            evaluate.compare_embeddings,
            lambda: {
                "models": {"a": tiny.tiny_model()},
                "windows": evaluate.cut(TEXT, tokenizer(), 8, 1),
                "progress": None,
                "what": "x",
                "saved": None,
            },
        ),
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
        for method in ("pack", "plan"):
            arguments = matrix if method == "pack" else {"mask": mask, "dtype": torch.float32}
            found[f"formats.{name}.{method}"] = Target(
                getattr(kind, method), lambda arguments=arguments: dict(arguments)
            )
    for kind in sparsec.passes.PASSES:
        found[f"passes.{kind.name}"] = Target(kind, lambda kind=kind: example_options(kind))
    return found


def example_options(kind: type[sparsec.Pass]) -> dict[str, Any]:
    """Every option of a pass as its first example has it."""
    return vars(pipeline.Pipeline.parse(kind.examples[0]).passes[-1]).copy()


def outcome(target: Target, arguments: dict[str, Any]) -> str:
    """Empty when a call worked or was refused in words, else what came out of it."""
    try:
        target.function(**arguments)
    except SparsecError as error:
        return "" if str(error).strip() else f"a {type(error).__name__} without a word"
    except TypeError as error:  # Python's own check of a call, made before anything of the function runs
        if error.__traceback__ is not None and error.__traceback__.tb_next is None:
            return ""
        return f"TypeError: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
