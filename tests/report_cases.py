"""Models and reports that are the same on every machine, for tests of the report."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sparsec.compiler
from sparsec.machine import Machine
from sparsec.report.collect import Report
from sparsec.report.records import EvaluationFacts, LatencyFacts, ModelFacts, Sample, Stage
from sparsec.report.variant import Variant
from sparsec.timing.spread import Spread

SPEC = "magnitude(0.3, targets=('mlp', 'model.layers.0.self_attn.*')),freeze,sparsity,flops(context=32),lower(csr32)"


def model(tied: bool = True) -> Any:
    """Two layers; its weights are arithmetic, since random numbers may differ in the last bit between processors."""
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    made = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for i, parameter in enumerate(made.parameters()):
            # multiples of an odd number modulo a prime: distinct, and exact in float32
            numbers = (torch.arange(parameter.numel()) * 7919 + 31 * i) % 10007
            parameter.copy_((numbers.view(parameter.shape) - 5003) / 2**15)
    return made


@cache
def compiled(spec: str = SPEC, tied: bool = True) -> Any:
    """The model above, compiled; only to be read."""
    return sparsec.compiler.compile(model(tied), spec)


def variant(
    parameters: int, nnz: int, nbytes: int, masks: int, flops: float, by_flops: float, by_bytes: float
) -> Variant:
    """What is counted of one."""
    return Variant(
        parameters=parameters,
        nnz=nnz,
        bytes=nbytes,
        bytes_masks=masks,
        flops_per_token=flops,
        speedup_theoretical=by_flops,
        speedup_theoretical_bytes=by_bytes,
    )


def report() -> Report:
    """A report with every section: counted from a compiled model, its machine, times and measurements invented."""
    lowered = compiled()
    found: Report = lowered.sparsec.report()
    variants = {
        "dense": variant(found.parameters, found.parameters, 90000, 0, 100000.0, 1.0, 1.0),
        "masked": variant(found.parameters, found.nnz, 90000, 17408, 100000.0, 1.0, 1.0),
        "dense_on_sparsec": variant(found.parameters, found.parameters, 90000, 0, 100000.0, 1.0, 1.0),
        "lowered": variant(found.parameters, found.nnz, found.bytes_held, 0, 80000.0, 1.25, 0.89),
    }
    measured = {
        name: replace(
            counted,
            resident_bytes=(1 + i) * 1_000_000,
            perplexity=(96.5, 1234.5, 96.5, 1234.5)[i],
            top1=(1.0, 0.75, 1.0, 0.75)[i],
            top5=(1.0, 0.875, 1.0, 0.875)[i],
            kl=(0.0, 1.5, 0.0, 1.5)[i],
            prefill_ms=Spread(3.0 + i, 2.5 + i, 3.5 + i, 20),
            decode_ms=Spread(1.0 + i, 0.5 + i, 150.0, 40),
            speedup_prefill=Spread(1 / (1 + i), 0.9 / (1 + i), 1.1 / (1 + i), 20),
            speedup_decode=Spread(1 / (1 + i), 0.9 / (1 + i), 1.1 / (1 + i), 40),
            zeros_speedup_prefill=Spread(1.2, 1.1, 1.3, 20) if name == "lowered" else None,
            zeros_speedup_decode=Spread(1.3, 1.2, 1.4, 40) if name == "lowered" else None,
            linears_ms=(0.5, 0.5, 0.5, 0.25)[i],
            speedup_predicted=(1.0, 1.0, 1.0, 1.25)[i],
        )
        for i, (name, counted) in enumerate(variants.items())
    }
    layers = tuple(
        replace(
            row,
            kernel="csr_cpu" if row.packed else None,
            speedup_measured=0.5 + i / 10 if row.packed else None,
            speedup_predicted=0.6 + i / 10 if row.packed else None,
            ms_predicted=(1 + i) / 1000 if row.multiplied else None,
            binds=("bytes", "decode", "flops", "call")[i % 4] if row.packed else None,
        )
        for i, row in enumerate(found.layers)
    )
    return replace(
        found,
        passes=tuple(replace(p, seconds=0.1 * p.index) for p in found.passes),
        layers=layers,
        summary=measured,
        machine=Machine(
            cpu="A Processor",
            isa="AVX2",
            cores=2,
            memory_bytes=8 << 30,
            gpu=None,
            system="Linux 6 x86_64",
            python="3.11.0",
            versions={"sparsec": "0.1.0", "torch": "2.13.0"},
            commit="0123456789ab",
            threads=2,
            kernels={"csr_cpu": "ready", "csr_reference": "ready"},
            native="built with c++, runs avx2",
            load=0.5,
        ),
        model=ModelFacts("small", "LlamaForCausalLM", "a test", "arithmetic in float32", "float32"),
        evaluation=EvaluationFacts("a text", "ab" * 32, 1000, 8, 64, "float32"),
        latency=LatencyFacts(16, 2, 20, 40),
        sample=Sample("Why?", True, 5, {"dense": "Because\nof that.", "lowered": "Because " * 20}),
        stages=(Stage("evaluating", 12.5, 6, 8, "windows"), Stage("timing decode", 3.0, 40, 40, "rounds")),
        remarks=("invented numbers",),
        beside={"magnitude(0.4)": 2345.6},
        decoding="one native call a token",
    )
