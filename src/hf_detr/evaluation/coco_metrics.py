"""COCO average precision and recall over records, computed by hotcoco, which equals pycocotools to the last bit."""

import contextlib
import gc
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model.annotations import canonical_id, is_ignored
from ..runtime.extras import import_extra

DESCRIPTIONS = {
    "AP": "average precision, IoU 0.50:0.95",
    "AP50": "average precision, IoU 0.50",
    "AP75": "average precision, IoU 0.75",
    "APs": "average precision, small objects (area < 32²)",
    "APm": "average precision, medium objects",
    "APl": "average precision, large objects (area > 96²)",
    "AR1": "average recall, at most 1 detection per image and class",
    "AR10": "average recall, at most 10 detections per image and class",
    "AR100": "average recall, at most 100 detections per image and class",
    "ARs": "average recall, small objects",
    "ARm": "average recall, medium objects",
    "ARl": "average recall, large objects",
}
METRICS = tuple(DESCRIPTIONS)
NOTHING = -1.0  # COCO's mark for a number that has nothing to measure
MANY_CLASSES, FEW_CLASSES = 100, 20  # from how many on a table of classes shows only so many of the best and worst
MAX_DETECTIONS = 100  # per image and class, by score; COCO's
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}  # areas, both ends included, as in COCO
Record = Mapping[str, Any]
Floats = NDArray[np.float64]


def coco_metrics(
    images: Iterable[Record],
    annotations: Sequence[Record],
    detections: Sequence[Record],
    id2label: Mapping[int, str],
    *,
    max_detections: int = MAX_DETECTIONS,
    masks: bool = False,
) -> dict[str, Any]:
    """COCO's twelve numbers.

    Args:
        images: records with an `id`. Every image counts, also one without objects or detections. Ids may be numbers of
            any size or text; `"1"`, `1` and `1.0` are one id.
        annotations: records with `image_id`, `category_id` (a class id 0 ... N-1), `bbox` [x_min, y_min, width,
            height] in pixels, and optionally `area` in square pixels (default: width x height), `iscrowd` and `ignore`.
        detections: records with `image_id`, `category_id`, `bbox` and `score`.
        id2label: class id to name.
        max_detections: the detections with the highest scores that count per image and class. AR1, AR10 and AR100
            count at most the number in their name.
        masks: the overlap is that of masks: all records need a `segmentation` with `size` (height, width) and `counts`,
            a COCO run-length encoding, and no `bbox`; areas default to the number of pixels.

    Returns:
        the numbers by the names in `METRICS`, in [0, 1] (-1 where there is nothing to measure), and `per_class`: class
        name to AP. Names that several classes share are followed by the class id.

    Raises:
        ImportError: hotcoco is not installed; the message names the extra that installs it.
        ValueError: a record is invalid; the message names the record and the reason.
    """
    return coco_details(images, annotations, detections, id2label, max_detections=max_detections, masks=masks)[
        "metrics"
    ]


