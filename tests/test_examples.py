"""The scripts as their users call them, in processes of their own; those on one processor share their imports."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import save_original, their_model
from formats import shapes, write_yolo
from PIL import Image
from warm_python import WarmPython

from hf_detr import DetrForDetection
from hf_detr.data import draw_shapes_dataset

pytestmark = pytest.mark.xdist_group("examples")  # its fixtures are expensive: one worker runs them once

EXAMPLES = Path(__file__).parents[1] / "examples"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
IMPORTS = """
import accelerate, tqdm.auto, hf_detr, hf_detr.data, hf_detr.evaluation, hf_detr.hub, hf_detr.interop
import hf_detr.prediction, hf_detr.runtime, hf_detr.training, hf_detr.visualization
"""
TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run(*arguments, cwd):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [str(a) for a in arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def script():
    """Run a script of examples/ with these arguments; return what it printed. `before` is code to run first."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    with WarmPython(IMPORTS, environment) as warm:

        def run_script(name, *arguments, cwd, ok=True, before=""):
            argv = [str(EXAMPLES / name), *map(str, arguments)]
            done = warm.run(
                f"{before}\nimport runpy, sys\nrunpy.run_path(sys.argv[0], run_name='__main__')", argv, cwd=cwd
            )
            output = done.stdout + done.stderr
            assert (done.returncode == 0) == ok, output
            return output

        yield run_script


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which the main job ran in its quick form."""
    cwd = tmp_path_factory.mktemp("work")
    return cwd, run(*LAUNCH, EXAMPLES / "finetune.py", "--quick", cwd=cwd)


def test_the_main_job_leaves_what_it_promises(trained):
    cwd, output = trained
    run_dir = cwd / "runs" / "shapes-1"
    for name in (
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "metrics.json",
        "log.jsonl",
        "validation.png",
        "last/model.safetensors",
        "checkpoint-8-epoch-2/model.safetensors",
    ):
        assert (run_dir / name).is_file(), name
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert {"loss", "loss_ce", "loss_bbox", "loss_giou", "AP", "AP50", "learning_rate", "seconds"} <= set(lines[-1])
    assert {"AP", "AP50", "AR100", "per_class", "epoch"} <= set(json.loads((run_dir / "metrics.json").read_text()))
    assert Image.open(run_dir / "validation.png").size == (1280, 1280)
    assert "with 2 threads" in output or os.cpu_count() != 2


def test_every_core_is_busy(trained):
    assert f"with {len(os.sched_getaffinity(0))} threads" in trained[1]


def test_predict_writes_pictures_and_a_json_and_names_what_it_could_not_read(trained, tmp_path, script):
    cwd, _ = trained
    folder = tmp_path / "images"
    (folder / "deeper").mkdir(parents=True)
    Image.new("RGB", (120, 90), "red").save(folder / "one.jpg")
    Image.new("L", (60, 140), 90).save(folder / "deeper" / "two.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    arguments = ["predict.py", folder, "--model", cwd / "runs" / "shapes-1", "--threshold", "0.0"]
    output = script(*arguments, "--batch_size", "2", "--output_dir", tmp_path / "out", cwd=tmp_path)
    detections = json.loads((tmp_path / "out" / "detections.json").read_text())
    images = json.loads((tmp_path / "out" / "images.json").read_text())
    names = {image["id"]: image["file_name"] for image in images["images"]}
    assert sorted(names.values()) == ["deeper/two.png", "one.jpg"]
    assert all({"image_id", "category_id", "bbox", "score"} == set(found) for found in detections)
    assert {names[found["image_id"]] for found in detections} == {"deeper/two.png", "one.jpg"}
    assert [category["name"] for category in images["categories"]] == ["rectangle", "ellipse", "triangle"]
    assert Image.open(tmp_path / "out" / "one.jpg.png").size == (120, 90)
    assert Image.open(tmp_path / "out" / "deeper" / "two.png.png").size == (60, 140)
    assert "not read: " in output
    assert "broken.jpg" in output
    arguments[-1] = "0.5"
    again = script(*arguments, "--output_dir", tmp_path / "out", cwd=tmp_path, ok=False)
    assert "threshold was 0.0 and is 0.5. Use another --output_dir" in again


def test_evaluate_agrees_with_the_number_at_training_time_and_across_processes(trained, script):
    cwd, _ = trained
    common = ["--model", "runs/shapes-1", "--dataset", "data/shapes-quick"]
    table = script("evaluate.py", *common, "--output", "one.json", cwd=cwd)
    assert "AP50" in table
    assert "rectangle" in table
    run(*TWO_PROCESSES, EXAMPLES / "evaluate.py", *common, "--batch_size", "3", "--output", "two.json", cwd=cwd)
    one, two = (json.loads((cwd / name).read_text()) for name in ("one.json", "two.json"))
    trained_metrics = json.loads((cwd / "runs" / "shapes-1" / "metrics.json").read_text())
    for name in ("AP", "AP50", "AR100"):
        assert one[name] == pytest.approx(two[name], abs=1e-6)
        assert one[name] == pytest.approx(trained_metrics[name], abs=1e-3)


def test_the_same_command_says_that_it_has_ended_and_another_run_is_left_alone(trained, script):
    cwd, _ = trained
    shapes_1 = ["--quick", "--output_dir", "runs/shapes-1"]
    assert "holds this run, and it has ended" in script("finetune.py", *shapes_1, cwd=cwd, ok=False)
    another = script("finetune.py", *shapes_1, "--seed", "1", cwd=cwd, ok=False)
    assert "holds another run (seed: 0 there, 1 here)" in another
    nothing = ["--quick", "--output_dir", "runs/nothing", "--resume"]
    assert "needs the --output_dir of a run" in script("finetune.py", *nothing, cwd=cwd, ok=False)


def test_a_run_goes_on_in_the_middle_as_it_began(trained, script):
    cwd, output = trained
    assert "Recipe small-data: chosen by auto; 64 images" in output
    middle = ["--quick", "--set", "num_queries=8", "--output_dir", "runs/middle"]
    script("finetune.py", *middle, cwd=cwd)
    folder = cwd / "runs" / "middle"
    assert len((folder / "log.jsonl").read_text().splitlines()) == 2
    assert "it has ended" in script("finetune.py", *middle, cwd=cwd, ok=False)
    resume = ["--output_dir", "runs/middle", "--resume"]
    assert "Resumed after epoch 2" in script("finetune.py", *resume, cwd=cwd)
    assert len((folder / "log.jsonl").read_text().splitlines()) == 2
    script("finetune.py", *resume, "--epochs", "3", cwd=cwd)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert {"matched_iou", "class_error", "never_matched", "duplicates", "changed_matches"} <= set(lines[2])
    assert json.loads((folder / "preprocessor_config.json").read_text())["size"] == {"height": 96, "width": 96}
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_queries"], config["backbone"], config["query_type"]) == (8, "test_resnet", "anchor")


def test_overfitting_says_yes_or_why_not(trained, script):
    cwd, _ = trained
    few = ["--quick", "--overfit", "2", "--output_dir", "runs/few", "--set", "num_queries=1"]
    output = script("finetune.py", *few, cwd=cwd, ok=False)
    assert "Overfit: NO, AP50" in output
    assert "model 1 queries" in output
    assert (cwd / "runs" / "few" / "validation.png").is_file()
    assert "dropout" in output


def test_trackers_get_every_epoch_or_are_refused(trained, script):
    cwd, _ = trained
    refused = script("finetune.py", "--quick", "--report_to", "aim", cwd=cwd, ok=False)
    assert "aim: not installed" in refused
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracked = ["--quick", "--report_to", "tensorboard", "--output_dir", "runs/tracked", "--logging_steps", "1"]
    tracked += ["--set", "decoder_layers=2"]
    script("finetune.py", *tracked, cwd=cwd)
    events = EventAccumulator(str(cwd / "runs" / "tracked" / "hf_detr")).Reload()
    shown = {"loss", "loss_ce", "loss_giou_0", "loss_bbox_dense", "loss_ce_denoising", "learning_rate", "AP", "AP50"}
    shown |= {"backbone_learning_rate", "gradient_norm", "images_per_second", "matched_iou", "never_matched"}
    assert shown <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("AP")] == [4, 8]
    assert [event.step for event in events.Scalars("train/gradient_norm")] == list(range(1, 9))
    assert [image.step for image in events.Images("validation")] == [4, 8]


def test_lora_averages_and_early_stopping_in_one_run(trained, script):
    """From a checkpoint; what is saved is a plain model, and the backbone in it that of the checkpoint."""
    cwd, _ = trained
    options = ["--dataset", "data/shapes-quick", "--model", "runs/shapes-1", "--num_workers", "0", "--lora_rank", "2"]
    options += ["--ema", "0.9", "--early_stopping", "1", "--epochs", "12", "--eval_every", "1", "--batch_size", "16"]
    options += ["--learning_rate", "0", "--metric", "AP50", "--save_total_limit", "2", "--gradient_checkpointing"]
    output = script("finetune.py", *options, "--output_dir", "runs/lora", cwd=cwd)
    assert "No better AP50 in 1 evaluations: training ends here." in output
    folder = cwd / "runs" / "lora"
    assert len((folder / "log.jsonl").read_text().splitlines()) < 12
    assert len(list(folder.glob("checkpoint-*"))) == 2
    before, after = (DetrForDetection.from_pretrained(cwd / "runs" / name) for name in ("shapes-1", "lora"))
    assert [name for name, _ in before.named_parameters() if "backbone" not in name] == [
        name for name, _ in after.named_parameters() if "backbone" not in name
    ]
    backbone = before.model.backbone.state_dict()
    for name, value in after.model.backbone.state_dict().items():  # whose batch norms are frozen now
        assert torch.equal(value, backbone[name]), name
    assert "--lora_rank adapts a trained detector" in script("finetune.py", "--lora_rank", "2", cwd=cwd, ok=False)


def test_batches_that_do_not_fit_are_halved_and_accumulated(trained, tmp_path, script):
    """Memory that ends is played by a `DetrForDetection` that takes 8 images at most."""
    cwd, _ = trained
    limit = """
