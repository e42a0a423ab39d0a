"""Writes one dataset in each annotation format, with the files that common tools export."""

import json
from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import escape

import datasets
from PIL import Image

from hf_detr.data import draw_shapes_dataset

NAMES = ["rectangle", "ellipse", "triangle"]


def shapes(folder: Path, num_train: int = 24, num_val: int = 8) -> dict[str, dict]:
    """Draw shapes into `folder` and return the COCO content of each split."""
    draw_shapes_dataset(folder, num_train=num_train, num_val=num_val, progress=False)
    return {s: json.loads((folder / "annotations" / f"instances_{s}.json").read_text()) for s in ("train", "val")}


def _objects(content: dict, image_id: int) -> list[dict]:
    return [record for record in content["annotations"] if record["image_id"] == image_id]


def _copy(source: Path, split: str, name: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes((source / split / name).read_bytes())


def write_roboflow(source: Path, contents: dict[str, dict], folder: Path) -> None:
    """COCO beside the images, with the parent category that Roboflow adds."""
    for split, content in contents.items():
        place = folder / {"val": "valid"}.get(split, split)
        categories = [{"id": 0, "name": "shapes", "supercategory": "none"}]
        categories += [{"id": c["id"], "name": c["name"], "supercategory": "shapes"} for c in content["categories"]]
        for image in content["images"]:
            _copy(source, split, image["file_name"], place / image["file_name"])
        (place / "_annotations.coco.json").write_text(json.dumps(content | {"categories": categories}))


def write_yolo(source: Path, contents: dict[str, dict], folder: Path) -> None:
    for split, content in contents.items():
        for image in content["images"]:
            name, width, height = image["file_name"], image["width"], image["height"]
            _copy(source, split, name, folder / "images" / split / name)
            lines = []
            for record in _objects(content, image["id"]):
                x, y, w, h = record["bbox"]
                numbers = [(x + w / 2) / width, (y + h / 2) / height, w / width, h / height]
                lines.append(f"{record['category_id'] - 1} " + " ".join(repr(number) for number in numbers))
            label = folder / "labels" / split / name.replace(".jpg", ".txt")
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text("\n".join(lines))
    (folder / "data.yaml").write_text(
        "path: .\ntrain: images/train\nval: images/val\nnames:\n  0: rectangle\n  1: ellipse\n  2: triangle\n"
    )


def write_voc(source: Path, contents: dict[str, dict], folder: Path) -> None:
    for split, content in contents.items():
        stems = []
        for image in content["images"]:
            stem = f"{split}_{image['file_name'][:-4]}"
            stems.append(stem)
            _copy(source, split, image["file_name"], folder / "JPEGImages" / f"{stem}.jpg")
            objects = ""
            for record in _objects(content, image["id"]):
                x, y, w, h = record["bbox"]
                name = NAMES[record["category_id"] - 1]
                objects += (
                    f"<object><name>{escape(name)}</name><bndbox><xmin>{x!r}</xmin><ymin>{y!r}</ymin>"
                    f"<xmax>{x + w!r}</xmax><ymax>{y + h!r}</ymax></bndbox></object>"
                )
            (folder / "Annotations").mkdir(parents=True, exist_ok=True)
            (folder / "Annotations" / f"{stem}.xml").write_text(
                f"<annotation><filename>{stem}.jpg</filename><size><width>{image['width']}</width>"
                f"<height>{image['height']}</height><depth>3</depth></size>{objects}</annotation>"
            )
        (folder / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(stems) + "\n")


def write_imagefolder(source: Path, contents: dict[str, dict], folder: Path) -> None:
    for split, content in contents.items():
        rows = []
        for image in content["images"]:
            _copy(source, split, image["file_name"], folder / split / image["file_name"])
            found = _objects(content, image["id"])
            objects = {
                "bbox": [record["bbox"] for record in found],
                "categories": [NAMES[record["category_id"] - 1] for record in found],
                "area": [record["area"] for record in found],
                "id": [record["id"] for record in found],
            }
            rows.append(json.dumps({"file_name": image["file_name"], "image_id": image["id"], "objects": objects}))
        (folder / split / "metadata.jsonl").write_text("\n".join(rows) + "\n")


def hub_rows(source: Path, content: dict, split: str) -> datasets.Dataset:
    """As on the Hub: image bytes, and `objects` as in cppe-5."""
    features = datasets.Features(
        {
            "image_id": datasets.Value("int64"),
            "image": datasets.Image(),
            "objects": {
                "id": datasets.List(datasets.Value("int64")),
                "area": datasets.List(datasets.Value("float64")),
                "bbox": datasets.List(datasets.List(datasets.Value("float64"), length=4)),
                "category": datasets.List(datasets.ClassLabel(names=NAMES)),
            },
        }
    )
    rows = []
    for image in content["images"]:
        found = _objects(content, image["id"])
        rows.append(
            {
                "image_id": image["id"],
                "image": {"path": image["file_name"], "bytes": (source / split / image["file_name"]).read_bytes()},
                "objects": {
                    "id": [record["id"] for record in found],
                    "area": [record["area"] for record in found],
                    "bbox": [record["bbox"] for record in found],
                    "category": [record["category_id"] - 1 for record in found],
                },
            }
        )
    return datasets.Dataset.from_list(rows, features=features)


def write_saved(source: Path, contents: dict[str, dict], folder: Path) -> None:
    splits = {
        {"val": "validation"}.get(split, split): hub_rows(source, content, split) for split, content in contents.items()
    }
    datasets.DatasetDict(splits).save_to_disk(folder)


def write_parquet(source: Path, contents: dict[str, dict], folder: Path) -> None:
    (folder / "data").mkdir(parents=True)
    for split, content in contents.items():
        name = {"val": "validation"}.get(split, split)
        hub_rows(source, content, split).to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")


WRITERS: dict[str, Callable[[Path, dict[str, dict], Path], None]] = {
    "roboflow": write_roboflow,
    "yolo": write_yolo,
    "voc": write_voc,
    "imagefolder": write_imagefolder,
    "saved": write_saved,
    "parquet": write_parquet,
}


def rotated_jpeg(path: Path, width: int, height: int) -> None:
    """A JPEG stored as width x height, with an EXIF orientation that rotates it by 90 degrees."""
    image = Image.new("RGB", (width, height), "teal")
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
