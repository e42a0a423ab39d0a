"""What people really bring: the samples of docs/layouts.md, and layouts, ids and files that deviate from them."""

import itertools
import json
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hf_detr.data import id2label
from hf_detr.data.schema import source_id
from hf_detr.dataset_check import check_dataset
from hf_detr.training import build_processor, load_data, parse_finetune_args

PAGE = Path(__file__).parents[1] / "docs" / "layouts.md"
SCENE = {("nut", (10, 20, 30, 40)), ("bolt", (50, 10, 20, 20))}


def _samples() -> dict[str, list[tuple[str, str]]]:
    """The code blocks of each section of the page: the path in their first line, and their content."""
    samples = {}
    tool = ""
    for heading, level, body in re.findall(r"^((##+) [^\n]*)\n(.*?)(?=^##|\Z)", PAGE.read_text() + "\n", re.M | re.S):
        title = heading.lstrip("# ")
        tool = title if level == "##" else tool
        blocks = re.findall(r"^```\w+ (\S+)\n(.*?)^```$", body, re.M | re.S)
        if blocks:
            samples[title if title == tool or tool in title else f"{tool}, {title}"] = blocks
    return samples


SAMPLES = _samples()


def image(path: Path, size: tuple[int, int] = (100, 80), colour: str = "white") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def scene(rows, index: int = 0) -> set:
    names, objects = id2label(rows), rows[index]["objects"]
    boxes = zip(objects["category"], objects["bbox"], strict=True)
    return {(names[category], tuple(round(value, 6) for value in bbox)) for category, bbox in boxes}


def test_the_page_has_every_tool():
    tools = ["CVAT", "Label Studio", "Roboflow", "FiftyOne", "labelImg", "labelme", "VIA", "Ultralytics", "darknet"]
    assert all(any(tool in title for title in SAMPLES) for tool in tools)
    assert len(SAMPLES) >= 20


@pytest.mark.parametrize("inside", ["", "export/"], ids=["at the top", "one folder deeper"])
@pytest.mark.parametrize("title", SAMPLES)
def test_every_sample_of_the_page_loads(title, inside, load, tmp_path):
    folder = tmp_path / "data"
    for path, content in SAMPLES[title]:
        if path == "images":
            for number, name in enumerate(content.split()):
                image(folder / inside / name, colour=["white", "grey"][number])
        else:
            write(folder / inside, {path: content})
    rows = load(folder)
    assert len(rows) == 1
    assert scene(rows) == SCENE
    if any(name in content for name in ("valid/", "/val", "autosplit_val") for _, content in SAMPLES[title]):
        val = load(folder, "val")
        assert [row["objects"]["bbox"] for row in val] == [[]]
        assert id2label(val) == id2label(rows)


# -- names and places that deviate -----------------------------------------------------------------------------------


def coco(file_name: str, **image_fields) -> str:
    """COCO with one image of the scene."""
    return json.dumps(
        {
            "images": [{"id": 1, "file_name": file_name, "width": 100, "height": 80} | image_fields],
            "categories": [{"id": 1, "name": "bolt"}, {"id": 2, "name": "nut"}],
            "annotations": [
                {"id": 1, "image_id": 1, "category_id": 2, "bbox": [10, 20, 30, 40]},
                {"id": 2, "image_id": 1, "category_id": 1, "bbox": [50, 10, 20, 20]},
            ],
        }
    )


