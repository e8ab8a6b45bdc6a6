"""Saved models with something changed: bytes, the config, headers of files, contents of tensors. Each gives an error or runs.

`python tests/mutations.py 20000` does as many in processes of their own, with memory limited, and says what came of them.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from saved_models import SIZES, saved_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import sparsec
from sparsec.checkpoint.checking import examine
from sparsec.errors import SparsecError
from sparsec.files import TICK
from sparsec.kernels import SparseLinear, status

LAID_OUT = (
    *("csr8", "csr16", "csr32", "bitmap", "bsr16x16", "bsr8x4", "nm2:4", "nm3:8", "wcsr8", "wcsr16"),
    *(
        "dense:int8",
        "dense:int4mg32",
        "bitmap:int8",
        "bitmap:int4g32",
        "bitmap:int4mg32",
        "nm2:4:int8",
        "nm2:4:int4g32",
    ),
    *("csr8:int8", "csr16:int4g32", "bsr16x16:int8g32", "bsr16x16:int4g32", "wcsr8:int8", "wcsr16:int4g32"),
)
TYPES = (torch.float32, torch.bfloat16, torch.float16)
STORED = ("F32", "BF16", "F16", "F64", "I8", "U8", "I16", "I32", "I64", "BOOL", "F8_E4M3", "U16", "C64", "x")
HOSTILE: tuple[Any, ...] = (
    *(0, 1, -1, 2, 7, 2**31 - 1, 2**31, 2**62, 2**63, 2**70, -(2**63), 1.5, 1e308),
    *(True, False, None, "", "x", "\0", "../x"),
    *("/dev/zero", "x" * 5000, [], {}, [[]], {"": None}, "float32", "csr8", "float64", "os.system", [2**40, 2**40]),
)
EMPTY: list[LlamaForCausalLM] = []
"""What `into` fills next."""
PATIENCE = 20
"""Seconds that one may take."""
ROOM = 3 * 2**30
"""Bytes of address space beyond what is there when the work begins."""
GROWTH = 300 * 2**10
"""KiB by which the peak of a process may grow with one folder."""


class NotRunError(Exception):
    """A model that was loaded and does not run, though its config is as it was."""


def of_bytes(rng: random.Random, folder: Path) -> None:
    """Some bytes of a file flipped, cut off, moved, doubled or overwritten."""
    path = rng.choice(sorted(p for p in folder.iterdir() if p.suffix != ".md"))
    data = bytearray(path.read_bytes())
    kind = rng.choice(("flip", "flip", "cut", "splice", "double", "drop", "zero", "header"))
    head = min(len(data), 600)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if not data:
            break
        at = rng.randrange(rng.choice((head, len(data)))) % len(data)
        size = rng.choice((1, 2, 8, 64, 1000))
        if kind == "flip":
            data[at] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del data[at:]
        elif kind == "splice":
            other = rng.randrange(len(data))
            data[at : at + size] = data[other : other + size]
        elif kind == "double":
            data[at:at] = data[at : at + size]
        elif kind == "drop":
            del data[at : at + size]
        elif kind == "zero":
            data[at : at + size] = bytes(len(data[at : at + size]))
        else:
            data[:8] = rng.choice((len(data), at, 2**63, 2**32, 0)).to_bytes(8, "little")
    path.write_bytes(data)
    believed(rng, folder)


def of_config(rng: random.Random, folder: Path) -> None:
    """A value somewhere in config.json is another one, is gone, or has another key."""
    path = folder / "config.json"
    content = json.loads(path.read_bytes())
    inside = content["quantization_config"] if rng.random() < 0.7 else content
    holder, key = walk(rng, inside)
    kind = rng.choice(("value", "value", "near", "near", "gone", "renamed", "swapped"))
    old = holder[key]
    if kind == "near" and type(old) is int:
        holder[key] = old + rng.choice((-8, -2, -1, 1, 2, 8))
    elif kind == "gone":
        del holder[key]
    elif kind == "renamed" and isinstance(holder, dict):
        holder[str(rng.choice(HOSTILE))] = holder.pop(key)
    elif kind == "swapped":
        other, place = walk(rng, inside)
        holder[key] = copy.deepcopy(other[place])
    else:
        holder[key] = copy.deepcopy(rng.choice(HOSTILE))
    path.write_text(json.dumps(content))


def walk(rng: random.Random, content: Any) -> tuple[Any, Any]:
    """Some object or list, and a key of it."""
    while True:
        keys = list(content) if isinstance(content, dict) else range(len(content))
        key = rng.choice(keys)
        if not (isinstance(content[key], dict | list) and content[key]) or rng.random() < 0.15:
            return content, key
        content = content[key]


def of_header(rng: random.Random, folder: Path) -> None:
    """The dtype, shape or place of a tensor in a file."""
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = rng.choice([n for n in header if n != "__metadata__"])
    facts = header[name]
    kind = rng.choice(("dtype", "shape", "offsets", "name", "swap"))
    if kind == "dtype":
        facts["dtype"] = rng.choice(STORED)
    elif kind == "shape":
        n = facts["shape"]
        facts["shape"] = rng.choice((n[::-1], [*n, 1], n[:-1], [1, *n], [2 * i for i in n], [2**62], [-1], [0], "x"))
    elif kind == "offsets":
        at = rng.randrange(2)
        facts["data_offsets"][at] = rng.choice((facts["data_offsets"][at] + rng.choice((-4, 4, 1)), 2**63, -1, 0))
    elif kind == "name":
        header[str(rng.choice(HOSTILE))] = header.pop(name)
    else:
        other = rng.choice([n for n in header if n != "__metadata__"])
        header[name], header[other] = header[other], header[name]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    believed(rng, folder)


def of_contents(rng: random.Random, folder: Path) -> None:
    """Numbers of a packed tensor, where its header and size stay what they are."""
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    held = load_file(path)
    names = [n for n in held if n.rpartition(".")[2] not in ("weight", "inv_freq") and held[n].numel()] or list(held)
    name = rng.choice(names)
    tensor = held[name].clone()
    flat = tensor.view(-1)
    for _ in range(rng.choice((1, 1, 2, 9))):
        at = rng.choice((0, -1, rng.randrange(flat.numel())))
        if tensor.is_floating_point():
            flat[at] = rng.choice((0.0, -0.0, 1.0, float("nan"), float("inf"), 1e-40))
        elif tensor.dtype == torch.bool:
            flat[at] = ~flat[at]
        else:
            info = torch.iinfo(tensor.dtype)
            near = int(flat[at]) + rng.choice((-2, -1, 1, 2, 8))
            flat[at] = min(max(rng.choice((near, near, info.max, info.min, 0)), info.min), info.max)
    held[name] = tensor
    save_file(held, path, metadata={"format": "pt"})
    believed(rng, folder, always=True)


def believed(rng: random.Random, folder: Path, always: bool = False) -> None:
    """Mostly config.json gives the bytes that the files have now, so that more than their size is looked at."""
    if not always and rng.random() < 0.2:
        return
    try:
        content = json.loads((folder / "config.json").read_bytes())
        for name, facts in content["quantization_config"]["files"].items():
            facts["bytes"] = (folder / name).stat().st_size
        (folder / "config.json").write_text(json.dumps(content))
    except (ValueError, KeyError, OSError, TypeError, AttributeError, RecursionError):
        return


Mutator = Callable[[random.Random, Path], None]
MUTATORS: tuple[Mutator, ...] = (of_bytes, of_config, of_header, of_contents)


def load(folder: Path) -> Any:
    """By sparsec alone."""
    return sparsec.load(folder)


def into(folder: Path) -> Any:
    """Into a model that is there, the same one until a folder fills it: where that fails it must be as it was."""
    if not EMPTY:
        with torch.device("meta"):
            EMPTY.append(LlamaForCausalLM(LlamaConfig(**SIZES)).eval())
    sparsec.load(folder, into=EMPTY[0])
    return EMPTY.pop()


def transformers(folder: Path) -> Any:
    """By transformers, whose own errors are its own."""
    try:
        return AutoModelForCausalLM.from_pretrained(folder)
    except SparsecError:
        raise
    except Exception as error:
        raise SparsecError(f"transformers: {type(error).__name__}") from error


def check(folder: Path) -> None:
    """By `sparsec check`: what it finds nothing wrong with, loads."""
    if examine(folder).faults:
        raise SparsecError("faults")
    sparsec.load(folder)


Way = Callable[[Path], Any]
WAYS: tuple[Way, ...] = (load, load, into, into, into, check, transformers)


def outcome(way: Way, folder: Path, config_is_as_it_was: bool, steps: bool = False) -> str:
    """What came of it: the kind of error, or that it runs. Raises what must not be. steps: decodes a token of the cache too."""
    try:
        model = way(folder)
    except SparsecError as error:
        return f"{way.__name__}: {str(error) if str(error).startswith('transformers: ') else type(error).__name__}"
    if model is None:
        return f"{way.__name__}: valid"
    for module in model.modules():
        if isinstance(module, SparseLinear):
            module.packed.check()
    try:
        with torch.no_grad():
            for tokens in (1, 5, 30):
                out = model(torch.arange(tokens)[None])
                assert out[0].shape == (1, tokens, model.lm_head.out_features), out[0].shape
            if steps and (cache := getattr(out, "past_key_values", None)) is not None:
                model(torch.tensor([[3]]), past_key_values=cache)
    except Exception as error:
        if config_is_as_it_was:
            raise NotRunError(f"{type(error).__name__}: {error}") from error
        return f"{way.__name__}: loads, and its config lets it not run"
    return f"{way.__name__}: valid"


def one(rng: random.Random, base: Path, folder: Path, mutator: Mutator, way: Way, steps: bool = False) -> str:
    """What comes of a folder with something changed."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder)
    before = plain_config(folder)
    mutator(rng, folder)
    if rng.random() < 0.25:
        of_bytes(rng, folder)
    return outcome(way, folder, plain_config(folder) == before, steps)


