"""Forward and backward of the whole loss, ours against transformers' `ImageLoss`, on the same tensors.

python benchmarks/loss.py
"""

import torch
from measure import compare, print_table
from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss

from hf_detr import DetrConfig
from hf_detr.model.loss import DetrLoss

LAYERS, QUERIES, CLASSES = 6, 100, 91
WEIGHTS = {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}


def main() -> None:
    torch.set_num_threads(2)
    rows = {}
    our_criterion = DetrLoss(DetrConfig(num_queries=QUERIES, num_labels=CLASSES))
    for images, objects in ((2, 5), (8, 15), (16, 80)):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(LAYERS, images, QUERIES, CLASSES + 1, generator=generator)
        boxes = torch.rand(LAYERS, images, QUERIES, 4, generator=generator) * 0.4 + 0.1
        labels = [
            {
                "class_labels": torch.randint(CLASSES, (objects,), generator=generator),
                "boxes": torch.rand(objects, 4, generator=generator) * 0.4 + 0.1,
            }
            for _ in range(images)
        ]
        criterion = ImageLoss(HungarianMatcher(1, 5, 2), CLASSES, 0.1, ["labels", "boxes", "cardinality"])

        def ours(logits=logits, boxes=boxes, labels=labels):
            leaves = logits.clone().requires_grad_(), boxes.clone().requires_grad_()
            result = our_criterion(*leaves, labels)
            result.loss.backward()
            return result.loss, result.loss_dict, leaves

        def theirs(logits=logits, boxes=boxes, labels=labels, criterion=criterion):
            leaves = logits.clone().requires_grad_(), boxes.clone().requires_grad_()
            layers = [{"logits": a, "pred_boxes": b} for a, b in zip(*leaves, strict=True)]
            terms = criterion(layers[-1] | {"auxiliary_outputs": layers[:-1]}, labels)
            loss = sum(
                value * WEIGHTS[name.rstrip("_0123456789")]
                for name, value in terms.items()
                if not name.startswith("cardinality")
            )
            loss.backward()
            return loss, terms, leaves

        (loss, terms, leaves), (their_loss, their_terms, their_leaves) = ours(), theirs()
        for name, value in their_terms.items():
            torch.testing.assert_close(terms[name], value, atol=1e-5, rtol=1e-5)
        for one, other in zip(
            (loss, *(leaf.grad for leaf in leaves)), (their_loss, *(leaf.grad for leaf in their_leaves)), strict=True
        ):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        rows[f"{images} images x {objects} boxes"] = compare(ours, theirs)
    print_table(
        f"Loss, forward + backward, {LAYERS} layers, {QUERIES} queries, {CLASSES} classes; values equal to 1e-5", rows
    )


if __name__ == "__main__":
    main()
