"""Where the zeros, the parameters and the FLOPs of a model are, group by group and block by block. Draws four figures.

python examples/seminar_structure.py                                   # a small random model
python examples/seminar_structure.py facebook/opt-125m 0.3 figures     # MODEL, the share of zeros, the folder of the figures
"""

from __future__ import annotations

import sys
from pathlib import Path

import sparsec
from sparsec.data import load_model
from sparsec.page.drawing import save_charts
from sparsec.page.report_charts import report_charts

FIGURES = ("groups-sparsity", "groups-parameters", "groups-flops", "depth-sparsity")


def main(name: str = "tiny", share: str = "0.3", folder: str = "figures") -> list[Path]:
    loaded = load_model(name)
    compiled = sparsec.compile(loaded.model, f"magnitude({share}),freeze,sparsity,flops,lower(csr)")
    report = compiled.sparsec.report()
    for group in report.groups:
        mflop = (group.flops_per_token or 0.0) / 1e6
        print(
            f"{group.group:<10} {group.share:6.1%} of the parameters, {group.sparsity:6.1%} zeros, {mflop:8.2f} MFLOP a token"
        )
    written = save_charts([c for c in report_charts(report) if c.name in FIGURES], Path(folder), "svg")
    for path in written:
        print(path)
    return written


if __name__ == "__main__":
    main(*sys.argv[1:])
