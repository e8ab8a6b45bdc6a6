"""The tracer on every architecture: the graph computes what the model computes, bit for bit, and says what each part is."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch
import transformers as hf
from architectures import ARCHITECTURES, Example, tiny_model
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsec.errors import TraceError
from sparsec.ir.graph import Graph
from sparsec.ir.tracer import trace

STATIC_LENGTH = ("mamba",)  # the scan is unrolled over the example's length
DYNAMIC = tuple(name for name in ARCHITECTURES if name not in STATIC_LENGTH)
CALLS = ((2, 8, 0), (1, 1, 0), (3, 5, 2), (1, 17, 0), (4, 9, 3))

_LLAMA = {
    "attention": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"},
    "mlp": {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
    "norm": {"input_layernorm", "post_attention_layernorm"},
}
_BERT = {
    "attention": {"attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"},
    "mlp": {"intermediate.dense", "output.dense"},
    "norm": {"attention.output.LayerNorm", "output.LayerNorm"},
}
_NEOX_MLP = {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}
_QK_NORMS = {"self_attn.q_norm", "self_attn.k_norm"}
_GEMMA = _LLAMA | {"norm": _LLAMA["norm"] | {"pre_feedforward_layernorm", "post_feedforward_layernorm"}}

BLOCKS: dict[str, dict[str, set[str]]] = {
    **dict.fromkeys(("llama", "llama-tied", "mistral", "qwen2", "granite", "smollm3", "stablelm"), _LLAMA),
    "qwen3": _LLAMA | {"norm": _LLAMA["norm"] | _QK_NORMS},
    "gemma2": _GEMMA,
    "gemma3": _GEMMA | {"norm": _GEMMA["norm"] | _QK_NORMS},
    "olmo2": _LLAMA | {"norm": {"post_attention_layernorm", "post_feedforward_layernorm"} | _QK_NORMS},
    "cohere": _LLAMA | {"norm": {"input_layernorm"}},
    "phi3": _LLAMA
    | {"attention": {"self_attn.qkv_proj", "self_attn.o_proj"}, "mlp": {"mlp.gate_up_proj", "mlp.down_proj"}},
    "phi": {
        "attention": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense"},
        "mlp": {"mlp.fc1", "mlp.fc2"},
        "norm": {"input_layernorm"},
    },
    "opt": {
        "attention": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"},
        "mlp": {"fc1", "fc2"},
        "norm": {"self_attn_layer_norm", "final_layer_norm"},
    },
    "gpt-neox": {
        "attention": {"attention.query_key_value", "attention.dense"},
        "mlp": _NEOX_MLP,
        "norm": _LLAMA["norm"],
    },
    "gpt2": {"attention": {"attn.c_attn", "attn.c_proj"}, "mlp": {"mlp.c_fc", "mlp.c_proj"}, "norm": {"ln_1", "ln_2"}},
    "gptj": {
        "attention": {"attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj"},
        "mlp": {"mlp.fc_in", "mlp.fc_out"},
        "norm": {"ln_1"},
    },
    "falcon": {
        "attention": {"self_attention.query_key_value", "self_attention.dense"},
        "mlp": _NEOX_MLP,
        "norm": {"input_layernorm"},
    },
    "bloom": {
        "attention": {"self_attention.query_key_value", "self_attention.dense"},
        "mlp": _NEOX_MLP,
        "norm": _LLAMA["norm"],
    },
    "qwen2-moe": _LLAMA
    | {
        "mlp": {f"mlp.shared_expert.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
        "router": {"mlp.gate", "mlp.shared_expert_gate"},
        "experts": {"mlp.experts"},
    },
    "mixtral": {k: v for k, v in _LLAMA.items() if k != "mlp"} | {"router": {"mlp.gate"}, "experts": {"mlp.experts"}},
    "mamba": {
        "mlp": {"mixer", "mixer.in_proj", "mixer.conv1d", "mixer.x_proj", "mixer.dt_proj", "mixer.out_proj"},
        "norm": {"norm"},
    },
    "bert": _BERT,
    "bert-base": _BERT,
    "roberta": _BERT,
    "distilbert": {
        "attention": {"attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"},
        "mlp": {"ffn.lin1", "ffn.lin2"},
        "norm": {"sa_layer_norm", "output_layer_norm"},
    },
}
"""Architecture -> group -> modules of one block whose parameters are in that group."""


@functools.cache
def traced(name: str) -> tuple[nn.Module, Example, Graph]:
    """Model, arguments and graph of one architecture; not to be changed by a test."""
    model, example = tiny_model(name)
    return model, example, trace(model, example() if name == "mlp" else None)


def eager(model: nn.Module, arguments: dict[str, Any]) -> Any:
    """What the model itself computes, without a cache."""
    if "use_cache" in inspect.signature(model.forward).parameters:
        arguments = arguments | {"use_cache": False}
    with torch.no_grad():
        return model(**arguments)


def assert_same(graph_result: Any, model_result: Any) -> None:
    """Same structure, same bits."""
    ours, structure = pytree.tree_flatten(graph_result)
    theirs, wanted = pytree.tree_flatten(model_result)
    assert structure == wanted
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("name", DYNAMIC)
def test_graph_equals_eager_bit_for_bit_at_every_size_and_padding(name: str) -> None:
    model, example, graph = traced(name)
    assert graph.rung == "dynamic"
    for batch, length, padded in CALLS:
        arguments = example(batch, length, padded)
        with torch.no_grad():
            assert_same(graph.run(**arguments), eager(model, arguments))
            assert_same(graph.module(*arguments.values()), eager(model, arguments))


@pytest.mark.parametrize("name", STATIC_LENGTH)
def test_a_fixed_length_holds_for_every_batch_and_is_enforced(name: str) -> None:
    model, example, graph = traced(name)
    assert graph.rung == "dynamic batch"
    for batch, padded in ((2, 0), (1, 0), (5, 3)):
        assert_same(graph.run(**example(batch, 8, padded)), eager(model, example(batch, 8, padded)))
    with pytest.raises(TraceError, match=r"input 'input_ids'.*shape \[any, 8\], got \[2, 9\]"):
        graph.run(**example(2, 9))


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_modules_of_the_repeated_block_fall_into_their_groups(name: str) -> None:
    _, _, graph = traced(name)
    found: dict[str, set[str]] = {}
    last = max(int(p) for key in graph.weights for p in key.split(".") if p.isdigit())
    for weight in graph.weights.values():
        parts = weight.name.split(".")
        layer = next((i for i, part in enumerate(parts) if part == str(last)), None)
        if layer is not None:
            found.setdefault(weight.group, set()).add(".".join(parts[layer + 1 : -1]))
    assert found == BLOCKS[name]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tables_cover_every_parameter_once_and_name_what_exists(name: str) -> None:
    model, _, graph = traced(name)
    parameters = dict(model.named_parameters())
    assert list(graph.weights) == list(parameters)
    aliases = {alias for w in graph.weights.values() for alias in w.aliases}
    assert aliases | set(parameters) == {n for n, _ in model.named_parameters(remove_duplicate=False)}
    for key, weight in graph.weights.items():
        assert graph.tensor(key) is parameters[key]  # shared, not copied
        assert (weight.shape, weight.dtype) == (tuple(parameters[key].shape), parameters[key].dtype)
    nodes = [node for node in graph.module.graph.nodes if node.op == "call_function"]
    assert set(graph.ops) <= {node.name for node in nodes}
    assert list(graph.ops) == [node.name for node in nodes if node.name in graph.ops]  # in order of execution
    modules = dict(model.named_modules())
    for op in graph.ops.values():
        assert op.owner in modules
        assert set(op.weights) <= set(parameters)
    for weight in graph.weights.values():
        assert set(weight.owners) == {o.owner for o in graph.ops.values() if weight.name in o.weights}
    readers = {n.target: n.users for n in graph.module.graph.nodes if n.op == "get_attr" and n.target in parameters}
    read_ops = {node.name for users in readers.values() for node in users if _is_no_view(node)}
    assert read_ops <= set(graph.ops)


def _is_no_view(node: torch.fx.Node) -> bool:
    return not any(word in str(node.target) for word in ("transpose", "aten.to."))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_linear_module_is_one_linear_op_of_its_own_weight(name: str) -> None:
    model, _, graph = traced(name)
    kinds = {nn.Linear: "linear", hf.pytorch_utils.Conv1D: "conv1d"}
    first = {id(p): n for n, p in model.named_parameters()}
    for path, module in model.named_modules():
        kind = next((k for cls, k in kinds.items() if isinstance(module, cls)), None)
        if kind is None or path.endswith("dt_proj"):  # Mamba multiplies by this weight from the left
            continue
        ops = [op for op in graph.ops.values() if op.owner == path and op.kind == kind]
        bias = [] if module.bias is None else [first[id(module.bias)]]
        assert [op.weights for op in ops] == [(first[id(module.weight)], *bias)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2-moe", "bert"])
def test_tracing_leaves_the_model_as_it_was(name: str) -> None:
    model, _ = tiny_model(name)
    model.train()
    next(iter(model.children())).eval()
    flags = [m.training for m in model.modules()]
    attributes = [sorted(vars(m)) for m in model.modules()]
    state = {k: (v, v.data_ptr(), v.clone()) for k, v in model.state_dict(keep_vars=True).items()}
    config = model.config.to_dict()
    graph = trace(model)
    assert [m.training for m in model.modules()] == flags
    assert [sorted(vars(m)) for m in model.modules()] == attributes
    assert model.config.to_dict() == config
    for key, tensor in model.state_dict(keep_vars=True).items():
        old, pointer, value = state[key]
        assert tensor is old
        assert tensor.data_ptr() == pointer
        assert torch.equal(tensor, value)
    assert any("train mode" in note for note in graph.notes)


def test_tied_head_is_one_weight_with_two_ops() -> None:
    _, _, graph = traced("llama-tied")
    weight = graph.weights["model.embed_tokens.weight"]
    assert (weight.kind, weight.group, weight.aliases) == ("embedding", "embedding", ("lm_head.weight",))
    assert weight.owners == ("model.embed_tokens", "lm_head")
    assert [(op.kind, op.group) for op in graph.ops_of(weight.name)] == [
        ("embedding", "embedding"),
        ("linear", "lm_head"),
    ]
    nodes = [n for n in graph.module.graph.nodes if n.op == "get_attr" and n.target == weight.name]
    assert len(nodes) == 1


def test_untied_head_is_in_its_own_group() -> None:
    _, _, graph = traced("gptj")
    assert {w.name: (w.kind, w.group) for w in graph.weights.values() if w.name.startswith("lm_head")} == {
        "lm_head.weight": ("linear", "lm_head"),
        "lm_head.bias": ("bias", "lm_head"),
    }


def test_conv1d_weights_are_stored_in_by_out() -> None:
    _, _, graph = traced("gpt2")
    weight = graph.weights["transformer.h.1.mlp.c_fc.weight"]
    assert (weight.kind, weight.shape, weight.matrix_shape) == ("conv1d", (32, 128), (128, 32))
    assert graph.matrix(weight.name).shape == (128, 32)


def test_fused_experts_are_grouped_products_of_three_dimensional_weights() -> None:
    _, _, graph = traced("mixtral")
    weight = graph.weights["model.layers.1.mlp.experts.down_proj"]
    assert (weight.kind, weight.group, weight.shape) == ("experts", "experts", (4, 32, 48))
    (op,) = graph.ops_of(weight.name)
    assert (op.kind, op.group, op.shape) == ("grouped_linear", "experts", ("2*batch*length", 32))


def test_shapes_are_symbolic_and_products_have_operands_with_shapes() -> None:
    _, _, graph = traced("bloom")
    assert graph.ops["lm_head"].shape == ("batch", "length", 64)
    scores = graph.ops["self_attention_matmul_1"]
    assert (scores.kind, scores.group, scores.shape) == ("matmul", "attention", ("4*batch", "length", "length"))
    operands = [graph.ops[n.name] for n in graph.node(scores.node).all_input_nodes if n.name in graph.ops]
    assert ("4*batch", "length", 8) in [op.shape for op in operands]
    _, _, graph = traced("llama")
    sdpa = next(op for op in graph.ops.values() if op.kind == "attention")
    assert sdpa.shape == ("batch", 4, "length", 8)
    assert all(n.name in graph.ops for n in graph.node(sdpa.node).args[:3])


def test_names_of_nodes_come_from_module_paths() -> None:
    _, _, graph = traced("llama")
    matrices = [op.node for op in graph.ops.values() if op.weights and op.kind == "linear"]
    block = [f"self_attn_{p}_proj" for p in "qkvo"] + [f"mlp_{p}_proj" for p in ("gate", "up", "down")]
    assert matrices == [f"{name}_{layer}" for layer in (0, 1) for name in block] + ["lm_head"]
    again = trace(tiny_model("llama")[0])
    assert str(again.module.graph) == str(graph.module.graph)
    assert again.ops == graph.ops


def test_result_is_what_the_model_returns() -> None:
    _, example, graph = traced("llama")
    assert isinstance(graph.run(**example()), hf.modeling_outputs.CausalLMOutputWithPast)
    _, example, graph = traced("bert-base")
    result = graph.run(**example())
    assert result.last_hidden_state.shape == (2, 8, 32)
    assert result.pooler_output.shape == (2, 32)


def test_copy_is_independent_and_computes_the_same() -> None:
    _, example, graph = traced("llama-tied")
    copied = graph.copy()
    assert_same(copied.run(**example()), graph.run(**example()))
    copied.tensor("model.norm.weight").data.zero_()
    assert not torch.equal(graph.tensor("model.norm.weight"), copied.tensor("model.norm.weight"))
    assert not copied.run(**example()).logits.any()


def test_dense_parameter_counts_of_opt_125m_equal_the_published_ones() -> None:
    with torch.device("meta"):
        model = hf.OPTForCausalLM(hf.OPTConfig())
    graph = trace(model)
    counts: dict[str, int] = {}
    for weight in graph.weights.values():
        counts[weight.group] = counts.get(weight.group, 0) + weight.numel
    assert counts == {"attention": 28_348_416, "mlp": 56_669_184, "embedding": 40_183_296, "norm": 38_400}
    (head,) = [op for op in graph.ops.values() if op.group == "lm_head"]
    assert head.weights == ("model.decoder.embed_tokens.weight",)
    assert graph.weights[head.weights[0]].aliases == ("lm_head.weight",)
    assert sum(w.kind == "linear" for w in graph.weights.values()) == 72


def test_encoder_decoder_is_refused_by_name() -> None:
    config = hf.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    with pytest.raises(TraceError, match="T5ForConditionalGeneration is an encoder-decoder model"):
        trace(hf.T5ForConditionalGeneration(config))
