"""Figures of what a model has learned: query slots, training curves; and detections for other packages."""

import json

import numpy as np
import pytest
import torch

from hf_detr import DetrConfig, DetrForDetection, DetrImageProcessor
from hf_detr.data import draw_shapes_dataset, load_detection_dataset
from hf_detr.visualization import from_supervision, query_slots, to_supervision, training_curves
from hf_detr.visualization.query_slots import box_kinds

SMALL = {
    "backbone": "test_resnet", "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "num_queries": 7,
}  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = draw_shapes_dataset(tmp_path_factory.mktemp("slots"), num_train=1, num_val=5, progress=False)
    return load_detection_dataset(folder, "val", cache_dir=folder / "cache", progress=False)


def test_each_query_gets_a_panel_with_its_boxes(dataset):
    model, processor = DetrForDetection(DetrConfig(**SMALL)), DetrImageProcessor(size={"height": 64, "width": 64})
    figure = query_slots(model, dataset, processor, columns=3, num_images=3, progress=False)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert sorted(title.split(":")[0] for title in titles) == [f"query {number}" for number in range(7)]
    chosen = query_slots(model, dataset, processor, queries=[4], progress=False)
    with torch.no_grad():
        model.eval()
        expected = [
            model(**processor(images=row["image"], return_tensors="pt")).pred_boxes[0, 4, :2] for row in dataset
        ]
    points = np.concatenate([np.asarray(drawn.get_offsets()) for drawn in chosen.axes[0].collections])
    drawn, wanted = sorted(points.tolist()), sorted(torch.stack(expected).tolist())
    assert np.allclose(drawn, wanted, atol=1e-4)
    with pytest.raises(ValueError, match="no number 7"):
        query_slots(model, dataset, processor, queries=[7])
    with pytest.raises(ValueError, match="no images"):
        query_slots(model, dataset.select([]), processor)


def test_boxes_are_small_or_large_and_wide_or_tall():
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.5, 0.2], [0.5, 0.5, 0.2, 0.5]])
    assert {name: mask.tolist() for name, mask in box_kinds(boxes).items()} == {
        "small": [True, False, False],
        "large, wide": [False, True, False],
        "large, tall": [False, False, True],
    }


LINES = [
    {"epoch": 1, "loss": 9.0, "loss_ce": 1.0, "loss_ce_0": 1.5, "loss_ce_0_denoising": 2.0, "loss_ce_dense": 3.0,
     "loss_giou": 0.9, "learning_rate": 1e-4, "backbone_learning_rate": 1e-5, "matched_iou": 0.2, "AP": None},
    {"epoch": 2, "loss": 8.0, "loss_ce": 0.9, "loss_ce_0": 1.4, "loss_ce_0_denoising": 1.9, "loss_ce_dense": 2.0,
     "loss_giou": 0.8, "learning_rate": 1e-4, "backbone_learning_rate": 1e-5, "matched_iou": 0.3, "AP": 0.1},
]  # fmt: skip


def test_curves_have_every_term_by_layer_and_the_last_line_of_an_epoch(tmp_path):
    repeated = [LINES[0] | {"loss": 99.0}, *LINES]  # the epoch was trained again after an interruption
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in repeated))
    figure = training_curves(tmp_path)
    drawn = {axes.get_title(): {line.get_label(): line for line in axes.lines} for axes in figure.axes}
    assert drawn["loss"]["all terms, weighted"].get_ydata().tolist() == [9.0, 8.0]
    layers = drawn["class loss by layer"]
    assert set(layers) == {"last layer", "layer 1", "layer 1, denoising", "all locations"}
    assert layers["layer 1, denoising"].get_ydata().tolist() == [2.0, 1.9]
    assert drawn["validation metrics"]["AP"].get_xdata().tolist() == [2]
    assert "GIoU loss by layer" in drawn
    assert "box L1 loss by layer" not in drawn


def test_a_loss_term_of_ones_own_has_a_panel(tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps(LINES[1] | {"loss_iou_quality": 0.5, "loss_iou_quality_0": 0.6}))
    titles = [axes.get_title() for axes in training_curves(tmp_path).figure.axes]
    assert "iou_quality loss by layer" in titles


def test_a_run_without_a_log_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        training_curves(tmp_path)
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(ValueError, match="no epoch yet"):
        training_curves(tmp_path)
    (tmp_path / "log.jsonl").write_text(json.dumps(LINES[0]) + "\n{")
    with pytest.raises(ValueError, match="line 2: not JSON"):
        training_curves(tmp_path)


NAMES = {0: "cat", 1: "dog"}
FOUND = [
    {"score": 0.5, "label": "dog", "box": {"xmin": 1.5, "ymin": 2.0, "xmax": 30.0, "ymax": 40.0}},
    {"score": 0.25, "label": "cat", "box": {"xmin": 0.0, "ymin": 0.0, "xmax": 9.0, "ymax": 8.0}},
]


def test_detections_go_to_supervision_and_back():
    supervision = pytest.importorskip("supervision")
    there = to_supervision(FOUND, {"cat": 0, "dog": 1})
    assert isinstance(there, supervision.Detections)
    assert there.xyxy.tolist() == [[1.5, 2.0, 30.0, 40.0], [0.0, 0.0, 9.0, 8.0]]
    assert there.class_id.tolist() == [1, 0]
    assert there.data["class_name"].tolist() == ["dog", "cat"]
    assert from_supervision(there, NAMES) == FOUND
    assert from_supervision(to_supervision([], {}), NAMES) == []
    annotated = supervision.BoxAnnotator().annotate(np.zeros((50, 50, 3), dtype=np.uint8), there)
    assert annotated.any()


def test_detections_that_miss_a_class_or_score_are_refused():
    supervision = pytest.importorskip("supervision")
    with pytest.raises(ValueError, match="no class 'dog'"):
        to_supervision(FOUND, {"cat": 0})
    with pytest.raises(ValueError, match="no class 0"):
        from_supervision(to_supervision(FOUND, {"cat": 0, "dog": 1}), {1: "dog"})
    with pytest.raises(ValueError, match="need both"):
        from_supervision(supervision.Detections(xyxy=np.zeros((1, 4))), NAMES)
