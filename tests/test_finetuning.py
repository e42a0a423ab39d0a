"""Fine-tuning on any set-up: steps over processes, numbers that are not finite, checkpoints, resuming."""

import errno
import importlib.util
import json
import math
import os
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from conftest import random_labels, tiny_model
from safetensors.torch import save_file
from script_runner import Script, run_script
from torch import nn
from torch.utils.data import DataLoader

from hf_detr import DetrForDetection
from hf_detr.data.batching import DistributedBatches
from hf_detr.model.boxes import iou
from hf_detr.model.loss import LossNormalizers
from hf_detr.runtime import StopRequest, exit_on_error
from hf_detr.training import TrainStep, build_ema, build_schedule, parameter_groups
from hf_detr.training.checkpoints import (
    Progress,
    checkpoints_in,
    newest_checkpoint,
    replace_files,
    save_checkpoint,
    trim_log,
    use_plain_weights,
)
from hf_detr.training.lora import add_lora
from hf_detr.training.meter import EpochMeter
from hf_detr.training.non_finite import NonFiniteError, first_non_finite
from hf_detr.training.optimization import SCHEDULES
from hf_detr.training.run_folder import acquire_run_dir, begin
from hf_detr.training.step import in_groups

ROOT = Path(__file__).parents[1]


def batch_of(counts, size=64, first=0):
    generator = torch.Generator().manual_seed(first)
    return {
        "pixel_values": torch.randn(len(counts), 3, size, size, generator=generator),
        "pixel_mask": torch.ones(len(counts), size, size, dtype=torch.long),
        "labels": random_labels(counts, seed=first),
    }


def stepper(model, tmp_path, *, rate=1e-3, on_nan="stop", ema=None):
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(parameter_groups(model, rate, rate / 10, 1e-4))
    wrapped, optimizer = accelerator.prepare(model.train(), optimizer)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer.optimizer, 1.0)
    step = TrainStep(accelerator, wrapped, model, optimizer, scheduler, ema=ema, on_nan=on_nan, folder=tmp_path)
    return accelerator, step


# -- processes and accumulation ---------------------------------------------------------------------------------------


def test_processes_and_accumulation_do_not_change_a_step(tmp_path):
    """All cases of the benchmark: a process without objects, unequal batches, accumulation, no object at all."""
    output = tmp_path / "rows.json"
    code, said = run_script(ROOT / "benchmarks" / "processes.py", "--output", output, cwd=tmp_path)
    assert code == 0, said
    rows = json.loads(output.read_text())
    assert len(rows) == 24
    for case, row in rows.items():
        assert max(row["terms"], row["gradients"], row["weights"]) < 1e-5, case
        assert row["norm"] == pytest.approx(row["norm, 1 process"], rel=1e-5), case


def test_what_the_loss_is_divided_by_is_known_before_it():
    counts = tiny_model().count_for_loss(random_labels([3, 0, 20]))
    # 3 + 0 + 12 queries are matched, 36 - 15 are not
    assert counts.tolist() == pytest.approx([23, 15 + 0.1 * 21, 3])
    half = LossNormalizers.from_counts(counts, num_processes=2)
    assert [half.boxes.item(), half.images.item()] == pytest.approx([11.5, 1.5])
    nothing = LossNormalizers.from_counts(torch.tensor([0.0, 1.2, 1.0]), num_processes=4)
    assert nothing.boxes.item() == 0.25


def test_normalizers_that_are_counted_before_are_those_of_the_loss():
    model = tiny_model(dense_loss_coefficient=1.0, feature_stride=16, dropout=0.0).train()
    batch = batch_of([3, 0, 2])
    batch["pixel_mask"][0, 48:], batch["pixel_mask"][2, :, 32:] = 0, 0
    batch["pixel_values"] *= batch["pixel_mask"][:, None]
    alone = model(**batch).loss_dict
    given = model(**batch, normalizers=LossNormalizers.from_counts(model.count_for_loss(batch["labels"]), 1)).loss_dict
    for name, value in alone.items():
        assert given[name].item() == pytest.approx(value.item(), rel=1e-6), name


def test_batches_of_a_step_come_in_groups():
    assert [len(group) for group in in_groups([{"a": i} for i in range(7)], 3)] == [3, 3, 1]


# -- parameters, schedules, averages ----------------------------------------------------------------------------------


