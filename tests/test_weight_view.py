"""The weight of a packed layer is for reading: reads are what they always were, no write is lost in silence."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from architectures import tiny_model
from format_cases import LAYOUTS, some
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import sparsec
from sparsec.errors import WeightError
from sparsec.formats.layout import Layout
from sparsec.kernels import SparseLinear
from sparsec.kernels.modules.dense_linear import DenseLinear


def layer(layout: str = "csr16") -> SparseLinear:
    weight, mask = some(LAYOUTS["csr16"], 8, 12, 0.5, torch.float32)[1], torch.rand(8, 12) < 0.5
    module = SparseLinear(Layout.parse(layout).pack(weight, mask), torch.randn(8))
    module.path = "model.proj"
    return module


def item(w: Tensor) -> None:
    w[0, 0] = 1.0


def plus(m: SparseLinear) -> None:
    m.weight += 1


def data_plus(m: SparseLinear) -> None:
    m.weight.data += torch.ones(8, 12, requires_grad=True).detach()


def data_set(m: SparseLinear) -> None:
    m.weight.data = torch.zeros(8, 12)


WRITES: dict[str, Callable[[SparseLinear], object]] = {
    "add_": lambda m: m.weight.add_(1),
    "item": lambda m: item(m.weight),
    "copy_": lambda m: m.weight.copy_(torch.zeros(8, 12)),
    "+=": plus,
    "data +=": data_plus,
    "data =": data_set,
    "data.add_": lambda m: m.weight.data.add_(1),
    "data.data": lambda m: m.weight.data.data.zero_(),
    "detach": lambda m: m.weight.detach().zero_(),
    "row of the transpose": lambda m: m.weight.T[0].zero_(),
    "view": lambda m: item(m.weight.view(-1, 1)),
    "unbind": lambda m: m.weight.unbind(0)[1].zero_(),
    "iteration": lambda m: [row.zero_() for row in m.weight],
    "chunk": lambda m: m.weight.chunk(2)[1].zero_(),
    "same dtype": lambda m: m.weight.float().cpu().contiguous().mul_(2),
    "out=": lambda m: torch.add(torch.ones(8, 12), 1, out=m.weight),
    "foreach": lambda m: torch._foreach_add_([m.weight], 1),
    "relu": lambda m: F.relu(m.weight, inplace=True),
    "initialise": lambda m: nn.init.xavier_uniform_(m.weight),
    "index_put_": lambda m: m.weight.index_put_((torch.tensor([0]),), torch.zeros(12)),
    "set_": lambda m: m.weight.set_(torch.zeros(8, 12)),
    "apply_": lambda m: m.weight.apply_(lambda value: value + 1),
    "map_": lambda m: m.weight.map_(torch.zeros(8, 12), lambda a, b: b),
    "t_": lambda m: m.weight.t_(),
    "resize_": lambda m: m.weight.resize_(2, 3),
    "requires_grad_": lambda m: m.weight.requires_grad_(),
    "attribute": lambda m: setattr(m.weight, "scale", 2),
    "swap": lambda m: torch.utils.swap_tensors(m.weight, torch.zeros(8, 12)),
    "tensor": lambda m: setattr(m, "weight", torch.zeros(8, 12)),
    "parameter": lambda m: setattr(m, "weight", nn.Parameter(torch.zeros(8, 12))),
    "register": lambda m: m.register_parameter("weight", nn.Parameter(torch.zeros(8, 12))),
    "own parameter": lambda m: nn.Parameter(m.weight),
    "delete": lambda m: delattr(m, "weight"),
    "prune": lambda m: prune.l1_unstructured(m, "weight", 0.5),
}


@pytest.mark.parametrize("how", WRITES)
@pytest.mark.parametrize("layout", ["csr16", "bitmap:int4mg64"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_write_raises_and_names_layer_rule_and_way_out(how: str, layout: str, mode: Callable[[], object]) -> None:
    module = layer(layout)
    before = module.weight.clone()
    with mode(), pytest.raises(WeightError, match=r"^model\.proj: .*lowered.*before lowering"):  # type: ignore[attr-defined]
        WRITES[how](module)
    assert torch.equal(module.weight, before)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("name", ["weight", "values", "col_idx"])
@pytest.mark.parametrize(
    "utility",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,  # refuses a None itself
        lambda module, name: parametrize.register_parametrization(module, name, Twice()),
    ],
    ids=["weight_norm", "spectral_norm", "orthogonal", "the old weight_norm", "the old spectral_norm", "twice"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_utilities_that_put_another_weight_in_its_place_raise_too(utility: Callable[..., object], name: str) -> None:
    """Regression: KeyError('weight'), at the second time too, or a layer without its columns."""
    module = layer()
    expected = module.weight.clone()
    for _ in range(2):
        with pytest.raises((WeightError, KeyError, ValueError, RuntimeError)) as raised:
            utility(module, name)
        if (name == "weight" and utility is not nn.utils.spectral_norm) or utility.__name__ == "<lambda>":
            assert isinstance(raised.value, WeightError)
            assert "model.proj" in str(raised.value)
    assert list(module._parameters) == ["bias", "weight"]
    assert torch.equal(module.weight, expected)
    assert module(torch.randn(2, 12)).shape == (2, 8)


@pytest.mark.parametrize("build", [layer, lambda: DenseLinear(nn.Linear(12, 8))], ids=["sparse", "dense"])
def test_a_bias_that_is_computed_from_another_is_used(build: Callable[[], nn.Module]) -> None:
    """Regression: KeyError('bias')."""
    x = torch.randn(2, 12)
    for utility in (
        lambda m: parametrize.register_parametrization(m, "bias", Twice()),
        lambda m: prune.random_unstructured(m, "bias", 0.5),
    ):
        module = build()
        utility(module)
        with torch.no_grad():
            torch.testing.assert_close(module(x), F.linear(x, module.weight, module.bias))


def test_reading_is_what_it_always_was() -> None:
    module, x = layer(), torch.randn(3, 12, requires_grad=True)
    dense = module.packed.unpack()
    w = module.weight
    own = [w.clone(), w + 0, copy.deepcopy(w), pickle.loads(pickle.dumps(w)), w.double().float(), torch.stack([w])[0]]
    file = io.BytesIO()
    torch.save({"w": w}, file)
    file.seek(0)
    own.append(torch.load(file)["w"])
    for plain in own:
        assert type(plain) is Tensor
        assert torch.equal(plain, dense)
        plain.zero_()
    assert torch.equal(w, dense)
    assert (w.shape, w.dtype, w.requires_grad, w.tolist()) == (dense.shape, dense.dtype, False, dense.tolist())
    F.linear(x, w, module.bias).sum().backward()
    assert torch.allclose(x.grad, dense.sum(0).expand(3, 12))
    target = nn.Linear(12, 8)
    with torch.no_grad():
        target.weight.copy_(w)
    target.weight.data.mul_(2)
    assert torch.equal(target.weight, dense * 2)
    w.requires_grad = False
    w.grad = None
    assert torch.equal(torch.compile(lambda t: t * 2, backend="eager")(w), dense * 2)


def test_numpy_sees_it_and_cannot_write_to_it() -> None:
    w = layer().weight
    for array in (w.numpy(), np.asarray(w), w.T.numpy()):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


@pytest.mark.parametrize("safe", [False, True])
def test_an_adapter_is_not_merged_into_a_lowered_layer(safe: bool) -> None:
    """The merge wrote to a matrix that nobody kept: the adapter was gone."""
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model, call = tiny_model("llama")
    adapted = get_peft_model(model, config).eval()
    fast = sparsec.compile(adapted, "magnitude(0.5,targets=('*base_layer',)),freeze,lower(csr)")
    with torch.no_grad():
        want = fast(**call(1, 4))[0]
        with pytest.raises(WeightError, match="q_proj"):
            fast.merge_and_unload(safe_merge=safe)
        assert torch.equal(fast(**call(1, 4))[0], want)