LABELS = "1 0.25 0.5 0.3 0.5\n0 0.6 0.25 0.2 0.25\n"


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("a.jpg", "images/a.jpg"),
        ("images\\a.jpg", "images/a.jpg"),
        ("..\\..\\server\\files\\images\\a.jpg", "images/a.jpg"),
        ("/mnt/nas/project/images/a.jpg", "images/a.jpg"),
        ("C:\\data\\a.jpg", "images/a.jpg"),
        ("http://tool.example/data/upload/7/a.jpg?token=1", "images/a.jpg"),
        ("/data/local-files/?d=photos/a%20b.jpg", "images/a b.jpg"),
        ("s3://bucket/images/4/a.jpg", "images/4/a.jpg"),
        ("A.JPG", "images/a.jpg"),
        ("a", "images/a.jpg"),
        ("mu\u0308hle.jpg", "images/m\u00fchle.jpg"),
        ("M\u00dcHLE.jpg", "images/mu\u0308hle.jpg"),
        ("a.jpg", "somewhere/else/a.jpg"),
        ("left/a.jpg", "deep/left/a.jpg"),
    ],
)
def test_an_image_is_found_by_what_the_annotations_call_it(name, stored, load, tmp_path):
    image(tmp_path / "data" / stored)
    image(tmp_path / "data" / "deep" / "right" / "b.jpg")
    write(tmp_path / "data", {"result.json": coco(name)})
    assert scene(load(tmp_path / "data")) == SCENE


def test_an_image_that_two_files_could_be_is_not_guessed(load, tmp_path):
    for place in ("left", "right"):
        image(tmp_path / "data" / place / "a.jpg")
    write(tmp_path / "data", {"result.json": coco("a.jpg")})
    with pytest.raises(ValueError, match=r"image 1 \(a\.jpg\).*there is no such file"):
        load(tmp_path / "data")
    write(tmp_path / "data", {"result.json": coco("C:\\x\\right\\a.jpg")})
    assert len(load(tmp_path / "data")) == 1


def test_an_image_of_another_split_is_not_taken(load, tmp_path):
    """Both splits number their images from 1: the missing one is missing, and not the other split's."""
    image(tmp_path / "data" / "train" / "1.jpg")
    image(tmp_path / "data" / "val" / "2.jpg")
    write(tmp_path / "data", {"annotations/instances_val.json": coco("1.jpg")})
    with pytest.raises(ValueError, match=r"val.1\.jpg: there is no such file"):
        load(tmp_path / "data", "val")


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("instances_Train.json", "instances_Val.json"),
        ("annotations/train.json", "annotations/validation.json"),
        ("train/annotations.json", "valid/annotations.json"),
        ("labels/parts_train.json", "labels/parts_val.json"),
        ("annotations/train_annotations.json", "annotations/VALIDATION_annotations.json"),
        ("annotations/instances_training2024.json", "annotations/instances_val2024.json"),
        ("annotations/trainval.json", "annotations/val.json"),
        ("coco/Train/_annotations.coco.json", "coco/Valid/_annotations.coco.json"),
    ],
)
def test_the_files_of_splits_are_found_by_name_in_any_spelling(train, val, load, tmp_path):
    for name in ("a", "b"):
        image(tmp_path / "data" / "pictures" / f"{name}.jpg")
    write(tmp_path / "data", {train: coco("a.jpg"), val: coco("b.jpg")})
    assert load(tmp_path / "data")["file_name"] == ["a.jpg"]
    assert load(tmp_path / "data", "val")["file_name"] == ["b.jpg"]


def test_of_several_files_of_a_split_the_last_is_taken_and_said(load, tmp_path, warnings):
    for year in (2014, 2017):
        image(tmp_path / "data" / f"train{year}" / f"{year}.jpg")
        write(tmp_path / "data", {f"annotations/instances_train{year}.json": coco(f"{year}.jpg")})
    assert load(tmp_path / "data")["file_name"] == ["2017.jpg"]
    assert "instances_train2014.json, instances_train2017.json fit the split train; the last is taken" in warnings.text


def test_several_files_without_the_name_of_a_split_are_not_guessed(load, tmp_path):
    image(tmp_path / "data" / "a.jpg")
    write(tmp_path / "data", {"one.json": coco("a.jpg"), "two.json": coco("a.jpg")})
    with pytest.raises(ValueError, match=r"several COCO files.*one\.json, two\.json.*--train FILE --val FILE"):
        load(tmp_path / "data")
    rows = load(tmp_path / "data", files={"train": tmp_path / "data" / "two.json"})
    assert scene(rows) == SCENE


