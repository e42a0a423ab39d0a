"""Detectors of transformers with other architectures, measured and used by our scripts."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from conftest import padded_batch
from PIL import Image
from script_runner import run_script

from hf_detr.data import draw_shapes_dataset
from hf_detr.interop.loading import load_detector
from hf_detr.interop.other_detectors import OtherDetector, is_other

ROOT = Path(__file__).parents[1]
NAMES = {0: "rectangle", 1: "ellipse", 2: "triangle"}
COMMON = {
    "encoder_in_channels": [16, 32, 64], "feat_strides": [8, 16, 32], "encoder_hidden_dim": 32, "encoder_ffn_dim": 64,
    "encoder_attention_heads": 2, "d_model": 32, "num_queries": 20, "decoder_in_channels": [32, 32, 32],
    "decoder_ffn_dim": 64, "decoder_layers": 2, "decoder_attention_heads": 2, "num_denoising": 0,
    "id2label": NAMES, "label2id": {name: index for index, name in NAMES.items()},
}  # fmt: skip


def save_other(kind, folder):
    """A small detector with random weights, and its processor."""
    torch.manual_seed(0)
    if kind == "yolos":
        config = transformers.YolosConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=[64, 96],
            num_detection_tokens=20, id2label=NAMES, label2id=COMMON["label2id"], use_mid_position_embeddings=False,
        )  # fmt: skip
        model = transformers.YolosForObjectDetection(config)
        processor = transformers.YolosImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    else:
        network = transformers.RTDetrResNetConfig(
            embedding_size=10, hidden_sizes=[10, 16, 32, 64], depths=[1, 1, 1, 1], layer_type="basic",
            out_features=["stage2", "stage3", "stage4"],
        )  # fmt: skip
        config_class, model_class = {
            "rt_detr": (transformers.RTDetrConfig, transformers.RTDetrForObjectDetection),
            "d_fine": (transformers.DFineConfig, transformers.DFineForObjectDetection),
        }[kind]
        model = model_class(config_class(backbone_config=network, **COMMON))
        processor = transformers.RTDetrImageProcessor(size={"height": 64, "width": 64})
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return model.eval(), processor


@torch.no_grad()
@pytest.mark.parametrize("kind", ["rt_detr", "d_fine"])
def test_outputs_and_boxes_are_those_of_transformers_without_padding(kind, tmp_path):
    theirs, their_processor = save_other(kind, tmp_path)
    assert is_other(tmp_path)
    model, processor = load_detector(tmp_path)
    assert isinstance(model, OtherDetector)
    sizes = [(64, 96), (64, 64), (64, 96)]
    images, mask = padded_batch(sizes)
    found = model(images, mask)
    for number, (height, width) in enumerate(sizes):
        expected = theirs(images[number : number + 1, :, :height, :width])
        torch.testing.assert_close(found.logits[number], expected.logits[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.pred_boxes[number], expected.pred_boxes[0], atol=1e-5, rtol=1e-5)
    picture = torch.randint(0, 256, (3, 50, 75), dtype=torch.uint8)
    ours = processor(picture, input_data_format="channels_first", return_tensors="pt", do_pad=False)["pixel_values"][0]
    other = their_processor(picture, return_tensors="pt")["pixel_values"][0]
    assert (ours - other).abs().max() < 0.02, "as it prepares images"
    targets = [(640, 960)] * 3
    for mine, of_theirs in zip(
        processor.post_process_object_detection(found, 0.2, targets),
        their_processor.post_process_object_detection(found, threshold=0.2, target_sizes=torch.tensor(targets)),
        strict=True,
    ):
        assert all(torch.equal(mine[name], of_theirs[name]) for name in ("scores", "labels"))
        inside = of_theirs["boxes"].clamp(min=0).minimum(torch.tensor([960.0, 640, 960, 640]))
        assert torch.equal(mine["boxes"], inside)
    all_of_them = processor.post_process_object_detection(found, 0.0, targets)
    for few, every in zip(processor.post_process_object_detection(found, 0.0, targets, 3), all_of_them, strict=True):
        assert torch.equal(few["scores"], every["scores"].sort(descending=True).values[:3])
        assert few["boxes"].shape == (3, 4)
    with pytest.raises(ValueError, match="hf_detr's own models"):
        processor.post_process_object_detection(found, "per_class", targets)


def test_yolos_whose_images_have_other_sizes_is_refused(tmp_path):
    save_other("yolos", tmp_path)
    with pytest.raises(ValueError, match="multiples of 16"):
        load_detector(tmp_path)


@pytest.mark.parametrize("kind", ["rt_detr", "d_fine"])
def test_evaluate_and_predict_take_them(kind, tmp_path):
    save_other(kind, tmp_path / "model")
    draw_shapes_dataset(tmp_path / "shapes", num_train=2, num_val=6, progress=False)
    examples = ROOT / "examples"
    arguments = ["--model", "model", "--dataset", "shapes", "--output", "metrics.json", "--report", "report"]
    arguments += ["--max_detections", "300"]
    code, said = run_script(examples / "evaluate.py", *arguments, cwd=tmp_path)
    assert code == 0, said
    assert "AP50" in said
    assert json.loads((tmp_path / "metrics.json").read_text())["AP"] >= 0
    assert (tmp_path / "report" / "report.html").is_file()
    code, said = run_script(
        examples / "predict.py",
        "shapes/val",
        "--model",
        "model",
        "--threshold",
        "0",
        "--output_dir",
        "out",
        cwd=tmp_path,
    )
    assert code == 0, said
    detections = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {record["image_id"] for record in detections} == set(range(1, 7))
    drawn = next((tmp_path / "out").rglob("*.png"), None) or next((tmp_path / "out").rglob("*.jpg"))
    with Image.open(drawn) as picture:
        assert min(picture.size) >= 96
    for script, more, reason in (
        ("evaluate.py", ["--dataset", "shapes", "--save_thresholds"], "--save_thresholds is for the checkpoints of"),
        ("evaluate.py", ["--dataset", "shapes", "--masks"], "has no masks to measure"),
        ("predict.py", ["shapes/val", "--threshold", "per_class"], "for the models of hf_detr"),
    ):
        code, said = run_script(examples / script, "--model", "model", *more, cwd=tmp_path)
        assert code == 1, said
        assert reason in said