def plain_config(folder: Path) -> Any:
    """What config.json says of the model, and not of its packing."""
    try:
        content = json.loads((folder / "config.json").read_bytes())
        return {k: v for k, v in content.items() if k not in ("quantization_config", "transformers_weights")}
    except (ValueError, AttributeError, OSError, RecursionError):
        return None


def bases(folder: Path, step: int = 1) -> list[Path]:
    """A saved model of each layout and dtype, or of every so many of these."""
    return [
        saved_model(name, folder / f"{name.replace(':', '-')} {str(dtype).removeprefix('torch.')}", dtype)
        for name, dtype in list(product(LAID_OUT, TYPES))[::step]
    ]


def worker(folder: Path, seed: int, start: int, end: int, limit: bool) -> None:
    """Says before each what it is about to do, and after it what came of it, a line each."""
    warnings.simplefilter("ignore")
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    known = sorted(p for p in (folder / "bases").iterdir())
    if limit:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    waited = [0]
    Thread(target=watch, args=(waited,), daemon=True).start()
    for number in range(start, end):
        print(json.dumps({"begin": number}), flush=True)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        signal.setitimer(signal.ITIMER_PROF, PATIENCE)
        waited[0] = 0
        try:
            rng = random.Random(f"{seed} {number}")
            base, mutator, way = rng.choice(known), rng.choice(MUTATORS), rng.choice(WAYS)
            found = one(rng, base, folder / f"work-{os.getpid()}", mutator, way, steps=True)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            found = f"WRONG {type(error).__name__}: {str(error)[:300]} ({place.filename}:{place.lineno})"
        signal.setitimer(signal.ITIMER_PROF, 0)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
        if number > start + 100 and grown > GROWTH:
            found = f"WRONG memory: {grown >> 10} MiB"
        print(json.dumps({"number": number, "found": found}), flush=True)


