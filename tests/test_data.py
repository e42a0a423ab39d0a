"""The synthetic dataset, and any annotated folder to one schema."""

import copy
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from formats import WRITERS, rotated_jpeg, shapes
from PIL import Image

from hf_detr import DetrImageProcessor
from hf_detr.data import (
    DetectionCollator,
    category_ids,
    draw_shapes_dataset,
    export_coco,
    id2label,
    load_detection_dataset,
    source_of,
)
from hf_detr.data.schema import loaded_features, source_id
from hf_detr.data.shapes import draw_shapes_image


@pytest.fixture(scope="session")
def drawn(tmp_path_factory) -> tuple[Path, dict[str, dict]]:
    folder = tmp_path_factory.mktemp("shapes")
    return folder, shapes(folder, num_train=24, num_val=8)


@pytest.fixture(scope="session")
def drawn_few(tmp_path_factory) -> tuple[Path, dict[str, dict]]:
    folder = tmp_path_factory.mktemp("few")
    return folder, shapes(folder, num_train=8, num_val=2)


@pytest.fixture(scope="session")
def written(drawn, tmp_path_factory):
    """Folders, written once, with the drawn images in each format."""
    folders = {"coco": drawn[0]}

    def folder_of(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("formats") / name
            WRITERS[name](*drawn, folders[name])
        return folders[name]

    return folder_of


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def load(shared_cache):
    """Folders are cached by their path and content, so all tests share a cache."""

    def load_with_shared_cache(path, split="train", **kwargs):
        return load_detection_dataset(path, split, **{"cache_dir": shared_cache, "progress": False} | kwargs)

    return load_with_shared_cache


def pixels_and_boxes(rows) -> list:
    """What must be equal in all formats, by the pixels of the image, since names, ids and order differ between them."""
    content = {}
    for row in rows:
        objects = sorted(zip(row["objects"]["category"], row["objects"]["bbox"], row["objects"]["area"], strict=True))
        content[np.asarray(row["image"]).tobytes()] = (row["width"], row["height"], objects)
    return content


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory):
    return draw_shapes_dataset(tmp_path_factory.mktemp("shapes"), num_train=16, num_val=6, progress=False)


class TestShapes:
    def test_files_are_ordinary_coco_of_mixed_sizes(self, shapes_folder):
        for split, count in (("train", 16), ("val", 6)):
            content = json.loads((shapes_folder / "annotations" / f"instances_{split}.json").read_text())
            assert len(content["images"]) == count
            assert [category["name"] for category in content["categories"]] == ["rectangle", "ellipse", "triangle"]
            sizes = set()
            for record in content["images"]:
                with Image.open(shapes_folder / split / record["file_name"]) as image:
                    assert image.size == (record["width"], record["height"])
                    assert 96 <= min(image.size) <= max(image.size) <= 160
                    sizes.add(image.size)
            assert len(sizes) > count // 2

    def test_the_seed_decides_and_a_larger_set_starts_with_the_smaller_one(self, shapes_folder, tmp_path):
        other = draw_shapes_dataset(tmp_path, num_train=17, num_val=1, progress=False)
        for name in ("000000.jpg", "000015.jpg"):
            assert (other / "train" / name).read_bytes() == (shapes_folder / "train" / name).read_bytes()
        assert (other / "train" / "000000.jpg").read_bytes() != (other / "val" / "000000.jpg").read_bytes()

    def test_boxes_surround_the_shapes_and_stay_in_the_image(self):
        counts = []
        for index in range(60):
            image, objects = draw_shapes_image(np.random.default_rng(index))
            counts.append(len(objects))
            for class_id, (x, y, width, height) in objects:
                assert class_id in (0, 1, 2)
                assert x >= 0 and y >= 0 and x + width <= image.width and y + height <= image.height  # noqa: PT018
                assert width >= 4 and height >= 4  # noqa: PT018
        assert set(counts) == {0, 1, 2, 3, 4}

    def test_a_box_is_tight_around_its_shape(self):
        """Checked on pixels: the colour of a single shape ends at the edges of its box."""
        for seed in range(100):
            image, objects = draw_shapes_image(np.random.default_rng(seed))
            if len(objects) == 1:
                x, y, width, height = objects[0][1]
                pixels = np.asarray(image).astype(float)
                inside = pixels[round(y + height / 2), round(x + width / 2)]
                near = np.abs(pixels - inside).max(-1) < 60
                outside = near.copy()
                outside[max(0, int(y) - 1) : int(y + height) + 2, max(0, int(x) - 1) : int(x + width) + 2] = False
                assert near.sum() > outside.sum() + 0.3 * width * height
                return
        pytest.fail("no image with one object")

    def test_drawing_again_keeps_existing_files_and_raises_for_other_arguments(self, shapes_folder):
        before = {p: p.stat().st_mtime_ns for p in shapes_folder.rglob("*.jpg")}
        draw_shapes_dataset(shapes_folder, num_train=16, num_val=6, progress=False)
        assert {p: p.stat().st_mtime_ns for p in shapes_folder.rglob("*.jpg")} == before
        with pytest.raises(FileExistsError, match="was not drawn with seed=1"):
            draw_shapes_dataset(shapes_folder, num_train=16, num_val=6, seed=1, progress=False)


