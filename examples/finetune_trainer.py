"""`finetune.py` with transformers' `Trainer` instead of the loop, on one page: the same data, recipe and model.

python examples/finetune_trainer.py
accelerate launch examples/finetune_trainer.py --dataset FOLDER
"""

import argparse
import math
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torchvision.transforms import v2
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_detr import DetrConfig, DetrForDetection, DetrImageProcessor, data, training
from hf_detr.evaluation import TrainerMetrics
from hf_detr.runtime import exit_on_error
from hf_detr.training import DetrTrainer, next_free_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="annotated folder or Hub id; default: draw shapes into data/shapes")
    parser.add_argument("--epochs", type=int, help="default: the recipe's")
    parser.add_argument(
        "--output_dir", help="default: the next free runs/trainer-N; a run that was stopped there goes on"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    # by default it treats each of several processes without an accelerator as a launch of one process
    state = PartialState(cpu=not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"))
    training.use_all_cores(state.num_processes)
    set_seed(0)

    output_dir = args.output_dir or next_free_run("trainer")
    state.wait_for_everyone()  # all processes have looked before one makes the folder
    if (Path(output_dir) / "eval_results.json").exists():
        raise FileExistsError(f"{output_dir} holds a run that has ended. Name another --output_dir.")
    newest = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
    own = newest is not None and (Path(newest) / "trainer_state.json").exists()
    if not own and Path(output_dir).is_dir() and any(Path(output_dir).iterdir()):
        raise FileExistsError(f"{output_dir} is not empty and holds no run of this script. Name another --output_dir.")
    with state.main_process_first():  # the others use what the first has drawn and cached
        folder = args.dataset or data.draw_shapes_dataset("data/shapes")
        train_set = data.load_detection_dataset(folder, "train")
        names = data.id2label(train_set)
        val_set = data.load_detection_dataset(folder, "val", id2label=names)
    data.require_objects(train_set, f"{folder}, training", "learned")
    data.require_objects(val_set, f"{folder}, validation", "measured")
    size, backbone, start = {"height": 96, "width": 96}, "test_resnet", "scratch"
    if args.dataset:
        size, backbone, start = {"shortest_edge": 800, "longest_edge": 1333}, "resnet50", "backbone"
    processor = DetrImageProcessor(size=size, round_size=args.dataset is not None)  # as the augmentation
    about, edges = training.summarize(train_set), tuple(size.values())
    strides = training.feature_strides(backbone)
    recipe = training.choose_recipe("auto", about, start, edges, strides=strides, upright=args.dataset is not None)
    unused = dict.fromkeys(("ema", "mosaic", "copy_paste", "color_jitter"), 0.0)  # finetune.py has them
    given = unused | ({"epochs": args.epochs} if args.epochs else {})
    print(recipe.describe(given))
    values = recipe.values("training", given)
    config = DetrConfig(**recipe.values("model", {"backbone": backbone, "id2label": names}))
    model = DetrForDetection.from_pretrained_backbone(config) if args.dataset else DetrForDetection(config)
    augmentation = data.paper_augmentation(size, rounded=True) if args.dataset else data.flip_rotate_augmentation()
    if args.dataset is None:  # drawn images stay in memory, resized once
        resize = data.Augmentation(v2.Resize(edges))
        train_set, val_set = [resize(row) for row in train_set], list(val_set)
        model.set_attn_implementation("eager")  # the fastest at so few locations

    rates = (values[name] for name in ("learning_rate", "backbone_learning_rate", "weight_decay"))
    optimizer = torch.optim.AdamW(training.parameter_groups(model, *rates))
    steps = math.ceil(len(train_set) / (values["batch_size"] * state.num_processes))  # per epoch
    schedule = {"warmup": values["warmup"], "decay": values["decay"], "total_steps": values["epochs"] * steps}
    metrics = TrainerMetrics(processor, names)
    trainer = DetrTrainer(
        model,
        TrainingArguments(
            output_dir, num_train_epochs=values["epochs"], per_device_train_batch_size=values["batch_size"],
            per_device_eval_batch_size=values["batch_size"], bf16=training.preferred_precision() == "bf16",
            dataloader_num_workers=2 if args.dataset else 0, remove_unused_columns=False, eval_do_concat_batches=False,
            eval_strategy="steps", eval_steps=steps * min(values["eval_every"], values["epochs"]), report_to="none",
            logging_strategy="epoch", save_strategy="best", save_total_limit=1, metric_for_best_model="AP",
            load_best_model_at_end=True, max_grad_norm=0.1, use_cpu=state.device.type == "cpu",
        ),
        data_collator=data.DetectionCollator(processor), processing_class=processor, eval_dataset=val_set,
        train_dataset=data.AugmentedDataset(train_set, augmentation),  # the Trainer's loader sets its epoch
        compute_metrics=metrics, preprocess_logits_for_metrics=metrics.collect,
        optimizers=(optimizer, training.build_schedule(optimizer, values["schedule"], **schedule)),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=newest)
    found = trainer.evaluate()  # of the best checkpoint, which was loaded at the end
    trainer.save_model()
    trainer.log_metrics("eval", found)
    trainer.save_metrics("eval", found)
    trainer.accelerator.end_training()  # gloo may abort a process that exits while it is connected


if __name__ == "__main__":
    with exit_on_error():
        main()
