"""Fitting a trained model to other classes or another number of queries, with as many of its weights as still mean the
same."""

import re
from collections import Counter
from typing import Any, TypeVar

import torch
from torch import nn

from .heads import build_class_head
from .initialization import init_queries

RowLayer = TypeVar("RowLayer", nn.Linear, nn.Embedding)


@torch.no_grad()
def resize_queries(model: Any, num_queries: int) -> str:
    """See `DetrModel.resize_queries`; `model` is one."""
    config = model.config
    before, config.num_queries = config.num_queries, num_queries
    kept = {row: row for row in range(min(num_queries, before))}

    def fit(old: nn.Embedding, number: int, rows: dict[int, int], first: int = 0) -> nn.Embedding:
        new = nn.Embedding(number, old.embedding_dim)
        init_queries(new, model.decoder.queries_are_boxes, first)
        return _fit_rows(new, old, rows)

    model.query_position_embeddings = fit(model.query_position_embeddings, num_queries, kept)
    if model.extra_query_groups is not None:
        groups = config.query_groups - 1
        in_groups = {g * num_queries + row: g * before + row for g in range(groups) for row in kept}
        model.extra_query_groups = fit(model.extra_query_groups, groups * num_queries, in_groups, num_queries)
    rest = f"{num_queries - len(kept)} new ones start afresh" if num_queries > before else "the rest is dropped"
    return f"Object queries: {before} to {num_queries}, the first {len(kept)} keep their weights, {rest}."


@torch.no_grad()
def resize_class_head(model: Any, id2label: dict[int, str]) -> str:
    """See `DetrForDetection.resize_class_head`; `model` is one."""
    config, width = model.config, model.config.d_model
    old_names = config.id2label
    count = Counter(old_names.values())
    row_of = {n: row for row, n in old_names.items() if count[n] == 1 and not re.fullmatch(r"LABEL_\d+", n)}
    kept = {row: row_of[name] for row, name in id2label.items() if name in row_of}
    no_object = {len(id2label): len(old_names)}
    for owner in (model, model.dense_head):
        if owner is not None:
            new = build_class_head(width, len(id2label))
            owner.class_labels_classifier = _fit_rows(new, owner.class_labels_classifier, kept | no_object)
    if model.denoising is not None:
        embedding = nn.Embedding(len(id2label), width)
        model.denoising.class_embedding = _fit_rows(embedding, model.denoising.class_embedding, kept)
    config.id2label = dict(id2label)
    config.label2id = {name: row for row, name in id2label.items()}
    fresh = [name for row, name in id2label.items() if row not in kept]
    some = f" ({', '.join(fresh[:5])}{', ...' if len(fresh) > 5 else ''})" if fresh else ""
    return (
        f"Class head: {len(old_names)} to {len(id2label)} classes, {len(kept)} keep their weights by name, "
        f"{len(fresh)} start at random{some}, {len(old_names) - len(kept)} are dropped."
    )


@torch.no_grad()
def _fit_rows(new: RowLayer, old: RowLayer, kept: dict[int, int]) -> RowLayer:
    """`new` with the rows of `old` (weight and bias) that are kept, {row in new: row in old}, on the same device and of
    the same dtype."""
    if old.weight.is_meta:
        raise ValueError("The weights to fit are offloaded to disk. Load them without offloading to resize them.")
    new.to(old.weight)
    parameters = dict(old.named_parameters())
    for name, parameter in new.named_parameters():
        parameter[list(kept)] = parameters[name][list(kept.values())]
    return new
