"""COCO-format folders as PyTorch data sets, checked when they are opened."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import PIL.Image
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..images import open_image

EXIF_ORIENTATION = 0x0112
TURNED_BY_90_DEGREES = (5, 6, 7, 8)


def find_annotations(folder: str | Path, split: str) -> tuple[Path, Path]:
    """The annotation file and the image folder of a split.

    Looked for, in this order: `annotations/instances_SPLIT.json` (or a longer name that begins so, as in
    `instances_train2017.json`) with images in `SPLIT/` (`train2017/`); `SPLIT/_annotations.coco.json` with the images
    beside it; `SPLIT.json` with images in `SPLIT/`, or in the folder itself. "val" also finds "valid" and "validation".

    Raises:
        FileNotFoundError: says what was looked for.
    """
    folder = Path(folder)
    names = {"val": ("val", "valid", "validation")}.get(split, (split,))
    for name in names:
        for path in sorted((folder / "annotations").glob(f"instances_{name}*.json")):
            images = path.stem.removeprefix("instances_")
            places = (folder / images, folder / "images" / images, folder / name, folder / "images" / name)
            return path, next((place for place in places if place.is_dir()), folder)
        beside = folder / name / "_annotations.coco.json"
        if beside.is_file():
            return beside, beside.parent
        alone = folder / f"{name}.json"
        if alone.is_file():
            return alone, next((d for d in (folder / name, folder / "images") if d.is_dir()), folder)
    raise FileNotFoundError(
        f'No COCO annotations for the split "{split}" in {folder}. Looked for annotations/instances_{split}*.json, '
        f"{split}/_annotations.coco.json and {split}.json."
    )


class CocoDetection(Dataset[tuple[PIL.Image.Image, dict[str, Any]]]):
    """Images and objects of one split of a COCO-format folder.

    Category ids of the file, whatever they are, become 0 ... N-1 in their order; `category_ids` leads back. Everything
    is checked here, before anything is computed: every image is there, begins as an image and has the recorded
    size (with its EXIF orientation applied, as annotation tools show it), every box is finite, has an area and touches
    its image.

    Args:
        folder, split: see `find_annotations`.
        id2label: names of the classes, if they are given by another split or a model; categories are matched to them
            by name.
        keep_in_memory: keep images decoded after their first use, for small data sets that are read many times. Each
            worker process of a loader keeps its own.
        progress: show a bar while the files are checked.

    Attributes:
        id2label: class id to name; `category_ids`: class id to the file's category id.
        images: the file's image records; `annotations`: per image, records with `category_id` in 0 ... N-1.

    Item: the PIL image (RGB or whatever it is, turned as EXIF says) and `{"image_id": int, "annotations": [...]}`, as
    `DetrImageProcessor` takes it.

    Raises:
        FileNotFoundError: no annotations.
        ValueError: the file or a record of it cannot be used; the message names the first ones and the fix.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        *,
        id2label: dict[int, str] | None = None,
        keep_in_memory: bool = False,
        progress: bool = True,
    ) -> None:
        self.file, self.image_folder = find_annotations(folder, split)
        try:
            content = json.loads(self.file.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{self.file} is not valid JSON: {error}") from error
        missing = {"images", "annotations", "categories"} - set(content if isinstance(content, dict) else ())
        if missing:
            raise ValueError(f"{self.file} is not COCO: it lacks {sorted(missing)}.")
        self.categories = sorted(content["categories"], key=lambda category: int(category["id"]))
        used = {record.get("category_id") for record in content["annotations"]}
        # Roboflow writes a parent category that no box uses and all others name as theirs
        parents = {category.get("supercategory") for category in self.categories} - {"none"}
        self.categories = [c for c in self.categories if c["id"] in used or c["name"] not in parents]
        names = [str(category["name"]) for category in self.categories]
        if id2label is None:
            id2label = dict(enumerate(names))
        repeated = [name for name, count in Counter(names).items() if count > 1]
        unknown = [name for name in names if name not in id2label.values()]
        if repeated or unknown:
            reason = f"names two categories {repeated[0]!r}" if repeated else f"has a category {unknown[0]!r}"
            raise ValueError(f"{self.file} {reason}, which does not fit the classes {list(id2label.values())}.")
        self.id2label = id2label
        label2id = {name: index for index, name in id2label.items()}
        to_class = {category["id"]: label2id[str(category["name"])] for category in self.categories}
        self.category_ids = {class_id: int(category_id) for category_id, class_id in to_class.items()}
        self.images: list[dict[str, Any]] = content["images"]
        keys = ("id", "file_name", "width", "height")
        lacking = [f"image {image.get('id')}" for image in self.images if not all(key in image for key in keys)]
        self._fail(lacking, f"Each image needs {', '.join(keys)}.")
        self.annotations = self._read_annotations(content["annotations"], to_class)
        self._check_images(progress)
        self._kept: dict[int, PIL.Image.Image] | None = {} if keep_in_memory else None

    def _fail(self, problems: list[str], fix: str) -> None:
        if problems:
            more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
            raise ValueError(f"{self.file}: {len(problems)} problems. {'; '.join(problems[:5])}{more}. {fix}")

    def _read_annotations(
        self, records: list[dict[str, Any]], to_class: dict[Any, int]
    ) -> dict[int, list[dict[str, Any]]]:
        by_image: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in self.images}
        if len(by_image) != len(self.images):
            raise ValueError(f"{self.file}: two images share one id.")
        sizes = {image["id"]: (image["width"], image["height"]) for image in self.images}
        problems = []
        for record in records:
            where = f"annotation {record.get('id')} of image {record.get('image_id')}"
            box: Any = record.get("bbox")
            if record.get("image_id") not in by_image:
                problems.append(f"{where}: no such image")
            elif record.get("category_id") not in to_class:
                problems.append(f"{where}: no category {record.get('category_id')}")
            elif not _is_box(box):
                problems.append(f"{where}: bbox {box} is not four finite numbers")
            elif box[2] <= 0 or box[3] <= 0:
                problems.append(f"{where}: bbox {box} has no area")
            elif not self._touches(box, sizes[record["image_id"]]):
                problems.append(f"{where}: bbox {box} is outside its image of {sizes[record['image_id']]}")
            else:
                by_image[record["image_id"]].append(record | {"category_id": to_class[record["category_id"]]})
        self._fail(problems, "bbox must be [x_min, y_min, width, height] in pixels. Correct or remove these records.")
        return by_image

    @staticmethod
    def _touches(box: list[float], size: tuple[int, int]) -> bool:
        return box[0] < size[0] and box[1] < size[1] and box[0] + box[2] > 0 and box[1] + box[3] > 0

    def _check_images(self, progress: bool) -> None:
        problems = []
        for record in tqdm(self.images, desc=f"Checking {self.file.name}", disable=not progress, leave=False):
            path = self.image_folder / record["file_name"]
            try:
                with PIL.Image.open(path) as image:  # the header; all of a PNG, whose EXIF may come last
                    size = image.size
                    turned = image.getexif().get(EXIF_ORIENTATION) in TURNED_BY_90_DEGREES
                    if turned and image.format != "TIFF":  # of which Pillow gives the turned size
                        size = size[::-1]
            except (OSError, PIL.Image.DecompressionBombError) as error:
                problems.append(f"image {record['id']}: {error}")
                continue
            if size != (record["width"], record["height"]):
                recorded = (record["width"], record["height"])
                why = ", its EXIF orientation not applied" if turned and size == recorded[::-1] else ""
                problems.append(f"image {record['id']} ({path.name}) is {size} but recorded as {recorded}{why}")
        self._fail(problems, "Boxes of a wrongly recorded image would be off. Correct these records or files.")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, dict[str, Any]]:
        record = self.images[index]
        image = self._kept.get(index) if self._kept is not None else None
        if image is None:
            image = open_image(self.image_folder / record["file_name"])
            if self._kept is not None:
                self._kept[index] = image
        return image, {"image_id": record["id"], "annotations": self.annotations[record["id"]]}


def _is_box(box: Any) -> bool:
    numbers = isinstance(box, (list, tuple)) and all(isinstance(value, (int, float)) for value in box)
    return numbers and len(box) == 4 and all(math.isfinite(value) for value in box)
