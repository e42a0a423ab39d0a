"""The drawn data set, and COCO folders that are checked when opened."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from hf_detr import DetrImageProcessor
from hf_detr.data import CocoDetection, DetectionCollator, draw_shapes_dataset, flip_horizontally
from hf_detr.data.shapes import draw_shapes_image


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    return draw_shapes_dataset(tmp_path_factory.mktemp("shapes"), num_train=40, num_val=10, progress=False)


class TestShapes:
    def test_files_are_ordinary_coco_of_mixed_sizes(self, shapes):
        for split, count in (("train", 40), ("val", 10)):
            content = json.loads((shapes / "annotations" / f"instances_{split}.json").read_text())
            assert len(content["images"]) == count
            assert [category["name"] for category in content["categories"]] == ["rectangle", "ellipse", "triangle"]
            sizes = set()
            for record in content["images"]:
                with Image.open(shapes / split / record["file_name"]) as image:
                    assert image.size == (record["width"], record["height"])
                    assert 96 <= min(image.size) <= max(image.size) <= 160
                    sizes.add(image.size)
            assert len(sizes) > count // 2

    def test_the_seed_decides_and_a_larger_set_starts_with_the_smaller_one(self, shapes, tmp_path):
        other = draw_shapes_dataset(tmp_path, num_train=45, num_val=1, progress=False)
        for name in ("000000.jpg", "000039.jpg"):
            assert (other / "train" / name).read_bytes() == (shapes / "train" / name).read_bytes()
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
        """Seen on the pixels: the colour of a lone shape begins at the box's edges."""
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

    def test_drawing_again_keeps_what_is_there_and_refuses_other_contents(self, shapes):
        before = {p: p.stat().st_mtime_ns for p in shapes.rglob("*.jpg")}
        draw_shapes_dataset(shapes, num_train=40, num_val=10, progress=False)
        assert {p: p.stat().st_mtime_ns for p in shapes.rglob("*.jpg")} == before
        with pytest.raises(FileExistsError, match="was not drawn with seed=1"):
            draw_shapes_dataset(shapes, num_train=40, num_val=10, seed=1, progress=False)


@pytest.fixture
def coco(tmp_path):
    """A COCO folder to spoil: two images, category ids 3 and 17, and a function that writes it."""
    (tmp_path / "train").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (80, 60)).save(tmp_path / "train" / name)
    content = {
        "images": [
            {"id": 1, "file_name": "a.png", "width": 80, "height": 60},
            {"id": 2, "file_name": "b.png", "width": 80, "height": 60},
        ],
        "categories": [{"id": 17, "name": "dog"}, {"id": 3, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 2, "category_id": 17, "bbox": [8, 6, 16, 12], "area": 192, "iscrowd": 0},
            {"id": 2, "image_id": 2, "category_id": 3, "bbox": [0, 0, 80, 60], "area": 4800, "iscrowd": 0},
        ],
    }

    def write(place="annotations/instances_train.json"):
        path = tmp_path / place
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
        return tmp_path

    return content, write


