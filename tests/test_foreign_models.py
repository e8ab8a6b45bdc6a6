"""Models of other libraries whose weights are no plain tensors: named as what they are, with a way out that works."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import sparsec
from sparsec.errors import CompileError, TraceError
from sparsec.kernels import SparseLinear

SPEC = "magnitude(0.5, targets='*'),freeze,lower(csr)"


def foreign(base: type, name: str, module: str) -> type:
    """A class as another library would have it."""
    return type(name, (base,), {"__module__": module})


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("Linear4bit", "bitsandbytes.nn.modules"),
        ("Linear8bitLt", "bitsandbytes.nn.modules"),
        ("TorchQuantLinear", "gptqmodel.nn_modules.qlinear.torch"),
        ("QuantLinear", "my_own_copy"),
        ("WQLinear_GEMM", "awq.modules.linear"),
        ("HQQLinear", "hqq.core.quantize"),
    ],
)
def test_a_quantised_layer_is_named_as_such(name: str, module: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), foreign(nn.Linear, name, module)(8, 8))
    with pytest.raises(
        CompileError, match=rf"1 is quantised \(a {module.partition('.')[0]} {name}\).*before it is quantised"
    ):
        sparsec.compile(model, SPEC, example_inputs=torch.randn(2, 8))


def test_a_quantised_tensor_in_a_plain_layer_is_named_as_such() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    kind = foreign(nn.Parameter, "AffineQuantizedTensor", "torchao.dtypes")
    model[0]._parameters["weight"] = kind(torch.randn(8, 8))
    with pytest.raises(CompileError, match=r"0 is quantised \(a torchao AffineQuantizedTensor\)"):
        sparsec.compile(model, SPEC, example_inputs=torch.randn(2, 8))


class Int8(nn.Parameter):
    """torchao's: a comparison is not implemented for it."""

    __module__ = "torchao.quantization"

    def __ne__(self, other: object) -> bool:
        raise NotImplementedError("aten.ne")


def test_a_compiled_model_that_was_quantised_afterwards_is_named_as_such() -> None:
    """Regression: NotImplementedError of torchao, out of report and extend."""
    pruned = sparsec.compile(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)),
        "magnitude(0.5, targets='*'),freeze",
        example_inputs=torch.randn(2, 8),
    )
    for model in (pruned, sparsec.extend(pruned, "lower(csr, targets='0')")):
        model[1]._parameters["weight"] = Int8(model[1].weight.detach(), requires_grad=False)
        report = model.sparsec.report()
        assert any("1.weight is a torchao Int8 now" in note for note in report.notes)
        assert [row.nnz < row.parameters for row in report.layers if row.name.endswith("weight")] == [True, False]
    with pytest.raises(CompileError, match=r"1 is quantised \(a torchao Int8\).*before it is quantised"):
        sparsec.extend(pruned, "lower(csr)")


def test_an_embedding_of_a_quantiser_that_quantises_nothing_is_no_reason() -> None:
    table = foreign(nn.Embedding, "StableEmbedding", "bitsandbytes.nn.modules")(16, 8)
    model = nn.Sequential(table, nn.Linear(8, 8))
    assert isinstance(sparsec.compile(model, SPEC, example_inputs=torch.arange(6).view(2, 3))[1], SparseLinear)
    model[0] = foreign(nn.Embedding, "Embedding8bit", "bitsandbytes.nn.modules")(16, 8)
    model[0].weight = nn.Parameter(torch.zeros(16, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(CompileError, match="bitsandbytes Embedding8bit"):
        sparsec.compile(model, SPEC, example_inputs=torch.arange(6).view(2, 3))


def test_torchs_own_dynamic_quantisation_is_named_as_such() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8)), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(CompileError, match=r"0 is quantised \(a torch Linear\)"):
        sparsec.compile(model, SPEC, example_inputs=torch.randn(2, 8))


def test_a_scripted_model_is_named_as_such() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.jit.trace(nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8))
    with pytest.raises(CompileError, match=r"TorchScript module.*give the nn\.Module"):
        sparsec.compile(model, SPEC, example_inputs=torch.randn(2, 8))


def test_an_offloaded_model_is_brought_back_as_the_message_says() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(CompileError, match=r"offloaded by accelerate.*remove_hook_from_submodules\(model\)"):
        sparsec.compile(model, SPEC, example_inputs=torch.randn(2, 8))
    accelerate.hooks.remove_hook_from_submodules(model)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    out = sparsec.compile(model, SPEC, example_inputs=torch.randn(2, 8))
    assert isinstance(out[0], SparseLinear)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([[1.0, 2.0]], "must be a tensor"),
        (torch.eye(8).to_sparse(), "sparse_coo tensor; give a dense one"),
        (torch.randn(2, 8, device="meta"), "."),
        (7, "does not take"),
    ],
)
def test_example_inputs_of_odd_kinds_end_in_an_error_of_ours(given: object, said: str) -> None:
    with pytest.raises(TraceError, match=said):
        sparsec.compile(nn.Sequential(nn.Linear(8, 8)), SPEC, example_inputs=given)
