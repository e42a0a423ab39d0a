"""How long a run takes, and the epochs that fit into a given time."""

import dataclasses
import json
from pathlib import Path

import pytest
from script_runner import run_script

from hf_detr.data import draw_shapes_dataset, load_detection_dataset
from hf_detr.training import build_processor, parse_finetune_args, resolve_recipe
from hf_detr.training.batch_size import typical
from hf_detr.training.timing import EVALUATION, expected_seconds

pytestmark = pytest.mark.xdist_group("timing")
EXAMPLE = Path(__file__).parents[1] / "examples" / "finetune.py"
SMALL = [
    "--dataset", "data", "--backbone", "test_resnet", "--backbone_weights", "none", "--image_size", "64",
    "--num_workers", "0", "--set", "d_model=32", "encoder_layers=1", "decoder_layers=1", "num_queries=6",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("timing")
    draw_shapes_dataset(folder / "data", num_train=16, num_val=4, progress=False)
    return folder


def test_seconds_are_those_of_all_steps_and_evaluations(place):
    args = parse_finetune_args("", ["--epochs", "10", "--eval_every", "3"])
    train_set = load_detection_dataset(place / "data", "train", progress=False)
    recipe = dataclasses.replace(
        resolve_recipe(args, train_set, build_processor(args)), batch_size=4, gradient_accumulation_steps=2
    )
    # 10 epochs of 3 steps of 2 * 4 * 2 images, and 4 evaluations of 32 images, which take as long as 2 steps' images
    assert expected_seconds(recipe, 0.5, 40, 32, 2) == pytest.approx(0.5 * (30 + EVALUATION * 4 * 32 / 16))


def test_typical_images_are_neither_the_smallest_nor_the_largest():
    sizes = [(10 * k, 10) for k in range(1, 10)]
    assert typical(sizes)(1) == [4]
    assert typical(sizes)(3) == [1, 4, 7]
    assert typical(sizes[:2])(3) == [0, 1, 1]


@pytest.mark.parametrize("wrong", [["--epochs", "3"], ["--quick"]])
def test_time_and_epochs_exclude_each_other(wrong, capsys):
    with pytest.raises(SystemExit):
        parse_finetune_args("", ["--minutes", "5", *wrong])
    assert "--minutes chooses the number of epochs" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_finetune_args("", ["--minutes", "0"])


def test_a_run_takes_as_many_epochs_as_fit_and_knows_them_again(place):
    command = [*SMALL, "--minutes", "0.2", "--output_dir", "run"]
    code, output = run_script(EXAMPLE, *command, cwd=place)
    assert code == 0, output
    assert "Expected: about " in output
    saved = json.loads((place / "run" / "args.json").read_text())
    lines = [json.loads(line) for line in (place / "run" / "log.jsonl").read_text().splitlines()]
    assert saved["minutes"] == 0.2
    assert saved["epochs"] == len(lines) > 1
    assert lines[-1]["learning_rate"] == 0, "the schedule ends with the epochs"
    code, output = run_script(EXAMPLE, *command, cwd=place)
    assert code == 1
    assert "it has ended" in output, "the same command, though the step was measured anew"
