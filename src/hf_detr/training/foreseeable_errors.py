"""Errors that a user can fix: a sentence, not a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from opcode import opmap
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


@contextmanager
def exit_on_error() -> Iterator[None]:
    """End the process with a message on stderr and exit code 1 where this package raises an error on purpose. Errors
    that come from elsewhere keep their traceback."""
    try:
        yield
    except Exception as error:
        if not _raised_by_package(error):
            raise
        sys.stdout.flush()
        sys.exit(str(error))


def _raised_by_package(error: Exception) -> bool:
    """Whether the error was raised by a `raise` statement in a file of this package."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    code = trace.tb_frame.f_code
    return code.co_code[trace.tb_lasti] == opmap["RAISE_VARARGS"] and PACKAGE in Path(code.co_filename).parents
