"""The doctor: every planted fault is found at its place, clean data raise no alarm, the cleaned copy is clean."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from formats import WRITERS, rotated_jpeg, shapes
from PIL import Image

from hf_detr.data import load_detection_dataset
from hf_detr.dataset_check import KINDS, examine, write_clean_copy, write_report

SCRIPT = Path(__file__).parents[1] / "examples" / "check_dataset.py"


def annotations_of(folder: Path, split: str = "train") -> Path:
    return folder / "annotations" / f"instances_{split}.json"


def edit(folder: Path, change, split: str = "train") -> None:
    content = json.loads(annotations_of(folder, split).read_text())
    change(content)
    annotations_of(folder, split).write_text(json.dumps(content))


def box(number: int, **values):
    return lambda content: content["annotations"][number].update(values)


def look(folder: Path, **kwargs):
    return examine(folder, progress=False, num_workers=1, **kwargs)


def file_of(content: dict, number: int) -> str:
    return content["images"][number]["file_name"]


def image_of_box(content: dict, number: int) -> dict:
    return next(i for i in content["images"] if i["id"] == content["annotations"][number]["image_id"])


# Each plants one fault into a clean folder and returns (code, part of the record, part of the message).
def truncated(folder):
    path = folder / "train" / "000003.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    return "image-truncated", "000003.jpg", "truncated"


def unreadable(folder):
    (folder / "train" / "000004.jpg").write_bytes(b"no image at all")
    return "image-unreadable", "000004.jpg", "cannot be opened"


def missing(folder):
    (folder / "train" / "000005.jpg").unlink()
    return "image-missing", "000005.jpg", "no such file"


def wrong_size(folder):
    edit(folder, lambda c: c["images"][6].update(width=c["images"][6]["width"] + 40))
    return "image-size", "000006.jpg", "recorded as"


def turned(folder):
    rotated_jpeg(folder / "train" / "turned.jpg", 80, 60)
    edit(folder, lambda c: c["images"].append({"id": 900, "file_name": "turned.jpg", "width": 80, "height": 60}))
    return "image-turned", "turned.jpg", "60 x 80 as it is shown"


def exif(folder):
    rotated_jpeg(folder / "train" / "turned.jpg", 80, 60)
    edit(folder, lambda c: c["images"].append({"id": 900, "file_name": "turned.jpg", "width": 60, "height": 80}))
    return "image-exif", "turned.jpg", "EXIF orientation 6"


def outside(folder):
    edit(folder, box(0, bbox=[5000, 10, 20, 20]))
    return "box-outside", "annotation 1", "lies outside"


def over_edge(folder):
    edit(folder, box(0, bbox=[-20, 10, 60, 20], area=1200))
    return "box-over-edge", "annotation 1", "reaches 20.0 pixels"


def empty(folder):
    edit(folder, box(1, bbox=[10, 10, 0, 20]))
    return "box-empty", "annotation 2", "has no area"


def negative(folder):
    edit(folder, box(1, bbox=[10, 10, 20, -3]))
    return "box-empty", "annotation 2", "has no area"


def nan(folder):
    edit(folder, box(2, bbox=[10, float("nan"), 20, 20]))
    return "box-not-numbers", "annotation 3", "not four finite numbers"


def three_numbers(folder):
    edit(folder, box(2, bbox=[10, 20, 30]))
    return "box-not-numbers", "annotation 3", "not four finite numbers"


def text_box(folder):
    edit(folder, box(2, bbox="10 20 30 40"))
    return "box-not-numbers", "annotation 3", "not four finite numbers"


def corners(folder):
    def change(content):
        for record in content["annotations"]:
            x, y, w, h = record["bbox"]
            record["bbox"] = [x, y, x + w, y + h]

    edit(folder, change)
    return "box-xyxy", "all", "as corners, none"


def relative(folder):
    def change(content):
        sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
        for record in content["annotations"]:
            (x, y, w, h), (width, height) = record["bbox"], sizes[record["image_id"]]
            record |= {"bbox": [x / width, y / height, w / width, h / height], "area": w * h / width / height}

    edit(folder, change)
    return "box-relative", "all", "at most 1.05"


def unknown_category(folder):
    edit(folder, box(3, category_id=42))
    return "category-unknown", "annotation 4", "no category 42"


def same_name(folder):
    edit(folder, lambda c: c["categories"].append({"id": 9, "name": "ellipse"}))
    edit(folder, box(0, category_id=9))
    return "category-name-twice", "categories", "'ellipse'"


def orphan(folder):
    edit(folder, box(4, image_id=4711))
    return "annotation-without-image", "annotation 5", "no image 4711"


def same_image_id(folder):
    edit(folder, lambda c: c["images"].append(c["images"][7] | {"file_name": "000008.jpg"}))
    return "image-id-twice", "image 8", "has the id of"


def nameless_record(folder):
    edit(folder, lambda c: c["images"].append({"id": 901}))
    return "image-record", "image number", "file_name"


def same_annotation_id(folder):
    edit(folder, box(6, id=6))
    return "annotation-id-twice", "annotation 6", "another annotation"


def wrong_area(folder):
    edit(folder, box(0, area=1e6))
    return "area-wrong", "annotation 1", "area 1000000.0"


def same_box(folder):
    edit(folder, lambda c: c["annotations"].append(c["annotations"][0] | {"id": 9999}))
    return "box-twice", "annotation 9999", "there twice"


def duplicate(folder):
    with Image.open(folder / "train" / "000009.jpg") as image:
        size = image.size
        image.resize((size[0] * 2, size[1] * 2)).save(folder / "train" / "copy.jpg", quality=70)
    record = {"id": 902, "file_name": "copy.jpg", "width": size[0] * 2, "height": size[1] * 2}
    edit(folder, lambda c: c["images"].append(record))
    return "image-twice", "copy.jpg", "shows the same as image 10"


def leak(folder):
    name = "leaked.jpg"
    (folder / "val" / name).write_bytes((folder / "train" / "000010.jpg").read_bytes())
    with Image.open(folder / "val" / name) as image:
        record = {"id": 903, "file_name": name, "width": image.width, "height": image.height}
    edit(folder, lambda c: c["images"].append(record), "val")
    return "image-in-both", name, "of train"


def unannotated(folder):
    Image.new("RGB", (50, 50), "red").save(folder / "train" / "forgotten.png")
    return "image-without-record", "forgotten.png", "no record"


def crowded(folder):
    def change(content):
        image = content["images"][0]
        content["annotations"] += [
            {"id": 5000 + i, "image_id": image["id"], "category_id": 1, "bbox": [i % 10 * 8, i // 10 * 6, 7, 5]}
            for i in range(101)
        ]

    edit(folder, change)
    return "objects-too-many", "000000.jpg", "more than 100 queries"


def tiny(folder):
    edit(folder, box(0, bbox=[10, 10, 1.5, 2], area=3))
    return "box-tiny", "annotation 1", "a cell is 32"


def no_boxes(folder):
    edit(folder, lambda c: c["categories"].append({"id": 9, "name": "hexagon"}))
    return "class-empty", "'hexagon'", "no boxes"


def rare(folder):
    def change(content):
        content["categories"].append({"id": 9, "name": "hexagon"})
        content["annotations"] += [
            {"id": 5000 + i, "image_id": image["id"], "category_id": c, "bbox": [2 + c, 3, 20, 20 + i % 3]}
            for i, image in enumerate(content["images"])
            for c in (1, 2, 3)
        ]
        content["annotations"][0]["category_id"] = 9
        for number, record in enumerate(content["annotations"]):
            record["id"] = number + 1

    edit(folder, change)
    return "class-rare", "'hexagon'", "has 1 boxes"


def only_in_validation(folder):
    edit(folder, lambda c: c["categories"].append({"id": 9, "name": "hexagon"}), "val")
    edit(folder, box(0, category_id=9), "val")
    return "class-only-in-val", "'hexagon'", "none in train"


def nothing_annotated(folder):
    edit(folder, lambda c: c.update(annotations=[]))
    return "boxes-none", "COCO", "without a single box"


def broken_json(folder):
    annotations_of(folder).write_text("{")
    return "annotation-unreadable", "annotations", "not valid JSON"


FAULTS = [
    truncated, unreadable, missing, wrong_size, turned, exif, outside, over_edge, empty, negative, nan, three_numbers,
    text_box, corners, relative, unknown_category, same_name, orphan, same_image_id, nameless_record,
    same_annotation_id, wrong_area, same_box, duplicate, leak, unannotated, crowded, tiny, no_boxes, rare,
    only_in_validation, nothing_annotated, broken_json,
]  # fmt: skip
# what a fault brings along: a record that another kind of finding is right about, too
ALSO = {
    "truncated": {"image-truncated"},
    "unreadable": {"image-unreadable"},
    "missing": {"image-missing"},
    "broken_json": {"class-only-in-val", "annotation-unreadable"},
    "only_in_validation": {"class-only-in-val"},
    "nothing_annotated": {"boxes-none", "class-empty", "class-only-in-val"},
    "crowded": {"objects-too-many", "class-rare", "box-over-edge"},
}


@pytest.fixture(scope="module")
def clean_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clean")
    shapes(folder, 60, 12)
    return folder


@pytest.fixture
def folder(clean_folder, tmp_path):
    import shutil

    return Path(shutil.copytree(clean_folder, tmp_path / "data"))


@pytest.mark.parametrize("name", ["coco", *(name for name in WRITERS if name not in ("saved", "parquet"))])
def test_clean_data_raise_no_alarm_in_any_format(name, clean_folder, tmp_path):
    place = clean_folder
    if name != "coco":
        place = tmp_path / name
        contents = {s: json.loads(annotations_of(clean_folder, s).read_text()) for s in ("train", "val")}
        WRITERS[name](clean_folder, contents, place)
    examination = look(place)
    assert examination.findings == []
    assert {split: len(source.photos) for split, source in examination.sources.items()} == {"train": 60, "val": 12}


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_every_planted_fault_is_found_at_its_place_and_nothing_else(plant, folder):
    code, record, message = plant(folder)
    examination = look(folder)
    found = [f for f in examination.findings if f.code == code]
    assert len(found) == 1, examination.counts()
    assert record in found[0].record
    assert message in found[0].message
    assert found[0].file
    assert set(examination.counts()) <= ALSO.get(plant.__name__, {code}), examination.counts()


def test_faults_of_yolo_and_voc_files_are_found_too(clean_folder, tmp_path):
    contents = {s: json.loads(annotations_of(clean_folder, s).read_text()) for s in ("train", "val")}
    WRITERS["yolo"](clean_folder, contents, tmp_path / "yolo")
    labels = tmp_path / "yolo" / "labels" / "train"
    (labels / "000000.txt").write_text(
        "0 0.5 0.5 0.2\n1 a b c d\n7 0.5 0.5 0.2 0.2\n0 50 60 20 30\n2 0.5 0.5 nan 0.1\n"
    )
    (labels / "nobody.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    found = {(f.code, f.record.split(", ")[-1]) for f in look(tmp_path / "yolo").errors}
    assert found == {
        ("box-not-numbers", "000000.txt line 1"), ("box-not-numbers", "000000.txt line 2"),
        ("category-unknown", "000000.txt line 3"), ("box-not-numbers", "000000.txt line 4"),
        ("box-not-numbers", "000000.txt line 5"), ("annotation-without-image", "nobody.txt"),
    }  # fmt: skip
    WRITERS["voc"](clean_folder, contents, tmp_path / "voc")
    xml = tmp_path / "voc" / "Annotations"
    (xml / "train_000001.xml").write_text("<annotation><object>")
    (xml / "train_000002.xml").write_text(
        "<annotation><object><name>ellipse</name><bndbox><xmin>1</xmin></bndbox></object>"
        "<object><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>"
    )
    found = {(f.code, f.record.split(", ")[-1]) for f in look(tmp_path / "voc").errors}
    assert found == {
        ("annotation-unreadable", "train_000001.xml"), ("box-not-numbers", "train_000002.xml object 1"),
        ("category-unknown", "train_000002.xml object 2"),
    }  # fmt: skip


def test_all_faults_together_are_all_found_and_the_cleaned_copy_is_clean(folder, tmp_path):
    apart = {corners, relative, broken_json, nothing_annotated, negative, three_numbers, text_box, turned, over_edge}
    apart |= {wrong_area, tiny, rare, outside, no_boxes}
    together = [plant for plant in FAULTS if plant not in apart]
    expected = {plant(folder)[0] for plant in together}
    examination = look(folder)
    assert expected <= set(examination.counts())
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    done = write_clean_copy(examination, tmp_path / "out", progress=False)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before, "only read"
    assert {"image-truncated", "image-missing", "image-id-twice", "image-in-both", "box-empty"} <= done.keys()
    again = look(tmp_path / "out")
    assert {f.code for f in again.errors} <= {"class-only-in-val"}, [str(f) for f in again.errors]
    assert len(again.sources["val"].photos) == 13, "of a leak, the training image goes"
    assert len(again.sources["train"].photos) == 62 - 6  # truncated, unreadable, missing, size, leak, id
    load_detection_dataset(tmp_path / "out", cache_dir=tmp_path / "cache", progress=False)


@pytest.mark.parametrize("plant", [corners, relative, over_edge, wrong_area])
def test_what_can_be_put_right_is_put_right(plant, folder, tmp_path):
    truth = copy.deepcopy(json.loads(annotations_of(folder).read_text()))
    plant(folder)
    write_clean_copy(look(folder), tmp_path / "out", progress=False)
    fixed = json.loads(annotations_of(tmp_path / "out").read_text())
    assert look(tmp_path / "out").findings == []
    assert len(fixed["annotations"]) == len(truth["annotations"])
    for record, original in zip(fixed["annotations"], truth["annotations"], strict=True):
        if plant is over_edge and original["id"] == 1:
            assert record["bbox"] == [0, 10, 40, 20]
            assert record["area"] == 800
        else:
            assert record["bbox"] == pytest.approx(original["bbox"], abs=1e-6)


def test_a_still_camera_takes_different_images(tmp_path):
    rng = np.random.default_rng(0)
    background = rng.uniform(60, 180, (480, 640, 3))
    contents = {}
    for split, count in (("train", 12), ("val", 4)):
        (tmp_path / "d" / split).mkdir(parents=True)
        images, annotations = [], []
        for i in range(count):
            frame = background + rng.normal(0, 6, background.shape)
            x, y = int(rng.integers(0, 600)), int(rng.integers(0, 440))
            frame[y : y + 40, x : x + 40] = (220, 20, 20)
            Image.fromarray(frame.clip(0, 255).astype(np.uint8)).save(tmp_path / "d" / split / f"{i}.jpg")
            images.append({"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480})
            annotations.append({"id": i, "image_id": i, "category_id": 1, "bbox": [x, y, 40, 40]})
        contents[split] = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
        (tmp_path / "d" / f"{split}.json").write_text(json.dumps(contents[split]))
    assert look(tmp_path / "d").counts() == {}


def test_a_cleaned_copy_has_one_table_of_categories(clean_folder, tmp_path):
    contents = {s: json.loads(annotations_of(clean_folder, s).read_text()) for s in ("train", "val")}
    contents["val"]["annotations"] = [r for r in contents["val"]["annotations"] if r["category_id"] == 3]
    WRITERS["voc"](clean_folder, contents, tmp_path / "voc")
    write_clean_copy(look(tmp_path / "voc"), tmp_path / "out", progress=False)
    tables = [
        {c["name"]: c["id"] for c in json.loads(annotations_of(tmp_path / "out", s).read_text())["categories"]}
        for s in ("train", "val")
    ]
    assert tables[1].items() <= tables[0].items()


def test_a_cleaned_copy_never_goes_over_something(folder, tmp_path):
    examination = look(folder)
    with pytest.raises(FileExistsError, match="never written to"):
        write_clean_copy(examination, folder / "cleaned")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        write_clean_copy(examination, tmp_path / "full")


def test_parallel_and_serial_examination_agree(folder):
    for plant in (truncated, duplicate, leak, nan):
        plant(folder)
    one = look(folder)
    two = examine(folder, progress=False, num_workers=2)
    assert [str(f) for f in one.findings] == [str(f) for f in two.findings]


def test_every_kind_has_a_planted_fault(folder, tmp_path):
    import shutil

    planted = set()
    for number, plant in enumerate(FAULTS):
        planted.add(plant(Path(shutil.copytree(folder, tmp_path / str(number))))[0])
    assert set(KINDS) - planted == {"split-empty"}


def test_an_empty_split_and_a_folder_without_annotations_are_told(folder, tmp_path):
    edit(folder, lambda c: c.update(images=[], annotations=[]), "val")
    for path in (folder / "val").iterdir():
        path.unlink()
    assert [f.code for f in look(folder).findings] == ["split-empty"]
    with pytest.raises(FileNotFoundError, match="no annotations"):
        look(tmp_path / "annotations-nowhere")


def test_the_report_shows_findings_statistics_and_pictures_and_links_to_nothing(folder, tmp_path):
    for plant in (truncated, over_edge, same_name):
        plant(folder)
    text = write_report(look(folder), tmp_path / "deep" / "report.html").read_text()
    for part in ("2 errors", "Boxes by class", "Size of boxes", "data:image/png;base64", "reaches 20.0 pixels"):
        assert part in text, part
    assert "http" not in text.replace("http-equiv", "")
    assert (
        "nothing that would break training"
        in write_report(look(tmp_path_clean(folder, tmp_path)), tmp_path / "clean.html").read_text()
    )


def tmp_path_clean(folder: Path, tmp_path: Path) -> Path:
    write_clean_copy(look(folder), tmp_path / "cleaned", progress=False)
    return tmp_path / "cleaned"


def test_the_script_guards_a_pipeline_and_fixes(folder, tmp_path):
    def run(*arguments):
        done = subprocess.run(
            [sys.executable, SCRIPT, *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr

    code, output = run(folder, "--num_workers", 1)
    assert code == 0, output
    assert "0 errors, 0 warnings" in output
    nan(folder)
    over_edge(folder)
    code, output = run(folder, "--fix", "cleaned", "--json", "findings.json", "--num_workers", 1)
    assert code == 1
    assert "annotation 3" in output
    assert "Correct or remove the record" in output
    assert "Cleaned copy in cleaned: 1 box-not-numbers, 1 box-over-edge" in output or "1 box-over-edge" in output
    assert (tmp_path / "dataset_report.html").is_file()
    assert {f["code"] for f in json.loads((tmp_path / "findings.json").read_text())} == {
        "box-not-numbers",
        "box-over-edge",
    }
    assert run("cleaned", "--num_workers", 1)[0] == 0
    exif(folder)
    assert run("cleaned", "--strict", "--num_workers", 1)[0] == 0
    assert run(tmp_path / "nowhere")[0] == 2
    code, output = run(folder, "--report", folder / "report.html")
    assert code == 2
    assert "which is only read" in output
