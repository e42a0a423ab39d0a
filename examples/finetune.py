"""Fine-tune DETR on annotated images: COCO, YOLO, Pascal VOC, an imagefolder, a Hub data set. Without arguments: on a
data set drawn on the spot.

    accelerate launch examples/finetune.py
    accelerate launch examples/finetune.py --dataset FOLDER --model CHECKPOINT
    accelerate launch examples/finetune.py --dataset FOLDER --push_to_hub ME/MODEL

The output folder holds the best checkpoint with its processor (`pipeline("object-detection", model=FOLDER)`),
`metrics.json`, `log.jsonl` with a line an epoch, `validation.png`, the weights of the end in `last/`, and
`checkpoint-.../` to go on from: with `--output_dir`, a run that was killed goes on with the same command.
"""

import argparse
import json
import math
import os
import shutil
import sys
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, set_seed
from safetensors import SafetensorError
from tqdm.auto import tqdm

from hf_detr import DetrForDetection, DetrImageProcessor
from hf_detr.data import id2label
from hf_detr.evaluation import evaluate_detection, format_metrics
from hf_detr.hub import hash_of_weights, prepare_repo, push_folder
from hf_detr.runtime import StopRequest, end_with_launcher
from hf_detr.runtime import atomic_write as replacing
from hf_detr.training import (
    DataSummary,
    Meter,
    NonFiniteError,
    Progress,
    TrainingProbe,
    TrainStep,
    any_process,
    build_ema,
    build_loaders,
    build_model,
    build_processor,
    build_schedule,
    check_sharding,
    check_trackers,
    claim_output_dir,
    compile_for_training,
    dataset_name,
    describe_padding,
    explain_overfit,
    fit_batch_size,
    gather_weights,
    hint,
    in_groups,
    load_data,
    log_picture,
    merged,
    note_arguments,
    parameter_groups,
    parse_finetune_args,
    preferred_precision,
    replace_files,
    save_checkpoint,
    seen_size,
    settle,
    sharding_plugin,
    share_buffers,
    summarize,
    trim_log,
    use_all_cores,
    use_plain_weights,
)
from hf_detr.visualization import compare_with_truth

OVERFIT_AP50 = 0.9


