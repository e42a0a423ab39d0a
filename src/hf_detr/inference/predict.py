"""Images into a model, batch by batch, while further ones are being read."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import PIL.Image
import pyarrow as pa
import torch
from torch import Tensor

from ..images import open_image, to_rgb_tensor
from ..pipeline_hf_detr import DetrDetectionPipeline

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class LoadedImage:
    """An image on its way to the model, or why there is none.

    Attributes:
        file: relative to the folder of images, as text.
        size: (width, height) in pixels.
        inputs: what the pipeline's `preprocess` gives.
        picture: the image as RGB, if it was asked for.
        error: why it could not be read; `size`, `inputs` and `picture` are None then.
    """

    image_id: int
    file: str
    size: tuple[int, int] | None = None
    inputs: dict[str, Any] | None = None
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
) -> Iterator[list[LoadedImage]]:
    """Read images in their order, some batches ahead of the one that is being used.

    Args:
        detector: prepares the images.
        image_folder: paths are relative to it.
        images: `image_id` and `path`, as `PredictionJob.pending` gives them.
        batch_size: images at a time; those that cannot be read are among them.
        num_workers: threads that read. As many batches, and one, wait at most. 0 reads when a batch is asked for.
        pictures: keep the images themselves as well.
    """

    def load(start: int) -> list[LoadedImage]:
        rows = images.slice(start, batch_size).to_pylist()
        return [_load(detector, image_folder, row["image_id"], row["path"], pictures) for row in rows]

    return run_ahead(load, range(0, len(images), batch_size), num_workers)


def run_ahead(function: Callable[[Item], Result], items: Iterable[Item], num_workers: int) -> Iterator[Result]:
    """`map` in threads; at most `num_workers + 1` results are made or wait."""
    if num_workers == 0:
        yield from map(function, items)
        return
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(num_workers)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _load(
    detector: DetrDetectionPipeline, image_folder: Path, image_id: int, path: bytes, pictures: bool
) -> LoadedImage:
    file = path.decode("utf-8", "backslashreplace")  # Parquet and JSON hold text only
    whole = image_folder / os.fsdecode(path)
    try:
        if whole.is_dir():
            raise PermissionError("a folder that may not be listed")
        image = open_image(whole)
        inputs = detector.preprocess(image)
        picture = _to_picture(image) if pictures else None
    except Exception as error:
        # of any kind: on damaged files, decoders fail with whatever the bytes lead them to
        known = isinstance(error, (ValueError, OSError)) and str(error)
        return LoadedImage(image_id, file, error=str(error) if known else f"{type(error).__name__}: {error}")
    height, width = inputs["target_size"][0]
    return LoadedImage(image_id, file, (width, height), inputs, picture)


def _to_picture(image: PIL.Image.Image) -> PIL.Image.Image:
    """As the model sees it: Pillow itself cannot turn all modes into RGB."""
    pixels = to_rgb_tensor(image)
    if pixels.is_floating_point():
        pixels = (pixels * 255).round().to(torch.uint8)
    return PIL.Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def predict_batch(
    detector: DetrDetectionPipeline, batch: Sequence[LoadedImage], threshold: float | str
) -> list[Prediction]:
    """What the detector finds in each image of a batch: what the pipeline gives with `round_boxes=False`, in its order.

    Args:
        threshold: see `DetrImageProcessor.post_process_object_detection`.
    """
    readable = [image.inputs for image in batch if image.inputs is not None]
    results: Iterator[dict[str, Tensor]] = iter(())
    if readable:
        keys = ("pixel_values", "target_size")
        outputs = detector.forward({key: [inputs[key][0] for inputs in readable] for key in keys})
        sizes = outputs["target_size"]
        results = iter(detector.image_processor.post_process_object_detection(outputs, threshold, sizes))
    nothing = {"scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    predictions = []
    for image in batch:
        result = nothing if image.inputs is None else next(results)
        found = (result[name] for name in ("scores", "labels", "boxes"))
        predictions.append(Prediction(image.image_id, image.file, image.size, image.picture, image.error, *found))
    return predictions
