"""A run that continues: what is given now counts, the fraction of it that is done stays, its data are its data, and
nothing is touched before everything has been checked."""

import json
import shutil
from pathlib import Path

import PIL.Image
import pytest
import torch
from script_runner import run_script

from hf_detr.data import draw_shapes_dataset
from hf_detr.training import TrainingRun, build_schedule
from hf_detr.training.optimization import build_ema, move_schedule, rescale_ema

pytestmark = pytest.mark.xdist_group("resuming")
EXAMPLE = Path(__file__).parents[1] / "examples" / "finetune.py"
SMALL = [
    "--dataset", "data", "--backbone", "test_resnet", "--backbone_weights", "none", "--image_size", "64", "--seed", "3",
    "--num_workers", "0", "--eval_every", "2", "--epochs", "6", "--batch_size", "8", "--learning_rate", "1e-3",
    "--set", "d_model=32", "encoder_layers=1", "decoder_layers=1", "encoder_ffn_dim=32", "decoder_ffn_dim=32",
    "num_queries=6",
]  # fmt: skip


def stop_after_two_epochs():
    end = TrainingRun.end_epoch

    def end_and_stop(run, line):
        end(run, line)
        if run.progress.epoch == 2:
            run.stop.end()
            raise SystemExit(3)

    TrainingRun.end_epoch = end_and_stop


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A folder with data, and a run of six epochs that was stopped after two, in `run`."""
    folder = tmp_path_factory.mktemp("stopped")
    draw_shapes_dataset(folder / "data", num_train=32, num_val=4, progress=False)
    code, output = run_script(EXAMPLE, *SMALL, "--output_dir", "run", cwd=folder, setup=stop_after_two_epochs)
    assert code == 3, output
    return folder


@pytest.fixture
def again(stopped, tmp_path):
    """A copy of it, and a function that continues the run with more arguments: exit code, output and log."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)

    def resume(*arguments, **options):
        code, output = run_script(EXAMPLE, "--output_dir", "run", "--resume", *arguments, cwd=tmp_path, **options)
        lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
        return code, output, [json.loads(line) for line in lines]

    return tmp_path, resume


def rates(log):
    return {line["epoch"]: line["learning_rate"] for line in log}


@pytest.fixture(scope="module")
def undisturbed(stopped):
    code, output = run_script(EXAMPLE, *SMALL, "--output_dir", "whole", cwd=stopped)
    assert code == 0, output
    return rates(json.loads(line) for line in (stopped / "whole" / "log.jsonl").read_text().splitlines())


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((), {}),
        (("--batch_size", "4"), {}),
        (("--batch_size", "16"), {}),
        (("--gradient_accumulation_steps", "2"), {}),
        ((), {"processes": 2}),
    ],
    ids=["same", "batch 4", "batch 16", "accumulated", "two processes"],
)
def test_the_rate_keeps_its_place_in_the_run_when_an_epoch_has_other_steps(again, undisturbed, arguments, options):
    code, output, log = again[1](*arguments, **options)
    assert code == 0, output
    assert rates(log) == pytest.approx(undisturbed, rel=0.02, abs=1e-6)
    assert rates(log)[6] == 0


def test_rates_and_decay_that_are_given_now_count_from_now_on(again, undisturbed):
    code, output, log = again[1]("--learning_rate", "1e-5", "--backbone_learning_rate", "3e-5", "--weight_decay", "0.5")
    assert code == 0, output
    found = rates(log)
    for epoch in (3, 4, 5):
        assert found[epoch] == pytest.approx(undisturbed[epoch] / 100)
    state = torch.load(again[0] / "run" / "checkpoint-24-epoch-6" / "optimizer.bin", weights_only=True)
    decays = {group["weight_decay"] for group in state["param_groups"]}
    assert decays == {0.0, 0.5}
    assert json.loads((again[0] / "run" / "args.json").read_text())["learning_rate"] == 1e-5
    assert "learning_rate 0.001, now 1e-05" in output


def test_going_on_after_the_end_warms_up_and_says_so(again):
    code, output, _ = again[1]()
    assert code == 0, output
    code, output, log = again[1]("--epochs", "10")
    assert code == 0, output
    assert "The learning rate rises from 0 to 0.001 within" in output
    assert rates(log)[8] > 0
    assert rates(log)[10] == 0


def rename_class(folder):
    for file in (folder / "data" / "annotations").glob("*.json"):
        file.write_text(file.read_text().replace('"ellipse"', '"oval"'))


def more_images(folder):
    shutil.rmtree(folder / "data")
    draw_shapes_dataset(folder / "data", num_train=40, num_val=4, progress=False)


def other_validation(folder):
    file = folder / "data" / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    content["annotations"] = content["annotations"][:-1]
    file.write_text(json.dumps(content))


