"""How long a run takes, and the epochs that fit into a given time."""

import dataclasses
import json
from pathlib import Path

import pytest
from script_runner import run_script

from hf_detr.data import draw_shapes_dataset, load_detection_dataset
from hf_detr.training import build_processor, parse_finetune_args, resolve_recipe
from hf_detr.training.batch_size import typical
from hf_detr.training.timing import Pace, expected_seconds, fit_epochs

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


@pytest.fixture
def recipe(place):
    args = parse_finetune_args("", ["--epochs", "10", "--eval_every", "3"])
    train_set = load_detection_dataset(place / "data", "train", progress=False)
    chosen = resolve_recipe(args, train_set, build_processor(args))
    return dataclasses.replace(chosen, batch_size=4, gradient_accumulation_steps=2)


def test_seconds_are_those_of_all_steps_and_evaluations(recipe):
    # 10 epochs of 3 steps of 2 * 4 * 2 images, and 4 evaluations of 32 images by 2 processes
    assert expected_seconds(recipe, Pace(0.5, 0.25), 40, 32, 2) == pytest.approx(0.5 * 30 + 0.25 * 4 * 16)


@pytest.mark.parametrize("eval_every", [None, 1, 5])
@pytest.mark.parametrize("seconds", [0, 7, 150, 600])
def test_no_larger_number_of_epochs_fits_into_the_time(recipe, eval_every, seconds):
    pace, counts = Pace(1.0, 0.5), (16, 8, 1)

    def takes(epochs):
        every = eval_every or -(-epochs // 20)
        return 2 * epochs + 4 * -(-epochs // every)  # two steps an epoch, 8 images an evaluation

    found = fit_epochs(recipe, pace, seconds, *counts, eval_every=eval_every)
    assert found.eval_every == (eval_every or -(-found.epochs // 20))
    assert takes(found.epochs) <= max(seconds, takes(1))
    assert all(takes(epochs) > seconds for epochs in range(found.epochs + 1, 1000))


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


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_run_takes_as_many_epochs_as_fit_and_knows_them_again(place):
    command = [*SMALL, "--minutes", "0.1", "--eval_every", "3", "--output_dir", "run"]
    code, output = run_script(EXAMPLE, *command, cwd=place)
    assert code == 0, output
    assert "with an evaluation after every 3." in output
    saved = json.loads((place / "run" / "args.json").read_text())
    lines = log_of(place / "run")
    assert (saved["minutes"], saved["eval_every"]) == (0.1, 3)
    assert saved["epochs"] == len(lines) > 1
    assert lines[-1]["learning_rate"] == 0, "the schedule ends with the epochs"
    code, output = run_script(EXAMPLE, *command, cwd=place)
    assert code == 1
    assert "it has ended" in output, "the same command, though the step was measured anew"
    code, output = run_script(EXAMPLE, "--output_dir", "run", "--resume", "--minutes", "9", cwd=place)
    assert code != 0
    assert "--minutes cannot change within a run" in output
    more = str(len(lines) + 1)
    code, output = run_script(EXAMPLE, "--output_dir", "run", "--resume", "--epochs", more, cwd=place)
    assert code == 0, output
    assert len(log_of(place / "run")) == len(lines) + 1


def test_the_batch_size_is_found_before_the_time_is_measured(place):
    command = [*SMALL, "--minutes", "0.05", "--auto_batch_size", "--output_dir", "fitted"]
    code, output = run_script(EXAMPLE, *command, cwd=place)
    assert code == 0, output
    assert output.index("asked for;") < output.index("Expected: about")
