"""Masks from every format into rows, through augmentation into labels, out again, and what the dataset check finds."""

import json
import shutil
from pathlib import Path

import albumentations as A
import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2

from hf_detr import DetrImageProcessor
from hf_detr.data import DetectionCollator, draw_shapes_dataset, export_coco, export_panoptic, id2label, stuff_labels
from hf_detr.data.augmentation import Augmentation, ResizeTo, flip_rotate_augmentation, paper_augmentation
from hf_detr.data.masks import decode_masks, encode_masks, encode_segmentation, resize_masks, segment_colours
from hf_detr.data.schema import source_of
from hf_detr.data.shapes import STUFF, draw_segments
from hf_detr.data.split_source import FolderSource
from hf_detr.dataset_check import KINDS, check_dataset, write_clean_copy

POLYGON = [20.0, 10.0, 61.5, 14.0, 50.0, 55.0, 25.0, 40.0]
NAMES = ["rectangle", "ellipse", "triangle", *STUFF]


def masks_of(row):
    return decode_masks(row["objects"]["mask"], (row["height"], row["width"])).numpy()


def ids_of(png: Path) -> np.ndarray:
    """The ids of a panoptic PNG, by the definition of the format."""
    red, green, blue = (np.asarray(Image.open(png))[..., i].astype(int) for i in range(3))
    return red + 256 * green + 256**2 * blue


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    return draw_shapes_dataset(folder, num_train=8, num_val=4, masks=True, progress=False)


def panoptic(folder: Path, split: str = "train") -> dict:
    return json.loads((folder / "annotations" / f"panoptic_{split}.json").read_text())


def write_coco(folder: Path, annotations: list[dict], size=(100, 80), num_images: int = 1, **more) -> Path:
    """`annotations` without an image are of the first one; `size` is (width, height)."""
    (folder / "train").mkdir(parents=True)
    for number in range(num_images):
        noise = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "train" / f"{number}.png")
    images = [{"id": i + 1, "file_name": f"{i}.png", "width": size[0], "height": size[1]} for i in range(num_images)]
    records = [{"id": i + 1, "image_id": 1, "category_id": 1} | record for i, record in enumerate(annotations)]
    content = {"images": images, "annotations": records, "categories": [{"id": 1, "name": "nut"}]} | more
    (folder / "annotations").mkdir()
    (folder / "annotations" / "instances_train.json").write_text(json.dumps(content))
    return folder


# -- into rows -----------------------------------------------------------------------------------------------------


def test_polygons_and_both_encodings_of_coco_become_the_masks_of_pycocotools(load, tmp_path):
    rng = np.random.default_rng(0)
    blob = np.asfortranarray(rng.random((80, 100)) < 0.3)
    compressed = coco_mask.encode(blob.view(np.uint8))
    flat = blob.T.ravel().astype(int)
    changes = np.flatnonzero(np.diff(np.concatenate(([0], flat)))).tolist()  # uncompressed counts begin with zeros
    counts = np.diff([0, *changes, flat.size]).tolist()
    shapes = {
        "polygon": [POLYGON],
        "two polygons": [POLYGON, [70, 60, 95, 60, 95, 79.5]],
        "flat": POLYGON,
        "beyond the edge": [[-10, -10, 30, -10, 30, 30, -10, 30]],
        "compressed": {"size": [80, 100], "counts": compressed["counts"].decode()},
        "uncompressed": {"size": [80, 100], "counts": counts},
    }
    expected = []
    for shape in shapes.values():
        rles = shape if isinstance(shape, dict) else [shape] if not isinstance(shape[0], list) else shape
        encoded = coco_mask.frPyObjects(rles, 80, 100) if not isinstance(shape, dict) else [compressed]
        expected.append(coco_mask.decode(coco_mask.merge(encoded)))
    records = [{"segmentation": shape} for shape in shapes.values()]
    row = load(write_coco(tmp_path / "data", records), masks=True)[0]
    for name, found, mask in zip(shapes, masks_of(row), expected, strict=True):
        assert np.array_equal(found, mask.astype(bool)), name
    assert row["objects"]["area"] == [float(mask.sum()) for mask in expected]
    assert np.array_equal(masks_of(row)[4], blob)