# -- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_loads_to_the_same_records(name, drawn, written, load):
    for split in ("train", "val"):
        expected, found = load(drawn[0], split), load(written(name), split)
        assert found.features == loaded_features(list(id2label(found).values()))
        a, b = pixels_and_boxes(expected), pixels_and_boxes(found)
        order = {index: list(id2label(expected).values()).index(label) for index, label in id2label(found).items()}
        assert a.keys() == b.keys()
        for key, (width, height, objects) in a.items():
            assert b[key][:2] == (width, height)
            again = sorted((order[c], bbox, area) for c, bbox, area in b[key][2])
            assert [c for c, _, _ in again] == [c for c, _, _ in objects]
            for (_, one, area), (_, other, other_area) in zip(objects, again, strict=True):
                assert other == pytest.approx(one, abs=1e-9)
                assert other_area == pytest.approx(area, abs=1), "COCO's own areas are of boxes before rounding"


@pytest.mark.parametrize("name", ["coco", *WRITERS])
def test_exported_as_coco_and_read_again_every_row_is_the_same(name, written, load, tmp_path):
    rows = load(written(name), "val")
    export_coco(rows, tmp_path / "out", "val", progress=False)
    again = load(tmp_path / "out", "val")
    assert id2label(again) == id2label(rows)
    assert category_ids(again) == category_ids(rows)
    assert len(again) == len(rows)
    for one, other in zip(rows, again, strict=True):
        assert {k: v for k, v in one.items() if k != "image"} == {k: v for k, v in other.items() if k != "image"}
        assert np.array_equal(np.asarray(one["image"]), np.asarray(other["image"]))
    with pytest.raises(FileExistsError, match=r"instances_val\.json already exists"):
        export_coco(rows, tmp_path / "out", "val")


def test_category_ids_of_the_source_become_class_ids_and_can_be_restored(drawn, load):
    rows = load(drawn[0])
    assert id2label(rows) == {0: "rectangle", 1: "ellipse", 2: "triangle"}
    assert category_ids(rows) == {0: 1, 1: 2, 2: 3}
    assert source_of(rows).endswith("instances_train.json")
    for derived in (rows.select([3, 1]), rows.map(lambda row: row), rows.shuffle(seed=0)):
        assert category_ids(derived) == {0: 1, 1: 2, 2: 3}


def test_classes_of_a_model_are_matched_by_name(drawn, load):
    names = {0: "N/A", 1: "triangle", 2: "N/A", 3: "ellipse", 4: "rectangle"}
    rows, plain = load(drawn[0], id2label=names), load(drawn[0])
    assert id2label(rows) == {0: "N/A", 1: "triangle", 2: "N/A (2)", 3: "ellipse", 4: "rectangle"}
    assert {1: 3, 3: 2, 4: 1}.items() <= category_ids(rows).items()
    assert len(set(category_ids(rows).values())) == 5
    for one, other in zip(rows, plain, strict=True):
        assert [{4: 0, 3: 1, 1: 2}[c] for c in one["objects"]["category"]] == other["objects"]["category"]
    with pytest.raises(ValueError, match=r"instances_train\.json has a category 'rectangle', which is none of"):
        load(drawn[0], id2label={0: "ellipse", 1: "triangle"})


