"""Other engines beside the benchmark: real child processes with stub packages, which answer, fail, die or hang."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.bench import peer_child, peers
from sparsec.bench.__main__ import main
from sparsec.bench.end_to_end import DENSE_ON_SPARSEC, STOCK, Mode, Recipe, against_peers, dense_on_sparsec
from sparsec.bench.peers import Packages, Peer, PeerError, installed, peers_beside
from sparsec.data.tiny import tiny_model
from sparsec.errors import DataError

LLAMA_CPP = """
import ctypes, os, sys, time
__version__ = "1.2.3"
LLAMA_FTYPE_ALL_F32, LLAMA_FTYPE_MOSTLY_Q8_0, LLAMA_FTYPE_MOSTLY_Q4_0, LLAMA_FTYPE_MOSTLY_BF16 = 0, 7, 2, 32
HOW = os.environ.get("STUB", "")

class Options:
    pass

def llama_model_quantize_default_params():
    return Options()

def llama_model_quantize(source, made, options):
    with open(source, "rb") as a, open(made, "wb") as b:
        b.write(a.read() + str(options.ftype).encode())
    return 1 if HOW == "quantise" and options.ftype == 2 else 0

class Llama:
    def __init__(self, path, n_ctx, n_batch, n_threads, n_threads_batch, verbose):
        print("a library prints on the standard output")
        if not open(path, "rb").read(4) == b"GGUF":
            raise ValueError("no GGUF")
        if HOW == "raise":
            raise ValueError("a model that nobody reads")
        if HOW == "crash" and path.endswith("Q8_0.gguf"):
            print("the last words", file=sys.stderr, flush=True)
            os._exit(3)
        self.path, self.ctx, self.n, self.limit, self.calls = path, self, 0, n_ctx, 0
        assert n_threads == n_threads_batch and n_batch >= 512 and not verbose

    def n_vocab(self):
        return 50

    def reset(self):
        self.n = 0

    def eval(self, tokens):
        self.calls += 1
        self.n += len(tokens)
        assert self.n <= self.limit, "too many positions"
        if HOW == "dies" and self.calls > 3 and self.path.endswith("Q4_0.gguf"):
            os._exit(9)
        if HOW == "hangs" and self.calls > 1:
            time.sleep(600)

def llama_get_logits_ith(ctx, i):
    values = (ctypes.c_float * 50)()
    values[ctx.n % 50] = 1.0
    ctx.kept = values
    return ctypes.cast(values, ctypes.POINTER(ctypes.c_float))
"""
PROMPT = torch.arange(7)[None]


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This Python, with a package llama_cpp."""
    place = tmp_path / "packages"
    place.mkdir()
    (place / "llama_cpp.py").write_text(LLAMA_CPP)
    (place / "openvino_genai.py").write_text("raise ImportError('no such library')")
    monkeypatch.setenv("PYTHONPATH", str(place))
    return Path(sys.executable)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_peers_decode_when_they_are_told_to(stub: Path) -> None:
    found = installed(stub)
    assert found.versions == {"llama_cpp": "1.2.3"}
    assert found.missing == {"openvino_genai": "ImportError: no such library"}
    said: list[str] = []
    with peers_beside(found, tiny_model(), PROMPT, 30, said) as opened:
        assert [p.name for p in opened] == ["llama.cpp F32", "llama.cpp Q8_0", "llama.cpp Q4_0"]
        for peer in opened:
            for _ in range(2):
                assert peer.turn(peer.prefill) > 0
                assert peer.token == 7, "of seven tokens"
                peer.compare(7)
                assert peer.turn(lambda peer=peer: peer.decode(3)) > 0  # type: ignore[misc]
                assert peer.token == 10
        assert [p.odd for p in opened] == ["", "", ""]
        for peer in opened:
            peer.compare(8)
        children = [p._child for p in opened]
    assert [c.returncode for c in children] == [0, 0, 0]
    assert said[0] == "OpenVINO GenAI: ImportError: no such library"
    assert len(said) == 2
    assert "llama.cpp F32: the prompt led to token 10, dense to 8" in said[1], "only in the model's own type"


@pytest.mark.parametrize(
    ("how", "there", "words"),
    [
        ("quantise", ["F32", "Q8_0"], "llama.cpp Q4_0: RuntimeError: llama.cpp did not quantise the model to Q4_0"),
        ("crash", ["F32", "Q4_0"], "llama.cpp Q8_0: ended with code 3: the last words"),
        ("raise", [], "llama.cpp F32: ValueError: a model that nobody reads"),
    ],
)
def test_a_peer_that_does_not_load_is_left_out_by_name(
    stub: Path, monkeypatch: pytest.MonkeyPatch, how: str, there: list[str], words: str
) -> None:
    monkeypatch.setenv("STUB", how)
    said: list[str] = []
    with peers_beside(installed(stub), tiny_model(), PROMPT, 30, said) as opened:
        assert [p.type for p in opened] == there
        assert all(p.turn(p.prefill) > 0 for p in opened)
    assert words in said


