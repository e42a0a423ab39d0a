"""Ids, flags, contradictions and values as people bring them, in folders and in Hugging Face datasets."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hf_detr import DetrImageProcessor
from hf_detr.data import (
    AugmentedDataset,
    DetectionCollator,
    export_coco,
    flip_rotate_augmentation,
    id2label,
)
from hf_detr.data.schema import source_id
from hf_detr.dataset_check import check_dataset, findings_page
from hf_detr.evaluation import CocoEvaluator
from hf_detr.visualization import compare_with_ground_truth


def write_coco(folder: Path, ids: list, boxes: list[dict] | None = None, split: str = "train", **extra) -> Path:
    """COCO with one image of noise per id, and by default one nut in each."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(split))
    images = []
    for number, image_id in enumerate(ids):
        pixels = rng.integers(0, 255, (8, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((100, 80), Image.Resampling.NEAREST).save(folder / split / f"{number}.png")
        images.append({"id": image_id, "file_name": f"{number}.png", "width": 100, "height": 80})
    nuts = [{"image_id": i, "category_id": 1, "bbox": [10 * n, 5, 10, 10], "area": 100} for n, i in enumerate(ids)]
    annotations = [{"id": number} | box for number, box in enumerate(nuts if boxes is None else boxes, start=1)]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "nut"}]} | extra
    (folder / f"{split}.json").write_text(json.dumps(content))
    return folder


# -- A: ids ------------------------------------------------------------------------------------------------------------

OFFSET = 20210312103000120
IDS = {
    "beyond 2^53": [OFFSET + i for i in range(8)],
    "beyond 2^63": [2**63 + i for i in range(8)],
    "negative": [-1 - i for i in range(8)],
    "text": [f"cam1_{i}" for i in range(8)],
    "text of numbers": [str(OFFSET + i) for i in range(8)],
    "hexadecimal": [f"65a{i}" for i in range(8)],
    "mixed": [1, "cam", 3.0, "007", 2**70, -4, "x/y", 9],
}


@pytest.mark.parametrize("kind", IDS)
def test_results_of_images_with_any_ids_are_of_these_images(kind, load, tmp_path):
    """Every detection is on the wrong image, so AP is 0; on the right one it is 1. Results have the source's ids."""
    ids = IDS[kind]
    folder = write_coco(tmp_path / "data", ids)
    rows = load(folder)
    found = [source_id(row) for row in rows]
    assert found == [int(i) if str(i).isdecimal() and str(int(i)) == str(i) else int(i) if i == 3.0 else i for i in ids]
    for swapped, expected in ((1, 0.0), (0, 1.0)):
        evaluator = CocoEvaluator(rows)
        for index in range(8):
            x, y, w, h = rows[index ^ swapped]["objects"]["bbox"][0]
            result = {
                "boxes": torch.tensor([[x, y, x + w, y + h]]),
                "scores": torch.tensor([0.9]),
                "labels": torch.tensor([0]),
            }
            evaluator.update([rows[index]["image_id"]], [result])
        assert evaluator.compute()["AP"] == pytest.approx(expected)
        assert [detection["image_id"] for detection in evaluator.detections()] == found
        assert compare_with_ground_truth(rows, evaluator.detections()).size[0] > 0


@pytest.mark.parametrize("kind", IDS)
def test_ids_of_any_kind_travel_through_batches_and_export(kind, load, tmp_path):
    rows = load(write_coco(tmp_path / "data", IDS[kind]))
    loader = DataLoader(
        rows, batch_size=3, collate_fn=DetectionCollator(DetrImageProcessor(size={"height": 32, "width": 32}))
    )
    seen = [int(label["image_id"]) for batch in loader for label in batch["labels"]]
    assert seen == rows["image_id"]
    assert len(set(seen)) == 8
    export_coco(rows, tmp_path / "out", "train", progress=False)
    assert [source_id(row) for row in load(tmp_path / "out")] == [source_id(row) for row in rows]