def test_a_missing_validation_split_is_split_off_train_by_seed_with_a_warning(drawn, load, tmp_path, warnings):
    folder = tmp_path / "only-train"
    shutil.copytree(drawn[0], folder)
    (folder / "annotations" / "instances_val.json").unlink()
    train, val = load(folder, "train"), load(folder, "val")
    assert (len(train), len(val)) == (20, 4)
    assert not set(train["image_id"]) & set(val["image_id"])
    assert "split off with seed 0" in warnings.text
    assert set(load(folder, "val", seed=1)["image_id"]) != set(val["image_id"])
    assert load(folder, "val")["image_id"] == val["image_id"]
    assert len(load(folder, "train", validation_fraction=0)) == 24
    with pytest.raises(FileNotFoundError, match='No split "test"'):
        load(folder, "test")


def test_the_error_for_a_folder_without_annotations_names_the_layouts(load, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"(?s)instances_train\.json.*obj\.data.*metadata\.jsonl"):
        load(tmp_path / "empty")


def test_rows_come_from_the_cache_until_a_file_changes(drawn, load, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(drawn[0], folder)
    first = load(folder, cache_dir=tmp_path / "cache")
    calls = []
    monkeypatch.setattr("hf_detr.data.split_source.find_annotations", lambda *args: calls.append(args))
    assert load(folder, cache_dir=tmp_path / "cache")[0]["objects"] == first[0]["objects"]
    assert not calls, "nothing is parsed again"
    monkeypatch.undo()
    file = folder / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"] = content["annotations"][:3]
    file.write_text(json.dumps(content))
    changed = load(folder, cache_dir=tmp_path / "cache")
    assert sum(len(objects["bbox"]) for objects in changed["objects"]) == 3
    shutil.rmtree(tmp_path / "cache" / "generator")
    again = load(folder, cache_dir=tmp_path / "cache")
    assert sum(len(objects["bbox"]) for objects in again["objects"]) == 3, "a deleted Arrow file is written again"


def test_streaming_gives_the_same_rows(written, load):
    for name in ("coco", "parquet"):
        rows, stream = load(written(name), "val"), load(written(name), "val", streaming=True)
        assert isinstance(stream, datasets.IterableDataset)
        for one, other in zip(rows, stream, strict=True):
            assert one["image"].tobytes() == other["image"].tobytes(), "not encoded once more"
            assert one["objects"] == other["objects"]
            assert (one["width"], one["height"], one["image_id"]) == (
                other["width"],
                other["height"],
                other["image_id"],
            )


def test_crowds_stay_in_the_rows_and_out_of_the_labels(coco, load):
    folder = coco(lambda c, f: c["annotations"][0].update(iscrowd=1))
    row = next(row for row in load(folder) if row["objects"]["id"][:1] == [1])
    assert row["objects"]["iscrowd"][0] == 1
    batch = DetectionCollator(DetrImageProcessor(size={"height": 64, "width": 64}))([row])
    assert len(batch["labels"][0]["class_labels"]) == len(row["objects"]["bbox"]) - 1


def test_objects_without_area_crowd_and_ids_or_as_dicts_are_read(load, tmp_path):
    rows = [
        {"image": Image.new("RGB", (40, 30)), "objects": [{"bbox": [1, 2, 3, 4], "label": "b"}]},
        {"image": Image.new("L", (50, 20)), "objects": [{"bbox": [0, 0, 5, 5], "label": "a"}]},
        {"image": Image.new("RGB", (10, 10)), "objects": []},
    ]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "objects": datasets.List(
                {"bbox": datasets.List(datasets.Value("float32")), "label": datasets.Value("string")}
            ),
        }
    )
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    loaded = load(tmp_path / "saved", validation_fraction=0)
    assert loaded.features == loaded_features(["a", "b"])
    assert loaded[0]["objects"] == {
        "id": [1], "bbox": [[1.0, 2.0, 3.0, 4.0]], "category": [1], "area": [12.0], "iscrowd": [0],
    }  # fmt: skip
    assert loaded[2]["objects"]["bbox"] == []
    assert (loaded[1]["width"], loaded[1]["height"]) == (50, 20)


