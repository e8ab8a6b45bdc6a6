"""What a streamed run holds in memory does not grow with the number of layers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparsec.data.tiny import byte_tokenizer

SIZES = {
    "vocab_size": 257,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
PER_LAYER = 2 * (4 * 1024 * 1024 + 3 * 1024 * 3072)
"""Bytes in bfloat16."""


def checkpoint(folder: Path, layers: int) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(
        LlamaConfig(**SIZES, num_hidden_layers=layers, max_position_embeddings=1024), dtype=torch.bfloat16
    )
    model.save_pretrained(folder, max_shard_size="30MB")
    byte_tokenizer().save_pretrained(folder)
    return folder


def peak(model: Path, folder: Path, passes: str) -> int:
    """Bytes at most, mapped files aside."""
    words = [str(model), str(folder), "--passes", passes, "--dtype", "bf16", "--json", "--max-shard-size", "30MB"]
    drawn = ["--calibration-sequences", "4", "--calibration-length", "256"]
    ended = subprocess.run(
        [sys.executable, "-m", "sparsec", "compress", *words, *drawn], capture_output=True, text=True, timeout=900
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return int(json.loads(ended.stdout.splitlines()[-1])["peak_memory_bytes"])


@pytest.mark.slow
@pytest.mark.parametrize("prune", ["magnitude(0.5)", "wanda(0.5)", "sparsegpt(0.5)"])
def test_memory_does_not_grow_with_layers(prune: str, tmp_path: Path) -> None:
    passes = f"{prune},freeze,fuse,lower(bitmap)"
    few, many = (peak(checkpoint(tmp_path / f"{n}", n), tmp_path / f"{n} out", passes) for n in (8, 24))
    print(
        f"{prune}: {few / 1e6:.0f} MB of 8 layers, {many / 1e6:.0f} MB of 24, which hold {16 * PER_LAYER / 1e6:.0f} MB more"
    )
    # What tracing knows of a layer takes a megabyte or two whatever its size; of freed memory, allocators keep now more, now less.
    assert many - few < 0.3 * 16 * PER_LAYER
