"""Push checkpoints to the Hugging Face Hub, with their model cards, and Spaces that show them."""

from .model_card import TEMPLATE, build_model_card, hash_of_weights
from .push import model_card_of, prepare_repo, push_folder, write_model_card
from .space import push_space

__all__ = [
    "TEMPLATE",
    "build_model_card",
    "hash_of_weights",
    "model_card_of",
    "prepare_repo",
    "push_folder",
    "push_space",
    "write_model_card",
]