def test_images_and_labels_in_one_folder_each_with_lists_of_the_splits(load, tmp_path):
    """Ultralytics' autosplit: neither split owns the labels of the other, and README.txt is no label."""
    for name in ("a", "b", "c"):
        image(tmp_path / "data" / "images" / f"{name}.jpg")
        write(tmp_path / "data", {f"labels/{name}.txt": LABELS})
    write(
        tmp_path / "data",
        {
            "train.txt": "./images/a.jpg\n./images/c.jpg\n",
            "val.txt": "images/b.jpg",
            "labels/README.txt": "made by hand",
            "labels/classes.txt": "bolt\nnut\n",
            "labels/gone.txt": LABELS,
            "data.yaml": "train: train.txt\nval: val.txt\nnames: [bolt, nut]\n",
        },
    )
    assert load(tmp_path / "data")["file_name"] == ["a.jpg", "c.jpg"]
    assert scene(load(tmp_path / "data", "val")) == SCENE
    orphans = [f.record for f in check_dataset(tmp_path / "data", progress=False).findings if f.code.endswith("orphan")]
    assert set(orphans) == {"gone.txt"}, "only this label file has no image in any split"


@pytest.mark.parametrize(
    "entry", ["/content/drive/parts/images/train", "../parts/images/train", "C:\\w\\images\\train"]
)
def test_yolo_paths_of_another_machine_are_found_by_their_end(entry, load, tmp_path):
    image(tmp_path / "data" / "images" / "train" / "a.jpg")
    write(tmp_path / "data", {"labels/train/a.txt": LABELS, "data.yaml": f"train: '{entry}'\nnames: [bolt, nut]\n"})
    assert scene(load(tmp_path / "data")) == SCENE


def test_a_validation_split_that_is_named_is_never_replaced_by_training_images(load, tmp_path):
    image(tmp_path / "data" / "images" / "train" / "a.jpg")
    write(
        tmp_path / "data",
        {"labels/train/a.txt": LABELS, "data.yaml": "train: images/train\nval: pictures/val\nnames: [bolt, nut]\n"},
    )
    for split in ("train", "val"):
        with pytest.raises(ValueError, match=r"data\.yaml names pictures/val for the val images, which does not exist"):
            load(tmp_path / "data", split, validation_fraction=0.5)
    findings = check_dataset(tmp_path / "data", progress=False).errors
    assert ["names pictures/val" in finding.message for finding in findings] == [True]


def test_metadata_above_the_folders_of_splits_is_divided_by_them(load, tmp_path):
    rows = []
    for name in ("train/a.jpg", "val/b.jpg", "Test/c.jpg"):
        image(tmp_path / "data" / name)
        rows.append({"file_name": name, "objects": {"bbox": [[10, 20, 30, 40]], "category": ["nut"]}})
    write(tmp_path / "data", {"metadata.jsonl": "\n".join(map(json.dumps, rows))})
    for split, name in (("train", "train/a.jpg"), ("val", "val/b.jpg"), ("test", "Test/c.jpg")):
        assert load(tmp_path / "data", split)["file_name"] == [name]


def test_metadata_may_be_parquet(load, tmp_path):
    image(tmp_path / "data" / "train" / "a.jpg")
    objects = {"bbox": [[10, 20, 30, 40], [50, 10, 20, 20]], "category": ["nut", "bolt"]}
    table = pa.Table.from_pylist([{"file_name": "a.jpg", "objects": objects}])
    pq.write_table(table, tmp_path / "data" / "train" / "metadata.parquet")
    assert scene(load(tmp_path / "data")) == SCENE


def test_several_image_folders_for_one_file(load, tmp_path):
    for name in ("north/1.jpg", "south/2.jpg"):
        image(tmp_path / "data" / name)
    content = json.loads(coco("1.jpg"))
    content["images"].append({"id": 2, "file_name": "2.jpg", "width": 100, "height": 80})
    write(tmp_path / "data", {"boxes.json": json.dumps(content)})
    assert load(tmp_path / "data")["file_name"] == ["1.jpg", "2.jpg"]


