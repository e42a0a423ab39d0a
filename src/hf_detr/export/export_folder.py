"""The folder of an export: whose it may be, and how it is replaced in one step."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from ..model.modeling_hf_detr import DetrForDetection
from ..runtime import PARTIAL, acquire_lock
from .exported_model import EXPORT_FILE, is_exported


def check_folder(output_dir: Path, model: DetrForDetection) -> None:
    """Raise FileExistsError unless the folder is new, empty, or an earlier export of this model."""
    if not output_dir.exists():
        return
    if not output_dir.is_dir():
        raise FileExistsError(f"{output_dir} is a file; pass a folder.")
    if not any(output_dir.iterdir()):
        return
    if not is_exported(output_dir):
        raise FileExistsError(f"{output_dir} is neither empty nor an export. Nothing was written.")
    earlier = json.loads((output_dir / EXPORT_FILE).read_text(encoding="utf-8")).get("model")
    if earlier != model_source(model):
        raise FileExistsError(
            f"{output_dir} is the export of another model ({earlier or 'built in Python'}). Nothing was written. Use "
            "another folder."
        )


def model_source(model: DetrForDetection) -> str:
    """The origin of the model: a folder or a Hub id; empty if it was built in Python."""
    name = model.config.name_or_path
    return os.path.realpath(name) if name and os.path.isdir(name) else name


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A folder to fill that replaces `target` on success and is removed after an error. If only the replacement fails,
    it is kept, and the error names its path. The next export cleans up after a kill."""
    target = Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, old, lock_file = (target.with_name(f".{target.name}{ending}") for ending in (PARTIAL, ".old", ".lock"))
    lock = acquire_lock(lock_file, seconds=1)
    try:
        if old.exists() and not target.exists():  # killed between the two renames
            old.rename(target)
        for orphan in (partial, old):
            shutil.rmtree(orphan, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _replace_folder(partial, target, old)
    finally:
        with suppress(OSError):  # Windows cannot delete an open file
            lock_file.unlink()
        lock.release()


def _replace_folder(partial: Path, target: Path, old: Path) -> None:
    try:
        if target.exists():
            target.rename(old)
        partial.rename(target)
    except OSError as error:
        if old.exists() and not target.exists():
            old.rename(target)
        kept = partial.rename(target.with_name(f"{target.name}-{uuid4().hex[:8]}"))
        raise OSError(f"The export is complete but cannot be moved to {target} ({error}). It is in {kept}.") from error
    shutil.rmtree(old, ignore_errors=True)
