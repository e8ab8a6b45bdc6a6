"""Runs `sparsec compress` again and again, each time killed with SIGKILL after a random time, until it is done; then anew.

    python tests/killed_compress.py KILLS SEED RECORD MODEL FOLDER [OPTION...]

After every kill FOLDER is absent or whole. RECORD: a file of JSON: {"seconds": of a run that is left alone, "kills", "results":
for each finished run the files of FOLDER with their SHA-256, "learnt": how often each finished run learned each site}. The
processes are forked, so that none of them imports torch anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from sparsec import compress
from sparsec.pipeline.pruning import CalibratedPruning


def begun(words: list[str], log: Path) -> int:
    """A process that compresses, and writes down every site that it learns."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        learnt = CalibratedPruning._learnt

        def told(self, graph, context, shares, site, statistics):  # type: ignore[no-untyped-def]
            made = learnt(self, graph, context, shares, site, statistics)
            with log.open("a") as file:
                file.write(site.key + "\n")
            return made

        CalibratedPruning._learnt = told  # type: ignore[method-assign]
        with (log.parent / "out").open("w") as out:
            os.dup2(out.fileno(), 1)
            code = compress.main([*words, "--resume", "--no-sample", "--threads", "1"])
    finally:
        os._exit(code)


def ended(child: int, after: float) -> int | None:
    """The exit code; None where it had to be killed."""
    until = time.monotonic() + after
    while time.monotonic() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def hashes(folder: Path) -> dict[str, str]:
    """Of every file of it, hidden ones too."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def main() -> None:
    kills, seed, record, model, place, *options = sys.argv[1:]
    torch.set_num_threads(1)
    rng = random.Random(int(seed))
    folder = Path(place)
    unfinished, log = folder.with_name(folder.name + ".unfinished"), Path(record).with_name("learnt")
    words = [model, place, *options]
    results, learnt, configs = [], [], []
    start, left = time.monotonic(), int(kills)
    assert ended(begun(words, log), 1e6) == 0
    seconds = time.monotonic() - start
    while True:
        assert not unfinished.exists()
        results.append(hashes(folder))
        configs.append(json.loads((folder / "config.json").read_text()))
        learnt.append(log.read_text().split("\n")[:-1] if log.exists() else [])
        if left <= 0:
            break
        shutil.rmtree(folder)
        log.unlink(missing_ok=True)
        while (code := ended(begun(words, log), rng.uniform(0, seconds if left > 0 else 1e6))) is None:
            left -= 1
            if folder.exists():  # killed after it was put there
                assert {n for n in hashes(folder) if n.endswith("tensors")} == {
                    n for n in results[0] if n.endswith("tensors")
                }
                assert json.loads((folder / "config.json").read_text())
        assert code == 0, code
    told = {"seconds": seconds, "kills": int(kills) - left, "results": results, "configs": configs, "learnt": learnt}
    Path(record).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
