"""Boxes and captions drawn on images."""

import numpy as np
from PIL import Image

from hf_detr.data import category_ids, draw_shapes_dataset, load_detection_dataset
from hf_detr.visualization import compare_with_ground_truth, contact_sheet, draw_boxes, draw_detections
from hf_detr.visualization.draw import _place_caption


def test_boxes_are_drawn_at_their_edges_on_a_copy():
    image = Image.new("RGB", (100, 80))
    drawn = np.asarray(draw_boxes(image, [(10, 20, 50, 60)], colours=[(255, 0, 0)], width=1))
    assert np.asarray(image).max() == 0
    rows, columns = np.nonzero(drawn[..., 0])
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (10, 20, 50, 60)
    assert drawn[40, 30].tolist() == [0, 0, 0]


def test_detections_of_one_class_share_a_colour_and_grey_images_become_colour():
    found = [
        {"label": label, "score": 0.9, "box": {"xmin": x, "ymin": 60, "xmax": x + 20, "ymax": 90}}
        for label, x in (("cat", 5), ("dog", 35), ("cat", 65))
    ]
    drawn = np.asarray(draw_detections(Image.new("L", (100, 100)), found, {"cat": 0, "dog": 1}))
    first, second, third = (tuple(drawn[90, x + 10].tolist()) for x in (5, 35, 65))
    assert first == third != second


def test_captions_of_boxes_with_one_corner_do_not_cover_each_other():
    taken = []
    for box in ((0, 0, 150, 150), (0, 0, 190, 100), (0, 0, 90, 190), (50, 60, 90, 80)):
        place = _place_caption(box, (40.0, 12.0), (200, 200), taken)
        left, top, right, bottom = place
        assert 0 <= left < right <= 200
        assert 0 <= top < bottom <= 200
        assert (right - left, bottom - top) == (40, 12)
        assert all(right <= a or c <= left or bottom <= b or d <= top for a, b, c, d in taken)
        taken.append(place)
    assert taken[0] == (0, 0, 40, 12)
    assert taken[3] == (50, 48, 90, 60), "above its box, where there is room"


def test_captions_stay_within_the_image():
    for box in ((-5, -5, 10, 10), (90, 30, 99, 39), (0, 0, 100, 40)):
        drawn = np.asarray(draw_boxes(Image.new("RGB", (100, 40)), [box], ["a long caption"], [(255, 0, 0)]))
        text = (drawn == (0, 0, 0)).all(2) & (np.roll(drawn, 1, 1) == (255, 0, 0)).all(2)
        assert text.any()
    assert draw_boxes(Image.new("RGB", (30, 6)), [(0, 0, 9, 5)], ["longer than the image"]).size == (30, 6)


def test_small_images_are_enlarged_before_drawing():
    found = [{"label": "cat", "score": 0.9, "box": {"xmin": 10, "ymin": 20, "xmax": 40, "ymax": 30}}]
    drawn = draw_detections(Image.new("RGB", (50, 40)), found, min_side=500)
    assert drawn.size == (500, 400)
    coloured = np.asarray(drawn).any(2)
    assert coloured[300, 150:350].all(), "the lower edge of the box"
    assert draw_detections(Image.new("RGB", (600, 40)), found, min_side=500).size == (600, 40)


def test_sheets_hold_every_image():
    sheet = contact_sheet([Image.new("RGB", (50, 20), "red")] * 5, columns=2, cell=64)
    assert sheet.size == (128, 192)
    assert (np.asarray(sheet)[..., 1] == 0).sum() > 5 * 40 * 15
    assert np.asarray(contact_sheet([], cell=64)).min() == 255


def test_predictions_are_drawn_beside_the_ground_truth(tmp_path):
    folder = draw_shapes_dataset(tmp_path / "data", num_train=1, num_val=12, progress=False)
    data = load_detection_dataset(folder, "val", cache_dir=tmp_path / "cache", progress=False)
    ground_truth = [
        {"image_id": row["image_id"], "category_id": category_ids(data)[category], "bbox": bbox, "score": 1.0}
        for row in data
        for category, bbox in zip(row["objects"]["category"], row["objects"]["bbox"], strict=True)
    ]
    with_them = np.asarray(compare_with_ground_truth(data, ground_truth, num_images=4))
    without = np.asarray(compare_with_ground_truth(data, [], num_images=4))
    assert with_them.shape == without.shape == (320, 1280, 3)
    assert (with_them != without).any()
