"""The command line of the benchmark, read and checked before anything slow runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sparsec.bench.cases import KNOWN, Asked, asked
from sparsec.bench.models import CONFIGS, shapes
from sparsec.command_line import CommandLine
from sparsec.console.command import DTYPES, MAX_THREADS, MAX_WHOLE
from sparsec.console.output import writable
from sparsec.errors import SpecError

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
SHAPES = "576x576,1536x576,768x3072,4096x1024,11008x4096"
FORMATS = "bitmap,csr8,csr16,dense,dense:int8,bitmap:int8,dense:int4g64,bitmap:int4g64"
ROTATE_MB = 1024
ONLY_TABLE = ("shapes", "formats", "rows", "rotate_mb")
ONLY_MODELS = ("passes", "prompt_tokens", "new_tokens", "compile", "peers")
ONLY_CPU = (
    "end_to_end",
    "passes",
    "prompt_tokens",
    "new_tokens",
    "compile",
    "peers",
    "rotate_mb",
    "threads",
    "json",
    "csv",
)
ONLY_GPU = ("out", "budget")
NOT_BUSY = ("formats", "rows", "rotate_mb", "end_to_end", *ONLY_MODELS, "json", "csv")
T = TypeVar("T")


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
    one.add_argument("--shapes", help=f"OUTxIN or a model's ({', '.join(CONFIGS)}), by commas; default: {SHAPES}")
    one.add_argument("--formats", help=f"of {KNOWN}, by commas; default: {FORMATS}")
    one.add_argument("--rows", help="of x (tokens), by commas; default: 1")
    one.add_argument(
        "--rotate-mb", type=int, metavar="MB", help=f"to walk through; 0: one copy, cache-warm; default: {ROTATE_MB}"
    )
    all_of_it = p.add_argument_group("whole models")
    all_of_it.add_argument(
        "--end-to-end",
        metavar="MODEL",
        help=f"smollm2 (the packaged model), {', '.join(CONFIGS)} (random weights of that shape), a folder, a .gguf file, a "
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


def check(options: argparse.Namespace) -> None:
    """SpecError for numbers out of range and options of the other mode; DataError for files that cannot be written."""
    if options.busy:
        others = [name for name in NOT_BUSY if getattr(options, name) is not None]
        for name in ["device"] * (options.device == "cuda") + others:
            raise SpecError(f"--{name.replace('_', '-')}: leave it out with --busy")
    elsewhere = ONLY_CPU if options.device == "cuda" else ONLY_GPU
    for name in elsewhere:
        if getattr(options, name) is not None:
            way = "out with --device cuda" if options.device == "cuda" else "in only with --device cuda"
            raise SpecError(f"--{name.replace('_', '-')}: leave it {way}")
    other, way = (ONLY_TABLE, "leave it out with") if options.end_to_end else (ONLY_MODELS, "it goes with")
    for name in other:
        if getattr(options, name) is not None:
            raise SpecError(f"--{name.replace('_', '-')} says nothing here; {way} --end-to-end")
    limits = (
        ("threads", 1),
        ("repeats", 2),
        ("layers", 1),
        ("rotate_mb", 0),
        ("prompt_tokens", 1),
        ("new_tokens", 1),
        ("budget", 1),
    )
    for name, least in limits:
        value = getattr(options, name)
        if value is not None and value < least:
            raise SpecError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
        most = MAX_THREADS if name == "threads" else MAX_WHOLE
        if value is not None and value > most:
            raise SpecError(f"--{name.replace('_', '-')} must be at most {most}, got {value}")
    if options.layers is not None and options.rotate_mb is not None:
        raise SpecError("--layers and --rotate-mb exclude each other: a stack of layers is what is walked through")
    for path in (options.json, options.csv):
        if path is not None:
            writable(path)


def read_sparsities(text: str) -> list[float]:
    """Shares in [0, 1)."""
    found = _list("--sparsity", text, float)
    if any(not 0 <= s < 1 for s in found):
        raise SpecError(f"--sparsity must lie in [0, 1), got {text}")
    return found


def read_dtypes(text: str) -> list[str]:
    """Keys of DTYPES."""
    found = list(dict.fromkeys(text.split(",")))
    unknown = [d for d in found if d not in DTYPES]
    if unknown:
        raise SpecError(f"--dtypes takes {', '.join(DTYPES)}, got {unknown[0]!r}")
    return found


def read_rows(text: str) -> list[int]:
    """Numbers of at least 1."""
    found = _list("--rows", text, int)
    if any(r < 1 for r in found):
        raise SpecError(f"--rows must be at least 1, got {text}")
    return found


def read_formats(text: str) -> list[Asked]:
    """As they are named, each once."""
    return [asked(label) for label in dict.fromkeys(text.split(","))]


def read_shapes(text: str) -> dict[tuple[int, int], int | None]:
    """(out, in), with how often a model that was named has it."""
    found: dict[tuple[int, int], int | None] = {}
    for part in text.split(","):
        if part in CONFIGS:
            for shape, count in shapes(part).items():
                found[shape] = (found.get(shape) or 0) + count
        else:
            found.setdefault(_shape(part), None)
    return found


def _shape(text: str) -> tuple[int, int]:
    parts = text.split("x")
    if len(parts) != 2 or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise SpecError(f"--shapes takes OUTxIN such as 11008x4096, or one of {', '.join(CONFIGS)}; got {text!r}")
    return int(parts[0]), int(parts[1])


def _list(option: str, text: str, kind: Callable[[str], T]) -> list[T]:
    try:
        return list(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError:
        raise SpecError(f"{option} takes numbers by commas, got {text!r}") from None
