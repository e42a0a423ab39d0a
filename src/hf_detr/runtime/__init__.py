"""What a long job needs to survive: files that are whole or not there, locks, being stopped, and packages that are
installed by choice."""

from .extras import import_extra
from .files import PARTIAL, hold_lock, replacing, sync
from .stop import Everyone, StopRequest, end_with_launcher

__all__ = ["PARTIAL", "Everyone", "StopRequest", "end_with_launcher", "hold_lock", "import_extra", "replacing", "sync"]
