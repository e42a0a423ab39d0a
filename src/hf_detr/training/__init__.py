"""The parts of a training loop that are worth sharing; the loop itself is `examples/finetune.py`."""

from ..backbone import feature_strides
from .arguments import TRAINING_VALUES, parse_finetune_args
from .batch_size import find_batch_size, trial_step
from .diagnosis import TrainingProbe, explain_overfit, hint
from .lora import add_lora, merged
from .optimization import build_schedule, parameter_groups, preferred_precision, use_all_cores
from .recipes import RECIPES, DataSummary, Recipe, choose_recipe, summarize
from .run_folder import Progress, claim_output_dir, newest_state, save_state
from .sharding import gather_weights, sharding_plugin

__all__ = [
    "RECIPES",
    "TRAINING_VALUES",
    "DataSummary",
    "Progress",
    "Recipe",
    "TrainingProbe",
    "add_lora",
    "build_schedule",
    "choose_recipe",
    "claim_output_dir",
    "explain_overfit",
    "feature_strides",
    "find_batch_size",
    "gather_weights",
    "hint",
    "merged",
    "newest_state",
    "parameter_groups",
    "parse_finetune_args",
    "preferred_precision",
    "save_state",
    "sharding_plugin",
    "summarize",
    "trial_step",
    "use_all_cores",
]
