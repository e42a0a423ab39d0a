"""Files that are there whole or not at all, and locks that a kill releases."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from transformers.utils import logging

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.get_logger(__name__)
PARTIAL = ".partial"  # ending of files that are still being written


@contextmanager
def replacing(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A file to write, put in the place of `path` when all of it is on the disk. A kill leaves `path` as it was, and
    maybe a file that ends in `.partial`."""
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with partial.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:  # a full disk is not made fuller
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():  # cannot be opened there
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def hold_lock(path: Path, *, shared: bool = False, seconds: float = 60.0) -> IO[Any]:
    """Lock a file for as long as the file that is returned stays open. The kernel releases it with the process, however
    that ends. Where the file system has no locks, a warning says so.

    Args:
        shared: others may hold it shared as well.
        seconds: to wait for it.

    Raises:
        TimeoutError: another process holds it.
    """
    file = path.open("a")
    if fcntl is None:
        return file
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                file.close()
                raise TimeoutError(f"{path} is locked by another process.") from None
            time.sleep(0.1)
        except OSError as error:
            logger.warning(f"{path} cannot be locked ({error}). Take care that the job is not started twice at a time.")
            return file
        else:
            return file
