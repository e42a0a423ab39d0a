"""The parts of a training loop that are worth sharing; the loop itself is `examples/finetune.py`."""

from ..model.timm_network import feature_strides
from ..runtime.cores import use_all_cores
from .arguments import TRAINING_VALUES, parse_finetune_args
from .batch_size import find_batch_size, trial_step
from .checkpoints import (
    Progress,
    any_process,
    newest_checkpoint,
    replace_files,
    save_checkpoint,
    trim_log,
    use_plain_weights,
)
from .diagnosis import TrainingProbe, explain_overfit, hint
from .lora import add_lora, merged
from .meter import Meter, check_trackers, log_picture
from .non_finite import NonFiniteError
from .optimization import SCHEDULES, build_ema, build_schedule, parameter_groups, preferred_precision
from .recipes import RECIPES, DataSummary, Recipe, choose_recipe, summarize
from .run_folder import Claim, claim_output_dir, note_arguments
from .setup import (
    augmentation,
    build_loaders,
    build_model,
    build_processor,
    compile_for_training,
    dataset_name,
    describe_padding,
    fit_batch_size,
    load_data,
    seen_size,
    settle,
)
from .sharding import check_sharding, gather_weights, sharding_plugin
from .step import TrainStep, in_groups, share_buffers

__all__ = [
    "RECIPES",
    "SCHEDULES",
    "TRAINING_VALUES",
    "Claim",
    "DataSummary",
    "Meter",
    "NonFiniteError",
    "Progress",
    "Recipe",
    "TrainStep",
    "TrainingProbe",
    "add_lora",
    "any_process",
    "augmentation",
    "build_ema",
    "build_loaders",
    "build_model",
    "build_processor",
    "build_schedule",
    "check_sharding",
    "check_trackers",
    "choose_recipe",
    "claim_output_dir",
    "compile_for_training",
    "dataset_name",
    "describe_padding",
    "explain_overfit",
    "feature_strides",
    "find_batch_size",
    "fit_batch_size",
    "gather_weights",
    "hint",
    "in_groups",
    "load_data",
    "log_picture",
    "merged",
    "newest_checkpoint",
    "note_arguments",
    "parameter_groups",
    "parse_finetune_args",
    "preferred_precision",
    "replace_files",
    "save_checkpoint",
    "seen_size",
    "settle",
    "sharding_plugin",
    "share_buffers",
    "summarize",
    "trial_step",
    "trim_log",
    "use_all_cores",
    "use_plain_weights",
]
