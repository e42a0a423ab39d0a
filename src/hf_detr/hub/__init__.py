"""The Hugging Face Hub: pushing checkpoints with their model cards."""

from .model_card import TEMPLATE, build_model_card, hash_of_weights, read_metrics
from .push import model_card_of, prepare_repo, push_folder, register_model_card

__all__ = [
    "TEMPLATE",
    "build_model_card",
    "hash_of_weights",
    "model_card_of",
    "prepare_repo",
    "push_folder",
    "read_metrics",
    "register_model_card",
]
