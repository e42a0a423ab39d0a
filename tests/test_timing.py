"""How long a run takes, and the epochs that fit into a given time."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from script_runner import run_script

from hf_detr import DetrImageProcessor
from hf_detr.data import (
    AugmentedDataset,
    DetectionCollator,
    build_loader,
    draw_shapes_dataset,
    load_detection_dataset,
    paper_augmentation,
)
from hf_detr.training import build_processor, parse_finetune_args, resolve_recipe, timing, training_run
from hf_detr.training.batch_size import typical
from hf_detr.training.optimization import build_schedule, move_schedule, stretch_schedule
from hf_detr.training.timing import Pace, RunClock, expected_seconds, fit_epochs, seconds_of_epoch

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


@pytest.mark.parametrize("one_size", [False, True])
def test_batches_of_one_size_are_measured_in_several_sizes(place, one_size):
    processor = DetrImageProcessor(size={"shortest_edge": 320, "longest_edge": 640})
    augmentation = paper_augmentation(processor.size, rounded=True, one_size_per_batch=one_size)
    rows = load_detection_dataset(place / "data", "train", progress=False)
    dataset, collate = AugmentedDataset(rows, augmentation), DetectionCollator(processor)
    loader = build_loader(dataset, collate, batch_size=4, training=True)
    shapes = []
    options = {"processor": processor, "accelerator": Accelerator(), "few_sizes": False, "one_size": one_size}
    seconds = timing._seconds(loader, 4, lambda batch: shapes.append(batch["pixel_values"].shape), **options)
    assert seconds > 0
    assert (len(shapes), len(set(shapes)) > 3) == ((9, True) if one_size else (4, False))
    assert int(loader.dataset._epoch) == 0


def test_seconds_are_those_of_all_steps_and_evaluations(recipe):
    # 3 steps of 2 * 4 * 2 images, and evaluations of 32 images by 2 processes
    of_epoch = seconds_of_epoch(recipe, Pace(0.5, 0.25), 40, 32, 2)
    assert of_epoch == (1.5, 4.0)
    # evaluations after the epochs 3, 6, 9 and 10; the first one is over after 4
    assert expected_seconds(10, 3, *of_epoch) == pytest.approx(10 * 1.5 + 4 * 4)
    assert expected_seconds(10, 3, *of_epoch, done=4) == pytest.approx(6 * 1.5 + 3 * 4)
    assert expected_seconds(10, 3, *of_epoch, done=6) == pytest.approx(4 * 1.5 + 2 * 4)


@pytest.mark.parametrize(("done", "at_least"), [(0, 1), (1, 2), (1, 1), (13, 14), (13, 13)])
@pytest.mark.parametrize("eval_every", [None, 1, 5])
@pytest.mark.parametrize("seconds", [-1, 0, 7, 150, 600])
def test_no_larger_number_of_epochs_fits_into_the_time(eval_every, seconds, done, at_least):
    def takes(epochs):
        every = eval_every or -(-epochs // 20)
        evaluated = [epoch for epoch in range(1, epochs + 1) if epoch % every == 0 or epoch == epochs]
        return 2 * (epochs - done) + 4 * sum(epoch > done for epoch in evaluated)

    epochs, every = fit_epochs(seconds, 2.0, 4.0, eval_every=eval_every, done=done, at_least=at_least)
    assert every == (eval_every or -(-epochs // 20))
    assert epochs >= at_least
    assert takes(epochs) <= max(seconds, takes(at_least))
    assert all(takes(more) > seconds for more in range(epochs + 1, 1000))


def test_a_clock_tells_epochs_from_evaluations_and_forgets_the_first_ones(monkeypatch):
    now, accelerator = [100.0], Accelerator(cpu=True)
    monkeypatch.setattr(timing.time, "monotonic", lambda: now[0])
    clock = RunClock(evaluation=7.0)
    for training, evaluating in ((9.0, 0.0), (2.0, 5.0), (3.0, 0.0), (2.5, 6.0)):
        now[0] += training
        if evaluating:
            with clock.evaluation():
                now[0] += evaluating
        now[0] += 0.5  # a checkpoint
        clock.end_epoch()
        if not evaluating:
            assert clock.measured(accelerator)[2] in (7.0, 5.0), "expected, until one is timed"
    assert clock.measured(accelerator) == (29.5, 3.25, 6.0)


def test_a_schedule_that_is_stretched_has_the_rates_of_the_other_one_from_there_on():
    def rates(steps, schedule):
        found = []
        for _ in range(steps):
            found.append(schedule.get_last_lr())
            schedule.optimizer.step()
            schedule.step()
        return found

    def schedule_of(total_steps, kind):
        groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.1)]
        return build_schedule(torch.optim.SGD(groups), kind, warmup=0.1, decay=0.5, total_steps=total_steps)

    for kind in ("wsd", "step", "cosine"):
        stretched, other = schedule_of(40, kind), schedule_of(100, kind)
        rates(8, stretched)
        stretch_schedule(stretched, kind, warmup=0.1, decay=0.5, total_steps=100)
        move_schedule(stretched, 8)
        assert rates(92, stretched) == rates(100, other)[8:]


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


def plan_for_a_slow_machine():
    training_run.measure_pace = lambda *_: Pace(step=30.0, evaluation=0.0)


def plan_for_a_fast_machine():
    training_run.measure_pace = lambda *_: Pace(step=0.0005, evaluation=0.0)


def a_slow_machine():
    """A run that is planned for a slow machine and runs on one: an epoch takes longer than the time."""
    plan_for_a_slow_machine()
    plain = training_run.RunClock.measured
    training_run.RunClock.measured = lambda *given: (999.0, 999.0, plain(*given)[2])


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_on_a_faster_machine_than_planned_gets_more_epochs(place, processes):
    folder = f"faster-{processes}"
    command = [*SMALL, "--minutes", "0.1", "--output_dir", folder]
    code, output = run_script(EXAMPLE, *command, cwd=place, setup=plan_for_a_slow_machine, processes=processes)
    assert code == 0, output
    lines, saved = log_of(place / folder), json.loads((place / folder / "args.json").read_text())
    assert f"New plan: {len(lines)} epochs instead of 1," in output
    assert output.count("New plan") == 1
    assert "The learning rate rises" in output, "it was 0 after the epoch that was to be the last one"
    assert saved["epochs"] == len(lines) > 2
    assert lines[-1]["learning_rate"] == 0
    assert "AP" in lines[-1]
    code, output = run_script(EXAMPLE, *command, cwd=place, processes=processes)
    assert code == 1
    assert "it has ended" in output


def test_a_run_on_a_slower_machine_than_planned_gets_fewer_epochs_and_continues_as_planned(place):
    command = [*SMALL, "--minutes", "0.1", "--gradient_accumulation_steps", "2", "--output_dir", "slower"]
    command += ["--save_total_limit", "2"]
    code, output = run_script(EXAMPLE, *command, cwd=place, setup=plan_for_a_fast_machine)
    assert code == 0, output
    lines, saved = log_of(place / "slower"), json.loads((place / "slower" / "args.json").read_text())
    assert f"New plan: {len(lines)} epochs instead of " in output
    assert saved["epochs"] == len(lines) > 2
    assert lines[-1]["learning_rate"] == 0
    assert max(line["learning_rate"] for line in lines) == saved["learning_rate"], "though the warm-up was to be longer"
    # killed before it was over: the same command continues, and plans nothing anew
    shutil.rmtree(place / "slower" / "last")
    newest = max((place / "slower").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(newest)
    assert len(list((place / "slower").glob("checkpoint-*"))) == 1
    code, output = run_script(EXAMPLE, *command, cwd=place)
    assert code == 0, output
    assert "New plan" not in output
    assert len(log_of(place / "slower")) == len(lines)


def test_a_single_epoch_that_takes_longer_than_the_time_stays_the_only_one(place):
    command = [*SMALL, "--minutes", "0.1", "--output_dir", "long"]
    code, output = run_script(EXAMPLE, *command, cwd=place, setup=a_slow_machine)
    assert code == 0, output
    assert "That is more than --minutes 0.1" in output
    assert "New plan" not in output
    assert len(log_of(place / "long")) == 1


def test_the_batch_size_is_found_before_the_time_is_measured(place):
    command = [*SMALL, "--minutes", "0.05", "--auto_batch_size", "--output_dir", "fitted"]
    code, output = run_script(EXAMPLE, *command, cwd=place)
    assert code == 0, output
    assert output.index("asked for;") < output.index("Expected: about")
