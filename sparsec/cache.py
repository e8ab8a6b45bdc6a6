"""The user's cache folder: where it lies, and whether it is safe to run and read what lies there.

It is `$XDG_CACHE_HOME/sparsec`, by default `~/.cache/sparsec`, for this user only (mode 0700): what is built once is run from
there. One of the user's own that others can enter is closed to them. Refused is a folder that belongs to somebody else, or that
others can put another one in the place of, and there is never one under the folder that a process happens to stand in.
"""

from __future__ import annotations

import functools
import os
import stat
import sys
import warnings
from pathlib import Path

from sparsec.errors import CacheError, UnsafeCacheError

NAME = "sparsec"
WAY_OUT = "set XDG_CACHE_HOME to a folder of your own, by its absolute path"
_LINKS = 40
"""Links that are followed, as Linux has it."""


def folder(*parts: str) -> Path:
    """The cache folder, or one below it, made where it is not there; its real path.

    Raises CacheError where that cannot be, UnsafeCacheError for one that must not be used. Others can change nothing in what is
    returned: the folders above are root's or the user's, so that between a check and a use only the user can come.
    """
    base = _base()
    if sys.platform == "win32":
        path = base.joinpath(NAME, *parts)
        path.mkdir(parents=True, exist_ok=True)
        return path
    try:
        at = _walk(base, _LINKS)
        for part in (NAME, *parts):
            at = _walk(at / part, _LINKS)
            _close(at)
    except OSError as error:
        raise CacheError(
            f"{base / NAME}: the cache folder cannot be made or used ({error.strerror}: {error.filename}); {WAY_OUT}"
        ) from error
    return at


def owned(status: os.stat_result) -> bool:
    """Whether a file is this user's, and nobody else can write to it."""
    return sys.platform == "win32" or (status.st_uid == os.geteuid() and not status.st_mode & 0o022)


def _base() -> Path:
    """What the cache folder lies in, as the XDG base directory specification has it."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):
        return Path(named)
    home = _home()
    if named:
        warnings.warn(
            f"XDG_CACHE_HOME={named!r} is ignored: it must be an absolute path; {home / '.cache'} is used",
            RuntimeWarning,
            stacklevel=4,
        )
    return home / ".cache"


def _home() -> Path:
    home = os.environ.get("HOME", "")
    if sys.platform == "win32":
        home = os.path.expanduser("~")
    elif not os.path.isabs(home):
        import pwd

        try:
            home = pwd.getpwuid(os.geteuid()).pw_dir
        except KeyError:
            home = ""
    if not os.path.isabs(home):
        raise UnsafeCacheError(
            f"there is no place for a cache folder: HOME={os.environ.get('HOME', '')!r} is no absolute path, and the system knows "
            f"no home of this user; {WAY_OUT}"
        )
    if not os.path.isdir(home):
        raise CacheError(f"there is no place for a cache folder: the home folder {home} does not exist; {WAY_OUT}")
    return Path(home)


def _walk(path: Path, links: int) -> Path:
    """The real path of a folder, made where it is not there. UnsafeCacheError where others could put another in its place."""
    at = Path(path.anchor)
    for part in path.parts[1:]:
        _refuse_open(at)
        below = at / part if part != ".." else at.parent
        try:
            found = os.lstat(below)
        except FileNotFoundError:
            _make(below)
            found = os.lstat(below)
        if stat.S_ISLNK(found.st_mode):
            _refuse_foreign(below, found)
            if not links:
                raise CacheError(f"{below}: the cache folder cannot be found: too many links; {WAY_OUT}")
            at = _walk(at / os.readlink(below), links - 1)
        else:
            at = below
    if not at.is_dir():
        raise CacheError(f"{at}: the cache folder cannot lie there, where there is a file; {WAY_OUT}")
    return at


def _make(path: Path) -> None:
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:  # another process was faster
        return
    os.chmod(path, 0o700)  # whatever the umask took away


def _refuse_open(above: Path) -> None:
    """A folder above: others who can write to it can put another folder in the place of what lies there."""
    found = os.lstat(above)
    _refuse_foreign(above, found)
    # A group of the user's own is usual, and so is a umask that lets it write.
    others = found.st_mode & stat.S_IWOTH or (found.st_mode & stat.S_IWGRP and found.st_gid not in _own_groups())
    if others and not found.st_mode & stat.S_ISVTX:
        raise UnsafeCacheError(
            f"{above}: no cache folder may lie below: others can write to it (mode {stat.S_IMODE(found.st_mode):04o}), and so "
            f"put what they like in its place; take that right away (chmod go-w {above}), or {WAY_OUT}"
        )


def _refuse_foreign(path: Path, found: os.stat_result) -> None:
    if found.st_uid not in _trusted():
        raise UnsafeCacheError(
            f"{path}: the cache folder may not be or lie there: it belongs to user {found.st_uid}, and this process runs as "
            f"{os.geteuid()}; {WAY_OUT}"
        )


def _close(path: Path) -> None:
    """Takes the rights of others away from a folder of the user's own."""
    found = os.lstat(path)
    if found.st_uid != os.geteuid():
        raise UnsafeCacheError(
            f"{path}: the cache folder is refused: it belongs to user {found.st_uid}, and this process runs as {os.geteuid()}; "
            f"delete it, or {WAY_OUT}"
        )
    if not found.st_mode & 0o077:
        return
    try:
        os.chmod(path, found.st_mode & 0o700)
    except OSError:  # as on a disk that is read-only
        pass_on = found.st_mode
    else:
        pass_on = os.lstat(path).st_mode
    if pass_on & 0o022:
        raise UnsafeCacheError(
            f"{path}: the cache folder is refused: others can write to it (mode {stat.S_IMODE(pass_on):04o}), and the disk does "
            f"not let that be changed; {WAY_OUT}"
        )


def _trusted() -> set[int]:
    """Users who may own what lies above: root, this one, and the one that stands for root in a container without its number."""
    return {0, os.geteuid(), *_stands_for_root("uid")}


def _own_groups() -> set[int]:
    return {0, os.getegid(), *_stands_for_root("gid")}


@functools.cache
def _stands_for_root(kind: str) -> tuple[int, ...]:
    """In a user namespace, files of users that it does not know all belong to one number."""
    if sys.platform != "linux":
        return ()
    try:
        known = Path(f"/proc/self/{kind}_map").read_text().split()
        number = int(Path(f"/proc/sys/kernel/overflow{kind}").read_text())
    except (OSError, ValueError):
        return ()
    return () if known == ["0", "0", "4294967295"] else (number,)