def everything(folder):
    return {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*") if path.name != ".lock"}


def damage_weights(folder):
    path = next((folder / "run").glob("checkpoint-*")) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damage_optimizer(folder):
    path = next((folder / "run").glob("checkpoint-*")) / "optimizer.bin"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(bytes(content))


def lose_optimizer(folder):
    (next((folder / "run").glob("checkpoint-*")) / "optimizer.bin").unlink()


def flip_a_bit_of_the_weights(folder):
    path = next((folder / "run").glob("checkpoint-*")) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose_optimizer, "optimizer.bin is missing"),
        (flip_a_bit_of_the_weights, "model.safetensors is damaged"),
        (rename_class, "gone are ellipse, new are oval"),
        (damage_weights, "model.safetensors is damaged"),
        (damage_optimizer, "optimizer.bin is damaged"),
    ],
)
def test_a_run_that_cannot_continue_is_left_as_it_is(again, change, message):
    folder, resume = again
    (folder / "run" / "last").mkdir()
    change(folder)
    before = everything(folder)
    code, output, _ = resume()
    assert code == 1
    assert message in output
    assert "Traceback" not in output
    assert everything(folder) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--epochs", "2"), "has done 2 epochs. To go on, --epochs must be more"),
        (("--epochs", "1"), "has done 2 epochs"),
        (("--backbone", "resnet18"), "--backbone cannot change within a run"),
        (("--recipe", "paper"), "--recipe cannot change within a run"),
        (("--set", "d_model=64"), "--set d_model cannot change within a run"),
        (("--set", "num_queries=7"), "--set num_queries cannot change within a run"),
        (("--set", "dropout=5"), "--set: "),
    ],
)
def test_what_cannot_change_within_a_run_is_refused_before_anything_is_touched(again, arguments, message):
    folder, resume = again
    before = everything(folder)
    code, output, _ = resume(*arguments)
    assert code in (1, 2)
    assert message in output
    assert "Traceback" not in output
    assert everything(folder) == before


def other_pixels(folder):
    path = sorted((folder / "data" / "train").iterdir())[0]
    with PIL.Image.open(path) as image:
        size = image.size
    PIL.Image.new("RGB", size).save(path)


@pytest.mark.parametrize(
    ("change", "counts"), [(more_images, "32 before, 40 now"), (other_pixels, "32 before, 32 now")]
)
def test_other_images_are_told_between_epochs(again, change, counts):
    folder, resume = again
    change(folder)
    code, output, log = resume()
    assert code == 0, output
    assert f"The training images have changed ({counts})." in output
    assert rates(log)[6] == 0


def test_after_other_validation_images_the_best_is_found_anew(again):
    folder, resume = again
    other_validation(folder)
    code, output, _ = resume()
    assert code == 0, output
    assert "The validation images have changed (4 before, 4 now)." in output
    assert "not compared" in output
    assert json.loads((folder / "run" / "metrics.json").read_text())["epoch"] > 2


# -- the parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["wsd", "step", "linear", "cosine", "constant"])
def test_a_schedule_is_put_at_a_step_whatever_the_optimizer_had(kind):
    def optimizer(rate):
        return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)

    walked = build_schedule(optimizer(0.1), kind, warmup=0.1, decay=0.3, total_steps=50)
    expected = []
    for _ in range(50):
        expected.append(walked.get_last_lr()[0])
        walked.optimizer.step()
        walked.step()
    for step in (0, 3, 17, 40, 49):
        moved = build_schedule(optimizer(0.1), kind, warmup=0.1, decay=0.3, total_steps=50)
        moved.optimizer.param_groups[0].update(lr=7.0, initial_lr=7.0)  # of a checkpoint
        move_schedule(moved, step)
        assert moved.get_last_lr()[0] == moved.optimizer.param_groups[0]["lr"] == expected[step]


def test_an_average_forgets_as_fast_per_image_with_other_batches():
    """Weights that stand still at 1 after they were 0: the average after 200 steps of 8 images, and after as many
    images in other steps. A number of images that changes makes no difference."""

    def averaged(*phases):
        model = torch.nn.Linear(1, 1, bias=False)
        model.weight.data.zero_()
        ema = build_ema(model, 0.99)
        before = phases[0][1]
        model.weight.data.fill_(1.0)
        for steps, images in phases:
            rescale_ema(ema, first=phases[0][1], before=before, now=images)
            for _ in range(steps):
                ema.update_parameters(model)
            before = images
        return 1 - ema.module.weight.item()

    expected = averaged((200, 8))
    assert averaged((100, 8), (50, 16)) == pytest.approx(expected, rel=0.05)
    assert averaged((100, 8), (400, 2)) == pytest.approx(expected, rel=0.05)
    assert averaged((50, 8), (150, 8)) == expected


def stop_in_the_evaluation():
    def stop(run, *arguments):
        raise SystemExit(9)

    TrainingRun.evaluate = stop


@pytest.mark.parametrize("minutes", ["0", "15"])
def test_a_run_that_was_stopped_in_its_evaluation_may_go_on_with_other_batches(stopped, tmp_path, undisturbed, minutes):
    (tmp_path / "data").symlink_to(stopped / "data")
    command = [*SMALL, "--output_dir", "run", "--save_minutes", minutes]
    code, output = run_script(EXAMPLE, *command, cwd=tmp_path, setup=stop_in_the_evaluation)
    assert code == 9, output
    code, output = run_script(
        EXAMPLE, "--output_dir", "run", "--resume", "--batch_size", "4", "--gradient_accumulation_steps", "1",
        cwd=tmp_path,
    )  # fmt: skip
    assert code == 0, output
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [4, 8, 16, 24, 32, 40], "8 a step in two epochs, then 4"
    assert rates(log) == pytest.approx(undisturbed, rel=1e-6)
    assert log[1]["AP"] is not None
    assert log[1]["loss"] is not None
