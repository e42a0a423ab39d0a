"""The images of a prediction job, and which images of a data set they are."""

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
from datasets import Image

from ..model.annotations import canonical_id
from ..runtime.wording import listed

if TYPE_CHECKING:
    from ..data.schema import DetectionDataset


@dataclass(frozen=True)
class PredictedImages:
    """The images of a prediction job, and what its settings say of its detections.

    Attributes:
        folder: of the job.
        image_folder: that file names are relative to.
        images: records `id`, `file_name`, `width` and `height` of the images that were read.
        sizes: file name to size of the file in bytes.
        categories: in the order of class ids.
        threshold: the score below which nothing was stored, or "per_class".
        limit: detections that were stored per image at most; None: all.
        mask_kinds: the masks that were stored, too, see [`~hf_detr.prediction.SegmentOptions`].
    """

    folder: Path
    image_folder: Path
    images: list[dict[str, Any]]
    sizes: dict[str, int]
    categories: list[dict[str, Any]]
    threshold: float | str
    limit: int | None
    mask_kinds: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> "PredictedImages":
        from ..prediction.drawings import file_as_text  # not before it is needed: prediction has many parts
        from ..prediction.work_list import WORKLIST

        for name in ("job.json", WORKLIST, "images.json", "detections.json"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} is not the folder of a finished prediction job: it has no {name}.")
        try:
            job, results = (json.loads((folder / name).read_text("utf-8")) for name in ("job.json", "images.json"))
            work = pq.read_table(folder / WORKLIST, columns=["path", "bytes"])
            settings = job["settings"]
            limit = 100 if settings.get("config.class_activation") == "sigmoid" else None
            return cls(
                folder,
                Path(job["image_folder"]),
                [{key: image[key] for key in ("id", "file_name", "width", "height")} for image in results["images"]],
                dict(zip(map(file_as_text, work["path"].to_pylist()), work["bytes"].to_pylist(), strict=True)),
                [{key: entry[key] for key in ("id", "name")} for entry in results["categories"]],
                settings["threshold"],
                settings.get("top_k") or limit,
                tuple(settings.get("masks") or ()),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"The files of the prediction job in {folder} were changed ({error!r}).") from error

    def notes(self, max_detections: int) -> list[str]:
        notes = []
        if self.threshold != 0:
            kept = "the threshold of the class" if self.threshold == "per_class" else self.threshold
            notes.append(
                f"Only detections with a score above {kept} were stored, which lowers AP: predict with --threshold 0."
            )
        if self.limit is not None and self.limit < max_detections:
            notes.append(
                f"At most {self.limit} detections per image were stored, which lowers AP: predict with --top_k "
                f"{max_detections}."
            )
        return notes

    def segments(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        """The id of each image, as in `images`, and each of its segments, from the shards of the job."""
        from ..prediction.shards import read_shards

        ids = {image["file_name"]: image["id"] for image in self.images}
        for row in read_shards(self.folder / "shards", ["file", "segments"]):
            for segment in row["segments"] or ():
                yield ids[row["file"]], segment

    def ids_in(self, dataset: "DetectionDataset") -> dict[Any, Any]:
        """The data set's image id by the id of the job. An image is the same if it is the same file, or one elsewhere
        with the same name, file size and size in pixels.

        Raises:
            ValueError: an image of the data set has no such file, or more than one.
        """
        paths = {os.path.join(os.path.realpath(self.image_folder), image["file_name"]): image for image in self.images}
        by_name = defaultdict(list)
        for entry in self.images:
            by_name[_path(entry["file_name"]).name].append(entry)
        ids: dict[Any, Any] = {}
        missing: list[str] = []
        rows = dataset.select_columns(["image", "file_name", "height", "image_id", "width"])
        for row in rows.cast_column("image", Image(decode=False)).with_format(None):
            name, path = row["file_name"], row["image"]["path"]
            image = paths.get(os.path.realpath(path)) if path else None
            is_same_file = image is not None
            image = image or self._image_of_name(name, by_name)
            if image is None:
                missing.append(name)
                continue
            pixels = [f"{given['width']} x {given['height']} pixels" for given in (row, image)]
            sizes = [_bytes_of(row["image"]), self.sizes.get(image["file_name"], -1)]
            if is_same_file or min(sizes) < 0:  # a file that has been written again is told by its pixels only
                sizes = []
            for values in (pixels, [f"{size} bytes" for size in sizes]):
                if len(set(values)) > 1:
                    raise ValueError(
                        f"{name} has {values[0]} in the data set and had {values[1]} in {self.folder}: they are not "
                        "the same image."
                    )
            if ids.setdefault(canonical_id(image["id"]), row["image_id"]) != row["image_id"]:
                raise ValueError(f"Several images of the data set are {image['file_name']} of {self.folder}.")
        if missing:
            raise ValueError(
                f"{len(missing)} images of the data set were not predicted in {self.folder}, or could not be read: "
                f"{listed(missing, 5)}."
            )
        return ids

    def _image_of_name(self, name: str, by_name: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any] | None:
        path = _path(name)
        candidates = [image for image in by_name.get(path.name, ()) if _same_end(path, _path(image["file_name"]))]
        candidates = [image for image in candidates if _path(image["file_name"]) == path] or candidates
        if len(candidates) > 1:
            raise ValueError(
                f"{name} of the data set may be {candidates[0]['file_name']} or {candidates[1]['file_name']} of "
                f"{self.folder}: predict the images where the data set has them."
            )
        return candidates[0] if candidates else None


def _path(name: str) -> PurePosixPath:
    return PurePosixPath(str(name).replace("\\", "/"))


def _same_end(one: PurePosixPath, other: PurePosixPath) -> bool:
    """Whether the shorter path is the end of the longer one."""
    length = min(len(one.parts), len(other.parts))
    return one.parts[-length:] == other.parts[-length:]


def _bytes_of(image: Mapping[str, Any]) -> int:
    """The size of an image file; -1 if it cannot be known."""
    if image["bytes"] is not None:
        return len(image["bytes"])
    try:
        return os.path.getsize(image["path"])
    except (OSError, TypeError):
        return -1
