"""Prune a language model to half of its weights, run it on sparse kernels, and read what that changed.

python examples/prune_and_generate.py            # a small random model, whose text means nothing
python examples/prune_and_generate.py MODEL      # a folder, a GGUF file, a hub id
"""

from __future__ import annotations

import sys

import torch
from torch import nn

import sparsec
from sparsec.data import load_model


def main(name: str = "tiny") -> nn.Module:
    loaded = load_model(name)
    compiled = sparsec.compile(loaded.model, passes="magnitude(0.5),freeze,sparsity,flops,lower(csr)")

    # The compiled model is of the class that went in, and is used like it.
    tokens = loaded.tokenizer("The first thing that a compiler does is", return_tensors="pt")
    for label, model in (("dense", loaded.model), ("sparse", compiled)):
        with torch.no_grad():
            out = model.generate(**tokens, max_new_tokens=20, do_sample=False)
        print(f"{label:>6}: {loaded.tokenizer.decode(out[0], skip_special_tokens=True)!r}")

    print(compiled.sparsec.report())
    return compiled


if __name__ == "__main__":
    main(*sys.argv[1:])
