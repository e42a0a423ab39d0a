"""What makes a model fast on a given processor, applied on purpose: to a copy for prediction, in place for training."""

from .preparation import PreparedDetr, named_dtype, prepare_for_inference, prepare_for_training

__all__ = ["PreparedDetr", "named_dtype", "prepare_for_inference", "prepare_for_training"]
