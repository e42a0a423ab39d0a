"""Masks on images, with a legend."""

import colorsys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..data.mask_results import result_masks
from ..data.masks import decode_masks, resize_masks
from ..data.schema import category_ids, id2label
from .draw import class_colour, contact_sheet, rows_with_results

if TYPE_CHECKING:
    from datasets import Dataset

Colour = tuple[int, int, int]
MIN_FONT, MAX_FONT = 11, 28  # pixels


def draw_masks(
    image: Image.Image,
    segmentation: NDArray[Any] | Tensor,
    segments_info: Sequence[Mapping[str, Any]],
    id2label: Mapping[int, str],
    *,
    opacity: float = 0.5,
    legend: bool = True,
) -> Image.Image:
    """A copy of the image with the masks of objects or segments laid over it, with outlines, and below it a legend of
    their classes. A class always has the same colour; several objects of it differ in brightness.

    Args:
        image: any PIL image.
        segmentation: (H, W), a map of the segments' ids (-1, and 0 unless it is an id, are no segment), or (N, H, W),
            one mask per segment, drawn in ascending order of their scores. H and W are those of the image.
        segments_info: one dict per segment with `id` (of a map), `label_id` and optionally `score`, as
            `post_process_panoptic_segmentation` and `post_process_instance_segmentation` return them.
        id2label: class names by class id.
        opacity: of the masks, 0 to 1; outlines are opaque.
        legend: names of the classes, with the number of segments where there are several, and their scores.

    Raises:
        ValueError: sizes, numbers or ids do not fit; the message names them.
    """
    canvas = np.asarray(image.convert("RGB")).astype(np.float32)
    masks = result_masks(segmentation, segments_info, "The image", (image.height, image.width))
    order = sorted(range(len(masks)), key=lambda i: segments_info[i].get("score", 1.0))
    colours = segment_shades([int(segment["label_id"]) for segment in segments_info])
    thickness = max(1, round(max(image.size) / 400))
    for index in order:
        mask = masks[index]
        canvas[mask] += opacity * (np.array(colours[index], dtype=np.float32) - canvas[mask])
    for index in order:
        canvas[_outline(masks[index], thickness)] = colours[index]
    drawn = Image.fromarray(canvas.round().astype(np.uint8))
    return _with_legend(drawn, segments_info, id2label) if legend and segments_info else drawn


def compare_masks_with_ground_truth(
    dataset: "Dataset", results: Iterable[Mapping[str, Any]], *, num_images: int = 8, threshold: float = 0.5
) -> Image.Image:
    """Pairs of pictures: an image of a data set with its masks, and with the predicted ones.

    Args:
        dataset: with the columns of `hf_detr.data.schema`, and masks.
        results: COCO results with the source's ids (`image_id`, `category_id`, `segmentation`, a run-length encoding,
            and `score`); those above `threshold` are drawn.
        num_images: number of images, spread evenly over those of the data set that have objects.
    """
    class_of = {category_id: class_id for class_id, category_id in category_ids(dataset).items()}
    names = id2label(dataset)
    pictures = []
    for row, predicted in rows_with_results(dataset, results, num_images, threshold):
        scale = 312 / max(row["image"].size)  # enlarged before drawing, so that outlines are thin
        size = max(1, round(row["height"] * scale)), max(1, round(row["width"] * scale))
        image = row["image"].resize((size[1], size[0]))
        counts = [result["segmentation"]["counts"] for result in predicted]
        labels = [class_of[result["category_id"]] for result in predicted]
        for encoded, of_class in ((row["objects"]["mask"], row["objects"]["category"]), (counts, labels)):
            masks = resize_masks(decode_masks(encoded, (row["height"], row["width"])), size)
            pictures.append(draw_masks(image, masks, [{"label_id": i} for i in of_class], names, legend=False))
    return contact_sheet(pictures)


def segment_shades(labels: Sequence[int]) -> list[Colour]:
    """The colour of each segment: that of its class for the first one, and brighter or darker for others."""
    seen: dict[int, int] = {}
    shades = []
    for label in labels:
        number = seen.get(label, 0)
        seen[label] = number + 1
        hue, saturation, _ = colorsys.rgb_to_hsv(*(value / 255 for value in class_colour(label)))
        # 0, 1, 2, ...: as it is, dark, pale, less dark, less pale, and again
        value, fading = ((1.0, 1.0), (0.6, 1.0), (1.0, 0.5), (0.8, 1.0), (1.0, 0.75))[number % 5]
        red, green, blue = colorsys.hsv_to_rgb(hue, saturation * fading, value)
        shades.append((round(red * 255), round(green * 255), round(blue * 255)))
    return shades


def _outline(mask: NDArray[np.bool_], thickness: int) -> NDArray[np.bool_]:
    """The pixels of a mask within `thickness` of its edge; the edge of the image is none."""
    inner = mask
    for _ in range(thickness):
        padded = np.pad(inner, 1, mode="edge")
        inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def _with_legend(image: Image.Image, segments: Sequence[Mapping[str, Any]], id2label: Mapping[int, str]) -> Image.Image:
    """The image with a white panel below it: a patch of its colour and a text for each class, most frequent first."""
    by_class: dict[int, list[Mapping[str, Any]]] = {}
    for segment in segments:
        by_class.setdefault(int(segment["label_id"]), []).append(segment)
    entries = [
        (_caption(id2label.get(label, f"class {label}"), by_class[label]), class_colour(label))
        for label in sorted(by_class, key=lambda label: (-len(by_class[label]), label))
    ]
    size = min(MAX_FONT, max(MIN_FONT, round(image.width / 40)))
    font = ImageFont.load_default(size=size)
    gap, patch = size // 2 + 2, size
    places, width, height = _flow([patch + gap + round(font.getlength(text)) for text, _ in entries], image.width, size)
    panel = Image.new("RGB", (max(image.width, width), image.height + height), "white")
    panel.paste(image, (0, 0))
    draw = ImageDraw.Draw(panel)
    for (text, colour), (x, y) in zip(entries, places, strict=True):
        top = image.height + y
        draw.rectangle((x, top, x + patch - 1, top + patch - 1), fill=colour, outline="black")
        draw.text((x + patch + gap, top + patch / 2), text, fill="black", font=font, anchor="lm")
    return panel


def _caption(name: str, segments: Sequence[Mapping[str, Any]]) -> str:
    number = f" ({len(segments)})" if len(segments) > 1 else ""
    scores = sorted({f"{segment['score']:.2f}" for segment in segments if segment.get("score") is not None})
    return f"{name}{number}" + (f" {' to '.join(dict.fromkeys((scores[0], scores[-1])))}" if scores else "")


def _flow(lengths: Sequence[int], width: int, size: int) -> tuple[list[tuple[int, int]], int, int]:
    """Entries of these lengths in rows, as many in a row as fit into `width`: their places, and width and height of the
    panel. An entry that is longer than a row makes the panel wider."""
    gap = size // 2 + 2
    places, x, y, widest = [], gap, gap, 0
    for length in lengths:
        if x > gap and x + length + gap > width:
            x, y = gap, y + size + gap
        places.append((x, y))
        x += length + 2 * gap
        widest = max(widest, x - gap)
    return places, widest, y + size + gap
