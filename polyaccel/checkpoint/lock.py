"""One writer per place: a file lock that the kernel drops when its owner dies, with the owner's name in the file."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from polyaccel.checkpoint import names
from polyaccel.checkpoint.local import LocalFolder
from polyaccel.checkpoint.storage import Folder, Location, explained, open_folder
from polyaccel.errors import CheckpointError

_FOLDER_LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lock; `pid` 0: it has not said so yet."""

    host: str
    pid: int
    run: str | None
    since: float

    def __str__(self) -> str:
        if not self.pid:
            return "another process"
        named = f"run {self.run!r}, " if self.run else ""
        return f"{named}process {self.pid} on host {self.host!r}, since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(self.since))}"


class Lock:
    """A held lock, given back by `release` or at the end of a with-block. Nested holds of a folder by one process are counted."""

    def __init__(self, path: Path | None, descriptor: int = -1) -> None:
        self._path = path
        self._descriptor = descriptor
        self._holds = 1

    def release(self) -> None:
        """Give one hold back. The file goes with the last one."""
        if self._path is None or self._holds == 0:
            return
        self._holds -= 1
        if self._holds == 0:
            del _held[self._path]
            # While it is still locked: whoever opened it before notices, in `_acquire`, that the name is gone.
            with suppress(OSError):  # a lock file that stays is swept, and locks nothing
                self._path.unlink()
            os.close(self._descriptor)

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


_held: dict[Path, Lock] = {}


def _forget_in_child() -> None:
    # A data loader's worker, forked while a lock is held, must not keep it when this process dies.
    for lock in _held.values():
        os.close(lock._descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)


def lock_folder(folder: Location, *, run: str | None = None) -> Lock:
    """Become the one run that writes checkpoints into this folder, until `release` or the end of the process.

    Only the main process of a job takes it. Raises CheckpointError naming the run that holds it. On a URL, and on a file system without
    locks (said in the log), nothing is held.
    """
    place = open_folder(folder)
    if not isinstance(place, LocalFolder):
        return Lock(None)
    with explained(f"{place.url} cannot be locked"):
        place.make()
        return _acquire(_resolved(place.path / _FOLDER_LOCK), f"checkpoints in {place.url}", run)


def folder_holder(folder: Location) -> Holder | None:
    """The other process that writes checkpoints into this folder, None where there is none (or it is this one)."""
    place = open_folder(folder)
    if not isinstance(place, LocalFolder):
        return None
    try:
        return _holder(_resolved(place.path / _FOLDER_LOCK))
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise


def lock_target(target: Folder, *, run: str | None = None) -> Lock:
    """Become the one that writes the checkpoint of this name. Raises CheckpointError naming who does so already."""
    if not isinstance(target, LocalFolder):
        return Lock(None)
    path = _target_lock(target)
    if path in _held:
        raise CheckpointError(f"{target.url} is still being written by this process", "wait for it first")
    return _acquire(path, target.url, run)


def is_being_written(target: Folder) -> bool:
    """Whether any process, this one included, is writing the checkpoint of this name. True where the file system cannot say."""
    if not isinstance(target, LocalFolder):
        return False
    path = _target_lock(target)
    try:
        return path in _held or _holder(path) is not None
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return True
        raise


def release_target(target: Folder) -> None:
    """Give back what `lock_target` took in this process; nothing where it took nothing."""
    if isinstance(target, LocalFolder) and (lock := _held.get(_target_lock(target))):
        lock.release()


def _target_lock(target: LocalFolder) -> Path:
    return _resolved(target.path.with_name(names.lock_name(target.name)))


def _resolved(path: Path) -> Path:
    # One lock, by whatever path the folder is reached; the lock file itself is never a link.
    return path.parent.resolve() / path.name


def _acquire(path: Path, what: str, run: str | None) -> Lock:
    if path in _held:
        _held[path]._holds += 1
        return _held[path]
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = _read(descriptor)
            os.close(descriptor)
            raise CheckpointError(
                f"{what}: they are being written by another run ({other})"
                if path.name == _FOLDER_LOCK
                else f"{what} is being written by another run ({other})",
                "wait until it ends, stop it, or give this run a folder of its own",
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            log.warning(
                "%s: its file system has no locks, so a second run that writes there will not be noticed", path.parent
            )
        if _is_still_there(descriptor, path):
            break
        os.close(descriptor)  # its owner removed it between our open and our lock
    facts = {"host": socket.gethostname(), "pid": os.getpid(), "run": run, "since": time.time()}
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(facts).encode() + b"\n", 0)
    except OSError:  # a full disk: an open descriptor would hold the lock for as long as this process lives
        path.unlink(missing_ok=True)
        os.close(descriptor)
        raise
    _held[path] = Lock(path, descriptor)
    return _held[path]


def _holder(path: Path) -> Holder | None:
    if path in _held:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return _read(descriptor)
    finally:
        os.close(descriptor)


def _read(descriptor: int) -> Holder:
    try:
        facts = json.loads(os.pread(descriptor, 4096, 0))
        return Holder(str(facts["host"]), int(facts["pid"]), facts["run"] and str(facts["run"]), float(facts["since"]))
    except (ValueError, KeyError, TypeError):
        return Holder("", 0, None, 0.0)  # it has just been taken


def _is_still_there(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
