"""The folder of a prediction's results: which one, and how earlier results in it are replaced."""

import itertools
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..runtime import PARTIAL, acquire_lock
from .drawings import is_drawing
from .job import JOB_FILE, MAIN_LOCK, RESULTS, check_folder
from .video_job import check_video, output_files
from .work_list import WORKLIST

DEFAULT = "predictions"
DOWNLOADS = "downloads"  # folder in it for what URLs name


class OutputFolder:
    """The folder of a prediction's results.

    Without a given one it is, of `predictions`, `predictions-2`, ..., the one that holds these jobs already, or else
    the first that holds no other. Results that are overwritten are replaced at once by `finish`, when the new ones are
    complete; until then these are in a hidden folder beside, where a later start goes on with them.

    Args:
        given: output folder, or None.
        images: settings of the job on images, or None; see `recorded_settings`.
        videos: settings of the jobs on videos, by path.
        overwrite: replace results that are in the folder.
        lock: for the main process: make sure that nobody else works on what is replaced.

    Attributes:
        path: where the jobs write.
        target: where their results are in the end.

    Raises:
        ValueError: there is more in the folder than the results that these jobs replace.
        TimeoutError: another process works on it.
    """

    def __init__(
        self,
        given: Path | None,
        images: Mapping[str, Any] | None,
        videos: Mapping[Path, Mapping[str, Any]],
        *,
        overwrite: bool = False,
        lock: bool = True,
    ) -> None:
        self.target = given or _choose(images, videos)
        place = Path(os.path.abspath(self.target))
        # names that nobody else gives to a folder
        self._new, self._old = (place.with_name(f".{place.name}.hf_detr-{end}") for end in ("new", "old"))
        if self._old.exists() and lock:  # killed in `finish`
            if self.target.exists():
                shutil.rmtree(self._old)
            else:
                self._old.rename(self.target)
        self.path = self._new if overwrite and _holds_jobs(self.target, images, videos) else self.target
        if not self.replaces or not lock:
            return
        foreign = _foreign_files(self.target, images, videos)
        if foreign:
            raise ValueError(
                f"{self.target} has more than the results to overwrite: {foreign[0].relative_to(self.target)}. Nothing "
                "was changed. Use another --output_dir."
            )
        self._lock = acquire_lock(self.target / MAIN_LOCK)
        try:
            _check_jobs(self.path, images, videos)
        except ValueError:  # left by another command that was killed, before it replaced anything
            shutil.rmtree(self.path)

    @property
    def replaces(self) -> bool:
        """Whether the results are to replace others."""
        return self.path != self.target

    @property
    def downloads(self) -> Path:
        """Where what URLs name is kept, also while results are replaced, so that it has one path."""
        return self.target / DOWNLOADS

    def finish(self) -> None:
        """Put results that replace others in their place; for the main process, when all jobs are done."""
        if not self.replaces:
            return
        if self.downloads.exists():
            self.downloads.rename(self.path / DOWNLOADS)
        self.target.rename(self._old)
        self.path.rename(self.target)
        shutil.rmtree(self._old, ignore_errors=True)


def _choose(images: Mapping[str, Any] | None, videos: Mapping[Path, Mapping[str, Any]]) -> Path:
    free = None
    for number in itertools.count(1):
        folder = Path(DEFAULT if number == 1 else f"{DEFAULT}-{number}")
        if not folder.exists():
            return free or folder
        try:
            _check_jobs(folder, images, videos)
        except ValueError:
            continue
        if _holds_jobs(folder, images, videos):
            return folder
        free = free or folder
    raise AssertionError  # there are enough numbers


def _holds_jobs(folder: Path, images: Mapping[str, Any] | None, videos: Iterable[Path]) -> bool:
    """Whether a folder has results of a job on images, if these have some, or of one on a video of these names."""
    return (images is not None and (folder / JOB_FILE).exists()) or any(
        output_files(folder, video)[2].exists() for video in videos
    )


def _check_jobs(folder: Path, images: Mapping[str, Any] | None, videos: Mapping[Path, Mapping[str, Any]]) -> None:
    """
    Raises:
        ValueError: the folder has results of other jobs under the names of these; the message tells the difference.
    """
    if images is not None:
        check_folder(folder, images)
    for video, settings in videos.items():
        check_video(folder, video, settings)


def _foreign_files(folder: Path, images: Mapping[str, Any] | None, videos: Iterable[Path]) -> list[Path]:
    """Files in a folder that these jobs do not make."""
    own = {path for video in videos for path in output_files(folder, video)}
    if images is not None:
        own |= {folder / name for name in (JOB_FILE, WORKLIST, *RESULTS)}
    found = [Path(root, name) for root, _, names in os.walk(folder) for name in names]
    return [
        path
        for path in found
        if not (
            path in own
            or path.name.endswith(PARTIAL)
            or (path.name.startswith(".") and path.name.endswith(".lock"))
            or path.parent == folder / DOWNLOADS
            or (images is not None and path.parent == folder / "shards" and path.suffix == ".parquet")
            or (images is not None and is_drawing(path))
        )
    ]
