"""The options of `sparsec study`."""

from __future__ import annotations

from sparsec.command_line import CommandLine
from sparsec.defaults import MIN_REPEATS, Effort
from sparsec.options.shared import DTYPES, add_bos, add_calibration, add_device, add_pages, positive, seed, threads

PROG = "python -m sparsec.study"
EXAMPLES = """
examples:
  python -m sparsec.study tiny --passes "magnitude({zeros}),freeze,lower({layout})" --grid zeros=0.5,0.9 --grid layout=csr,bitmap
  python -m sparsec.study --preset seminar --json seminar.json             # SmolLM2-135M; stopped? run it again
  python -m sparsec.study --preset tipping --passes "wanda({zeros}, pattern='block:16x16'),freeze"
  python -m sparsec.study my-model --passes "{method}(0.5),freeze,fuse,lower(auto)" --grid method=magnitude,wanda,admm
  python -m sparsec.study --preset seminar --html seminar.html --svg figures
  python -m sparsec.study --plan study.yaml --csv cells.csv --markdown cells.md

A plan is a YAML file of the same options, each without its dashes:

  passes: "wanda({zeros}),freeze,lower({layout})"
  grid:
    zeros: [0.3, 0.5]
    layout: [csr, bitmap, "nm2:4"]
  windows: 8
"""
PRESETS = {
    "seminar": "dense, masked, CSR and the best layout at 30, 50, 70 and 90 % zeros, beside the seminar's table",
    "tipping": "the sparsity at which the model collapses, by method; of other --passes with a placeholder {zeros}, too",
    "patterns": "unstructured, N:M and blocks at 50 % zeros, and the sparsity at which each is as fast as unstructured ones",
    "frontier": "dense and admm at 30 to 70 % zeros, with plain, 8-bit and 4-bit values: what "
    "nothing beats in quality and bytes, or time",
}
"""What each measures; `sparsec.sweep.presets` has the studies themselves."""


def parser(prog: str = PROG) -> CommandLine:
    """The command line."""
    p = CommandLine(
        prog=prog,
        description="Sweeps passes over one model: parameters, bytes, FLOPs, quality and time of every cell against dense.",
        epilog=EXAMPLES.replace(PROG, prog),
    )
    usual = Effort()
    p.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a folder, a .gguf file, a hub id, or `tiny` (small, random); default: the packaged SmolLM2-135M",
    )
    p.add_argument(
        "--passes",
        action="append",
        default=[],
        metavar="SPEC",
        help="with placeholders such as {zeros}; may be given several times",
    )
    p.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="NAME=V,V",
        help="the values of a placeholder; may be given several times",
    )
    p.add_argument("--plan", metavar="FILE", help="these options from a YAML file; what is given here goes before")
    p.add_argument(
        "--preset",
        choices=PRESETS,
        help="; ".join(f"{name}: {text}" for name, text in PRESETS.items()).replace("%", "%%"),
    )
    p.add_argument("--dtype", choices=DTYPES, default="fp32", help="to compute in; default: %(default)s")
    add_device(p)
    p.add_argument("--threads", type=threads, metavar="N", help="threads of torch; default: as torch chooses")
    p.add_argument(
        "--seed", type=seed, default=0, help="seed of random weights and of what is drawn; default: %(default)s"
    )
    add_calibration(p)
    how = p.add_argument_group("measuring")
    how.add_argument(
        "--text",
        metavar="FILE",
        help="UTF-8 file, or dataset:NAME[,CONFIG[,SPLIT[,COLUMN]]]; default: an embedded text",
    )
    add_bos(how)
    how.add_argument("--windows", type=positive, default=usual.windows, metavar="N", help="default: %(default)s")
    how.add_argument("--length", type=positive, metavar="L", help="tokens of a window; default: 512")
    how.add_argument(
        "--prompt-tokens", type=positive, default=usual.prompt_tokens, metavar="N", help="default: %(default)s"
    )
    how.add_argument(
        "--new-tokens", type=positive, default=usual.new_tokens, metavar="N", help="decoded; default: %(default)s"
    )
    how.add_argument(
        "--repeats", type=positive, default=MIN_REPEATS, metavar="N", help="of a prefill; default: %(default)s"
    )
    how.add_argument(
        "--cell-seconds", type=positive, default=20, metavar="S", help="to time one cell in; default: %(default)s"
    )
    out = p.add_argument_group("output")
    out.add_argument(
        "--json",
        metavar="FILE",
        help="all of it, kept up to date cell by cell; goes on from there if it exists; - is the standard output",
    )
    out.add_argument("--csv", metavar="FILE", help="one line for every cell")
    out.add_argument("--markdown", metavar="FILE", help="the table")
    add_pages(out)
    p.add_argument("--traceback", action="store_true", help="for developers: errors with where they come from")
    return p