def coco_details(
    images: Iterable[Record],
    annotations: Sequence[Record],
    detections: Sequence[Record],
    id2label: Mapping[int, str],
    *,
    max_detections: int = MAX_DETECTIONS,
    masks: bool = False,
) -> dict[str, Any]:
    """The twelve numbers with what is behind them. Arguments and errors as in `coco_metrics`.

    Returns:
        `metrics`: the result of `coco_metrics`.
        `by_size`: for small, medium and large objects the number of `objects` (without crowds), `AP`, `AP50`, `AP75`,
        `AR100` and `per_class` AP. An object of exactly 32² or 96² pixels counts for both sizes, as in COCO.
        `precision_recall`: for IoU "0.5" and "0.75" the 101 values of `recall` and `precision`: class name to the 101
        interpolated precisions, without classes that have no objects.
    """
    max_counts = sorted({min(limit, max_detections) for limit in (1, 10, 100)} | {max_detections})
    engine = _run_engine(images, annotations, detections, id2label, max_counts, masks)
    names = class_names(id2label)
    precision = engine.eval["precision"][..., -1]  # (10 IoUs, 101 recalls, classes, all and 3 sizes)
    recalls = engine.eval["recall"]  # (10 IoUs, classes, all and 3 sizes, max_counts)
    recall = recalls[..., -1]

    def per_class(size: int) -> dict[str, float]:
        return {name: _mean(precision[:, :, k, size]) for k, name in enumerate(names)}

    at_most = {limit: recalls[:, :, :, max_counts.index(min(limit, max_detections))] for limit in (1, 10, 100)}
    every = precision[..., 0]
    values = [every, every[0], every[5], *(precision[..., size] for size in (1, 2, 3))]
    values += [*(at_most[limit][..., 0] for limit in (1, 10, 100)), *(recall[..., size] for size in (1, 2, 3))]
    metrics: dict[str, Any] = {name: _mean(value) for name, value in zip(METRICS, values, strict=True)}
    areas = np.array([_area(record, masks) for record in annotations if not is_ignored(record)])
    return {
        "metrics": metrics | {"per_class": per_class(0)},
        "by_size": {
            size: {
                "objects": int(((areas >= low) & (areas <= high)).sum()),
                "AP": _mean(precision[..., number]),
                "AP50": _mean(precision[0, ..., number]),
                "AP75": _mean(precision[5, ..., number]),
                "AR100": _mean(at_most[100][..., number]),
                "per_class": per_class(number),
            }
            for number, (size, (low, high)) in enumerate(SIZES.items(), start=1)
        },
        "precision_recall": {
            iou: {
                "recall": np.linspace(0.0, 1.0, 101).tolist(),
                "precision": {name: row.tolist() for name, row in zip(names, curves, strict=True) if row[0] > -1},
            }
            for iou, curves in (("0.5", every[0].T), ("0.75", every[5].T))
        },
    }


def class_names(id2label: Mapping[int, str]) -> list[str]:
    """The names in the order of their class ids; names that several classes share are followed by the id."""
    count = Counter(id2label.values())
    return [id2label[i] if count[id2label[i]] == 1 else f"{id2label[i]} ({i})" for i in sorted(id2label, key=id_order)]


def id_order(value: Any) -> tuple[bool, Any]:
    """Sort key of ids: numbers ascending, then text. Where scores are equal, COCO's numbers depend on this order."""
    value = canonical_id(value)
    return isinstance(value, str), value


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Suspends garbage collection, which takes half of the time while hundreds of thousands of records are made."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _run_engine(
    images: Iterable[Record],
    annotations: Sequence[Record],
    detections: Sequence[Record],
    id2label: Mapping[int, str],
    max_counts: list[int],
    masks: bool,
) -> Any:
    """A `hotcoco.COCOeval` with its results."""
    engine = import_extra("hotcoco", "evaluation")
    images = list(images)
    numbers, classes = engine_numbers(images, id2label)
    objects = _columns("Annotation", annotations, numbers, classes, masks)
    found = _columns("Detection", detections, numbers, classes, masks)
    if masks:
        check_sizes(images, annotations, detections)

    ground_truth = engine.COCO.from_arrays(
        [{"id": number} for number in numbers.values()],
        [{"id": number, "name": str(number)} for number in classes.values()],
        objects[:, 0].astype(np.int64),
        objects[:, 6].astype(np.int64),
        objects[:, 1:5],
        area=np.array([_area(record, masks) for record in annotations], dtype=np.float64),
        iscrowd=np.array([is_ignored(record) for record in annotations], dtype=bool),
        **({"segmentation": [dict(record["segmentation"]) for record in annotations]} if masks else {}),
    )
    if masks:
        predicted = ground_truth.load_res(found, segmentation=[dict(record["segmentation"]) for record in detections])
        areas = np.array([mask_area(record) for record in detections], dtype=np.float64)
        predicted.update_anns(ids=np.arange(1, len(areas) + 1), area=areas)  # not those of the boxes
    else:
        predicted = ground_truth.load_res(found)
    run = engine.COCOeval(ground_truth, predicted, "segm" if masks else "bbox")
    run.params.max_dets = max_counts
    run.evaluate()
    run.accumulate()
    return run


def engine_numbers(images: Iterable[Record], id2label: Mapping[int, str]) -> tuple[dict[Any, int], dict[Any, int]]:
    """Numbers from 1 of images and classes, by their ids, since the engine stores ids as float64, which represents
    integers exactly only up to 2^53.

    Raises:
        ValueError: there are no images or classes, or two images share an id.
    """
    count = Counter(canonical_id(image["id"]) for image in images)
    if not count or not id2label:
        raise ValueError("There is nothing to measure: no images, or no classes.")
    if (repeated := count.most_common(1)[0])[1] > 1:
        raise ValueError(f"{repeated[1]} images share one id, {repeated[0]!r}. Give each image an id of its own.")
    numbers = {image_id: number for number, image_id in enumerate(sorted(count, key=id_order), start=1)}
    classes = {canonical_id(i): number for number, i in enumerate(sorted(id2label, key=id_order), start=1)}
    return numbers, classes