def test_labels_beside_images_in_a_folder_called_images(load, tmp_path):
    image(tmp_path / "data" / "images" / "a.jpg")
    write(tmp_path / "data", {"images/a.txt": LABELS, "classes.txt": "bolt\nnut\n"})
    assert scene(load(tmp_path / "data")) == SCENE


def test_an_archive_is_named_with_what_to_do(load, tmp_path):
    write(tmp_path / "data", {"parts.zip": "PK", "README.md": "x"})
    with pytest.raises(FileNotFoundError, match=r"holds the archive parts\.zip: unpack it"):
        load(tmp_path / "data")
    with pytest.raises(ValueError, match=r"parts\.zip is an archive. Unpack it"):
        load(tmp_path / "data" / "parts.zip")


def test_files_and_images_can_be_named_in_every_format(load, tmp_path):
    image(tmp_path / "pictures" / "a.jpg")
    image(tmp_path / "pictures" / "b.jpg")
    xml = dict(SAMPLES["Label Studio, Pascal VOC"])["Annotations/4f2c-a.xml"].replace("4f2c-a", "a")
    labelme, via = dict(SAMPLES["labelme"])["a.json"], dict(SAMPLES["VIA (VGG Image Annotator)"])["via_project.json"]
    rows = dict(SAMPLES["Hugging Face imagefolder"])["train/metadata.jsonl"]
    named = {"boxes/x.json": coco("a.jpg"), "v/a.xml": xml, "lm/a.json": labelme, "q/w.json": via, "h/w.jsonl": rows}
    write(tmp_path / "files", named)
    for place in ("boxes/x.json", "v", "lm", "q/w.json", "h/w.jsonl"):
        train = load(tmp_path / "files", files={"train": tmp_path / "files" / place}, images=tmp_path / "pictures")
        assert scene(train) == SCENE, place
    train = load(
        tmp_path, files={"train": tmp_path / "files/boxes/x.json"}, images=tmp_path / "pictures", validation_fraction=0
    )
    assert len(train) == 1
    with pytest.raises(FileNotFoundError, match="Name its annotations with --val"):
        load(tmp_path / "files" / "boxes" / "x.json", "val", images=tmp_path / "pictures")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json does not exist"):
        load(tmp_path, files={"train": tmp_path / "nowhere.json"})
    write(tmp_path, {"notes.json": "[1, 2]"})
    with pytest.raises(
        ValueError, match=r"notes\.json is of none of the formats that can be read: COCO, COCO panoptic, YOLO"
    ):
        load(tmp_path, files={"train": tmp_path / "notes.json"})


# -- what is no content ------------------------------------------------------------------------------------------------


def test_litter_of_systems_and_editors_is_skipped_everywhere(load, tmp_path):
    folder = tmp_path / "data"
    for name in ("train/a.jpg", "train/.ipynb_checkpoints/a-checkpoint.jpg", "train/@eaDir/a.jpg/thumb.jpg"):
        image(folder / name)
    image(folder / "__MACOSX" / "train" / "a.jpg")
    write(
        folder, {"train/._a.jpg": "\0\5\x16\7", "train/Thumbs.db": "x", "train/._a.txt": "\0", "train/desktop.ini": ""}
    )
    write(folder, {"data.yaml": "train: train\nnames: [bolt, nut]\n", "train/a.txt": LABELS, "._data.yaml": "\0\5"})
    assert load(folder)["file_name"] == ["a.jpg"]
    assert check_dataset(folder, progress=False).errors == []
    write(folder, {"train.json": coco("a.jpg"), "._train.json": "\0\5"})
    (folder / "data.yaml").unlink()
    assert load(folder)["file_name"] == ["a.jpg"]
    assert [f.code for f in check_dataset(folder, progress=False).findings if f.code.startswith("image")] == []


