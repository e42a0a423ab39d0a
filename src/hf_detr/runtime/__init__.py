"""What long jobs need: atomic writes, file locks, clean stops on signals, CPU threads, and optional packages."""

from .errors import exit_on_error, prepare_output, require_source
from .extras import import_extra
from .files import PARTIAL, acquire_lock, atomic_write, sync
from .modes import evaluation_mode
from .stop import LongBarrier, StopRequest, end_with_launcher
from .wording import listed, more_about, shortened

__all__ = [
    "PARTIAL",
    "LongBarrier",
    "StopRequest",
    "acquire_lock",
    "atomic_write",
    "end_with_launcher",
    "evaluation_mode",
    "exit_on_error",
    "import_extra",
    "listed",
    "more_about",
    "prepare_output",
    "require_source",
    "shortened",
    "sync",
]