def check_sizes(images: Iterable[Record], *groups: Sequence[Record]) -> None:
    """Raises ValueError if masks of one image have different sizes, or another one than the image, where that is
    known."""
    known = (image for image in images if "height" in image and "width" in image)
    sizes: dict[Any, tuple[int, ...]] = {canonical_id(im["id"]): (im["height"], im["width"]) for im in known}
    for record in (record for records in groups for record in records):
        size = tuple(record["segmentation"]["size"])
        first = sizes.setdefault(canonical_id(record["image_id"]), size)
        if size != first:
            raise ValueError(
                f"Image {record['image_id']} has {first[0]} x {first[1]} pixels (height x width), and a mask "
                f"{size[0]} x {size[1]}. Masks must be of the size of the image (target_sizes in post-processing)."
            )


def mask_area(record: Record) -> float:
    """The number of pixels of a record's mask."""
    return float(import_extra("hotcoco", "evaluation").mask.area(record["segmentation"]))


def _columns(
    kind: str, records: Sequence[Record], numbers: Mapping[Any, int], classes: Mapping[Any, int], masks: bool
) -> Floats:
    """(N, 7): image number, bbox (zeros for masks), score (0 for annotations), class number. Invalid records raise a
    ValueError."""
    rows = []
    for index, record in enumerate(records):
        number = numbers.get(canonical_id(record["image_id"]))
        class_number = classes.get(canonical_id(record["category_id"]))
        if number is None:
            raise ValueError(f"{kind} {index} is of image {record['image_id']}, which is not among the images.")
        if class_number is None:
            raise ValueError(
                f"{kind} {index} (image {record['image_id']}) has class {record['category_id']}, but the classes are "
                f"{min(classes, key=id_order)} to {max(classes, key=id_order)}. Give the data set the classes of the "
                "model (id2label)."
            )
        if masks and not isinstance(record.get("segmentation"), Mapping):
            raise ValueError(f"{kind} {index} (image {record['image_id']}) has no mask, which is what is measured.")
        rows.append((number, *((0, 0, 0, 0) if masks else record["bbox"]), record.get("score", 0.0), class_number))
    columns = np.array(rows, dtype=np.float64).reshape(-1, 7)
    invalid = np.flatnonzero(~np.isfinite(columns).all(axis=1))
    if len(invalid):
        record = records[invalid[0]]
        raise ValueError(
            f"{kind} {invalid[0]} (image {record['image_id']}) is not finite: bbox {record.get('bbox')}, score "
            f"{record.get('score', 'none')}."
        )
    return columns


def _area(record: Record, masks: bool) -> float:
    area = record.get("area")
    if area is None:
        return mask_area(record) if masks else float(record["bbox"][2] * record["bbox"][3])
    return float(area)


def _mean(values: Floats) -> float:
    """Mean of the values that exist; `NOTHING` marks those that do not."""
    values = values[values > NOTHING]
    return float(values.mean()) if values.size else NOTHING


def format_metrics(metrics: Mapping[str, Any]) -> str:
    """The twelve numbers and the AP of each class as a table to print; of over 100 classes the best and worst."""
    lines = [f"{name:6} {_number(metrics[name])}  {text}" for name, text in DESCRIPTIONS.items()]
    rows, title = list(metrics["per_class"].items()), "AP of each class"
    if len(rows) > MANY_CLASSES:
        rows = sorted((row for row in rows if row[1] != NOTHING), key=lambda row: -row[1])
        title = f"AP of the {FEW_CLASSES} best and the {FEW_CLASSES} worst of {len(rows)} classes with objects"
        rows = rows[:FEW_CLASSES] + rows[max(FEW_CLASSES, len(rows) - FEW_CLASSES) :]
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join([*lines, "", title, *(f"  {name:{width}} {_number(ap)}" for name, ap in rows)])


def _number(value: float) -> str:
    return f"{'–':>7}" if value == NOTHING else f"{value:7.4f}"
