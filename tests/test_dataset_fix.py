"""The cleaned copy: what it corrects, and that nothing is left to correct."""

import itertools
import json
import logging
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from formats import WRITERS
from PIL import Image, ImageDraw, ImageOps
from test_dataset_check import FAULTS, annotations_of, check, clean_folder, edit  # noqa: F401

from hf_detr.data import load_detection_dataset
from hf_detr.dataset_check import write_clean_copy

BEYOND_REPAIR = {"broken_json", "nothing_annotated"}  # no annotations at all
PAIRS = list(itertools.combinations(sorted(set(FAULTS) - BEYOND_REPAIR), 2))


def _clean_after(names, source: Path, tmp_path: Path) -> list[str]:
    """The errors that are left after these faults were planted and cleaned."""
    folder = shutil.copytree(source, tmp_path / "data")
    for name in names:
        FAULTS[name].plant(folder)
    write_clean_copy(check(folder), tmp_path / "out", progress=False)
    return [str(finding) for finding in check(tmp_path / "out").errors]


@pytest.mark.parametrize("name", sorted(set(FAULTS) - BEYOND_REPAIR))
def test_no_error_survives_the_cleaning(name, clean_folder, tmp_path):  # noqa: F811
    assert _clean_after([name], clean_folder, tmp_path) == []


@pytest.mark.parametrize("pair", PAIRS[::8], ids="-".join)
def test_no_error_of_two_survives_the_cleaning(pair, clean_folder, tmp_path):  # noqa: F811
    assert _clean_after(pair, clean_folder, tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1, 8))
def test_no_error_of_any_two_survives_the_cleaning(first, clean_folder, tmp_path):  # noqa: F811
    for pair in PAIRS[first::8]:
        (tmp_path / "-".join(pair)).mkdir()
        assert _clean_after(pair, clean_folder, tmp_path / "-".join(pair)) == [], pair


def _red_box(image: Image.Image) -> list[int]:
    """[x_min, y_min, width, height] of the red pixels."""
    pixels = np.asarray(image.convert("RGB")).astype(int)
    rows, columns = np.nonzero((pixels[..., 0] > 200) & (pixels[..., 1] < 60))
    return [int(columns.min()), int(rows.min()), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1]


def _coco(folder: Path, images: list[dict], boxes: list[tuple[int, list]]) -> Path:
    content = {
        "images": images,
        "annotations": [
            {"id": number, "image_id": image_id, "category_id": 1, "bbox": bbox}
            for number, (image_id, bbox) in enumerate(boxes, start=1)
        ],
        "categories": [{"id": 1, "name": "nut"}],
    }
    (folder / "train.json").write_text(json.dumps(content))
    return folder


def _fixed(folder: Path, out: Path) -> tuple[list[dict], list[dict]]:
    write_clean_copy(check(folder), out, progress=False)
    content = json.loads(annotations_of(out).read_text())
    return content["images"], content["annotations"]


@pytest.mark.parametrize("orientation", range(2, 9))
def test_boxes_recorded_before_exif_are_turned_with_the_image(orientation, tmp_path):
    """A red rectangle is drawn on the stored pixels; Pillow turns the image, and the box has to follow."""
    folder = tmp_path / "data"
    folder.mkdir()
    image = Image.new("RGB", (80, 60), "white")
    ImageDraw.Draw(image).rectangle((10, 5, 29, 17), fill=(255, 0, 0))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(folder / "a.png", exif=exif)
    _coco(folder, [{"id": 1, "file_name": "a.png", "width": 80, "height": 60}], [(1, [10, 5, 20, 13])])
    images, (record,) = _fixed(folder, tmp_path / "out")
    shown = ImageOps.exif_transpose(Image.open(folder / "a.png"))
    assert (images[0]["width"], images[0]["height"]) == shown.size
    if orientation >= 5:  # where the sizes are equal, the record and the file do not contradict each other
        assert record["bbox"] == _red_box(shown)
        assert check(tmp_path / "out").errors == []


