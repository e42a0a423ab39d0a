"""State of one training run: its folder, progress, checkpoints, evaluations and log."""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm

from ..data.streaming import SHUFFLE_BUFFER
from ..evaluation import ModelEvaluation, format_evaluation
from ..hub import prepare_repo, push_folder
from ..interop import load_model
from ..model.image_processing_hf_detr import DetrImageProcessor
from ..model.modeling_hf_detr import DetrForDetection
from ..model.processor_size import size_range
from ..runtime import StopRequest, atomic_write, more_about
from ..visualization import compare_masks_with_ground_truth, compare_with_ground_truth
from .arguments import FinetuneArguments
from .batch_size import fit_batch_size
from .checkpoints import Progress, any_process, load_checkpoint, save_checkpoint, trim_log, use_plain_weights
from .meter import EpochMeter, describe_duration, describe_epoch, log_image
from .model_saving import save_model
from .optimization import move_schedule, rescale_ema, stretch_schedule
from .run_data import check_data
from .run_folder import FOUND_IN_TIME, acquire_run_dir, begin, write_arguments
from .run_recipe import RunRecipe
from .setup import describe_run
from .sharding import gather_weights
from .step import Batch, TrainStep, in_groups, share_buffers
from .timing import PLANNED_AGAIN, RunClock, expected_seconds, fit_epochs, measure_pace, seconds_of_epoch
from .training_advice import describe_overfit, has_memorized, training_advice
from .training_probe import FIGURES, TrainingProbe


