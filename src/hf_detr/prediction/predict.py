"""Detection on batches of images, while the next batches are being read."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import torch
from torch import Tensor

from ..model.image_io import Image, open_image
from ..model.post_processing import to_host
from .drawings import file_as_text
from .pipeline import DetrDetectionPipeline
from .segments import SegmentOptions
from .size_batches import run_ahead, size_sorted_batches
from .tiles import Tiling, merge_views


@dataclass
class LoadedImage:
    """An image that is ready for the model, or the reason why it could not be read.

    Attributes:
        file: path relative to the image folder, as text.
        size: (width, height) in pixels.
        inputs: output of the pipeline's `preprocess`.
        pixels: (3, height, width) RGB, if tiles will be cut from it.
        picture: the image as RGB, if requested.
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
    """Detections in an image.

    Attributes:
        image_id, file, size, picture, error: see `LoadedImage`.
        scores: (N,).
        label_ids: (N,) class ids.
        boxes: (N, 4) xyxy in pixels of the image, clipped to it.
        segments: masks by kind, see [`~hf_detr.prediction.segments.SegmentOptions`].
    """

    image_id: int
    file: str
    size: tuple[int, int] | None
    picture: PIL.Image.Image | None
    error: str | None
    scores: Tensor
    label_ids: Tensor
    boxes: Tensor
    segments: dict[str, Any] = field(default_factory=dict)

    def objects(self, id2label: dict[int, str]) -> list[dict[str, Any]]:
        """In the format of `pipeline("object-detection")`."""
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
    """Read images in batches, some batches ahead of the consumer. Batches contain images that the processor resizes to
    the same size, so the order differs from the table's; see
    [`~hf_detr.prediction.size_batches.size_sorted_batches`].

    Args:
        detector: preprocesses the images.
        image_folder: paths are relative to it.
        images: `image_id` and `path`, see `PredictionJob.pending`.
        batch_size: images per batch, including unreadable ones.
        num_workers: threads that read; at most `num_workers + 1` batches are waiting. 0 reads each batch on demand.
        pictures: keep the RGB images.
        tiles: keep the pixels for cutting tiles. The batch size is 1 then, because such images are large.
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
    file = file_as_text(path)
    full_path = image_folder / os.fsdecode(path)
    try:
        if full_path.is_dir():
            raise PermissionError("this folder cannot be listed")
        return load_image(detector, image_id, file, open_image(full_path), picture=picture, tiles=tiles)
    except Exception as error:
        return LoadedImage(image_id, file, error=reason_of(error))


def reason_of(error: Exception) -> str:
    """Why an image cannot be read, in words; decoders raise errors of any kind on damaged files."""
    described = isinstance(error, (ValueError, OSError)) and str(error)
    return str(error) if described else f"{type(error).__name__}: {error}"


def load_image(
    detector: DetrDetectionPipeline,
    image_id: int,
    file: str,
    image: Image,
    *,
    picture: bool = False,
    tiles: bool = False,
) -> LoadedImage:
    """Preprocess any image for `predict_batch`.

    Args:
        detector: preprocesses the image.
        image_id, file: identify the image in the results.
        picture: keep the RGB image.
        tiles: keep the pixels for cutting tiles.

    Raises:
        ValueError, TypeError: not a usable image.
    """
    pixels = detector.image_processor.to_tensor(image)
    inputs = detector.preprocess(pixels)
    height, width = pixels.shape[-2:]
    if picture:
        from ..visualization.draw import tensor_to_pil  # which the package does not load

    rgb = tensor_to_pil(pixels) if picture else None
    return LoadedImage(image_id, file, (width, height), inputs, pixels if tiles else None, rgb)


def predict_batch(
    detector: DetrDetectionPipeline,
    batch: Sequence[LoadedImage],
    threshold: float | str,
    tiling: Tiling | None = None,
    batch_size: int = 1,
    segments: SegmentOptions | None = None,
    top_k: int | None = None,
) -> list[Prediction]:
    """Detections in each image of a batch, equal to those of the pipeline with `round_boxes=False`, in its order.

    Args:
        threshold: see `DetrImageProcessor.post_process_object_detection`.
        tiling: also detect in tiles of each image, and merge the results; see [`~hf_detr.prediction.Tiling`].
        batch_size: tiles per forward pass.
        segments: also compute masks, of a model that has them; not with `tiling`, which merges boxes.
        top_k: the most detections per image or tile; see `DetrImageProcessor.post_process_object_detection`.

    Raises:
        ValueError: `tiling` and `segments` are both given, or `tiling` and an image was loaded without `tiles=True`.
    """
    if tiling is not None and segments is not None:
        raise ValueError("Tiles are merged as boxes: predict with `tiling` or with `segments`.")
    readable = [image.inputs for image in batch if image.inputs is not None]
    results = iter(_detect(detector, readable, threshold, segments, top_k) if readable else [])
    nothing: dict[str, Any] = {"scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
    nothing |= {"boxes": torch.zeros(0, 4), "segments": {}}
    predictions = []
    for image in batch:
        result = nothing if image.inputs is None else next(results)
        if tiling is not None and image.inputs is not None:
            result = _detect_in_tiles(detector, image, result, threshold, tiling, batch_size, top_k)
        found = (result.get(name, {}) for name in ("scores", "labels", "boxes", "segments"))
        predictions.append(Prediction(image.image_id, image.file, image.size, image.picture, image.error, *found))
    return predictions


def _detect(
    detector: DetrDetectionPipeline,
    inputs: Sequence[dict[str, Any]],
    threshold: float | str,
    segments: SegmentOptions | None = None,
    top_k: int | None = None,
) -> list[dict[str, Any]]:
    """`scores`, `labels` and `boxes` (in pixels) per image, on the CPU, and with `segments` these."""
    processor = detector.image_processor
    gathered = {key: [given[key][0] for given in inputs] for key in ("pixel_values", "target_size")}
    with detector.device_placement(), detector.get_inference_context()():
        outputs, sizes = detector._predict(
            detector._ensure_tensor_on_device(gathered, device=detector.device),
            masks_above=1.0 if segments is None else segments.lowest(processor),
        )
    results: list[dict[str, Any]] = processor.post_process_object_detection(to_host(outputs), threshold, sizes, top_k)
    if segments is not None:
        for result, of_image in zip(results, segments.of(processor, outputs, sizes), strict=True):
            result["segments"] = of_image
    return results


def _detect_in_tiles(
    detector: DetrDetectionPipeline,
    image: LoadedImage,
    full_view: dict[str, Tensor],
    threshold: float | str,
    tiling: Tiling,
    batch_size: int,
    top_k: int | None,
) -> dict[str, Tensor]:
    """Tiles are cut and preprocessed batch by batch, because all tiles of a large image may not fit into memory."""
    if image.size is None or image.pixels is None:
        raise ValueError(f"{image.file} was loaded without its pixels. Pass tiles=True to load_batches.")
    width, height = image.size
    tiles = tiling.tiles(width, height)
    results = [full_view]
    for start in range(0, len(tiles), batch_size):
        parts = (
            image.pixels[:, top:bottom, left:right] for left, top, right, bottom in tiles[start : start + batch_size]
        )
        results += _detect(detector, [detector.preprocess(part) for part in parts], threshold, None, top_k)
    return merge_views([(0, 0, width, height), *tiles], results) if tiles else full_view
