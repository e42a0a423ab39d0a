"""An evaluation as a page, `report.html`, which needs no other file and no network, and its numbers, `report.json`."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from markupsafe import Markup

from ..model.annotations import canonical_id
from ..model.image_processing_hf_detr import HfDetrImageProcessor
from .charts import line_chart
from .coco_evaluator import CocoEvaluator
from .coco_metrics import DESCRIPTIONS, MAX_DETECTIONS, Record, class_names, coco_details
from .error_analysis import (
    above,
    best_thresholds,
    confusion_matrix,
    error_breakdown,
    f1_by_threshold,
    find_errors,
    worst_images,
)
from .panoptic_metrics import QUALITIES

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image

CONFIG = "preprocessor_config.json"
MAX_CLASSES = 24  # in the confusion matrix of the page
NOT_OF_BOXES = ("mask_", "panoptic_", *QUALITIES)  # beginnings of names in `ModelEvaluation.compute`
PICTURE_SIZE = 360  # longest side, in pixels
COLOURS = {"object": (255, 255, 255), "correct": (60, 200, 90), "wrong": (255, 70, 60), "missed": (255, 190, 0)}
ERROR_TEXTS = {
    "classification": "right box, wrong class",
    "localisation": "right class, IoU between 0.1 and 0.5",
    "both": "wrong class, and IoU between 0.1 and 0.5",
    "duplicate": "an object that a detection with a higher score found",
    "background": "no object, IoU below 0.1",
    "missed": "objects that no detection would find if corrected",
}


def write_report(
    folder: str | Path,
    evaluator: CocoEvaluator,
    dataset: "Dataset",
    title: str,
    *,
    max_detections: int = MAX_DETECTIONS,
    metrics: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `report.html` and `report.json` into a folder, which is created if necessary.

    Args:
        evaluator: after `evaluate_detection`; `dataset`: the data set of the evaluator, for the images.
        title: heading of the page.
        max_detections: as in `coco_metrics`; thresholds, confusions and errors count all detections.
        metrics: the result of [`ModelEvaluation.compute`], for its numbers of masks and segments.

    Returns:
        the numbers of `report.json`: `images`, `objects`, `detections`; `metrics`, `by_size` and `precision_recall`
        (see `coco_details`), `f1` (`f1_by_threshold`), `class_thresholds` (`best_thresholds`), and at these thresholds
        `confusion_matrix` (`labels` and `counts`), `errors` (`error_breakdown`, with `count_at_thresholds`) and
        `worst_images`. Of a model with masks also `masks`, of [`ModelEvaluation.compute`] what is not of boxes.
    """
    (annotations, detections, _), id2label = evaluator.things(), evaluator.id2label
    f1 = f1_by_threshold(annotations, detections, id2label)
    thresholds = best_thresholds(f1)
    confident = above(detections, thresholds)
    breakdown = error_breakdown(annotations, detections, id2label)
    at_thresholds = error_breakdown(annotations, confident, id2label)["errors"]
    for kind, row in breakdown["errors"].items():
        row["count_at_thresholds"] = at_thresholds[kind]["count"]
    numbers: dict[str, Any] = {
        "title": title,
        "images": len(evaluator.images),
        "objects": sum(not record["iscrowd"] for record in annotations),
        "detections": len(detections),
        **coco_details(evaluator.images, annotations, detections, id2label, max_detections=max_detections),
        "f1": f1,
        "class_thresholds": thresholds,
        "confusion_matrix": {
            "labels": [*class_names(id2label), "background"],
            "counts": confusion_matrix(annotations, detections, id2label, threshold=thresholds),
        },
        "errors": breakdown,
        "worst_images": worst_images(find_errors(annotations, confident)),
    }
    of_masks = {name: value for name, value in (metrics or {}).items() if name.startswith(NOT_OF_BOXES)}
    if of_masks:
        numbers["masks"] = of_masks
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    pictures = _pictures(dataset, id2label, annotations, confident, numbers["worst_images"])
    (folder / "report.html").write_text(_page(numbers, pictures), encoding="utf-8")
    return numbers


def save_class_thresholds(checkpoint: str | Path, thresholds: Sequence[float]) -> Path:
    """Store a threshold per class in a checkpoint's `preprocessor_config.json`, for `threshold="per_class"`. Nothing
    else in the file changes.

    Returns:
        path of the file.

    Raises:
        ValueError: the checkpoint is not a local folder with an image processor of hf_detr.
    """
    path = Path(checkpoint) / CONFIG
    if not path.is_file():
        raise ValueError(
            f"Thresholds are stored in the {CONFIG} of a local folder, and {checkpoint} has no such file. "
            "Download the checkpoint, or save model and processor there with save_pretrained."
        )
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("image_processor_type") != HfDetrImageProcessor.__name__:
        raise ValueError(
            f"{path} is of a {content.get('image_processor_type')}, which has no thresholds per class. Convert the "
            "checkpoint first: examples/convert.py."
        )
    content["class_thresholds"] = [float(value) for value in thresholds]
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path


# -- the page ------------------------------------------------------------------------------------------------------


