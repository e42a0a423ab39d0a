"""Atomic writes, and file locks that the kernel releases when a process ends."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from filelock import BaseFileLock, FileLock, Timeout
from transformers.utils import logging

logger = logging.get_logger(__name__)
PARTIAL = ".partial"  # suffix of files that are still being written


@contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A file to write that replaces `path` once all of it is on disk. If the process is killed, `path` is unchanged and
    a file with the suffix `.partial` may remain."""
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with partial.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:  # free the space on a full disk
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def acquire_lock(path: Path, *, seconds: float = 60.0) -> BaseFileLock:
    """Lock a file until the lock is released, is garbage-collected, or the process ends in any way. If the file system
    does not support locks, a warning is logged and the file is not locked.

    Args:
        seconds: how long to wait for another process to release it.

    Raises:
        TimeoutError: another process still holds the lock.
        OSError: the file cannot be created.
    """
    path.open("a").close()
    # filelock's soft locks are files, which survive a kill
    lock: BaseFileLock = FileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.warning(f"{path.parent} is in use by another process. Waiting up to {seconds:.0f} s for its end.")
            lock.acquire(timeout=seconds)
    except Timeout:
        raise TimeoutError(f"{path} is locked by another process.") from None
    except OSError as error:
        logger.warning(f"{path} cannot be locked ({error}). Make sure that the job runs only once at a time.")
    return lock