def test_boxes_of_resized_images_are_scaled(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    image = Image.new("RGB", (640, 480), "white")
    ImageDraw.Draw(image).rectangle((100, 60, 299, 159), fill=(255, 0, 0))
    image.resize((320, 240), Image.Resampling.NEAREST).save(folder / "a.png")
    _coco(folder, [{"id": 1, "file_name": "a.png", "width": 640, "height": 480}], [(1, [100, 60, 200, 100])])
    images, (record,) = _fixed(folder, tmp_path / "out")
    assert (images[0]["width"], images[0]["height"]) == (320, 240)
    assert record["bbox"] == _red_box(Image.open(folder / "a.png")) == [50, 30, 100, 50]
    assert record["area"] == 5000


def test_a_wrong_size_is_corrected_if_the_boxes_show_it_and_dropped_if_nothing_does(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_detr"), "propagate", True)
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (640, 480), (80 * number, 9, 9)).save(folder / f"{number}.png")
    sizes = [(300, 300), (300, 300), (640, 480)]
    records = [
        {"id": number, "file_name": f"{number}.png", "width": width, "height": height}
        for number, (width, height) in enumerate(sizes)
    ]
    # the box of image 0 ends beyond its recorded size, which is therefore wrong; that of image 1 tells nothing
    _coco(folder, records, [(0, [400, 10, 100, 50]), (1, [10, 10, 50, 50]), (2, [10, 10, 50, 50])])
    images, annotations = _fixed(folder, tmp_path / "out")
    assert [image["id"] for image in images] == [0, 2]
    assert [record["bbox"] for record in annotations] == [[400, 10, 100, 50], [10, 10, 50, 50]]
    assert "1 of 3 images and 1 of 3 boxes are removed" in caplog.text


def test_several_records_of_a_file_become_one_with_all_objects(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    records = [{"id": number, "file_name": "a.png", "width": 64, "height": 64} for number in (7, 8, 9)]
    _coco(folder, records, [(7, [1, 1, 9, 9]), (8, [20, 1, 9, 9]), (9, [40, 1, 9, 9]), (9, [1, 1, 9, 9])])
    with pytest.raises(ValueError, match=r"image 8 .*names the same file as image 7 .*Merge the records"):
        load_detection_dataset(folder, cache_dir=tmp_path / "cache", progress=False)
    images, annotations = _fixed(folder, tmp_path / "out")
    assert [image["id"] for image in images] == [7]
    assert [record["bbox"] for record in annotations] == [[1, 1, 9, 9], [20, 1, 9, 9], [40, 1, 9, 9]]


def test_a_fixed_camera_does_not_leak_between_splits(tmp_path):
    """One small flaw per image: nearly equal images, of which none is in two splits."""
    rng = np.random.default_rng(0)
    background = np.asarray(Image.fromarray(rng.integers(60, 200, (6, 8, 3), dtype=np.uint8)).resize((320, 240)))
    for split, count in (("train", 12), ("val", 4)):
        (tmp_path / "data" / split).mkdir(parents=True)
        images, annotations = [], []
        for number in range(count):
            frame = background.copy()
            x, y = int(rng.integers(0, 310)), int(rng.integers(0, 230))
            frame[y : y + 5, x : x + 5] = 100
            Image.fromarray(frame).save(tmp_path / "data" / split / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png", "width": 320, "height": 240})
            annotations.append({"id": number, "image_id": number, "category_id": 1, "bbox": [x, y, 5, 5]})
        content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "flaw"}]}
        (tmp_path / "data" / f"{split}.json").write_text(json.dumps(content))
    result = check(tmp_path / "data")
    assert result.errors == []
    assert result.counts()["image-similar"] == 4
    write_clean_copy(result, tmp_path / "out", progress=False)
    assert [len(split.images) for split in check(tmp_path / "out").splits.values()] == [12, 4]


def test_saved_datasets_are_checked_and_fixed_too(clean_folder, tmp_path):  # noqa: F811
    contents = {split: json.loads(annotations_of(clean_folder, split).read_text()) for split in ("train", "val")}
    contents["train"]["annotations"][0]["bbox"] = [5000, 5, 10, 10]
    WRITERS["saved"](clean_folder, contents, tmp_path / "saved")
    result = check(tmp_path / "saved")
    assert [(f.code, f.record.partition(" (")[0]) for f in result.errors] == [("box-outside", "row 0")]
    write_clean_copy(result, tmp_path / "out", progress=False)
    assert check(tmp_path / "out").errors == []
    rows = load_detection_dataset(tmp_path / "out", cache_dir=tmp_path / "cache", progress=False)
    source = datasets.load_from_disk(str(tmp_path / "saved"))["train"]
    assert sum(len(row["objects"]["bbox"]) for row in rows) == sum(len(o["bbox"]) for o in source["objects"]) - 1
    assert np.array_equal(np.asarray(rows[3]["image"]), np.asarray(source[3]["image"]))


def test_copies_are_removed_wherever_they_are(tmp_path):
    """Image 0 is in all three splits, and twice in train with other boxes: only the one of test stays."""
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 255, (6, 8, 3), dtype=np.uint8) for _ in range(5)]
    contents = {"train": [0, 0, 1, 2], "val": [0, 3], "test": [0, 4]}
    for split, numbers in contents.items():
        (tmp_path / "data" / split).mkdir(parents=True)
        images, annotations = [], []
        for position, number in enumerate(numbers):
            name = f"{position}.png"
            shown = Image.fromarray(pixels[number]).resize((80, 60), Image.Resampling.NEAREST)
            shown.save(tmp_path / "data" / split / name)
            images.append({"id": position, "file_name": name, "width": 80, "height": 60})
            bbox = [5 + 10 * position, 5, 20, 20]
            annotations.append({"id": position, "image_id": position, "category_id": 1, "bbox": bbox})
        content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "nut"}]}
        (tmp_path / "data" / f"{split}.json").write_text(json.dumps(content))
    result = check(tmp_path / "data")
    assert result.counts()["image-leaked"] == 5
    write_clean_copy(result, tmp_path / "out", progress=False)
    again = check(tmp_path / "out")
    assert again.errors == []
    assert {name: len(split.images) for name, split in again.splits.items()} == {"train": 2, "val": 1, "test": 2}
