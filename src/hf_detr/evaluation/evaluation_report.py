"""A result to read: `report.html`, which needs no other file and no network, and `report.json` with all its numbers."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from ..model.image_processing_hf_detr import HfDetrImageProcessor
from .analysis import above, best_thresholds, confusion_matrix, f1_by_threshold, precision_recall
from .charts import line_chart
from .coco_metrics import DESCRIPTIONS, METRICS, CocoEvaluator, Record, class_names, coco_metrics, metrics_by_size
from .errors import DetectionError, error_breakdown, find_errors, worst_images

if TYPE_CHECKING:
    from datasets import Dataset

CONFIG = "preprocessor_config.json"
MOST_CLASSES = 24  # in the confusion matrix of the page
PICTURE = 360  # longest side, in pixels
COLOURS = {"truth": (255, 255, 255), "right": (60, 200, 90), "wrong": (255, 70, 60), "missed": (255, 190, 0)}
ERROR_TEXTS = {
    "classification": "right place, wrong class",
    "localisation": "right class, IoU between 0.1 and 0.5",
    "both": "wrong class, and IoU between 0.1 and 0.5",
    "duplicate": "an object that a better detection has found already",
    "background": "nothing there, IoU below 0.1",
    "missed": "objects that none of these would find if corrected",
}


def analyse(
    images: Sequence[Record], annotations: Sequence[Record], detections: Sequence[Record], id2label: Mapping[int, str]
) -> dict[str, Any]:
    """All numbers of a report, from records as `coco_metrics` takes them.

    Returns:
        `metrics` (see `coco_metrics`), `by_size` (`metrics_by_size`), `precision_recall` at IoU "0.5" and "0.75", `f1`
        (`f1_by_threshold`), `class_thresholds` (`best_thresholds`), and at these thresholds `confusion_matrix`
        (`labels` and `counts`), `errors` (`error_breakdown`, with `count_at_thresholds`) and `worst_images`.
    """
    f1 = f1_by_threshold(annotations, detections, id2label)
    thresholds = best_thresholds(f1)
    confident = above(detections, thresholds)
    breakdown = error_breakdown(annotations, detections, id2label)
    seen = error_breakdown(annotations, confident, id2label)["errors"]
    for kind, row in breakdown["errors"].items():
        row["count_at_thresholds"] = seen[kind]["count"]
    return {
        "metrics": coco_metrics(images, annotations, detections, id2label),
        "by_size": metrics_by_size(images, annotations, detections, id2label),
        "precision_recall": {str(iou): precision_recall(annotations, detections, id2label, iou) for iou in (0.5, 0.75)},
        "f1": f1,
        "class_thresholds": thresholds,
        "confusion_matrix": {
            "labels": [*class_names(id2label), "background"],
            "counts": confusion_matrix(annotations, detections, id2label, threshold=thresholds),
        },
        "errors": breakdown,
        "worst_images": worst_images(find_errors(annotations, confident)),
    }


def write_report(folder: str | Path, evaluator: CocoEvaluator, dataset: "Dataset", title: str) -> dict[str, Any]:
    """Write `report.html` and `report.json` into a folder, which is made if need be.

    Args:
        evaluator: after `evaluate_detection`; `dataset`: the same it was made with, for the pictures.
        title: heading of the page.

    Returns:
        the numbers, as `analyse` gives them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    detections = evaluator.predictions()
    numbers = analyse(evaluator.images, evaluator.annotations, detections, evaluator.id2label)
    about = {
        "title": title,
        "images": len(evaluator.images),
        "objects": sum(not record["iscrowd"] for record in evaluator.annotations),
        "detections": len(detections),
    }
    (folder / "report.json").write_text(json.dumps(about | numbers, indent=1), encoding="utf-8")
    confident = above(detections, numbers["class_thresholds"])
    pictures = _pictures(dataset, evaluator, confident, numbers["worst_images"])
    (folder / "report.html").write_text(_page(about, numbers, pictures), encoding="utf-8")
    return numbers


def save_class_thresholds(checkpoint: str | Path, thresholds: Sequence[float]) -> Path:
    """Store thresholds of the classes in a checkpoint's `preprocessor_config.json`, for `threshold="per_class"`.
    Nothing else of the file changes.

    Returns:
        the file.

    Raises:
        ValueError: the checkpoint is not a local folder with our processor, which alone reads them.
    """
    path = Path(checkpoint) / CONFIG
    if not path.is_file():
        raise ValueError(
            f"Thresholds are stored in the {CONFIG} of a local folder, and {checkpoint} is none with such a file. "
            "Download the checkpoint, or save model and processor there with save_pretrained."
        )
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("image_processor_type") != HfDetrImageProcessor.__name__:
        raise ValueError(
            f"{path} is of a {content.get('image_processor_type')}, which does not know thresholds of classes. Convert "
            "the checkpoint first: examples/convert.py."
        )
    content["class_thresholds"] = [float(value) for value in thresholds]
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path


# -- the page ------------------------------------------------------------------------------------------------------