import hf_detr
forward = hf_detr.DetrForDetection.forward
def limited(self, pixel_values, *args, **kwargs):
    if self.training and len(pixel_values) > 8:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
    return forward(self, pixel_values, *args, **kwargs)
hf_detr.DetrForDetection.forward = limited
"""
    command = ["finetune.py", "--quick", "--batch_size", "32", "--auto_batch_size", "--output_dir", "runs/fit"]
    output = script(*command, cwd=cwd, before=limit)
    assert "Batches of 32 asked for; 8 fit, 4 an optimizer step." in output
    lines = [json.loads(line) for line in (cwd / "runs" / "fit" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    args = json.loads((cwd / "runs" / "fit" / "args.json").read_text())
    assert (args["found"], args["batch_size"], args["gradient_accumulation_steps"]) == ([8, 4], 32, 1)
    assert "it has ended" in script(*command, cwd=cwd, ok=False), "the same command knows its run"
    resume = ["--output_dir", "runs/fit", "--resume", "--epochs", "3"]
    output = script("finetune.py", *resume, cwd=cwd)
    assert "8 fit, 4 an optimizer step" in output, "what was found is kept"


def test_starting_from_a_checkpoint_on_another_data_set(trained, tmp_path, script):
    cwd, _ = trained
    folder = draw_shapes_dataset(tmp_path / "mine", num_train=8, num_val=4, progress=False)
    for path in (folder / "annotations").iterdir():
        content = json.loads(path.read_text())
        content["categories"][0] = {"id": 99, "name": "box"}
        for record in content["annotations"]:
            record["category_id"] = 99 if record["category_id"] == 1 else record["category_id"]
        path.write_text(json.dumps(content))
    output = script("finetune.py", "--dataset", folder, "--model", cwd / "runs" / "shapes-1", "--quick",
        "--num_workers", "0", "--image_size", "96", cwd=tmp_path,
    )  # fmt: skip
    assert "2 keep their weights by name, 1 start at random (box), 1 are dropped" in output
    config = json.loads((tmp_path / "runs" / "mine-1" / "config.json").read_text())
    assert config["id2label"] == {"0": "ellipse", "1": "triangle", "2": "box"}


def test_convert_writes_for_us_and_for_transformers_and_never_over_something(tmp_path, script):
    save_original(their_model("resnet18", num_labels=2), tmp_path / "detr-tiny.pth")
    (tmp_path / "labels.json").write_text('["cat", "dog"]')
    output = script(
        "convert.py", "detr-tiny.pth", "ours", "--attention_heads", "4", "--labels", "labels.json", cwd=tmp_path
    )
    assert "not dilated, according to the file's name" in output
    assert DetrForDetection.from_pretrained(tmp_path / "ours").config.id2label == {0: "cat", 1: "dog"}
    script("convert.py", "ours", "theirs", "--to", "transformers", cwd=tmp_path)
    theirs, info = transformers.DetrForObjectDetection.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(info.values())
    assert theirs.config.id2label == {0: "cat", 1: "dog"}
    assert "not an empty folder" in script("convert.py", "theirs", "ours", cwd=tmp_path, ok=False)
    assert "No checkpoint at" in script("convert.py", "nowhere.pth", "new", cwd=tmp_path, ok=False)
    assert not (tmp_path / "new").exists()


def test_faults_of_the_data_stop_the_run_before_it_starts(trained, tmp_path, script):
    cwd, _ = trained
    folder = draw_shapes_dataset(tmp_path / "mine", num_train=4, num_val=2, progress=False)
    path = folder / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"][2] = 0
    path.write_text(json.dumps(content))
    arguments = ["--dataset", folder, "--model", cwd / "runs" / "shapes-1"]
    output = script("finetune.py", *arguments, cwd=tmp_path, ok=False)
    assert "instances_train.json: 1 problems" in output
    assert "annotation 1: bbox" in output
    assert "has no area" in output
    assert "check_dataset.py" in output


def test_training_on_yolo_with_the_paper_s_augmentation_and_a_report_at_the_end(trained, tmp_path, script):
    cwd, _ = trained
    write_yolo(tmp_path / "coco", shapes(tmp_path / "coco", 12, 6), tmp_path / "yolo")
    output = script("finetune.py", "--dataset", "yolo", "--model", cwd / "runs" / "shapes-1", "--quick",
        "--augmentation", "paper", "--num_workers", "1", "--image_size", "96", cwd=tmp_path,
    )  # fmt: skip
    assert "12 training and 6 validation images of rectangle, ellipse, triangle" in output
    assert "Padding before augmentation: " in output
    arguments = ["--model", "runs/yolo-1", "--dataset", "yolo", "--report", "report", "--save_thresholds"]
    script("evaluate.py", *arguments, cwd=tmp_path)
    assert "missed" in (tmp_path / "report" / "report.html").read_text()
    assert len(json.loads((tmp_path / "runs/yolo-1/preprocessor_config.json").read_text())["class_thresholds"]) == 3


def test_two_processes_train_to_one_result_and_evaluate_one_image(trained, tmp_path):
    """One of them has nothing to evaluate, and must neither wait nor be waited for."""
    cwd, _ = trained
    folder = draw_shapes_dataset(tmp_path / "mine", num_train=8, num_val=1, progress=False)
    arguments = ["--dataset", folder, "--model", cwd / "runs" / "shapes-1", "--quick", "--image_size", "96"]
    arguments += ["--num_workers", "0", "--output_dir", "runs/two"]
    output = run(*TWO_PROCESSES, EXAMPLES / "finetune.py", *arguments, cwd=tmp_path)
    assert "on 2 x cpu" in output
    assert "8 training and 1 validation images" in output
    assert output.count("Best checkpoint") == 1
    assert len((tmp_path / "runs" / "two" / "log.jsonl").read_text().splitlines()) == 2


def test_help_is_short(script):
    text = script("finetune.py", "--help", cwd=EXAMPLES)
    assert len(text.splitlines()) < 125
