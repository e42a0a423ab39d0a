"""Cross-validation: one model per fold, trained on the images outside of it, so that every image is predicted by a
model that has not seen it."""

import hashlib
import json
import shlex
import statistics
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..data import load_detection_dataset
from ..data.schema import id2label
from ..runtime import atomic_write
from .arguments import FinetuneArguments
from .launch import build_accelerator
from .run_data import identify, remember_data
from .setup import load_data

FILE = "folds.json"


class CrossValidation:
    """The runs of `--folds N`, each in a folder of its own in `--output_dir`. The same command continues after a kill.

    `folds.json` names the number of folds, digests of the images in each, and, when all runs have ended, their scores.

    Raises:
        ValueError: there are too few images, several processes, or the folder was begun with other data.
    """

    def __init__(self, args: FinetuneArguments) -> None:
        assert args.run.folds is not None
        self.args, self.folder, self.count = args, Path(args.run.output_dir or ""), args.run.folds
        accelerator = build_accelerator(args)
        if accelerator.num_processes > 1:
            raise ValueError(
                "--folds trains its models in one process: run it with --num_processes 1, or start each fold with "
                f"--fold 1/{self.count}."
            )
        file = self.folder / FILE
        before: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
        if before.get("folds", self.count) != self.count:
            raise ValueError(
                f"{self.folder} has a cross-validation with {before['folds']} folds. Name another --output_dir."
            )
        outside, inside = load_data(self.parts[0], accelerator)
        remember_data(self.folder, identify(outside, inside))
        held_out = [held_out_images(self._load_fold(number, id2label(outside))) for number in self._numbers]
        self._result = before | {"folds": self.count, "held_out": held_out}  # scores of ended runs stay
        self._write()
        print(
            f"Cross-validation: {self.count} models, each trained without one fold of the "
            f"{len(outside) + len(inside)} images.",
            flush=True,
        )

    @property
    def _numbers(self) -> range:
        return range(1, self.count + 1)

    @cached_property
    def parts(self) -> list[FinetuneArguments]:
        """The arguments of each run."""
        return [
            replace(
                self.args,
                data=replace(self.args.data, fold=f"{number}/{self.count}"),
                run=replace(self.args.run, folds=None, output_dir=str(folder_of_fold(self.folder, number))),
            )
            for number in self._numbers
        ]

    def _load_fold(self, number: int, names: dict[int, str]) -> Any:
        source = self.parts[number - 1].data.source
        return load_detection_dataset(split="val", id2label=names, progress=False, **source)

    def _write(self) -> None:
        with atomic_write(self.folder / FILE) as file:
            json.dump(self._result, file, indent=2)

    def finish(self) -> dict[str, Any]:
        """Print the scores and write them to `folds.json`."""
        metrics = [json.loads((folder_of_fold(self.folder, n) / "metrics.json").read_text()) for n in self._numbers]
        names = ["AP", "AP50", *(["mask_AP"] if self.args.data.masks else []), self.args.run.metric or "AP"]
        scores = {name: [float(of_fold[name]) for of_fold in metrics] for name in dict.fromkeys(names)}
        self._result["scores"] = scores
        self._write()
        print()
        for name, values in scores.items():
            listed = "  ".join(f"{value:.3f}" for value in values)
            print(f"{name:<9}{listed}   mean {statistics.mean(values):.3f}, deviation {statistics.stdev(values):.3f}")
        data = self.args.data
        options = [("--dataset", data.dataset), ("--annotations", data.train), ("--images", data.images)]
        options += [("--bbox_format", data.bbox_format)]
        command = ["hf-detr", "label-errors", "--model", str(self.folder)]
        command += [text for name, value in options if value for text in (name, value)]
        command += ["--crowds_as_objects"] if data.crowds_as_objects else []
        command += ["--dataset", data.location] if data.is_drawn else []
        print(
            f"Saved in {self.folder}. To check all annotations, each with the model that has not seen it:\n"
            f"  {shlex.join(command)}",
            flush=True,
        )
        return self._result


def folder_of_fold(folder: Path, number: int) -> Path:
    """Of the model that was trained without a fold."""
    return folder / f"fold-{number}"


def read_folds(folder: str | Path) -> dict[str, Any] | None:
    """The content of `folds.json`; None if the folder does not hold a cross-validation.

    Raises:
        ValueError: a fold is not trained to its end.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_text())
    if "scores" not in found:
        raise ValueError(f"The cross-validation in {folder} has not ended: start its command again.")
    return found


def held_out_images(dataset: Any) -> str:
    """A digest of the names of the images in a fold."""
    return hashlib.sha256("\n".join(dataset["file_name"]).encode()).hexdigest()