class TrainingRun:
    """Everything around the optimizer steps. It creates the folder of the run and the repository on the Hub, so the
    arguments have to be checked before. All methods are called on all processes together.

    Attributes:
        path: folder of the run, with the best model, `last/`, `checkpoint-.../`, `log.jsonl`, `args.json`, ...
        progress: what was done so far; restored from a checkpoint by `start`.
        stop: whether this process was asked to stop.
    """

    def __init__(
        self, args: FinetuneArguments, recipe: RunRecipe, accelerator: Accelerator, processor: DetrImageProcessor
    ) -> None:
        self.args, self.recipe, self.accelerator, self.processor = args, recipe, accelerator, processor
        self.repo_id: str | None = None
        if args.run.push_to_hub and accelerator.is_main_process:  # fails now rather than after training
            self.repo_id = prepare_repo(args.run.push_to_hub, private=args.run.hub_private or None)
        name = (Path(args.data.location).name.removesuffix("-quick") if args.data.is_drawn else args.data.name) + (
            "-overfit" if args.data.overfit else ""
        )
        settings = recipe.settings(args)
        if args.run.minutes is not None and not args.saved:
            settings |= dict.fromkeys(FOUND_IN_TIME)  # by `plan_time`
        self.folder = acquire_run_dir(args.run.output_dir, name, settings, accelerator, resume=args.run.resume)
        self.path = self.folder.path
        if self.folder.checkpoint is not None:
            self._keep_normalization(self.folder.checkpoint / "preprocessor_config.json")
        self.progress = Progress()
        self.stop = StopRequest()
        self.meter = EpochMeter(accelerator)  # of the current epoch
        self.recent = EpochMeter(accelerator)  # since the last line to the trackers
        self.last_save = time.monotonic()

    def _keep_normalization(self, file: Path) -> None:
        """Let a run that continues see its images with the mean and standard deviation that it began with."""
        if not file.is_file():  # of a sharded run
            return
        stored, processor = json.loads(file.read_text()), self.processor
        mean, std = stored["image_mean"], stored["image_std"]
        if (list(processor.image_mean), list(processor.image_std)) != (mean, std):
            processor.image_mean, processor.image_std = mean, std
            self.accelerator.print(f"Images are normalised as when the run began: mean {mean}, deviation {std}.")

    def fit_batch_size(self, model: DetrForDetection, train_set: Any) -> tuple[int, int]:
        """See [`~hf_detr.training.batch_size.fit_batch_size`]; a run that continues keeps what it has found before."""
        found = self.folder.arguments.get("found")
        if not found:
            found = list(fit_batch_size(self.recipe, model, train_set, self.processor, self.accelerator))
            self._remember({"found": found})
        self.accelerator.print(
            f"Batches of {self.recipe.batch_size} asked for; {found[0]} fit, {found[1]} an optimizer step."
        )
        return found[0], found[1]

    def plan_time(
        self, recipe: RunRecipe, model: DetrForDetection, train_loader: Any, val_loader: Any, val_set: Any
    ) -> RunRecipe:
        """Say how long the run will take. With `--minutes`, the recipe with as many epochs as fit; a run that continues
        keeps those that it began with.

        Args:
            recipe: with the batch size that is used.
        """
        accelerator, minutes = self.accelerator, self.args.run.minutes
        pace = measure_pace(recipe, model, train_loader, val_loader, val_set, self.processor, accelerator)
        counts = len(train_loader.dataset), len(val_set), accelerator.num_processes
        of_epoch = seconds_of_epoch(recipe, pace, *counts)
        if minutes is not None and not self.args.saved:
            found = {name: self.folder.arguments[name] for name in FOUND_IN_TIME}
            if None in found.values():
                fitting = fit_epochs(60 * minutes, *of_epoch, eval_every=self.args.recipe.eval_every)
                found = dict(zip(FOUND_IN_TIME, fitting, strict=True))
                self._remember(found)
            recipe = replace(recipe, **found)
        seconds = expected_seconds(recipe.epochs, recipe.eval_every, *of_epoch)
        text = (
            f"Expected: about {describe_duration(seconds)} here for {recipe.epochs} epochs, {pace.step:.2g} s a step, "
            f"with an evaluation after every {recipe.eval_every}."
        )
        self.evaluation_seconds = of_epoch[1]
        if minutes is not None and seconds > 60 * minutes:
            text += f" That is more than --minutes {minutes:g}: fewer images or a smaller model take less. "
            text += more_about("training-or-prediction-is-slow")
        accelerator.print(text)
        return recipe

    def _remember(self, found: Mapping[str, Any]) -> None:
        """Add what the run has found to its arguments; with a checkpoint, `begin` writes them."""
        self.folder = self.folder._replace(arguments=self.folder.arguments | dict(found))
        if self.folder.checkpoint is None:
            write_arguments(self.path, self.folder.arguments, self.accelerator)

    def describe(self, model: DetrForDetection, train_set: Any, val_set: Any, train_loader: Any) -> str:
        """What is trained on what and where, to print."""
        about = describe_run(
            self.args, self.recipe, model, self.processor, train_set, val_set, train_loader, self.accelerator
        )
        return f"{about}Output: {self.path}"

    def start(
        self,
        recipe: RunRecipe,
        model: nn.Module,
        plain: DetrForDetection,
        predictor: DetrForDetection,
        ema: AveragedModel | None,
        scheduler: Any,
        probe: TrainingProbe,
        data: dict[str, Any],
        steps_per_epoch: int,
    ) -> None:
        """Restore the newest checkpoint, if this run continues, and start the trackers. What is given now counts from
        here on; what the run stands for, its classes and the fraction of it that is done, remains.

        Args:
            recipe: with the batch size that is used.
            model: as `accelerator.prepare` returned it; `plain` is not wrapped.
            predictor: the model that is evaluated and saved: `plain`, its average or its unsharded copy.
            data: see [`~hf_detr.training.run_data.identify`].
            steps_per_epoch: optimizer steps.

        Raises:
            ValueError: the checkpoint cannot be read, is from the middle of an epoch with other batches or images, has
                other classes, or no epoch is left to do. The folder is as before then.
        """
        self.recipe, self.model, self.predictor, self.scheduler, self.probe = recipe, model, predictor, scheduler, probe
        accelerator, progress = self.accelerator, self.progress
        accelerator.register_for_checkpointing(progress, probe, *([ema] if ema else []))
        if not accelerator.is_fsdp2:
            use_plain_weights(accelerator, plain, (plain.config, self.processor))
        spread = {
            "processes": accelerator.num_processes,
            "batch_size": recipe.batch_size,
            "seed": self.args.run.seed,
            "gradient_accumulation_steps": recipe.gradient_accumulation_steps,
            "shuffle_buffer": (self.args.data.shuffle_buffer or SHUFFLE_BUFFER) if self.args.data.streaming else 0,
        }
        step_images = spread["processes"] * spread["batch_size"] * spread["gradient_accumulation_steps"]
        if self.folder.checkpoint:
            weight_decays = [group["weight_decay"] for group in scheduler.optimizer.param_groups]
            load_checkpoint(accelerator, self.folder.checkpoint, progress, spread)
            done, epochs = progress.epoch, recipe.epochs
            if epochs < done or (epochs == done and epochs != progress.planned_epochs):
                raise ValueError(f"{self.path} has done {done} epochs. To go on, --epochs must be more than that.")
            if self.folder.changes:
                accelerator.print(f"Different from the last start: {', '.join(self.folder.changes)}")
            for sentence in check_data(progress, data, self.path):
                accelerator.print(sentence)
            for group, weight_decay in zip(scheduler.optimizer.param_groups, weight_decays, strict=True):
                group["weight_decay"] = weight_decay
            self._place_schedule(steps_per_epoch)
            if ema is not None:
                rescale_ema(ema, first=progress.first_step_images, before=progress.step_images, now=step_images)
            if progress.best is not None:
                accelerator.print(f"Best {self.recipe.metric} so far {progress.best:.4f}")
            begin(self.folder, accelerator)
        within = 1.0 if progress.trained else progress.batches / (steps_per_epoch * recipe.gradient_accumulation_steps)
        self.clock = RunClock(self.evaluation_seconds)
        self.began_with = progress.epoch + within  # in epochs
        self.steps_per_epoch = steps_per_epoch
        # a run that continues keeps its plan: checkpoints do not have the time that is over
        self.is_planned = self.args.run.minutes is None or self.folder.checkpoint is not None
        progress.spread, progress.data = spread, data
        progress.step_images, progress.planned_epochs = step_images, recipe.epochs
        progress.first_step_images = progress.first_step_images or step_images
        if accelerator.is_main_process:  # without a checkpoint, lines of a run that was killed before its first one
            trim_log(self.path / "log.jsonl", progress.epoch)
        settings = {k: v for k, v in self.recipe.settings(self.args).items() if isinstance(v, (int, float, str))}
        accelerator.project_configuration.logging_dir = str(self.path)
        accelerator.init_trackers("hf_detr", config=settings)

    def _place_schedule(self, steps_per_epoch: int) -> None:
        """Put the schedule where the run is: at the same fraction of it, also if an epoch has another number of steps
        now. If a run is extended after its rate has fallen, the rate rises to the schedule as in a warm-up."""
        progress, scheduler, accumulated = self.progress, self.scheduler, self.recipe.gradient_accumulation_steps
        within = steps_per_epoch if progress.trained else math.ceil(progress.batches / accumulated)
        step = progress.epoch * steps_per_epoch + within
        move_schedule(scheduler, step)
        factor, extended = self._rate(), progress.planned_epochs != self.recipe.epochs
        if extended and factor > progress.rate * 1.01:
            wanted = self.recipe.warmup * (self.recipe.epochs - progress.epoch)
            progress.rise = (progress.epoch + within / steps_per_epoch, progress.rate, max(wanted, 1 / steps_per_epoch))
            rate, epochs = scheduler.get_last_lr()[0], progress.rise[2]
            self.accelerator.print(
                f"The learning rate rises from {rate / factor * progress.rate:.2g} to {rate:.2g} within {epochs:.2g} "
                f"epochs, then follows the schedule to the end of epoch {self.recipe.epochs}."
            )
        if progress.rise:
            epoch, start, epochs = progress.rise
            first, length = round(epoch * steps_per_epoch), round(epochs * steps_per_epoch)
            if step < first + length:
                move_schedule(scheduler, first, rises_from=start, rise=length)
                move_schedule(scheduler, step)

    def _rate(self) -> float:
        """The learning rate as a fraction of its maximum."""
        base = self.scheduler.base_lrs[0]
        return float(self.scheduler.get_last_lr()[0] / base) if base else 0.0

    def is_done(self) -> bool:
        """All epochs are trained, or it ends early."""
        return self.progress.epoch >= self.recipe.epochs or self._ends_early()

    # -- an epoch -----------------------------------------------------------------------------------------------------

    def steps(self, loader: Any) -> Iterator[list[Batch]]:
        """Batches of what remains of the current epoch, one list per optimizer step, with a progress bar."""
        progress, count = self.progress, self.recipe.gradient_accumulation_steps
        loader.set_epoch(progress.epoch + 1)
        self.batches_per_epoch = len(loader)
        loader.batch_sampler.skip(progress.batches)
        self.meter.clear()
        self.recent.clear()
        if progress.meter:
            self.meter.load_state_dict(progress.meter)
        self.last_save = time.monotonic()
        if progress.trained:  # by a run that was stopped in the evaluation
            return
        yield from tqdm(
            in_groups(loader, count),
            total=math.ceil(len(loader) / count),
            desc=f"Epoch {progress.epoch + 1}",
            disable=not self.accelerator.is_main_process,
            leave=False,
        )

    def record_step(self, batches: Sequence[Batch], terms: dict[str, Tensor] | None, step: TrainStep) -> None:
        """Count an optimizer step, add up its loss terms (None if it was skipped), and write to the trackers."""
        progress, accelerator, run = self.progress, self.accelerator, self.args.run
        progress.step += 1
        progress.batches += len(batches)
        progress.trained = progress.batches >= self.batches_per_epoch
        progress.skipped = step.skipped
        while step.reports:
            tqdm.write(step.reports.pop())
        if terms is not None:
            terms["images"] = torch.tensor(sum(len(b["labels"]) for b in batches), device=accelerator.device)
            self.meter.add(terms)
            self.recent.add(terms)
        if run.report_to and progress.step % run.logging_steps == 0:
            figures = self.recent.figures(self.scheduler)
            accelerator.log({f"train/{name}": value for name, value in figures.items()}, step=progress.step)
            self.recent.clear()

    def checkpoint_due(self) -> bool:
        """Within an epoch: the last checkpoint is old, or some process was asked to stop."""
        due = not self.args.data.overfit and time.monotonic() - self.last_save > 60 * self.args.run.save_minutes
        return any_process(due or self.stop.requested, self.accelerator)

    def save_checkpoint(self) -> None:
        """Save a checkpoint to resume from; none with `--overfit`, which takes minutes only."""
        if self.args.data.overfit:
            return
        self.progress.rate = self._rate()
        if self.progress.batches:
            self.progress.meter = self.meter.state_dict()
        save_checkpoint(self.accelerator, self.path, self.progress, keep=self.args.run.save_total_limit)
        self.last_save = time.monotonic()

    def should_stop(self) -> bool:
        """Whether some process was asked to stop; called after a checkpoint was saved."""
        if not any_process(self.stop.requested, self.accelerator):
            return False
        resume = "" if self.args.data.overfit else f" and saved. Continue with --output_dir {self.path} --resume"
        self.accelerator.print(f"Stopped after step {self.progress.step}{resume}")
        self.accelerator.end_training()
        return True

    def evaluation_due(self) -> bool:
        """Whether the model is evaluated at the end of this epoch."""
        epoch = self.progress.epoch + 1
        return epoch % self.recipe.eval_every == 0 or epoch == self.recipe.epochs

    def epoch_figures(self) -> dict[str, float]:
        """The line of the epoch for the log: means of the loss terms, learning rates, images per second."""
        line = {"epoch": self.progress.epoch + 1, "step": self.progress.step, "seconds": round(self.meter.seconds, 1)}
        return line | self.meter.figures(self.scheduler)

    def end_epoch(self, line: dict[str, float]) -> None:
        """Write the line to the log, the trackers and the console, plan the time once more, and save a checkpoint."""
        self.progress.end_epoch()
        self.accelerator.log(line, step=self.progress.step)
        progress, metric = self.progress, self.recipe.metric
        progress.columns = list(dict.fromkeys([*progress.columns, *line, *FIGURES, *self.reported()]))
        if self.accelerator.is_main_process:
            with (self.path / "log.jsonl").open("a") as log:  # null: not measured in this epoch
                log.write(json.dumps({name: line.get(name) for name in progress.columns}) + "\n")
            if "AP" in line or not self.args.data.overfit:
                best = "" if progress.best is None else f"{metric} {progress.best:.4f} (epoch {progress.best_epoch})"
                done = progress.epoch - self.began_with  # nothing, after an epoch of which only the evaluation was left
                passed = time.monotonic() - self.clock.began
                left = passed / done * (self.recipe.epochs - progress.epoch) if done else None
                tqdm.write(describe_epoch(line, self.recipe.epochs, left=left, best=best))
            if "AP" in line and not self.args.data.overfit:
                stride, query_type = self.predictor.model.backbone.strides[-1], self.predictor.config.query_type
                advice = training_advice(self.progress.evaluations, query_type=query_type, stride=stride)
                if advice:
                    tqdm.write(f"Stuck? {advice}")
        self.clock.end_epoch()
        if not self.is_planned:
            self._plan_again()
        self.save_checkpoint()

    def _plan_again(self) -> None:
        """With `--minutes`, when two epochs and a tenth of the time are over, or all epochs: as many epochs as fit into
        the rest by what epochs have taken. The machine may be more or less busy than when the run was planned."""
        assert self.args.run.minutes is not None
        whole, recipe, progress = 60 * self.args.run.minutes, self.recipe, self.progress
        done, is_over = progress.epoch, progress.epoch == recipe.epochs
        passed, epoch, evaluation = self.clock.measured(self.accelerator)
        if not is_over and (done < 2 or passed < PLANNED_AGAIN * whole):
            return
        self.is_planned = True
        epochs, eval_every = fit_epochs(
            whole - passed - evaluation,  # the best model is evaluated at the end
            epoch,
            evaluation,
            eval_every=self.args.recipe.eval_every,
            done=done,
            at_least=done if is_over else done + 1,
        )
        if epochs == recipe.epochs:
            return
        self.accelerator.print(
            f"New plan: {epochs} epochs instead of {recipe.epochs}, at {epoch / self.steps_per_epoch:.2g} s a step."
        )
        progress.rate = self._rate()
        self.recipe = replace(recipe, epochs=epochs, eval_every=eval_every)
        self._remember({name: getattr(self.recipe, name) for name in FOUND_IN_TIME})
        total_steps = epochs * self.steps_per_epoch
        stretch_schedule(
            self.scheduler, recipe.schedule, warmup=recipe.warmup, decay=recipe.decay, total_steps=total_steps
        )
        self._place_schedule(self.steps_per_epoch)
        progress.planned_epochs = epochs

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def measure_probe(self, *, evaluated: bool) -> dict[str, float]:
        """Give the predictor the current weights and buffers, and measure some training images with it (on the main
        process; empty on others). With `--overfit` only in epochs that are evaluated."""
        if self.accelerator.is_fsdp2:
            gather_weights(self.model, self.predictor)
        share_buffers(self.predictor, self.accelerator)
        if not self.accelerator.is_main_process or not (evaluated or not self.args.data.overfit):
            return {}
        with self.accelerator.autocast():
            return self.probe.measure(self.predictor)

    def evaluate(self, val_loader: Any, val_set: Any, line: dict[str, float]) -> dict[str, float]:
        """The numbers of the predictor, see `reported`. The model is saved if it is the best so far.

        Args:
            line: figures of the epoch, see `epoch_figures`.
        """
        with self.clock.evaluation():
            return self._evaluate_and_save(val_loader, val_set, line)

    def _evaluate_and_save(self, val_loader: Any, val_set: Any, line: dict[str, float]) -> dict[str, float]:
        accelerator, metric = self.accelerator, self.recipe.metric
        with accelerator.autocast():
            evaluation = self._evaluate(self.predictor, val_loader, val_set)
        metrics = evaluation.compute(self.args.run.max_detections)
        result = {name: metrics[name] for name in self.reported()}
        if self.progress.add_evaluation(line | result, metric):
            split = "train" if self.args.data.overfit else "val"
            about = {"epoch": line["epoch"], "dataset": self.args.data.name, "num_images": len(val_set), "split": split}
            self._save_model(self.path, metrics | about)
        if accelerator.is_main_process and accelerator.trackers:
            image = self._picture(val_set, evaluation)
            log_image(accelerator, "validation", image, self.progress.step)
        return result

    def reported(self) -> list[str]:
        """The numbers in the log: AP and AP50, with masks also those of masks and the panoptic quality, if there is
        stuff; and the metric that selects the best checkpoint."""
        names = ["AP", "AP50"]
        if self.args.data.masks:
            names += ["mask_AP", "mask_AP50"]
            names += ["PQ", "PQ_things", "PQ_stuff"] if self.predictor.config.stuff_labels else []
        return list(dict.fromkeys([*names, self.recipe.metric]))

    def _evaluate(self, model: DetrForDetection, val_loader: Any, val_set: Any) -> ModelEvaluation:
        evaluation = ModelEvaluation(
            val_set, with_masks=self.args.data.masks, max_detections=self.args.run.max_detections
        )
        return evaluation.run(model, val_loader, self.processor, progress=self.accelerator.is_main_process)

    def _picture(self, val_set: Any, evaluation: ModelEvaluation) -> Image.Image:
        if evaluation.segments is not None:  # their threshold is that of the post-processing
            return compare_masks_with_ground_truth(val_set, evaluation.segments.detections(), threshold=0.0)
        if evaluation.masks is not None:
            return compare_masks_with_ground_truth(val_set, evaluation.masks.detections())
        return compare_with_ground_truth(val_set, evaluation.boxes.detections())

    def _ends_early(self) -> bool:
        """The images of `--overfit` are memorized, or there was no improvement for `--early_stopping` evaluations."""
        patience = self.args.run.early_stopping
        if self.args.data.overfit:
            return self.memorized()
        if patience and self.progress.evaluations_since_best() >= patience:
            self.accelerator.print(f"No better {self.recipe.metric} in {patience} evaluations: training ends here.")
            return True
        return False

    def memorized(self) -> bool:
        return has_memorized(self.progress.evaluations)

    # -- results ------------------------------------------------------------------------------------------------------

    def _save_model(self, target: Path, metrics: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            save_model(self.predictor, self.processor, metrics, target, self.path / ".weights.partial")

    def finish(self, val_loader: Any, val_set: Any) -> None:
        """Evaluate the best model as it is saved, in float32, which is how evaluate.py and the pipeline run it; push it
        if requested; save the last model."""
        accelerator, path = self.accelerator, self.path
        self.stop.end()
        accelerator.wait_for_everyone()
        best = load_model(path).to(accelerator.device)
        metrics = json.loads((path / "metrics.json").read_text())  # before it is replaced
        evaluation = self._evaluate(best, val_loader, val_set)
        metrics |= evaluation.compute(self.args.run.max_detections) | {"num_images": len(val_set)}
        if accelerator.is_main_process:
            with atomic_write(path / "metrics.json") as file:
                json.dump(metrics, file, indent=2)
            self._picture(val_set, evaluation).save(path / "validation.png")
        accelerator.print(
            f"\nBest checkpoint, epoch {metrics['epoch']}\n{format_evaluation(metrics)}\n\nSaved in {path}"
        )
        if self.progress.skipped:
            accelerator.print(f"{self.progress.skipped} steps were skipped; their batches are in {path / 'non_finite'}")
        if self.repo_id:
            address = push_folder(path, self.repo_id, private=self.args.run.hub_private or None)
            accelerator.print(f"Pushed: {address}")
        last = self.progress.evaluations[-1]
        self._save_model(path / "last", {name: last[name] for name in ("epoch", *self.reported())})
        if self.args.data.overfit and accelerator.is_main_process:
            data, config = self.recipe.data, self.predictor.config
            result = describe_overfit(
                self.progress.evaluations,
                num_images=data.num_images,
                steps=self.progress.step,
                object_pixels=data.object_side * size_range(self.processor.size)[0],
                stride=self.predictor.model.backbone.strides[-1],
                max_objects=data.max_objects,
                num_queries=config.num_predictions,
            )
            print(result, flush=True)
        accelerator.wait_for_everyone()  # a launcher ends all processes soon after one has failed
        accelerator.end_training()