class TestCocoFolders:
    def test_category_ids_become_contiguous_and_lead_back(self, coco):
        data = CocoDetection(coco[1](), "train", progress=False)
        assert data.id2label == {0: "cat", 1: "dog"}
        assert data.category_ids == {0: 3, 1: 17}
        assert len(data) == 2
        assert data[0][1] == {"image_id": 1, "annotations": []}
        assert [record["category_id"] for record in data[1][1]["annotations"]] == [1, 0]

    @pytest.mark.parametrize(
        "place",
        [
            "annotations/instances_train.json",
            "annotations/instances_train2017.json",
            "train.json",
            "train/_annotations.coco.json",
        ],
    )
    def test_layouts(self, coco, place):
        assert len(CocoDetection(coco[1](place), "train", progress=False)[1][1]["annotations"]) == 2

    def test_classes_of_another_split_are_matched_by_name(self, coco):
        data = CocoDetection(coco[1](), "train", id2label={0: "dog", 1: "bird", 2: "cat"}, progress=False)
        assert [record["category_id"] for record in data[1][1]["annotations"]] == [0, 2]
        with pytest.raises(ValueError, match="has a category 'cat', which does not fit"):
            CocoDetection(coco[1](), "train", id2label={0: "dog"}, progress=False)

    def test_roboflows_unused_parent_category_is_no_class(self, coco):
        content, write = coco
        for category in content["categories"]:
            category["supercategory"] = "animals"
        content["categories"] += [{"id": 0, "name": "animals", "supercategory": "none"}]
        assert CocoDetection(write(), "train", progress=False).id2label == {0: "cat", 1: "dog"}

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda c: c["annotations"][0].update(bbox=[1, 2, 0, 5]), "annotation 1 of image 2: bbox .* has no area"),
            (lambda c: c["annotations"][0].update(bbox=[90, 2, 5, 5]), "annotation 1 .* outside its image"),
            (lambda c: c["annotations"][1].update(bbox=[1, 2, 3]), "annotation 2 .* four finite numbers"),
            (lambda c: c["annotations"][0].update(category_id=5), "annotation 1 .* no category 5"),
            (lambda c: c["annotations"][0].update(image_id=9), "annotation 1 of image 9: no such image"),
            (
                lambda c: c["images"][0].update(width=60, height=80),
                r"image 1 \(a.png\) is \(80, 60\) but recorded as \(60, 80\)",
            ),
            (lambda c: c["images"][0].update(file_name="c.png"), "image 1: .*c.png"),
            (lambda c: c.pop("categories"), r"is not COCO: it lacks \['categories'\]"),
            (lambda c: c["categories"][0].update(name="cat"), "names two categories 'cat'"),
            (lambda c: c["images"][0].update(id=2), "two images share one id"),
        ],
    )
    def test_faults_are_found_before_training_with_file_and_record(self, coco, spoil, message):
        content, write = coco
        spoil(content)
        with pytest.raises(ValueError, match=message) as caught:
            CocoDetection(write(), "train", progress=False)
        assert "instances_train.json" in str(caught.value)

    def test_a_size_recorded_without_the_exif_orientation_is_explained(self, coco):
        content, write = coco
        exif = Image.Exif()
        exif[0x0112] = 6
        folder = write()
        Image.new("RGB", (80, 60)).save(folder / "train" / "a.jpg", exif=exif)
        content["images"][0] |= {"file_name": "a.jpg"}
        with pytest.raises(ValueError, match="its EXIF orientation not applied"):
            CocoDetection(write(), "train", progress=False)
        content["images"][0] |= {"width": 60, "height": 80}
        assert CocoDetection(write(), "train", progress=False)[0][0].size == (60, 80)

    def test_missing_folders_say_what_was_looked_for(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="instances_train"):
            CocoDetection(tmp_path, "train")

    def test_a_truncated_image_is_named_when_it_is_read(self, coco):
        folder = coco[1]()
        path = folder / "train" / "a.jpg"
        coco[0]["images"][0]["file_name"] = "a.jpg"
        coco[1]()
        noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:2000])
        with pytest.raises(ValueError, match=r"a\.jpg cannot be read"):
            CocoDetection(folder, "train", progress=False)[0]


def test_flipping_takes_boxes_along_and_back():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 50, 3), dtype=np.uint8))
    annotation = {"image_id": 1, "annotations": [{"bbox": [5, 10, 20, 8], "category_id": 0}]}
    flipped, moved = flip_horizontally(image, annotation)
    assert moved["annotations"][0]["bbox"] == [25, 10, 20, 8]
    assert np.array_equal(np.asarray(flipped)[10:18, 25:45], np.asarray(image)[10:18, 5:25][:, ::-1])
    assert annotation["annotations"][0]["bbox"] == [5, 10, 20, 8]
    again, back = flip_horizontally(flipped, moved)
    assert np.array_equal(np.asarray(again), np.asarray(image))
    assert back == annotation


def test_batches_are_what_the_model_takes(shapes):
    data = CocoDetection(shapes, "train", keep_in_memory=True, progress=False)
    collate = DetectionCollator(DetrImageProcessor(do_resize=False), flip_probability=1.0)
    batch = collate([data[index] for index in range(4)])
    assert set(batch) == {"pixel_values", "pixel_mask", "labels"}
    torch.testing.assert_close(batch["pixel_values"], collate([data[index] for index in range(4)])["pixel_values"])
    plain = DetectionCollator(DetrImageProcessor(do_resize=False))([data[index] for index in range(4)])
    for flipped, straight in zip(batch["labels"], plain["labels"], strict=True):
        torch.testing.assert_close(flipped["boxes"][:, 0], 1 - straight["boxes"][:, 0])
        torch.testing.assert_close(flipped["boxes"][:, 1:], straight["boxes"][:, 1:])
