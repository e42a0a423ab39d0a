"""The parts of a training loop that are worth sharing; the loop itself is `examples/finetune.py`."""

from ..model.timm_network import feature_strides
from ..runtime.cores import use_all_cores
from .arguments import FinetuneArguments, parse_finetune_args
from .folds import CrossValidation, folder_of_fold, held_out_images, read_folds
from .launch import build_accelerator
from .learning_curve import LearningCurve
from .optimization import build_ema, build_schedule, parameter_groups, preferred_precision
from .recipes import choose_recipe, summarize
from .run_data import identify
from .run_folder import RunEndedError, next_free_run
from .run_recipe import resolve_recipe
from .setup import (
    build_loaders,
    build_model,
    build_processor,
    compile_for_training,
    fit_processor,
    load_data,
    repeat_images,
)
from .step import TrainStep
from .trainer import DetrTrainer
from .training_run import TrainingRun

__all__ = [
    "CrossValidation",
    "DetrTrainer",
    "FinetuneArguments",
    "LearningCurve",
    "RunEndedError",
    "TrainStep",
    "TrainingRun",
    "build_accelerator",
    "build_ema",
    "build_loaders",
    "build_model",
    "build_processor",
    "build_schedule",
    "choose_recipe",
    "compile_for_training",
    "feature_strides",
    "fit_processor",
    "folder_of_fold",
    "held_out_images",
    "identify",
    "load_data",
    "next_free_run",
    "parameter_groups",
    "parse_finetune_args",
    "preferred_precision",
    "read_folds",
    "repeat_images",
    "resolve_recipe",
    "summarize",
    "use_all_cores",
]
