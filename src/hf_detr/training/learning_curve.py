"""What more images would give: models trained on nested subsets, and a forecast from their scores."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from ..model.configuration_hf_detr import DetrConfig
from ..runtime import atomic_write, import_extra
from .arguments import FinetuneArguments
from .launch import build_accelerator
from .run_data import identify, remember_data
from .run_recipe import resolve_recipe
from .setup import build_processor, load_data

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIVISORS = (8, 4, 2, 1)  # of the number of images
MIN_IMAGES = 8  # of the smallest subset
MIN_POINTS = 3  # for a forecast with an interval
CONFIDENCE = 0.8
OF_THE_SUBSET = ("recipe", "epochs", "eval_every")  # what is not the same for all subsets


@dataclass(frozen=True)
class Forecast:
    """The score expected for a number of training images, and an interval that should contain the measured score with
    probability `CONFIDENCE`."""

    images: int
    score: float
    low: float
    high: float


def forecast(images: Sequence[int], scores: Sequence[float], target: int) -> Forecast:
    """Extrapolate scores in [0, 1] by a power law of the error, `1 - score = a · images^-b` (arXiv 1712.00409), fitted
    by least squares to the logarithms. The interval is the prediction interval of this regression (Student's t).

    Args:
        images, scores: at least three points.
        target: number of images to forecast the score of.

    Raises:
        ValueError: there are fewer points, two with the same number of images, a score is not in [0, 1), or all are 0.
    """
    if len(images) < MIN_POINTS or len(set(images)) < len(images):
        raise ValueError(f"A forecast needs scores for at least {MIN_POINTS} different numbers of images.")
    if outside := [score for score in scores if not 0 <= score < 1]:
        raise ValueError(f"A forecast needs scores of at least 0 and below 1, not {outside[0]:g}.")
    if not any(scores):
        raise ValueError("A forecast needs a score above 0: train longer (--epochs, --minutes).")
    x, y = np.log(np.asarray(images, dtype=np.float64)), np.log(1 - np.asarray(scores, dtype=np.float64))
    fit = stats.linregress(x, y)
    freedom = len(x) - 2
    residual = math.sqrt(float(((y - fit.intercept - fit.slope * x) ** 2).sum()) / freedom)
    at = math.log(target)
    leverage = 1 + 1 / len(x) + (at - x.mean()) ** 2 / float(((x - x.mean()) ** 2).sum())
    spread = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * residual * math.sqrt(leverage)
    middle = fit.intercept + fit.slope * at
    # an error is at most 1
    score, low, high = (1 - math.exp(min(0.0, value)) for value in (middle, middle + spread, middle - spread))
    return Forecast(target, score, low, high)


class LearningCurve:
    """The runs of `--learning_curve`: the same model and rates, which the recipe chooses for all training images, on an
    eighth, a quarter, half and all of them, each in a folder of its own in `--output_dir`. The number of epochs is that
    of the recipe for each subset. The same command continues after a kill.

    Raises:
        ValueError: there are too few images, several processes, or the folder was begun with other data.
    """

    def __init__(self, args: FinetuneArguments) -> None:
        self.args, self.folder = args, Path(args.run.output_dir or "")
        accelerator = build_accelerator(args)
        if accelerator.num_processes > 1:
            raise ValueError("--learning_curve trains its models in one process: run it with --num_processes 1.")
        train_set, val_set = load_data(args, accelerator)
        count = len(train_set)
        self.images = [count // divisor for divisor in DIVISORS if count // divisor >= MIN_IMAGES]
        if len(self.images) < MIN_POINTS:
            needed = MIN_IMAGES * DIVISORS[-MIN_POINTS]
            raise ValueError(f"--learning_curve needs at least {needed} training images; there are {count}.")
        remember_data(self.folder, identify(train_set, val_set))
        self._recipe = resolve_recipe(args, train_set, build_processor(args))  # of all images
        print(f"Learning curve: models are trained on {', '.join(map(str, self.images))} images.", flush=True)

    @cached_property
    def parts(self) -> list[FinetuneArguments]:
        """The arguments of each run, the smallest subset first."""
        recipe, config = self._recipe, DetrConfig.__dataclass_fields__
        chosen = [f"{name}={json.dumps(value)}" for name, value in recipe.config.items() if name in config]
        values = {name: getattr(recipe, name) for name in asdict(self.args.recipe) if name not in OF_THE_SUBSET}
        return [
            replace(
                self.args,
                data=replace(self.args.data, train_images=number),
                model=replace(self.args.model, set=chosen),
                recipe=replace(self.args.recipe, **values),
                run=replace(self.args.run, learning_curve=False, output_dir=str(self._folder_of(number))),
            )
            for number in self.images
        ]

    def _folder_of(self, number: int) -> Path:
        return self.folder / f"images-{number}"

    def finish(self) -> dict[str, Any]:
        """Print the scores and the forecast, and write them as `learning_curve.json` and, where matplotlib is
        installed, `learning_curve.png`."""
        metrics = [json.loads((self._folder_of(number) / "metrics.json").read_text()) for number in self.images]
        name = self._recipe.metric
        scores = [float(of_run[name]) for of_run in metrics]
        lines = [f"{number:>8} images   {name} {score:.3f}" for number, score in zip(self.images, scores, strict=True)]
        result: dict[str, Any] = {"metric": name, "images": self.images, "scores": scores, "confidence": CONFIDENCE}
        result |= {"forecast": None, "back_test": None}
        try:
            ahead = forecast(self.images, scores, 2 * self.images[-1])
            result["forecast"] = asdict(ahead)
            lines.append(f"{ahead.images:>8} images   forecast: {_in_words(name, ahead)}")
            if len(self.images) > MIN_POINTS:
                tested = forecast(self.images[:-1], scores[:-1], self.images[-1])
                result["back_test"] = asdict(tested)
                lines.append(
                    f"The same forecast for {tested.images} images from the smaller subsets: "
                    f"{_in_words(name, tested)}; measured {scores[-1]:.3f}."
                )
        except ValueError as error:
            lines.append(str(error))
        print("\n" + "\n".join(lines), flush=True)
        with atomic_write(self.folder / "learning_curve.json") as file:
            json.dump(result, file, indent=2)
        try:
            figure = draw_learning_curve(result)
        except ImportError as error:
            print(f"No figure is drawn. {error}")
        else:
            figure.savefig(self.folder / "learning_curve.png", dpi=120)
        print(
            f"Saved in {self.folder}; the model trained on all images is in {self._folder_of(self.images[-1])}",
            flush=True,
        )
        return result


def draw_learning_curve(result: dict[str, Any]) -> "Figure":
    """The scores against the number of images, with the forecast if there is one.

    Args:
        result: the content of `learning_curve.json`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure_class = import_extra("matplotlib.figure", "visualization").Figure
    figure: Figure = figure_class(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    images, scores = result["images"], result["scores"]
    axes.plot(images, scores, "o-", color="C0", label="measured")
    shown = list(images)
    if result["forecast"] is not None:
        shown.append(result["forecast"]["images"])
        numbers = np.geomspace(images[0], shown[-1], 40).round().astype(int).tolist()
        curve = [forecast(images, scores, number) for number in numbers]
        axes.plot(numbers, [point.score for point in curve], "--", color="C1", label="power law")
        beyond = [point for point in curve if point.images >= images[-1]]
        axes.fill_between(
            [point.images for point in beyond],
            [point.low for point in beyond],
            [point.high for point in beyond],
            color="C1",
            alpha=0.2,
            label=f"{result['confidence']:.0%} interval",
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(shown, [str(number) for number in shown])
    axes.set_xlabel("training images")
    axes.set_ylabel(result["metric"].replace("_", " "))
    axes.legend()
    return figure


def _in_words(name: str, expected: Forecast) -> str:
    return f"{name} {expected.score:.3f} ({CONFIDENCE:.0%} interval {expected.low:.3f} to {expected.high:.3f})"
