"""Tiles of large images: their positions, and one box for an object that several tiles show."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from scipy import ndimage

from hf_detr import DetrImageProcessor
from hf_detr.prediction import Tiling, predict_batch
from hf_detr.prediction.predict import LoadedImage
from hf_detr.prediction.tiles import merge_views

# -- positions ---------------------------------------------------------------------------------------------------------


def test_tiles_of_a_small_example():
    assert Tiling(100, 0.5).tiles(200, 100) == [(0, 0, 100, 100), (50, 0, 150, 100), (100, 0, 200, 100)]
    assert Tiling(100, 0.0).tiles(200, 150) == [
        (0, 0, 100, 100), (100, 0, 200, 100), (0, 50, 100, 150), (100, 50, 200, 150),
    ]  # fmt: skip


@pytest.mark.parametrize(("width", "height"), [(640, 640), (100, 100), (640, 30), (1, 1)])
def test_an_image_that_fits_into_one_tile_has_no_tiles(width, height):
    assert Tiling(640, 0.25).tiles(width, height) == []


@pytest.mark.parametrize("overlap", [0.0, 0.2, 0.5, 0.75])
@pytest.mark.parametrize(("width", "height"), [(101, 100), (350, 90), (333, 257), (1000, 100)])
def test_tiles_cover_every_pixel_and_contain_every_small_object(width, height, overlap):
    tiles = Tiling(100, overlap).tiles(width, height)
    covered = np.zeros((height, width), dtype=bool)
    for left, top, right, bottom in tiles:
        assert (right - left, bottom - top) == (min(100, width), min(100, height))
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        covered[top:bottom, left:right] = True
    assert covered.all()
    side = int(100 * overlap)
    for x in range(width - side + 1):
        assert any(left <= x and x + side <= right for left, _, right, _ in tiles)
    assert len(set(tiles)) == len(tiles)


@pytest.mark.parametrize(("size", "overlap"), [(0, 0.1), (-5, 0.1), (100, 1.0), (100, -0.1), (100, 7)])
def test_invalid_tilings_are_refused(size, overlap):
    with pytest.raises(ValueError, match="of tiles must be at least"):
        Tiling(size, overlap)


# -- one box for each object -------------------------------------------------------------------------------------------

FULL = (0, 0, 180, 100)
LEFT, RIGHT = (0, 0, 100, 100), (80, 0, 180, 100)
VIEWS = [FULL, LEFT, RIGHT]


def merge(*found):
    """Detections of each view as (class, score, box in pixels of the image); returns the merged ones in this form."""
    results = []
    for view, objects in zip(VIEWS, found, strict=True):
        shift = torch.tensor([view[0], view[1], view[0], view[1]])
        boxes = torch.tensor([box for *_, box in objects], dtype=torch.float32).reshape(-1, 4) - shift
        results.append(
            {
                "scores": torch.tensor([score for _, score, _ in objects], dtype=torch.float32),
                "labels": torch.tensor([label for label, *_ in objects], dtype=torch.int64),
                "boxes": boxes,
            }
        )
    merged = merge_views(VIEWS, results)
    assert merged["labels"].dtype == torch.int64
    assert merged["boxes"].shape == (len(merged["scores"]), 4)
    rows = zip(merged["labels"].tolist(), merged["scores"].tolist(), merged["boxes"].tolist(), strict=True)
    return [(label, round(score, 4), [round(value, 3) for value in box]) for label, score, box in rows]


def test_an_object_in_two_tiles_is_one():
    small = [82, 40, 97, 60]  # inside the overlap of both tiles
    assert merge([], [(0, 0.7, small)], [(0, 0.9, [83, 40, 97, 61])]) == [(0, 0.9, [83, 40, 97, 61])]


def test_a_fragment_is_dropped_next_to_the_complete_box():
    complete, fragment = [70, 40, 95, 60], [80, 40, 95, 60]
    assert merge([], [(0, 0.6, complete)], [(0, 0.99, fragment)]) == [(0, 0.6, complete)]
    sliver = [80, 40, 83, 60]  # barely inside the tile
    assert merge([], [(0, 0.6, [60, 40, 83, 60])], [(0, 0.99, sliver)]) == [(0, 0.6, [60, 40, 83, 60])]


def test_a_large_object_of_the_full_image_replaces_its_fragments():
    large = [10, 10, 170, 90]
    left, right = [10, 10, 100, 90], [80, 10, 170, 90]
    assert merge([(0, 0.6, large)], [(0, 0.9, left)], [(0, 0.9, right)]) == [(0, 0.6, large)]


def test_fragments_of_an_object_that_no_view_contains_become_one():
    left, right = [50, 20, 100, 60], [80, 21, 140, 60]
    assert merge([], [(0, 0.7, left)], [(0, 0.8, right)]) == [(0, 0.8, [50, 20, 140, 60])]


def test_fragments_of_different_objects_stay_two():
    left, right = [50, 5, 100, 30], [80, 50, 140, 90]
    assert merge([], [(0, 0.7, left)], [(0, 0.8, right)]) == [(0, 0.8, right), (0, 0.7, left)]


def test_neighbours_stay_two():
    first, second = [70, 40, 84, 60], [85, 40, 97, 60]
    found = merge([], [(0, 0.9, first), (0, 0.8, second)], [(0, 0.85, second), (0, 0.3, [80, 40, 84, 60])])
    assert found == [(0, 0.9, first), (0, 0.85, second)]


def test_overlapping_objects_of_one_view_stay_two():
    first, second = [10, 10, 60, 60], [15, 10, 65, 60]
    assert len(merge([(0, 0.5, first)], [(0, 0.9, first), (0, 0.8, second)], [])) == 2


def test_different_classes_and_small_objects_on_large_ones_are_kept():
    box = [82, 40, 97, 60]
    assert len(merge([], [(0, 0.7, box)], [(1, 0.9, box)])) == 2
    large, small = [10, 10, 170, 90], [40, 40, 60, 60]
    assert merge([(0, 0.9, large)], [(0, 0.8, small)], []) == [(0, 0.9, large), (0, 0.8, small)]


def test_a_box_at_the_edge_of_the_image_is_not_truncated():
    corner = [0, 0, 30, 30]
    assert merge([(0, 0.6, [0, 0, 50, 30])], [(0, 0.9, corner)], []) == [(0, 0.9, corner)]


def test_no_detections_give_no_detections():
    assert merge([], [], []) == []


def test_thousands_of_boxes_are_merged():
    generator = torch.Generator().manual_seed(0)
    views = [(0, 0, 1300, 1300), *Tiling(400, 0.25).tiles(1300, 1300)]
    results = []
    for left, top, right, bottom in views:
        corner = torch.rand(100, 2, generator=generator) * torch.tensor([right - left - 30, bottom - top - 30])
        boxes = torch.cat((corner, corner + 10 + 20 * torch.rand(100, 2, generator=generator)), dim=1)
        labels = torch.randint(3, (100,), generator=generator)
        results.append({"scores": torch.rand(100, generator=generator), "labels": labels, "boxes": boxes})
    merged = merge_views(views, results)
    assert len(views) == 17
    assert 1000 < len(merged["scores"]) <= 1700
    assert (merged["scores"].diff() <= 0).all()


# -- end to end, with a detector whose results are known ---------------------------------------------------------------


class SpotFinder:
    """Replaces the pipeline: objects are bright spots of at least 4 pixels after scaling to at most 100 pixels."""

    device = torch.device("cpu")
    image_processor = DetrImageProcessor()

    def __init__(self):
        self.batches = []

    device_placement = staticmethod(nullcontext)

    def get_inference_context(self):
        return torch.no_grad

    def _ensure_tensor_on_device(self, inputs, device):
        return inputs

    def preprocess(self, pixels):
        step = -(-max(pixels.shape[1:]) // 100)
        return {"pixel_values": [pixels[:, ::step, ::step].float()], "target_size": [tuple(pixels.shape[1:])]}

    def _predict(self, inputs, masks_above):
        self.batches.append(len(inputs["pixel_values"]))
        logits, boxes = torch.full((self.batches[-1], 20, 2), -9.0), torch.zeros(self.batches[-1], 20, 4)
        for image, values in enumerate(inputs["pixel_values"]):
            height, width = values.shape[1:]
            spots = ndimage.find_objects(ndimage.label(values[0].numpy() > 0)[0])
            for index, (rows, columns) in enumerate(spots):
                if rows.stop - rows.start >= 4 or columns.stop - columns.start >= 4:
                    x, y = (columns.start + columns.stop) / 2 / width, (rows.start + rows.stop) / 2 / height
                    w, h = (columns.stop - columns.start) / width, (rows.stop - rows.start) / height
                    boxes[image, index] = torch.tensor([x, y, w, h])
                    logits[image, index, 0] = 9.0
        return type("Outputs", (), {"logits": logits, "pred_boxes": boxes}), inputs["target_size"]


def test_tiles_find_small_objects_and_large_ones_once():
    small = [(15, 20, 23, 26), (92, 50, 100, 58), (205, 298, 213, 306), (395, 290, 400, 300), (75, 75, 83, 83)]
    large = (120, 100, 380, 180)
    pixels = torch.zeros(3, 308, 400, dtype=torch.uint8)
    for left, top, right, bottom in (*small, large):
        pixels[:, top:bottom, left:right] = 255
    detector = SpotFinder()
    image = LoadedImage(0, "drawing", (400, 308), detector.preprocess(pixels), pixels)
    found = {}
    for name, tiling in (("full", None), ("tiles", Tiling(100, 0.25))):
        [prediction] = predict_batch(detector, [image], 0.5, tiling, batch_size=4)
        found[name] = sorted(tuple(round(value) for value in box) for box in prediction.boxes.tolist())
    assert found["full"] == [large]
    assert found["tiles"] == sorted([*small, large])
    tiles = len(Tiling(100, 0.25).tiles(400, 308))
    assert detector.batches == [1, 1] + [4] * (tiles // 4) + ([tiles % 4] if tiles % 4 else [])


def test_tiles_need_the_pixels():
    detector = SpotFinder()
    image = LoadedImage(0, "drawing", (400, 308), detector.preprocess(torch.zeros(3, 308, 400)))
    with pytest.raises(ValueError, match="tiles=True"):
        predict_batch(detector, [image], 0.5, Tiling(100))
