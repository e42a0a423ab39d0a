"""How long a run takes, from measured steps and evaluations, and how many epochs fit into a given time."""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device

from ..data import StreamedDataset, image_sizes, resized_sizes
from ..evaluation import ModelEvaluation
from ..model.image_processing_hf_detr import DetrImageProcessor
from ..model.modeling_hf_detr import DetrForDetection
from ..speed import prepare_for_training
from .batch_size import typical
from .normalizers import loss_normalizers
from .optimization import parameter_groups
from .run_recipe import RunRecipe

MEASURED = 3  # of each, after one to warm up
MEASURED_SIZES = 8  # of batches that have one size each, and so take different time
EVALUATIONS = 20  # of a run with --minutes, unless --eval_every is given
MAX_EPOCHS = 10_000
PLANNED_AGAIN = 0.1  # fraction of --minutes after which epochs are planned by those that are done


@dataclass(frozen=True)
class Pace:
    """Args:
    step: seconds of an optimizer step with its images.
    evaluation: seconds per evaluated image, in one process.
    """

    step: float
    evaluation: float


def measure_pace(
    recipe: RunRecipe,
    model: DetrForDetection,
    train_loader: Any,
    val_loader: Any,
    val_set: Any,
    processor: DetrImageProcessor,
    accelerator: Accelerator,
) -> Pace:
    """Train a copy of the model for a few steps on typical images, and evaluate a batch. The model and PyTorch's random
    state are unchanged. To be called on all processes together, which get the times of the slowest."""
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        copy = deepcopy(model).to(accelerator.device).train()
        prepare_for_training(copy)
        optimizer = torch.optim.AdamW(parameter_groups(copy, 0.0, 0.0, 0.0), fused=True)
        evaluation = ModelEvaluation(val_set, with_masks=copy.has_masks)

        def train(batch: Any) -> None:
            # of this process only: the others may be slower
            normalizers = loss_normalizers(copy, [batch])
            with accelerator.autocast():
                loss = copy(**batch, normalizers=normalizers).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        def evaluate(batch: Any) -> None:
            with accelerator.autocast():
                evaluation.run(copy, [batch], processor, progress=False)

        augmentation = getattr(train_loader.dataset, "augmentation", None)
        few_sizes, one_size = (getattr(augmentation, name, False) for name in ("few_sizes", "one_size_per_batch"))
        step = _seconds(
            train_loader, recipe.batch_size, train, processor, accelerator, few_sizes=few_sizes, one_size=one_size
        )
        evaluated = _seconds(val_loader, recipe.batch_size, evaluate, processor, accelerator, few_sizes=True)
    slowest = accelerator.gather(torch.tensor([[step, evaluated]], device=accelerator.device)).amax(0)
    step, evaluated = slowest.tolist()
    return Pace(step * recipe.gradient_accumulation_steps, evaluated / recipe.batch_size)


def _seconds(
    loader: Any,
    batch_size: int,
    use: Callable[[Any], None],
    processor: DetrImageProcessor,
    accelerator: Accelerator,
    *,
    few_sizes: bool,
    one_size: bool = False,
) -> float:
    """Seconds per batch of typical images: loading plus use, or the longer of the two if worker processes load.

    Args:
        few_sizes: most batches of the run have sizes that an earlier one had; what PyTorch prepares for a new size is
            not in the seconds then.
        one_size: the images of a batch have one size, so that a single batch is not typical; batches of several epochs
            are measured.
    """

    def finish() -> None:
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize(accelerator.device)

    rows = getattr(loader.dataset, "dataset", None)
    sizes = resized_sizes(image_sizes(loader.dataset), processor.size)
    near = rows.first() if isinstance(rows, StreamedDataset) else range(len(sizes))  # others are searched in shards
    choose = typical([sizes[index] for index in near])
    loading, using = [], []
    for repetition in range(1 + (MEASURED_SIZES if one_size else MEASURED)):
        if one_size:
            loader.dataset.set_epoch(repetition)
        start = time.perf_counter()
        batch = loader.collate_fn([loader.dataset[near[index]] for index in choose(batch_size)])
        loaded = time.perf_counter()
        if few_sizes:
            use(send_to_device(batch, accelerator.device))
            finish()
        started = time.perf_counter()
        use(send_to_device(batch, accelerator.device))
        finish()
        loading.append(loaded - start)
        using.append(time.perf_counter() - started)
    if one_size:
        loader.dataset.set_epoch(0)
    average = statistics.mean if one_size else statistics.median
    load, used = (average(seconds[1:]) for seconds in (loading, using))
    return used + load if loader.num_workers == 0 else max(used, load / loader.num_workers)


def seconds_of_epoch(
    recipe: RunRecipe, pace: Pace, num_train: int, num_val: int, processes: int
) -> tuple[float, float]:
    """Seconds of the steps of an epoch, and of an evaluation."""
    steps = math.ceil(num_train / (recipe.batch_size * recipe.gradient_accumulation_steps * processes))
    return pace.step * steps, pace.evaluation * num_val / processes


def expected_seconds(epochs: int, eval_every: int, epoch: float, evaluation: float, *, done: int = 0) -> float:
    """Seconds from the end of epoch `done` to the end of epoch `epochs`, with an evaluation after every `eval_every`th
    and the last one.

    Args:
        epoch, evaluation: seconds of each, see [`seconds_of_epoch`].
    """
    return epoch * (epochs - done) + evaluation * (math.ceil(epochs / eval_every) - done // eval_every)


def fit_epochs(
    seconds: float, epoch: float, evaluation: float, *, eval_every: int | None, done: int = 0, at_least: int = 1
) -> tuple[int, int]:
    """The largest number of epochs, `at_least` or more, of which those after the first `done` take no longer than
    `seconds`, and the epochs between evaluations; see [`expected_seconds`].

    Args:
        eval_every: epochs between evaluations; None: about twenty evaluations.
    """
    longest: tuple[int, int] | None = None
    for epochs in range(at_least, at_least + MAX_EPOCHS):
        every = eval_every or math.ceil(epochs / EVALUATIONS)
        if longest is None or expected_seconds(epochs, every, epoch, evaluation, done=done) <= seconds:
            longest = epochs, every  # also after one that takes longer: 21 epochs have fewer evaluations than 20
    assert longest is not None
    return longest


class RunClock:
    """What the epochs and evaluations of a run have taken since it began.

    Args:
        evaluation: seconds that an evaluation is expected to take, until one is timed.
    """

    def __init__(self, evaluation: float) -> None:
        self.began = self._epoch_began = time.monotonic()
        self._epochs: list[float] = []
        self._evaluation = evaluation

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Time the evaluation that runs inside."""
        started = time.monotonic()
        yield
        self._evaluation = time.monotonic() - started
        self._epoch_began += self._evaluation  # not of the epoch

    def end_epoch(self) -> None:
        now = time.monotonic()
        self._epochs.append(now - self._epoch_began)
        self._epoch_began = now

    def measured(self, accelerator: Accelerator) -> tuple[float, float, float]:
        """Seconds since the beginning, of an epoch, and of the last evaluation, on the slowest process. The epoch is
        the median of the later half of all; the first is left out if there are others, because PyTorch prepares
        kernels for each image size in it. To be called on all processes together, after an epoch."""
        epoch = statistics.median(self._epochs[len(self._epochs) // 2 :])
        own = torch.tensor([[time.monotonic() - self.began, epoch, self._evaluation]], device=accelerator.device)
        passed, epoch, evaluation = accelerator.gather(own).amax(0).tolist()
        return passed, epoch, evaluation
