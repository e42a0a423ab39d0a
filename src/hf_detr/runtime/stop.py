"""Ending early without losing what was done, and waiting for the others without a limit."""

import os
import signal
import threading
import time
from datetime import timedelta
from types import FrameType
from typing import Any

import torch.distributed as dist

# set by `accelerate launch` and torch's launcher, of which only the process itself is killed by SIGKILL
LAUNCHERS_MARKS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")


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
    """From now on until `end`: whether this process was asked to stop, by SIGTERM (pre-emption), by Ctrl-C (a second
    one ends it as usual), or because the launcher that started it is gone: `accelerate launch` leaves a single process
    running, which would go on beside its successor. To be made in the main thread, and asked between batches."""

    def __init__(self) -> None:
        self._signal = 0
        self._parent = _launcher()
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    @property
    def requested(self) -> bool:
        return bool(self._signal) or self._parent not in (None, os.getppid())

    @property
    def exit_code(self) -> int:
        """What a shell reports of a process that the signal has ended (143 for SIGTERM), so that no scheduler takes the
        job for finished."""
        return 128 + (self._signal or signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        signal.signal(signal.SIGINT, self._before[signal.SIGINT])

    def end(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def end_with_launcher(seconds: float = 30.0) -> None:
    """From now on, end this process this long after its launcher was killed, wherever it is: it may be waiting for
    others that will never come. Until then, a [`StopRequest`] ends it in good order. Shards are whole in either case.
    """
    parent = _launcher()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        time.sleep(seconds)
        os._exit(128 + signal.SIGTERM)

    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()


def _launcher() -> int | None:
    """Its process id; None for a process that was started without one, and that may outlive its parent (`nohup`)."""
    return os.getppid() if any(mark in os.environ for mark in LAUNCHERS_MARKS) else None