def test_annotations_find_images_whose_ids_are_written_in_another_form(load, tmp_path):
    forms = [str, float, int, str]
    boxes = [{"image_id": form(i), "category_id": "1", "bbox": [1, 1, 9, 9]} for i, form in enumerate(forms)]
    rows = load(write_coco(tmp_path / "data", [0, 1, 2, 3], boxes))
    assert [len(row["objects"]["bbox"]) for row in rows] == [1, 1, 1, 1]


def test_category_ids_may_be_text(load, tmp_path):
    categories = [{"id": "n-1", "name": "nut"}, {"id": "b-1", "name": "bolt"}]
    boxes = [{"image_id": 1, "category_id": "n-1", "bbox": [1, 1, 9, 9]}]
    rows = load(write_coco(tmp_path / "data", [1], boxes, categories=categories))
    evaluator = CocoEvaluator(rows)
    result = {"boxes": torch.tensor([[1.0, 1, 10, 10]]), "scores": torch.tensor([0.9]), "labels": torch.tensor([1])}
    evaluator.update([1], [result])
    assert id2label(rows) == {0: "bolt", 1: "nut"}
    assert evaluator.detections()[0]["category_id"] == "n-1"
    assert evaluator.compute()["AP"] == pytest.approx(1)


# -- E: contradictions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["0", "false", "False", 0, 0.0, False, None, "no", ""])
def test_flags_that_are_not_set_are_no_crowds(value, load, tmp_path):
    boxes = [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "iscrowd": value}]
    rows = load(write_coco(tmp_path / "data", [1], boxes))
    assert rows[0]["objects"]["iscrowd"] == [0]


@pytest.mark.parametrize(("name", "value"), [("iscrowd", "1"), ("iscrowd", True), ("iscrowd", "true"), ("ignore", 1)])
def test_flags_that_are_set_are_crowds_which_are_not_learned(name, value, load, tmp_path):
    boxes = [{"image_id": 1, "category_id": 1, "bbox": [1 + 10 * i, 1, 9, 9]} for i in range(4)]
    boxes[0][name] = value
    rows = load(write_coco(tmp_path / "data", [1], boxes))
    assert rows[0]["objects"]["iscrowd"] == [1, 0, 0, 0]
    batch = DetectionCollator(DetrImageProcessor(size={"height": 32, "width": 32}))([rows[0]])
    assert len(batch["labels"][0]["class_labels"]) == 3


def test_a_flag_that_is_neither_is_an_error(load, tmp_path):
    boxes = [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "iscrowd": "maybe"}]
    with pytest.raises(ValueError, match="annotation 1: iscrowd must be 0 or 1, got 'maybe'"):
        load(write_coco(tmp_path / "data", [1], boxes))


@pytest.mark.parametrize("split", ["train", "val"])
def test_objects_that_are_all_marked_as_crowds_are_an_error_with_a_way_out(split, load, tmp_path):
    write_coco(tmp_path / "data", list(range(8)))
    boxes = [{"image_id": i % 8, "category_id": 1, "bbox": [1, 1 + i, 9, 9], "iscrowd": 1} for i in range(20)]
    write_coco(tmp_path / "data", list(range(8)), boxes, split)
    with pytest.raises(ValueError, match=r"20 of 20 boxes.*--crowds_as_objects"):
        load(tmp_path / "data", split)
    rows = load(tmp_path / "data", split, crowds_as_objects=True)
    assert [crowd for row in rows for crowd in row["objects"]["iscrowd"]] == [0] * 20
    result = check_dataset(tmp_path / "data", progress=False)
    assert "crowds-only" in {finding.code for finding in result.errors}
    assert check_dataset(tmp_path / "data", crowds_as_objects=True, progress=False).errors == []


def voc(filename: str, boxes: str, size: str = "<size><width>100</width><height>80</height></size>") -> str:
    return f"<annotation><filename>{filename}</filename>{size}{boxes}</annotation>"


