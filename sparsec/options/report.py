"""The options of `sparsec report`."""

from __future__ import annotations

import argparse

from sparsec.command_line import CommandLine
from sparsec.defaults import ALONE, DEFAULT_PASSES, Effort
from sparsec.options.shared import DTYPES, add_bos, add_calibration, add_device, add_pages, positive, seed, threads

PROG = "python -m sparsec.report"
EXAMPLES = """
examples:
  python -m sparsec.report                 # SmolLM2-135M from its package
  python -m sparsec.report tiny --quick    # a small random model, in seconds
  python -m sparsec.report facebook/opt-125m --passes "magnitude(0.3),freeze,sparsity,flops,lower(csr32)"
  python -m sparsec.report my-model.gguf --print-ir changed --no-measure
  python -m sparsec.report --passes "admm(0.5),freeze,sparsity,flops,fuse,lower(auto)" --calibration my.txt
  python -m sparsec.report --passes "wanda(0.4),freeze,sparsity,flops,fuse,lower(auto)" --beside "magnitude(0.4)"
  python -m sparsec.report tiny --no-measure --picture "layers.0.self_attn.*"
  python -m sparsec.report my-folder --device cuda --dtype bf16 --passes "wanda(0.7),freeze,sparsity,flops,lower(auto)"
  python -m sparsec.report smollm2 --html report.html --svg figures
  python -m sparsec.report my-folder --text my.txt --eval-length 1024 --json report.json --csv layers.csv

`python -m sparsec` lists passes, formats and kernels.
"""


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The command line."""
    p = CommandLine(
        prog=prog,
        description="Compiles a language model or an encoder and reports it: per pass, layer and group, and dense / masked / "
        "lowered compared.",
        epilog=EXAMPLES.replace(PROG, prog),
    )
    usual = Effort()
    p.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a folder, a .gguf file, a hub id, or `tiny` (small, random); default: the packaged SmolLM2-135M; of a folder that "
        "sparsec saved, the report that was saved with it is shown",
    )
    p.add_argument("--passes", default=DEFAULT_PASSES, metavar="SPEC", help="default: %(default)s")
    p.add_argument(
        "--beside",
        action="append",
        default=[],
        metavar="SPEC",
        help="also measure the quality that these passes give, show what the model then writes, and nothing else; may be given "
        "several times",
    )
    p.add_argument("--dtype", choices=DTYPES, default="fp32", help="to compute in; default: %(default)s")
    add_device(p)
    p.add_argument("--threads", type=threads, metavar="N", help="threads of torch; default: as torch chooses")
    p.add_argument(
        "--seed",
        type=seed,
        default=0,
        help="seed of random weights and of what is drawn to calibrate on; default: %(default)s",
    )
    add_calibration(p)
    out = p.add_argument_group("output")
    out.add_argument(
        "--print-ir", choices=("none", "before", "after", "changed"), default="none", help="around every pass"
    )
    out.add_argument("--dump-ir", metavar="DIR", help="write the IR there, one numbered file per pass")
    out.add_argument("--layers", action="store_true", help="a line for every weight; default: one for all of a role")
    out.add_argument(
        "--picture",
        action="append",
        default=[],
        metavar="LAYER",
        help="draw what pruning left of the weights of this name, or of those that a glob names; may be given several times",
    )
    out.add_argument(
        "--json", metavar="FILE", help="the whole report, - on the standard output; schema in sparsec/report/schema.py"
    )
    out.add_argument("--csv", metavar="FILE", help="the layers")
    add_pages(out)
    how = p.add_argument_group("measuring")
    how.add_argument(
        "--text",
        metavar="FILE",
        help="UTF-8 file, or dataset:NAME[,CONFIG[,SPLIT[,COLUMN]]]; default: an embedded text",
    )
    add_bos(how)
    how.add_argument("--eval-windows", type=positive, metavar="N", help=f"default: {usual.windows}")
    how.add_argument("--eval-length", type=positive, metavar="L", help="tokens of a window; default: 512")
    how.add_argument("--prompt", metavar="TEXT", help=f"for the sample; default: {usual.prompt!r}")
    how.add_argument(
        "--prompt-tokens", type=positive, metavar="N", help=f"of the timed prefill; default: {usual.prompt_tokens}"
    )
    how.add_argument(
        "--new-tokens",
        type=positive,
        metavar="N",
        help=f"of the sample and the timed decoding; default: {usual.new_tokens}",
    )
    how.add_argument(
        "--sensitivity",
        type=positive,
        nargs="?",
        const=1,
        metavar="N",
        help=f"also prune each weight alone, and see how far the model moves, on N windows of {ALONE} tokens; N: %(const)s",
    )
    how.add_argument("--no-measure", action="store_true", help="count, but run no model")
    how.add_argument(
        "--quick", action="store_true", help="few windows and repeats: to see that it works, not to compare"
    )
    p.add_argument("--traceback", action="store_true", help="for developers: errors with where they come from")
    return p
