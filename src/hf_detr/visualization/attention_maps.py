"""What a model looked at: the attention of each detection over the image, and of any point to all others (figures 3 and
6 of the paper)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..model.image_processing_hf_detr import DetrImageProcessor
from ..model.modeling_hf_detr import DetrForDetection
from ..model.post_processing import best_detections
from ..model.segmentation import DetrForSegmentation
from ..runtime.modes import evaluation_mode
from .draw import CORNERS, class_colour, contact_sheet, draw_boxes, tensor_to_pil
from .heat import draw_heat

CELL = 320  # pixels of a picture in a sheet
MAX_PICTURES = 24


@dataclass(frozen=True)
class AttentionMaps:
    """Attention weights of one layer for one image, from [`attention_maps`]. (h, w) is the feature map, which covers
    the whole image; h x w weights sum to 1.

    Args:
        image: RGB, at its own size.
        detections: as of `pipeline("object-detection")`, with `query`, the number of the object query, the most
            confident first. Corners of boxes are not rounded.
        label2id: of the model.
        cross_attention: (N, heads, h, w), from the query of each of N detections to the image.
        self_attention: (heads, h * w, h, w), from each location of the encoder to all others.
    """

    image: Image.Image
    detections: list[dict[str, Any]]
    label2id: dict[str, int]
    cross_attention: Tensor
    self_attention: Tensor

    def of_detection(self, index: int, head: int | None = None) -> Tensor:
        """(h, w), the cross-attention of a detection in one head, or their mean."""
        maps = self.cross_attention[index]
        return maps.mean(0) if head is None else maps[head]

    def from_point(self, x: float, y: float, head: int | None = None) -> Tensor:
        """(h, w), the encoder's self-attention from the location at pixel (x, y) of `image` to all others.

        Raises:
            ValueError: the point is outside of the image.
        """
        width, height = self.image.size
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(f"The point ({x:g}, {y:g}) is outside of the image, {width} x {height} pixels.")
        rows, columns = self.self_attention.shape[-2:]
        maps = self.self_attention[:, int(y / height * rows) * columns + int(x / width * columns)]
        return maps.mean(0) if head is None else maps[head]

    def draw(self, columns: int = 4) -> Image.Image:
        """A sheet: the detections, then the cross-attention of each, the mean of all heads; at most 24 of them."""
        captions = [f"{d['label']} {d['score']:.2f}" for d in self.detections]
        everything = draw_boxes(self._enlarged(), self._boxes(), captions, self._colours())
        maps = [self._heat_of(index, None) for index in range(min(len(self.detections), MAX_PICTURES))]
        return contact_sheet([everything, *maps], columns, CELL)

    def draw_heads(self, index: int, columns: int = 4) -> Image.Image:
        """A sheet with the cross-attention of one detection, a picture per head."""
        return contact_sheet(
            [self._heat_of(index, head) for head in range(self.cross_attention.shape[1])], columns, CELL
        )

    def draw_points(self, points: Sequence[tuple[float, float]], columns: int = 4) -> Image.Image:
        """A sheet with the encoder's self-attention from these pixels (x, y) of `image`, each marked by a ring."""
        pictures = []
        for x, y in points:
            picture = draw_heat(self._enlarged(), self.from_point(x, y))
            draw, scale = ImageDraw.Draw(picture), self._scale()
            left, top, radius = x * scale, y * scale, 6
            for grown, colour in ((1, "black"), (0, "white")):
                r = radius + grown
                draw.ellipse((left - r, top - r, left + r, top + r), outline=colour, width=2)
            pictures.append(picture)
        return contact_sheet(pictures, columns, CELL)

    def _heat_of(self, index: int, head: int | None) -> Image.Image:
        detection = self.detections[index]
        caption = detection["label"] if head is None else f"{detection['label']}, head {head}"
        picture = draw_heat(self._enlarged(), self.of_detection(index, head))
        return draw_boxes(picture, [self._boxes()[index]], [caption], [self._colours()[index]])

    def _scale(self) -> float:
        return (CELL - 8) / max(self.image.size)

    def _enlarged(self) -> Image.Image:
        """As large as in a sheet, so that lines and captions have their size there."""
        return self.image.resize([max(1, round(side * self._scale())) for side in self.image.size])

    def _boxes(self) -> list[list[float]]:
        return [[d["box"][k] * self._scale() for k in CORNERS] for d in self.detections]

    def _colours(self) -> list[tuple[int, int, int]]:
        return [class_colour(self.label2id[detection["label"]]) for detection in self.detections]


