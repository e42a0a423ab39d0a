"""Images into a model, batch by batch, while further ones are being read."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import torch
from torch import Tensor

from ..model.image_io import Image, open_image, to_rgb_tensor
from .pipeline import DetrDetectionPipeline
from .size_batches import run_ahead, size_sorted_batches
from .tiles import Tiling, merge_views


@dataclass
class LoadedImage:
    """An image on its way to the model, or why there is none.

    Attributes:
        file: relative to the folder of images, as text.
        size: (width, height) in pixels.
        inputs: what the pipeline's `preprocess` gives.
        pixels: (3, height, width) RGB, if tiles are to be cut from it.
        picture: the image as RGB, if it was asked for.
        error: why it could not be read; `size`, `inputs`, `pixels` and `picture` are None then.
    """

    image_id: int
    file: str
    size: tuple[int, int] | None = None
    inputs: dict[str, Any] | None = None
    pixels: Tensor | None = None
    picture: PIL.Image.Image | None = None
    error: str | None = None


@dataclass
class Prediction:
    """What was found in an image.

    Attributes:
        image_id, file, size, picture, error: see `LoadedImage`.
        scores: (N,); label_ids: (N,) class ids; boxes: (N, 4) xyxy in pixels of the image, within it.
    """

    image_id: int
    file: str
    size: tuple[int, int] | None
    picture: PIL.Image.Image | None
    error: str | None
    scores: Tensor
    label_ids: Tensor
    boxes: Tensor

    def objects(self, id2label: dict[int, str]) -> list[dict[str, Any]]:
        """As `pipeline("object-detection")` gives them."""
        rows = zip(self.scores.tolist(), self.label_ids.tolist(), self.boxes.tolist(), strict=True)
        return [
            {"score": s, "label": id2label[i], "box": dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))}
            for s, i, box in rows
        ]


def load_batches(
    detector: DetrDetectionPipeline,
    image_folder: Path,
    images: pa.Table,
    *,
    batch_size: int,
    num_workers: int = 1,
    pictures: bool = False,
    tiles: bool = False,
) -> Iterator[list[LoadedImage]]:
    """Read images, some batches ahead of the one that is being used. Images that the processor brings to one size come
    together, so not in the order of the table; see [`~hf_detr.prediction.size_batches.size_sorted_batches`].

    Args:
        detector: prepares the images.
        image_folder: paths are relative to it.
        images: `image_id` and `path`, as `PredictionJob.pending` gives them.
        batch_size: images at a time; those that cannot be read are among them.
        num_workers: threads that read. As many batches, and one, wait at most. 0 reads when a batch is asked for.
        pictures: keep the images themselves as well.
        tiles: keep their pixels as well, from which tiles are cut. Images then come one by one: they are large.
    """

    def load(rows: list[dict[str, Any]]) -> list[LoadedImage]:
        return [_read(detector, image_folder, row["image_id"], row["path"], pictures, tiles) for row in rows]

    batches = size_sorted_batches(
        detector.image_processor, image_folder, images, 1 if tiles else batch_size, num_workers
    )
    return run_ahead(load, batches, num_workers)


def _read(
    detector: DetrDetectionPipeline, image_folder: Path, image_id: int, path: bytes, picture: bool, tiles: bool
) -> LoadedImage:
    file = path.decode("utf-8", "backslashreplace")  # Parquet and JSON hold text only
    whole = image_folder / os.fsdecode(path)
    try:
        if whole.is_dir():
            raise PermissionError("a folder that may not be listed")
        return load_image(detector, image_id, file, open_image(whole), picture=picture, tiles=tiles)
    except Exception as error:
        # of any kind: on damaged files, decoders fail with whatever the bytes lead them to
        known = isinstance(error, (ValueError, OSError)) and str(error)
        return LoadedImage(image_id, file, error=str(error) if known else f"{type(error).__name__}: {error}")


def load_image(
    detector: DetrDetectionPipeline,
    image_id: int,
    file: str,
    image: Image,
    *,
    picture: bool = False,
    tiles: bool = False,
) -> LoadedImage:
    """Any image as `load_batches` gives it.

    Args:
        detector: prepares it.
        image_id, file: to know it by.
        picture: keep the image itself as well.
        tiles: keep its pixels as well, from which tiles are cut.

    Raises:
        ValueError, TypeError: it is none that can be used.
    """
    pixels = to_rgb_tensor(image)
    inputs = detector.preprocess(pixels)
    height, width = pixels.shape[-2:]
    shown = _to_picture(pixels) if picture else None
    return LoadedImage(image_id, file, (width, height), inputs, pixels if tiles else None, shown)


def _to_picture(pixels: Tensor) -> PIL.Image.Image:
    """As the model sees it: Pillow itself cannot turn all modes into RGB."""
    if pixels.is_floating_point():
        pixels = (pixels * 255).round().to(torch.uint8)
    return PIL.Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def predict_batch(
    detector: DetrDetectionPipeline,
    batch: Sequence[LoadedImage],
    threshold: float | str,
    tiling: Tiling | None = None,
    batch_size: int = 1,
) -> list[Prediction]:
    """What the detector finds in each image of a batch: what the pipeline gives with `round_boxes=False`, in its order.

    Args:
        threshold: see `DetrImageProcessor.post_process_object_detection`.
        tiling: look at each image in tiles as well, and merge what is found; see [`~hf_detr.prediction.Tiling`].
        batch_size: tiles at a time.
    """
    readable = [image.inputs for image in batch if image.inputs is not None]
    results = iter(_detect(detector, readable, threshold) if readable else [])
    nothing = {"scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    predictions = []
    for image in batch:
        result = nothing if image.inputs is None else next(results)
        if tiling is not None and image.inputs is not None:
            result = _detect_in_tiles(detector, image, result, threshold, tiling, batch_size)
        found = (result[name] for name in ("scores", "labels", "boxes"))
        predictions.append(Prediction(image.image_id, image.file, image.size, image.picture, image.error, *found))
    return predictions


def _detect(
    detector: DetrDetectionPipeline, inputs: Sequence[dict[str, Any]], threshold: float | str
) -> list[dict[str, Tensor]]:
    """`scores`, `labels` and `boxes` in pixels of each image, on the CPU. Nothing is fetched from the device but one
    tensor, and the sizes of images where they differ."""
    gathered = {key: [given[key][0] for given in inputs] for key in ("pixel_values", "target_size")}
    with detector.device_placement(), detector.get_inference_context()():
        outputs = detector._forward(detector._ensure_tensor_on_device(gathered, device=detector.device))
    return detector.image_processor.post_process_object_detection(outputs, threshold, gathered["target_size"])


def _detect_in_tiles(
    detector: DetrDetectionPipeline,
    image: LoadedImage,
    whole: dict[str, Tensor],
    threshold: float | str,
    tiling: Tiling,
    batch_size: int,
) -> dict[str, Tensor]:
    """Tiles are cut and prepared when it is their turn: those of a large image would not fit into memory at once."""
    if image.size is None or image.pixels is None:
        raise ValueError(f"{image.file} was loaded without its pixels. Give tiles=True to load_batches.")
    width, height = image.size
    tiles = tiling.tiles(width, height)
    results = [whole]
    for start in range(0, len(tiles), batch_size):
        parts = (
            image.pixels[:, top:bottom, left:right] for left, top, right, bottom in tiles[start : start + batch_size]
        )
        results += _detect(detector, [detector.preprocess(part) for part in parts], threshold)
    return merge_views([(0, 0, width, height), *tiles], results) if tiles else whole
