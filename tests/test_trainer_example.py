"""transformers' `Trainer` on our data and model: the example, and that every epoch is augmented anew."""

import json
import sys
from pathlib import Path

import pytest
import transformers
from conftest import tiny_model
from script_runner import run_script

from hf_detr import DetrForDetection, DetrImageProcessor, data
from hf_detr.data import AugmentedDataset, DetectionCollator, draw_shapes_dataset, load_detection_dataset

EXAMPLE = Path(__file__).parents[1] / "examples" / "finetune_trainer.py"


def draw_few():
    """Fewer images; everything else is as its user has it."""
    draw = data.draw_shapes_dataset

    def few(folder):
        sys.stdout.write("" if Path(folder).exists() else "drawing\n")
        return draw(folder, num_train=24, num_val=10, progress=False)

    data.draw_shapes_dataset = few


@pytest.mark.parametrize("processes", [1, 2])
def test_the_trainer_trains_the_same_recipe_and_leaves_a_checkpoint(tmp_path, processes):
    options = {"processes": processes, "setup": draw_few}
    code, output = run_script(EXAMPLE, "--epochs", "2", "--output_dir", "out", cwd=tmp_path, **options)
    assert code == 0, output
    assert "Recipe small-data" in output
    assert output.count("drawing") == 1, "others wait for the first process"
    found = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert {"eval_AP", "eval_AP50", "eval_AP_triangle", "eval_loss"} <= set(found)
    assert found["epoch"] == 2
    log = json.loads(next((tmp_path / "out").glob("checkpoint-*/trainer_state.json")).read_text())["log_history"]
    assert [line["epoch"] for line in log if "eval_AP" in line]
    assert all(line["grad_norm"] > 0 for line in log if "grad_norm" in line)
    model, info = DetrForDetection.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert (model.config.query_type, model.config.backbone) == ("anchor", "test_resnet")
    assert set(model.config.label2id) == {"rectangle", "ellipse", "triangle"}
    assert DetrImageProcessor.from_pretrained(tmp_path / "out").size["height"] == 96


def test_every_epoch_is_augmented_anew(tmp_path):
    folder = draw_shapes_dataset(tmp_path / "data", num_train=4, num_val=1, progress=False)
    rows = list(load_detection_dataset(folder, "train", cache_dir=tmp_path / "cache", progress=False))
    seen = []

    def look(row):
        seen.append(int(dataset._epoch))
        return row

    dataset = AugmentedDataset(rows, look)
    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"), num_train_epochs=3, per_device_train_batch_size=2, remove_unused_columns=False,
        report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    collate = DetectionCollator(DetrImageProcessor(size={"height": 64, "width": 64}))
    model = tiny_model(num_labels=3)
    transformers.Trainer(model=model, args=arguments, data_collator=collate, train_dataset=dataset).train()
    assert sorted(seen) == [0] * 4 + [1] * 4 + [2] * 4
