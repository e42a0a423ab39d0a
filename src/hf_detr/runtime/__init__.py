"""What long jobs need: atomic writes, file locks, clean stops on signals, CPU threads, and optional packages."""

from .extras import import_extra
from .files import PARTIAL, acquire_lock, atomic_write, sync
from .stop import LongBarrier, StopRequest, end_with_launcher

__all__ = [
    "PARTIAL",
    "LongBarrier",
    "StopRequest",
    "acquire_lock",
    "atomic_write",
    "end_with_launcher",
    "import_extra",
    "sync",
]
