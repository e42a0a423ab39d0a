"""State of one training run: its folder, progress, checkpoints, evaluations and log."""

import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm

from ..data.processor_size import size_range
from ..evaluation import CocoEvaluator, evaluate_detection, format_metrics
from ..hub import hash_of_weights, prepare_repo, push_folder
from ..model.image_processing_hf_detr import DetrImageProcessor
from ..model.modeling_hf_detr import DetrForDetection
from ..runtime import StopRequest, replacing
from ..visualization import compare_with_truth
from .arguments import FinetuneArguments
from .batch_size import fit_batch_size
from .checkpoints import Progress, any_process, replace_files, save_checkpoint, trim_log, use_plain_weights
from .lora import merge_lora
from .meter import Meter, log_image
from .run_folder import acquire_run_dir, write_arguments
from .run_recipe import RunRecipe
from .sharding import gather_weights
from .step import Batch, TrainStep, in_groups, share_buffers
from .training_advice import explain_overfit, training_advice
from .training_probe import TrainingProbe

MEMORIZED_AP50 = 0.9  # from which a model has memorized the images of --overfit


class TrainingRun:
    """Everything around the optimizer steps. Created when nothing is wrong with the arguments any more, since it creates
    the folder of the run and the repository on the Hub. All methods are called on all processes together.

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
        name = (args.data.name if args.data.dataset else "shapes") + ("-overfit" if args.data.overfit else "")
        self.folder = acquire_run_dir(
            args.run.output_dir, name, recipe.settings(args), accelerator, resume=args.run.resume
        )
        self.path = self.folder.path
        self.progress = Progress()
        self.stop = StopRequest()
        self.meter, self.recent = Meter(accelerator), Meter(accelerator)  # of the epoch; since the last tracker line
        self.epoch_start = self.recent_start = self.last_save = 0.0

    def fit_batch_size(self, model: DetrForDetection, train_set: Any) -> tuple[int, int]:
        """See [`~hf_detr.training.batch_size.fit_batch_size`]; a run that continues keeps what it has found before."""
        found = self.folder.arguments.get("found")
        if not found:
            found = list(fit_batch_size(self.recipe, model, train_set, self.processor, self.accelerator))
            write_arguments(self.path, self.folder.arguments | {"found": found}, self.accelerator)
        self.accelerator.print(
            f"Batches of {self.recipe.batch_size} asked for; {found[0]} fit, {found[1]} an optimizer step."
        )
        return found[0], found[1]

    def start(
        self,
        recipe: RunRecipe,
        model: nn.Module,
        plain: DetrForDetection,
        predictor: DetrForDetection,
        ema: AveragedModel | None,
        scheduler: Any,
        probe: TrainingProbe,
    ) -> None:
        """Restore the newest checkpoint, if this run continues, and start the trackers.

        Args:
            recipe: with the batch size that is used.
            model: as `accelerator.prepare` returned it; `plain` is not wrapped.
            predictor: the model that is evaluated and saved: `plain`, its average or its unsharded copy.

        Raises:
            ValueError: the checkpoint is from the middle of an epoch with other batches.
        """
        self.recipe, self.model, self.predictor, self.scheduler, self.probe = recipe, model, predictor, scheduler, probe
        accelerator, progress = self.accelerator, self.progress
        accelerator.register_for_checkpointing(scheduler, progress, probe, *([ema] if ema else []))
        if not accelerator.is_fsdp2:
            use_plain_weights(accelerator, plain, (plain.config, self.processor))
        spread = {
            "processes": accelerator.num_processes,
            "batch_size": recipe.batch_size,
            "seed": self.args.run.seed,
            "gradient_accumulation_steps": recipe.gradient_accumulation_steps,
        }
        if self.folder.checkpoint:
            self._restore(self.folder.checkpoint, spread)
        progress.spread = spread
        if accelerator.is_main_process:  # without a checkpoint, lines of a run that was killed before its first one
            trim_log(self.path / "log.jsonl", progress.epoch)
        settings = {k: v for k, v in self.recipe.settings(self.args).items() if isinstance(v, (int, float, str))}
        accelerator.project_configuration.logging_dir = str(self.path)
        accelerator.init_trackers("hf_detr", config=settings)

    def _restore(self, checkpoint: Path, spread: dict[str, int]) -> None:
        self.accelerator.load_state(str(checkpoint))
        progress = self.progress
        different = ", ".join(f"{k} {v}, now {spread[k]}" for k, v in progress.spread.items() if v != spread[k])
        if different and progress.batches:
            raise ValueError(
                f"{checkpoint} was saved in the middle of an epoch, whose remaining batches depend on: {different}"
            )
        if different:
            self.accelerator.print(f"Different from the beginning of the run: {different}")
        where = f" and {progress.batches} batches" if progress.batches else ""
        self.accelerator.print(
            f"Resumed after epoch {progress.epoch}{where}; best {self.args.run.metric} so far {progress.best:.4f}"
        )

    # -- an epoch -----------------------------------------------------------------------------------------------------

    def steps(self, loader: Any) -> Iterator[list[Batch]]:
        """Batches of what remains of the current epoch, one list per optimizer step, with a progress bar."""
        progress, count = self.progress, self.recipe.gradient_accumulation_steps
        loader.set_epoch(progress.epoch + 1)
        loader.batch_sampler.skip(progress.batches)
        self.meter.clear()
        self.recent.clear()
        if progress.meter:
            self.meter.load_state_dict(progress.meter)
        self.recent_start, self.last_save = time.perf_counter(), time.monotonic()
        self.epoch_start = self.recent_start - progress.seconds
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
        progress.skipped = step.skipped
        while step.reports:
            tqdm.write(step.reports.pop())
        if terms is not None:
            terms["images"] = torch.tensor(sum(len(b["labels"]) for b in batches), device=accelerator.device)
            self.meter.add(terms)
            self.recent.add(terms)
        if run.report_to and progress.step % run.logging_steps == 0:
            seconds, self.recent_start = time.perf_counter() - self.recent_start, time.perf_counter()
            figures = self._figures(self.recent, seconds)
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
        if self.progress.batches:
            self.progress.meter = self.meter.state_dict()
            self.progress.seconds = time.perf_counter() - self.epoch_start
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

    def epoch_figures(self) -> dict[str, float]:
        """The line of the epoch for the log: means of the loss terms, learning rates, images per second."""
        seconds = time.perf_counter() - self.epoch_start
        line = {"epoch": self.progress.epoch + 1, "step": self.progress.step, "seconds": round(seconds, 1)}
        return line | self._figures(self.meter, seconds)

    def _figures(self, meter: Meter, seconds: float) -> dict[str, float]:
        means = meter.means()
        images = means.pop("images", 0.0) * meter.steps * self.accelerator.num_processes
        rates = self.scheduler.get_last_lr()
        line = {"learning_rate": rates[0]} | ({"backbone_learning_rate": rates[-1]} if rates[-1] != rates[0] else {})
        return line | {"images_per_second": round(images / seconds, 1)} | {n: round(v, 4) for n, v in means.items()}

    def end_epoch(self, line: dict[str, float]) -> None:
        """Write the line to the log, the trackers and the console, and save a checkpoint."""
        self.progress.end_epoch()
        self.accelerator.log(line, step=self.progress.step)
        if self.accelerator.is_main_process:
            with (self.path / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            if "AP" in line or not self.args.data.overfit:
                tqdm.write(self._describe(line))
        self.save_checkpoint()

    def _describe(self, line: dict[str, float]) -> str:
        epochs, loss = self.recipe.epochs, line.get("loss", math.nan)
        text = f"epoch {line['epoch']:3}/{epochs}  {line['seconds']:6.1f} s  loss {loss:7.4f}"
        terms = (name for name in ("loss_ce", "loss_bbox", "loss_giou") if name in line)
        text += "".join(f"  {name.removeprefix('loss_')} {line[name]:.3f}" for name in terms)
        if "AP" not in line:
            return text
        text += f"  AP {line['AP']:.4f}  AP50 {line['AP50']:.4f}  IoU {line['matched_iou']:.2f}"
        text += f"  changed matches {line['changed_matches']:.0%}" if "changed_matches" in line else ""
        stride, query_type = self.predictor.model.backbone.stride, self.predictor.config.query_type
        advice = training_advice(self.progress.evaluations, query_type=query_type, stride=stride)
        return f"{text}\nStuck? {advice}" if advice and not self.args.data.overfit else text

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
        """AP, AP50 and the metric of the predictor. The model is saved if it is the best so far.

        Args:
            line: figures of the epoch, see `epoch_figures`.
        """
        accelerator, metric = self.accelerator, self.args.run.metric
        with accelerator.autocast():
            evaluator = self._evaluator(self.predictor, val_loader, val_set)
        metrics = evaluator.compute()
        result = {name: metrics[name] for name in dict.fromkeys(("AP", "AP50", metric))}
        if self.progress.add_evaluation(line | result, metric):
            split = "train" if self.args.data.overfit else "val"
            about = {"epoch": line["epoch"], "dataset": self.args.data.name, "num_images": len(val_set), "split": split}
            self.save_model(self.path, metrics | about)
        if accelerator.is_main_process and accelerator.trackers:
            image = compare_with_truth(val_set, evaluator.detections())
            log_image(accelerator, "validation", image, self.progress.step)
        return result

    def _evaluator(self, model: DetrForDetection, val_loader: Any, val_set: Any) -> CocoEvaluator:
        progress = self.accelerator.is_main_process
        return evaluate_detection(model, val_loader, val_set, self.processor, progress=progress)

    def ends_early(self) -> bool:
        """The images of `--overfit` are memorized, or there was no improvement for `--early_stopping` evaluations."""
        patience = self.args.run.early_stopping
        if self.args.data.overfit:
            return self.memorized()
        if patience and self.progress.evaluations_since_best() >= patience:
            self.accelerator.print(f"No better {self.args.run.metric} in {patience} evaluations: training ends here.")
            return True
        return False

    def memorized(self) -> bool:
        evaluations = self.progress.evaluations
        return bool(evaluations) and evaluations[-1]["AP50"] > MEMORIZED_AP50

    # -- results ------------------------------------------------------------------------------------------------------

    def save_model(self, target: Path, metrics: dict[str, Any]) -> None:
        """Save the predictor with its processor and metrics, each file atomically.

        Raises:
            OSError: it cannot be written, for example because the disk is full.
        """
        if not self.accelerator.is_main_process:
            return
        partial = self.path / ".weights.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            model = merge_lora(self.predictor) if self.args.model.lora_rank else self.predictor
            model.save_pretrained(partial)
            self.processor.save_pretrained(partial)
            content = metrics | {"weights": hash_of_weights(partial)}  # the weights that were measured
            (partial / "metrics.json").write_text(json.dumps(content, indent=2))
            replace_files(partial, target)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(
                f"The weights cannot be saved in {target}: {error}. Free some space; the same command continues from "
                "the last checkpoint."
            ) from error

    def finish(self, val_loader: Any, val_set: Any) -> None:
        """Evaluate the best model as it is saved, in float32, which is how evaluate.py and the pipeline run it; push it
        if requested; save the last model."""
        accelerator, path = self.accelerator, self.path
        self.stop.end()
        accelerator.wait_for_everyone()
        best = DetrForDetection.from_pretrained(path).to(accelerator.device)
        metrics = json.loads((path / "metrics.json").read_text())  # before it is replaced
        evaluator = self._evaluator(best, val_loader, val_set)
        metrics |= evaluator.compute()
        if accelerator.is_main_process:
            with replacing(path / "metrics.json") as file:
                json.dump(metrics, file, indent=2)
            compare_with_truth(val_set, evaluator.detections()).save(path / "validation.png")
        accelerator.print(f"\nBest checkpoint, epoch {metrics['epoch']}\n{format_metrics(metrics)}\n\nSaved in {path}")
        if self.progress.skipped:
            accelerator.print(f"{self.progress.skipped} steps were skipped; their batches are in {path / 'non_finite'}")
        if self.repo_id:
            address = push_folder(path, self.repo_id, private=self.args.run.hub_private or None)
            accelerator.print(f"Pushed: {address}")
        last = self.progress.evaluations[-1]
        self.save_model(path / "last", {name: last[name] for name in ("epoch", "AP", "AP50", self.args.run.metric)})
        if self.args.data.overfit and accelerator.is_main_process:
            print(self._describe_overfit(), flush=True)
        accelerator.wait_for_everyone()  # a launcher ends all processes soon after one has failed
        accelerator.end_training()

    def _describe_overfit(self) -> str:
        evaluations, data = self.progress.evaluations, self.recipe.data
        result = f"AP50 {evaluations[-1]['AP50']:.2f} on {data.num_images} images after {self.progress.step} steps"
        if self.memorized():
            return f"Overfit: yes, {result}: labels, model and learning rate work together."
        reason = explain_overfit(
            evaluations,
            object_pixels=data.object_side * size_range(self.processor.size)[0],
            stride=self.predictor.model.backbone.stride,
            max_objects=data.max_objects,
            num_queries=self.predictor.config.num_queries,
        )
        return f"Overfit: NO, {result}. {reason}"
