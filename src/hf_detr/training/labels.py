"""Starting from a checkpoint that was trained on other classes."""

import torch
from torch import nn

from ..modeling_hf_detr import DetrForDetection


@torch.no_grad()
def replace_class_head(model: DetrForDetection, id2label: dict[int, str]) -> str:
    """Make `model` predict these classes, in place. Classes that it already knows by name keep their weights, and so
    does "no object"; the others start at random.

    Returns:
        one line that says what was done.
    """
    old_names, old_head = model.config.id2label, model.class_labels_classifier
    if dict(old_names) == dict(id2label):
        return f"The checkpoint already predicts these {len(id2label)} classes."
    head = nn.Linear(old_head.in_features, len(id2label) + 1).to(old_head.weight)
    row_of = {name: row for row, name in old_names.items()}
    kept = {row: row_of[name] for row, name in id2label.items() if name in row_of}
    for row, old_row in (kept | {len(id2label): len(old_names)}).items():
        head.weight[row] = old_head.weight[old_row]
        head.bias[row] = old_head.bias[old_row]
    model.class_labels_classifier = head
    model.config.id2label = dict(id2label)
    model.config.label2id = {name: row for row, name in id2label.items()}
    new = [name for name in id2label.values() if name not in row_of]
    gone = [name for name in row_of if name not in id2label.values()]
    return (
        f"Class head replaced: {len(kept)} of {len(id2label)} classes keep their weights, {len(new)} start at random"
        f"{' (' + ', '.join(new[:5]) + (', ...' if len(new) > 5 else '') + ')' if new else ''}, {len(gone)} dropped."
    )
