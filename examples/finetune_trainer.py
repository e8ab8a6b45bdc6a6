"""Fine-tune a pruned model with transformers' Trainer: its zeros stay zeros, and then it goes on to sparse kernels.

python examples/finetune_trainer.py                         # a small random model, on the text that every Python carries
python examples/finetune_trainer.py MODEL [TEXT [STEPS]]    # a folder, a GGUF file, a hub id; a text file; how many steps
"""

from __future__ import annotations

import sys
import tempfile

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import sparsec
from sparsec.calibrate import windows
from sparsec.data import load_model, load_text
from sparsec.evaluate import cut


def main(name: str = "tiny", text: str | None = None, steps: str = "40") -> nn.Module:
    loaded = load_model(name)
    small = name == "tiny"
    tokens, source = windows(text, loaded.tokenizer, 40 if small else 32, 64 if small else 256)
    held_out = cut(load_text(None), loaded.tokenizer, tokens.shape[1], 8).tokens

    # Pruned and not lowered: its weights are still plain parameters. `masked` keeps the pruned ones at zero from here on.
    pruned = sparsec.compile(loaded.model, "wanda(0.5),freeze", calibration=(tokens, source))
    model = sparsec.masked(pruned)
    tell("pruned", model, held_out)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=int(steps),
            per_device_train_batch_size=4,
            learning_rate=3e-3 if small else 1e-4,
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
            save_strategy="no",
            report_to="none",
        )
        rows = [{"input_ids": row, "labels": row} for row in tokens]
        Trainer(model=model, args=settings, train_dataset=rows).train()
    tell("fine-tuned", model, held_out)

    fast = sparsec.extend(model.eval(), "sparsity,fuse,lower(bitmap)")
    tell("on kernels", fast, held_out)
    return fast


@torch.no_grad()
def tell(label: str, model: nn.Module, ids: Tensor) -> None:
    """The loss on ids [sequences, length], and the share of zeros in the pruned layers as they are now."""
    loss = model(input_ids=ids.to(model.device), labels=ids.to(model.device)).loss
    graph = model.sparsec.graph
    layers = [weight for weight in graph.weights.values() if weight.mask is not None or weight.packed is not None]
    zeros = 1 - sum(graph.kept(layer.name) for layer in layers) / sum(layer.numel for layer in layers)
    print(f"{label:>10}: {zeros:.1%} zeros, loss {loss:.3f} on a text that it was not trained on")


if __name__ == "__main__":
    main(*sys.argv[1:])