# -- YOLO's names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("names: nut", "names must be a list such as"),
        ("names: {a: nut}", "the keys of names must be class numbers"),
        ("names: [nut, [1, 2]]", "names must be a list of class names"),
        ("names: [nut]\nnc: 2", "nc is 2, but names has 1 classes"),
        ("names: [", "is not valid YAML"),
    ],
)
def test_odd_names_are_refused_with_a_sentence(yaml, message, load, tmp_path):
    image(tmp_path / "data" / "images" / "a.jpg")
    write(tmp_path / "data", {"data.yaml": f"train: images\n{yaml}\n", "labels/a.txt": "0 .5 .5 .1 .1"})
    with pytest.raises(ValueError, match=rf"data\.yaml.*{message}"):
        load(tmp_path / "data")


def test_names_that_yaml_would_read_as_other_values_stay_text(load, tmp_path):
    image(tmp_path / "data" / "images" / "a.jpg")
    write(
        tmp_path / "data",
        {"data.yaml": "train: images\nnames: [on, off, 007, null, 1e3]", "labels/a.txt": "0 .5 .5 .1 .1"},
    )
    assert list(id2label(load(tmp_path / "data")).values()) == ["on", "off", "007", "null", "1e3"]


# -- on the command line -----------------------------------------------------------------------------------------------