def voc_object(name: str, box: tuple, extra: str = "") -> str:
    corners = "".join(f"<{c}>{v}</{c}>" for c, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name>{extra}<bndbox>{corners}</bndbox></object>"


def test_a_stale_file_name_in_voc_does_not_move_boxes_to_another_image(load, tmp_path):
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (100, 80), colour).save(tmp_path / f"{name}.png")
    (tmp_path / "a.xml").write_text(voc("b.png", voc_object("nut", (1, 1, 20, 20))))
    (tmp_path / "b.xml").write_text(voc("a.png", voc_object("nut", (50, 50, 90, 70))))
    found = {row["file_name"]: row["objects"]["bbox"] for row in load(tmp_path)}
    assert found == {"a.png": [[1, 1, 19, 19]], "b.png": [[50, 50, 40, 20]]}
    assert check_dataset(tmp_path, progress=False).counts()["image-name-stale"] == 2


def test_difficult_objects_of_voc_are_ignored_in_training_and_evaluation(load, tmp_path):
    Image.new("RGB", (100, 80)).save(tmp_path / "a.png")
    objects = voc_object("nut", (1, 1, 20, 20)) + voc_object("nut", (50, 50, 90, 70), "<difficult>1</difficult>")
    (tmp_path / "a.xml").write_text(voc("a.png", objects))
    rows = load(tmp_path)
    assert rows[0]["objects"]["iscrowd"] == [0, 1]
    evaluator = CocoEvaluator(rows)
    boxes = torch.tensor([[50.0, 50, 90, 70], [1, 1, 20, 20]])
    result = {"boxes": boxes, "scores": torch.tensor([0.9, 0.8]), "labels": torch.tensor([0, 0])}
    evaluator.update(rows["image_id"], [result])
    assert evaluator.compute()["AP"] == pytest.approx(1), "the detection of the difficult object is not counted"


@pytest.mark.parametrize("size", [(0, 0), (-1, -1), (None, None), ("", "")])
def test_sizes_that_are_not_known_are_taken_from_the_file(size, load, tmp_path):
    folder = write_coco(tmp_path / "data", [1])
    content = json.loads((folder / "train.json").read_text())
    content["images"][0] |= {"width": size[0], "height": size[1]}
    (folder / "train.json").write_text(json.dumps(content))
    assert (load(folder)[0]["width"], load(folder)[0]["height"]) == (100, 80)


# -- boxes that are no lists, and masks --------------------------------------------------------------------------------


def test_masks_without_a_box_become_their_bounding_box(load, tmp_path):
    """Columns 20..39 and rows 10..29 of a 100 x 80 mask, as polygon, and as runs of zeros and ones down the columns."""
    runs = [20 * 80 + 10] + [20, 60] * 19 + [20]
    runs += [100 * 80 - sum(runs)]
    masks = {
        "polygon": [[20, 10, 40, 10, 40, 30, 20, 30]],
        "two polygons": [[20, 10, 25, 10, 25, 15], [30, 20, 40, 20, 40, 30]],
        "runs": {"counts": runs, "size": [80, 100]},
        "compressed": _compressed(runs),
    }
    boxes = [{"image_id": 1, "category_id": 1, "segmentation": mask} for mask in masks.values()]
    rows = load(write_coco(tmp_path / "data", [1], boxes))
    assert rows[0]["objects"]["bbox"] == [[20, 10, 20, 20]] * 4


def _compressed(runs: list[int]) -> dict:
    from pycocotools import mask

    encoded = mask.frPyObjects({"counts": runs, "size": [80, 100]}, 80, 100)
    return {"counts": encoded["counts"].decode(), "size": [80, 100]}


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ({"bbox": {"left": 1}}, "bbox must be"),
        ({"bbox": "1 2 3 4"}, "bbox must be"),
        ({"bbox": [1, 2, 3]}, "bbox must be"),
        ({"bbox": [1, None, 3, 4]}, "bbox must be"),
        ({}, "neither a bbox nor a segmentation"),
        ({"segmentation": []}, "neither a bbox nor a segmentation"),
        ({"segmentation": {"counts": [8000], "size": [80, 100]}}, "the mask is empty"),
        ({"bbox": [1, 2, 3, 4], "category_id": None}, "there is no category None"),
        ({"bbox": [1, 2, 3, 4], "category_id": "nut"}, "there is no category 'nut'"),
    ],
)
def test_unusable_records_are_named(box, message, load, tmp_path):
    folder = write_coco(tmp_path / "data", [1], [{"image_id": 1, "category_id": 1} | box])
    with pytest.raises(ValueError, match=rf"annotation 1: .*{message}"):
        load(folder)


