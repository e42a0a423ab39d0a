"""Stopping a job early without losing its results, and barriers without a timeout."""

import os
import signal
import threading
import time
from datetime import timedelta
from types import FrameType
from typing import Any

import torch.distributed as dist

# set by `accelerate launch` and `torchrun`; SIGKILL ends these launchers but not the processes that they started
LAUNCHER_VARIABLES = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")


class LongBarrier:
    """A barrier for all processes of the launch that waits for up to 30 days: one process may finish hours before the
    slowest, which exceeds the timeout of `Accelerator.wait_for_everyone`. Create it in all processes, after the
    `Accelerator`."""

    def __init__(self) -> None:
        distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group: Any = dist.new_group(timeout=timedelta(days=30), backend="gloo") if distributed else None

    def wait(self) -> None:
        if self._group is not None:
            dist.barrier(self._group)


class StopRequest:
    """Tells, until `end` is called, whether this process should stop: after SIGTERM (pre-emption), after Ctrl-C (a
    second one interrupts as usual), or because its launcher is gone: if `accelerate launch` is killed, a single process
    would continue and run beside its successor. Create it in the main thread, and check `requested` between batches."""

    def __init__(self) -> None:
        self._signal = 0
        self._launcher = _launcher_pid()
        self._handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}

    @property
    def requested(self) -> bool:
        return bool(self._signal) or self._launcher not in (None, os.getppid())

    @property
    def exit_code(self) -> int:
        """The exit code of a process ended by that signal (143 for SIGTERM), so that no scheduler considers the job
        finished."""
        return 128 + (self._signal or signal.SIGTERM)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        signal.signal(signal.SIGINT, self._handlers[signal.SIGINT])

    def end(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


def end_with_launcher(seconds: float = 30.0) -> None:
    """From now on, exit `seconds` after the launcher was killed, even while waiting for other processes that no longer
    exist. Until then, a [`StopRequest`] allows a regular stop. Files written with `atomic_write` are complete either
    way."""
    parent = _launcher_pid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        time.sleep(seconds)
        os._exit(128 + signal.SIGTERM)

    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()


def _launcher_pid() -> int | None:
    """None for a process without a launcher, which may outlive its parent (`nohup`)."""
    return os.getppid() if any(name in os.environ for name in LAUNCHER_VARIABLES) else None
