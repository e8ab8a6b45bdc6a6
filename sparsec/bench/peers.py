"""Other engines beside sparsec, each in a process of another environment: llama.cpp and OpenVINO GenAI, where it can import them.

A peer loads and waits; it computes only when its turn comes, so that all take turns on the same cores. Whatever goes wrong with
one, a missing package, a model that it does not read, a crash, is said by name, and the others go on.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import torch
from torch import Tensor

from sparsec.bench import peer_child
from sparsec.bench.gguf_file import STORED, write_gguf
from sparsec.data.quiet import quiet
from sparsec.errors import DataError, SparsecError
from sparsec.progress import Progress, stage

NAMES = {"llama_cpp": "llama.cpp", "openvino_genai": "OpenVINO GenAI"}
CLASSES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16", "Q8_0": "int8", "INT8": "int8", "Q4_0": "int4", "INT4": "int4"}
"""Of each type of a peer the class of precision that it is compared in."""
QUANTISED = {"llama_cpp": ("Q8_0", "Q4_0"), "openvino_genai": ("INT8", "INT4")}
LOOKING, LOADING, ANSWERING = 120.0, 1800.0, 600.0
"""Seconds that a peer may take to say what it can import, to convert and load a model, and to answer."""
SETTLE = 0.02
"""Seconds before a turn, in which threads of the one before stop waiting actively."""
_LEAVING = 2.0


class PeerError(DataError):
    """A peer cannot go on; str() begins with its name."""


@dataclass(frozen=True)
class Packages:
    """What an environment has: versions, and why the others cannot be imported."""

    python: str  # its absolute path
    versions: dict[str, str]
    missing: dict[str, str]


def installed(python: Path) -> Packages:
    """Of the environment of a Python. DataError where it is none, and where it has no peer at all."""
    try:
        there = os.path.abspath(shutil.which(python) or python)  # as it is named: a link tells the environment
        done = subprocess.run(
            [there, "-c", _source(), "null"], capture_output=True, text=True, timeout=LOOKING, stdin=subprocess.DEVNULL
        )
        found = json.loads(done.stdout)
        versions = {name: str(found[name]["version"]) for name in peer_child.PACKAGES if "version" in found[name]}
        missing = {name: str(found[name]["missing"]) for name in peer_child.PACKAGES if name not in versions}
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"--peers {python} is no Python that runs here ({type(error).__name__}: {str(error)[:200]}); give the one of an "
            "environment with llama-cpp-python or openvino-genai, such as /path/to/environment/bin/python"
        ) from error
    if not versions:
        why = "; ".join(missing.values())
        raise DataError(f"--peers {python} has no peer ({why}); install llama-cpp-python or openvino-genai there")
    return Packages(there, versions, missing)


class Peer:
    """One engine with the model in one type. PeerError from every method where it cannot go on."""

    def __init__(self, python: str, wanted: dict[str, Any], version: str) -> None:
        """Starts it; `ready` waits for it. wanted: as peer_child.py takes it."""
        self.type: str = wanted["type"]
        self.name = f"{NAMES[wanted['package']]} {self.type}"
        self.version, self.token, self.failed, self.odd = version, -1, "", ""
        self._exact = self.type == wanted["stored"]
        self._said = Path(wanted["folder"]) / f"{self.name}.txt"
        self._rest = b""
        with self._said.open("wb") as errors:
            self._child = subprocess.Popen(
                [python, "-c", _source(), json.dumps(wanted)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,
                cwd=wanted["folder"],
            )

    def ready(self) -> None:
        """Waits until the model is loaded."""
        self._answer(LOADING)

    def prefill(self) -> float:
        """Seconds of the prompt, from an empty cache; `token` then follows it."""
        return self._ask("prefill")

    def decode(self, tokens: int) -> float:
        """Seconds of so many tokens more."""
        return self._ask(f"decode {tokens}")

    def turn(self, call: Callable[[], float]) -> float:
        """A case of turns: the seconds of a call; not a number once it failed, which `failed` tells of."""
        if self.failed:
            return float("nan")
        try:
            return call()
        except PeerError as error:
            self.failed = str(error)
            return float("nan")

    def compare(self, token: int) -> None:
        """Says in `odd` where the prompt led to another token than that of the dense model, in the same type."""
        if self._exact and not self.failed and self.token != token:
            self.odd = f"{self.name}: the prompt led to token {self.token}, dense to {token}: a tie, or it computes something else"

    def end(self) -> None:
        """It ends with its input, and is not waited for long."""
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                with _ignoring_broken_pipes():
                    pipe.close()
        try:
            self._child.wait(_LEAVING)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def _ask(self, line: str) -> float:
        sleep(SETTLE)
        assert self._child.stdin is not None
        with _ignoring_broken_pipes():  # the answer that does not come says more
            self._child.stdin.write(line.encode() + b"\n")
        answer = self._answer(ANSWERING)
        try:
            seconds, self.token = float(answer["seconds"]), int(answer["token"])
        except (KeyError, TypeError, ValueError, OverflowError):
            raise PeerError(f"{self.name}: told {str(answer)[:80]!r} for `{line}`") from None
        return seconds

    def _answer(self, timeout: float) -> dict[str, Any]:
        line = self._line(timeout)
        try:
            found: dict[str, Any] = json.loads(line)
            failed = found.get("failed")
        except (ValueError, AttributeError):
            raise PeerError(f"{self.name}: told what is no answer, {line[:80]!r}") from None
        if failed is not None:
            raise PeerError(f"{self.name}: {failed}")
        return found

    def _line(self, timeout: float) -> str:
        assert self._child.stdout is not None
        end = monotonic() + timeout
        while b"\n" not in self._rest:
            readable, _, _ = select.select([self._child.stdout], [], [], max(0.0, end - monotonic()))
            if not readable:
                self._child.kill()
                raise PeerError(f"{self.name}: gave no answer in {timeout:.0f} s, and was ended")
            read = os.read(self._child.stdout.fileno(), 1 << 16)
            if not read:
                raise PeerError(f"{self.name}: ended with code {self._child.wait()}{self._last_words()}")
            self._rest += read
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode("utf-8", "replace")

    def _last_words(self) -> str:
        lines = [line for line in self._said.read_text("utf-8", "replace").splitlines() if line.strip()]
        return f": {lines[-1].strip()[:200]}" if lines else ""


@contextmanager
def peers_beside(
    found: Packages,
    model: Any,
    prompt: Tensor,
    positions: int,
    said: list[str],
    progress: Progress | None = None,
) -> Iterator[list[Peer]]:
    """All peers of an environment, loaded, with the dense model in its own type and quantised; they end with the block.

    prompt: token ids [1, tokens]. positions: read and decoded at most. said: gets a line for each peer that is not there, or
    went, and why.
    """
    said += [f"{NAMES[name]}: {why}" for name, why in found.missing.items()]
    with tempfile.TemporaryDirectory(prefix="sparsec-peers-") as folder, ExitStack() as ends:
        peers: list[Peer] = []
        for package, version in found.versions.items():
            try:
                with stage(progress, f"writing the model for {NAMES[package]}"):
                    source = _written(package, model, Path(folder))
            except (SparsecError, OSError) as error:
                said.append(f"{NAMES[package]}: {error}")
                continue
            stored = STORED[model.dtype]
            for kind in (stored, *QUANTISED[package]):
                wanted = {
                    "package": package,
                    "type": kind,
                    "stored": stored,
                    "source": str(source),
                    "folder": folder,
                    "positions": positions,
                    "prompt": prompt[0].tolist(),
                    "threads": torch.get_num_threads(),
                }
                peer = Peer(found.python, wanted, version)
                ends.callback(peer.end)
                with stage(progress, f"{peer.name} loads"):
                    try:
                        peer.ready()
                        peers.append(peer)
                    except PeerError as error:
                        said.append(str(error))
        yield peers
        said += [note for peer in peers for note in (peer.failed, peer.odd) if note]


def _written(package: str, model: Any, folder: Path) -> Path:
    """Where the dense model stands for a peer."""
    if package == "llama_cpp":
        file = folder / "dense.gguf"
        write_gguf(model, file)
        return file
    place = folder / "dense"
    with quiet():
        model.save_pretrained(place)
    return place


def _source() -> str:
    return Path(peer_child.__file__).read_text("utf-8")


@contextmanager
def _ignoring_broken_pipes() -> Iterator[None]:
    try:
        yield
    except OSError:
        return
