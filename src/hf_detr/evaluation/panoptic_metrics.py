"""Panoptic quality (Kirillov et al. 2019, arXiv 1801.00868) over records, computed by hotcoco by the rule of
panopticapi."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..model.annotations import canonical_id, is_ignored
from ..runtime.extras import import_extra
from .coco_metrics import NOTHING, Record, check_sizes, class_names, engine_numbers, id_order, mask_area

QUALITIES = {
    "PQ": "panoptic quality: SQ x RQ, averaged over classes",
    "SQ": "segmentation quality: mean IoU of the segments that were found",
    "RQ": "recognition quality: F1 of finding segments with an IoU above 0.5",
}
GROUPS = {"": "All", "_things": "Things", "_stuff": "Stuff"}  # suffixes of the names, and hotcoco's groups


def panoptic_metrics(
    images: Iterable[Record],
    annotations: Sequence[Record],
    segments: Sequence[Record],
    id2label: Mapping[int, str],
    stuff_labels: Iterable[str] = (),
) -> dict[str, Any]:
    """Panoptic quality by the rule of panopticapi: a predicted segment is found if its IoU with a segment of its class
    is above 0.5, whatever its score. Pixels without a segment in the annotations are unknown: they do not count for
    IoU, and a segment more than half of which lies on them, or on a crowd of its class, is not wrong.

    Args:
        images: records with `id`, `width` and `height` in pixels.
        annotations: records with `image_id`, `category_id` (a class id 0 ... N-1), `segmentation` (`size`, height and
            width, and `counts` of a COCO run-length encoding) and optionally `iscrowd`.
        segments: the predictions, records with `image_id`, `category_id` and `segmentation`.
        id2label: class id to name.
        stuff_labels: names of the classes that are stuff; all others are things.

    Returns:
        `PQ`, `SQ` and `RQ`, also with `_things` and `_stuff` after the name, in [0, 1] (-1 where there is nothing to
        measure), and `per_class`: class name to its `PQ`, `SQ`, `RQ` and the numbers of segments `tp`, `fp` and `fn`.

    Raises:
        ImportError: hotcoco is not installed; the message names the extra that installs it.
        ValueError: a record is invalid, or segments of an image overlap; the message names the record or image.
    """
    engine = import_extra("hotcoco", "evaluation")
    images = list(images)
    numbers, classes = engine_numbers(images, id2label)
    check_sizes(images, annotations, segments)
    stuff = set(stuff_labels)
    head = {
        "images": [
            {"id": numbers[canonical_id(image["id"])], "width": image["width"], "height": image["height"]}
            for image in images
        ],
        "categories": [
            {"id": number, "name": str(number), "isthing": int(id2label[i] not in stuff)}
            for i, number in zip(sorted(id2label, key=id_order), classes.values(), strict=True)
        ],
    }
    ground_truth, predicted = (
        head | {"annotations": _segments(kind, records, numbers, classes)}
        for kind, records in (("Annotation", annotations), ("Segment", segments))
    )
    run = engine.panoptic.PanopticEval(ground_truth, predicted)
    run.evaluate()
    results = run.results()
    found = {
        f"{name}{suffix}": float(results[group][name.lower()]) for suffix, group in GROUPS.items() for name in QUALITIES
    }
    per_class = {
        label: {name: float(result[name.lower()]) for name in QUALITIES}
        | {name: int(result[name]) for name in ("tp", "fp", "fn")}
        for label, result in zip(
            class_names(id2label), (results["per_class"][number] for number in classes.values()), strict=True
        )
    }
    return {**found, "per_class": per_class}


def _segments(
    kind: str, records: Sequence[Record], numbers: Mapping[Any, int], classes: Mapping[Any, int]
) -> list[dict[str, Any]]:
    """The records as hotcoco takes them."""
    result: list[dict[str, Any]] = []
    for index, record in enumerate(records):
        number = numbers.get(canonical_id(record["image_id"]))
        class_number = classes.get(canonical_id(record["category_id"]))
        if number is None:
            raise ValueError(f"{kind} {index} is of image {record['image_id']}, which is not among the images.")
        if class_number is None:
            raise ValueError(
                f"{kind} {index} (image {record['image_id']}) has class {record['category_id']}, but the classes are "
                f"{min(classes, key=id_order)} to {max(classes, key=id_order)}."
            )
        area = mask_area(record)
        if not area:
            continue  # a segment without pixels is none
        result.append({
            "id": len(result) + 1, "image_id": number, "category_id": class_number, "area": area,
            "segmentation": dict(record["segmentation"]), "iscrowd": int(is_ignored(record)),
        })  # fmt: skip
    refuse_overlaps(kind, records)
    return result


def refuse_overlaps(kind: str, records: Sequence[Record]) -> None:
    """Raises ValueError if masks of one image overlap; the message names the image.

    Args:
        kind: of the records, for the message.
    """
    merge = import_extra("hotcoco", "evaluation").mask.merge
    by_image: dict[Any, list[Record]] = {}
    for record in records:
        by_image.setdefault(canonical_id(record["image_id"]), []).append(record)
    for own in by_image.values():
        total = sum(map(mask_area, own))
        union = mask_area({"segmentation": merge([record["segmentation"] for record in own])})
        if total > union:
            raise ValueError(
                f"{kind}s of image {own[0]['image_id']} overlap by {total - union:.0f} pixels. In a panoptic "
                "segmentation each pixel belongs to one segment at most."
            )


def format_panoptic(metrics: Mapping[str, Any]) -> str:
    """PQ, SQ and RQ of all classes, things and stuff, and of each class, as a table to print, in percent."""
    rows = {group: [metrics[f"{name}{suffix}"] for name in QUALITIES] for suffix, group in GROUPS.items()}
    rows |= {f"  {label}": [result[name] for name in QUALITIES] for label, result in metrics["per_class"].items()}
    width = max(map(len, rows))
    lines = [f"{'':{width}} {''.join(f'{name:>8}' for name in QUALITIES)}"]
    lines += [f"{label:{width}} {''.join(_percent(value) for value in values)}" for label, values in rows.items()]
    return "\n".join([*lines, "", *(f"{name}: {text}" for name, text in QUALITIES.items())])


def _percent(value: float) -> str:
    return f"{'–':>8}" if value == NOTHING else f"{100 * value:8.2f}"