def test_a_missing_image_is_reported_once(load, tmp_path):
    boxes = [{"image_id": 1, "category_id": 1, "bbox": [500 * i, 1, 9, 9]} for i in range(9)]
    folder = write_coco(tmp_path / "data", [1], boxes)
    content = json.loads((folder / "train.json").read_text())
    del content["images"][0]["width"]
    (folder / "train.json").write_text(json.dumps(content))
    (folder / "train" / "0.png").unlink()
    assert [finding.code for finding in check_dataset(folder, progress=False).errors] == ["image-missing"]
    (folder / "train.json").unlink()
    (folder / "labels").mkdir()
    (folder / "labels" / "0.txt").write_text("0 .5 .5 .1 .1\n" * 9)
    (folder / "list.txt").write_text("images/0.png\n")
    (folder / "data.yaml").write_text("train: list.txt\nnames: [nut]\n")
    assert [finding.code for finding in check_dataset(folder, progress=False).errors] == ["image-missing"]


# -- F: Hugging Face datasets ------------------------------------------------------------------------------------------


def rows_of(*objects, **columns) -> list[dict]:
    return [
        {"image": Image.new("RGB", (100, 80), (number, 9, 9)), "objects": entry} | columns
        for number, entry in enumerate(objects)
    ]


def save(folder: Path, **splits: list[dict]) -> Path:
    datasets.DatasetDict(
        {name: datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()) for name, rows in splits.items()}
    ).save_to_disk(folder)
    return folder


BOX = [10.0, 10.0, 20.0, 20.0]


def test_every_split_of_a_saved_dataset_has_the_classes_of_train(load, tmp_path):
    folder = save(
        tmp_path / "saved",
        train=rows_of({"bbox": [BOX, BOX], "category": ["bolt", "nut"]}),
        validation=rows_of({"bbox": [BOX], "category": ["nut"]}),
    )
    train, val = load(folder), load(folder, "val")
    assert id2label(train) == id2label(val) == {0: "bolt", 1: "nut"}
    assert val[0]["objects"]["category"] == [1]


def test_integer_categories_meet_the_names_of_a_model_by_id(load, tmp_path):
    folder = save(tmp_path / "saved", train=rows_of({"bbox": [BOX, BOX], "category": [2, 0]}))
    for names in ({0: "a", 1: "b", 2: "c"}, {"0": "a", "1": "b", "2": "c"}):
        rows = load(folder, id2label=names)
        assert id2label(rows) == {0: "a", 1: "b", 2: "c"}
        assert rows[0]["objects"]["category"] == [2, 0]
    with pytest.raises(ValueError, match="a category 2, which is none of the classes"):
        load(folder, id2label={0: "a", 1: "b"})
    with pytest.raises(ValueError, match="keys of id2label must be class ids"):
        load(folder, id2label={"a": "b"})


