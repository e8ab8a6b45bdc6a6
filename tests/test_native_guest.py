"""The native library as a guest on somebody's machine: odd compilers, damaged files, hostile folders."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import test_native_build
from test_native_build import WORKS, script

from sparsec import cache
from sparsec.errors import UnsafeCacheError
from sparsec.kernels import Problem, build, select
from sparsec.kernels.library import loader, programs, toolchain

fresh = test_native_build.fresh

ODD_COMPILERS = {
    "a quote is open": ("c++ 'x", "cannot be read: No closing quotation"),
    "a folder": ("/", "was not found"),
    "nothing but spaces": ("  ", "was not found"),
    "the wrapper is missing": ("no-such-cache g++", "'no-such-cache g[+][+]', named in CXX"),
    "bytes that are no text": (r"printf '\377\376 broken' >&2; exit 1", "\ufffd\ufffd broken"),
    "no output": ('case "$1" in --version|-dumpmachine) echo x;; esac', "ended well and left no library"),
    "an empty output": (
        'case "$1" in --version|-dumpmachine) echo x; exit;; esac; while [ "$1" != -o ]; do shift; done; : > $2',
        "ended well and left no library",
    ),
    "a full disk": ("echo No space left on device >&2; exit 1", "make room, or set XDG_CACHE_HOME"),
    "killed": ("kill -9 $$", "SIGKILL: too little memory"),
    "not to be run": ("", "could not be started|was not found"),
}


@pytest.mark.parametrize("case", ODD_COMPILERS)
def test_an_odd_compiler_means_one_warning_and_reference_kernels(
    fresh: pytest.MonkeyPatch, tmp_path: Path, case: str
) -> None:
    text, message = ODD_COMPILERS[case]
    named = case in ("a quote is open", "a folder", "nothing but spaces", "the wrapper is missing")
    fresh.setenv("CXX", text if named else script(tmp_path / "odd", text))
    if case == "not to be run":
        (tmp_path / "odd").write_bytes(b"\x7fELF")
    fresh.chdir(tmp_path)
    with pytest.warns(RuntimeWarning, match=message) as caught:
        assert not loader.status().built
    assert len(caught) == 1
    assert "install a C++17 compiler" in str(caught[0].message) or case == "a full disk"
    assert {p.name for p in tmp_path.iterdir()} <= {"cache", "odd"}  # nothing is left where one stands


def copies(tmp_path: Path, body: str = "") -> str:
    """A compiler in a folder with a space that writes warnings, and a line of a log for each library that it links."""
    (tmp_path / "my tools").mkdir()
    return script(
        tmp_path / "my tools" / "c++",
        f"""echo "warning: odd" >&2
while [ $# -gt 0 ]; do case "$1" in
  --version) echo fake 1; exit;; -dumpmachine) echo x86_64-linux; exit;; -shared) link=1;; -o) shift; out=$1;;