def main() -> None:
    args = parse_finetune_args(__doc__)
    end_with_launcher()
    launched_with = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # "no" also when nobody chose
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision or (preferred_precision() if launched_with == "no" else None),
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # `TrainStep` accumulates
        fsdp_plugin=sharding_plugin(),
        log_with=args.report_to,
        project_dir="runs",
    )
    check_sharding(accelerator, ema=bool(args.ema), auto_batch_size=args.auto_batch_size)
    check_trackers(args.report_to, accelerator)
    threads = use_all_cores(accelerator.num_processes) if accelerator.device.type == "cpu" else None
    set_seed(args.seed)

    # data: read in full and checked, before anything is computed
    folder, train_set, val_set = load_data(args, accelerator)
    names = id2label(train_set)
    data = summarize(train_set)

    # model
    processor = build_processor(args)
    recipe = settle(args, data, processor, accelerator)
    model, start = build_model(args, recipe, names)
    if args.push_to_hub and accelerator.is_main_process:  # not to find out after the training that it is not allowed
        args.push_to_hub = prepare_repo(args.push_to_hub, private=args.hub_private or None)
    run_name = (dataset_name(args.dataset) if args.dataset else "shapes") + ("-overfit" if args.overfit else "")
    # when all that can be wrong with the arguments has been found
    claim = claim_output_dir(args.output_dir, run_name, vars(args), accelerator, resume=args.resume)
    output_dir = claim.folder
    stop = StopRequest()
    if args.quick:
        train_set = train_set.select(range(min(64, len(train_set))))
    if args.auto_batch_size:
        wanted = args.batch_size
        args.found = args.found or claim.begun.get("found")  # the first time, for as long as the run lives
        args.found = args.found or fit_batch_size(args, model, train_set, processor, accelerator)
        note_arguments(output_dir, vars(args), accelerator)
        args.batch_size, args.gradient_accumulation_steps = args.found
        accelerator.print(f"Batches of {wanted} asked for; {args.found[0]} fit, {args.found[1]} an optimizer step.")
    train_loader, val_loader, probe = build_loaders(args, processor, train_set, val_set, accelerator)
    accelerator.print(
        f"{len(train_set)} training and {len(val_set)} validation images of {', '.join(names.values())}\n{start}\n"
        f"{describe(model, data, accelerator)}{f' with {threads} threads' if threads else ''}, precision "
        f"{accelerator.mixed_precision}. {describe_padding(train_set, train_loader, processor)}Output: {output_dir}"
    )

    # optimisation: AdamW and clipping at 0.1, as the paper; rates and schedule are the recipe's
    if args.compile:
        compile_for_training(model)
    ema = build_ema(model, args.ema).to(accelerator.device) if args.ema else None
    optimizer = torch.optim.AdamW(
        parameter_groups(model, args.learning_rate, args.backbone_learning_rate, args.weight_decay), fused=True
    )
    whole = deepcopy(model).to(accelerator.device) if accelerator.is_fsdp2 else None
    model, optimizer = accelerator.prepare(model, optimizer)
    plain_model = accelerator.unwrap_model(model)
    steps_per_epoch = math.ceil(len(train_loader) / args.gradient_accumulation_steps)
    scheduler = build_schedule(
        optimizer, args.schedule, warmup=args.warmup, decay=args.decay, total_steps=args.epochs * steps_per_epoch
    )
    history = Progress()
    accelerator.register_for_checkpointing(scheduler, history, probe, *([ema] if ema else []))
    predictor = ema.module if ema else plain_model if whole is None else whole
    run = Run(args, accelerator, model, predictor, folder, output_dir, processor, val_set, val_loader, history)
    if not accelerator.is_fsdp2:
        use_plain_weights(accelerator, plain_model, (plain_model.config, processor))
    history.spread |= {"processes": accelerator.num_processes, "batch_size": args.batch_size, "seed": args.seed}
    history.spread |= {"gradient_accumulation_steps": args.gradient_accumulation_steps}
    if claim.checkpoint:
        resume(run, claim.checkpoint)
    elif accelerator.is_main_process:  # killed before its first checkpoint
        trim_log(output_dir / "log.jsonl", 0)
    step = TrainStep(
        accelerator, model, plain_model, optimizer, scheduler, ema=ema, on_nan=args.on_nan, folder=output_dir
    )
    step.skipped = history.skipped
    plain_values = {name: value for name, value in vars(args).items() if isinstance(value, (int, float, str))}
    accelerator.project_configuration.logging_dir = str(output_dir)
    accelerator.init_trackers("hf_detr", config=plain_values)

    train(run, step, train_loader, scheduler, probe, stop)
    stop.end()
    accelerator.wait_for_everyone()
    conclude(run)
    learned = not args.overfit or conclude_overfit(run, data)
    accelerator.wait_for_everyone()  # none leaves, and has the others stopped, before everything is said
    accelerator.end_training()
    if not learned:
        raise SystemExit(1)


@dataclass
class Run:
    """What training, evaluating, keeping and reporting share."""

    args: argparse.Namespace
    accelerator: Accelerator
    model: Any  # as Accelerate has wrapped it
    predictor: DetrForDetection  # the one that predicts, is measured and saved; not wrapped
    folder: str | Path  # of the data
    output_dir: Path
    processor: DetrImageProcessor
    val_set: Any
    val_loader: Any
    history: Progress

    def evaluate(self, model: Any) -> Any:
        progress = self.accelerator.is_main_process
        return evaluate_detection(model, self.val_loader, self.val_set, self.processor, progress=progress)