def test_finetune_takes_files_that_the_user_names(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("a", "b"):
        image(tmp_path / "pictures" / f"{name}.jpg")
        write(tmp_path / "boxes", {f"{name}.json": coco(f"C:\\photos\\{name}.jpg")})
    named = ["--train", str(tmp_path / "boxes/a.json"), "--val", str(tmp_path / "boxes/b.json")]
    args = parse_finetune_args(None, [*named, "--images", str(tmp_path / "pictures"), "--image_range", "0", "4095"])
    assert not args.embedded
    splits = load_data(args, SimpleNamespace(is_main_process=False, main_process_first=nullcontext))
    assert [rows["file_name"] for rows in splits] == [["C:\\photos\\a.jpg"], ["C:\\photos\\b.jpg"]]
    assert scene(splits[1]) == SCENE
    assert build_processor(args).image_range == (0, 4095)
    with pytest.raises(SystemExit):
        parse_finetune_args(None, named[2:])


# -- what a sceptical reader broke -------------------------------------------------------------------------------------


def two_images(folder: Path, train: str, val: str) -> None:
    """One image per split with different colours, so that it is known which was taken."""
    image(folder / train, colour="white")
    image(folder / val, colour="grey")


def test_a_yaml_file_stands_for_all_of_its_splits(load, tmp_path):
    two_images(tmp_path, "images/train/a.jpg", "images/val/b.jpg")
    text = "train: images/train\nval: images/val\nnames: [bolt, nut]\n"
    write(tmp_path, {"data.yaml": text, "labels/train/a.txt": LABELS, "labels/val/b.txt": LABELS, "train.json": "{}"})
    for split, name in (("train", "a.jpg"), ("val", "b.jpg")):
        assert load(tmp_path / "data.yaml", split, validation_fraction=0.5)["file_name"] == [name]
    assert list(check_dataset(tmp_path / "data.yaml", progress=False).splits) == ["train", "val"]


def test_a_split_that_a_yaml_file_leaves_empty_is_looked_for(load, tmp_path, warnings):
    two_images(tmp_path / "d", "images/train/a.jpg", "images/val/b.jpg")
    write(
        tmp_path / "d", {"data.yaml": "train: images/train\nval:\nnames: [bolt, nut]\n", "labels/train/a.txt": LABELS}
    )
    assert load(tmp_path / "d", "val", validation_fraction=0.5)["file_name"] == ["b.jpg"]
    assert "data.yaml names no val images" in warnings.text


def test_an_image_in_another_folder_than_the_named_one_is_not_taken(load, tmp_path):
    image(tmp_path / "d" / "images" / "cam2" / "1.jpg")
    write(tmp_path / "d", {"train.json": coco("cam1/1.jpg")})
    with pytest.raises(ValueError, match=r"image 1 \(cam1/1\.jpg\).*there is no such file"):
        load(tmp_path / "d")


def test_each_folder_has_its_own_class_list(load, tmp_path):
    two_images(tmp_path / "d", "train/a.jpg", "val/b.jpg")
    write(tmp_path / "d", {"train/classes.txt": "bolt\nnut\n", "val/classes.txt": "nut\nbolt\n"})
    write(tmp_path / "d", {"train/a.txt": LABELS, "val/b.txt": "0 0.25 0.5 0.3 0.5\n1 0.6 0.25 0.2 0.25\n"})
    assert scene(load(tmp_path / "d")) == scene(load(tmp_path / "d", "val")) == SCENE
    image(tmp_path / "e" / "x" / "a.jpg")
    image(tmp_path / "e" / "y" / "b.jpg")
    write(
        tmp_path / "e",
        {"x/classes.txt": "bolt\nnut\n", "y/classes.txt": "nut\nbolt\n", "x/a.txt": LABELS, "y/b.txt": LABELS},
    )
    with pytest.raises(ValueError, match=r"The class lists .* differ"):
        load(tmp_path / "e")


XML = dict(SAMPLES["labelImg"])["a.xml"]


def test_lists_of_voc_are_of_their_tree_and_lists_of_classes_are_not_splits(load, tmp_path):
    for year in (2007, 2012):
        for name in ("a", "b"):
            image(tmp_path / f"VOC{year}" / "JPEGImages" / f"{name}.jpg", colour=str(["red", "blue"][year == 2012]))
            write(tmp_path / f"VOC{year}", {f"Annotations/{name}.xml": XML.replace("nut", f"nut{year}")})
        write(tmp_path / f"VOC{year}", {"ImageSets/Main/train.txt": "a\nb\n", "ImageSets/Main/nut_train.txt": "a 1\n"})
    rows = load(tmp_path)
    assert len(rows) == 4
    assert list(id2label(rows).values()) == ["bolt", "nut2007", "nut2012"]
    assert len(set(rows["image_id"])) == 4


@pytest.mark.parametrize(
    ("files", "unused"),
    [
        ({"instances_default.json": "c.jpg", "instances_Train.json": "a.jpg"}, "instances_default.json"),
        ({"train.json": "a.jpg", "train_old.json": "c.jpg"}, "train_old.json"),
        ({"train.json": "a.jpg", "dev.json": "c.jpg"}, "dev.json"),
    ],
)
def test_annotation_files_that_are_not_used_are_reported(files, unused, load, tmp_path, warnings):
    for name in ("a", "c"):
        image(tmp_path / "d" / "images" / f"{name}.jpg", colour={"a": "white", "c": "grey"}[name])
    write(tmp_path / "d", {name: coco(file_name) for name, file_name in files.items()})
    assert load(tmp_path / "d")["file_name"] == ["a.jpg"]
    assert "an annotation is not used (1 times)" in warnings.text
    findings = check_dataset(tmp_path / "d", progress=False).findings
    assert [finding.record for finding in findings if finding.code == "annotation-unused"] == [unused]


def test_annotations_beside_the_folders_of_splits_are_reported(load, tmp_path):
    for place in ("car", "bus", "train"):
        image(tmp_path / "d" / place / f"{place}.jpg")
        write(tmp_path / "d", {f"{place}/{place}.xml": XML})
    assert load(tmp_path / "d")["file_name"] == ["train.jpg"]
    findings = check_dataset(tmp_path / "d", progress=False).findings
    unused = [Path(finding.record).name for finding in findings if finding.code == "annotation-unused"]
    assert sorted(unused) == ["bus", "car"]


def test_the_parts_of_an_imagefolder_are_one_split_and_folders_that_only_sound_like_one_are_none(load, tmp_path):
    row = {"objects": {"bbox": [[10, 20, 30, 40]], "category": ["nut"]}}
    for part in ("x", "y"):
        image(tmp_path / "d" / "train" / part / f"{part}.jpg")
        write(tmp_path / "d", {f"train/{part}/metadata.jsonl": json.dumps({"file_name": f"{part}.jpg"} | row)})
    assert sorted(load(tmp_path / "d")["file_name"]) == ["x.jpg", "y.jpg"]
    names = ["line1/a.jpg", "test_rig/b.jpg"]
    for name in names:
        image(tmp_path / "e" / name)
    write(tmp_path / "e", {"metadata.jsonl": "\n".join(json.dumps({"file_name": name} | row) for name in names)})
    assert load(tmp_path / "e")["file_name"] == names


@pytest.mark.parametrize("kind", ["voc", "labelme"])
def test_images_of_one_name_in_two_folders_are_two_images(kind, load, tmp_path):
    text = XML if kind == "voc" else dict(SAMPLES["labelme"])["a.json"]
    for number, place in enumerate(("cam1", "cam2")):
        image(tmp_path / "d" / place / "a.jpg", colour=["white", "grey"][number])
        write(tmp_path / "d", {f"{place}/a.{'xml' if kind == 'voc' else 'json'}": text})
    rows = load(tmp_path / "d")
    assert [source_id(row) for row in rows] == ["cam1/a", "cam2/a"]
    assert [scene(rows, index) for index in range(2)] == [SCENE] * 2
    assert {np.asarray(row["image"]).mean() for row in rows} == {255.0, 128.0}


def test_labels_named_like_a_split_are_no_lists(load, tmp_path):
    for number in range(3):
        image(tmp_path / "d" / "images" / f"train_{number}.jpg")
    write(tmp_path / "d", {"classes.txt": "bolt\nnut\n", "labels/train_0.txt": "", "labels/train_1.txt": LABELS})
    write(tmp_path / "d", {"labels/train_2.txt": LABELS, "training notes.txt": "labelled by Ann\n"})
    rows = load(tmp_path / "d")
    assert [len(row["objects"]["bbox"]) for row in rows] == [0, 2, 2]


@pytest.mark.parametrize(
    "files",
    [
        {"a.jpg.aux.xml": "<PAMDataset/>"},
        {"settings.json": "{ // comment\n}"},
        {"train_log.json": '{"step": 1}\n{"step": 2}\n'},
        {"meta.yaml": "{% set x = 1 %}"},
        {"weights.data": "\0\x80\xff"},
        {"state.json": "{}"},
        {"annotations/image_info_test2017.json": '{"images": [], "categories": []}'},
    ],
    ids=lambda files: next(iter(files)),
)
@pytest.mark.parametrize("kind", ["COCO", "YOLO", "VOC", "labelme"])
def test_files_of_other_programs_change_nothing(kind, files, load, tmp_path):
    sample = {
        "COCO": {"train.json": coco("a.jpg")},
        "YOLO": {"data.yaml": "train: .\nnames: [bolt, nut]\n", "a.txt": LABELS},
        "VOC": {"a.xml": XML},
        "labelme": {"a.json": dict(SAMPLES["labelme"])["a.json"]},
    }[kind]
    image(tmp_path / "d" / "a.jpg")
    write(tmp_path / "d", sample)
    for name, text in files.items():
        write(tmp_path / "d", {name: ""})
        (tmp_path / "d" / name).write_bytes(text.encode("latin1"))
    pq.write_table(pa.table({"annotations": [1], "images": [2]}), tmp_path / "d" / "stats.parquet")
    assert scene(load(tmp_path / "d")) == SCENE
    assert check_dataset(tmp_path / "d", progress=False).errors == []
    with pytest.raises(FileNotFoundError, match='No split "val"'):
        load(tmp_path / "d", "val")


def test_shapes_without_a_box_are_skipped_and_counted(load, tmp_path):
    content = json.loads(dict(SAMPLES["labelme"])["a.json"])
    content["shapes"] += [
        {"label": "nut", "points": [[5, 5]], "shape_type": "point"},
        {"label": "nut", "points": [[5, 5], [50, 40]], "shape_type": "line"},
    ]
    image(tmp_path / "d" / "a.jpg")
    write(tmp_path / "d", {"a.json": json.dumps(content)})
    assert scene(load(tmp_path / "d")) == SCENE
    assert check_dataset(tmp_path / "d", progress=False).counts() == {"annotation-unused": 2}


# -- what must not go unnoticed --------------------------------------------------------------------------------------


CUT_OFF = '{"images": [], "annotations": [{"id": 1'


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *itertools.product(["valid/_annotations.coco.json", "valid/labels.json", "val.json"], ["{", CUT_OFF]),
        ("parts_val.json", CUT_OFF),  # with other content, nothing tells it from the log of another program
    ],
)
def test_a_broken_validation_file_is_never_replaced_by_training_images(name, text, load, tmp_path):
    two_images(tmp_path / "d", "train/a.jpg", "valid/b.jpg")
    write(tmp_path / "d", {"train/_annotations.coco.json": coco("a.jpg"), name: text})
    for split in ("train", "val"):
        with pytest.raises(ValueError, match=rf"{Path(name).name} is not valid JSON"):
            load(tmp_path / "d", split, validation_fraction=0.5)