def test_one_senseless_box_does_not_refuse_the_whole_set(load, tmp_path, warnings):
    good = [{"bbox": [BOX, BOX], "category": ["nut", "nut"]} for _ in range(30)]
    bad = {"bbox": [BOX, [500.0, 1.0, 2.0, 2.0]], "category": ["nut", "nut"]}
    rows = load(save(tmp_path / "saved", train=rows_of(*good, bad)))
    assert [len(objects["bbox"]) for objects in rows["objects"]] == [2] * 30 + [1]
    assert "1 invalid boxes are dropped. row 30" in warnings.text
    with pytest.raises(ValueError, match=r"row 0 .*object 1: .*outside the image of 100 x 80"):
        load(save(tmp_path / "worse", train=rows_of(*[bad] * 5)))


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ({"bbox": [BOX] * 3, "category": ["nut", None, None]}, "row 0 .*object 1: there is no category None"),
        ({"bbox": [BOX, None, None], "category": ["nut"] * 3}, "row 0 .*object 1: .*bbox"),
        ({"bbox": [BOX, [], [1.0]], "category": ["nut"] * 3}, "row 0 .*object 1: "),
        ({"bbox": [BOX], "category": ["nut", "nut"]}, "row 0: the lists of objects must have equal lengths"),
        ({"bbox": [BOX]}, "row 0: objects must have bbox and category"),
    ],
)
def test_rows_that_cannot_be_used_are_named(objects, message, load, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(save(tmp_path / "saved", train=rows_of(objects)))


def test_a_row_without_an_image_is_named(load, tmp_path):
    rows = rows_of(*[{"bbox": [BOX], "category": ["nut"]}] * 3)
    rows[1]["image"] = None
    with pytest.raises(ValueError, match=r"row 1 .*the image is None"):
        load(save(tmp_path / "saved", train=rows))


def test_areas_that_are_text_are_read_or_replaced_by_that_of_the_box(load, tmp_path):
    objects = {"bbox": [BOX, BOX, BOX], "category": ["nut"] * 3, "area": ["300", "large", "nan"]}
    rows = load(save(tmp_path / "saved", train=rows_of(objects)))
    assert rows[0]["objects"]["area"] == [300, 400, 400]


def test_boxes_of_datasets_may_be_dicts_and_ids_text(load, tmp_path):
    objects = [
        {"bbox": {"x": 10, "y": 10, "width": 20, "height": 20}, "label": "nut"},
        {"bbox": {"x": 1, "y": 2, "width": 3, "height": 4}, "label": "nut"},
    ]
    rows = load(save(tmp_path / "saved", train=rows_of(objects, image_id="cam1_1")))
    assert rows[0]["objects"]["bbox"] == [[10, 10, 20, 20], [1, 2, 3, 4]]
    assert source_id(rows[0]) == "cam1_1"


def test_splits_of_datasets_are_found_in_any_spelling(load, tmp_path):
    rows = rows_of({"bbox": [BOX], "category": ["nut"]})
    folder = save(tmp_path / "saved", Training=rows, VALID=rows)
    assert len(load(folder, "train")) == len(load(folder, "val")) == 1
    with pytest.raises(FileNotFoundError, match=r"no split \"test\", only \['Training', 'VALID'\]"):
        load(folder, "test")


def test_streams_name_the_row_that_cannot_be_used(load, tmp_path):
    folder = save(
        tmp_path / "saved",
        train=rows_of({"bbox": [BOX], "category": ["nut"]}, {"bbox": [[1.0, 1.0, 0.0, 5.0]], "category": ["nut"]}),
    )
    stream = iter(load(folder, streaming=True, id2label={0: "nut"}))
    assert next(stream)["objects"]["bbox"] == [BOX]
    with pytest.raises(ValueError, match=r"row 1 .*the box has no area"):
        next(stream)


# -- H: values of images -----------------------------------------------------------------------------------------------


def test_images_of_12_bits_are_reported_and_become_visible_with_a_range(load, tmp_path):
    folder = write_coco(tmp_path / "data", [1, 2])
    for number in range(2):
        values = np.linspace(100, 4000, 8000).reshape(80, 100).astype(np.uint16)
        Image.fromarray(values).save(folder / "train" / f"{number}.png")
    assert check_dataset(folder, progress=False).counts()["image-dim"] == 2
    assert "image-dim" not in check_dataset(folder, image_range=(0, 4095), progress=False).counts()
    rows = AugmentedDataset(
        load(folder), flip_rotate_augmentation(), to_tensor=DetrImageProcessor(image_range=(0, 4095)).to_tensor
    )
    assert np.ptp(np.asarray(rows[0]["image"])) > 200
    processor = DetrImageProcessor(image_range=(0, 4095), do_normalize=False, do_resize=False)
    processor.save_pretrained(tmp_path / "processor")
    again = DetrImageProcessor.from_pretrained(tmp_path / "processor")
    pixels = again(load(folder)[0]["image"], return_tensors="pt")["pixel_values"]
    assert pixels.max() == pytest.approx(4000 / 4095, abs=1 / 255)
    assert pixels.min() == pytest.approx(100 / 4095, abs=1 / 255)


@pytest.mark.parametrize("values", [[-5, 900], [0, np.nan], [0, 300]], ids=str)
def test_images_that_training_cannot_read_are_errors_of_the_check(values, tmp_path):
    folder = write_coco(tmp_path / "data", [1])
    pixels = np.zeros((80, 100), dtype=np.float32)
    pixels[0, :2] = values
    Image.fromarray(pixels).save(folder / "train" / "0.tiff")
    (folder / "train.json").write_text((folder / "train.json").read_text().replace("0.png", "0.tiff"))
    assert "image-unsupported" in {finding.code for finding in check_dataset(folder, progress=False).errors}


def test_a_lab_tiff_is_no_truncated_file(tmp_path):
    folder = write_coco(tmp_path / "data", [1])
    Image.new("LAB", (100, 80), (120, 130, 140)).save(folder / "train" / "0.tiff")
    (folder / "train.json").write_text((folder / "train.json").read_text().replace("0.png", "0.tiff"))
    assert check_dataset(folder, progress=False).errors == []


# -- K: the validation cut ---------------------------------------------------------------------------------------------


def test_near_copies_stay_on_one_side_of_a_validation_cut(load, tmp_path, warnings):
    """Twenty scenes, each three times: at another size, recompressed, and as a version of Roboflow's that looks
    different. Whatever the seed, no scene is on both sides."""
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    images = []
    for scene in range(20):
        pixels = Image.fromarray(rng.integers(0, 255, (8, 10, 3), dtype=np.uint8)).resize((200, 160))
        pixels.save(tmp_path / "data" / f"{scene}.png")
        pixels.resize((100, 80)).save(tmp_path / "data" / f"z{scene}_small.jpg", quality=70)
        pixels.rotate(180).save(tmp_path / "data" / f"{scene}.rf.ab{scene}c.png")
        images += [f"{scene}.png", f"z{scene}_small.jpg", f"{scene}.rf.ab{scene}c.png"]
    content = {
        "images": [{"id": number, "file_name": name} for number, name in enumerate(images)],
        "annotations": [{"id": n, "image_id": n, "category_id": 1, "bbox": [1, 1, 9, 9]} for n in range(len(images))],
        "categories": [{"id": 1, "name": "nut"}],
    }
    (tmp_path / "data" / "all.json").write_text(json.dumps(content))
    for seed in range(5):
        train, val = (load(tmp_path / "data", split, seed=seed, validation_fraction=0.15) for split in ("train", "val"))
        sides = [{n.removeprefix("z").split("_")[0].split(".")[0] for n in rows["file_name"]} for rows in (train, val)]
        assert not sides[0] & sides[1]
        assert (len(train), len(val)) == (51, 9)
    assert "40 images look like another one; they stay on one side" in warnings.text


def test_a_group_that_is_too_large_for_one_side_is_divided_in_its_order_and_that_is_said(load, tmp_path, warnings):
    """A fixed camera: 40 images of one scene. Validation gets two runs of consecutive images."""
    boxes = [{"image_id": number, "category_id": 1, "bbox": [5, 5, 10, 10]} for number in range(40)]
    folder = write_coco(tmp_path / "data", list(range(40)), boxes)
    for number in range(40):
        Image.new("RGB", (100, 80), (100, 100, 100)).save(folder / "train" / f"{number}.png")
    val = load(folder, "val", validation_fraction=0.2)
    numbers = [int(Path(name).stem) for name in val["file_name"]]
    assert len(numbers) == 8
    runs = [numbers[:4], numbers[4:]]
    assert all(run == list(range(run[0], run[0] + 4)) for run in runs)
    assert "but for groups of more than 4, which are divided in their order" in warnings.text


def test_the_page_of_findings_shows_images_as_training_reads_them(tmp_path):
    """12 bits in 16 are nearly black, which Pillow's own conversion would show as white."""
    folder = write_coco(tmp_path / "data", [1])
    Image.fromarray(np.full((80, 100), 4000, dtype=np.uint16)).save(folder / "train" / "0.png")
    finding = next(f for f in check_dataset(folder, progress=False).findings if f.code == "image-dim")
    drawn = np.asarray(findings_page._draw(finding))
    assert np.median(drawn) == round(4000 / 257)
