"""Predictions, attention and downloads for one image."""

import json
import math
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from PIL import Image
from torchvision.ops import box_iou
from transformers.utils import ModelOutput

from ..data.labelling_tools import coco_pre_annotations, label_studio_task
from ..interop import load_model
from ..model.image_processing_hf_detr import HfDetrImageProcessor
from ..model.segmentation import DetrForSegmentation
from ..runtime.files import atomic_write
from ..visualization.attention_maps import AttentionMaps, attention_maps, predict_image, ranked_detections, read_image
from ..visualization.draw import CORNERS, class_colour, draw_detections, tensor_to_pil
from ..visualization.explain import Explanation, explain
from ..visualization.masks_drawing import draw_masks

MIN_SCORE = 0.05  # detections below it are never shown
MAX_THRESHOLD = 0.99
MIN_SIDE = 640  # pixels of the longest side of a shown picture
TABLE = ("class", "score", "x min", "y min", "width", "height")


@dataclass
class Viewed:
    """The predictions for one image.

    Args:
        file: of the image.
        name: its original file name.
        picture: RGB, at its own size, EXIF orientation applied.
        detections: all with a score above `MIN_SCORE`, see [`~hf_detr.visualization.attention_maps.AttentionMaps`].
        masks: `logits`, `pred_boxes`, `pred_masks` and `mask_sizes` of the model, on the CPU; None without masks.
        seconds: of the forward pass.
        maps: attention, once it was asked for.
    """

    file: Path
    name: str
    picture: Image.Image
    detections: list[dict[str, Any]]
    masks: Any
    seconds: float
    maps: AttentionMaps | None = field(default=None, repr=False)

    @property
    def scale(self) -> float:
        """Pixels of the shown picture per pixel of the image."""
        return max(1.0, MIN_SIDE / max(self.picture.size))

    def above(self, threshold: float) -> list[dict[str, Any]]:
        """Detections with a score above the threshold, the most confident first."""
        return [detection for detection in self.detections if detection["score"] > threshold]

    def rows(self, threshold: float) -> list[list[Any]]:
        """The detections as rows of a table with the columns of `TABLE`, in pixels."""
        return [
            [d["label"], round(d["score"], 3), *(round(value, 1) for value in box_of(d))] for d in self.above(threshold)
        ]

    def at(self, x: float, y: float, threshold: float) -> int | None:
        """Index of the smallest detected box that contains a point of the image in pixels; None if none does."""
        around = [
            (box_of(d)[2] * box_of(d)[3], index)
            for index, d in enumerate(self.above(threshold))
            if d["box"]["xmin"] <= x <= d["box"]["xmax"] and d["box"]["ymin"] <= y <= d["box"]["ymax"]
        ]
        return min(around)[1] if around else None


def box_of(detection: dict[str, Any]) -> tuple[float, float, float, float]:
    """x_min, y_min, width and height of a detection, in pixels."""
    left, top, right, bottom = (detection["box"][key] for key in CORNERS)
    return left, top, right - left, bottom - top