def test_the_only_file_is_named_if_it_is_cut_off(load, tmp_path):
    image(tmp_path / "d" / "images" / "a.jpg")
    write(tmp_path / "d", {"result.json": coco("a.jpg")[:-40]})
    with pytest.raises(ValueError, match=r"result\.json is not valid JSON"):
        load(tmp_path / "d")


def test_files_of_labelme_may_be_called_like_a_split(load, tmp_path):
    for name in ("train_0", "val_1"):
        image(tmp_path / "d" / f"{name}.jpg")
        write(tmp_path / "d", {f"{name}.json": dict(SAMPLES["labelme"])["a.json"].replace("a.jpg", f"{name}.jpg")})
    assert sorted(load(tmp_path / "d")["file_name"]) == ["train_0.jpg", "val_1.jpg"]


def test_a_list_of_voc_may_be_named_by_a_relative_path(load, tmp_path, monkeypatch):
    for name in ("a", "b"):
        image(tmp_path / f"{name}.jpg")
        write(tmp_path, {f"{name}.xml": XML.replace("a.jpg", f"{name}.jpg")})
    write(tmp_path, {"mine.txt": "b\n"})
    monkeypatch.chdir(tmp_path)
    assert load(".", files={"train": "mine.txt"})["file_name"] == ["b.jpg"]


