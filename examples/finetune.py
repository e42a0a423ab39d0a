"""Fine-tune DETR on annotated images: COCO, YOLO, Pascal VOC, an imagefolder or a Hub data set. Without arguments it
trains on a data set that it draws.

    accelerate launch examples/finetune.py
    accelerate launch examples/finetune.py --dataset FOLDER --model CHECKPOINT
    accelerate launch examples/finetune.py --dataset FOLDER --push_to_hub ME/MODEL

The output folder holds the best checkpoint with its processor (`pipeline("object-detection", model=FOLDER)`),
`metrics.json`, `log.jsonl` with one line per epoch, `validation.png`, the final weights in `last/`, and
`checkpoint-.../` to resume from: with `--output_dir`, the same command continues a run that was killed.
"""

import math
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import set_seed

from hf_detr.runtime import exit_on_error
from hf_detr.speed import prepare_for_training
from hf_detr.training import (
    CrossValidation,
    FinetuneArguments,
    LearningCurve,
    RunEndedError,
    TrainingRun,
    TrainStep,
    build_accelerator,
    build_ema,
    build_loaders,
    build_model,
    build_processor,
    build_schedule,
    compile_for_training,
    fit_processor,
    identify,
    load_data,
    parameter_groups,
    parse_finetune_args,
    repeat_images,
    resolve_recipe,
)


def main(augmentation: Callable[[Any], Any] | None = None) -> None:
    """Train. `augmentation` replaces that of the recipe, see examples/by_feature/own_augmentation.py."""
    args = parse_finetune_args(__doc__)  # dataclasses, see hf_detr/training/arguments.py
    if not (args.run.learning_curve or args.run.folds):
        train(args, augmentation)
        return
    several = LearningCurve(args) if args.run.learning_curve else CrossValidation(args)
    for part in several.parts:  # on more and more images, or each without one fold
        try:
            train(part, augmentation)
        except RunEndedError:  # in an earlier start of this command
            print(f"{part.run.output_dir} is complete and is used as it is.", flush=True)
    several.finish()


def train(args: FinetuneArguments, augmentation: Callable[[Any], Any] | None) -> None:
    accelerator = build_accelerator(args)
    set_seed(args.run.seed)

    # data: read completely and checked, before anything is computed
    train_set, val_set = load_data(args, accelerator)

    # model, and the recipe: every hyperparameter that was not given, with the reason for its value
    processor = build_processor(args)
    recipe = resolve_recipe(args, train_set, processor)
    accelerator.print(recipe.description)
    model = build_model(args, recipe, train_set)
    processor = fit_processor(processor, model, recipe)

    # the run: its folder, its progress, its checkpoints
    run = TrainingRun(args, recipe, accelerator, processor)
    if args.data.quick:
        train_set = train_set.select(range(min(64, len(train_set))))
    train_set = repeat_images(args, train_set, accelerator)
    if args.run.auto_batch_size:
        batch_size, accumulation = run.fit_batch_size(model, train_set)
        recipe = replace(recipe, batch_size=batch_size, gradient_accumulation_steps=accumulation)
    train_loader, val_loader, probe = build_loaders(
        args, recipe, processor, train_set, val_set, accelerator, augmentation
    )
    accelerator.print(run.describe(model, train_set, val_set, train_loader))
    recipe = run.plan_time(recipe, model, train_loader, val_loader, val_set)

    # optimization: AdamW and gradient clipping as in the paper, learning rates and schedule of the recipe
    prepare_for_training(model)
    if args.model.compile:
        compile_for_training(model)
    ema = build_ema(model, recipe.ema).to(accelerator.device) if recipe.ema else None
    groups = parameter_groups(model, recipe.learning_rate, recipe.backbone_learning_rate, recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, fused=True)
    unsharded = deepcopy(model).to(accelerator.device) if accelerator.is_fsdp2 else None
    model, optimizer = accelerator.prepare(model, optimizer)
    plain_model = accelerator.unwrap_model(model)
    steps_per_epoch = math.ceil(len(train_loader) / recipe.gradient_accumulation_steps)
    total_steps = recipe.epochs * steps_per_epoch
    scheduler = build_schedule(
        optimizer, recipe.schedule, warmup=recipe.warmup, decay=recipe.decay, total_steps=total_steps
    )
    predictor = ema.module if ema is not None else plain_model if unsharded is None else unsharded  # for evaluation
    data = identify(train_set, val_set)  # a run does not go on with other classes
    run.start(recipe, model, plain_model, predictor, ema, scheduler, probe, data, steps_per_epoch)  # or continue
    train_step = TrainStep(
        accelerator, model, plain_model, optimizer, scheduler, ema=ema, on_nan=args.run.on_nan, folder=run.path
    )
    train_step.skipped = run.progress.skipped

    while not run.is_done():
        model.train()
        for batches in run.steps(train_loader):
            terms = train_step(batches, run.progress.step + 1)  # forward, backward, clipping, optimizer, schedule, EMA
            run.record_step(batches, terms, train_step)
            if run.checkpoint_due():  # every --save_minutes, and on SIGTERM
                run.save_checkpoint()
                if run.should_stop():
                    sys.exit(run.stop.exit_code)
        line = run.epoch_figures()

        evaluated = run.evaluation_due()
        if evaluated:
            run.save_checkpoint()  # a scheduler that stops the run may not wait for the end of the evaluation
        line |= run.measure_probe(evaluated=evaluated)
        if evaluated:
            line |= run.evaluate(val_loader, val_set, line)  # saves the model if it is the best

        run.end_epoch(line)  # log, console and a checkpoint
        if run.should_stop():
            sys.exit(run.stop.exit_code)

    run.finish(val_loader, val_set)
    if args.data.overfit and not run.memorized():
        sys.exit(1)


if __name__ == "__main__":
    with exit_on_error():
        main()