def test_rows_without_objects_are_not_a_detection_dataset(load, tmp_path):
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"has the columns .*a detection dataset must have image and objects"):
        load(tmp_path / "saved", validation_fraction=0)


def test_yolo_polygons_become_boxes_and_images_may_be_listed(load, tmp_path):
    (tmp_path / "d" / "images").mkdir(parents=True)
    (tmp_path / "d" / "labels").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (100, 50)).save(tmp_path / "d" / "images" / f"{name}.png")
    (tmp_path / "d" / "labels" / "a.txt").write_text("1 0.1 0.2 0.5 0.2 0.3 0.8\n")
    (tmp_path / "d" / "list.txt").write_text("images/a.png\nimages/b.png\n")
    (tmp_path / "d" / "data.yaml").write_text("train: list.txt\nnames: [x, y]\n")
    rows = load(tmp_path / "d", validation_fraction=0)
    assert rows[0]["objects"]["bbox"][0] == pytest.approx([10, 10, 40, 30])
    assert rows[0]["objects"]["category"] == [1]
    assert rows[1]["objects"]["bbox"] == [], "no label file means no objects"


def test_yolo_as_roboflow_writes_it(load, tmp_path):
    (tmp_path / "d" / "train" / "images").mkdir(parents=True)
    (tmp_path / "d" / "train" / "labels").mkdir()
    Image.new("RGB", (100, 50)).save(tmp_path / "d" / "train" / "images" / "a.jpg")
    (tmp_path / "d" / "train" / "labels" / "a.txt").write_text("0 0.5 0.5 0.2 0.4")
    (tmp_path / "d" / "data.yaml").write_text("train: ../train/images\nval: ../valid/images\nnc: 1\nnames: ['x']\n")
    for split in ("train", "val"):  # nothing may be split off train while the file names another place
        with pytest.raises(ValueError, match=r"names \.\./valid/images for the val images, which does not exist"):
            load(tmp_path / "d", split)
    (tmp_path / "d" / "data.yaml").write_text("train: ../train/images\nnc: 1\nnames: ['x']\n")
    assert load(tmp_path / "d", validation_fraction=0)[0]["objects"]["bbox"][0] == pytest.approx([40, 15, 20, 20])
    (tmp_path / "d" / "data.yaml").write_text("train: nowhere\nnames: ['x']\n")
    with pytest.raises(ValueError, match="names nowhere for the train images, which does not exist"):
        load(tmp_path / "d")


def yolo(folder: Path, yaml: str, label: str) -> Path:
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    Image.new("RGB", (64, 48)).save(folder / "images" / "a.png")
    (folder / "labels" / "a.txt").write_text(label)
    (folder / "data.yaml").write_text("train: images\n" + yaml)
    return folder


def test_yolo_classes_are_numbered_by_their_keys_and_keypoints_are_ignored(load, tmp_path):
    rows = load(yolo(tmp_path / "d", "names: {1: cat, 2: dog}\n", "1 .5 .5 .2 .2\n"), validation_fraction=0)
    assert id2label(rows)[rows[0]["objects"]["category"][0]] == "cat"
    assert category_ids(rows) == {0: 1, 1: 2}
    rows = load(
        yolo(tmp_path / "p", "kpt_shape: [2, 2]\nnames: [tiger]\n", "0 .5 .5 .2 .2 .45 .45 .55 .55\n"),
        validation_fraction=0,
    )
    assert rows[0]["objects"]["bbox"][0] == pytest.approx([25.6, 19.2, 12.8, 9.6])