def describe(model: DetrForDetection, data: DataSummary, accelerator: Accelerator) -> str:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    text = f"{trained:.1f} M parameters train on {accelerator.num_processes} x {accelerator.device}"
    if data.most_objects > (queries := model.config.num_queries):
        text = f"Up to {data.most_objects} objects in an image, but {queries} queries: some are not learned.\n{text}"
    return text


# -- training ---------------------------------------------------------------------------------------------------------


def train(run: Run, step: TrainStep, loader: Any, scheduler: Any, probe: TrainingProbe, stop: StopRequest) -> None:
    """Epoch after epoch: learn, look, evaluate, write the log, save."""
    args, accelerator, history = run.args, run.accelerator, run.history
    while history.epoch < args.epochs and not ends_early(run):
        line = train_one_epoch(run, step, loader, scheduler, stop)
        epoch = history.epoch + 1
        evaluated = epoch % args.eval_every == 0 or epoch == args.epochs
        if evaluated:  # which may take longer than whoever stops the run has patience
            save_to_resume(run)
        if accelerator.is_fsdp2:
            gather_weights(run.model, run.predictor)
        share_buffers(run.predictor, accelerator)
        if accelerator.is_main_process and (evaluated or not args.overfit):
            with accelerator.autocast():
                line |= probe.look(run.predictor)
        if evaluated:
            line |= evaluate_and_keep(run, line)
        history.end_epoch()
        accelerator.log(line, step=history.step)
        if accelerator.is_main_process:
            report(run, line)
        save_to_resume(run)
        stop_if_told(run, stop)


def train_one_epoch(run: Run, step: TrainStep, loader: Any, scheduler: Any, stop: StopRequest) -> dict:
    """What is left of an epoch; returns its line for the log. In between the run is saved, or stops if told to."""
    args, accelerator, history = run.args, run.accelerator, run.history
    epoch = history.epoch + 1
    loader.set_epoch(epoch)
    loader.batch_sampler.skip(history.batches)
    run.model.train()
    meter, recent = Meter(accelerator), Meter(accelerator)
    if history.meter:
        meter.load_state_dict(history.meter)
    steps = math.ceil(len(loader) / args.gradient_accumulation_steps)
    bar = tqdm(total=steps, desc=f"Epoch {epoch}", disable=not accelerator.is_main_process, leave=False)
    started, since, saved = time.perf_counter() - history.seconds, time.perf_counter(), time.monotonic()
    for batches in in_groups(loader, args.gradient_accumulation_steps):
        terms = step(batches, history.step + 1)
        history.step += 1
        history.batches += len(batches)
        history.skipped = step.skipped
        while step.reports:
            tqdm.write(step.reports.pop())
        if terms is not None:
            terms["images"] = torch.tensor(sum(len(b["labels"]) for b in batches), device=accelerator.device)
            for each in (meter, recent):
                each.add(terms)
        bar.update()
        if args.report_to and history.step % args.logging_steps == 0:
            seconds, since = time.perf_counter() - since, time.perf_counter()
            shown = figures(recent, seconds, scheduler, accelerator)
            accelerator.log({f"train/{name}": value for name, value in shown.items()}, step=history.step)
            recent.clear()
        due = not args.overfit and time.monotonic() - saved > 60 * args.save_minutes
        if any_process(due or stop.requested, accelerator):
            history.meter, history.seconds = meter.state_dict(), time.perf_counter() - started
            save_to_resume(run)
            saved = time.monotonic()
            stop_if_told(run, stop)
    bar.close()
    seconds = time.perf_counter() - started
    history.meter, history.seconds = meter.state_dict(), seconds
    line = {"epoch": epoch, "step": history.step, "seconds": round(seconds, 1)}
    return line | figures(meter, seconds, scheduler, accelerator)


