"""The options of `sparsec bench`."""

from __future__ import annotations

import argparse
from pathlib import Path

from sparsec.command_line import CommandLine
from sparsec.options.shared import DTYPES

PROG = "python -m sparsec.bench"
EXAMPLES = """
examples:
  python -m sparsec.bench                                                # some shapes, fp32, one row
  python -m sparsec.bench --shapes llama-7b --dtypes fp32,bf16 --rows 1,8,512
  python -m sparsec.bench --shapes 4096x4096 --formats bitmap,bsr16x16,nm2:4,auto --json table.json
  python -m sparsec.bench --shapes 4096x4096 --layers 6                  # six layers in a row, partly cache-warm
  python -m sparsec.bench --busy --dtypes fp32,bf16                      # beside a process that computes all the time
  python -m sparsec.bench --device cuda --out results                    # a GPU: correctness, kernels, whole models
  python -m sparsec.bench --end-to-end smollm2 --compile                 # tokens per second of a whole model
  python -m sparsec.bench --end-to-end smollm2 --dtypes bf16 --peers ~/peers/bin/python    # by turns with llama.cpp
  python -m sparsec.bench --end-to-end pythia-410m --dtypes bf16 --sparsity 0.7 --csv tokens.csv
"""
MODELS = ("smollm2-135m", "opt-125m", "pythia-410m", "llama-7b")
"""Whose sizes the benchmark knows."""
SHAPES = "576x576,1536x576,768x3072,4096x1024,11008x4096"
FORMATS = "bitmap,csr8,csr16,dense,dense:int8,bitmap:int8,dense:int4g64,bitmap:int4g64"
ROTATE_MB = 1024


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """All options; those of one mode default to None, so that they can be refused in the other."""
    p = CommandLine(
        prog=prog,
        description="Times sparse products against F.linear and torch.sparse on the CPU, whole models (--end-to-end), what a busy "
        "machine costs (--busy), or a GPU (--device cuda).",
        epilog=EXAMPLES.replace(PROG, prog),
    )
    p.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda: every kernel checked, the kernel table, then decoding of whole models, in one call; default: %(default)s",
    )
    p.add_argument("--sparsity", default="0.5,0.7,0.9", help="shares of zeros, by commas; default: %(default)s")
    p.add_argument("--dtypes", help=f"of {', '.join(DTYPES)}, by commas; default: fp32, on a GPU bf16,fp16")
    p.add_argument("--threads", type=int, metavar="N", help="threads of torch; default: as torch chooses")
    p.add_argument("--repeats", type=int, metavar="N", help="rounds; default: 20")
    p.add_argument("--json", type=Path, metavar="FILE", help="all figures; - is the standard output")
    p.add_argument("--csv", type=Path, metavar="FILE")
    p.add_argument(
        "--layers",
        type=int,
        metavar="N",
        help="table: N weights of one shape run in a row, again and again, in place of --rotate-mb; with --end-to-end: "
        "layers of a model with random weights, default: all that fit into memory",
    )
    p.add_argument(
        "--busy",
        action="store_true",
        help="what another process that computes all the time costs: the speedup of layers in a row (48 of 1024x1024, half "
        "zeros) and the time of passes, idle and busy, and whether enough is left on two cores; two minutes; takes --shapes, "
        "--dtypes, --layers, --threads and --repeats",
    )
    on_gpu = p.add_argument_group("with --device cuda")
    on_gpu.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for bench.json and bench.md; default: sparsec-bench-cuda"
    )
    on_gpu.add_argument("--budget", type=int, metavar="SECONDS", help="that all of it may take; default: 450")
    one = p.add_argument_group("kernel table")
    one.add_argument("--shapes", help=f"OUTxIN or a model's ({', '.join(MODELS)}), by commas; default: {SHAPES}")
    one.add_argument(
        "--formats", help=f"as `lower` spells them, or auto, by commas; `sparsec` lists all; default: {FORMATS}"
    )
    one.add_argument("--rows", help="of x (tokens), by commas; default: 1")
    one.add_argument(
        "--rotate-mb", type=int, metavar="MB", help=f"to walk through; 0: one copy, cache-warm; default: {ROTATE_MB}"
    )
    all_of_it = p.add_argument_group("whole models")
    all_of_it.add_argument(
        "--end-to-end",
        metavar="MODEL",
        help=f"smollm2 (the packaged model), {', '.join(MODELS)} (random weights of that shape), a folder, a .gguf file, a "
        "hub id, or tiny",
    )
    all_of_it.add_argument(
        "--passes", metavar="SPEC", help="{sparsity} stands for each of --sparsity; default: those of compile"
    )
    all_of_it.add_argument("--prompt-tokens", type=int, metavar="N", help="default: 64")
    all_of_it.add_argument("--new-tokens", type=int, metavar="N", help="decoded in each round; default: 4")
    all_of_it.add_argument(
        "--compile", action="store_true", default=None, help="also under torch.compile, which takes minutes"
    )
    all_of_it.add_argument(
        "--peers",
        type=Path,
        metavar="PYTHON",
        help="of another environment: llama.cpp and OpenVINO GenAI, where it can import llama_cpp or openvino_genai, take turns "
        "with all modes, dense and quantised, on as many threads; each is compared within its precision: F32, BF16, 8 bits, 4 bits",
    )
    return p
