"""Train a model from scratch with nine in ten of its weights zero: under random masks that stay, and under masks that move.

python examples/train_sparse.py                   # a small model of characters, on the text that every Python carries
python examples/train_sparse.py STEPS [SEEDS]     # how many steps; how many seeds
"""

from __future__ import annotations

import sys
import tempfile

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PrinterCallback, Trainer, TrainingArguments

import sparsec
from sparsec.data import load_text

SPARSITY = 0.9
SEEN, EMBEDDED, WIDTH = 32, 16, 256  # characters before the next one; numbers for each of them; neurons of a layer
BATCH, RATE, DENSE_RATE = 256, 2e-2, 5e-3  # each the best of four: for masks that stay, and for no masks
SHARE, EVERY = 0.3, 50  # of the kept weights that move at first; steps between two moves
WAYS = ("dense", "static", "set", "rigl")


def main(steps: str = "1000", seeds: str = "3") -> dict[str, list[float]]:
    train, held_out, characters = text()
    print(f"Nats per character on held-out text after {steps} steps; {SPARSITY:.0%} of the layers' weights are zero")
    print(f"{'':8}" + "".join(f"{way:>8}" for way in WAYS))
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for seed in range(int(seeds)):
        for way in WAYS:
            found[way].append(loss(trained(way, seed, int(steps), train, characters), held_out))
        tell(f"seed {seed}", [losses[-1] for losses in found.values()])
    tell("mean", [sum(losses) / len(losses) for losses in found.values()])
    return found


def tell(label: str, losses: list[float]) -> None:
    print(f"{label:8}" + "".join(f"{loss:8.3f}" for loss in losses), flush=True)


class Characters(nn.Module):
    """Three layers that see the last SEEN characters and say which one comes next."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, EMBEDDED)
        self.layers = nn.Sequential(
            nn.Linear(SEEN * EMBEDDED, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, characters),
        )

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """input_ids [n, SEEN], labels [n]."""
        logits = self.layers(self.embedding(input_ids).flatten(1))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Every place of a text: the characters before it, and the one that stands there."""

    def __init__(self, ids: Tensor) -> None:
        self.windows = ids.unfold(0, SEEN + 1, 1)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[at, :-1], "labels": self.windows[at, -1]}


def text() -> tuple[Rows, Rows, int]:
    """To train on, to look at afterwards, and how many characters there are."""
    content = load_text(None).content
    characters = sorted(set(content))
    numbers = {character: number for number, character in enumerate(characters)}
    ids = torch.tensor([numbers[character] for character in content])
    cut = len(ids) * 9 // 10
    return Rows(ids[:cut]), Rows(ids[cut:]), len(characters)


def trained(way: str, seed: int, steps: int, rows: Rows, characters: int) -> nn.Module:
    """A model after so many steps; `static`, `set` and `rigl` begin with the same weights under the same masks."""
    torch.manual_seed(seed)
    model: nn.Module = Characters(characters)
    if way != "dense":
        model = sparse(model, rows)
    moving = [sparsec.RegrowCallback(way, share=SHARE, every=EVERY, seed=seed)] if way in ("set", "rigl") else []
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=DENSE_RATE if way == "dense" else RATE,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 20,
            seed=seed,
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
        )
        trainer = Trainer(model=model, args=settings, train_dataset=rows, callbacks=moving)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model


def sparse(model: nn.Module, rows: Rows) -> nn.Module:
    """The model under a random mask for each layer; what is left is larger, so that outputs are as large as they were."""
    masks = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            masks[name] = random_mask(module.weight)
            module.weight.data /= (1 - SPARSITY) ** 0.5
    example = {"input_ids": rows.windows[:4, :-1]}
    return sparsec.masked(sparsec.compile(model, "mask,freeze", masks=masks, example_inputs=example))


def random_mask(weight: Tensor) -> Tensor:
    """Keeps 1 - SPARSITY of the weights, exactly."""
    kept = torch.zeros(weight.numel(), dtype=torch.bool)
    kept[torch.randperm(weight.numel())[: round((1 - SPARSITY) * weight.numel())]] = True
    return kept.view(weight.shape)


@torch.no_grad()
def loss(model: nn.Module, rows: Rows) -> float:
    """Mean over all characters, in nats."""
    model.eval()
    parts = rows.windows.split(4096)
    return sum(float(model(part[:, :-1], part[:, -1])["loss"]) * len(part) for part in parts) / len(rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
