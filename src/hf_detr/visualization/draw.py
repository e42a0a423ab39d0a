"""Boxes on images."""

import colorsys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from ..data.schema import category_ids, id2label

if TYPE_CHECKING:
    from datasets import Dataset


def class_colour(index: int) -> tuple[int, int, int]:
    """A colour for a class: hues a golden ratio apart, so that neighbours differ."""
    red, green, blue = colorsys.hsv_to_rgb((0.12 + index * 0.618034) % 1.0, 0.85, 1.0)
    return int(red * 255), int(green * 255), int(blue * 255)


def draw_boxes(
    image: Image.Image,
    boxes: Iterable[Sequence[float]],
    captions: Sequence[str] = (),
    colours: Sequence[tuple[int, int, int]] = (),
    width: int | None = None,
) -> Image.Image:
    """A copy of the image with boxes (x_min, y_min, x_max, y_max in its pixels) and captions above or in them."""
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
    """A copy of the image with what `pipeline("object-detection")` found in it, one colour a class."""
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
    """Images side by side, each scaled to fit a cell of this many pixels."""
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * cell, rows * cell), "white")
    for index, image in enumerate(images):
        scale = (cell - 8) / max(image.size)
        small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
        x, y = index % columns * cell, index // columns * cell
        sheet.paste(small, (x + (cell - small.width) // 2, y + (cell - small.height) // 2))
    return sheet


def compare_with_truth(
    dataset: "Dataset", detections: Iterable[Mapping[str, Any]], *, num_images: int = 16, threshold: float = 0.5
) -> Image.Image:
    """Images of a data set with the true boxes in white and the predicted ones in the colours of their classes.

    Args:
        dataset: with the columns of `hf_detr.data.schema`.
        detections: COCO results (`image_id`, `category_id`, `bbox`, `score`); those above `threshold` are drawn.
        num_images: images shown, spread evenly over those of the data set that have objects.
    """
    found: dict[int, list[Mapping[str, Any]]] = {}
    for detection in detections:
        if detection["score"] > threshold:
            found.setdefault(detection["image_id"], []).append(detection)
    class_of = {category_id: class_id for class_id, category_id in category_ids(dataset).items()}
    names = id2label(dataset)
    with_objects = [i for i, objects in enumerate(dataset.select_columns("objects")) if objects["objects"]["bbox"]]
    shown = with_objects[:: max(1, len(with_objects) // num_images)][:num_images]
    pictures = []
    for row in (dataset[index] for index in shown):
        image, truth = row["image"], row["objects"]["bbox"]
        scale = 312 / max(image.size)  # enlarged first, so that small images get fine lines
        picture = image.resize((round(image.width * scale), round(image.height * scale)))
        picture = draw_boxes(picture, [_corners(box, scale) for box in truth], (), [(255, 255, 255)] * len(truth), 3)
        predicted = found.get(row["image_id"], [])
        classes = [class_of[detection["category_id"]] for detection in predicted]
        pictures.append(
            draw_boxes(
                picture,
                [_corners(detection["bbox"], scale) for detection in predicted],
                [f"{names[i]} {detection['score']:.2f}" for i, detection in zip(classes, predicted, strict=True)],
                [class_colour(class_id) for class_id in classes],
                1,
            )
        )
    return contact_sheet(pictures)


def _corners(box: Sequence[float], scale: float) -> list[float]:
    x, y, width, height = box
    return [x * scale, y * scale, (x + width) * scale, (y + height) * scale]
