"""Boxes on images."""

import colorsys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

from ..data.schema import category_ids, id2label, source_id

if TYPE_CHECKING:
    from datasets import Dataset


CORNERS = ("xmin", "ymin", "xmax", "ymax")  # of a box, in the result of a pipeline
Rectangle = tuple[float, float, float, float]  # left, top, right, bottom


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
    """A copy of the image with boxes (x_min, y_min, x_max, y_max in its pixels) and captions above them, or at another
    edge where they would leave the image or cover an earlier caption. torchvision's `draw_bounding_boxes` neither does
    that nor scales captions with the image.

    Args:
        captions, colours: per box; boxes beyond their number get no caption, and the colours of class 0, 1, ...
        width: of the lines in pixels; default: 1/400 of the longest side.
    """
    image = image.convert("RGB")
    draw = ImageDraw.Draw(image)
    width = width or max(1, round(max(image.size) / 400))
    font = ImageFont.load_default(size=max(10, round(max(image.size) / 50)))
    taken: list[Rectangle] = []
    for index, box in enumerate(boxes):
        colour = colours[index] if index < len(colours) else class_colour(index)
        left, top, right, bottom = (float(value) for value in box)
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=width)
        if index < len(captions) and captions[index]:
            text = draw.textbbox((0, 0), captions[index], font=font)
            place = _place_caption((left, top, right, bottom), (text[2] + 4, text[3] + 3), image.size, taken)
            taken.append(place)
            draw.rectangle(place, fill=colour)
            draw.text((place[0] + 2, place[1]), captions[index], fill="black", font=font)
    return image


def _place_caption(
    box: Rectangle, text: tuple[float, float], image: tuple[int, int], taken: Sequence[Rectangle]
) -> Rectangle:
    """Where a caption of this (width, height) goes: above its box, within it at the top, below, within at the bottom,
    or at the right; the first that is in the image and covers no other, or else the one that covers the fewest."""
    left, top, right, bottom = box
    width, height = text
    furthest = max(0.0, image[0] - width)
    columns = [max(0.0, min(x, furthest)) for x in (left, right - width)]
    rows = [y for y in (top - height, top, bottom, bottom - height) if 0 <= y <= image[1] - height] or [0.0]
    places = [(x, y, x + width, y + height) for x in columns for y in rows]
    return min(places, key=lambda place: sum(_overlap(place, other) for other in taken))


def _overlap(one: Rectangle, other: Rectangle) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def draw_detections(
    image: Image.Image,
    detections: Iterable[Mapping[str, Any]],
    label2id: Mapping[str, int] | None = None,
    *,
    min_side: int = 0,
) -> Image.Image:
    """A copy of the image with the result of `pipeline("object-detection")`, in one colour per class.

    Args:
        label2id: of the model, which gives each class the same colour in all pictures; None: colours in order of first
            appearance.
        min_side: minimum length of the longest side in pixels. A smaller image is enlarged before drawing, so that
            captions cover less of it.
    """
    detections = list(detections)
    scale = max(1.0, min_side / max(image.size))
    image = image.resize([round(side * scale) for side in image.size]) if scale > 1 else image
    ids = dict(label2id or {})
    for detection in detections:
        ids.setdefault(detection["label"], len(ids))
    return draw_boxes(
        image,
        [[d["box"][key] * scale for key in CORNERS] for d in detections],
        [f"{d['label']} {d['score']:.2f}" for d in detections],
        [class_colour(ids[d["label"]]) for d in detections],
    )


def tensor_to_pil(pixels: Tensor) -> Image.Image:
    """What `DetrImageProcessor.to_tensor` makes of an image, (C, H, W), as RGB; Pillow cannot convert all modes. Of
    other numbers of channels than 3, the first one is shown. Floats are in [0, 1]."""
    if pixels.is_floating_point():
        pixels = (pixels * 255).round().clamp(0, 255).to(torch.uint8)
    if len(pixels) != 3:
        pixels = pixels[:1].expand(3, -1, -1)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


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
