"""What each of several processes does in tests/test_parallel.py: splits models, runs them, tells how near they come to one process.

Arguments: folders, each with a saved model and `expected.pt`. Prints JSON: by the folder's name what was found, or the error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import sparsec
from sparsec.errors import SparsecError
from sparsec.kernels.modules.group import Grouped
from sparsec.kernels.modules.packed_layer import PackedLayer
from sparsec.parallel.shares import processes_of


def split(folder: Path, how: str) -> Any:
    """A model of which this process holds a share: split as transformers reads it, or when it is in memory."""
    if how == "read":
        return AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto"))
    model = sparsec.load(folder)
    try:
        return sparsec.tensor_parallel(model)
    except SparsecError:
        assert processes_of(model) == 1  # it is as it was
        expected = torch.load(folder / "expected.pt")
        with torch.no_grad():
            assert torch.equal(model(input_ids=expected["ids"]).logits, expected["logits"])
        raise


def found(folder: Path, how: str) -> dict[str, Any]:
    """What is to be compared."""
    expected = torch.load(folder / "expected.pt")
    model = split(folder, how)
    layers = [m for m in model.modules() if isinstance(m, PackedLayer)]
    with torch.no_grad():
        logits = model(input_ids=expected["ids"]).logits
    text = model.generate(expected["ids"], max_new_tokens=8, do_sample=False, pad_token_id=0)
    try:
        model.save_pretrained(folder / "again")
        saving = "saved"
    except SparsecError as error:
        saving = str(error)
    return {
        "error": float((logits - expected["logits"]).abs().max() / expected["logits"].abs().max()),
        "text": torch.equal(text, expected["text"]),
        "nbytes": sum(m.packed.nbytes for m in layers),
        "faults": [fault for m in layers for fault in m.packed.layout_faults() + m.packed.content_faults()],
        "shares": sorted({str(m.share) for m in layers}),
        "groups": sum(
            isinstance(m, Grouped) and m._group is not None and bool(m._group._plans) for m in model.modules()
        ),
        "tied": [model.get_input_embeddings() is not None and tied(model)],
        "decoding": model.forward.reason() if hasattr(model.forward, "reason") else "",
        "saving": saving,
    }


def tied(model: Any) -> bool:
    """Whether table and head hold the same memory."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    first, second = ([*m.parameters(), *m.buffers()] for m in (table, head))
    return bool(first) and any(a is b for a in first for b in second)


def main() -> None:
    """Prints one line."""
    torch.set_num_threads(1)
    told: dict[str, Any] = {}
    for argument in sys.argv[1:]:
        how, _, place = argument.partition(":")
        folder = Path(place)
        try:
            told[f"{how}:{folder.name}"] = found(folder, how)
        except SparsecError as error:
            told[f"{how}:{folder.name}"] = {"refused": str(error)}
    print(json.dumps(told), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
