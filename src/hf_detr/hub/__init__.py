"""Push checkpoints to the Hugging Face Hub, with their model cards."""

from .model_card import TEMPLATE, build_model_card, hash_of_weights
from .push import model_card_of, prepare_repo, push_folder, write_model_card

__all__ = [
    "TEMPLATE",
    "build_model_card",
    "hash_of_weights",
    "model_card_of",
    "prepare_repo",
    "push_folder",
    "write_model_card",
]
