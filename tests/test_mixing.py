"""Mosaics and pasted objects: what is drawn in a box stays in it."""

import numpy as np
import pytest
import torch
from torchvision import tv_tensors

from hf_detr.data import Augmentation, AugmentedDataset, CopyPaste, Mosaic
from hf_detr.data.augmentation import with_color_jitter

COLORS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0))


def row(number, size=(60, 80), boxes=((20, 15, 30, 20),), **more):
    """An image with boxes filled with the color of its number."""
    height, width = size
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for x, y, w, h in boxes:
        image[:, y : y + h, x : x + w] = torch.tensor(COLORS[number])[:, None, None]
    count = len(boxes)
    objects = {
        "id": list(range(count)),
        "bbox": [list(map(float, box)) for box in boxes],
        "category": [number] * count,
        "area": [w * h / 2 for _, _, w, h in boxes],
        "iscrowd": [0] * count,
    }
    image = tv_tensors.Image(image)
    return {"image": image, "image_id": number, "width": width, "height": height, "objects": objects | more}


ROWS = [row(0), row(1, (200, 100), ((10, 20, 60, 90),)), row(2, (40, 40), ((5, 5, 30, 30),)), row(3, (37, 91))]


@pytest.mark.parametrize("seed", range(8))
def test_boxes_contain_what_they_contained(seed):
    torch.manual_seed(seed)
    new = Mosaic(1.0, min_visible=0.0)(ROWS[0], ROWS)
    image = new["image"]
    assert (image.shape, image.dtype) == ((3, 60, 80), torch.uint8), "the size of the first"
    assert (new["image_id"], new["height"], new["width"]) == (0, 60, 80)
    drawn = image.float().max(0).values >= 128  # the edges are blurred
    inside = torch.zeros_like(drawn)
    for (x, y, w, h), label in zip(new["objects"]["bbox"], new["objects"]["category"], strict=True):
        left, top, right, bottom = x + 1, y + 1, x + w - 1, y + h - 1
        part = image[:, int(np.ceil(top)) : int(bottom), int(np.ceil(left)) : int(right)]
        color = torch.tensor(COLORS[label])[:, None, None]
        assert (part.int() - color).abs().max() <= 2 if part.numel() else True
        inside[int(y) : int(np.ceil(y + h)), int(x) : int(np.ceil(x + w))] = True
        assert min(x, y, 80 + 1e-6 - x - w, 60 + 1e-6 - y - h) >= 0, "boxes end with the image"
    assert (drawn & ~inside).sum() <= 60, "outside of the boxes are only strips of less than a pixel"


def test_quarters_meet_in_the_middle_half_and_cover_the_image():
    filled = [row(number, boxes=((0, 0, 80, 60),)) for number in range(2)]
    splits, corners = [], set()
    for seed in range(200):
        torch.manual_seed(seed)
        new = Mosaic(1.0, min_visible=0.0)(filled[0], filled[1:])["objects"]
        assert sorted(new["category"]) == [0, 1, 1, 1]
        assert sum(w * h for _, _, w, h in new["bbox"]) == pytest.approx(60 * 80)
        splits.append(new["bbox"][0][2:])
        corners.add(new["category"].index(0))
        assert new["area"] == pytest.approx([w * h / 2 for _, _, w, h in new["bbox"]]), "half of the box, as before"
    low, high = np.min(splits, 0), np.max(splits, 0)
    assert (low >= (19.99, 14.99)).all(), "at least a quarter of each side"
    assert (low < (24, 18)).all()
    assert (high <= (60.01, 45.01)).all(), "at most three quarters"
    assert (high > (56, 42)).all()
    assert corners == {0, 1, 2, 3}, "the first image is in any of them"