class Viewer:
    """A checkpoint and its predictions. Thread-safe; one thread predicts at a time.

    Args:
        source: of the checkpoint, a folder or a Hub id.
        device: None: a GPU if there is one.

    Raises:
        OSError, ValueError: there is no such checkpoint, or it cannot be loaded.
    """

    def __init__(self, source: str, device: str | None = None) -> None:
        self.source = source
        self.model = load_model(source).eval()
        self.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.processor = HfDetrImageProcessor.from_pretrained(source)
        self.has_masks = isinstance(self.model, DetrForSegmentation)
        self.one_at_a_time = Lock()

    @property
    def names(self) -> dict[int, str]:
        """Class names by class id."""
        return dict(self.model.config.id2label)

    @property
    def names_to_correct(self) -> dict[int, str]:
        """Classes of objects, by class id: without stuff, and without names that several classes have, such as the
        "N/A" of COCO's checkpoints, which no data set can have."""
        counts, stuff = Counter(self.names.values()), self.model.config.stuff_label_ids
        return {index: name for index, name in self.names.items() if counts[name] == 1 and index not in stuff}

    @property
    def colours(self) -> dict[str, tuple[int, int, int]]:
        """RGB colour of each class in all pictures."""
        return {name: class_colour(index) for index, name in self.names.items()}

    def describe(self) -> str:
        """Model, parameters and device in a line."""
        millions = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
        device = torch.cuda.get_device_name() if self.model.device.type == "cuda" else str(self.model.device)
        what = "boxes and masks" if self.has_masks else "boxes"
        return f"{self.source}: {what} of {len(self.names)} classes, {millions:.1f} million parameters, on {device}"

    def view(self, file: Path, name: str | None = None) -> Viewed:
        """The predictions for an image file.

        Raises:
            ValueError: it cannot be read as an image.
        """
        try:
            pixels, pixel_values = read_image(file, self.processor)
        except ValueError as error:
            raise ValueError(str(error).replace(str(file), name or file.name)) from error
        options = {"masks_above": MIN_SCORE} if self.has_masks else {}
        with self.one_at_a_time:
            started = time.perf_counter()
            outputs = predict_image(self.model, pixel_values, **options)
            outputs.logits.cpu()  # waits for the device
            seconds = time.perf_counter() - started
        size = pixels.shape[-2], pixels.shape[-1]
        found = ranked_detections(self.model, outputs, size, MIN_SCORE)
        masks = None
        if self.has_masks:
            kept = ("logits", "pred_boxes", "pred_masks", "mask_sizes")
            masks = ModelOutput({name: outputs[name].cpu() for name in kept if outputs.get(name) is not None})
        return Viewed(file, name or file.name, tensor_to_pil(pixels), found, masks, seconds)

    def draw(self, viewed: Viewed, threshold: float) -> Image.Image:
        """The image with the detections above the threshold; a small one is enlarged to `MIN_SIDE`."""
        picture, label2id = viewed.picture, {name: index for index, name in reversed(self.names.items())}
        if viewed.masks is not None:
            [objects] = self.processor.post_process_instance_segmentation(
                viewed.masks, threshold=threshold, target_sizes=[picture.size[::-1]]
            )
            picture = draw_masks(
                picture, objects["segmentation"], objects["segments_info"], self.names, opacity=0.4, legend=False
            )
        return draw_detections(picture, viewed.above(threshold), label2id, min_side=MIN_SIDE)

    def attention(self, viewed: Viewed) -> AttentionMaps:
        """The attention maps of the image. Attention weights take another implementation of attention, whose scores
        differ in the last digits, so detections may come in another order.

        Raises:
            ValueError: the file is no longer there.
        """
        if viewed.maps is None:
            if not viewed.file.is_file():
                raise ValueError(gone(viewed.name))
            with self.one_at_a_time:
                viewed.maps = attention_maps(self.model, viewed.file, self.processor, threshold=MIN_SCORE / 2)
        return viewed.maps

    def attention_of(self, viewed: Viewed, index: int) -> Image.Image:
        """Where the query of a detection attends, in each head."""
        maps = self.attention(viewed)
        heads = maps.cross_attention.shape[1]
        return maps.draw_heads(self._same(viewed, index), columns=math.ceil(math.sqrt(heads)))

    def _same(self, viewed: Viewed, index: int) -> int:
        """The index of a detection among those of [`attention`]: the same class and the largest IoU, and of several
        such the same query. With proposals, two queries of nearly equal scores may have changed places."""
        wanted, found = viewed.detections[index], self.attention(viewed).detections
        boxes = torch.tensor([[d["box"][key] for key in CORNERS] for d in (wanted, *found)])
        overlaps = box_iou(boxes[:1], boxes[1:])[0].nan_to_num(0.0).tolist()  # NaN: two boxes without area

        def likeness(number: int) -> tuple[bool, float, bool]:
            other = found[number]
            return other["label"] == wanted["label"], overlaps[number], other["query"] == wanted["query"]

        return max(range(len(found)), key=likeness)

    def test(self, viewed: Viewed, index: int) -> Explanation:
        """The deletion and insertion test of a detection."""
        same = self._same(viewed, index)
        with self.one_at_a_time:
            return explain(self.model, viewed.file, self.processor, same, threshold=MIN_SCORE / 2, progress=False)

    def save_coco(self, viewed: Viewed, threshold: float, file: Path) -> Path:
        """The detections as COCO annotations with a `score`, which CVAT imports as "COCO 1.0"."""
        ids = {name: index for index, name in reversed(self.names.items())}
        objects = [
            {"label": ids[d["label"]], "bbox": _rounded(d), "score": round(d["score"], 4)}
            for d in viewed.above(threshold)
        ]
        with atomic_write(file) as out:
            json.dump(coco_pre_annotations(self.names, [(viewed.name, viewed.picture.size, objects)]), out, indent=1)
        return file

    def save_label_studio(self, viewed: Viewed, threshold: float, file: Path) -> Path:
        """The detections as a task for Label Studio."""
        found = viewed.above(threshold)
        boxes = [(detection["label"], _rounded(detection)) for detection in found]
        score = max((detection["score"] for detection in found), default=None)
        with atomic_write(file) as out:
            json.dump([label_studio_task(viewed.name, viewed.picture.size, boxes, score=score)], out, indent=1)
        return file


def gone(name: str) -> str:
    """What is said of a file that was deleted."""
    return f"{name} is no longer here; open it again."


def _rounded(detection: dict[str, Any]) -> list[float]:
    return [round(value, 2) for value in box_of(detection)]
