"""Suspected annotation errors as a page with crops, as JSON, and as pre-annotations for labelling tools."""

import base64
import html
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.labelling_tools import coco_pre_annotations, label_studio_task
from ..data.schema import id2label, source_id
from ..model.image_io import to_image_tensor
from ..runtime.files import atomic_write
from ..visualization.draw import draw_boxes, tensor_to_pil
from .label_errors import KINDS, LabelError

GIVEN, SUGGESTED = (230, 30, 30), (40, 200, 90)
CROP = 280  # pixels of a picture
CONTEXT = 2.0  # side of a crop, relative to the longest side of its boxes
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222 }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(17.5rem, 1fr)); gap: 1.2rem }
figure { margin: 0 } img { max-width: 100%; background: #eee } figcaption { font-size: .9em }
.given { color: #c81e1e } .suggested { color: #14803c }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd } }
"""


def as_records(errors: Sequence[LabelError], dataset: Any) -> list[dict[str, Any]]:
    """The suspicions with names and the ids of the source, for JSON."""
    names = id2label(dataset)
    light = dataset.remove_columns("image")
    records = []
    for error in errors:
        row = light[error.image]
        given = None if error.annotation is None else row["objects"]
        records.append(
            {
                "kind": error.kind,
                "suspicion": round(error.suspicion, 4),
                "file_name": row["file_name"],
                "image_id": source_id(row),
                "annotation_id": given["id"][error.annotation] if given else None,
                "label": None if error.label is None else names[error.label],
                "bbox": given["bbox"][error.annotation] if given else None,
                "suggested_label": None if error.suggested_label is None else names[error.suggested_label],
                "suggested_bbox": error.suggested_box,
            }
        )
    return records


def write_label_errors_page(errors: Sequence[LabelError], dataset: Any, file: Path, *, max_pictures: int = 200) -> Path:
    """An HTML page of the highest suspicions as crops, with annotated boxes in red and predicted ones in green."""
    records = as_records(errors[:max_pictures], dataset)
    figures = []
    for error, record in zip(errors, records, strict=False):
        picture = BytesIO()
        _crop(dataset[error.image]["image"], record).save(picture, "JPEG", quality=85)
        encoded = base64.b64encode(picture.getvalue()).decode()
        given = f'<span class="given">{html.escape(record["label"])}</span>' if record["label"] else ""
        suggested = record["suggested_label"] or ("delete" if record["label"] else "")
        figures.append(
            f'<figure><img alt="{html.escape(error.kind)}" src="data:image/jpeg;base64,{encoded}"><figcaption>'
            f"<b>{error.kind}</b> {error.suspicion:.2f}: {given} "
            f'<span class="suggested">{html.escape(suggested)}</span><br>{html.escape(record["file_name"])}'
            "</figcaption></figure>"
        )
    counts = Counter(error.kind for error in errors)
    listed = "".join(f"<li><b>{kind}</b>, {text}: {counts[kind]}</li>" for kind, text in KINDS.items())
    first = f", the highest {len(figures)} are shown" if len(errors) > len(figures) else ""
    with atomic_write(file) as out:
        out.write(
            '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>Suspected annotation errors</title><style>{STYLE}</style><h1>Suspected annotation errors</h1>"
            f"<p>{len(errors)} in {len(dataset)} images{first}. Annotations are red, predictions green.</p>"
            f'<ul>{listed}</ul><div class="grid">{"".join(figures)}</div></html>'
        )
    return file


def write_label_studio(errors: Sequence[LabelError], dataset: Any, file: Path, *, root: str = "") -> Path:
    """Tasks for Label Studio, one per affected image, with the corrected boxes as a prediction whose `score` is the
    highest suspicion of the image; see [`label_studio_task`].

    Args:
        root: prefix of the file names, such as `/data/local-files/?d=images/`.
    """
    names, light = id2label(dataset), dataset.remove_columns("image")
    tasks = []
    for image, of_image in _by_image(errors).items():
        row = light[image]
        boxes = [(names[label], box) for label, box in corrected(row["objects"], of_image)]
        score = max(error.suspicion for error in of_image)
        tasks.append(label_studio_task(root + row["file_name"], (row["width"], row["height"]), boxes, score=score))
    with atomic_write(file) as out:
        json.dump(tasks, out, indent=1)
    return file


def write_coco_suggestions(errors: Sequence[LabelError], dataset: Any, file: Path) -> Path:
    """The affected images with corrected boxes as COCO annotations, see [`coco_pre_annotations`]. Masks and crowds are
    not written."""
    light = dataset.remove_columns("image")
    images = []
    for image, of_image in _by_image(errors).items():
        row = light[image]
        objects = [{"label": label, "bbox": box} for label, box in corrected(row["objects"], of_image)]
        images.append((row["file_name"], (row["width"], row["height"]), objects))
    with atomic_write(file) as out:
        json.dump(coco_pre_annotations(id2label(dataset), images), out)
    return file


def corrected(
    objects: Mapping[str, Sequence[Any]], errors: Sequence[LabelError]
) -> list[tuple[int, tuple[float, float, float, float]]]:
    """Class ids and boxes (xywh in pixels) of one image with all suggestions applied; crowds are excluded."""
    concerned = {error.annotation: error for error in errors if error.annotation is not None}
    result: list[tuple[int, tuple[float, float, float, float]]] = []
    for index, (box, label, crowd) in enumerate(
        zip(objects["bbox"], objects["category"], objects["iscrowd"], strict=True)
    ):
        error = concerned.get(index)
        if crowd or (error is not None and error.suggested_label is None):
            continue
        if error is None or error.suggested_label is None or error.suggested_box is None:
            result.append((label, tuple(box)))
        else:
            moved = error.suggested_box if error.kind == "misplaced" else tuple(box)
            result.append((error.suggested_label, moved))
    for error in errors:
        if error.annotation is None and error.suggested_label is not None and error.suggested_box is not None:
            result.append((error.suggested_label, error.suggested_box))
    return result


def _by_image(errors: Sequence[LabelError]) -> dict[int, list[LabelError]]:
    """The image with the strongest suspicion first."""
    grouped: dict[int, list[LabelError]] = {}
    for error in errors:
        grouped.setdefault(error.image, []).append(error)
    return grouped


def _crop(image: Image.Image, record: Mapping[str, Any]) -> Image.Image:
    """The surroundings of the boxes, enlarged, with the boxes."""
    boxes = [record["bbox"], record["suggested_bbox"]]
    corners = [(x, y, x + w, y + h) for x, y, w, h in (box for box in boxes if box)]
    left, top, right, bottom = (f(c[i] for c in corners) for i, f in ((0, min), (1, min), (2, max), (3, max)))
    side = max(CONTEXT * max(right - left, bottom - top), 32.0)
    x, y = (left + right - side) / 2, (top + bottom - side) / 2
    window = max(0, x), max(0, y), min(image.width, x + side), min(image.height, y + side)
    scale = CROP / max(window[2] - window[0], window[3] - window[1])
    size = [max(1, round((window[i + 2] - window[i]) * scale)) for i in (0, 1)]
    picture = tensor_to_pil(to_image_tensor(image)).resize((size[0], size[1]), box=window)  # of any mode
    drawn = []
    for box, label, colour in (
        (boxes[0], record["label"], GIVEN),
        (boxes[1], record["suggested_label"], SUGGESTED),
    ):
        if box:
            x_min, y_min, w, h = box
            placed = [(x_min - window[0]) * scale, (y_min - window[1]) * scale, w * scale, h * scale]
            drawn.append(([placed[0], placed[1], placed[0] + placed[2], placed[1] + placed[3]], label, colour))
    return draw_boxes(picture, [d[0] for d in drawn], [d[1] for d in drawn], [d[2] for d in drawn], 2)
