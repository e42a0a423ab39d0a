"""The matcher against transformers' and against scipy on each image alone."""

import pytest
import torch
from conftest import random_labels
from transformers.loss.loss_for_object_detection import HungarianMatcher

from hf_detr.model.matcher import hungarian_matching, matching_costs


def flatten(labels):
    counts = [len(label["class_labels"]) for label in labels]
    return torch.cat([x["class_labels"] for x in labels]), torch.cat([x["boxes"] for x in labels]), counts


@pytest.mark.parametrize("counts", [[3, 0, 7], [1, 1, 1], [12, 15, 2], [0, 0, 0]])
def test_assignment_equals_that_of_transformers_for_every_layer(counts):
    layers, queries = 4, 10
    logits, boxes = torch.randn(layers, 3, queries, 6), torch.rand(layers, 3, queries, 4) * 0.5 + 0.2
    labels = random_labels(counts)
    classes, objects, sizes = flatten(labels)
    image, query, target = hungarian_matching(logits, boxes, classes, objects, sizes)
    theirs = HungarianMatcher(class_cost=1, bbox_cost=5, giou_cost=2)
    starts = [0, counts[0], counts[0] + counts[1]]
    for layer in range(layers):
        expected = set()
        if sum(counts):
            matched = theirs({"logits": logits[layer], "pred_boxes": boxes[layer]}, labels)
            for index, (q, t) in enumerate(matched):
                expected |= {(index, a, b + starts[index]) for a, b in zip(q.tolist(), t.tolist(), strict=True)}
        assert set(zip(image.tolist(), query[layer].tolist(), target[layer].tolist(), strict=True)) == expected


def test_costs_of_an_image_do_not_see_other_images():
    logits, boxes = torch.randn(2, 3, 10, 6), torch.rand(2, 3, 10, 4) * 0.5 + 0.2
    labels = random_labels([2, 4, 1])
    classes, objects, counts = flatten(labels)
    image_index = torch.tensor([i for i, count in enumerate(counts) for _ in range(count)])
    weights = {"class_cost": 1.0, "bbox_cost": 5.0, "giou_cost": 2.0}
    together = matching_costs(logits, boxes, classes, objects, image_index, **weights)
    assert together.shape == (2, 7, 10)
    alone = matching_costs(
        logits[:, 1:2], boxes[:, 1:2], classes[2:6], objects[2:6], torch.zeros(4, dtype=torch.long), **weights
    )
    torch.testing.assert_close(together[:, 2:6], alone)