def watch(waited: list[int]) -> None:
    """Ends the process after so many ticks: a process that others stop for a while has waited for nothing, and one that waits for a
    pipe takes no time of a CPU."""
    while waited[0] * TICK < PATIENCE:
        time.sleep(TICK)
        waited[0] += 1
    os._exit(9)


def main() -> int:
    """Returns 1 where anything came out that must not."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("count", type=int, nargs="?", default=20_000)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--no-limit", dest="limit", action="store_false", help="of memory, as the address sanitiser needs it"
    )
    p.add_argument("--worker", nargs=3, metavar=("FOLDER", "START", "END"), help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.worker:
        worker(Path(args.worker[0]), args.seed, int(args.worker[1]), int(args.worker[2]), args.limit)
        return 0
    kernels = status()
    if not kernels.built:
        print(f"only the native kernels are worth a run: {kernels.reason}", file=sys.stderr)
        return 2
    began, counts, wrong = time.monotonic(), Counter[str](), list[str]()
    with tempfile.TemporaryDirectory() as place:
        bases(Path(place) / "bases")
        at = 0
        while at < args.count:
            command = [sys.executable, __file__, "--seed", str(args.seed), "--worker", place, str(at), str(args.count)]
            with subprocess.Popen(
                [*command, *["--no-limit"] * (not args.limit)], stdout=subprocess.PIPE, text=True
            ) as process:
                assert process.stdout is not None
                begun = at - 1
                for line in process.stdout:
                    told = json.loads(line)
                    begun = told.get("begin", begun)
                    if "found" in told:
                        at = told["number"] + 1
                        counts[
                            told["found"].partition(" ")[0] if told["found"].startswith("WRONG") else told["found"]
                        ] += 1
                        if told["found"].startswith("WRONG"):
                            wrong.append(f"{told['number']}: {told['found']}")
            if process.returncode:
                wrong.append(f"{begun}: the process ended with {process.returncode}")
                at = max(begun + 1, at)
    print(
        f"{args.count} folders, {kernels.isa} of {kernels.path}, {time.monotonic() - began:.0f} s, {len(wrong)} wrong"
    )
    for found, count in sorted(counts.items()):
        print(f"{count:7} {found}")
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
