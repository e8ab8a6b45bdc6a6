"""The user's cache folder: where it lies, whose it is, and that files in it are whole."""

from __future__ import annotations

import fcntl
import os
import pwd
import signal
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sparsec import cache, files
from sparsec.errors import CacheError, UnsafeCacheError


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What XDG_CACHE_HOME names; it is not there yet. The process stands in an empty folder."""
    stands = tmp_path / "stands"
    stands.mkdir()
    monkeypatch.chdir(stands)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "base"))
    return tmp_path / "base"


@pytest.fixture(autouse=True)
def _nothing_is_made_where_one_stands(base: Path) -> Iterator[None]:
    yield
    assert list((base.parent / "stands").iterdir()) == []


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0, 0o002, 0o022, 0o777], ids=oct)
def test_it_is_made_for_this_user_only(base: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        found = cache.folder("kernels", "key")
    finally:
        os.umask(before)
    assert found == base / "sparsec" / "kernels" / "key"
    assert {mode(p) for p in (found, found.parent, found.parent.parent, base)} == {0o700}


def test_one_of_the_users_own_that_others_can_enter_is_closed(base: Path) -> None:
    for path, rights in ((base, 0o775), (base / "sparsec", 0o775), (base / "sparsec" / "kernels", 0o777)):
        path.mkdir()
        path.chmod(rights)
    assert [mode(p) for p in (cache.folder("kernels"), base / "sparsec", base)] == [0o700, 0o700, 0o775]


def test_one_that_cannot_be_closed_is_refused_where_others_can_write(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cache.folder()
    for rights, refused in ((0o755, False), (0o775, True)):
        path.chmod(rights)
        with monkeypatch.context() as context:
            context.setattr(os, "chmod", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
            if refused:
                with pytest.raises(UnsafeCacheError, match=r"others can write to it.*set XDG_CACHE_HOME"):
                    cache.folder()
            else:
                assert cache.folder() == path


def test_one_of_somebody_else_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.folder()
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.raises(
        UnsafeCacheError, match=f"belongs to user {me}, and this process runs as {me + 1}.*set XDG_CACHE"
    ):
        cache.folder()


@pytest.mark.parametrize(
    ("rights", "group", "refused"),
    [(0o777, 0, True), (0o1777, 0, False), (0o775, 0, False), (0o775, 1, True), (0o1775, 1, False), (0o755, 1, False)],
)
def test_a_parent_that_others_can_write_to_is_refused(
    base: Path, monkeypatch: pytest.MonkeyPatch, rights: int, group: int, refused: bool
) -> None:
    base.mkdir()
    base.chmod(rights)
    monkeypatch.setattr(cache, "_own_groups", lambda: {base.stat().st_gid + group})
    if refused:
        with pytest.raises(UnsafeCacheError, match=f"base: .*mode {rights:04o}.*chmod go-w .*set XDG_CACHE_HOME"):
            cache.folder()
        assert list(base.iterdir()) == []
    else:
        assert cache.folder() == base / "sparsec"


def test_links_are_followed_to_safe_places_only(base: Path) -> None:
    for name, rights in (("mine", 0o755), ("open", 0o777)):
        (base.parent / name).mkdir()
        (base.parent / name).chmod(rights)
    base.symlink_to("mine")
    assert cache.folder() == base.parent / "mine" / "sparsec"
    base.unlink()
    base.symlink_to(base.parent / "open")
    with pytest.raises(UnsafeCacheError, match="open: no cache folder may lie below"):
        cache.folder()
    base.unlink()
    base.symlink_to("base")
    with pytest.raises(CacheError, match="too many links"):
        cache.folder()
    base.unlink()
    base.mkdir()
    (base / "sparsec").symlink_to("../open/inside")
    with pytest.raises(UnsafeCacheError, match="open: no cache folder may lie below"):
        cache.folder()


def test_a_relative_xdg_cache_home_is_ignored_and_said_so(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(base.parent))
    with pytest.warns(RuntimeWarning, match="XDG_CACHE_HOME='here' is ignored: it must be an absolute path"):
        assert cache.folder() == base.parent / ".cache" / "sparsec"


@pytest.mark.parametrize("home", [None, "", "~", "relative/home"])
def test_without_a_home_that_of_the_system_is_taken_or_it_is_refused(
    base: Path, monkeypatch: pytest.MonkeyPatch, home: str | None
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    if home is not None:
        monkeypatch.setenv("HOME", home)
    entry = pwd.struct_passwd(("me", "x", 1, 1, "", str(base.parent), ""))
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: entry)
    assert cache.folder() == base.parent / ".cache" / "sparsec"

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(
        UnsafeCacheError, match=r"HOME=.* is no absolute path, and the system knows no home of this user; set XDG_CACHE"
    ):
        cache.folder()


def test_a_home_that_is_not_there_is_not_made(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(base.parent / "nonexistent"))
    with pytest.raises(CacheError, match="nonexistent does not exist; set XDG_CACHE_HOME"):
        cache.folder()
    assert not (base.parent / "nonexistent").exists()


def test_a_file_in_its_place_is_named(base: Path) -> None:
    base.write_text("")
    with pytest.raises(CacheError, match=r"base.*set XDG_CACHE_HOME"):
        cache.folder()


def as_nobody(call: Callable[[], object]) -> str:
    """What the call says in a process of its own that is not root's."""
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        try:
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            said = str(call())
        except CacheError as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writes, said.encode())
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_user_without_rights_is_told_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", folder)
        said = as_nobody(cache.folder)
        assert said.startswith("CacheError: ")
        assert "Permission denied" in said
        assert "set XDG_CACHE_HOME to a folder of your own" in said
        Path(folder).chmod(0o1777)
        assert as_nobody(cache.folder) == str(Path(folder).resolve() / ".cache" / "sparsec")
        if os.geteuid() == 0:  # what somebody else has made
            with pytest.raises(UnsafeCacheError, match="belongs to user 65534, and this process runs as 0"):
                cache.folder()


# ---- files ----------------------------------------------------------------------------------------------------------------------


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a[b].json"
    files.write(path, b"one")
    left, fresh = tmp_path / ".a[b].json-1.tmp", tmp_path / ".a[b].json-2.tmp"
    for old in (left, fresh):
        old.write_bytes(b"half")
    os.utime(left, (0, 0))
    with monkeypatch.context() as context:
        context.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            files.write(path, b"two")
    assert path.read_bytes() == b"one"
    assert set(tmp_path.glob(".*.tmp")) == {fresh}  # which another process may be writing now


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_lock_dies_with_its_process_and_is_waited_for_so_long(tmp_path: Path) -> None:
    path, said = tmp_path / "lock", list[str]()
    child = os.fork()
    if not child:
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(str(os.getpid()))
            file.flush()
            (tmp_path / "held").touch()
            time.sleep(60)
        os._exit(0)
    try:
        while not (tmp_path / "held").exists():
            time.sleep(0.01)
        with files.lock(path, 0.2, said.append) as held:
            assert not held
        assert said == [str(child)]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with files.lock(path, 0.0, said.append) as held:
        assert held
    assert path.read_text() == str(os.getpid())
