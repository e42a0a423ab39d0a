"""Ending early without losing what was done."""

import os
import signal
from types import FrameType, TracebackType

# set by `accelerate launch` and torch's launcher, of which only the process itself is killed by SIGKILL
LAUNCHERS_MARKS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")


class StopRequest:
    """Within `with`: whether this process was asked to stop, by SIGTERM or because the launcher that started it is
    gone. To be asked between batches, in the main thread.

    Attributes:
        exit_code: 143, which shells and schedulers know as ended by SIGTERM.
    """

    exit_code = 128 + signal.SIGTERM

    def __init__(self) -> None:
        self._terminated = False
        self._parent = os.getppid() if any(mark in os.environ for mark in LAUNCHERS_MARKS) else None

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
