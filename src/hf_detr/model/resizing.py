"""Resize a trained model to other classes or another number of queries, keeping every weight that still applies."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from .heads import build_class_head
from .initialization import init_class_head, init_queries

RowLayer = TypeVar("RowLayer", nn.Linear, nn.Embedding)
NAMED_BY_CLASS = ("class_weights", "stuff_labels")  # fields of the config that name classes


@torch.no_grad()
def resize_queries(model: Any, num_queries: int) -> str:
    """Implement `DetrModel.resize_queries` for `model`, a [`DetrModel`]. Returns a sentence that reports the change."""
    if num_queries < 1:
        raise ValueError(f"A model needs at least 1 query, got num_queries={num_queries}.")
    config = model.config
    before, config.num_queries = model.query_position_embeddings.num_embeddings, num_queries
    kept = {row: row for row in range(min(num_queries, before))}

    queries = nn.Embedding(num_queries, model.query_position_embeddings.embedding_dim)
    init_queries(queries, model.decoder.queries_are_boxes)
    model.query_position_embeddings = _copy_rows(queries, model.query_position_embeddings, kept)
    rest = f"{num_queries - len(kept)} new ones start afresh" if num_queries > before else "the rest is dropped"
    return f"Object queries: {before} to {num_queries}, the first {len(kept)} keep their weights, {rest}."


def keep_named_classes(config: Any, fields: Iterable[str] = NAMED_BY_CLASS) -> None:
    """Forget what these fields say about classes that the config no longer has."""
    for field in fields:
        value = getattr(config, field) or ()
        kept = [name for name in value if name in config.label2id]
        setattr(config, field, ({name: value[name] for name in kept} if isinstance(value, dict) else kept) or None)


@torch.no_grad()
def resize_class_head(model: Any, id2label: dict[int, str]) -> str:
    """Implement `DetrForDetection.resize_class_head` for `model`, a [`DetrForDetection`]. Returns a sentence that
    reports the change. Names that occur twice, and the placeholders `LABEL_0` ..., identify no class."""
    config = model.config
    width = model.class_labels_classifier.out_features - config.has_no_object  # the config may have been changed since
    old_names = {row: name for row, name in config.id2label.items() if row < width}
    new_names, count = list(id2label.values()), Counter(old_names.values())
    row_of = {n: row for row, n in old_names.items() if count[n] == 1 and not re.fullmatch(r"LABEL_\d+", n)}
    kept = {row: row_of[name] for row, name in id2label.items() if name in row_of}
    proposals = model.model.proposals
    for owner in (model, model.dense_head, None if proposals is None else proposals.head):
        if owner is not None:
            has_no_object = config.has_no_object or owner is not model
            head = build_class_head(config.d_model, len(new_names), has_no_object=has_no_object)
            if not has_no_object:  # where a new class of probability 1/2 would be detected everywhere
                init_class_head(head, config.prior_probability, has_no_object=False)
            rows = kept | ({len(new_names): width} if has_no_object else {})
            owner.class_labels_classifier = _copy_rows(head, owner.class_labels_classifier, rows)
    if model.denoising is not None:
        embedding = nn.Embedding(len(new_names), config.d_model)
        model.denoising.class_embedding = _copy_rows(embedding, model.denoising.class_embedding, kept)
    config.id2label = dict(id2label)
    config.label2id = {name: row for row, name in id2label.items()}
    keep_named_classes(config)
    fresh = [name for row, name in id2label.items() if row not in kept]
    some = f" ({', '.join(fresh[:5])}{', ...' if len(fresh) > 5 else ''})" if fresh else ""
    return (
        f"Class head: {width} to {len(new_names)} classes, {len(kept)} keep their weights by name, "
        f"{len(fresh)} start at random{some}, {width - len(kept)} are dropped."
    )


@torch.no_grad()
def _copy_rows(new: RowLayer, old: RowLayer, rows: dict[int, int]) -> RowLayer:
    """Copy rows of weight and bias from `old` to `new`, {row in new: row in old}. Returns `new`, on the device and with
    the dtype of `old`."""
    if old.weight.is_meta:
        raise ValueError("The weights to resize are offloaded to disk. Load them without offloading to resize them.")
    new.to(old.weight)
    parameters = dict(old.named_parameters())
    for name, parameter in new.named_parameters():
        parameter[list(rows)] = parameters[name][list(rows.values())]
    return new