def test_yolo_images_without_any_label_are_an_error(load, tmp_path):
    folder = yolo(tmp_path / "d", "names: [x]\n", "0 .5 .5 .2 .2\n")
    (folder / "labels").rename(folder / "label")
    with pytest.raises(ValueError, match="none of the 1 images has a box"):
        load(folder, validation_fraction=0)


def test_changes_outside_the_folder_and_behind_links_are_noticed(load, tmp_path):
    real = yolo(tmp_path / "real", "names: [x]\n", "0 .5 .5 .2 .2\n")
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "data.yaml").write_text("path: ../real\ntrain: images\nnames: [x]\n")
    (tmp_path / "linked").mkdir()
    for name in ("images", "labels"):
        (tmp_path / "linked" / name).symlink_to(real / name)
    shutil.copy(real / "data.yaml", tmp_path / "linked")
    folders = [tmp_path / "named", tmp_path / "linked"]
    before = [load(folder, validation_fraction=0)[0]["objects"]["bbox"][0] for folder in folders]
    (real / "labels" / "a.txt").write_text("0 .5 .5 .4 .4\n")
    after = [load(folder, validation_fraction=0)[0]["objects"]["bbox"][0] for folder in folders]
    for one, other in zip(before, after, strict=True):
        assert other[2] == pytest.approx(2 * one[2])
    (tmp_path / "linked" / "images").unlink()
    (tmp_path / "linked" / "images").mkdir()
    (tmp_path / "linked" / "images" / "deeper").symlink_to(real / "images")
    (tmp_path / "linked" / "labels").unlink()
    (tmp_path / "linked" / "labels" / "deeper").mkdir(parents=True)
    shutil.copy(real / "labels" / "a.txt", tmp_path / "linked" / "labels" / "deeper")
    assert len(load(tmp_path / "linked", validation_fraction=0)) == 1


@pytest.mark.parametrize("name", ["voc", "imagefolder", "coco"])
def test_a_split_with_fewer_classes_has_the_classes_of_train(name, drawn, load, tmp_path):
    contents = copy.deepcopy(drawn[1])
    shutil.copytree(drawn[0], tmp_path / "coco")
    contents["val"]["annotations"] = [r for r in contents["val"]["annotations"] if r["category_id"] == 3]
    contents["val"]["categories"] = contents["val"]["categories"][2:]
    (tmp_path / "coco" / "annotations" / "instances_val.json").write_text(json.dumps(contents["val"]))
    if name != "coco":
        WRITERS[name](tmp_path / "coco", contents, tmp_path / name)
    train, val = load(tmp_path / name, "train"), load(tmp_path / name, "val")
    assert id2label(train) == id2label(val)
    triangle = {label: index for index, label in id2label(train).items()}["triangle"]
    assert {c for row in val for c in row["objects"]["category"]} == {triangle}


def test_a_category_that_is_its_own_parent_is_a_class(coco, load):
    folder = coco(lambda c, f: c["categories"].append({"id": 9, "name": "person", "supercategory": "person"}))
    assert "person" in id2label(load(folder)).values()