def _page(about: Mapping[str, Any], numbers: Mapping[str, Any], pictures: Sequence[Mapping[str, Any]]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["number"] = lambda value, digits=3: (
        "–" if value is None or value == -1 else f"{value:.{digits}f}"
    )
    curves = numbers["precision_recall"]
    per_class = numbers["metrics"]["per_class"]
    at_half, at_three_quarters = (
        {name: float(np.mean(values)) for name, values in curves[iou]["precision"].items()} for iou in ("0.5", "0.75")
    )
    rows = [
        {"name": name, "AP": ap, "AP50": at_half.get(name, -1), "AP75": at_three_quarters.get(name, -1)}
        | {f"AP{size[0]}": table["per_class"][name] for size, table in numbers["by_size"].items()}
        | numbers["f1"]["best"][name]
        for name, ap in per_class.items()
    ]
    with_objects = {row["name"] for row in rows if row["objects"]}
    f1 = {name: values for name, values in numbers["f1"]["f1"].items() if name in with_objects}
    charts = {
        f"{name} at IoU {iou}": Markup(
            line_chart(curves[iou]["recall"], curves[iou]["precision"], x_title="recall", y_title="precision")
        )
        for name, iou in (("Precision and recall", "0.5"), ("Precision and recall", "0.75"))
    }
    charts["F1 over the threshold"] = Markup(
        line_chart(numbers["f1"]["threshold"], f1, x_title="threshold", y_title="F1")
    )
    return environment.get_template("report_template.html").render(
        about=about,
        numbers=numbers,
        metrics=[(name, numbers["metrics"][name], DESCRIPTIONS[name]) for name in METRICS],
        rows=rows,
        charts=charts,
        confusion=_confusion_table(numbers["confusion_matrix"]),
        error_texts=ERROR_TEXTS,
        largest_delta=max(row["delta_ap50"] for row in numbers["errors"]["errors"].values()) or 1.0,
        pictures=pictures,
        colours={name: "#{:02x}{:02x}{:02x}".format(*rgb) for name, rgb in COLOURS.items()},
    )


def _confusion_table(matrix: Mapping[str, Any]) -> dict[str, Any]:
    """The rows and columns that fit on a page, each cell with its share of its row, and the largest confusions."""
    names, counts = matrix["labels"], np.array(matrix["counts"])
    background = len(names) - 1
    weight = counts[:-1].sum(axis=1) + counts[:, :-1].sum(axis=0)
    shown = [*sorted(np.argsort(-weight, kind="stable")[:MOST_CLASSES].tolist()), background]
    totals = counts.sum(axis=1)
    rows = []
    for i in shown:
        cells = []
        for j in shown:
            share = counts[i, j] / totals[i] if totals[i] else 0.0
            ground = f"background:hsl({130 if i == j else 5} 70% {97 - 42 * share:.0f}%)"
            nothing = i == j == background  # background that was called nothing: not a count
            cells.append({"count": "" if nothing else int(counts[i, j]), "style": "" if nothing else ground})
        rows.append({"name": names[i], "cells": cells})
    mixed = counts[:-1, :-1] - np.diag(np.diag(counts[:-1, :-1]))
    top = [(int(k) // background, int(k) % background) for k in np.argsort(-mixed, axis=None, kind="stable")[:10]]
    return {
        "names": [names[i] for i in shown],
        "rows": rows,
        "left_out": background - len(shown) + 1,
        "top": [{"truth": names[i], "said": names[j], "count": int(mixed[i, j])} for i, j in top if mixed[i, j]],
    }


# -- the worst images ----------------------------------------------------------------------------------------------


def _pictures(
    dataset: "Dataset", evaluator: CocoEvaluator, detections: Sequence[Record], rows: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The rows of `worst_images` with file name and drawn picture."""
    place = {row["image_id"]: index for index, row in enumerate(dataset.select_columns("image_id"))}
    wanted = {row["image_id"] for row in rows}
    truth = [record for record in evaluator.annotations if record["image_id"] in wanted]
    found = [record for record in detections if record["image_id"] in wanted]
    errors = find_errors(truth, found)
    names = dict(enumerate(class_names(evaluator.id2label)))
    pictures = []
    for row in rows:
        item = dataset[place[row["image_id"]]]
        image = _draw(
            item["image"],
            [record for record in truth if record["image_id"] == row["image_id"]],
            [record for record in found if record["image_id"] == row["image_id"]],
            [error for error in errors if error.image_id == row["image_id"]],
            names,
        )
        pictures.append({"file_name": item["file_name"], "source": _data_uri(image), **row})
    return pictures


def _draw(
    image: Image.Image,
    truth: Sequence[Record],
    found: Sequence[Record],
    errors: Sequence[DetectionError],
    names: Mapping[int, str],
) -> Image.Image:
    from ..visualization import draw_boxes  # which imports `datasets`; this module is loaded with the package

    scale = PICTURE / max(image.size)
    image = image.convert("RGB").resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    wrong = {(error.label, error.score, tuple(error.box)) for error in errors}
    boxes = [(record["bbox"], "", "truth") for record in truth]
    boxes += [
        (record["bbox"], f"{names[record['category_id']]} {record['score']:.2f}", "right")
        for record in found
        if (record["category_id"], record["score"], tuple(record["bbox"])) not in wrong
    ]
    for error in errors:
        if error.kind == "missed":
            boxes.append((error.box, f"missed {names[error.label]}", "missed"))
        else:
            boxes.append((error.box, f"{names[error.label]} {error.score:.2f} {error.kind}", "wrong"))
    corners = [[x * scale, y * scale, (x + w) * scale, (y + h) * scale] for (x, y, w, h), _, _ in boxes]
    return draw_boxes(image, corners, [text for _, text, _ in boxes], [COLOURS[kind] for _, _, kind in boxes], 2)


def _data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