def test_all_metadata_outside_of_folders_of_splits_is_read_and_its_lines_are_named_with_the_file(load, tmp_path):
    row = {"objects": {"bbox": [[10, 20, 30, 40]], "category": ["nut"]}}
    for part in ("line1", "line2"):
        image(tmp_path / "d" / part / f"{part}.jpg")
        write(tmp_path / "d", {f"{part}/metadata.jsonl": json.dumps({"file_name": f"{part}.jpg"} | row)})
    assert load(tmp_path / "d")["file_name"] == ["line1.jpg", "line2.jpg"]
    write(tmp_path / "d", {"line2/metadata.jsonl": "{"})
    with pytest.raises(ValueError, match=r"line2.metadata\.jsonl line 1"):
        load(tmp_path / "d")


def test_rows_are_read_again_when_a_folder_that_was_named_changes(load, tmp_path):
    image(tmp_path / "pictures" / "a.jpg")
    write(tmp_path / "boxes", {"a.xml": XML})
    (tmp_path / "elsewhere").mkdir()

    def names():
        files = {"train": tmp_path / "boxes"}
        return list(id2label(load(tmp_path / "elsewhere", files=files, images=tmp_path / "pictures")).values())

    assert names() == ["bolt", "nut"]
    write(tmp_path / "boxes", {"a.xml": XML.replace("nut", "washer")})
    assert names() == ["bolt", "washer"]
