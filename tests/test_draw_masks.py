"""Masks drawn on images: where, in which colours, and a legend that can be read."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_detr.visualization import draw_masks
from hf_detr.visualization.draw import class_colour
from hf_detr.visualization.masks_drawing import segment_shades

NAMES = {0: "cat", 1: "dog", 2: "sky"}


def scene():
    """A cat at the left, a dog at the right, sky in the upper half of the rest; the lower half has no segment."""
    ids = np.zeros((40, 60), dtype=np.int32)
    ids[:20] = 3
    ids[5:30, 5:20], ids[5:30, 40:55] = 1, 2
    info = [{"id": i, "label_id": i - 1, "score": 0.9 - 0.1 * i} for i in (1, 2, 3)]
    return Image.new("RGB", (60, 40), (100, 100, 100)), ids, info


def test_pixels_are_blended_with_the_colour_of_their_class_and_others_stay():
    image, ids, info = scene()
    drawn = np.asarray(draw_masks(image, ids, info, NAMES, legend=False)).astype(int)
    assert drawn.shape == (40, 60, 3)
    assert np.asarray(image).std() == 0
    assert (drawn[ids == 0] == 100).all()
    for place, label in (((15, 12), 0), ((15, 47), 1), ((2, 30), 2)):
        assert drawn[place].tolist() == pytest.approx((100 + np.array(class_colour(label))) / 2, abs=1)
    for edge, label in (((15, 5), 0), ((29, 10), 0), ((15, 54), 1), ((19, 30), 2)):
        assert tuple(drawn[edge]) == class_colour(label)
    assert tuple(drawn[0, 30]) != class_colour(2), "the edge of the image is no outline"


def test_maps_of_ids_and_separate_masks_give_the_same_picture_as_arrays_and_tensors():
    image, ids, info = scene()
    expected = draw_masks(image, ids, info, NAMES).tobytes()
    masks = np.stack([ids == i for i in (1, 2, 3)])
    assert draw_masks(image, masks, info, NAMES).tobytes() == expected
    assert draw_masks(image, torch.from_numpy(ids), info, NAMES).tobytes() == expected
    shifted = [segment | {"id": segment["id"] - 1} for segment in info]
    assert draw_masks(image, np.where(ids == 0, -1, ids - 1), shifted, NAMES).tobytes() == expected


def test_of_overlapping_masks_the_one_with_the_higher_score_is_on_top():
    masks = np.ones((2, 30, 30), dtype=bool)
    info = [{"id": 1, "label_id": 0, "score": 0.9}, {"id": 2, "label_id": 1, "score": 0.4}]
    drawn = np.asarray(draw_masks(Image.new("RGB", (30, 30)), masks, info, NAMES, opacity=1.0, legend=False))
    assert (drawn == class_colour(0)).all()


def test_objects_of_a_class_differ_and_a_class_has_its_colour_in_every_picture():
    shades = segment_shades([0, 1, 0, 0, 0, 0])
    assert shades[0] == class_colour(0) == segment_shades([2, 0])[1]
    assert len(set(shades)) == 6
    assert shades[1] == class_colour(1)


@pytest.mark.parametrize("size", [(60, 40), (400, 40), (40, 400), (1600, 200)])
def test_the_legend_names_each_class_once_below_the_image(size):
    width, height = size
    ids = np.zeros((height, width), dtype=int)
    thirds = np.array_split(np.arange(width), 4)
    for number, columns in enumerate(thirds, start=1):
        ids[:, columns] = number
    info = [{"id": i, "label_id": label} for i, label in ((1, 0), (2, 1), (3, 1), (4, 2))]
    image = Image.new("RGB", size, (100, 100, 100))
    drawn = np.asarray(draw_masks(image, ids, info, NAMES))
    plain = np.asarray(draw_masks(image, ids, info, NAMES, legend=False))
    assert np.array_equal(drawn[:height, :width], plain)
    panel = drawn[height:]
    assert panel.shape[0] >= 15
    patches = {label: (panel == class_colour(label)).all(axis=2) for label in NAMES}
    areas = {label: int(mask.sum()) for label, mask in patches.items()}
    assert len(set(areas.values())) == 1, "a patch of one size for each class, none cut off"
    side = areas[0] ** 0.5
    assert side == int(side) >= 9
    texts = (panel < 100).all(axis=2)
    for mask in patches.values():
        rows, columns = np.nonzero(mask)
        beside = texts[rows.min() : rows.max() + 1, columns.max() + 4 :]
        assert beside.any(), "a name beside each patch"
    assert not texts[:, -1].any(), "no name is cut off at the right"


def test_nothing_found_leaves_the_image_as_it_is():
    image, ids, _ = scene()
    assert draw_masks(image, np.full_like(ids, -1), [], NAMES).tobytes() == image.tobytes()
    assert draw_masks(image, np.zeros((0, 40, 60)), [], NAMES).tobytes() == image.tobytes()


def test_what_does_not_fit_is_refused():
    image, ids, info = scene()
    with pytest.raises(ValueError, match=r"have 40 x 60 as the image .*got \(60, 40\).*target_sizes"):
        draw_masks(image, ids.T, info, NAMES)
    with pytest.raises(ValueError, match="there are 1 masks, but 3 records"):
        draw_masks(image, (ids > 0)[None], info, NAMES)
    with pytest.raises(ValueError, match=r"the ids \[1\] are in the map of segments"):
        draw_masks(image, ids, info[1:], NAMES)
