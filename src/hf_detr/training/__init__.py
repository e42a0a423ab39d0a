"""The parts of a training loop that are worth sharing; the loop itself is `examples/finetune.py`."""

from .optimization import parameter_groups, preferred_precision, use_all_cores

__all__ = ["parameter_groups", "preferred_precision", "use_all_cores"]
