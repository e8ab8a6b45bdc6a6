"""Write a checkpoint of random weights in the shape of a Llama, in bf16 shards: to try what a large model needs.

python examples/synthetic_checkpoint.py SIZE [FOLDER]            # tiny, 135M, 1B, 3B, 7B, 70B or 405B: 2 bytes of disk a weight
python examples/synthetic_checkpoint.py config SIZE [FOLDER]     # no weights: what `sparsec plan FOLDER` takes

FOLDER is a new one, random-SIZE where none is named. 16 million numbers are in memory at a time. The tokens of its tokenizer are
the 256 bytes; what such a model says means nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from sparsec.data.tiny import byte_tokenizer

SHARD = 500_000_000
"""Bytes of a file at most, unless one tensor takes more."""
PIECE = 1 << 24
"""Numbers that are drawn at once."""
# hidden, intermediate, layers, heads, key and value heads, vocabulary, whether the head is the embedding
SIZES = {
    "tiny": (64, 192, 2, 4, 2, 512, True),
    "135M": (576, 1536, 30, 9, 3, 49152, True),
    "1B": (2048, 8192, 16, 32, 8, 128256, True),
    "3B": (3072, 8192, 28, 24, 8, 128256, True),
    "7B": (4096, 11008, 32, 32, 32, 32000, False),
    "70B": (8192, 28672, 80, 64, 8, 128256, False),
    "405B": (16384, 53248, 126, 128, 8, 128256, False),
}


def config_of(size: str) -> LlamaConfig:
    if size not in SIZES:
        raise SystemExit(f"there is no size {size!r}; sizes: {', '.join(SIZES)}")
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = SIZES[size]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=256,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def drawn(shape: torch.Size, generator: torch.Generator) -> Iterator[Tensor]:
    """A tensor in bf16, a piece at a time: ones for norms, else numbers as training begins with."""
    left = shape.numel()
    while left:
        count = min(left, PIECE)
        piece = torch.ones(count) if len(shape) == 1 else 0.02 * torch.randn(count, generator=generator)
        yield piece.bfloat16()
        left -= count


def write_shard(path: Path, shapes: dict[str, torch.Size], generator: torch.Generator) -> None:
    """A file of safetensors: the length of its header, the header, and all tensors one after the other."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * shape.numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            for piece in drawn(shape, generator):
                file.write(piece.view(torch.int16).numpy().data)


def main(*words: str) -> Path:
    only_config = words[:1] == ("config",)
    size, *places = words[only_config:] or ("tiny",)
    if size in ("-h", "--help") or len(places) > 1:
        raise SystemExit(__doc__)
    folder = Path(places[0] if places else f"random-{size}")
    config = config_of(size)
    if folder.exists():
        raise SystemExit(f"{folder} is there already; name a new folder")
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    if only_config:
        print(f"{folder}: the config of a Llama of {size}, without weights")
        return folder

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shards: list[dict[str, torch.Size]] = [{}]
    for name, parameter in model.named_parameters():  # a head that is the embedding comes once
        held = 2 * sum(shape.numel() for shape in shards[-1].values())
        if held and held + 2 * parameter.numel() > SHARD:
            shards.append({})
        shards[-1][name] = parameter.shape

    generator, files = torch.Generator().manual_seed(0), {}
    for i, shapes in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_shard(folder / file, shapes, generator)
        files.update(dict.fromkeys(shapes, file))
    total = 2 * sum(p.numel() for p in model.parameters())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    print(f"{folder}: {total / 1e6:,.1f} MB in {len(shards)} files")
    return folder


if __name__ == "__main__":
    main(*sys.argv[1:])
