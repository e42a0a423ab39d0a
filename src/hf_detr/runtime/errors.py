"""Errors that a user can fix: a sentence, not a traceback."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from opcode import opmap
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

PACKAGE = Path(__file__).parents[1]
FORESEEABLE = (OSError, ValueError, ImportError, SafetensorError, StrictDataclassError)
DEBUG = "--debug"


@contextmanager
def exit_on_error() -> Iterator[None]:
    """End a script with a sentence on stderr and exit code 1 where files, arguments, data or packages are not as they
    have to be, or this package raises an error on purpose. Other errors keep their traceback, and all of them do with
    `--debug`, which scripts take at any place of the command line."""
    given = [text for text in sys.argv[1:] if len(text) > 3 and DEBUG.startswith(text)]  # argparse allows --de
    debug = bool(given)
    for text in given:
        sys.argv.remove(text)
    try:
        yield
    except Exception as error:
        if debug or not (isinstance(error, FORESEEABLE) or _raised_on_purpose(error)):
            raise
        sys.stdout.flush()
        where = "" if _raised_on_purpose(error) else f" ({DEBUG} shows where.)"
        sys.exit(_describe(error) + where)


def _describe(error: Exception) -> str:
    """The message of an error, for a person: without empty lines, and with its kind where it says nothing else. A
    DataLoader puts the traceback of its worker into the message, whose end is the error of the worker."""
    text = str(error)
    if of_worker := re.match(r"Caught (\w+) in \w+ worker", text):
        text = re.split(rf"^(?:[\w.]+\.)?{of_worker[1]}: ", text, flags=re.MULTILINE)[-1]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if isinstance(error, KeyError) or not lines:
        return f"{type(error).__name__}: {' '.join(lines)}"
    return "\n".join(lines)


def _raised_on_purpose(error: Exception) -> bool:
    """Whether the error was raised by a `raise` statement in a file of this package, or in the script."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    code = trace.tb_frame.f_code
    file = Path(code.co_filename).resolve()
    own = PACKAGE in file.parents or file == Path(sys.argv[0]).resolve()
    return own and code.co_code[trace.tb_lasti] == opmap["RAISE_VARARGS"]


def require_source(source: str | os.PathLike[str]) -> None:
    """Refuse a path that does not exist before it is taken for the id of a repository on the Hub.

    An id is NAME or USER/NAME. What has more slashes, begins with one, a dot or ~, or begins with the name of a folder
    that is here, is a path.

    Raises:
        FileNotFoundError: it is a path, and nothing is there.
        ValueError: it is a folder of several models.
    """
    text = os.fspath(source)
    path = Path(text)
    if (path / "folds.json").is_file():
        raise ValueError(f"{text} is a cross-validation. Name one of its models, such as {path / 'fold-1'}.")
    if path.exists() or text.startswith(("http://", "https://")):
        return
    is_id = re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", text) and not ("/" in text and Path(path.parts[0]).is_dir())
    if is_id:
        return
    beside = sorted(entry.name for entry in path.parent.glob("*"))[:5] if path.parent.is_dir() else []
    if beside:
        there = f" In {path.parent} are {', '.join(beside)}."
    else:
        there = f" {path.parent} is empty." if path.parent.is_dir() else f" There is no {path.parent} either."
    raise FileNotFoundError(f"There is no {text}.{there}")


def prepare_output(path: Path | None, *, folder: bool = False) -> None:
    """Make the folder of an output before anything is computed.

    Args:
        folder: the output is a folder itself.

    Raises:
        OSError: the folder cannot be made, or nothing can be written there.
    """
    if path is None:
        return
    target = path if folder else path.parent
    if path.is_dir() and not folder:
        raise IsADirectoryError(f"{path} is a folder; name a file.")
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    if not os.access(target, os.W_OK):
        raise PermissionError(f"{path} cannot be written: no permission to write into {target}.")