def test_few_invalid_boxes_among_many_are_dropped_with_a_warning(coco, load, warnings):
    def many(content, _):
        image = content["images"][0]
        content["annotations"] += [
            {"id": 1000 + i, "image_id": image["id"], "category_id": 1, "bbox": [i % 40, i // 40, 20, 20]}
            for i in range(2100)
        ]
        content["annotations"][0]["bbox"] = [9, 18, 15, 0]

    rows = load(coco(many))
    assert 1 not in [i for row in rows for i in row["objects"]["id"]]
    assert "1 invalid boxes are dropped" in warnings.text
    assert "annotation 1: bbox [9, 18, 15, 0]: the box has no area" in warnings.text


def test_ids_that_are_not_numbers_or_not_unique(coco, drawn_few, load, tmp_path):
    def text_ids(content, _):
        for image in content["images"]:
            image["id"] = f"i{image['id']}"
        for record in content["annotations"]:
            record["image_id"] = f"i{record['image_id']}"

    rows = load(coco(text_ids))
    assert rows["image_id"] == list(range(1, 9))
    assert [source_id(row) for row in rows] == [f"i{number}" for number in range(1, 9)]
    assert sum(len(row["objects"]["bbox"]) for row in rows) > 0
    WRITERS["imagefolder"](*drawn_few, tmp_path / "i")
    file = tmp_path / "i" / "train" / "metadata.jsonl"
    file.write_text(file.read_text().replace('"image_id": 2', '"image_id": 1'))
    with pytest.raises(ValueError, match="has the same id as line 1"):
        load(tmp_path / "i")


def test_a_rare_class_without_class_labels_is_in_both_parts_of_a_split(load, tmp_path):
    rows = [
        {"image": Image.new("RGB", (40, 30), (i, 0, 0)), "objects": [{"bbox": [1, 2, 3, 4], "category_id": name}]}
        for i, name in enumerate(["rare"] + ["common"] * 19)
    ]
    datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
    train, val = load(tmp_path / "saved", "train"), load(tmp_path / "saved", "val")
    assert id2label(train) == id2label(val) == {0: "common", 1: "rare"}
    assert (len(train), len(val)) == (17, 3)


@pytest.mark.parametrize(
    ("json_place", "image_place", "prefix"),
    [
        ("result.json", "images", ""),
        ("annotations/instances_default.json", "images/default", ""),
        ("annotations/instances_train2017.json", "train2017", "train2017/"),
    ],
)
def test_layouts_of_other_tools_are_found(json_place, image_place, prefix, drawn_few, load, tmp_path):
    source, content = drawn_few[0], copy.deepcopy(drawn_few[1]["train"])
    folder = tmp_path / "d"
    for path in (folder / json_place, folder / image_place / "x"):
        path.parent.mkdir(parents=True, exist_ok=True)
    for image in content["images"]:
        shutil.copy(source / "train" / image["file_name"], folder / image_place / image["file_name"])
        image["file_name"] = prefix + image["file_name"]
    (folder / json_place).write_text(json.dumps(content))
    assert len(load(folder, validation_fraction=0)) == 8
    assert len(load(folder / json_place, validation_fraction=0)) == 8


def test_pixels_of_the_voc_challenge_count_from_one(load, tmp_path):
    (tmp_path / "d" / "Annotations").mkdir(parents=True)
    (tmp_path / "d" / "JPEGImages").mkdir()
    Image.new("RGB", (100, 50)).save(tmp_path / "d" / "JPEGImages" / "a.jpg")
    xml = (
        "<annotation><filename>a.jpg</filename><source><database>{}</database></source><size><width>100</width>"
        "<height>50</height></size><object><name>dog</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>100</xmax>"
        "<ymax>50</ymax></bndbox></object></annotation>"
    )
    for database, expected in (("The VOC2007 Database", [0, 0, 100, 50]), ("Unknown", [1, 1, 99, 49])):
        (tmp_path / "d" / "Annotations" / "a.xml").write_text(xml.format(database))
        assert load(tmp_path / "d", validation_fraction=0)[0]["objects"]["bbox"] == [expected]


def test_images_with_an_exif_orientation_are_loaded_as_shown(load, tmp_path):
    (tmp_path / "d" / "train").mkdir(parents=True)
    rotated_jpeg(tmp_path / "d" / "train" / "a.jpg", 80, 60)
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 60, "height": 80}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 5, "bbox": [5, 6, 7, 70]}],
        "categories": [{"id": 5, "name": "x"}],
    }
    (tmp_path / "d" / "train.json").write_text(json.dumps(content))
    row = load(tmp_path / "d", validation_fraction=0)[0]
    assert row["image"].size == (60, 80) == (row["width"], row["height"])
    content["images"][0] |= {"width": 80, "height": 60}
    (tmp_path / "d" / "train.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="recorded as 80 x 60, but the file has 60 x 80 as shown"):
        load(tmp_path / "d", validation_fraction=0)


# -- data that would break training -----------------------------------------------------------------------------------


@pytest.fixture
def coco(drawn_few, tmp_path):
    """A function that changes the annotations of a COCO folder, and returns it."""
    folder = Path(shutil.copytree(drawn_few[0], tmp_path / "coco"))
    content = copy.deepcopy(drawn_few[1]["train"])

    def write(change) -> Path:
        change(content, folder)
        (folder / "annotations" / "instances_train.json").write_text(json.dumps(content))
        return folder

    return write


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, f: c["annotations"][0].update(bbox=[1, 2, 0, 4]), "annotation 1: .*has no area"),
        (lambda c, f: c["annotations"][0].update(bbox=[1, 2, float("nan"), 4]), "the box is not finite"),
        (lambda c, f: c["annotations"][0].update(bbox=[1000, 2, 3, 4]), "the box is outside the image of"),
        (lambda c, f: c["annotations"][0].update(category_id=77), "there is no category 77"),
        (lambda c, f: (f / "train" / c["images"][0]["file_name"]).unlink(), "there is no such file"),
        (lambda c, f: (f / "train" / c["images"][0]["file_name"]).write_text("x"), "cannot be opened as an image"),
        (lambda c, f: c["images"][0].update(width=1), "recorded as 1 x"),
        (lambda c, f: c["images"].append(c["images"][0]), "has the same id as"),
        (lambda c, f: [a.update(bbox=_corners(a["bbox"])) for a in c["annotations"]], 'bbox_format="xyxy"'),
        (
            lambda c, f: (
                [a.update(bbox=_corners(a["bbox"])) for a in c["annotations"]]
                and [c["annotations"].append(a | {"id": 900 + i}) for i, a in enumerate(c["annotations"][:9] * 20)]
                and c["annotations"][0].update(bbox=[1, 1, 400, 300])
            ),
            'bbox_format="xyxy"',
        ),
        (lambda c, f: [a.update(bbox=[0.1, 0.2, 0.3, 0.3]) for a in c["annotations"]], "multiply by the width and "),
    ],
)
def test_data_that_would_break_training_are_an_error_with_record_and_fix(change, message, coco, load):
    with pytest.raises(ValueError, match=rf"(?s)instances_train\.json: \d+ problems.*{message}.*check_dataset"):
        load(coco(change))


