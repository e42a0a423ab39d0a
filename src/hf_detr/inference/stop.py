"""Ending early without losing what was done, and waiting for the others without a limit."""

import os
import signal
import threading
import time
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist

# set by `accelerate launch` and torch's launcher, of which only the process itself is killed by SIGKILL
LAUNCHERS_MARKS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
EXIT_CODE = 128 + signal.SIGTERM  # 143, which shells and schedulers know as ended by SIGTERM


class Everyone:
    """All processes of the launch, to wait for: a process may be done hours before the slowest, which is longer than
    Accelerate's own waiting lasts. To be made in all processes, after the `Accelerator`."""

    def __init__(self) -> None:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group: Any = dist.new_group(timeout=timedelta(days=30), backend="gloo") if several else None

    def wait(self) -> None:
        if self._group is not None:
            dist.barrier(self._group)


class StopRequest:
    """Within `with`: whether this process was asked to stop, by SIGTERM or because the launcher that started it is
    gone. To be asked between batches, in the main thread."""

    def __init__(self) -> None:
        self._terminated = False
        self._parent = _launcher()

    @property
    def requested(self) -> bool:
        return self._terminated or self._parent not in (None, os.getppid())

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._terminated = True

    def __enter__(self) -> "StopRequest":
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, self._before)


def end_with_launcher(seconds: float = 30.0) -> None:
    """From now on, end this process this long after its launcher was killed, wherever it is: it may be waiting for
    others that will never come. Until then, a [`StopRequest`] ends it in good order. Shards are whole in either case.
    """
    parent = _launcher()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        time.sleep(seconds)
        os._exit(EXIT_CODE)

    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()


def _launcher() -> int | None:
    """Its process id; None for a process that was started without one, and that may outlive its parent (`nohup`)."""
    return os.getppid() if any(mark in os.environ for mark in LAUNCHERS_MARKS) else None
