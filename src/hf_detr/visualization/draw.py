"""Boxes on images."""

import colorsys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

from ..data.schema import category_ids, id2label, source_id

if TYPE_CHECKING:
    from datasets import Dataset


def class_colour(index: int) -> tuple[int, int, int]:
    """RGB colour of a class: hues a golden angle apart, so that consecutive classes differ."""
    red, green, blue = colorsys.hsv_to_rgb((0.12 + index * 0.618034) % 1.0, 0.85, 1.0)
    return int(red * 255), int(green * 255), int(blue * 255)


def draw_boxes(
    image: Image.Image,
    boxes: Iterable[Sequence[float]],
    captions: Sequence[str] = (),
    colours: Sequence[tuple[int, int, int]] = (),
    width: int | None = None,
) -> Image.Image:
    """A copy of the image with boxes (x_min, y_min, x_max, y_max in its pixels) and captions above them, or in them at
    the upper edge of the image. torchvision's `draw_bounding_boxes` neither keeps captions within the image nor scales
    them with it.

    Args:
        captions, colours: per box; boxes beyond their number get no caption, and the colours of class 0, 1, ...
        width: of the lines in pixels; default: 1/400 of the longest side.
    """
    image = image.convert("RGB")
    draw = ImageDraw.Draw(image)
    width = width or max(1, round(max(image.size) / 400))
    font = ImageFont.load_default(size=max(10, round(max(image.size) / 50)))
    for index, box in enumerate(boxes):
        colour = colours[index] if index < len(colours) else class_colour(index)
        left, top, right, bottom = (float(value) for value in box)
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=width)
        if index < len(captions) and captions[index]:
            text = draw.textbbox((0, 0), captions[index], font=font)
            text_width, text_height = text[2] + 4, text[3] + 3
            x = max(0.0, min(left, image.width - text_width))
            y = top - text_height if top >= text_height else top
            draw.rectangle((x, y, x + text_width, y + text_height), fill=colour)
            draw.text((x + 2, y), captions[index], fill="black", font=font)
    return image


def draw_detections(
    image: Image.Image, detections: Iterable[Mapping[str, Any]], label2id: Mapping[str, int] | None = None
) -> Image.Image:
    """A copy of the image with the result of `pipeline("object-detection")`, in one colour per class."""
    detections = list(detections)
    ids = dict(label2id or {})
    for detection in detections:
        ids.setdefault(detection["label"], len(ids))
    return draw_boxes(
        image,
        [[d["box"][key] for key in ("xmin", "ymin", "xmax", "ymax")] for d in detections],
        [f"{d['label']} {d['score']:.2f}" for d in detections],
        [class_colour(ids[d["label"]]) for d in detections],
    )


def contact_sheet(images: Sequence[Image.Image], columns: int = 4, cell: int = 320) -> Image.Image:
    """Images in a grid, each scaled to fit a cell of this many pixels; without images, one blank cell."""
    inner = (cell - 8, cell - 8)
    cells = [ImageOps.expand(ImageOps.pad(image.convert("RGB"), inner, color="white"), 4, "white") for image in images]
    tensors = torch.stack([pil_to_tensor(image) for image in cells or [Image.new("RGB", (cell, cell), "white")]])
    sheet: Image.Image = to_pil_image(make_grid(tensors, nrow=columns, padding=0, pad_value=255))
    return sheet


def compare_with_ground_truth(
    dataset: "Dataset", detections: Iterable[Mapping[str, Any]], *, num_images: int = 16, threshold: float = 0.5
) -> Image.Image:
    """Images of a data set with ground-truth boxes in white and predicted boxes in the colours of their classes.

    Args:
        dataset: with the columns of `hf_detr.data.schema`.
        detections: COCO results with the source's ids (`image_id`, `category_id`, `bbox`, `score`); those above
            `threshold` are drawn.
        num_images: number of images, spread evenly over those of the data set that have objects.
    """
    class_of = {category_id: class_id for class_id, category_id in category_ids(dataset).items()}
    names = id2label(dataset)
    images = []
    for row, predicted in rows_with_results(dataset, detections, num_images, threshold):
        image, objects = row["image"], row["objects"]["bbox"]
        scale = 312 / max(image.size)  # enlarged before drawing, so that lines on small images are thin
        image = image.resize([max(1, round(side * scale)) for side in image.size])
        image = draw_boxes(image, [_corners(box, scale) for box in objects], (), [(255, 255, 255)] * len(objects), 3)
        classes = [class_of[detection["category_id"]] for detection in predicted]
        boxes = [_corners(detection["bbox"], scale) for detection in predicted]
        captions = [f"{names[i]} {detection['score']:.2f}" for i, detection in zip(classes, predicted, strict=True)]
        images.append(draw_boxes(image, boxes, captions, [class_colour(i) for i in classes], 1))
    return contact_sheet(images)


def rows_with_results(
    dataset: "Dataset", results: Iterable[Mapping[str, Any]], num_images: int, threshold: float
) -> Iterator[tuple[dict[str, Any], list[Mapping[str, Any]]]]:
    """Rows that have objects, spread evenly over the data set, each with its COCO results above `threshold`."""
    found: dict[Any, list[Mapping[str, Any]]] = {}
    for result in results:
        if result["score"] > threshold:
            found.setdefault(result["image_id"], []).append(result)
    with_objects = [i for i, row in enumerate(dataset.select_columns("objects")) if row["objects"]["bbox"]]
    for index in with_objects[:: max(1, len(with_objects) // num_images)][:num_images]:
        row = dataset[index]
        yield row, found.get(source_id(row), [])


def _corners(box: Sequence[float], scale: float) -> list[float]:
    x, y, width, height = box
    return [x * scale, y * scale, (x + width) * scale, (y + height) * scale]