def _corners(box: list[float]) -> list[float]:
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


def test_corners_are_loaded_on_request(coco, load):
    expected = json.loads((coco(lambda c, f: None) / "annotations" / "instances_train.json").read_text())["annotations"]
    folder = coco(lambda c, f: [a.update(bbox=_corners(a["bbox"])) for a in c["annotations"]])
    found = [box for row in load(folder, bbox_format="xyxy") for box in row["objects"]["bbox"]]
    assert np.allclose(found, [a["bbox"] for a in expected])


def test_broken_annotation_files_are_named(load, tmp_path):
    (tmp_path / "train.json").write_text("{")
    with pytest.raises(ValueError, match=r"train\.json is not valid JSON"):
        load(tmp_path)
    (tmp_path / "train.json").write_text('{"images": []}')
    with pytest.raises(ValueError, match=r"train\.json is not COCO: \['annotations', 'categories'\] are missing"):
        load(tmp_path)


def test_batches_fit_the_model(drawn, load):
    rows = load(drawn[0], "val")
    batch = DetectionCollator(DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}))(
        [rows[index] for index in range(4)]
    )
    assert batch["pixel_values"].shape[:2] == (4, 3)
    assert batch["pixel_mask"].shape == batch["pixel_values"].shape[:1] + batch["pixel_values"].shape[2:]
    for row, label in zip(rows, batch["labels"], strict=False):
        width, height = row["width"], row["height"]
        x, y, w, h = torch.tensor(row["objects"]["bbox"], dtype=torch.float64).reshape(-1, 4).unbind(1)
        expected = torch.stack(((x + w / 2) / width, (y + h / 2) / height, w / width, h / height), 1)
        assert torch.allclose(label["boxes"].double(), expected, atol=1e-6)
        assert label["image_id"].item() == row["image_id"]
