"""Writing COCO's panoptic format: a JSON file with the segments of each image, and PNGs whose colours are their ids."""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from datasets import Dataset
from numpy.typing import NDArray
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..runtime.files import atomic_write
from .coco_export import copy_images
from .masks import decode_masks, encode_masks, find_overlap, mask_areas, mask_boxes, segment_colours, segment_masks
from .schema import category_ids, has_masks, id2label, source_id, stuff_labels


class PanopticWriter:
    """Writes an image's segments at a time, the PNG at once, and the JSON file at the end.

    Args:
        file: the JSON file. The PNGs are in the folder of the same name without the suffix, as panopticapi expects.
        categories: COCO records with `id`, `name` and `isthing`.
        info: of the JSON file.
        taken: names that no PNG gets, such as those of other files in the folder.
        png_info: text that is stored in each PNG.

    Raises:
        FileExistsError: the file already exists.
    """

    def __init__(
        self,
        file: str | Path,
        categories: Sequence[Mapping[str, Any]],
        info: Mapping[str, Any] | None = None,
        *,
        taken: Iterable[str] = (),
        png_info: PngInfo | None = None,
    ) -> None:
        self.file = Path(file)
        self.folder = self.file.with_suffix("")
        if self.file.exists():
            raise FileExistsError(f"{self.file} already exists. Choose another file.")
        self.folder.mkdir(parents=True, exist_ok=True)
        head: dict[str, Any] = {"info": dict(info)} if info else {}
        self._content = head | {"categories": [dict(entry) for entry in categories], "images": [], "annotations": []}
        self._names, self._png_info = set(taken), png_info

    def add(
        self,
        image: Mapping[str, Any],
        segmentation: NDArray[Any] | Tensor,
        segments: Sequence[Mapping[str, Any]],
    ) -> None:
        """Write the segments of one image.

        Args:
            image: COCO record with `id`, `file_name`, `width` and `height`.
            segmentation: (height, width), the id of the segment at each pixel; -1, and 0 unless a segment has it, are
                no segment, as in transformers' results. In the file, segments are numbered from 1.
            segments: COCO records with `id`, `category_id` and optionally `iscrowd` and further fields, such as
                `score`. Segments without pixels are left out, since the format has no place for them.

        Raises:
            ValueError: an id is not listed, is listed twice, or the sizes differ; names the image.
        """
        where = f"image {image['id']} ({image['file_name']})"
        ids = np.asarray(segmentation.cpu() if isinstance(segmentation, Tensor) else segmentation)
        size = (int(image["height"]), int(image["width"]))
        if ids.shape != size:
            raise ValueError(f"{where} has {size[0]} x {size[1]} pixels (height x width), its segments {ids.shape}.")
        records: list[dict[str, Any]] = []
        numbered = np.zeros(size, dtype=np.int64)
        for segment, mask in zip(segments, segment_masks(ids, [s["id"] for s in segments], where), strict=True):
            if not mask.any():
                continue
            numbered[mask] = len(records) + 1
            counts = encode_masks(mask[None])
            own = {"id": len(records) + 1, "category_id": segment["category_id"], "area": mask_areas(counts, size)[0]}
            own |= {"bbox": mask_boxes(counts, size)[0], "iscrowd": int(segment.get("iscrowd", 0))}
            records.append({**segment, **own})
        name = self._name(image)
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(segment_colours(numbered)).save(self.folder / name, pnginfo=self._png_info)
        fields = ("id", "file_name", "width", "height")
        self._content["images"].append({field: image[field] for field in fields})
        self._content["annotations"].append({"image_id": image["id"], "file_name": name, "segments_info": records})

    def _name(self, image: Mapping[str, Any]) -> str:
        """A name of the PNG that no other image has."""
        wanted = Path(str(image["file_name"]).replace("\\", "/")).with_suffix(".png").name
        names = itertools.chain([wanted], (f"{number}-{wanted}" for number in itertools.count(2)))
        name = next(name for name in names if name not in self._names)
        self._names.add(name)
        return name

    def close(self) -> Path:
        """Write the JSON file.

        Returns:
            the file.
        """
        with atomic_write(self.file) as opened:
            json.dump(self._content, opened)
        return self.file


def panoptic_categories(dataset: Dataset) -> list[dict[str, Any]]:
    """The categories of a data set as COCO's panoptic format has them."""
    names, stuff = id2label(dataset), stuff_labels(dataset)
    ids = category_ids(dataset)
    return [{"id": ids[i], "name": name, "isthing": int(name not in stuff)} for i, name in names.items()]


def export_panoptic(dataset: Dataset, folder: str | Path, split: str, *, progress: bool = True) -> Path:
    """Write `folder/annotations/panoptic_SPLIT.json` with its PNGs, and the unchanged image files into `folder/SPLIT`.

    Args:
        dataset: loaded with masks that do not overlap.

    Returns:
        the JSON file.

    Raises:
        FileExistsError: the file already exists.
        ValueError: the data set has no masks, or some overlap, for which the format has no place.
    """
    if not has_masks(dataset):
        raise ValueError("The data set has no masks: load it with masks=True.")
    writer = PanopticWriter(Path(folder) / "annotations" / f"panoptic_{split}.json", panoptic_categories(dataset))
    ids = category_ids(dataset)
    for row, name in copy_images(dataset, Path(folder), split, progress=progress):
        objects, size = row["objects"], (row["height"], row["width"])
        if overlap := find_overlap(objects["mask"], size):
            raise ValueError(f"{row['file_name']}: masks overlap by {overlap} pixels. export_coco writes such data.")
        numbers = np.arange(1, len(objects["mask"]) + 1)
        segmentation = (decode_masks(objects["mask"], size).numpy() * numbers[:, None, None]).sum(axis=0)
        segments = [
            {"id": int(number), "category_id": ids[category], "iscrowd": crowd}
            for number, category, crowd in zip(numbers, objects["category"], objects["iscrowd"], strict=True)
        ]
        image = {"id": source_id(row), "file_name": name, "width": size[1], "height": size[0]}
        writer.add(image, segmentation, segments)
    return writer.close()
