"""The dataset check: every planted fault is found, clean data have no findings, the cleaned copy is clean."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from formats import WRITERS, rotated_jpeg, shapes
from PIL import Image

from hf_detr.data import load_detection_dataset
from hf_detr.dataset_check import KINDS, check_dataset, write_clean_copy, write_page

SCRIPT = Path(__file__).parents[1] / "examples" / "check_dataset.py"


def annotations_of(folder: Path, split: str = "train") -> Path:
    return folder / "annotations" / f"instances_{split}.json"


def edit(folder: Path, change, split: str = "train") -> None:
    content = json.loads(annotations_of(folder, split).read_text())
    change(content)
    annotations_of(folder, split).write_text(json.dumps(content))


def box(number: int, **values):
    return lambda content: content["annotations"][number].update(values)


def check(folder: Path, **kwargs):
    return check_dataset(folder, progress=False, num_workers=1, **kwargs)


def image_of_box(content: dict, number: int) -> dict:
    return next(i for i in content["images"] if i["id"] == content["annotations"][number]["image_id"])


@dataclass
class Fault:
    """`plant` makes one fault in a clean folder; it must give one finding with this code, at this record, with this
    message, and beyond it no codes but those in `also`."""

    plant: Callable[[Path], None]
    code: str
    record: str
    message: str
    also: set[str]


FAULTS: dict[str, Fault] = {}


def fault(code: str, record: str, message: str, also: Iterable[str] = ()):
    def register(plant):
        FAULTS[plant.__name__] = Fault(plant, code, record, message, set(also))
        return plant

    return register


@fault("image-truncated", "000003.jpg", "truncated")
def truncated(folder):
    path = folder / "train" / "000003.jpg"
    path.write_bytes(path.read_bytes()[:-200])


@fault("image-unreadable", "000004.jpg", "cannot be opened")
def unreadable(folder):
    (folder / "train" / "000004.jpg").write_bytes(b"no image at all")


@fault("image-missing", "000005.jpg", "no such file")
def missing(folder):
    (folder / "train" / "000005.jpg").unlink()


@fault("image-size-mismatch", "000006.jpg", "recorded as")
def wrong_size(folder):
    edit(folder, lambda c: c["images"][6].update(width=c["images"][6]["width"] + 40))


@fault("image-size-before-exif", "rotated.jpg", "60 x 80 as shown")
def size_before_exif(folder):
    rotated_jpeg(folder / "train" / "rotated.jpg", 80, 60)
    edit(folder, lambda c: c["images"].append({"id": 900, "file_name": "rotated.jpg", "width": 80, "height": 60}))


@fault("image-exif-rotated", "rotated.jpg", "EXIF orientation 6")
def exif_rotated(folder):
    rotated_jpeg(folder / "train" / "rotated.jpg", 80, 60)
    edit(folder, lambda c: c["images"].append({"id": 900, "file_name": "rotated.jpg", "width": 60, "height": 80}))


@fault("box-outside", "annotation 1", "is outside the image")
def outside(folder):
    edit(folder, box(0, bbox=[5000, 10, 20, 20]))


@fault("box-partly-outside", "annotation 1", "extends 20.0 pixels")
def partly_outside(folder):
    edit(folder, box(0, bbox=[-20, 10, 60, 20], area=1200))


@fault("box-empty", "annotation 2", "has no area")
def empty(folder):
    edit(folder, box(1, bbox=[10, 10, 0, 20]))


@fault("box-empty", "annotation 2", "has no area")
def negative(folder):
    edit(folder, box(1, bbox=[10, 10, 20, -3]))


@fault("box-not-numbers", "annotation 3", "the box is not finite")
def nan(folder):
    edit(folder, box(2, bbox=[10, float("nan"), 20, 20]))


@fault("box-not-numbers", "annotation 3", "must be [x_min, y_min, width, height]")
def three_numbers(folder):
    edit(folder, box(2, bbox=[10, 20, 30]))


@fault("box-not-numbers", "annotation 3", "must be [x_min, y_min, width, height]")
def text_box(folder):
    edit(folder, box(2, bbox="10 20 30 40"))


@fault("box-xyxy", "all", "as corners, none")
def corners(folder):
    def change(content):
        for record in content["annotations"]:
            x, y, w, h = record["bbox"]
            record["bbox"] = [x, y, x + w, y + h]

    edit(folder, change)


@fault("box-relative", "all", "at most 1.05")
def relative(folder):
    def change(content):
        sizes = {image["id"]: (image.get("width", 1), image.get("height", 1)) for image in content["images"]}
        for record in content["annotations"]:
            (x, y, w, h), (width, height) = record["bbox"], sizes.get(record["image_id"], (200, 200))
            record |= {"bbox": [x / width, y / height, w / width, h / height], "area": w * h / width / height}

    edit(folder, change)


@fault("category-unknown", "annotation 4", "no category 42")
def unknown_category(folder):
    edit(folder, box(3, category_id=42))


@fault("category-name-duplicate", "categories", "'ellipse'")
def duplicate_name(folder):
    edit(folder, lambda c: c["categories"].append({"id": 9, "name": "ellipse"}))
    edit(folder, box(0, category_id=9))


@fault("annotation-orphan", "annotation 5", "no image 4711")
def orphan(folder):
    edit(folder, box(4, image_id=4711))


@fault("image-id-duplicate", "image 8", "has the same id")
def duplicate_image_id(folder):
    edit(folder, lambda c: c["images"].append(c["images"][7] | {"file_name": "000008.jpg"}))


@fault("image-record-incomplete", "image number", "file_name")
def incomplete_record(folder):
    edit(folder, lambda c: c["images"].append({"id": 901}))


@fault("image-record-duplicate", "image 950", "the same file as image 3", also={"box-duplicate"})
def two_records_of_a_file(folder):
    def change(content):
        content["images"].append(content["images"][2] | {"id": 950})
        objects = [a for a in content["annotations"] if a["image_id"] == content["images"][2]["id"]]
        objects[-1]["image_id"] = 950

    edit(folder, change)


@fault("crowds-only", "COCO", "of", also={"class-empty", "class-not-in-train"})
def all_crowds(folder):
    edit(folder, lambda c: [a.update(iscrowd=1) for a in c["annotations"]])


@fault("image-dim", "deep.png", "little of the range")
def twelve_bits(folder):
    _add_image(folder, "deep.png", Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)), 960)


@fault("image-unsupported", "float.tiff", "[0, 1] or [0, 255]")
def floats_without_a_range(folder):
    values = np.linspace(-5, 900, 4096, dtype=np.float32).reshape(64, 64)
    _add_image(folder, "float.tiff", Image.fromarray(values), 961)


@fault("image-similar", "blank.png", "looks like")
def blank_images(folder):
    for split, shade in (("train", 200), ("val", 201)):
        _add_image(folder, "blank.png", Image.new("RGB", (64, 64), (shade,) * 3), 962, split)


def _add_image(folder, name, image, image_id, split="train"):
    image.save(folder / split / name)
    record = {"id": image_id, "file_name": name, "width": image.width, "height": image.height}
    edit(folder, lambda c: c["images"].append(record), split)


@fault("annotation-id-duplicate", "annotation 6", "another annotation")
def duplicate_annotation_id(folder):
    edit(folder, box(6, id=6))


@fault("area-wrong", "annotation 1", "area is 1000000.0")
def wrong_area(folder):
    edit(folder, box(0, area=1e6))


@fault("box-duplicate", "annotation 9999", "occurs twice")
def duplicate_box(folder):
    edit(folder, lambda c: c["annotations"].append(c["annotations"][0] | {"id": 9999}))


@fault("image-duplicate", "copy.jpg", "is the same as image 10")
def duplicate(folder):
    with Image.open(folder / "train" / "000009.jpg") as image:
        size = image.size
        image.resize((size[0] * 2, size[1] * 2)).save(folder / "train" / "copy.jpg", quality=70)
    record = {"id": 902, "file_name": "copy.jpg", "width": size[0] * 2, "height": size[1] * 2}
    edit(folder, lambda c: c["images"].append(record))


@fault("image-leaked", "leaked.jpg", "of train")
def leak(folder):
    name = "leaked.jpg"
    (folder / "val" / name).write_bytes((folder / "train" / "000010.jpg").read_bytes())
    with Image.open(folder / "val" / name) as image:
        record = {"id": 903, "file_name": name, "width": image.width, "height": image.height}
    edit(folder, lambda c: c["images"].append(record), "val")


@fault("image-unannotated", "forgotten.png", "no record")
def unannotated(folder):
    Image.new("RGB", (50, 50), "red").save(folder / "train" / "forgotten.png")


@fault("objects-exceed-queries", "000000.jpg", "more than 100 queries", also={"class-rare", "box-partly-outside"})
def too_many_objects(folder):
    def change(content):
        image = content["images"][0]
        content["annotations"] += [
            {"id": 5000 + i, "image_id": image["id"], "category_id": 1, "bbox": [i % 10 * 8, i // 10 * 6, 7, 5]}
            for i in range(101)
        ]

    edit(folder, change)


@fault("box-tiny", "annotation 1", "the stride is 32")
def tiny(folder):
    edit(folder, box(0, bbox=[10, 10, 1.5, 2], area=3))


@fault("class-empty", "'hexagon'", "no boxes")
def empty_class(folder):
    edit(folder, lambda c: c["categories"].append({"id": 9, "name": "hexagon"}))


@fault("class-rare", "'hexagon'", "has 1 boxes")
def rare_class(folder):
    def change(content):
        content["categories"].append({"id": 9, "name": "hexagon"})
        content["annotations"] += [
            {"image_id": image["id"], "category_id": c, "bbox": [2 + 4 * c + k, 3, 20, 20]}
            for image in content["images"]
            for c in (1, 2, 3)
            for k in range(4)
        ]
        content["annotations"][0]["category_id"] = 9
        for number, record in enumerate(content["annotations"]):
            record["id"] = number + 1

    edit(folder, change)


@fault("class-not-in-train", "'hexagon'", "none in train")
def class_not_in_train(folder):
    edit(folder, lambda c: c["categories"].append({"id": 9, "name": "hexagon"}), "val")
    edit(folder, box(0, category_id=9), "val")


@fault("boxes-missing", "COCO", "none of the", also={"class-not-in-train", "class-empty"})
def nothing_annotated(folder):
    edit(folder, lambda c: c.update(annotations=[]))


@fault("annotation-unreadable", "annotations", "not valid JSON", also={"class-not-in-train"})
def broken_json(folder):
    annotations_of(folder).write_text("{")


NUM_TRAIN, NUM_VAL = 16, 4


@pytest.fixture(scope="module")
def clean_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clean")
    shapes(folder, NUM_TRAIN, NUM_VAL)
    return folder


@pytest.fixture(scope="module")
def contents(clean_folder):
    return {split: json.loads(annotations_of(clean_folder, split).read_text()) for split in ("train", "val")}


@pytest.fixture
def folder(clean_folder, tmp_path):
    return Path(shutil.copytree(clean_folder, tmp_path / "data"))


@pytest.mark.parametrize("name", ["coco", *(name for name in WRITERS if name not in ("saved", "parquet"))])
def test_clean_data_have_no_findings_in_any_format(name, clean_folder, contents, tmp_path):
    place = clean_folder
    if name != "coco":
        place = tmp_path / name
        WRITERS[name](clean_folder, contents, place)
    result = check(place)
    assert result.findings == []
    assert {name: len(split.images) for name, split in result.splits.items()} == {"train": NUM_TRAIN, "val": NUM_VAL}


@pytest.mark.parametrize("planted", FAULTS.values(), ids=list(FAULTS))
def test_every_planted_fault_is_found_at_its_record_and_nothing_else(planted, folder):
    planted.plant(folder)
    result = check(folder)
    found = [f for f in result.findings if f.code == planted.code]
    assert len(found) == 1, result.counts()
    assert planted.record in found[0].record
    assert planted.message in found[0].message
    assert found[0].file
    assert set(result.counts()) <= {planted.code} | planted.also, result.counts()


def test_every_kind_has_a_planted_fault():
    assert set(KINDS) - {planted.code for planted in FAULTS.values()} == {
        "split-empty",
        "image-name-stale",
        "annotation-unused",
        *(code for code in KINDS if code.startswith(("mask-", "segments-", "thing-"))),  # test_masks_data.py
    }


def test_faults_of_yolo_and_voc_files_are_found_too(clean_folder, contents, tmp_path):
    WRITERS["yolo"](clean_folder, contents, tmp_path / "yolo")
    labels = tmp_path / "yolo" / "labels" / "train"
    (labels / "000000.txt").write_text(
        "0 0.5 0.5 0.2\n1 a b c d\n7 0.5 0.5 0.2 0.2\n0 50 60 20 30\n2 0.5 0.5 nan 0.1\n"
    )
    (labels / "nobody.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    found = {(f.code, f.record.split(", ")[-1]) for f in check(tmp_path / "yolo").errors}
    assert found == {
        ("box-not-numbers", "000000.txt line 1"), ("box-not-numbers", "000000.txt line 2"),
        ("category-unknown", "000000.txt line 3"), ("box-not-numbers", "000000.txt line 4"),
        ("box-not-numbers", "000000.txt line 5"),
    }  # fmt: skip
    orphans = [f.record for f in check(tmp_path / "yolo").findings if f.code == "annotation-orphan"]
    assert orphans == ["nobody.txt"]
    WRITERS["voc"](clean_folder, contents, tmp_path / "voc")
    xml = tmp_path / "voc" / "Annotations"
    (xml / "train_000001.xml").write_text("<annotation><object>")
    (xml / "train_000002.xml").write_text(
        "<annotation><object><name>ellipse</name><bndbox><xmin>1</xmin></bndbox></object>"
        "<object><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>"
    )
    found = {(f.code, f.record.split(", ")[-1]) for f in check(tmp_path / "voc").errors}
    assert found == {
        ("annotation-unreadable", "train_000001.xml"), ("box-not-numbers", "train_000002.xml object 1"),
        ("category-unknown", "train_000002.xml object 2"),
    }  # fmt: skip


def test_all_faults_together_are_all_found_and_the_cleaned_copy_is_clean(folder, tmp_path):
    excluded = {
        "corners", "relative", "broken_json", "nothing_annotated", "negative", "three_numbers", "text_box", "tiny",
        "size_before_exif", "partly_outside", "wrong_area", "rare_class", "outside", "empty_class", "all_crowds",
    }  # fmt: skip
    together = [planted for name, planted in FAULTS.items() if name not in excluded]
    for planted in together:
        planted.plant(folder)
    result = check(folder)
    assert {planted.code for planted in together} <= set(result.counts())
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    handled = write_clean_copy(result, tmp_path / "out", progress=False)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before, "only read"
    assert {"image-truncated", "image-missing", "image-id-duplicate", "image-leaked", "box-empty"} <= handled.keys()
    again = check(tmp_path / "out")
    assert {f.code for f in again.errors} <= {"class-not-in-train"}, [str(f) for f in again.errors]
    assert len(again.splits["val"].images) == NUM_VAL + 2, "a leaked image is removed from train; a blank one stays"
    added, removed = 4, 6  # exif, duplicate, 12 bits, blank; truncated, unreadable, missing, wrong size, leaked, one id
    assert len(again.splits["train"].images) == NUM_TRAIN + added - removed
    load_detection_dataset(tmp_path / "out", cache_dir=tmp_path / "cache", progress=False)


@pytest.mark.parametrize("plant", [corners, relative, partly_outside, wrong_area])
def test_what_can_be_corrected_is_corrected(plant, folder, contents, tmp_path):
    plant(folder)
    write_clean_copy(check(folder), tmp_path / "out", progress=False)
    fixed = json.loads(annotations_of(tmp_path / "out").read_text())["annotations"]
    assert check(tmp_path / "out").findings == []
    for record, original in zip(fixed, contents["train"]["annotations"], strict=True):
        if plant is partly_outside and original["id"] == 1:
            assert record["bbox"] == [0, 10, 40, 20]
            assert record["area"] == 800
        else:
            assert record["bbox"] == pytest.approx(original["bbox"], abs=1e-6)


def test_images_of_a_static_camera_are_different_images(tmp_path):
    rng = np.random.default_rng(0)
    background = rng.uniform(60, 180, (480, 640, 3))
    for split, count in (("train", 8), ("val", 3)):
        (tmp_path / split).mkdir()
        images, annotations = [], []
        for i in range(count):
            frame = background + rng.normal(0, 6, background.shape)
            x, y = int(rng.integers(0, 600)), int(rng.integers(0, 440))
            frame[y : y + 40, x : x + 40] = (220, 20, 20)
            Image.fromarray(frame.clip(0, 255).astype(np.uint8)).save(tmp_path / split / f"{i}.jpg")
            images.append({"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480})
            annotations.append({"id": i, "image_id": i, "category_id": 1, "bbox": [x, y, 40, 40]})
        content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    assert check(tmp_path).counts() == {}


def test_a_cleaned_copy_has_the_same_category_ids_in_all_splits(clean_folder, contents, tmp_path):
    triangles = [r for r in contents["val"]["annotations"] if r["category_id"] == 3]
    assert triangles
    WRITERS["voc"](clean_folder, contents | {"val": contents["val"] | {"annotations": triangles}}, tmp_path / "voc")
    write_clean_copy(check(tmp_path / "voc"), tmp_path / "out", progress=False)
    train, val = (
        {c["name"]: c["id"] for c in json.loads(annotations_of(tmp_path / "out", split).read_text())["categories"]}
        for split in ("train", "val")
    )
    assert val.items() <= train.items()


def test_a_cleaned_copy_never_overwrites_anything(clean_folder, tmp_path):
    result = check(clean_folder)
    with pytest.raises(FileExistsError, match="never written to"):
        write_clean_copy(result, clean_folder / "cleaned")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        write_clean_copy(result, tmp_path / "full")


def test_parallel_and_serial_checks_agree(folder):
    for plant in (truncated, duplicate, leak, nan):
        plant(folder)
    one, two = check(folder), check_dataset(folder, progress=False, num_workers=2)
    assert [str(f) for f in one.findings] == [str(f) for f in two.findings]


def test_the_training_size_of_any_processor_decides_what_is_tiny(folder):
    """By hand: the only small box is 8 x 6 pixels, in an image whose shorter side is at least 96 pixels."""
    edit(folder, box(0, bbox=[10, 10, 8, 6], area=48))
    image = image_of_box(json.loads(annotations_of(folder).read_text()), 0)
    longer = max(8 * 480 / image["width"], 6 * 360 / image["height"])
    for stride, expected in ((round(longer) - 2, {}), (round(longer) + 2, {"box-tiny": 1})):
        assert check(folder, size={"height": 360, "width": 480}, feature_stride=stride).counts() == expected


def test_an_empty_split_and_a_folder_without_annotations_are_reported(folder, tmp_path):
    edit(folder, lambda c: c.update(images=[], annotations=[]), "val")
    for path in (folder / "val").iterdir():
        path.unlink()
    assert [f.code for f in check(folder).findings] == ["split-empty"]
    with pytest.raises(FileNotFoundError, match="annotations-nowhere does not exist"):
        check(tmp_path / "annotations-nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match='No split "train" in'):
        check(tmp_path / "empty")
    (tmp_path / "empty" / "train.json").write_text("{")
    with pytest.raises(ValueError, match=r"train\.json is not valid JSON"):
        check(tmp_path / "empty")


def test_the_page_shows_findings_statistics_and_images_and_has_no_links(folder, tmp_path):
    for plant in (truncated, partly_outside, duplicate_name):
        plant(folder)
    result = check(folder)
    text = write_page(result, tmp_path / "deep" / "report.html").read_text()
    for part in ("2 errors", "Boxes per class", "Box size", "data:image/png;base64", "extends 20.0 pixels"):
        assert part in text, part
    assert "http" not in text.replace("http-equiv", "")
    write_clean_copy(result, tmp_path / "cleaned", progress=False)
    assert "No errors" in write_page(check(tmp_path / "cleaned"), tmp_path / "clean.html").read_text()


def test_the_script_guards_a_pipeline_and_fixes(folder, tmp_path, monkeypatch, capsys):
    specification = importlib.util.spec_from_file_location("check_dataset_script", SCRIPT)
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments), "--num_workers", "1"])
        try:
            code = script.main()
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    code, output = run(folder)
    assert code == 0, output
    assert "0 errors, 0 warnings" in output
    exif_rotated(folder)
    assert run(folder)[0] == 0, "a warning only"
    assert run(folder, "--strict")[0] == 1
    nan(folder)
    partly_outside(folder)
    code, output = run(folder, "--fix", "cleaned", "--json", "findings.json")
    assert code == 1
    assert "annotation 3" in output
    assert "Correct or remove the record" in output
    assert "Cleaned copy in cleaned: " in output
    assert "1 box-not-numbers" in output
    assert "1 box-partly-outside" in output
    assert (tmp_path / "dataset_report.html").is_file()
    found = {f["code"] for f in json.loads((tmp_path / "findings.json").read_text())}
    assert found == {"box-not-numbers", "box-partly-outside", "image-exif-rotated"}
    assert run("cleaned")[0] == 0
    assert run(folder, "--fix", "cleaned")[0] == 2, "an existing folder is not overwritten"
    code, output = run(tmp_path / "nowhere")
    assert code == 2
    assert "There is no" in output
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.json").write_text("{")
    code, output = run(tmp_path / "broken")
    assert (code, "train.json is not valid JSON" in output) == (2, True)
    code, output = run(folder, "--report", folder / "report.html")
    assert code == 2
    assert "never modified" in output
