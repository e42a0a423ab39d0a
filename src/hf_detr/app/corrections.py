"""Corrected images, collected in a COCO folder to train on."""

import hashlib
import json
import re
import shlex
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from ..data.dataset_folder import path_parts
from ..data.image_files import IMAGE_SUFFIXES
from ..model.image_io import read_image_header
from ..runtime import acquire_lock, atomic_write, listed

_saving = Lock()  # the file lock does not exclude threads of this process


@dataclass(frozen=True)
class CorrectedBox:
    """An object: the name of its class, and its box, (x_min, y_min, x_max, y_max) in pixels of the image as shown."""

    label: str
    corners: tuple[float, float, float, float]


class Corrections:
    """A COCO folder that grows by an image at a time: `annotations/instances_train.json` and `train/`.

    The image files are copied unchanged. An image that is saved again, by its content, gets new annotations in place of
    the old ones. Several processes may save into one folder.

    Args:
        folder: made when the first image is saved.
        names: of the classes, by class id; each once.
    """

    def __init__(self, folder: Path, names: Mapping[int, str]) -> None:
        self.folder = folder
        self.names = dict(names)

    @property
    def file(self) -> Path:
        return self.folder / "annotations" / "instances_train.json"

    @property
    def num_images(self) -> int:
        """The number of saved images."""
        return len(self._read()["images"])

    def save(self, image: Path, name: str, boxes: Sequence[CorrectedBox]) -> bool:
        """Save an image with its objects. An image without boxes is saved as a negative example.

        Args:
            image: its file.
            name: its original file name; the saved name also has a hash of its content.

        Returns:
            whether the image was there already, and has new annotations now.

        Raises:
            ValueError: a class is not one of the model's, a box has no area within the image, or the folder belongs to
                something else. Nothing is saved then.
        """
        ids = {name: index for index, name in reversed(self.names.items())}
        width, height = read_image_header(image).size
        objects = []
        for number, box in enumerate(boxes, start=1):
            if box.label not in ids:
                raise ValueError(
                    f"Box {number} has {f'the class {box.label!r}' if box.label else 'no class'}. Classes to choose "
                    f"from are {listed(self.names.values())}."
                )
            left, top, right, bottom = (
                min(max(value, 0.0), limit)
                for value, limit in zip(box.corners, (width, height, width, height), strict=True)
            )
            if not (right > left and bottom > top):
                raise ValueError(f"Box {number} ({box.label}) has no area within the image, {width} x {height} pixels.")
            sides = [round(value, 2) for value in (left, top, right - left, bottom - top)]
            objects.append({"category_id": ids[box.label] + 1, "bbox": sides, "area": round(sides[2] * sides[3], 2)})
        with _saving:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            lock = acquire_lock(self.folder / ".lock")
            try:
                return self._write(image, name, (width, height), objects)
            finally:
                lock.release()

    def boxes_of(self, image: Path) -> list[CorrectedBox] | None:
        """The boxes that an image was saved with, by its content; None if it was not saved."""
        coco = self._read()
        stored = _stored_as(image.read_bytes(), coco)
        if stored is None:
            return None
        names = {category["id"]: category["name"] for category in coco["categories"]}
        [image_id] = [entry["id"] for entry in coco["images"] if entry["file_name"] == stored]
        boxes = []
        for entry in coco["annotations"]:
            if entry["image_id"] == image_id:
                x, y, width, height = entry["bbox"]
                boxes.append(CorrectedBox(names[entry["category_id"]], (x, y, x + width, y + height)))
        return boxes

    def _write(self, image: Path, name: str, size: tuple[int, int], objects: list[dict[str, Any]]) -> bool:
        coco = self._read()
        known = {entry["file_name"]: entry["id"] for entry in coco["images"]}
        content = image.read_bytes()
        stored = _stored_as(content, coco)
        if stored is None:
            stored = f"{_hash(content)}-{_file_name(name, image)}"
            image_id = max(known.values(), default=0) + 1
            coco["images"].append({"id": image_id, "file_name": stored, "width": size[0], "height": size[1]})
        else:
            image_id = known[stored]
        target = self.folder / "train" / stored
        target.parent.mkdir(exist_ok=True)
        with atomic_write(target, "wb") as out:
            out.write(content)
        kept = [entry for entry in coco["annotations"] if entry["image_id"] != image_id]
        first = max((entry["id"] for entry in coco["annotations"]), default=0) + 1
        coco["annotations"] = kept + [
            {"id": first + number, "image_id": image_id, "iscrowd": 0} | entry for number, entry in enumerate(objects)
        ]
        with atomic_write(self.file) as out:
            json.dump(coco, out)
        return stored in known

    def _read(self) -> dict[str, Any]:
        categories = [{"id": index + 1, "name": name} for index, name in self.names.items()]
        if not self.file.is_file():
            return {"categories": categories, "images": [], "annotations": []}
        coco: dict[str, Any] = json.loads(self.file.read_text(encoding="utf-8"))
        if coco.get("categories") != categories:
            raise ValueError(
                f"{self.file} does not have the classes of this model. Choose another folder with --corrections."
            )
        return coco

    def zip(self, target: Path) -> Path:
        """Write the data set as a zip file, for download."""
        coco = self._read()  # image files are complete before it names them
        with zipfile.ZipFile(target, "w") as archive:
            archive.writestr(self.file.relative_to(self.folder).as_posix(), json.dumps(coco))
            for name in (f"train/{entry['file_name']}" for entry in coco["images"]):
                archive.write(self.folder / name, name)
        return target

    def command(self, model: str, folder: str | None = None) -> str:
        """The command that trains the model further on the corrected images.

        Args:
            folder: where they are for the user; None: where they are here.
        """
        return shlex.join(["hf-detr", "finetune", "--model", model, "--dataset", folder or str(self.folder)])


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _stored_as(content: bytes, coco: dict[str, Any]) -> str | None:
    """The file name of a saved image with this content."""
    prefix = f"{_hash(content)}-"
    return next((entry["file_name"] for entry in coco["images"] if entry["file_name"].startswith(prefix)), None)


def _file_name(name: str, image: Path) -> str:
    """A name that all systems allow, with the suffix of an image."""
    last = path_parts(name)[-1] if path_parts(name) else "image"
    path = Path(re.sub(r"[^\w.-]+", "_", last)[-80:])
    suffix = path.suffix.lower() if path.suffix.lower() in IMAGE_SUFFIXES else image.suffix.lower()
    return f"{path.stem or 'image'}{suffix if suffix in IMAGE_SUFFIXES else '.png'}"