def test_a_peer_that_dies_in_a_round_costs_no_other_one(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB", "dies")
    said: list[str] = []
    with peers_beside(installed(stub), tiny_model(), PROMPT, 60, said) as opened:
        for _ in range(5):
            told = [p.turn(p.prefill) for p in opened]
    assert [t > 0 for t in told] == [True, True, False], "not a number"
    assert [note.startswith("llama.cpp Q4_0: ended with code 9") for note in said] == [False, True]


def test_a_peer_that_gives_no_answer_is_ended(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB", "hangs")
    monkeypatch.setattr(peers, "ANSWERING", 1.0)
    with peers_beside(installed(stub), tiny_model(), PROMPT, 60, []) as (first, *_):
        first.prefill()
        with pytest.raises(PeerError, match=r"llama\.cpp F32: gave no answer in 1 s"):
            first.decode(1)
        assert first._child.wait(5) != 0


def test_an_architecture_that_is_not_written_is_said(stub: Path) -> None:
    class Other(type(tiny_model())):  # type: ignore[misc]
        pass

    said: list[str] = []
    with peers_beside(installed(stub), Other(tiny_model().config), PROMPT, 30, said) as opened:
        assert opened == []
    assert any("llama.cpp: no GGUF file is written of Other" in note for note in said)


def test_peers_end_with_an_error_and_with_an_interrupt(stub: Path) -> None:
    for error in (ValueError, KeyboardInterrupt):
        children: list[Any] = []

        def interrupted(error: type[BaseException] = error, children: list[Any] = children) -> None:
            with peers_beside(installed(stub), tiny_model(), PROMPT, 30, []) as opened:
                children += [p._child for p in opened]
                raise error

        with pytest.raises(error):
            interrupted()
        assert len(children) == 3
        assert all(c.returncode is not None for c in children)


def test_ctrl_c_ends_the_children_and_leaves_no_folder(
    stub: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The signal goes to the benchmark alone, while a child is at work for ten minutes."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    script = """
    import sys, torch
    from pathlib import Path
    from sparsec.bench.peers import installed, peers_beside
    from sparsec.data.tiny import tiny_model
    with peers_beside(installed(Path(sys.executable)), tiny_model(), torch.arange(7)[None], 60, []) as opened:
        print(*[p._child.pid for p in opened], flush=True)
        opened[0].prefill()
        opened[0].decode(1)
    """
    environment = {**os.environ, "STUB": "hangs", "TMPDIR": str(folder)}
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 3
        assert all(map(alive, pids))
        time.sleep(1)
        parent.send_signal(signal.SIGINT)
        assert parent.wait(60) != 0
    assert not any(map(alive, pids))
    assert list(folder.glob("sparsec-peers-*")) == []


@pytest.mark.parametrize("which", ["no-such-python", "not-a-python", "empty"])
def test_an_environment_without_peers_is_refused(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Path(sys.executable)
    if which == "no-such-python":
        place, words = tmp_path / "python", "is no Python that runs here"
    elif which == "not-a-python":
        place, words = tmp_path / "python", "is no Python that runs here"
        place.write_text("#!/bin/sh\necho hello\n")
        place.chmod(0o755)
    else:
        for name in peer_child.PACKAGES:
            (tmp_path / f"{name}.py").write_text("raise ImportError('nothing here')")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        words = "has no peer (ImportError: nothing here"
    with pytest.raises(DataError) as caught:
        installed(place)
    assert words in str(caught.value)
    assert main(["--end-to-end", "tiny", "--peers", str(place)]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert main(["--shapes", "8x8", "--peers", str(place)]) == 2
    assert "--peers says nothing here; it goes with --end-to-end" in capsys.readouterr().err


def test_the_command_times_peers_by_turns(stub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = "--end-to-end tiny --sparsity 0.5 --repeats 2 --prompt-tokens 4 --new-tokens 2"
    passes = ["--passes", "magnitude({sparsity}),freeze,lower(bitmap)", "--peers", str(stub)]
    assert main([*wanted.split(), *passes, "--json", str(tmp_path / "e.json"), "--csv", str(tmp_path / "e.csv")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    (run,) = json.loads((tmp_path / "e.json").read_text())["runs"]
    assert [m["name"] for m in run["modes"]][-3:] == ["llama.cpp F32", "llama.cpp Q8_0", "llama.cpp Q4_0"]
    assert all(len(m["prefill_ms"]) == len(m["decode_ms"]) == 2 for m in run["modes"])
    assert [(a["mode"], a["precision"], a["peer"]) for a in run["against_peers"]] == [
        ("dense on sparsec's kernels eager", "fp32", "llama.cpp F32"),
        ("dense:int8 on sparsec's kernels eager", "int8", "llama.cpp Q8_0"),
        ("dense:int4g64 on sparsec's kernels eager", "int4", "llama.cpp Q4_0"),
        ("50% zero eager", "fp32", "llama.cpp F32"),
    ]
    assert run["peers"] == {"llama_cpp": "1.2.3"}
    assert run["said"][0] == "OpenVINO GenAI: ImportError: no such library"
    assert "peer: OpenVINO GenAI: ImportError: no such library" in printed
    assert "peers: llama_cpp 1.2.3" in printed
    assert (tmp_path / "e.csv").read_text().count("llama.cpp") == 3


times = st.lists(st.floats(0.1, 100), min_size=3, max_size=3)


@given(
    st.lists(st.tuples(st.sampled_from(sorted(peers.CLASSES)), times, times), max_size=5),
    st.sampled_from(["fp32", "bf16", "fp16"]),
)
@settings(deadline=None)
def test_modes_meet_the_best_peer_of_their_own_class(given_peers: list[tuple[str, Any, Any]], dtype: str) -> None:
    others = [
        Mode(Recipe(f"{i} {kind}", peer=peers.CLASSES[kind]), False, "its own", tuple(p), tuple(d), None)
        for i, (kind, p, d) in enumerate(given_peers)
    ]
    ours = [
        Mode(recipe, False, "dynamic", (1.0, 1.0, 1.0), (2.0, 2.0, 2.0), None)
        for recipe in (STOCK, DENSE_ON_SPARSEC, dense_on_sparsec("int8"), dense_on_sparsec("int4g64"))
    ]
    classes = {ours[1].name: dtype, ours[2].name: "int8", ours[3].name: "int4"}
    found = {each.mode.name: each for each in against_peers([*ours, *others], dtype)}
    for name, wanted in classes.items():
        same = [m for m in others if m.variant.peer == wanted]
        assert (name in found) == bool(same)
        if same:
            each = found[name]
            assert each.peer in same
            assert sorted(each.peer.decode_ms)[1] == min(sorted(m.decode_ms)[1] for m in same)
            assert sorted(each.prefill_peer.prefill_ms)[1] == min(sorted(m.prefill_ms)[1] for m in same)
            assert each.decode.median == pytest.approx(sorted(each.peer.decode_ms)[1] / 2.0)
    assert "dense eager" not in found


def _told(line: bytes) -> Peer:
    """A peer whose child told this and ended."""
    read, write = os.pipe()
    os.write(write, line)
    os.close(write)
    peer = object.__new__(Peer)
    peer.name, peer.type, peer.failed, peer._rest, peer._said = "a peer", "F32", "", b"", Path(os.devnull)
    stdin = open(os.devnull, "wb", buffering=0)  # noqa: SIM115
    child: Any = SimpleNamespace(stdin=stdin, stdout=os.fdopen(read, "rb", 0), wait=lambda: 1, kill=lambda: None)
    peer._child = child
    return peer


answers = st.one_of(
    st.binary(max_size=40),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(["seconds", "token", "failed"]), x),
        max_leaves=4,
    ).map(lambda x: json.dumps(x).encode() + b"\n"),
)


@given(answers)
@settings(deadline=None)
def test_whatever_a_child_tells_is_an_answer_or_an_error_that_names_it(line: bytes) -> None:
    peer = _told(line)
    seconds = peer.turn(peer.prefill)
    for pipe in (peer._child.stdin, peer._child.stdout):
        assert pipe is not None
        pipe.close()
    if peer.failed:
        assert peer.failed.startswith("a peer: ")
    else:
        answer = json.loads(line)
        assert seconds == float(answer["seconds"]) or seconds != seconds
        assert peer.token == int(answer["token"])


def test_the_child_imports_nothing_before_it_is_asked() -> None:
    """It runs where neither sparsec nor torch is."""
    code = Path(peer_child.__file__).read_text()
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code, "null"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found.keys() == set(peer_child.PACKAGES)
    assert all("ModuleNotFoundError" in each["missing"] for each in found.values())
    assert Packages("python", {}, {}).versions == {}