@pytest.mark.parametrize("mix", ["mosaic", "paste"])
def test_images_are_brought_to_the_scale_of_the_first(mix):
    """The same object in images of three resolutions is equally large."""
    first = row(0, (100, 100), ())
    others = [row(n, (side, side), ((side // 4,) * 4,)) for n, side in ((1, 40), (2, 400), (3, 1000))]
    heights = {1: [], 2: [], 3: []}
    mixer = (
        Mosaic(1.0, scales=(1.0, 1.0), min_visible=0.95)
        if mix == "mosaic"
        else CopyPaste([each["objects"] for each in others], 1.0, scales=(1.0, 1.0))
    )
    for seed in range(100):
        torch.manual_seed(seed)
        new = mixer(first, others)["objects"]
        for (_, _, _, h), label in zip(new["bbox"], new["category"], strict=True):
            heights[label].append(h)
    for of_image in heights.values():
        assert np.median(of_image) == pytest.approx(25, abs=1.5)


def test_objects_with_little_left_are_dropped_and_crowds_stay_crowds():
    rows = [row(0, (64, 64), ((0, 0, 64, 64),), iscrowd=[1]) for _ in range(4)]
    torch.manual_seed(0)
    whole = Mosaic(1.0, scales=(1.0, 1.0), min_visible=0.0)(rows[0], rows)["objects"]
    fractions = [w * h / 64**2 for _, _, w, h in whole["bbox"]]
    limit = sorted(fractions)[1] + 1e-9
    torch.manual_seed(0)
    some = Mosaic(1.0, scales=(1.0, 1.0), min_visible=limit)(rows[0], rows)["objects"]
    assert some["bbox"] == [box for box, left in zip(whole["bbox"], fractions, strict=True) if left >= limit]
    assert some["iscrowd"] == [1] * len(some["bbox"])
    assert len(some["bbox"]) == 2


@pytest.mark.parametrize("seed", range(8))
def test_objects_that_are_whole_stay_however_much_must_be_visible(seed):
    boxes = [[8 * x + 0.1, 8 * y + 0.3, 3.7, 2.9] for x in range(9) for y in range(7)]
    rows = [row(number, boxes=[(0, 0, 80, 60)] * len(boxes)) for number in range(4)]
    for each in rows:
        each["objects"]["bbox"] = boxes
    found = []
    for limit in (0.0, 1.0):
        torch.manual_seed(seed)
        found.append(Mosaic(1.0, scales=(1.0, 1.0), min_visible=limit)(rows[0], rows)["objects"]["bbox"])
    whole = [box for box in found[0] if box[2:] == pytest.approx([3.7, 2.9])]
    assert found[1] == whole
    assert 20 < len(whole) < len(found[0])


def pasted(seed, target, rows, **options):
    torch.manual_seed(seed)
    return CopyPaste([each["objects"] for each in rows], 1.0, **options)(target, rows)


@pytest.mark.parametrize("seed", range(8))
def test_pasted_objects_are_where_their_boxes_are(seed):
    new = pasted(seed, ROWS[0], ROWS[1:])
    objects, image = new["objects"], new["image"]
    assert objects["bbox"][0] == ROWS[0]["objects"]["bbox"][0]
    for (x, y, w, h), label, area in zip(objects["bbox"], objects["category"], objects["area"], strict=True):
        assert min(x, y, 80 + 1e-6 - x - w, 60 + 1e-6 - y - h) >= 0
        assert area == pytest.approx(w * h / 2)
        middle = image[:, int(y + h / 2), int(x + w / 2)]
        assert (middle.int() - torch.tensor(COLORS[label])).abs().max() <= 2
    assert ROWS[0]["objects"]["category"] == [0], "the row itself stays as it is"
    assert (ROWS[0]["image"] == row(0)["image"]).all()


def test_pastes_cover_no_more_than_a_part_of_any_object():
    for seed in range(60):
        boxes = pasted(seed, ROWS[0], ROWS[1:], max_overlap=0.1)["objects"]["bbox"]
        for number, (x, y, w, h) in enumerate(boxes):
            for a, b, c, d in boxes[:number]:
                common = max(0, min(x + w, a + c) - max(x, a)) * max(0, min(y + h, b + d) - max(y, b))
                assert common <= 0.1 * min(c * d, (w * 1.3 + 2) * (h * 1.3 + 2)) * 1.01, "of a paste with its margin"


@pytest.mark.parametrize(("rare", "expected"), [(20, 3 / 4), (1, 3 / 4), (30, 2 / 3)])
def test_classes_are_pasted_the_more_often_the_rarer_they_are(rare, expected):
    """60 objects of one class, and 20, 1 (which counts as 20) or 30 of another."""
    rows = [*(row(1) for _ in range(60)), *(row(2) for _ in range(rare))]
    labels = [label for seed in range(600) for label in pasted(seed, row(0, boxes=()), rows)["objects"]["category"]]
    assert labels.count(2) / len(labels) == pytest.approx(expected, abs=0.06)
    assert 400 < len(labels) < 800, "half of one to three pastes are objects"


@pytest.mark.parametrize(("objects", "expected"), [(2, 3), (24, 3), (80, 10)])
def test_images_with_many_objects_get_more_pastes(objects, expected):
    boxes = tuple((10 * (n % 10), 10 * (n // 10), 4, 4) for n in range(objects))
    rows = [row(1, (200, 200), boxes), row(0, (200, 200), boxes)]
    mixer = CopyPaste([each["objects"] for each in rows], 1.0)
    assert mixer.max_pastes == expected
    assert CopyPaste([each["objects"] for each in rows], 1.0, max_pastes=2).max_pastes == 2
    with pytest.raises(ValueError, match="at least 1, got 0"):
        CopyPaste([each["objects"] for each in rows], 1.0, max_pastes=0)


def test_only_separate_objects_are_pasted_and_no_crowds():
    touching = row(1, (100, 100), ((10, 10, 30, 30), (42, 10, 30, 30), (10, 70, 20, 20)))
    crowd = row(2, (100, 100), ((10, 10, 30, 30),), iscrowd=[1])
    assert CopyPaste([touching["objects"], crowd["objects"]]).by_class == {1: [(0, 2)]}
    none = CopyPaste([crowd["objects"]], 1.0)
    assert none(ROWS[0], [crowd]) is ROWS[0]


@pytest.mark.parametrize("size", [(1, 50), (2, 2), (3, 500), (8, 8)])
def test_images_of_any_size_are_mixed(size):
    small, filled = row(0, size, ()), row(1, size, ((0, 0, size[1], size[0]),))
    for mixer in (Mosaic(1.0), CopyPaste([filled["objects"]], 1.0)):
        for seed in range(20):
            torch.manual_seed(seed)
            assert mixer(small, [filled])["image"].shape == (3, *size)
            assert mixer(ROWS[0], [filled])["image"].shape == (3, 60, 80)


def test_images_with_other_channels_and_values_are_mixed():
    rows = [each | {"image": tv_tensors.Image(each["image"][:2].float() / 255)} for each in ROWS]
    for mixer in (Mosaic(1.0), CopyPaste([each["objects"] for each in rows], 1.0)):
        torch.manual_seed(1)
        image = mixer(rows[0], rows)["image"]
        assert (image.shape, image.dtype) == ((2, 60, 80), torch.float32)
        assert image.max() <= 1 + 1e-6


def test_values_are_brought_to_the_range_of_the_first():
    as_floats = [each | {"image": tv_tensors.Image(each["image"].float() / 255)} for each in ROWS[1:]]
    for first, others in ((ROWS[0], as_floats), (as_floats[0], ROWS)):
        torch.manual_seed(3)
        image = Mosaic(1.0)(first, others)["image"]
        assert image.dtype == first["image"].dtype
        assert image.float().max() == pytest.approx(255 if image.dtype == torch.uint8 else 1)
        assert len(image.float().flatten(1).max(1).values.unique()) <= 2, "no value of the other range is left"


def test_boxes_that_leave_their_image_count_as_what_is_inside():
    beyond, inside = (row(1, (100, 100), ((60, 0, w, 50),)) for w in (150, 40))
    for seed in range(20):
        boxes = []
        for each in (beyond, inside):
            torch.manual_seed(seed)
            boxes.append(Mosaic(1.0)(row(0, (100, 100), ()), [each])["objects"]["bbox"])
        assert boxes[0] == boxes[1]


def test_an_epoch_has_as_many_mosaics_as_wanted_and_is_reproducible():
    none = Augmentation(lambda sample: sample)

    def mixed():
        return AugmentedDataset(ROWS * 100, none, seed=3, mixers=[Mosaic(0.5)])

    plain, dataset = AugmentedDataset(ROWS * 100, none, seed=3), mixed()
    same = [torch.equal(dataset[i]["image"], plain[i]["image"]) for i in range(400)]
    assert 160 < sum(same) < 240
    number = same.index(False)
    before = dataset[number]["image"]
    assert torch.equal(mixed()[number]["image"], before)
    dataset.set_epoch(1)
    assert not torch.equal(dataset[number]["image"], before)


def test_what_cannot_be_mixed_is_refused():
    with pytest.raises(ValueError, match="above 0 and at most 1, got 0"):
        Mosaic(0)
    with pytest.raises(ValueError, match=r"above 0 and at most 1, got 1\.5"):
        CopyPaste([], 1.5)
    of_others = CopyPaste([each["objects"] for each in ROWS[:2]])
    with pytest.raises(ValueError, match="of 2 rows, but there are 3"):
        of_others(ROWS[0], ROWS[:3])
    with_masks = row(1, mask=["x"])
    for mixer in (Mosaic(1.0), CopyPaste([with_masks["objects"]], 1.0)):
        with pytest.raises(ValueError, match="objects have masks"):
            mixer(ROWS[0], [with_masks])
    for other, reason in (
        (row(1) | {"image": ROWS[0]["image"][:1]}, "channels"),
        (row(1, segmentation=[[]]), "must have the same"),
    ):
        other["image"] = tv_tensors.Image(other["image"])
        with pytest.raises(ValueError, match=reason):
            Mosaic(1.0)(ROWS[0], [other])
    outside = row(1, boxes=((20, 15, 30, 20),), bbox=[[90.0, 15.0, 30.0, 20.0]])
    with pytest.raises(ValueError, match=r"Image 1, object 0, bbox \[90"):
        Mosaic(1.0)(ROWS[0], [outside])


def test_color_jitter_changes_colors_and_nothing_else():
    kept = Augmentation(lambda sample: sample, few_sizes=True)
    changed = with_color_jitter(kept, 0.5)
    assert changed.few_sizes
    torch.manual_seed(0)
    new = [changed(ROWS[0]) for _ in range(100)]
    assert all(each["objects"]["bbox"] == ROWS[0]["objects"]["bbox"] for each in new)
    assert all(each["image"].dtype == torch.uint8 for each in new)
    same = sum(torch.equal(each["image"], ROWS[0]["image"]) for each in new)
    assert 30 < same < 70