def test_panoptic_pngs_become_masks_boxes_and_classes_of_things_and_stuff(drawn, load):
    rows = load(drawn, masks=True)
    assert source_of(rows).endswith("panoptic_train.json")
    assert list(id2label(rows).values()) == NAMES
    assert stuff_labels(rows) == list(STUFF)
    content = panoptic(drawn)
    for row, record in zip(rows, content["annotations"], strict=True):
        ids = ids_of(drawn / "annotations" / "panoptic_train" / record["file_name"])
        assert np.array_equal(masks_of(row), np.stack([ids == s["id"] for s in record["segments_info"]]))
        assert [NAMES.index(NAMES[c]) + 1 for c in row["objects"]["category"]] == [
            s["category_id"] for s in record["segments_info"]
        ]
        for (x, y, w, h), mask in zip(row["objects"]["bbox"], masks_of(row), strict=True):
            ys, xs = np.nonzero(mask)
            assert (x, y, w, h) == (xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1)


def test_without_masks_the_instances_are_read_and_a_named_file_is_chosen_over_the_panoptic_one(drawn, load):
    plain = load(drawn)
    assert list(id2label(plain).values()) == NAMES[:3]
    assert "mask" not in plain.features["objects"]
    named = load(drawn, files={"train": drawn / "annotations" / "instances_train.json"}, masks=True)
    assert list(id2label(named).values()) == NAMES[:3]
    both = load(drawn, masks=True)
    for row, other in zip(named, both, strict=True):
        count = len(row["objects"]["id"])
        assert row["objects"]["mask"] == other["objects"]["mask"][:count]


def test_a_png_of_segments_is_never_taken_for_an_image_of_the_same_name(drawn, load, tmp_path):
    folder = Path(shutil.copytree(drawn, tmp_path / "data"))
    content = panoptic(folder)
    for image in content["images"]:
        path = folder / "train" / image["file_name"]
        Image.open(path).save(path.with_suffix(".png"))
        path.unlink()
        image["file_name"] = path.with_suffix(".png").name
    (folder / "annotations" / "panoptic_train.json").write_text(json.dumps(content))
    assert load(folder, masks=True)[2]["image"].getextrema() == Image.open(folder / "train/000002.png").getextrema()
    (folder / "train" / "000002.png").unlink()
    with pytest.raises(ValueError, match=r"image 3 \(000002\.png\): .*no such file"):
        load(folder, masks=True)


