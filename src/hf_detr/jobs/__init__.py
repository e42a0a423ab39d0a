"""What a long job needs to survive: files that are whole or not there, locks, and being stopped."""

from .files import PARTIAL, hold_lock, replacing, sync
from .stop import Everyone, StopRequest, end_with_launcher

__all__ = ["PARTIAL", "Everyone", "StopRequest", "end_with_launcher", "hold_lock", "replacing", "sync"]