def figures(meter: Meter, seconds: float, scheduler: Any, accelerator: Accelerator) -> dict[str, float]:
    """Means of the loss terms and the norm of the gradients, the learning rates, images a second."""
    means = meter.means()
    images = means.pop("images", 0.0) * meter.steps * accelerator.num_processes
    rates = scheduler.get_last_lr()
    line = {"learning_rate": rates[0]} | ({"backbone_learning_rate": rates[-1]} if rates[-1] != rates[0] else {})
    return line | {"images_per_second": round(images / seconds, 1)} | {n: round(v, 4) for n, v in means.items()}


def resume(run: Run, checkpoint: Path) -> None:
    accelerator, history = run.accelerator, run.history
    now = history.spread
    accelerator.load_state(str(checkpoint))
    different = ", ".join(
        f"{name} {value}, now {now[name]}" for name, value in history.spread.items() if value != now[name]
    )
    if different and history.batches:
        raise SystemExit(
            f"{checkpoint} was saved in the middle of an epoch, and what was left of it depends on: {different}"
        )
    if different:
        accelerator.print(f"From here on not as the run began: {different}")
    history.spread = now
    if accelerator.is_main_process:
        trim_log(run.output_dir / "log.jsonl", history.epoch)
    where = f" and {history.batches} batches" if history.batches else ""
    accelerator.print(f"Resumed after epoch {history.epoch}{where}; best {run.args.metric} so far {history.best:.4f}")


def save_to_resume(run: Run) -> None:
    if run.args.overfit:  # over in minutes
        return
    save_checkpoint(run.accelerator, run.output_dir, run.history, keep=run.args.save_total_limit)


def stop_if_told(run: Run, stop: StopRequest) -> None:
    """When the run has just been saved."""
    if any_process(stop.requested, run.accelerator):
        go_on = "" if run.args.overfit else f" and saved. Go on with --output_dir {run.output_dir} --resume"
        run.accelerator.print(f"Stopped after step {run.history.step}{go_on}")
        run.accelerator.end_training()
        sys.exit(stop.exit_code)


def ends_early(run: Run) -> bool:
    """When it has learned by heart, or gets no better."""
    evaluations, patience = run.history.evaluations, run.args.early_stopping
    if run.args.overfit:
        return bool(evaluations) and evaluations[-1]["AP50"] > OVERFIT_AP50
    if patience and run.history.without_improvement() >= patience:
        run.accelerator.print(f"No better {run.args.metric} in {patience} evaluations: training ends here.")
        return True
    return False


# -- measuring and keeping --------------------------------------------------------------------------------------------


def evaluate_and_keep(run: Run, line: dict[str, float]) -> dict[str, float]:
    """AP, AP50 and the metric; the best checkpoint so far is saved."""
    accelerator, args = run.accelerator, run.args
    with accelerator.autocast():
        evaluator = run.evaluate(run.predictor)
    metrics = evaluator.compute()
    found = {name: metrics[name] for name in dict.fromkeys(("AP", "AP50", args.metric))}
    if run.history.note_evaluation(line | found, args.metric):
        about = {"epoch": line["epoch"], "dataset": dataset_name(run.folder), "num_images": len(run.val_set)}
        keep(run, run.output_dir, metrics | about | {"split": "train" if args.overfit else "val"})
    if accelerator.is_main_process and accelerator.trackers:
        picture = compare_with_truth(run.val_set, evaluator.detections())
        log_picture(accelerator, "validation", picture, run.history.step)
    return found


def keep(run: Run, target: Path, metrics: dict[str, Any]) -> None:
    """Save the model that predicts with its processor and numbers, each file as a whole."""
    if not run.accelerator.is_main_process:
        return
    partial = run.output_dir / ".weights.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model = merged(run.predictor) if run.args.lora_rank else run.predictor
        model.save_pretrained(partial)
        run.processor.save_pretrained(partial)
        metrics["weights"] = hash_of_weights(partial)  # the numbers belong to these and no others
        (partial / "metrics.json").write_text(json.dumps(metrics, indent=2))
        replace_files(partial, target)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise SystemExit(
            f"The weights cannot be saved in {target}: {error}. Make room; the same command goes on from the last "
            "checkpoint."
        ) from error