@torch.no_grad()
def attention_maps(
    model: DetrForDetection,
    image: Any,
    processor: DetrImageProcessor,
    *,
    threshold: float = 0.5,
    layer: int = -1,
) -> AttentionMaps:
    """The attention weights of a model for one image. The attention implementation and the mode of the model do not
    change.

    Args:
        model: any [`DetrForDetection`] or [`DetrForSegmentation`], with any kind of queries.
        image: anything the processor reads: a path, a URL, a PIL image, an array.
        threshold: detections with a higher score are returned.
        layer: index of the encoder layer and of the decoder layer, from 0; -1 is the last, as in the paper's figures.

    Raises:
        ValueError: there is no such layer, or the model returns no attention weights.
    """
    pixels, pixel_values = read_image(image, processor)
    height, width = pixels.shape[-2:]
    outputs = predict_image(model, pixel_values, output_attentions=True)
    plain: Any = getattr(model, "module", model)
    if not outputs.cross_attentions or outputs.cross_attentions[0] is None:
        raise ValueError("The model returned no attention weights. Pass the original model, not a compiled one.")
    for name, attentions in (("encoder", outputs.encoder_attentions), ("decoder", outputs.cross_attentions)):
        if not -len(attentions) <= layer < len(attentions):
            raise ValueError(
                f"The {name} has {len(attentions)} layers, there is no layer {layer}. They are numbered from 0; -1 is "
                "the last."
            )
    size = outputs.feature_mask.shape[-2:]
    detections = ranked_detections(plain, outputs, (height, width), threshold)
    queries = [detection["query"] for detection in detections]
    return AttentionMaps(
        tensor_to_pil(pixels),
        detections,
        {name: index for index, name in reversed(plain.config.id2label.items())},
        outputs.cross_attentions[layer][0].transpose(0, 1)[queries].float().cpu().unflatten(-1, size),
        outputs.encoder_attentions[layer][0].float().cpu().unflatten(-1, size),
    )


def read_image(image: Any, processor: DetrImageProcessor) -> tuple[Tensor, Tensor]:
    """An image at its own size, (C, H, W), and as a model takes it, (1, C, H, W), without padding."""
    pixels = processor.to_tensor(image)
    inputs = processor(pixels, do_pad=False, input_data_format="channels_first", return_tensors="pt")
    return pixels, inputs["pixel_values"][0][None]


@torch.no_grad()
def predict_image(model: Any, pixel_values: Tensor, **options: Any) -> Any:
    """A model's outputs for images of one size, in evaluation mode, which is undone. No masks are computed unless
    `masks_above` is among the options.

    Raises:
        ValueError: it is no model of this package, but for example an export.
    """
    plain = getattr(model, "module", model)
    if not isinstance(plain, DetrForDetection):
        raise ValueError(f"This needs a DetrForDetection, not {type(plain).__name__}. Exports do not return attention.")
    if isinstance(plain, DetrForSegmentation):
        options = {"masks_above": 1.0} | options
    with evaluation_mode(plain):
        return plain(pixel_values.to(plain.device, plain.dtype), **options)


def ranked_detections(
    model: DetrForDetection, outputs: Any, size: tuple[int, int], threshold: float
) -> list[dict[str, Any]]:
    """The detections of one image of this (height, width), see [`AttentionMaps`]."""
    height, width = size
    found = best_detections(outputs)
    boxes = (found.boxes[0] * found.boxes.new_tensor([width, height, width, height])).tolist()
    labels, queries, scores = (values[0].tolist() for values in (found.labels, found.queries, found.scores))
    kept = sorted((n for n, score in enumerate(scores) if score > threshold), key=lambda n: -scores[n])
    return [
        {
            "score": scores[number],
            "label": model.config.id2label[labels[number]],
            "box": dict(zip(CORNERS, boxes[number], strict=True)),
            "query": queries[number],
        }
        for number in kept
    ]
