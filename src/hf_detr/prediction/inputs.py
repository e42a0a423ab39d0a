"""What `predict.py` is asked to look at: paths and URLs of images, folders and videos."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

from ..runtime import atomic_write
from .job import recorded_settings
from .output_folder import OutputFolder
from .video import is_video
from .video_job import recorded_video_settings

TIMEOUT = 60  # seconds without an answer


class Inputs:
    """Images, folders and videos to predict.

    Args:
        given: paths and URLs.

    Attributes:
        names: URLs, and absolute paths.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: two videos would have the same output files.
    """

    def __init__(self, given: Sequence[str]) -> None:
        missing = [text for text in given if not _is_url(text) and not Path(text).exists()]
        if missing:
            raise FileNotFoundError(f"There is no {missing[0]}.")
        # not resolved: behind a symbolic link a file may have a name that tells nothing
        self.names = sorted({text if _is_url(text) else os.path.abspath(text) for text in given})
        stems = [path.stem for path in self._paths(Path()) if is_video(path)]
        if len(set(stems)) < len(stems):
            raise ValueError("Two of the videos have the same name, and so would their results. Predict them in turn.")
        self.has_videos = bool(stems)

    def open(
        self, output_dir: Path | None, settings: dict[str, Any], *, overwrite: bool = False, is_main: bool = True
    ) -> "PlannedJobs":
        """Choose the output folder, and download what URLs name into it. To be called on the main process first.

        Args:
            output_dir, overwrite: see [`OutputFolder`].
            settings: everything that affects results, see `model_settings`.

        Raises:
            OSError: a URL cannot be downloaded.
            ValueError, TimeoutError: see [`OutputFolder`].
        """
        planned = self._paths(Path())
        images = [name for name, path in zip(self.names, planned, strict=True) if not is_video(path)]
        of_images = settings | {"images": images[0] if len(images) == 1 else images}
        of_videos = {
            path: recorded_video_settings(
                path, settings | {"images": name} | ({"bytes": None} if _is_url(name) else {})
            )
            for name, path in zip(self.names, planned, strict=True)
            if is_video(path)
        }
        recorded = recorded_settings((), of_images) if images else None
        output = OutputFolder(output_dir, recorded, of_videos, overwrite=overwrite, lock=is_main)
        paths = self._paths(output.downloads)
        again = is_main and output.replaces  # what a URL names may be another file now
        for name, path in zip(self.names, paths, strict=True):
            if _is_url(name) and (again or not path.exists()):
                _download(name, path)
        videos = {path: of_videos[plan] for path, plan in zip(paths, planned, strict=True) if plan in of_videos}
        return PlannedJobs(output, [path for path in paths if path not in videos], of_images, videos)

    def _paths(self, downloads: Path) -> list[Path]:
        """Where all inputs are, or will be once they are downloaded, under the names in the URLs."""
        paths: list[Path] = []
        for name in self.names:
            if not _is_url(name):
                paths.append(Path(name))
                continue
            wanted = PurePosixPath(unquote(urlsplit(name).path)).name
            wanted = "image" if wanted in ("", ".", "..") else wanted
            path, number = downloads / wanted, 2
            while path in paths:
                path, number = downloads / f"{Path(wanted).stem}-{number}{Path(wanted).suffix}", number + 1
            paths.append(path)
        return paths


@dataclass(frozen=True)
class PlannedJobs:
    """Where results go, and the jobs whose results they are.

    Attributes:
        images: images and folders for `open_job`; `settings`: of that job.
        videos: for `open_video_job`, with the settings of their jobs.
    """

    output: OutputFolder
    images: list[Path]
    settings: dict[str, Any]
    videos: dict[Path, dict[str, Any]]


def _is_url(text: str) -> bool:
    return text.lower().startswith(("http://", "https://"))


def _download(url: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with (
            httpx.stream("GET", url, timeout=TIMEOUT, follow_redirects=True) as answer,
            atomic_write(path, "wb") as file,
        ):
            answer.raise_for_status()
            for part in answer.iter_bytes():
                file.write(part)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise OSError(f"{url} cannot be downloaded: {str(error) or type(error).__name__}") from error
