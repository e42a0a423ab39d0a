"""The conversions of `benchmarks/peers.py`, without which a peer's AP would not be its own."""

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import box_convert
from transformers.utils import ModelOutput

FILE = Path(__file__).parents[1] / "benchmarks" / "peers.py"
MASK = torch.zeros(2, 64, 96, dtype=torch.bool)  # images of 48 x 96 and 64 x 40 pixels
MASK[0, :48] = True
MASK[1, :, :40] = True
BOXES = torch.tensor([[0.5, 0.5, 0.4, 0.6], [0.25, 0.3, 0.1, 0.2]])  # cxcywh, relative to the image


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("peers", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_detections_survive_the_form_of_queries(peers: ModuleType) -> None:
    resized = torch.tensor([[96.0, 48, 96, 48], [40, 64, 40, 64]])
    boxes = box_convert(BOXES, "cxcywh", "xyxy")
    found = [
        {"boxes": boxes * resized[0], "labels": torch.tensor([2, 0]), "scores": torch.tensor([0.9, 0.2])},
        {"boxes": boxes[:0], "labels": torch.tensor([], dtype=torch.long), "scores": torch.tensor([])},
    ]
    outputs = peers.as_queries(found, resized, classes=3)
    original = torch.tensor([[96, 192], [640, 400]])  # (height, width)
    first, second = peers.SigmoidProcessor(2).post_process_object_detection(outputs, 0.0, original)
    assert first["labels"].tolist() == [2, 0]
    torch.testing.assert_close(first["scores"], torch.tensor([0.9, 0.2]))
    torch.testing.assert_close(first["boxes"], boxes * torch.tensor([192.0, 96, 192, 96]))
    assert second["scores"].max() == 0


class Echo(nn.Module):
    """Predicts the boxes it was last trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_queries=300, feat_strides=[16, 32])

    def forward(self, pixel_values: Tensor, labels: list[dict[str, Tensor]] | None = None) -> Any:
        assert all(side % 32 == 0 for side in pixel_values.shape[-2:])
        if labels is not None:
            self.boxes = torch.stack([label["boxes"] for label in labels])
            return ModelOutput(loss=self.boxes.sum())
        return ModelOutput(logits=torch.zeros(2, 2, 3), pred_boxes=self.boxes)


def test_boxes_relative_to_the_padded_image_come_back_relative_to_the_image(peers: ModuleType) -> None:
    model = peers.PaddedImages(Echo())
    labels = [{"boxes": BOXES, "class_labels": torch.tensor([0, 1])}] * 2
    model(torch.zeros(2, 3, 64, 96), MASK, labels)
    torch.testing.assert_close(model.model.boxes[0], BOXES * torch.tensor([1, 0.75, 1, 0.75]))
    torch.testing.assert_close(model.model.boxes[1], BOXES * torch.tensor([40 / 96, 1, 40 / 96, 1]))
    torch.testing.assert_close(model(torch.zeros(2, 3, 64, 96), MASK).pred_boxes, BOXES.repeat(2, 1, 1))
    assert model.model.config.num_queries == 4 * 6 + 2 * 3  # locations of both levels


def test_yolo_labels_are_relative_centres_and_detections_pixels(peers: ModuleType) -> None:
    objects = {"category": [3, 1], "bbox": [[10.0, 20.0, 30.0, 40.0], [0.0, 0.0, 5.0, 5.0]], "iscrowd": [0, 1]}
    assert peers.yolo_labels(objects, 100, 200) == "3 0.250000 0.200000 0.300000 0.200000"
    found = peers.from_yolo(torch.tensor([[10.0, 20, 40, 60, 0.75, 3]]))
    assert found["boxes"].tolist() == [[10, 20, 40, 60]]
    assert (found["scores"].tolist(), found["labels"].tolist()) == ([0.75], [3])
