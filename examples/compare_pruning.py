"""Magnitude, Wanda, SparseGPT and ADMM side by side at one sparsity: what each does to a model's perplexity.

python examples/compare_pruning.py                       # a small random model, which has nothing to lose
python examples/compare_pruning.py MODEL                 # a folder, a GGUF file, a hub id
python examples/compare_pruning.py MODEL CALIBRATION TEXT SPARSITY     # calibrated on one text file, evaluated on another
"""

from __future__ import annotations

import sys

import sparsec
from sparsec.calibrate import windows
from sparsec.data import load_model, load_text
from sparsec.evaluate import compare, cut


def main(
    name: str = "tiny", calibration: str | None = None, text: str | None = None, share: str = "0.5"
) -> dict[str, float]:
    loaded = load_model(name)
    small = name == "tiny"
    sequences, length = (4, 64) if small else (32, 1024)

    # Drawn once, so that all methods learn from the same tokens. None is a text that every Python carries.
    tokens = windows(calibration, loaded.tokenizer, sequences, length)
    held_out = cut(load_text(text), loaded.tokenizer, length, 2 if small else 16)
    models = {"dense": loaded.model}
    told = {}
    for spec in (f"magnitude({share}, scope='layer')", f"wanda({share})", f"sparsegpt({share})", f"admm({share})"):
        pruned = sparsec.compile(loaded.model, f"{spec},freeze", calibration=tokens)
        errors = [w.pruned.error for w in pruned.sparsec.graph.masked() if w.pruned.error is not None]
        told[spec] = f", layers err by {sum(errors) / len(errors):.4f} of their outputs" if errors else ""
        models[spec] = pruned
        # One calibration serves every format: the pruned model goes on to its kernels.
        models[f"{spec} on bitmap kernels"] = sparsec.extend(pruned, "sparsity,fuse,lower(bitmap)")

    found = compare(models, held_out)
    for name, e in found.items():
        print(
            f"{name:<52} perplexity {e.perplexity:10.3f}, same next token {e.top1:.3f}, KL {e.kl:.4f}{told.get(name, '')}"
        )
    return {name: e.perplexity for name, e in found.items()}


if __name__ == "__main__":
    main(*sys.argv[1:])
