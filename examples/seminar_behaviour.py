"""What 30 % zeros do to a model as a whole: zeros, bytes, and how often it still predicts the same token. Draws three figures.

python examples/seminar_behaviour.py                                   # a small random model
python examples/seminar_behaviour.py facebook/opt-125m 0.3 figures     # MODEL, the share of zeros, the folder of the figures
"""

from __future__ import annotations

import sys
from pathlib import Path

import sparsec
from sparsec.data import load_model, load_text
from sparsec.evaluate import compare, cut
from sparsec.page.drawing import save_charts
from sparsec.page.report_charts import bar_chart


def main(name: str = "tiny", share: str = "0.3", folder: str = "figures") -> dict[str, float]:
    loaded = load_model(name)
    masked = sparsec.compile(loaded.model, f"magnitude({share}),freeze,sparsity,flops")
    csr = sparsec.extend(masked, "lower(csr)")
    zeros = f"{float(share):.0%}"
    models = {"dense": loaded.model, f"masked {zeros}": masked, f"CSR {zeros}": csr}

    found = compare(models, cut(load_text(), loaded.tokenizer, 64 if name == "tiny" else 256, 4))
    top1 = {variant: 100 * quality.top1 for variant, quality in found.items()}
    before, after = masked.sparsec.report(), csr.sparsec.report()
    sparsity = [0.0, 100 * before.sparsity, 100 * after.sparsity]
    megabytes = [before.bytes_dense / 1e6, before.bytes_held / 1e6, after.bytes_held / 1e6]

    what = list(models)
    charts = [
        bar_chart(
            "global-sparsity",
            "Global sparsity",
            "Embeddings and the head are not pruned, so it stays below the share that was asked for.",
            what,
            {"zeros": sparsity},
            "{:.1f}".format,
            "zeros of all parameters, %",
        ),
        bar_chart(
            "model-size",
            "Model size",
            "A mask removes nothing from memory. CSR stores what was kept, and a column index with it.",
            what,
            {"MB": megabytes},
            "{:.2f}".format,
            "MB",
        ),
        bar_chart(
            "top-1",
            "Top-1 agreement",
            "The zeros change predictions. How they are stored does not.",
            what,
            {"top-1": list(top1.values())},
            "{:.1f}".format,
            "same next token as dense, %",
        ),
    ]
    for path in save_charts([chart for chart in charts if chart is not None], Path(folder), "svg"):
        print(path)
    print(", ".join(f"{variant}: {value:.1f} % same next token" for variant, value in top1.items()))
    return top1


if __name__ == "__main__":
    main(*sys.argv[1:])
