"""Learning curves: the forecast, and the runs on nested subsets."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from script_runner import run_script

from hf_detr.data import draw_shapes_dataset
from hf_detr.training.arguments import parse_finetune_args
from hf_detr.training.learning_curve import CONFIDENCE, LearningCurve, draw_learning_curve, forecast
from hf_detr.training.setup import nested_subset

ROOT = Path(__file__).parents[1]


def test_a_power_law_is_continued_exactly():
    images = [100, 200, 400, 800]
    scores = [1 - 0.9 * n**-0.25 for n in images]
    found = forecast(images, scores, 1600)
    assert found.score == pytest.approx(1 - 0.9 * 1600**-0.25)
    assert found.high - found.low < 1e-6
    assert found.images == 1600


def test_the_interval_holds_what_it_promises():
    """Noise on the logarithm of the error, as the regression assumes: the interval contains the truth with noise in
    `CONFIDENCE` of the cases, whatever their number."""
    generator, images = np.random.default_rng(0), np.array([50, 100, 200, 400])
    inside, trials = 0, 2000
    for _ in range(trials):
        noise = generator.normal(0, 0.05, 5)
        scores = 1 - 0.9 * images**-0.2 * np.exp(noise[:4])
        found = forecast(images.tolist(), scores.tolist(), 800)
        inside += found.low <= 1 - 0.9 * 800**-0.2 * np.exp(noise[4]) <= found.high
    assert inside / trials == pytest.approx(CONFIDENCE, abs=3 * (CONFIDENCE * (1 - CONFIDENCE) / trials) ** 0.5)


def test_a_forecast_stays_a_score_and_refuses_too_little():
    falling = forecast([10, 20, 40], [0.3, 0.2, 0.01], 80)
    assert 0 <= falling.low <= falling.score <= falling.high < 1
    with pytest.raises(ValueError, match="at least 3 different"):
        forecast([10, 20], [0.1, 0.2], 40)
    with pytest.raises(ValueError, match="at least 3 different"):
        forecast([10, 20, 20], [0.1, 0.2, 0.3], 40)
    for scores, reason in (
        ([-1, 0.2, 0.3], "not -1"),
        ([0.9, -0.5, 0.3], "not -0.5"),
        ([0.5, 0.9, 1.0], "not 1"),
        ([0, 0, 0], "a score above 0"),
    ):
        with pytest.raises(ValueError, match=reason):
            forecast([10, 20, 40], scores, 80)


def test_subsets_are_nested_and_of_the_seed(load, tmp_path):
    draw_shapes_dataset(tmp_path / "data", num_train=20, num_val=2, progress=False)
    dataset = load(tmp_path / "data")
    few, more = (set(nested_subset(dataset, n, 3, "data")["file_name"]) for n in (5, 12))
    assert (len(few), len(more)) == (5, 12)
    assert few < more
    assert set(nested_subset(dataset, 5, 4, "data")["file_name"]) != few
    with pytest.raises(ValueError, match="data has 20 training images, fewer than --train_images 21"):
        nested_subset(dataset, 21, 3, "data")


@pytest.mark.parametrize("other", [["--overfit", "8"], ["--quick"], ["--train_images", "5"], ["--push_to_hub", "a/b"]])
def test_options_that_do_not_fit_are_refused(other, capsys):
    with pytest.raises(SystemExit):
        parse_finetune_args("", ["--learning_curve", "--output_dir", "runs/x", *other])
    assert f"omit {other[0]}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_finetune_args("", ["--learning_curve"])
    assert "name a folder for them with --output_dir" in capsys.readouterr().err


def test_models_are_trained_on_more_and_more_images_and_a_start_again_continues(tmp_path):
    draw_shapes_dataset(tmp_path / "data", num_train=33, num_val=8, progress=False)
    command = [
        ROOT / "examples" / "finetune.py", "--dataset", "data", "--learning_curve",
        "--output_dir", "curve", "--epochs", "1", "--image_size", "64", "--num_workers", "0",
        "--backbone", "test_resnet", "--backbone_weights", "none",
        "--set", "encoder_layers=1", "decoder_layers=1", "d_model=32", "encoder_ffn_dim=32", "decoder_ffn_dim=32",
        "encoder_attention_heads=4", "decoder_attention_heads=4", "num_queries=10",
    ]  # fmt: skip
    code, output = run_script(*command, cwd=tmp_path)
    assert code == 0, output
    assert "models are trained on 8, 16, 33 images" in output
    found = json.loads((tmp_path / "curve" / "learning_curve.json").read_text())
    assert found["images"] == [8, 16, 33]
    assert found["back_test"] is None, "three points leave none to test with"
    for number, score in zip(found["images"], found["scores"], strict=True):
        folder = tmp_path / "curve" / f"images-{number}"
        assert json.loads((folder / "args.json").read_text())["train_images"] == number
        assert json.loads((folder / "metrics.json").read_text())["AP"] == score
    assert (tmp_path / "curve" / "learning_curve.png").stat().st_size > 5000
    lines = output.splitlines()
    if any(found["scores"]):
        assert any(line.strip().startswith("66 images   forecast: AP") for line in lines)
    parts = [json.loads((tmp_path / "curve" / f"images-{n}" / "args.json").read_text()) for n in (8, 16, 33)]
    for name in ("set", "batch_size", "learning_rate", "augmentation", "ema"):
        assert parts[0][name] == parts[1][name] == parts[2][name], "the model and the rates are those of all images"

    written = (tmp_path / "curve" / "images-16" / "model.safetensors").stat().st_mtime
    code, again = run_script(*command, cwd=tmp_path)
    assert code == 0, again
    assert (tmp_path / "curve" / "images-16" / "model.safetensors").stat().st_mtime == written
    assert again.splitlines()[-3:] == lines[-3:]
    assert "images-16 is complete and is used as it is" in again

    file = tmp_path / "data" / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"][2] -= 1
    file.write_text(json.dumps(content))
    code, refused = run_script(*command, cwd=tmp_path)
    assert code == 1
    assert "curve was begun with other images or annotations" in refused


@pytest.mark.parametrize("scores", [[0.2, 0.5, 1.0], [0.0, 0.0, 0.0]])
def test_scores_are_kept_where_no_forecast_can_be_made(scores, tmp_path, capsys):
    curve = LearningCurve.__new__(LearningCurve)
    curve._recipe, curve.folder, curve.images = SimpleNamespace(metric="AP"), tmp_path, [8, 16, 32]
    for number, score in zip(curve.images, scores, strict=True):
        (tmp_path / f"images-{number}").mkdir()
        (tmp_path / f"images-{number}" / "metrics.json").write_text(json.dumps({"AP": score}))
    assert curve.finish()["forecast"] is None
    assert json.loads((tmp_path / "learning_curve.json").read_text())["scores"] == scores
    assert "A forecast needs" in capsys.readouterr().out
    assert (tmp_path / "learning_curve.png").exists()


def test_the_figure_shows_measured_and_expected_scores():
    scores, expected = [0.3, 0.4, 0.5, 0.58], {"images": 800, "score": 0.65, "low": 0.6, "high": 0.7}
    figure = draw_learning_curve(
        {"metric": "AP", "images": [50, 100, 200, 400], "scores": scores, "confidence": 0.8, "forecast": expected}
    )
    [axes] = figure.axes
    assert axes.lines[0].get_ydata().tolist() == scores
    assert axes.lines[1].get_xdata()[-1] == 800
    assert axes.get_ylabel() == "AP"
