"""Augmented rows are consistent: boxes follow the image, and each keeps its category, id and area."""

import importlib.util
import random
import sys
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import tiny_model
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2

from hf_detr import DetrImageProcessor
from hf_detr.data.augmentation import (
    Augmentation,
    RandomSizeCrop,
    flip_rotate_augmentation,
    paper_augmentation,
    with_color_jitter,
)
from hf_detr.data.augmented_dataset import AugmentedDataset
from hf_detr.data.collate import DetectionCollator
from hf_detr.data.masks import encode_masks
from hf_detr.data.schema import detection_info
from hf_detr.model.processor_size import rounded_side

NAN = float("nan")
seed_torch = torch.default_generator.manual_seed  # unlike torch.manual_seed, does not queue calls for GPUs
BOXES = [[10.0, 20.0, 30.0, 40.0], [60.0, 5.0, 50.0, 30.0], [0.5, 0.25, 8.0, 9.0], [100.0, 60.0, 20.0, 20.0]]


def make_row(width=120, height=80, boxes=BOXES, image_id=7):
    """The pixels of each object have its own grey value, 40 * (index + 1); the fourth is a crowd."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    for place, (x, y, w, h) in enumerate(boxes):
        pixels[round(y) : round(y + h), round(x) : round(x + w)] = 40 * (place + 1)
    count = len(boxes)
    return {
        "image": Image.fromarray(pixels),
        "image_id": image_id,
        "file_name": "a.png",
        "width": width,
        "height": height,
        "objects": {
            "id": [100 + i for i in range(count)],
            "bbox": [list(box) for box in boxes],
            "category": [i % 3 for i in range(count)],
            "area": [0.5 * w * h for _, _, w, h in boxes],
            "iscrowd": [int(i == 3) for i in range(count)],
        },
    }


def objects_agree(row, source):
    """All columns but bbox and area of each remaining object equal those of the same id in the source."""
    places = [source["objects"]["id"].index(object_id) for object_id in row["objects"]["id"]]
    for key in ("category", "iscrowd"):
        assert row["objects"][key] == [source["objects"][key][place] for place in places]
    assert {len(values) for values in row["objects"].values()} == {len(places)}
    for (x, y, w, h), area, place in zip(row["objects"]["bbox"], row["objects"]["area"], places, strict=True):
        assert x >= 0 and y >= 0 and w > 0 and h > 0  # noqa: PT018
        assert x + w <= row["width"] + 1e-3 and y + h <= row["height"] + 1e-3  # noqa: PT018
        filled = source["objects"]["area"][place] / np.prod(source["objects"]["bbox"][place][2:])
        assert area == pytest.approx(filled * w * h, rel=1e-4)
    return places


class TestTorchvision:
    def test_all_eight_flips_and_rotations_occur_and_boxes_stay_on_their_pixels(self):
        boxes = [[10, 20, 30, 40], [60, 5, 50, 30], [1, 2, 8, 9]]
        source, seen = make_row(boxes=boxes), set()
        dataset = AugmentedDataset([source] * 48, flip_rotate_augmentation(), seed=0)
        for row in dataset:
            objects_agree(row, source)
            assert row["image"].shape == (3, row["height"], row["width"])
            for (x, y, w, h), object_id in zip(row["objects"]["bbox"], row["objects"]["id"], strict=True):
                place = object_id - 100
                grey = 40 * (place + 1)
                inside = row["image"][:, round(y) : round(y + h), round(x) : round(x + w)]
                assert (inside == grey).all()
                assert (row["image"] == grey).sum() == 3 * boxes[place][2] * boxes[place][3]
            seen.add((row["width"], *(round(value) for value in row["objects"]["bbox"][1])))
        assert len(seen) == 8

    def test_a_flip_mirrors_boxes_and_pixels(self):
        row = Augmentation(v2.RandomHorizontalFlip(p=1.0))(make_row())
        assert row["objects"]["bbox"] == [[80, 20, 30, 40], [10, 5, 50, 30], [111.5, 0.25, 8, 9], [0, 60, 20, 20]]
        assert row["objects"]["id"] == [100, 101, 102, 103]
        assert row["objects"]["area"] == make_row()["objects"]["area"]
        expected = torch.from_numpy(np.array(make_row()["image"])).permute(2, 0, 1).flip(-1)
        torch.testing.assert_close(row["image"], expected)
        assert (row["image_id"], row["file_name"], row["width"], row["height"]) == (7, "a.png", 120, 80)

    def test_a_crop_keeps_exactly_the_boxes_it_shows_with_the_area_it_shows(self):
        """By hand: columns 50 to 109 and rows 10 to 69 of the image."""
        crop = v2.Compose([FixedCrop(top=10, left=50, height=60, width=60)])
        row = Augmentation(crop)(make_row())
        assert row["objects"]["id"] == [101, 103]
        assert row["objects"]["bbox"] == [[10, 0, 50, 25], [50, 50, 10, 10]]
        assert row["objects"]["area"] == pytest.approx([0.5 * 50 * 25, 0.5 * 10 * 10])
        assert row["objects"]["category"] == [1, 0]
        assert row["objects"]["iscrowd"] == [0, 1]
        assert (row["width"], row["height"]) == (60, 60)
        assert row["image"].shape == (3, 60, 60)

    def test_a_resize_scales_boxes_and_areas(self):
        row = Augmentation(v2.Resize((160, 60)))(make_row())
        assert row["objects"]["bbox"][0] == pytest.approx([5, 40, 15, 80])
        assert row["objects"]["area"][0] == pytest.approx(600)
        assert (row["width"], row["height"]) == (60, 160)

    def test_a_crop_may_lose_every_box(self):
        row = Augmentation(FixedCrop(top=62, left=0, height=18, width=90))(make_row())
        assert row["objects"] == {"id": [], "bbox": [], "category": [], "area": [], "iscrowd": []}
        assert DetectionCollator(DetrImageProcessor())([row])["labels"][0]["boxes"].shape == (0, 4)

    def test_slivers_below_the_minimum_are_dropped(self):
        sliver = FixedCrop(top=0, left=0, height=80, width=61)  # leaves one column of the second box
        assert Augmentation(sliver)(make_row())["objects"]["id"] == [100, 101, 102]
        assert Augmentation(sliver, min_side=2)(make_row())["objects"]["id"] == [100, 102]

    def test_boxes_that_change_nothing_come_back_to_the_last_digit(self):
        boxes = [[0.1, 0.2, 0.3 + 3, 7.7], [33.333, 44.444, 11.1, 22.2]]
        row = Augmentation(v2.ColorJitter(brightness=0.5))(make_row(boxes=boxes))
        assert row["objects"] == make_row(boxes=boxes)["objects"]

    def test_a_box_that_reaches_out_of_the_image_is_clipped(self):
        row = Augmentation(v2.Identity())(make_row(boxes=[[-5.0, 70.0, 20.0, 30.0]]))
        assert row["objects"]["bbox"] == [[0, 70, 15, 10]]

    @pytest.mark.parametrize(
        "box",
        [
            [130.0, 5.0, 10.0, 10.0],
            [10.0, 5.0, 0.0, 10.0],
            [10.0, 5.0, NAN, 10.0],
            [10.0, 5.0, 9.0, NAN],
            [NAN, 5.0, 9.0, 9.0],
        ],
    )
    def test_an_invalid_box_of_the_source_is_an_error_and_not_dropped(self, box):
        row = make_row()
        row["objects"]["bbox"][2] = box
        reason = "is outside the image of 120 x 80|has no area|is not finite"
        with pytest.raises(ValueError, match=rf"Image 7, object 2, bbox .*: the box ({reason})"):
            Augmentation(v2.Identity())(row)

    def test_images_without_objects_work(self):
        transforms = [v2.RandomHorizontalFlip(1.0), RandomSizeCrop(), v2.RandomZoomOut(p=1.0), v2.RandomRotation(20)]
        row = Augmentation(v2.Compose(transforms))(make_row(boxes=[]))
        assert row["objects"]["bbox"] == []

    def test_transforms_that_drop_and_reorder_stay_consistent(self):
        """torchvision drops boxes; a transform of the user may reorder them."""
        row = make_row()
        for seed in range(20):
            seed_torch(seed)
            steps = [v2.RandomIoUCrop(), v2.SanitizeBoundingBoxes(min_size=4), Reverse(), v2.RandomRotation(10)]
            new = Augmentation(v2.Compose(steps))(row)
            places = [row["objects"]["id"].index(object_id) for object_id in new["objects"]["id"]]
            assert places == sorted(places, reverse=True)
            assert new["objects"]["category"] == [row["objects"]["category"][place] for place in places]
            assert new["objects"]["iscrowd"] == [row["objects"]["iscrowd"][place] for place in places]

    def test_a_transform_that_drops_boxes_but_not_their_labels_is_an_error(self):
        with pytest.raises(ValueError, match=r"Image 7: the transform returned 3 boxes but 4 labels"):
            Augmentation(lambda s: s | {"boxes": tv_tensors.wrap(s["boxes"][:3], like=s["boxes"])})(make_row())
        with pytest.raises(ValueError, match="boxes as a plain tensor"):
            Augmentation(lambda s: s | {"boxes": s["boxes"][:3]})(make_row())

    def test_grey_and_transparent_images_become_rgb_as_shown(self):
        identity = Augmentation(v2.Identity())
        assert identity(make_row() | {"image": make_row()["image"].convert("L")})["image"].shape == (3, 80, 120)
        clear = Image.new("RGBA", (120, 80), (0, 0, 0, 0))
        assert identity(make_row() | {"image": clear})["image"].unique().tolist() == [255]
        tensor = torch.zeros(3, 80, 120, dtype=torch.uint8)
        assert identity(make_row() | {"image": tensor})["image"].equal(tensor)


class FixedCrop(v2.Transform):
    def __init__(self, **window):
        super().__init__()
        self.window = window

    def transform(self, inpt, params):
        return v2.functional.crop(inpt, **self.window)


class Reverse(v2.Transform):
    """Returns all boxes in reverse order."""

    def forward(self, sample):
        boxes = sample["boxes"]
        reversed_boxes = type(boxes)(boxes.flip(0), format=boxes.format, canvas_size=boxes.canvas_size)
        return sample | {"boxes": reversed_boxes, "labels": sample["labels"].flip(0)}


class TestPaperRecipe:
    def test_sizes_are_the_papers(self):
        augmentation = paper_augmentation({"shortest_edge": 800, "longest_edge": 1333})
        shortest = set()
        for seed in range(60):
            seed_torch(seed)
            row = augmentation(make_row(width=44, height=40, boxes=[]))
            sides = sorted((row["width"], row["height"]))
            assert row["resized"]
            assert sides[1] <= 1333
            assert sides[0] in range(480, 801, 32)
            shortest.add(sides[0])
        assert shortest == set(range(480, 801, 32))

    def test_half_are_mirrored_and_half_are_cropped(self):
        """Checked on a box at the left edge, and on the width of the image."""
        augmentation = paper_augmentation({"height": 64, "width": 64})
        uncropped = mirrored = 0
        source = make_row(width=61, height=41, boxes=[[0.0, 0.0, 20.0, 41.0]])
        for seed in range(200):
            seed_torch(seed)
            row = augmentation(source)
            uncropped += (row["width"], row["height"]) == (61, 41)
            mirrored += bool(row["objects"]["bbox"]) and row["objects"]["bbox"][0][0] > 0
            assert "resized" not in row
        assert uncropped == pytest.approx(100, abs=25)
        assert mirrored == pytest.approx(90, abs=35)

    def test_crops_have_the_papers_sides(self):
        """At the scale at which the shortest edge is 400, 500 or 600: 384 to 600, as `datasets/coco.py` draws them."""
        crop = RandomSizeCrop(shortest_edges=(500,))
        image = tv_tensors.Image(torch.zeros(3, 1000, 1400, dtype=torch.uint8))
        heights, widths, tops = set(), set(), set()
        for seed in range(300):
            seed_torch(seed)
            params = crop.make_params([image])
            heights.add(params["height"])
            widths.add(params["width"])
            tops.add(params["top"])
        assert crop({"image": image})["image"].shape[1] in range(min(heights), max(heights) + 1)
        assert 768 <= min(heights) < 780
        assert 980 < max(heights) <= 1000
        assert 768 <= min(widths) < 780
        assert 1185 < max(widths) <= 1200
        assert min(tops) == 0

    @pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 3), (7, 2000)])
    def test_any_image_can_be_cropped(self, shape):
        for seed in range(10):
            seed_torch(seed)
            image = v2.functional.to_image(torch.zeros(3, *shape, dtype=torch.uint8))
            cropped = RandomSizeCrop()({"image": image})["image"]
            assert 1 <= cropped.shape[1] <= shape[0]
            assert 1 <= cropped.shape[2] <= shape[1]

    def test_all_numbers_scale_with_the_resolution(self):
        augmentation = paper_augmentation({"shortest_edge": 400, "longest_edge": 666})
        sides = set()
        for seed in range(40):
            seed_torch(seed)
            row = augmentation(make_row(width=100, height=20, boxes=[]))
            sides.add(min(row["width"], row["height"]))
            assert max(row["width"], row["height"]) <= 666
        assert max(sides) <= 400
        assert {240, 256} & sides

    def test_a_limit_at_the_shortest_edge_is_kept(self):
        augmentation = paper_augmentation({"shortest_edge": 96, "longest_edge": 96})
        for seed in range(20):
            seed_torch(seed)
            row = augmentation(make_row())
            assert max(row["width"], row["height"]) <= 96

    def test_labels_stay_consistent(self):
        augmentation = paper_augmentation({"shortest_edge": 96, "longest_edge": 160})
        row, lost = make_row(), 0
        for seed in range(40):
            seed_torch(seed)
            new = augmentation(row)
            lost += 4 - len(objects_agree(new, row))
            for (x, y, w, h), object_id in zip(new["objects"]["bbox"], new["objects"]["id"], strict=True):
                value = new["image"][0, int(y + h / 2), int(x + w / 2)].item()
                if object_id != 102 and min(w, h) > 6:  # the middle of the box shows the object's grey value
                    assert value == 40 * (object_id - 99)
        assert lost > 5

    def test_the_processor_does_not_undo_the_scale(self):
        torch.manual_seed(0)
        processor = DetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 160})
        rows = [paper_augmentation(processor.size)(make_row()) for _ in range(4)]
        batch = DetectionCollator(processor)(rows)
        assert [label["size"].tolist() for label in batch["labels"]] == [[row["height"], row["width"]] for row in rows]
        with pytest.raises(ValueError, match="Some rows of this batch are resized"):
            DetectionCollator(processor)([rows[0], make_row()])


class TestRoundedSides:
    @pytest.mark.parametrize(
        ("side", "limit", "expected"),
        [
            (1, None, 1), (7, None, 7), (9, None, 8), (13, None, 12), (100, None, 96), (230, None, 224),
            (250, None, 256), (287, None, 256), (290, None, 320), (384, 640, 384), (639, 640, 640), (800, None, 768),
            (1333, 1333, 1280), (1333, None, 1344), (500, 500, 448), (318, 318, 256),
        ],
    )  # fmt: skip
    def test_by_hand(self, side, limit, expected):
        assert rounded_side(side, limit) == expected

    def test_no_side_changes_by_more_than_an_eighth(self):
        for side in range(1, 2000):
            assert abs(rounded_side(side) - side) <= side / 8

    def test_images_have_few_sizes_and_labels_stay_consistent(self):
        size = {"shortest_edge": 384, "longest_edge": 640}
        rounded, exact, boxes = set(), set(), 0
        for seed in range(60):
            width = 90 + seed
            row = make_row(width=width, height=80, boxes=BOXES[:1] + BOXES[2:3])
            seed_torch(seed)
            same = paper_augmentation(size)(row)
            exact.add((same["width"], same["height"]))
            seed_torch(seed)
            new = paper_augmentation(size, rounded=True)(row)
            rounded.add((new["width"], new["height"]))
            assert new["image"].shape[-2:] == (new["height"], new["width"])
            assert max(new["width"], new["height"]) <= 640
            shorter, longer = sorted((same["width"], same["height"]))
            expected = (rounded_side(shorter, 384), rounded_side(longer, 384 if shorter == longer else 640))
            assert abs(expected[0] / expected[1] / (shorter / longer) - 1) < 0.26
            assert tuple(sorted((new["width"], new["height"]))) == expected
            objects_agree(new, row)
            for (x, y, w, h), object_id in zip(new["objects"]["bbox"], new["objects"]["id"], strict=True):
                if min(w, h) > 16:  # the middle of a narrower rest shows the object beside it, too
                    assert new["image"][0, int(y + h / 2), int(x + w / 2)].item() == 40 * (object_id - 99)
                    boxes += 1
        assert boxes > 60
        assert len(rounded) < len(exact) / 2

    def test_extreme_images(self):
        augmentation = paper_augmentation({"shortest_edge": 384, "longest_edge": 640}, rounded=True)
        for width, height in ((2000, 2), (2, 2000), (1, 1)):
            row = augmentation(make_row(width=width, height=height, boxes=[]))
            assert max(row["width"], row["height"]) <= 640
            assert min(row["width"], row["height"]) >= 1


class TestOneSizePerBatch:
    size: ClassVar = {"shortest_edge": 384, "longest_edge": 640}

    def rows(self, count=5, **options):
        augmentation = paper_augmentation(self.size, rounded=True, **options)
        seed_torch(3)
        return [augmentation(make_row(width=90 + 20 * n, height=80, boxes=BOXES[:1])) for n in range(count)]

    def test_images_and_boxes_get_the_size_of_the_one_with_the_median_aspect_ratio(self):
        rows = self.rows(one_size_per_batch=True)
        ratios = [row["width"] / row["height"] for row in rows]
        assert len({row["image"].shape for row in rows}) > 2
        (middle,) = [row for row, ratio in zip(rows, ratios, strict=True) if ratio == np.median(ratios)]
        processor = DetrImageProcessor(size=self.size, round_size=True)
        batch = DetectionCollator(processor)(rows)
        assert batch["pixel_values"].shape[-2:] == (middle["height"], middle["width"])
        assert batch["pixel_mask"].all()
        found = 0
        for row, label, pixels in zip(rows, batch["labels"], batch["pixel_values"], strict=True):
            assert label["size"].tolist() == [middle["height"], middle["width"]]
            for (x, y, w, h), box in zip(row["objects"]["bbox"], label["boxes"].tolist(), strict=True):
                width, height = row["width"], row["height"]
                assert box == pytest.approx([(x + w / 2) / width, (y + h / 2) / height, w / width, h / height])
                cx, cy = box[0] * middle["width"], box[1] * middle["height"]
                grey = (40 / 255 - 0.485) / 0.229  # the object's own, normalised
                assert pixels[0, int(cy), int(cx)].item() == pytest.approx(grey, abs=0.02)
                found += 1
        assert found > 3

    def test_areas_are_scaled_and_rows_stay_as_they_are(self):
        rows = self.rows(one_size_per_batch=True)
        before = [(row["image"].shape, [list(box) for box in row["objects"]["bbox"]]) for row in rows]
        batch = DetectionCollator(DetrImageProcessor(size=self.size, round_size=True))(rows)
        assert [(row["image"].shape, row["objects"]["bbox"]) for row in rows] == before
        for row, label in zip(rows, batch["labels"], strict=True):
            height, width = label["size"].tolist()
            growth = height * width / (row["height"] * row["width"])
            assert label["area"].tolist() == pytest.approx([area * growth for area in row["objects"]["area"]])

    def test_the_backbone_runs_a_batch_once(self):
        model = tiny_model(backbone="test_resnet").eval()
        calls = []
        model.model.backbone.model.register_forward_hook(lambda *args: calls.append(1))
        processor = DetrImageProcessor(size=self.size, round_size=True)
        for options, several in (({}, True), ({"one_size_per_batch": True}, False)):
            calls.clear()
            batch = DetectionCollator(processor)(self.rows(**options))
            with torch.no_grad():
                model(batch["pixel_values"], batch["pixel_mask"])
            assert (len(calls) > 1) == several

    def test_of_other_colors_too_and_not_where_the_processor_resizes(self):
        changed = with_color_jitter(paper_augmentation(self.size, rounded=True, one_size_per_batch=True), 0.5)
        assert changed(make_row())["one_size_per_batch"]
        fixed = paper_augmentation({"height": 96, "width": 96}, rounded=True, one_size_per_batch=True)
        assert "one_size_per_batch" not in fixed(make_row())
        with pytest.raises(ValueError, match="needs `resizes`"):
            Augmentation(v2.RandomHorizontalFlip(), one_size_per_batch=True)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
    def test_masks_and_grey_images_follow(self, dtype):
        rows = []
        for height, width in ((64, 96), (96, 96), (64, 128)):
            pixels = torch.zeros(1, height, width, dtype=dtype)
            mask = np.zeros((height, width), dtype=np.uint8)
            top, left, bottom, right = height // 4, width // 4, height // 2, width // 2
            pixels[:, top:bottom, left:right] = 200 if dtype == torch.uint8 else 0.8
            mask[top:bottom, left:right] = 1
            box = [float(left), float(top), float(right - left), float(bottom - top)]
            row = make_row(width=width, height=height, boxes=[box])
            row["objects"]["mask"] = encode_masks(torch.from_numpy(mask)[None].bool())
            image = tv_tensors.Image(pixels)
            rows.append(row | {"image": image, "resized": True, "one_size_per_batch": True})
        rows.append(rows[0] | {"objects": {name: [] for name in rows[0]["objects"]}})
        scaled = {} if dtype == torch.uint8 else {"do_rescale": False}
        processor = DetrImageProcessor(size=self.size, num_channels=1, image_mean=[0.0], image_std=[1.0], **scaled)
        batch = DetectionCollator(processor)(rows)
        assert batch["pixel_values"].shape == (4, 1, 64, 96)
        for label, pixels in zip(batch["labels"][:3], batch["pixel_values"], strict=False):
            assert label["masks"].shape == (1, 64, 96)
            assert label["boxes"].tolist() == [pytest.approx([0.375, 0.375, 0.25, 0.25])]
            inside = torch.zeros(64, 96, dtype=torch.bool)
            inside[16:32, 24:48] = True
            assert torch.equal(label["masks"][0], inside)
            assert pixels[0, 24, 36].item() == pytest.approx(0.8, abs=0.02)
        assert batch["labels"][3]["masks"].shape == (0, 64, 96)

    def test_a_batch_of_one_image_is_as_it_was(self):
        (row,) = self.rows(1, one_size_per_batch=True)
        processor = DetrImageProcessor(size=self.size)
        alone = DetectionCollator(processor)([row])["pixel_values"]
        assert torch.equal(alone, DetectionCollator(processor)([row | {"one_size_per_batch": False}])["pixel_values"])

    def test_a_panorama_keeps_its_size(self):
        wide = {"resized": True, "one_size_per_batch": True}
        sizes = [(64, 96), (96, 96), (64, 128), (64, 192), (64, 224), (128, 64)]  # height, width; the median is 2:1
        rows = [make_row(width=w, height=h, boxes=[]) | wide for h, w in sizes]
        batch = DetectionCollator(DetrImageProcessor(size=self.size))(rows)
        expected = [[64, 128], [64, 128], [64, 128], [64, 128], [64, 128], [128, 64]]
        assert [label["size"].tolist() for label in batch["labels"]] == expected
        batch = DetectionCollator(DetrImageProcessor(size=self.size))(
            [*rows[:3], make_row(width=300, height=64, boxes=[]) | wide]
        )
        assert batch["labels"][-1]["size"].tolist() == [64, 300], "it would have been pressed to less than a half"

    def test_rows_of_two_augmentations_are_refused(self):
        mixed = [*self.rows(2, one_size_per_batch=True), *self.rows(2)]
        with pytest.raises(ValueError, match="Some rows of this batch are resized"):
            DetectionCollator(DetrImageProcessor(size=self.size))(mixed)


class TestAlbumentations:
    @pytest.mark.parametrize("box_format", ["coco", "pascal_voc", "yolo", "albumentations"])
    def test_any_box_format_and_label_fields(self, box_format):
        alb = pytest.importorskip("albumentations")
        steps = [alb.HorizontalFlip(p=1.0), alb.Crop(x_min=0, y_min=10, x_max=60, y_max=70)]
        for fields in ([], ["category"], ["labels", "ids"]):
            params = alb.BboxParams(format=box_format, label_fields=fields)
            self.check_flip_and_crop(Augmentation(alb.Compose(steps, bbox_params=params))(make_row()))

    @staticmethod
    def check_flip_and_crop(row):
        # after the flip, boxes begin at 80, 10, 111.5 and 0; the crop shows columns below 60 and rows 10 to 69
        assert row["objects"]["id"] == [101, 103]
        np.testing.assert_allclose(row["objects"]["bbox"], [[10, 0, 50, 25], [0, 50, 20, 10]], atol=1e-4)
        assert row["objects"]["area"] == pytest.approx([0.5 * 50 * 25, 0.5 * 20 * 10], rel=1e-5)
        assert row["objects"]["iscrowd"] == [0, 1]
        assert row["image"].dtype == torch.uint8
        assert (row["width"], row["height"]) == (60, 60)

    def test_images_without_objects_work(self):
        alb = pytest.importorskip("albumentations")
        transform = alb.Compose([alb.RandomCrop(40, 40)], bbox_params=alb.BboxParams(format="coco"))
        assert Augmentation(transform)(make_row(boxes=[]))["objects"]["bbox"] == []

    def test_boxes_dropped_by_its_own_rules_are_gone_everywhere(self):
        alb = pytest.importorskip("albumentations")
        params = alb.BboxParams(format="coco", min_visibility=0.6)
        transform = alb.Compose([alb.Crop(x_min=0, y_min=0, x_max=84, y_max=80)], bbox_params=params)
        row = Augmentation(transform)(make_row())
        assert objects_agree(row, make_row()) == [0, 2]

    def test_a_transform_that_ignores_boxes_is_an_error(self):
        alb = pytest.importorskip("albumentations")
        for transform in (alb.Compose([alb.HorizontalFlip()]), alb.HorizontalFlip()):
            with pytest.raises(ValueError, match="bbox_params"):
                Augmentation(transform)

    def test_the_package_does_not_need_it(self, monkeypatch):
        """Every module of `hf_detr.data` is executed again while the import of albumentations fails."""
        monkeypatch.setitem(sys.modules, "albumentations", None)
        for module in [m for name, m in sys.modules.items() if name.startswith("hf_detr.data.")]:
            specification = importlib.util.spec_from_file_location(module.__name__, module.__file__)
            specification.loader.exec_module(importlib.util.module_from_spec(specification))


def random_albumentations():
    alb = pytest.importorskip("albumentations")
    steps = [alb.RandomSizedBBoxSafeCrop(64, 96, p=0.5), alb.HorizontalFlip(), alb.RandomBrightnessContrast(p=1.0)]
    return Augmentation(alb.Compose(steps, bbox_params=alb.BboxParams(format="coco", label_fields=["category"])))


def draws_from_everywhere(row):
    """A function instead of a transform, which uses all three global generators."""
    numbers = [torch.rand(()).item(), np.random.rand(), random.random()]
    return row | {"image": row["image"], "objects": row["objects"] | {"area": [numbers[i % 3] for i in range(4)]}}


AUGMENTATIONS = {
    "paper": lambda: paper_augmentation({"shortest_edge": 64, "longest_edge": 107}),
    "square": lambda: paper_augmentation({"height": 64, "width": 64}),
    "albumentations": random_albumentations,
    "function": lambda: draws_from_everywhere,
}


def epochs_of(loader, dataset, epochs=(0, 1)):
    found = []
    for epoch in epochs:
        dataset.set_epoch(epoch)
        found.append(list(loader))
    return found


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a["pixel_values"].equal(b["pixel_values"])
        assert a["pixel_mask"].equal(b["pixel_mask"])
        for x, y in zip(a["labels"], b["labels"], strict=True):
            assert all(x[key].equal(y[key]) for key in x)


class TestAugmentedDataset:
    @pytest.mark.parametrize("name", AUGMENTATIONS)
    def test_an_epoch_is_the_same_with_any_number_of_workers(self, name):
        rows = [make_row(image_id=index) for index in range(6)]
        collate = DetectionCollator(DetrImageProcessor(size={"height": 64, "width": 64}))
        expected = None
        for workers in (0, 2):
            dataset = AugmentedDataset(rows, AUGMENTATIONS[name](), seed=3)
            loader = DataLoader(
                dataset, batch_size=2, collate_fn=collate, num_workers=workers, persistent_workers=workers > 0
            )
            first, second = epochs_of(loader, dataset)
            if expected is None:
                expected = first, second
                with pytest.raises(AssertionError):
                    assert_equal(first, second)
            assert_equal(first, expected[0])
            assert_equal(second, expected[1])
            assert_equal(epochs_of(loader, dataset, epochs=[0])[0], expected[0])

    def test_rows_differ_by_seed_epoch_and_index(self):
        rows = [make_row()] * 2
        draws = set()
        for seed in (0, 1):
            dataset = AugmentedDataset(rows, draws_from_everywhere, seed)
            for epoch in (0, 1):
                dataset.set_epoch(epoch)
                draws |= {number for index in (0, 1) for number in dataset[index]["objects"]["area"][:3]}
        assert len(draws) == 2 * 2 * 2 * 3

    def test_the_global_random_generators_are_not_changed(self):
        dataset = AugmentedDataset([make_row()], draws_from_everywhere, seed=0)
        numbers = []
        for augment in (False, True):
            torch.manual_seed(5)
            np.random.seed(5)
            random.seed(5)
            if augment:
                _ = dataset[0]
            numbers.append((torch.rand(()).item(), np.random.rand(), random.random()))
        assert numbers[0] == numbers[1]

    def test_nor_those_of_a_row_by_another_that_is_augmented_meanwhile(self):
        def read_another(row, rows):
            rows[1]
            return row

        def read_own(row):
            _ = own[1] if row["image_id"] == 0 else None
            return draws_from_everywhere(row)

        rows = [make_row(image_id=index) for index in range(2)]
        expected = AugmentedDataset(rows, draws_from_everywhere, seed=0)[0]["objects"]["area"]
        other = AugmentedDataset(rows, draws_from_everywhere, seed=1)
        drawn = AugmentedDataset(other, draws_from_everywhere, seed=0, mixers=[read_another])[0]
        assert drawn["objects"]["area"] == expected
        own = AugmentedDataset(rows, read_own, seed=0)
        assert own[0]["objects"]["area"] == expected
        before = np.random.get_bit_generator()
        own[0]
        assert np.random.get_bit_generator() is before

    def test_also_when_the_augmentation_fails(self):
        def fail(row):
            torch.rand(())
            raise KeyError("no")

        before = torch.get_rng_state()
        with pytest.raises(KeyError):
            AugmentedDataset([make_row()], fail)[0]
        assert torch.get_rng_state().equal(before)

    def test_a_datasets_dataset_gives_the_rows_of_a_list(self):
        rows = [make_row(image_id=index) for index in range(3)]
        stored = Dataset.from_list(rows, features=detection_info(["a", "b", "c"], [1, 2, 3], "test").features)
        augmentation = paper_augmentation({"shortest_edge": 64, "longest_edge": 107})
        for ours, theirs in zip(
            AugmentedDataset(rows, augmentation, 1), AugmentedDataset(stored, augmentation, 1), strict=True
        ):
            assert ours["image"].equal(theirs["image"])
            assert ours["objects"] == theirs["objects"]

    def test_a_negative_seed_is_an_error(self):
        with pytest.raises(ValueError, match="seed must not be negative"):
            AugmentedDataset([], draws_from_everywhere, seed=-1)


class TestCollator:
    def test_batches_fit_the_model(self):
        batch = DetectionCollator(DetrImageProcessor(do_resize=False))([make_row(), make_row(width=140, image_id=8)])
        assert set(batch) == {"pixel_values", "pixel_mask", "labels"}
        assert batch["pixel_values"].shape == (2, 3, 80, 140)
        assert batch["pixel_mask"].sum((1, 2)).tolist() == [80 * 120, 80 * 140]
        label = batch["labels"][0]
        assert label["image_id"].tolist() == [7]
        assert label["class_labels"].tolist() == [0, 1, 2]  # the fourth is a crowd
        torch.testing.assert_close(label["boxes"][0], torch.tensor([25 / 120, 40 / 80, 30 / 120, 40 / 80]))
        assert label["area"].tolist() == [600, 750, 36]

    def test_tensors_and_pil_images_are_the_same(self):
        collate = DetectionCollator(DetrImageProcessor(size={"height": 64, "width": 64}))
        row = make_row()
        tensor = torch.from_numpy(np.array(row["image"])).permute(2, 0, 1)
        assert_equal([collate([row])], [collate([row | {"image": tensor}])])

    def test_optional_columns_may_be_missing(self):
        row = make_row()
        row["objects"] = {key: row["objects"][key] for key in ("bbox", "category")}
        assert DetectionCollator(DetrImageProcessor())([row])["labels"][0]["class_labels"].tolist() == [0, 1, 2, 0]
