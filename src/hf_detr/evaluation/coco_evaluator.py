"""COCO's numbers of a model over a data set, in one process or several."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor
from torchvision.ops import box_convert

from ..model.annotations import canonical_id
from ..model.post_processing import to_host
from .coco_metrics import MAX_DETECTIONS, METRICS, NOTHING, coco_metrics, no_garbage_collection

if TYPE_CHECKING:
    from ..data.schema import DetectionDataset
    from ..model.image_processing_hf_detr import DetrImageProcessor


class CocoEvaluator:
    """Collects detections batch by batch and computes COCO's numbers from them.

    It keeps three small arrays per image: boxes, labels and scores. It reads no images. Stuff does not count, as in
    COCO.

    Args:
        dataset: as returned by `hf_detr.data.load_detection_dataset`. Every image counts, also one without an `update`.

    Attributes:
        id2label: class id to name; `category_ids`: class id to the source's category id.
        stuff_labels: names of the classes that are stuff; `stuff_ids`: their class ids.
        images: records with `id`, `width`, `height`; `annotations`: records as `coco_metrics` takes them.
        ids_of_source: the ids of images in the source, by those.
    """

    place = "bbox"  # the field of detections that says where they are

    def __init__(self, dataset: "DetectionDataset", *, top_k: int | None = None) -> None:
        from ..data.schema import category_ids, id2label, source_id, stuff_labels

        self.top_k = top_k
        self.id2label = id2label(dataset)
        self.stuff_labels = stuff_labels(dataset)
        self.stuff_ids = {index for index, name in self.id2label.items() if name in self.stuff_labels}
        self.category_ids = category_ids(dataset)
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.ids_of_source: dict[int, Any] = {}
        columns = {"image_id", "source_id", "width", "height", "objects"} & set(dataset.features)
        for row in dataset.select_columns(sorted(columns)).with_format(None):
            self.ids_of_source[row["image_id"]] = source_id(row)
            self.images.append({"id": row["image_id"], "width": row["width"], "height": row["height"]})
            objects = row["objects"]
            self.annotations += [
                {"image_id": row["image_id"], "category_id": label, "bbox": box, "area": area, "iscrowd": crowd}
                for label, box, area, crowd in zip(
                    objects["category"], objects["bbox"], objects["area"], objects["iscrowd"], strict=True
                )
            ]
        self._image_ids = {canonical_id(image["id"]): image["id"] for image in self.images}
        # image id -> boxes xywh (N, 4) or what else `place` names, labels (N,), scores (N,)
        self._found: dict[Any, tuple[Any, Any, Any]] = {}

    def post_process(self, processor: "DetrImageProcessor", outputs: Any, sizes: Tensor) -> list[dict[str, Any]]:
        """A model's outputs to what `update` takes; `sizes` (B, 2) are the images' height and width in pixels."""
        return processor.post_process_object_detection(to_host(outputs), 0.0, sizes, self.top_k)

    def update(self, image_ids: Iterable[Any], results: Iterable[Mapping[str, Any]]) -> None:
        """Add the results of `post_process_object_detection` (boxes xyxy in pixels of the original image, threshold 0)
        for these images. An image seen twice counts once; several processes repeat images to fill the last batch.

        Raises:
            ValueError: an image is not in the data set.
        """
        for image_id, result in zip(image_ids, results, strict=True):
            key = canonical_id(image_id)
            if key not in self._image_ids:
                raise ValueError(f"Image {key} is not of the data set that is measured against.")
            self._found[key] = self._read(key, result)

    def _read(self, key: Any, result: Mapping[str, Any]) -> tuple[Any, Any, Any]:
        """What is kept of the result for an image."""
        return (
            box_convert(result["boxes"].detach().cpu().double(), "xyxy", "xywh").numpy(),
            result["labels"].cpu().numpy(),
            result["scores"].detach().double().cpu().numpy(),
        )

    def gather(self) -> None:
        """Exchange the detections of all processes, so that every process has all of them."""
        if dist.is_available() and dist.is_initialized():
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, self._found)
            self._found = {image_id: found for part in parts for image_id, found in part.items()}

    @no_garbage_collection()
    def predictions(self) -> list[dict[str, Any]]:
        """Detections as `coco_metrics` takes them: with class ids, in the order of the data set's images."""
        return [
            {"image_id": image_id, "category_id": label, self.place: place, "score": score}
            for key, image_id in self._image_ids.items()
            if key in self._found
            for place, label, score in zip(*(values.tolist() for values in self._found[key]), strict=True)
        ]

    def detections(self) -> list[dict[str, Any]]:
        """COCO results with the source's ids: `image_id`, `category_id`, `bbox` [x, y, width, height], `score`."""
        return [
            record
            | {
                "image_id": self.ids_of_source[record["image_id"]],
                "category_id": self.category_ids[record["category_id"]],
            }
            for record in self.predictions()
        ]

    def things(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[int, str]]:
        """Annotations, predictions and class names without stuff, as `coco_metrics` takes them."""
        names = {index: name for index, name in self.id2label.items() if index not in self.stuff_ids}
        annotations, predictions = (
            [record for record in records if record["category_id"] in names] if self.stuff_ids else records
            for records in (self.annotations, self.predictions())
        )
        return annotations, predictions, names

    def compute(self, max_detections: int = MAX_DETECTIONS) -> dict[str, Any]:
        """The result of `coco_metrics`, with its errors. Where all classes are stuff there is nothing to measure: all
        numbers are -1."""
        if self.stuff_ids >= set(self.id2label):
            return dict.fromkeys(METRICS, NOTHING) | {"per_class": {}}
        masks = self.place == "segmentation"
        return coco_metrics(self.images, *self.things(), max_detections=max_detections, masks=masks)
