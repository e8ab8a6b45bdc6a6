"""A GGUF file as an ordinary checkpoint, tensor by tensor: what transformers does in memory, with its own tables of names."""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from sparsec.counts import MOST_PARTS, counts_asked
from sparsec.errors import DataError, some
from sparsec.memory import trim

_SHARD = 1 << 29
"""Bytes of tensors that are held before they are written."""
_TABLES = ("token_embd.weight", "output.weight")
"""By far the largest tensors, which are de-quantised some rows at a time."""
_ROWS = 1 << 24
"""Numbers of a table that are de-quantised at a time."""


def write_dense(
    file: Path, dtype: torch.dtype, folder: Path, step: Callable[[int, int], None]
) -> tuple[Counter[str], list[str]]:
    """Writes config, tokenizer and de-quantised weights into a folder, which is there. step: called with (done, tensors).

    Returns how many tensors are stored in which way, and the names of those that no module owns. Raises what gguf, transformers
    and the system raise.
    """
    import gguf
    import transformers
    from transformers import modeling_gguf_pytorch_utils as of_gguf

    where: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
    parsed = {"config": of_gguf.load_gguf_checkpoint(str(file), return_tensors=False)["config"]}
    for count, number, most in counts_asked(parsed["config"], MOST_PARTS):
        raise DataError(f"{file}: {count} is {number:,}, and no model has more than {most:,}; is the file whole?")
    config = transformers.AutoConfig.from_pretrained(str(file.parent), **where)
    transformers.AutoTokenizer.from_pretrained(str(file.parent), **where).save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    _tidied()
    reader = gguf.GGUFReader(file)
    architecture = of_gguf.read_field(reader, "general.architecture")[0]
    reader.fields.clear()
    _tidied()
    processor = of_gguf.TENSOR_PROCESSORS.get(architecture, of_gguf.TensorProcessor)(config=parsed["config"])
    names = of_gguf.get_gguf_hf_weights_map(model, processor)
    merged: dict[
        str, Tensor
    ] = {}  # experts, which come in several parts, and what a processor puts where it belongs itself
    parsed["tensors"] = merged

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for done, tensor in enumerate(reader.tensors):
            step(done, len(reader.tensors))
            if tensor.name in _TABLES and tensor.name in names and _is_plain(processor, tensor, names, parsed):
                yield names[tensor.name], _table(tensor, dtype)
                continue
            weights = gguf.dequantize(tensor.data, tensor.tensor_type)
            found = processor.process(
                weights=weights, name=tensor.name, tensor_key_mapping=names, parsed_parameters=parsed
            )
            if found.name in names:
                yield names[found.name], torch.from_numpy(np.require(found.weights, requirements=["C", "W"])).to(dtype)
        yield from ((name, tensor.to(dtype)) for name, tensor in merged.items())

    written = _write(folder, tensors())
    known = {str(t.name) for t in reader.tensors}
    _check_whole(file, model, known, names, written)
    # GPT-2's way knows the head without the table; experts are known by names without an ending.
    head = () if model.get_output_embeddings() is None else ("output.weight",)
    left = sorted(name for name in known - {*names, *head} if name.removesuffix(".weight") not in names)
    return Counter(t.tensor_type.name for t in reader.tensors), left


def _check_whole(
    file: Path, model: Any, known: Collection[str], names: Mapping[str, str], written: Collection[str]
) -> None:
    """DataError for a file that lacks a weight of its model, or one of the parts that a weight is put together from.

    known: tensors in the file. names: of each that there may be, the weight that it belongs to. written: weights that were found.
    """
    lacking = {name: weight for name, weight in names.items() if name not in known and f"{name}.weight" not in known}
    tied: dict[int, list[str]] = {}
    for weight, tensor in model.state_dict(keep_vars=True).items():
        tied.setdefault(id(tensor), []).append(weight)
    wanted = [group for group in tied.values() if not any(weight in written for weight in group)]
    missing = {weight for group in wanted for weight in group}
    # A part of a weight that other parts make up: the rest of it would be zeros.
    parts = Counter(names.values())
    missing |= {weight for weight in lacking.values() if parts[weight] > 1 and weight in written}
    if missing:
        told = sorted({name for name, weight in lacking.items() if weight in missing}) or sorted(missing)
        raise DataError(
            f"{file}: it lacks {some(told)}, of which {type(model).__name__} needs each; the file is not whole, or another kind "
            "of model than it says: get it again, or make it anew from the checkpoint"
        )


def _tidied() -> None:
    """A reader holds two arrays for every word of a vocabulary: what the last one took goes back before the next one comes."""
    gc.collect()
    trim()


def _is_plain(processor: Any, tensor: Any, names: dict[str, str], parsed: dict[str, Any]) -> bool:
    """Whether a processor leaves a table as it is, looked at on its first row."""
    import gguf

    row = gguf.dequantize(tensor.data[:1], tensor.tensor_type)
    before = dict(parsed["tensors"])
    found = processor.process(weights=row, name=tensor.name, tensor_key_mapping=names, parsed_parameters=parsed)
    plain = found.name == tensor.name and found.weights is row and parsed["tensors"] == before
    parsed["tensors"].clear()
    parsed["tensors"].update(before)
    return plain


def _table(tensor: Any, dtype: torch.dtype) -> Tensor:
    """[rows, columns], de-quantised some rows at a time."""
    import gguf

    columns, rows = (int(n) for n in tensor.shape[:2])
    made = torch.empty(rows, columns, dtype=dtype)
    step = max(1, _ROWS // columns)
    for start in range(0, rows, step):
        part = gguf.dequantize(tensor.data[start : start + step], tensor.tensor_type)
        made[start : start + step] = torch.from_numpy(np.require(part, requirements=["C", "W"]))
    return made


def _write(folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> set[str]:
    """Shards and their index; returns the names."""
    held: dict[str, Tensor] = {}
    placed: dict[str, str] = {}
    total = 0

    def flush() -> None:
        if held:
            shard = f"model-{len(set(placed.values())) + 1:05d}.safetensors"
            save_file(held, folder / shard, metadata={"format": "pt"})
            placed.update(dict.fromkeys(held, shard))
            held.clear()

    for name, tensor in tensors:
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > _SHARD:
            flush()
        held[name] = tensor.contiguous()
        total += tensor.nbytes
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), "utf-8")
    return set(placed)