def _page(numbers: Mapping[str, Any], pictures: Sequence[Mapping[str, Any]]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["number"] = lambda value: "–" if value is None or value == -1 else f"{value:.3f}"
    curves, best = numbers["precision_recall"], numbers["f1"]["best"]
    rows = []
    for name, ap in numbers["metrics"]["per_class"].items():
        row = {"name": name, "AP": ap, **best[name]}
        for key, iou in (("AP50", "0.5"), ("AP75", "0.75")):
            row[key] = float(np.mean(curves[iou]["precision"].get(name, -1)))
        rows.append(row | {f"AP{size[0]}": table["per_class"][name] for size, table in numbers["by_size"].items()})
    charts = {
        f"Precision and recall at IoU {iou}": line_chart(
            curve["recall"], curve["precision"], x_title="recall", y_title="precision"
        )
        for iou, curve in curves.items()
    }
    f1 = {name: values for name, values in numbers["f1"]["f1"].items() if best[name]["objects"]}
    charts["F1 by threshold at IoU 0.5"] = line_chart(numbers["f1"]["threshold"], f1, x_title="threshold", y_title="F1")
    return environment.get_template("report_template.html").render(
        numbers=numbers,
        metrics=[(name, numbers["metrics"][name], text) for name, text in DESCRIPTIONS.items()],
        rows=rows,
        mask_rows=_mask_rows(numbers.get("masks", {})),
        qualities=QUALITIES,
        charts={name: Markup(chart) for name, chart in charts.items()},
        confusion=_confusion_table(**numbers["confusion_matrix"]),
        error_texts=ERROR_TEXTS,
        largest_delta=max(row["delta_ap50"] for row in numbers["errors"]["errors"].values()) or 1.0,
        pictures=pictures,
        colours={name: "#{:02x}{:02x}{:02x}".format(*rgb) for name, rgb in COLOURS.items()},
    )


def _mask_rows(masks: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Mask AP and panoptic quality of all classes, things, stuff and each class."""
    if not masks:
        return []
    groups = {"": "all", "_things": "things", "_stuff": "stuff"} if "PQ" in masks else {"": "all"}
    rows = [
        {"name": name, "AP": masks["mask_AP"] if not suffix else None}
        | {quality: masks.get(f"{quality}{suffix}") for quality in QUALITIES}
        for suffix, name in groups.items()
    ]
    of_class, ap = masks.get("panoptic_per_class", {}), masks["mask_per_class"]
    return rows + [{"name": name, "AP": ap.get(name), **of_class.get(name, {})} for name in {**ap, **of_class}]


def _confusion_table(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The rows and columns that fit on a page, coloured by their fraction of the row, and the largest confusions."""
    matrix = np.array(counts)
    background = len(labels) - 1
    weight = matrix[:-1].sum(axis=1) + matrix[:, :-1].sum(axis=0)
    shown = [*sorted(np.argsort(-weight, kind="stable")[:MAX_CLASSES].tolist()), background]
    fractions = matrix / matrix.sum(axis=1, keepdims=True).clip(min=1)

    def cell(i: int, j: int) -> dict[str, Any]:
        if i == j == background:  # neither an object nor a detection
            return {"count": "", "style": ""}
        colour = f"hsl({130 if i == j else 5} 70% {97 - 42 * fractions[i, j]:.0f}%)"
        return {"count": int(matrix[i, j]), "style": f"background:{colour}"}

    mixed = matrix[:-1, :-1] - np.diag(np.diag(matrix[:-1, :-1]))
    top = [divmod(int(k), background) for k in np.argsort(-mixed, axis=None, kind="stable")[:10]]
    return {
        "names": [labels[i] for i in shown],
        "rows": [{"name": labels[i], "cells": [cell(i, j) for j in shown]} for i in shown],
        "num_hidden": background - len(shown) + 1,
        "top": [{"true": labels[i], "predicted": labels[j], "count": int(mixed[i, j])} for i, j in top if mixed[i, j]],
    }


# -- the worst images ----------------------------------------------------------------------------------------------


def _pictures(
    dataset: "Dataset",
    id2label: Mapping[int, str],
    annotations: Sequence[Record],
    detections: Sequence[Record],
    rows: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """The rows of `worst_images` with file name and drawn image."""
    index_of = {canonical_id(row["image_id"]): index for index, row in enumerate(dataset.select_columns("image_id"))}
    names = dict(enumerate(class_names(id2label)))
    pictures = []
    for row in rows:
        item = dataset[index_of[canonical_id(row["image_id"])]]
        objects, found = (
            [record for record in records if record["image_id"] == row["image_id"]]
            for records in (annotations, detections)
        )
        file = io.BytesIO()
        _draw(item["image"], objects, found, names).save(file, "JPEG", quality=85)
        source = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
        pictures.append({"file_name": item["file_name"], "source": source, **row})
    return pictures


def _draw(
    image: "Image.Image", objects: Sequence[Record], found: Sequence[Record], names: Mapping[int, str]
) -> "Image.Image":
    from ..visualization import draw_boxes  # which imports `datasets`; this module is loaded with the package

    scale = PICTURE_SIZE / max(image.size)
    image = image.convert("RGB").resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    errors = find_errors(objects, found)
    wrong = {id(error.record) for error in errors}
    boxes = [(record, "", "object") for record in objects]
    boxes += [(record, "{name} {score:.2f}", "correct") for record in found if id(record) not in wrong]
    boxes += [
        (record, "missed {name}", "missed") if kind == "missed" else (record, f"{{name}} {{score:.2f}} {kind}", "wrong")
        for kind, record in errors
    ]
    corners, captions, colours = [], [], []
    for record, caption, kind in boxes:
        x, y, width, height = (value * scale for value in record["bbox"])
        corners.append((x, y, x + width, y + height))
        captions.append(caption.format(name=names[record["category_id"]], score=record.get("score")))
        colours.append(COLOURS[kind])
    return draw_boxes(image, corners, captions, colours, 2)