esac; shift; done
{body}
echo built > "$out"; [ -z "$link" ] || echo linked >> {tmp_path}/log
""",
    )


class Opened:
    """In place of the library: what would have been opened."""

    isa = "portable"

    def __init__(self, path: Path, compiler: str | None) -> None:
        self.path, self.compiler, self.content = path, compiler, path.read_bytes()


@pytest.fixture
def opening(fresh: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    fresh.setattr(loader, "Library", Opened)
    return fresh


def opened() -> Path:
    """By a process that begins now. It must be the one that was built, and nobody else may write to it."""
    loader._load.cache_clear()
    umask = os.umask(0o002)
    try:
        status = loader.status()
    finally:
        os.umask(umask)
    assert status.path is not None, status
    path = Path(status.path)
    assert path.read_bytes() == b"built\n"
    assert not path.stat().st_mode & 0o022
    assert {p.stat().st_mode & 0o777 for p in (path.parent, path.parent.parent)} == {0o700}
    return path


def damage(path: Path, how: str) -> None:
    record = path.with_name(path.name + ".sha256")
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:3])
    elif how == "planted":
        path.write_bytes(b"evil")
    elif how == "planted with its hash, by somebody else":
        path.write_bytes(b"evil")
        toolchain.files.write(record, f"{toolchain._digest(path)}  {path.name}\n".encode())
        path.chmod(0o666)
    elif how == "no hash":
        record.unlink()
    elif how == "a hash that is none":
        record.write_bytes(b"\xff\x00")
    elif how == "deleted":
        path.unlink()


@pytest.mark.parametrize(
    "how",
    ["truncated", "planted", "planted with its hash, by somebody else", "no hash", "a hash that is none", "deleted"],
)
def test_a_library_that_is_not_the_one_that_was_built_is_built_anew_and_never_opened(
    opening: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str], how: str
) -> None:
    opening.setenv("CXX", copies(tmp_path))
    path = opened()
    assert "building the native kernels with" in capfd.readouterr().err  # also without a terminal
    assert opened() == path
    assert capfd.readouterr().err == ""
    damage(path, how)
    left = path.parent / ".building-before"
    left.mkdir()
    (left / "half.o").write_bytes(b"x")
    assert opened() == path
    assert ("is damaged" in capfd.readouterr().err) == (how != "deleted")
    assert (tmp_path / "log").read_text().count("linked") == 2
    assert sorted(p.suffix for p in path.parent.iterdir()) == [".lock", ".sha256", ".so"]  # nothing else is left


def test_a_library_is_used_from_a_disk_that_is_read_only(opening: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opening.setenv("CXX", copies(tmp_path))
    path = opened()
    opening.setattr(os, "chmod", lambda *_, **__: pytest.fail("writes"))
    opening.setattr(os, "mkdir", lambda *_, **__: pytest.fail("writes"))
    opening.setattr(loader.files, "lock", lambda *_: pytest.fail("writes"))
    assert opened() == path


def test_a_build_that_hangs_in_another_process_is_not_waited_for_without_end(
    opening: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    opening.setenv("CXX", copies(tmp_path))
    path = opened()
    path.unlink()
    opening.setattr(toolchain, "PATIENCE", 0.3)
    with loader.files.lock(path.with_suffix(".lock"), 0, lambda _: None):
        capfd.readouterr()
        opened()
    assert f"waiting for process {os.getpid()}" in capfd.readouterr().err


def test_a_compiler_that_hangs_is_ended_with_all_that_it_started(
    fresh: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "alive"
    hangs = script(
        tmp_path / "c++",
        f'case "$1" in --version|-dumpmachine) echo x; exit;; esac; (sleep 2; echo > {mark}) & sleep 600',
    )
    begin = time.monotonic()
    assert build.main(["--compiler", hangs, "--timeout", "0.3", "--output", str(tmp_path / "out")]) == 1
    assert "did not end within 0 s, and was ended" in capsys.readouterr().err
    fresh.setattr(toolchain, "_PATIENCE_TO_ANSWER", 0.3)
    fresh.setenv("CXX", script(tmp_path / "silent", "sleep 600"))
    with pytest.warns(RuntimeWarning, match="did not end within"):
        assert not loader.status().built
    time.sleep(max(0.0, begin + 2.5 - time.monotonic()))
    assert not mark.exists()


def test_what_is_run_prints_any_bytes_and_reads_nothing() -> None:
    assert programs.run([["sh", "-c", r"cat; printf 'a\377b'"], ["echo", "c"]], 60) == ["a\ufffdb", "c\n"]


def test_a_cache_folder_that_cannot_be_written_means_one_warning(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    fresh.setenv("CXX", script(tmp_path / "c++", WORKS))
    fresh.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "below"))
    with pytest.warns(RuntimeWarning, match="set XDG_CACHE_HOME.*SPARSEC_NATIVE_LIBRARY.*sparsec.kernels.build"):
        assert not loader.status().built


def test_a_cache_folder_that_is_not_safe_is_refused(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    fresh.setenv("CXX", script(tmp_path / "c++", WORKS))
    fresh.setenv("XDG_CACHE_HOME", str(tmp_path / "open"))
    with pytest.raises(UnsafeCacheError, match=r"others can write to it.*SPARSEC_NATIVE_LIBRARY.*SPARSEC_NATIVE=0"):
        loader.status()
    with pytest.raises(UnsafeCacheError, match="others can write to it"):  # regression: a warning for every layer
        select(Problem("csr", 8, 8))
    fresh.setenv("SPARSEC_NATIVE", "0")
    assert not loader.status().built


def test_a_library_is_named_by_its_absolute_path(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.chdir(tmp_path)
    (tmp_path / "mine.so").write_text("")
    fresh.setenv("SPARSEC_NATIVE_LIBRARY", "mine.so")
    with pytest.warns(RuntimeWarning, match="must be an absolute path, such as .*/mine.so"):
        assert not loader.status().built


def test_a_damaged_library_of_the_package_makes_way_for_one_in_the_cache(
    opening: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opening.setenv("CXX", copies(tmp_path))
    opening.setattr(toolchain, "SOURCES", tmp_path)
    opening.setattr(toolchain, "source_key", lambda: "sources")
    toolchain.find_compiler().build(tmp_path / "libtest.so")
    assert opened().parent == tmp_path
    damage(tmp_path / "libtest.so", "truncated")
    with pytest.warns(RuntimeWarning, match="libtest.so is not used, since its hash is not the one"):
        assert opened().is_relative_to(cache.folder("kernels"))