def test_norms_biases_and_queries_do_not_decay():
    model = tiny_model(backbone="test_resnet", denoising_groups=1, query_type="anchor", freeze_batch_norm=False)
    groups = parameter_groups(model, 1e-4, 1e-5, 1e-2)
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spared = "bias" in name or "norm" in name or "quer" in name.split(".")[1] or "class_embedding" in name
            spared = spared or parameter.ndim == 1
            assert decays.pop(id(parameter)) == (0.0 if spared else 1e-2), name
    assert not decays


@pytest.mark.parametrize(
    ("kind", "expected"),
    [  # of 100 steps with a warm-up of 10 and a decay of 20: after 5, 10, 50, 90 and 100 steps
        ("wsd", (0.5, 1, 1, 0.5, 0)),
        ("linear", (0.5, 1, 50 / 90, 10 / 90, 0)),
        ("cosine", (0.5, 1, (1 + math.cos(math.pi * 40 / 90)) / 2, (1 + math.cos(math.pi * 80 / 90)) / 2, 0)),
        ("constant", (1, 1, 1, 1, 1)),
        ("constant_with_warmup", (0.5, 1, 1, 1, 1)),
        ("inverse_sqrt", (0.5, 1, math.sqrt(10 / 50), math.sqrt(10 / 90), math.sqrt(10 / 100))),
        ("step", (0.6, 1, 1, 0.1, 0.1)),
    ],
)
def test_schedules(kind, expected):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_schedule(optimizer, kind, warmup=0.1, decay=0.2, total_steps=100)
    rates = [schedule.get_last_lr()[0]]
    for _ in range(100):
        optimizer.step()
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    assert [rates[step] for step in (5, 10, 50, 90, 100)] == pytest.approx(expected, abs=1e-9)
    assert kind in SCHEDULES


def test_the_average_of_the_weights_follows_its_formula():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    ema = build_ema(model, 0.5)
    expected = None
    generator = np.random.default_rng(0)
    for step in range(12):
        weights = generator.normal(size=(2, 3))
        model[0].weight.data = torch.tensor(weights, dtype=torch.float32)
        model[1].running_mean.fill_(step)
        ema.update_parameters(model)
        d = min(0.5, (1 + step) / (10 + step))
        expected = weights if expected is None else d * expected + (1 - d) * weights
    assert ema.module[0].weight.numpy() == pytest.approx(expected, rel=1e-5)
    assert ema.module[1].running_mean.tolist() == [11, 11]
    assert not any(p.requires_grad for p in ema.module.parameters())