def test_crowds_and_segments_without_box_of_panoptic_data(drawn, load, tmp_path, warnings):
    folder = Path(shutil.copytree(drawn, tmp_path / "data"))
    content = panoptic(folder)
    segment = content["annotations"][0]["segments_info"][0]
    expected = list(segment.pop("bbox"))
    content["annotations"][1]["segments_info"][0]["iscrowd"] = 1
    (folder / "annotations" / "panoptic_train.json").write_text(json.dumps(content))
    rows = load(folder, masks=True)
    assert rows[0]["objects"]["bbox"][0] == expected
    assert rows[1]["objects"]["iscrowd"][0] == 1
    assert "an object has a mask and no box (1 times)" in warnings.text
    content["annotations"][1]["segments_info"][0]["iscrowd"] = 2
    content["annotations"][1]["segments_info"][0].pop("bbox")
    (folder / "annotations" / "panoptic_train.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="iscrowd"):  # the box of its mask does not make this right
        load(folder, masks=True)
    only = {"train": folder / "annotations" / "panoptic_train.json"}
    with pytest.raises(ValueError, match=r"segment 1: the segment has no bbox\. Load the data with masks=True"):
        load(folder, files=only)


def test_objects_without_a_mask_are_refused_and_a_few_among_many_dropped_with_a_warning(load, tmp_path, warnings):
    good = {"bbox": [20, 10, 42, 46], "segmentation": [POLYGON]}
    bad = {
        "it has no segmentation": {"bbox": [1, 1, 9, 9], "segmentation": []},
        "no pixel in the image": {"bbox": [1, 1, 9, 9], "segmentation": {"size": [80, 100], "counts": [8000]}},
        "the mask is of 80 x 100 pixels, but": {
            "bbox": [1, 1, 9, 9],
            "segmentation": {"size": [100, 80], "counts": [0]},
        },
        "at least three points": {"bbox": [1, 1, 9, 9], "segmentation": [[1, 2, 3, 4]]},
        "pairs of finite numbers": {"bbox": [1, 1, 9, 9], "segmentation": [[1, 2, 3, 4, 5, float("nan")]]},
        "negative count": {"bbox": [1, 1, 9, 9], "segmentation": {"size": [80, 100], "counts": "garbage"}},
        "exceed h": {"bbox": [1, 1, 9, 9], "segmentation": {"size": [80, 100], "counts": [3, 9000]}},
        "reaches 1000000000": {"bbox": [1, 1, 9, 9], "segmentation": [[1, 2, 1e9, 4, 5, 6]]},
    }
    for number, (message, record) in enumerate(bad.items()):
        folder = write_coco(tmp_path / f"bad{number}", [good, record])
        with pytest.raises(ValueError, match=rf"image 1 .*annotation 2: .*{message}"):
            load(folder, masks=True)
        assert len(load(folder)[0]["objects"]["id"]) == 2  # without masks, they are boxes like others
    corners = [(i % 50, i // 50) for i in range(1200)]
    moved = [{"bbox": [x, y, 9, 9], "segmentation": [[x, y, x + 9, y, x, y + 9]]} for x, y in corners]
    rows = load(write_coco(tmp_path / "many", [*moved, bad["it has no segmentation"]]), masks=True)
    assert len(rows[0]["objects"]["mask"]) == 1200
    assert "1 invalid objects are dropped. image 1 (0.png), annotation 1201: it has no segmentation" in warnings.text


def test_an_image_whose_segments_cannot_be_read_is_no_background(drawn, load, tmp_path, warnings, monkeypatch):
    folder = Path(shutil.copytree(drawn, tmp_path / "data"))
    (folder / "annotations" / "panoptic_train" / "000001.png").write_bytes(b"not a PNG")
    with pytest.raises(ValueError, match=r"000001\.png"):
        load(folder, masks=True)
    monkeypatch.setattr(FolderSource, "max_invalid", 0.5)
    rows = load(folder, masks=True)
    assert [row["file_name"] for row in rows] == [f"{i:06d}.jpg" for i in range(8) if i != 1]
    assert "with 1 images whose segments cannot be read" in warnings.text
    write_clean_copy(check_dataset(folder, masks=True, progress=False), tmp_path / "clean", progress=False)
    written = json.loads((tmp_path / "clean" / "annotations" / "instances_train.json").read_text())
    assert "000001" not in json.dumps(written["images"])


def test_drawing_leaves_panoptic_annotations_of_others_alone(drawn, tmp_path):
    file = tmp_path / "annotations" / "panoptic_train.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    with pytest.raises(FileExistsError, match=r"panoptic_train\.json was not drawn"):
        draw_shapes_dataset(tmp_path, num_train=2, num_val=1, masks=True, progress=False)
    assert file.exists()


def test_polygons_of_labelme_via_yolo_and_hub_data_become_the_mask_of_the_same_polygon(load, tmp_path):
    points = np.array(POLYGON).reshape(-1, 2)
    expected = encode_segmentation([POLYGON], (80, 100))
    folders = {name: tmp_path / name for name in ("labelme", "via", "yolo", "imagefolder")}
    for name, folder in folders.items():
        place = folder / "train" if name == "imagefolder" else folder
        place.mkdir(parents=True)
        Image.new("RGB", (100, 80), "teal").save(place / "a.png")
    shape = {"label": "nut", "shape_type": "polygon", "points": points.tolist()}
    labelme = {"shapes": [shape], "imagePath": "a.png", "imageWidth": 100, "imageHeight": 80}
    (folders["labelme"] / "a.json").write_text(json.dumps(labelme))
    outline = {"name": "polygon", "all_points_x": points[:, 0].tolist(), "all_points_y": points[:, 1].tolist()}
    region = {"shape_attributes": outline, "region_attributes": {"label": "nut"}}
    (folders["via"] / "via.json").write_text(json.dumps({"a.png9": {"filename": "a.png", "regions": [region]}}))
    relative = (points / [100, 80]).ravel().tolist()
    (folders["yolo"] / "a.txt").write_text("0 " + " ".join(repr(value) for value in relative))
    (folders["yolo"] / "classes.txt").write_text("nut\n")
    objects = {"bbox": [[20, 10, 41.5, 45]], "category": ["nut"], "segmentation": [[POLYGON]]}
    row = json.dumps({"file_name": "a.png", "objects": objects})
    (folders["imagefolder"] / "train" / "metadata.jsonl").write_text(row)
    for name, folder in folders.items():
        assert load(folder, masks=True)[0]["objects"]["mask"] == [expected], name
    rectangle = {"label": "nut", "shape_type": "rectangle", "points": [[10, 10], [30, 30]]}
    (folders["labelme"] / "a.json").write_text(json.dumps(labelme | {"shapes": [rectangle]}))
    with pytest.raises(ValueError, match=r"a\.json shape 1: it has no segmentation"):
        load(folders["labelme"], masks=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_data_with_an_image_of_segments(drawn, load, tmp_path, streaming):
    content = panoptic(drawn)
    rows = [
        {
            "image": str(drawn / "train" / image["file_name"]),
            "label": str(drawn / "annotations" / "panoptic_train" / record["file_name"]),
            "segments_info": [
                {key: segment[key] for key in ("id", "category_id", "bbox", "iscrowd")}
                | {"isthing": segment["category_id"] <= 3}
                for segment in record["segments_info"]
            ],
        }
        for image, record in zip(content["images"], content["annotations"], strict=True)
    ]
    saved = Dataset.from_list(rows).cast_column("image", datasets.Image()).cast_column("label", datasets.Image())
    saved.save_to_disk(tmp_path / "saved")
    names = dict(enumerate(["background", *NAMES]))
    found = load(tmp_path / "saved", masks=True, id2label=names, streaming=streaming)
    if not streaming:
        assert stuff_labels(found) == list(STUFF)
    for row, expected in zip(found, load(drawn, masks=True), strict=True):
        assert row["objects"]["mask"] == expected["objects"]["mask"]
        assert [category - 1 for category in row["objects"]["category"]] == expected["objects"]["category"]
        assert row["objects"]["bbox"] == expected["objects"]["bbox"]


# -- out again -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("export", [export_coco, export_panoptic])
def test_exported_masks_are_read_again_as_they_were(export, drawn, load, tmp_path):
    rows = load(drawn, masks=True)
    export(rows, tmp_path / "out", "train", progress=False)
    again = load(tmp_path / "out", masks=True)
    assert again.features == rows.features
    assert stuff_labels(again) == stuff_labels(rows)
    for row, expected in zip(again, rows, strict=True):
        assert {k: v for k, v in row["objects"].items() if k != "id"} == {
            k: v for k, v in expected["objects"].items() if k != "id"
        }
        assert row["file_name"] == expected["file_name"]


def test_overlapping_masks_have_no_place_in_a_panoptic_png(load, tmp_path):
    record = {"bbox": [20, 10, 42, 46], "segmentation": [POLYGON]}
    rows = load(write_coco(tmp_path / "data", [record, record | {"bbox": [20, 10, 41, 45]}]), masks=True)
    with pytest.raises(ValueError, match=r"0\.png: masks overlap by \d+ pixels\. export_coco writes such data"):
        export_panoptic(rows, tmp_path / "out", "train", progress=False)
    with pytest.raises(ValueError, match="load it with masks=True"):
        export_panoptic(load(tmp_path / "data"), tmp_path / "out", "train", progress=False)


def test_ids_of_segments_are_colours_of_24_bits():
    ids = np.array([[0, 1, 255, 256], [65535, 65536, 7_000_000, 2**24 - 1]])
    colours = segment_colours(ids).astype(int)
    assert np.array_equal(colours[..., 0] + 256 * colours[..., 1] + 65536 * colours[..., 2], ids)
    with pytest.raises(ValueError, match=r"\[0, 2\^24\)"):
        segment_colours(np.array([[2**24]]))


# -- the drawn data set --------------------------------------------------------------------------------------------


def test_drawn_masks_are_the_visible_pixels_of_the_shapes(drawn):
    """Inside a shape, away from its edges, all pixels have one colour but for noise; regions have two."""
    for seed in range(6):
        image, objects, owner = draw_segments(np.random.default_rng(seed))
        pixels = np.asarray(image).astype(float)
        assert owner.min() >= 1
        assert owner.max() <= len(objects) + len(STUFF)
        for number in range(1, len(objects) + 1):
            mask = owner == number
            inner = mask.copy()
            for axis in (0, 1):
                for shift in (-1, 1):
                    inner &= np.roll(mask, shift, axis)
            colour = np.median(pixels[inner], axis=0)
            distance = np.abs(pixels - colour).max(axis=2)
            assert (distance[inner] < 60).mean() > 0.999
            outside = (
                ~mask & ~np.roll(mask, 1, 0) & ~np.roll(mask, -1, 0) & ~np.roll(mask, 1, 1) & ~np.roll(mask, -1, 1)
            )
            near = outside & (np.roll(mask, 2, 0) | np.roll(mask, -2, 0) | np.roll(mask, 2, 1) | np.roll(mask, -2, 1))
            assert np.median(distance[near]) > 25


def test_drawn_instances_are_the_things_of_the_panoptic_annotations(drawn):
    content = json.loads((drawn / "annotations" / "instances_val.json").read_text())
    found = {image["id"]: [] for image in content["images"]}
    for record in content["annotations"]:
        found[record["image_id"]].append(record)
    for record in panoptic(drawn, "val")["annotations"]:
        ids = ids_of(drawn / "annotations" / "panoptic_val" / record["file_name"])
        things = [s for s in record["segments_info"] if s["category_id"] <= 3]
        assert (ids > 0).all()
        for segment, instance in zip(things, found[record["image_id"]], strict=True):
            assert np.array_equal(coco_mask.decode(instance["segmentation"]), ids == segment["id"])
            assert (instance["bbox"], instance["area"]) == (segment["bbox"], segment["area"])


def test_drawing_with_and_without_masks_do_not_mix(drawn):
    with pytest.raises(FileExistsError, match="was not drawn with seed"):
        draw_shapes_dataset(drawn, num_train=8, num_val=4, progress=False)


# -- augmentation --------------------------------------------------------------------------------------------------


def make_row(width=120, height=80):
    """Two shapes whose pixels have grey values 80 and 160, a crowd of 240; boxes are those of the masks."""
    y, x = np.mgrid[:height, :width]
    masks = np.stack([
        (x >= 10) & (x < 40) & (y >= 20) & (y < 60) & (x - 10 >= (y - 20) / 2),
        ((x - 80) / 22) ** 2 + ((y - 30) / 14) ** 2 <= 1,
        (x >= 100) & (y >= 60),
    ])  # fmt: skip
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    boxes = []
    for number, mask in enumerate(masks, start=1):
        pixels[mask] = 80 * number
        ys, xs = np.nonzero(mask)
        boxes.append([float(v) for v in (xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1)])
    objects = {"id": [7, 8, 9], "bbox": boxes, "category": [0, 1, 1], "area": [1.0, 1.0, 1.0], "iscrowd": [0, 0, 1]}
    objects["mask"] = encode_masks(masks)
    image = Image.fromarray(pixels)
    return {"image": image, "image_id": 3, "width": width, "height": height, "objects": objects}


def grey_levels(row):
    """The mask of each object, read from the pixels of the image."""
    return [(row["image"][0] == 80 * (i - 6)).numpy() for i in row["objects"]["id"]]


class FixedCrop(v2.Transform):
    def __init__(self, **box):
        super().__init__()
        self.box = box

    def transform(self, inpt, params):
        return v2.functional.crop(inpt, **self.box)


TRANSFORMS = {
    "eight flips and rotations": flip_rotate_augmentation(),
    "crop": Augmentation(v2.RandomCrop((50, 70))),
    "sanitized": Augmentation(v2.Compose([v2.RandomCrop((50, 70)), v2.SanitizeBoundingBoxes()])),
    "albumentations": Augmentation(
        A.Compose([A.RandomCrop(50, 70), A.HorizontalFlip()], bbox_params=A.BboxParams(format="coco"))
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_masks_stay_on_their_pixels_and_give_the_boxes_after_a_crop(name):
    dropped = 0
    for seed in range(12):
        torch.manual_seed(seed)
        TRANSFORMS[name].set_random_seed(seed)
        row = TRANSFORMS[name](make_row())
        masks, expected = masks_of(row), grey_levels(row)
        assert len(masks) == len(row["objects"]["bbox"])
        dropped += 3 - len(masks)
        for mask, level, area, box in zip(masks, expected, row["objects"]["area"], row["objects"]["bbox"], strict=True):
            assert np.array_equal(mask, level)
            assert area == level.sum() > 0
            ys, xs = np.nonzero(level)
            assert box == pytest.approx([xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1], abs=1e-4)
        assert {80 * (i - 6) for i in row["objects"]["id"]} == set(np.unique(row["image"][0])) - {0}
    assert (dropped > 0) == ("crop" in name or name in ("sanitized", "albumentations"))


def test_boxes_that_a_transform_did_not_cut_stay_those_of_the_data():
    row = make_row()
    row["objects"]["bbox"][0] = [8.5, 18.25, 40.0, 50.0]  # larger than the mask, as for partly covered objects
    flipped = Augmentation(v2.RandomHorizontalFlip(p=1.0))(row)
    assert flipped["objects"]["bbox"][0] == [120 - 48.5, 18.25, 40.0, 50.0]
    cut = Augmentation(FixedCrop(top=0, left=20, height=80, width=100))(row)
    rows, columns = np.nonzero(grey_levels(cut)[0])
    assert cut["objects"]["bbox"][0] == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]


def test_an_object_whose_box_is_seen_but_no_pixel_of_its_mask_is_dropped():
    """The triangle's upper right part: the crop shows the lower left corner of its box only."""
    row = Augmentation(FixedCrop(top=50, left=0, height=30, width=20))(make_row())
    assert row["objects"]["id"] == []
    without = make_row()
    del without["objects"]["mask"]
    assert Augmentation(FixedCrop(top=50, left=0, height=30, width=20))(without)["objects"]["id"] == [7]


def test_a_third_of_the_size_takes_the_middle_of_three_pixels_so_that_masks_do_not_move():
    """The shortest edge of 90 becomes 30 with the size 50, whose scales are 30 to 50 pixels."""
    row, seen = make_row(width=120, height=90), 0
    for seed in range(40):
        torch.manual_seed(seed)
        transform = paper_augmentation({"shortest_edge": 50, "longest_edge": 200}).transform.transforms[-1]
        found = Augmentation(transform)(row)
        if found["height"] == 30:
            assert np.array_equal(masks_of(found), masks_of(row)[:, 1::3, 1::3])
            seen += 1
    assert seen
    transform = paper_augmentation({"shortest_edge": 80, "longest_edge": 200}, rounded=True).transform.transforms[-1]
    found = Augmentation(transform)(row)
    exact = Augmentation(ResizeTo(found["height"], found["width"]))(row)
    assert found["height"] % 8 == found["width"] % 8 == 0
    assert found["objects"] == exact["objects"]
    found = Augmentation(ResizeTo(30, 40))(row)
    assert (found["height"], found["width"]) == (30, 40)
    assert np.array_equal(masks_of(found), masks_of(row)[:, 1::3, 1::3])


def test_transforms_that_lose_masks_are_refused():
    def without_masks(sample):
        return {name: value for name, value in sample.items() if name != "masks"}

    def old_masks(sample):
        return sample | {"image": tv_tensors.Image(sample["image"][:, :40])}

    with pytest.raises(ValueError, match="The transform returned no masks"):
        Augmentation(without_masks)(make_row())
    with pytest.raises(ValueError, match=r"returned masks \(3, 80, 120\), but there are 3 boxes and 40 x 120 pixels"):
        Augmentation(old_masks)(make_row())


# -- labels --------------------------------------------------------------------------------------------------------


def test_labels_have_the_masks_of_the_resized_image_without_crowds_and_padding():
    processor = DetrImageProcessor(size={"shortest_edge": 160, "longest_edge": 400})
    row, tall = make_row(), make_row(width=120, height=100)
    batch = DetectionCollator(processor)([row, tall])
    label = batch["labels"][0]
    assert label["masks"].dtype == torch.bool
    assert label["masks"].shape == (2, 160, 240)
    assert len(label["masks"]) == len(label["class_labels"]) == len(label["boxes"])
    enlarged = np.repeat(np.repeat(masks_of(row)[:2], 2, axis=1), 2, axis=2)
    assert np.array_equal(label["masks"].numpy(), enlarged)
    assert batch["labels"][1]["masks"].shape[1:] == tuple(batch["labels"][1]["size"].tolist())
    for mask, (cx, cy, w, h) in zip(label["masks"], label["boxes"].tolist(), strict=True):
        ys, xs = np.nonzero(mask.numpy())
        found = [(xs.min() + xs.max() + 1) / 2, (ys.min() + ys.max() + 1) / 2, np.ptp(xs) + 1, np.ptp(ys) + 1]
        assert found == pytest.approx([cx * 240, cy * 160, w * 240, h * 160], abs=1e-3)


def test_workers_send_masks_and_rows_without_objects_have_none():
    processor = DetrImageProcessor(size={"shortest_edge": 40, "longest_edge": 100})
    empty = make_row()
    empty["objects"] = {name: [] for name in empty["objects"]}
    rows = [make_row(), empty]
    loader = DataLoader(rows, batch_size=2, collate_fn=DetectionCollator(processor), num_workers=1)
    for label, expected in zip(next(iter(loader))["labels"], DetectionCollator(processor)(rows)["labels"], strict=True):
        assert torch.equal(label["masks"], expected["masks"])
    assert expected["masks"].shape == (0, 40, 60)
    del rows[1]["objects"]["mask"]
    with pytest.raises(ValueError, match="Some rows of this batch have masks and others do not"):
        DetectionCollator(processor)(rows)


def test_a_pixel_of_a_resized_mask_is_the_one_below_its_centre():
    mask = torch.tensor([[[0, 1, 0, 0, 1, 1]]]).bool()
    assert resize_masks(mask, (1, 3)).int().tolist() == [[[1, 0, 1]]]
    assert resize_masks(mask, (2, 6)).int().tolist() == [[[0, 1, 0, 0, 1, 1]] * 2]


# -- the dataset check ---------------------------------------------------------------------------------------------


def edit(folder: Path, change) -> None:
    content = panoptic(folder)
    change(content["annotations"])
    (folder / "annotations" / "panoptic_train.json").write_text(json.dumps(content))


def repaint(folder: Path, change) -> None:
    path = folder / "annotations" / "panoptic_train" / "000001.png"
    pixels = np.asarray(Image.open(path)).copy()
    Image.fromarray(np.asarray(change(pixels))).save(path)


def polygon(record):
    def plant(folder):
        shutil.rmtree(folder)
        good = {"bbox": [20, 10, 42, 46], "segmentation": [POLYGON]}
        write_coco(folder, [good, {"bbox": [1, 1, 9, 9]} | record])

    return plant


FAULTS = {
    "mask-missing": (polygon({}), "annotation 2", "it has no segmentation"),
    "mask-empty": (polygon({"segmentation": {"size": [80, 100], "counts": [8000]}}), "annotation 2", "no pixel"),
    "mask-invalid": (
        lambda folder: repaint(folder, lambda pixels: pixels[:-1]),
        "image 2 (000001.jpg)",
        "pixels, but the image",
    ),
    "segments-differ": (
        lambda folder: edit(folder, lambda records: records[1]["segments_info"].append(
            records[1]["segments_info"][-1] | {"id": 77})),
        "image 2 (000001.jpg), segment 77",
        "is in the JSON and not in",
    ),
    "segments-differ in the PNG": (
        lambda folder: edit(folder, lambda records: records[1]["segments_info"].pop()),
        "image 2 (000001.jpg)",
        "segment 4 is in",
    ),
    "mask-outside-box": (polygon({"bbox": [20, 10, 42, 20], "segmentation": [POLYGON]}), "annotation 2", "beyond bbox"),
    "mask-outside-box far too large": (
        polygon({"bbox": [0, 0, 100, 80], "segmentation": [[1, 1, 12, 1, 12, 12, 1, 12]]}),
        "annotation 2",
        "little of bbox",
    ),
    "mask-overlap": (
        lambda folder: edit(folder, lambda records: records[1]["segments_info"].append(
            records[1]["segments_info"][0] | {"category_id": 3, "bbox": [1, 2, 3, 4]})),
        "image 2 (000001.jpg)",
        "belong to more than one segment",
    ),
    "thing-without-box": (
        lambda folder: edit(folder, lambda records: records[1]["segments_info"][0].pop("bbox")),
        "image 2 (000001.jpg), segment 1",
        "its box is that of its mask",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_every_planted_fault_of_a_mask_is_found_at_its_record_and_the_cleaned_copy_is_clean(
    name, drawn, load, tmp_path
):
    folder = Path(shutil.copytree(drawn, tmp_path / "data"))
    plant, record, message = FAULTS[name]
    plant(folder)
    result = check_dataset(folder, masks=True, progress=False, num_workers=1)
    code = name.split()[0]
    found = [finding for finding in result.findings if finding.code == code]
    assert found, result.counts()
    assert record in found[0].record
    assert message in found[0].message
    assert found[0].file.endswith("000001.png" if "image 2" in record else "instances_train.json")
    write_clean_copy(result, tmp_path / "clean", progress=False)
    again = check_dataset(tmp_path / "clean", masks=True, progress=False, num_workers=1)
    wrong = [finding for finding in again.findings if finding.code.startswith(("mask-", "segments-", "thing-"))]
    assert {finding.code for finding in wrong} == ({"mask-overlap"} if code == "mask-overlap" else set())
    assert load(tmp_path / "clean", masks=True)[0]["objects"]["mask"]


def test_every_kind_of_finding_about_masks_has_a_planted_fault_and_good_masks_have_none(drawn):
    kinds = {code for code in KINDS if code.startswith(("mask-", "segments-", "thing-"))}
    assert kinds == {name.split()[0] for name in FAULTS}
    assert check_dataset(drawn, masks=True, progress=False, num_workers=1).findings == []