def conclude(run: Run) -> None:
    """The numbers that count: of the weights as they are saved, in float32, as evaluate.py and the pipeline run them.
    The best checkpoint is pushed if that was asked for."""
    accelerator, args, output_dir = run.accelerator, run.args, run.output_dir
    best = DetrForDetection.from_pretrained(output_dir).to(accelerator.device)
    metrics = json.loads((output_dir / "metrics.json").read_text())  # before the evaluation, where processes meet again
    evaluator = run.evaluate(best)
    metrics |= evaluator.compute()
    if accelerator.is_main_process:
        with replacing(output_dir / "metrics.json") as file:
            json.dump(metrics, file, indent=2)
        compare_with_truth(run.val_set, evaluator.detections()).save(output_dir / "validation.png")
    accelerator.print(
        f"\nBest checkpoint, epoch {metrics['epoch']}\n{format_metrics(metrics)}\n\nSaved in {output_dir}"
    )
    if run.history.skipped:
        accelerator.print(
            f"{run.history.skipped} steps were left out; their batches are in {output_dir / 'non_finite'}"
        )
    if args.push_to_hub and accelerator.is_main_process:
        address = push_folder(output_dir, args.push_to_hub, private=args.hub_private or None)
        accelerator.print(f"Pushed: {address}")
    last = run.history.evaluations[-1]
    keep(run, output_dir / "last", {name: last[name] for name in ("epoch", "AP", "AP50", args.metric)})


def conclude_overfit(run: Run, data: DataSummary) -> bool:
    """Say whether the images were learned by heart, and if not, why."""
    evaluations, stride = run.history.evaluations, run.predictor.model.backbone.stride
    learned = evaluations[-1]["AP50"] > OVERFIT_AP50
    text = f"AP50 {evaluations[-1]['AP50']:.2f} on {data.num_images} images after {run.history.step} steps"
    if run.accelerator.is_main_process:
        reason = explain_overfit(
            evaluations,
            object_pixels=data.object_side * seen_size(run.processor)[0],
            stride=stride,
            most_objects=data.most_objects,
            num_queries=run.predictor.config.num_queries,
        )
        sound = "labels, model and learning rate work together."
        print(f"Overfit: yes, {text}: {sound}" if learned else f"Overfit: NO, {text}. {reason}", flush=True)
    return learned


def report(run: Run, line: dict) -> None:
    """One tidy line an epoch on the console (to overfit: an evaluation), and in the log; and a hint, if it is stuck."""
    with (run.output_dir / "log.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")
    if run.args.overfit and "AP" not in line:
        return
    text = (
        f"epoch {line['epoch']:3}/{run.args.epochs}  {line['seconds']:6.1f} s  loss {line.get('loss', math.nan):7.4f}"
    )
    text += "".join(
        f"  {name.removeprefix('loss_')} {line[name]:.3f}"
        for name in ("loss_ce", "loss_bbox", "loss_giou")
        if name in line
    )
    if "AP" in line:
        text += f"  AP {line['AP']:.4f}  AP50 {line['AP50']:.4f}  IoU {line['matched_iou']:.2f}"
        text += f"  other query {line['changed_matches']:.0%}" if "changed_matches" in line else ""
        stride, query_type = run.predictor.model.backbone.stride, run.predictor.config.query_type
        advice = None if run.args.overfit else hint(run.history.evaluations, query_type=query_type, stride=stride)
        text += f"\nStuck? {advice}" if advice else ""
    tqdm.write(text)


if __name__ == "__main__":
    try:
        main()
    except NonFiniteError as error:
        raise SystemExit(f"Stopped: {error}") from error
