"""Boxes in the formats that labelling tools import as pre-annotations."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Box = Sequence[float]  # x_min, y_min, width, height in pixels


def label_studio_task(
    file_name: str, size: tuple[int, int], boxes: Iterable[tuple[str, Box]], *, score: float | None = None
) -> dict[str, Any]:
    """A task for Label Studio, with the boxes as a prediction. The labelling configuration must contain
    `<RectangleLabels name="label" toName="image">` and `<Image name="image">`.

    Args:
        file_name: as Label Studio finds the image, for example with a prefix like `/data/local-files/?d=images/`.
        size: (width, height) in pixels.
        boxes: the name of the class and the box of each object.
        score: of the whole prediction, by which Label Studio can sort.
    """
    width, height = size
    results = []
    for label, (x, y, w, h) in boxes:
        places = {"x": x / width, "y": y / height, "width": w / width, "height": h / height}
        value = {name: round(100 * place, 4) for name, place in places.items()}
        results.append(
            {
                "type": "rectanglelabels",
                "from_name": "label",
                "to_name": "image",
                "original_width": width,
                "original_height": height,
                "value": value | {"rotation": 0, "rectanglelabels": [label]},
            }
        )
    prediction = {"result": results} | ({} if score is None else {"score": score})
    return {"data": {"image": file_name}, "predictions": [prediction]}


def coco_pre_annotations(
    names: Mapping[int, str], images: Iterable[tuple[str, tuple[int, int], Iterable[Mapping[str, Any]]]]
) -> dict[str, Any]:
    """COCO annotations that CVAT imports as "COCO 1.0". CVAT ignores category 0 and requires numeric image ids, so both
    are counted from 1; it matches images by file name.

    Args:
        names: of the classes, by class id.
        images: per image the file name, (width, height) in pixels, and its objects with `label` (class id), `bbox`
            (x_min, y_min, width, height in pixels) and any extra fields, which are copied.
    """
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (file_name, (width, height), objects) in enumerate(images, start=1):
        records.append({"id": number, "file_name": file_name, "width": width, "height": height})
        for found in objects:
            bbox = list(found["bbox"])
            further = {key: value for key, value in found.items() if key not in ("label", "bbox")}
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": found["label"] + 1,
                    "bbox": bbox,
                    "area": bbox[2] * bbox[3],
                    "iscrowd": 0,
                    "segmentation": [],
                }
                | further
            )
    categories = [{"id": label + 1, "name": name} for label, name in names.items()]
    return {"categories": categories, "images": records, "annotations": annotations}