def test_frozen_parts_hold_still_exactly(tmp_path):
    model = tiny_model(backbone="resnet10t", frozen_stages=1, freeze_batch_norm=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, step = stepper(model, tmp_path, ema=build_ema(model, 0.9))
    for number in range(3):
        step([batch_of([2, 1], first=number)], number + 1)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not torch.equal(
        model.state_dict()["model.decoder.bbox_predictor.layers.0.weight"],
        before["model.decoder.bbox_predictor.layers.0.weight"],
    )
    for name, value in model.state_dict().items():
        if name not in trained:
            assert torch.equal(value, before[name]), name
            assert torch.equal(step.ema.module.state_dict()[name], before[name]), name


# -- numbers that are not finite --------------------------------------------------------------------------------------


def break_module(module):
    """Its output is infinite from now on."""
    return module.register_forward_hook(lambda *_: torch.full_like(_[2], torch.inf))


def test_a_step_that_is_not_finite_names_step_images_and_module_and_keeps_the_batch(tmp_path):
    model = tiny_model(freeze_batch_norm=False, frozen_stages=-1)
    _, step = stepper(model, tmp_path)
    hook = break_module(model.model.encoder.layers[1].mlp.fc1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NonFiniteError) as error:
        step([batch_of([2, 1])], 7)
    text = str(error.value)
    assert "Step 7, images [100, 101]" in text
    assert "model.encoder.layers.1.mlp.fc1 (Linear)" in text
    saved = torch.load(tmp_path / "non_finite" / "step-7-process-0.pt")
    assert torch.equal(saved["pixel_values"], batch_of([2, 1])["pixel_values"])
    assert saved["labels"][1]["image_id"] == 101
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    hook.remove()


def test_skipping_leaves_no_trace_of_the_step_and_goes_on(tmp_path):
    model = tiny_model(freeze_batch_norm=False, frozen_stages=-1)
    _, step = stepper(model, tmp_path, on_nan="skip")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    broken = batch_of([2, 1])
    broken["pixel_values"][1, 0, 3, 3] = torch.nan
    assert step([broken], 1) is None
    assert "the image itself" in step.reports[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    terms = step([batch_of([2, 1])], 2)
    assert math.isfinite(terms["loss"])
    assert (step.skipped, step.in_a_row) == (1, 0)


def test_skipping_for_ever_is_an_error(tmp_path):
    model = tiny_model()
    _, step = stepper(model, tmp_path, on_nan="skip")
    model.class_labels_classifier.weight.data[0] = torch.nan
    for number in range(19):
        assert step([batch_of([1])], number) is None
    with pytest.raises(NonFiniteError, match=r"weights themselves.*class_labels_classifier.weight.*20 steps in a row"):
        step([batch_of([1])], 19)
    assert len(list((tmp_path / "non_finite").iterdir())) == 10


def test_gradients_that_are_not_finite_count_too(tmp_path):
    model = tiny_model()
    _, step = stepper(model, tmp_path, on_nan="skip")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameter = model.class_labels_classifier.weight
    hook = parameter.register_hook(lambda gradient: torch.full_like(gradient, torch.nan))
    assert step([batch_of([1])], 1) is None
    hook.remove()
    assert "norm of the gradients nan" in step.reports[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_first_module_is_named_not_the_one_where_it_shows():
    model = tiny_model().train()
    with torch.no_grad():
        model.model.encoder.layers[0].mlp.fc2.bias[0] = torch.inf
    assert "weights themselves" in first_non_finite(model, batch_of([1]))


TWO_PROCESSES = """
import sys, torch
from pathlib import Path
from accelerate import Accelerator
from hf_detr.training.step import share_buffers
sys.path.insert(0, {tests!r})
from test_finetuning import break_module, batch_of, stepper, tiny_model
torch.set_num_threads(1)
torch.manual_seed(0)
accelerator, step = stepper(tiny_model(), Path({folder!r}), on_nan="skip")
rank = accelerator.process_index
losses = []
for number in range(3):
    batch = batch_of([2, 1], first=10 * number + rank)
    if rank == 1 and number == 1:
        hook = break_module(step.plain.model.encoder.layers[0].mlp.fc2)
    terms = step([batch], number)
    if rank == 1 and number == 1:
        hook.remove()
    losses.append(None if terms is None else accelerator.reduce(terms["loss"], "mean").item())
weights = torch.stack([p.double().sum() for p in step.plain.parameters()]).sum()
both = accelerator.gather(weights[None])
skipped = [loss is None for loss in losses]
sys.stdout.write(f"rank {{rank}} {{skipped}} {{bool(both[0] == both[1])}} {{step.reports}}\\n")
sys.stdout.flush()
norm = torch.nn.BatchNorm1d(2)
norm(torch.randn(8, 2) + 5 * rank)
share_buffers(norm, accelerator)
means = accelerator.gather(norm.running_mean[None]).flatten().tolist()
accelerator.print("means", [round(value, 5) for value in means])
accelerator.end_training()
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    (folder / "script.py").write_text(TWO_PROCESSES.format(tests=str(ROOT / "tests"), folder=str(folder)))
    code, said = run_script(folder / "script.py", cwd=folder, processes=2)
    assert code == 0, said
    return folder, said


def test_one_process_with_a_bad_batch_does_not_leave_the_other_waiting(two_processes):
    tmp_path, said = two_processes
    assert said.count("[False, True, False] True") == 2
    assert "another process met numbers that are not finite" in said
    assert "model.encoder.layers.0.mlp.fc2 (Linear)" in said
    assert [path.name for path in (tmp_path / "non_finite").iterdir()] == ["step-1-process-1.pt"]


def test_all_processes_evaluate_the_statistics_that_are_saved(two_processes):
    (means,) = [line for line in two_processes[1].splitlines() if line.startswith("means")]
    values = json.loads(means.removeprefix("means "))
    assert values[:2] == values[2:]
    assert max(abs(value) for value in values) < 0.2, "those of process 0"


def test_half_precision_with_a_scaler_follows_float32():
    """Accelerate has fp16 for GPUs only; the model and its loss under PyTorch's own autocast and scaler."""
    model = tiny_model(dropout=0.0, query_type="anchor", dense_loss_coefficient=1.0).train()
    batch = batch_of([2, 1])
    exact = model(**batch)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with torch.autocast("cpu", dtype=torch.float16):
        half = model(**batch)
    assert all(value.dtype == torch.float32 for value in (half.loss, *half.loss_dict.values()))
    assert half.loss.item() == pytest.approx(exact.loss.item(), rel=1e-2)
    before = model.class_labels_classifier.weight.detach().clone()
    scaler.scale(half.loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(before, model.class_labels_classifier.weight)


# -- checkpoints ------------------------------------------------------------------------------------------------------


def saved_run(tmp_path, steps=2):
    set_seed(0)
    model = tiny_model(dropout=0.1)
    accelerator, step = stepper(model, tmp_path)
    history = Progress()
    accelerator.register_for_checkpointing(history)
    use_plain_weights(accelerator, model, (model.config,))
    for number in range(steps):
        step([batch_of([2, 1], first=number)], number + 1)
        history.step += 1
        history.batches += 1
    return accelerator, model, history


def test_a_checkpoint_is_read_by_from_pretrained_and_the_oldest_go(tmp_path):
    accelerator, model, history = saved_run(tmp_path)
    for history.step in (1, 2, 3):
        save_checkpoint(accelerator, tmp_path, history, keep=2)
    history.end_epoch()
    save_checkpoint(accelerator, tmp_path, history, keep=2)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-3", "checkpoint-3-epoch-1"]
    assert newest_checkpoint(tmp_path).name == "checkpoint-3-epoch-1"
    loaded = DetrForDetection.from_pretrained(newest_checkpoint(tmp_path))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("moment", ["first file", "later"])
def test_a_full_disk_leaves_the_last_good_checkpoint_and_says_so(tmp_path, moment):
    """No file may grow beyond a limit, as on a disk that is full."""
    accelerator, _, history = saved_run(tmp_path)
    good = save_checkpoint(accelerator, tmp_path, history, keep=1)
    largest = max(path.stat().st_size for path in good.iterdir())
    names = {path.name for path in good.iterdir()}
    history.step += 1
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 if moment == "first file" else largest - 1, limits[1]))
    try:
        with pytest.raises(OSError) as error:
            save_checkpoint(accelerator, tmp_path, history, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "cannot be saved" in str(error.value)
    assert f"{good} is complete" in str(error.value)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [good.name]
    assert {path.name for path in good.iterdir()} == names


def test_no_space_left_is_told_with_the_space_there_is(tmp_path, monkeypatch):
    accelerator, _, history = saved_run(tmp_path)

    def full(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(accelerator, "save_state", full)
    with pytest.raises(OSError, match=r"No space left on device.*MB are free"):
        save_checkpoint(accelerator, tmp_path, history, keep=1)


def test_files_are_replaced_one_by_one_and_a_new_folder_comes_as_a_whole(tmp_path):
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    (tmp_path / "old" / "mine.txt").write_text("kept")
    replace_files(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "weights").read_text() == "new"
    assert (tmp_path / "old" / "mine.txt").exists()
    replace_files(tmp_path / "old", tmp_path / "third")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["third"]


def test_the_log_forgets_what_came_after_the_checkpoint(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"epoch": 1}\n{"epoch": 2}\n{"epoch": 3}\n{"epo')
    trim_log(log, 2)
    assert log.read_text() == '{"epoch": 1}\n{"epoch": 2}\n'


def test_means_of_figures_survive_a_checkpoint():
    accelerator = Accelerator(cpu=True)
    whole, first, second = (EpochMeter(accelerator) for _ in range(3))
    for number in range(5):
        figures = {"loss": torch.tensor(float(number)), "other": torch.tensor(2.0)}
        whole.add(figures)
        (first if number < 2 else second).add(figures)
        if number == 1:
            second.load_state_dict(first.state_dict())
    assert second.means() == pytest.approx({"loss": 2.0, "other": 2.0})
    assert whole.means() == pytest.approx(second.means())


def test_batches_go_on_in_the_middle_of_an_epoch():
    batches = DistributedBatches(20, 3, seed=1)
    batches.set_epoch(4)
    whole = list(batches)
    batches.skip(2)
    batches.set_epoch(4)  # as Accelerate's loader does when it starts
    assert list(batches) == whole[2:]
    assert len(batches) == len(whole) - 2
    batches.set_epoch(5)
    assert len(list(batches)) == len(whole)


# -- the folder of a run ----------------------------------------------------------------------------------------------


def acquire(folder, resume=False, **arguments):
    return acquire_run_dir(str(folder), "x", {"epochs": 3} | arguments, Accelerator(cpu=True), resume=resume)


def test_the_same_command_goes_on_and_another_is_refused(tmp_path):
    folder = tmp_path / "run"
    first = acquire(folder)
    assert first.checkpoint is None
    first.lock.release()
    accelerator, _, history = saved_run(tmp_path)
    saved = save_checkpoint(accelerator, folder, history, keep=1)
    with acquire(folder).lock:
        pass
    with pytest.raises(FileExistsError, match=r"another run \(epochs: 3 there, 5 here; seed: None there, 1 here\)"):
        acquire(folder, epochs=5, seed=1)
    with pytest.raises(FileExistsError, match="masks: None there, True here"):
        acquire(folder, masks=True)
    with acquire(folder, masks=False, minutes=None).lock:  # arguments that the version did not have that began the run
        pass
    again = acquire(folder, report_to=["tensorboard"])  # which changes nothing of what is learned
    assert again.checkpoint == saved
    again.lock.release()
    (folder / "last").mkdir()
    with pytest.raises(FileExistsError, match="it has ended"):
        acquire(folder)
    more = acquire(folder, resume=True, epochs=5)
    assert more.checkpoint == saved
    assert (folder / "last").exists(), "nothing is touched before everything is checked"
    assert json.loads((folder / "args.json").read_text())["epochs"] == 3
    begin(more, accelerator)
    assert not (folder / "last").exists()
    assert json.loads((folder / "args.json").read_text())["epochs"] == 5
    more.lock.release()


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "holiday.jpg").write_text("")
    with pytest.raises(FileExistsError, match="is not empty"):
        acquire(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".lock") == ["holiday.jpg"]


def test_two_runs_do_not_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_detr.training.run_folder.GRACE", 0)
    held = acquire(tmp_path / "run")
    with pytest.raises(TimeoutError, match="Another process trains"):
        acquire(tmp_path / "run")
    held.lock.release()
    acquire(tmp_path / "run").lock.release()


def test_signals_are_noted_and_the_second_interrupt_is_obeyed():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stop = StopRequest()
    try:
        assert not stop.requested
        signal.raise_signal(signal.SIGTERM)
        assert (stop.requested, stop.exit_code) == (True, 143)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        stop.end()
        assert signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]
        signal.signal(signal.SIGINT, before[signal.SIGINT])


def refuse(rows):
    raise ValueError("x is wrong")


def test_errors_of_the_package_are_a_sentence_and_others_keep_their_traceback(capsys):
    with pytest.raises(SystemExit, match="at least 1, got 0") as error, exit_on_error():
        add_lora(None, 0)
    assert isinstance(error.value.code, str), "which Python prints to stderr, with exit code 1"
    with pytest.raises(SystemExit, match=r"invalid literal.*--debug shows where"), exit_on_error():
        int("x")
    with pytest.raises(SystemExit, match=r"^x is wrong \(--debug shows where\.\)$"), exit_on_error():
        list(DataLoader([1], num_workers=1, collate_fn=refuse))
    with pytest.raises(RuntimeError, match="must match"), exit_on_error():
        iou(torch.zeros(2, 4), torch.zeros(3, 4))


def test_early_stopping_counts_evaluations_since_the_best():
    history = Progress()
    kept = []
    for epoch, ap in enumerate((0.1, 0.3, 0.3, 0.2, 0.25), 1):
        kept.append(history.add_evaluation({"epoch": epoch, "AP": ap}, "AP"))
    assert kept == [True, True, True, False, False]
    assert (history.best, history.best_epoch, history.evaluations_since_best()) == (0.3, 2, 3)


# -- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_killed_ends_as_one_that_is_left_alone(tmp_path, capsys, monkeypatch, processes):
    """Bit by bit, see `benchmarks/kills.py`; there with more kills and a larger model."""
    kills = load_script("kills")

    def start(folder, extra, processes):
        argv = [kills.FINETUNE, *kills.OPTIONS, *extra, "--output_dir", folder]
        return Script(*argv, cwd=tmp_path, output=tmp_path / "output.txt", processes=processes)

    def kill(script, number):
        script.send(number)
        return script.communicate()[0]

    monkeypatch.setattr(kills, "start", start)
    monkeypatch.setattr(kills, "kill", kill)
    monkeypatch.setattr(sys, "argv", [
        "kills.py", "--kills", "2", "--terminate", "1", "--seed", "5", "--processes", str(processes), "--work",
        str(tmp_path), "--", "--set", "dropout=0.1", "d_model=32", "encoder_layers=1", "decoder_layers=1",
    ])  # fmt: skip
    monkeypatch.chdir(tmp_path)
    kills.main()
    said = capsys.readouterr().out
    assert "equal, bit by bit" in said
    if processes == 1:
        (terminated,) = [line for line in said.splitlines() if "SIGTERM" in line]
        nothing_to_stop = any(f"| {phase} |" in terminated for phase in ("starting", "concluding"))
        assert nothing_to_stop or "exit code 143" in terminated


def test_an_augmentation_of_your_own_takes_the_place_of_the_recipe_s(tmp_path):
    script = ROOT / "examples" / "by_feature" / "own_augmentation.py"
    (tmp_path / "script.py").write_text(
        f"import sys; sys.path.insert(0, {str(script.parent)!r})\n"
        "import own_augmentation as own\n"
        "seen = []\n"
        "own.finetune.main(augmentation=lambda row: seen.append(1) or own.AUGMENTATION(row))\n"
        "print('augmented', len(seen))\n"
    )
    small = ["--set", "d_model=32", "encoder_layers=1", "decoder_layers=1"]
    code, said = run_script(tmp_path / "script.py", "--quick", *small, cwd=tmp_path)
    assert code == 0, said
    assert "augmented 192" in said, "2 epochs of 64 images, after 4 batches of 16 to measure a step"
    assert (tmp_path / "runs" / "shapes-1" / "last" / "model.safetensors").is_file()


def test_a_run_keeps_the_normalisation_that_it_began_with(tmp_path):
    """A version that normalises otherwise, then this one."""
    script = ROOT / "examples" / "finetune.py"
    (tmp_path / "older.py").write_text(
        "import runpy\n"
        "from hf_detr import DetrImageProcessor\n"
        "DetrImageProcessor.image_mean, DetrImageProcessor.image_std = [0.5] * 3, [0.25] * 3\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')\n"
    )
    small = ["--quick", "--epochs", "1", "--set", "d_model=32", "encoder_layers=1", "decoder_layers=1"]
    code, said = run_script(tmp_path / "older.py", *small, "--output_dir", "run", cwd=tmp_path)
    assert code == 0, said
    code, said = run_script(script, "--output_dir", "run", "--resume", "--epochs", "2", cwd=tmp_path)
    assert code == 0, said
    assert "normalised as when the run began: mean [0.5, 0.5, 0.5], deviation [0.25, 0.25, 0.25]" in said
    for folder in (tmp_path / "run", tmp_path / "run" / "last"):
        saved = json.loads((folder / "preprocessor_config.json").read_text())
        assert (saved["image_mean"], saved["image_std"]) == ([0.5] * 3, [0.25] * 3)


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_comparison_of_killed_runs_would_see_a_difference(tmp_path, monkeypatch):
    """What `kills.py` calls equal is compared by content."""
    kills = load_script("kills")
    for name, value in (("alone", 1.0), ("same", 1.0), ("other", 1.0000001)):
        accelerator = Accelerator(cpu=True)
        folder = tmp_path / name / "checkpoint-1"
        folder.mkdir(parents=True)
        torch.save({"step": torch.tensor(value)}, folder / "optimizer.bin")
        for target in (tmp_path / name, tmp_path / name / "last", folder):
            target.mkdir(exist_ok=True)
            save_file({"w": torch.zeros(2)}, target / "model.safetensors")
        (tmp_path / name / "metrics.json").write_text("{}")
        (tmp_path / name / "log.jsonl").write_text('{"epoch": 1, "seconds": 3}\n')
        accelerator.free_memory()
    monkeypatch.chdir(tmp_path)
    kills.check(Path("same"), 0)
    with pytest.raises(SystemExit, match=r"optimizer\.bin"):
        kills.check(Path("other"), 0)
