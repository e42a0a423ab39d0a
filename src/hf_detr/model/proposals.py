"""Step 4: object queries that start where the encoder has found something (`query_proposals=True`).

Learned queries and anchors start at the same boxes in every image. Here each location of the encoder's memory predicts
a class and a box, and the most confident ones become the queries: their boxes are the anchors of the first decoder
layer, and their feature vectors its content (the two stages of Deformable DETR, arXiv 2010.04159, section 4.2).

Several locations find the same object, and the decoder has to keep one of them. What non-maximum suppression would
decide by, the overlap with a more confident proposal, is a feature of each query here (the rank and relation features
of arXiv 1711.11575, reduced to two numbers), which self-attention would have to find out first.
"""

import torch
from torch import Tensor, nn

from .box_loss import iou_of
from .dense_supervision import DenseHead
from .encoder import Memory
from .heads import MLP
from .queries import Queries

OVERLAP_WIDTH = 64  # hidden channels of the embedding of the overlaps
FAR = 1e3  # no log odds are as large, and float16 tells it from the next 1,000 integers


class Proposals(nn.Module):
    """Puts the most confident locations of an image in place of the first Q queries of a batch.

    Boxes and vectors are copied without gradient: the head learns from the dense loss only, as the decoder would
    otherwise move the boxes that it starts from.
    """

    def __init__(self, d_model: int, num_labels: int, *, relative_boxes: bool = False) -> None:
        super().__init__()
        self.head = DenseHead(d_model, num_labels, relative_boxes=relative_boxes)
        self.overlap_embedding = MLP([2, OVERLAP_WIDTH, d_model])

    def forward(self, queries: Queries, memory: Memory, num_queries: int) -> Queries:
        """Args:
            queries: of the batch. Boxes and content of the first `num_queries` are replaced; where an image has fewer
                locations, as many of them stay, after the proposals.

        Returns:
            the queries, the first ones sorted by confidence, the highest first.
        """
        assert queries.boxes is not None
        boxes, content, classes = self.best(memory, queries.boxes[:, :num_queries], queries.content[:, :num_queries])
        content = content + self.overlap_embedding(overlaps(boxes, classes).to(content.dtype))
        return queries._replace(
            boxes=torch.cat((boxes, queries.boxes[:, num_queries:]), dim=1),
            content=torch.cat((content, queries.content[:, num_queries:]), dim=1),
        )

    @torch.no_grad()
    def best(self, memory: Memory, boxes: Tensor, content: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The Q locations of each image that most likely have an object.

        Args:
            boxes: (B, Q, 4), what follows where an image has fewer locations; `content` (B, Q, d).

        Returns:
            boxes (B, Q, 4), feature vectors (B, Q, d) and classes (B, Q), the most confident first.
        """
        features, (height, width) = memory.features, memory.size
        mask = memory.mask
        if mask is None:
            mask = torch.ones(features.shape[0], height, width, dtype=torch.bool, device=features.device)
        logits = self.head.class_labels_classifier(torch.cat((features, content), dim=1)).float()
        scores = logits[..., :-1].logsumexp(-1) - logits[..., -1]  # log odds of any object, (B, hw + Q)
        count = boxes.shape[1]
        last = -FAR - torch.arange(count, dtype=scores.dtype, device=scores.device)
        located = scores[:, :-count].masked_fill(~mask.flatten(1), -10 * FAR)
        at = torch.cat((located, last.expand(scores.shape[0], -1)), dim=1).topk(count, dim=1).indices[..., None]
        vectors = torch.cat((features, content), dim=1).gather(1, at.expand(-1, -1, features.shape[-1]))
        anchors = torch.cat((self.head.anchors(mask), boxes), dim=1).gather(1, at.expand(-1, -1, 4))
        refined = self.head.bbox_predictor(vectors, anchors).to(boxes.dtype)
        classes = logits[..., :-1].argmax(-1).gather(1, at[..., 0])
        return torch.where(at < height * width, refined, anchors), vectors, classes


@torch.no_grad()
def overlaps(boxes: Tensor, classes: Tensor) -> Tensor:
    """How much each box overlaps one that comes before it, (B, Q, 4) cxcywh and (B, Q) to (B, Q, 2): the largest IoU
    with any of them, and with those of the same class; 0 for the first, and between boxes whose areas are 0 in
    float16."""
    overlap = iou_of(boxes[:, :, None], boxes[:, None])  # (B, Q, Q)
    overlap = torch.where(overlap >= 0, overlap, 0).tril(-1)  # 0 for NaN; nan_to_num is not in older opsets for float16
    same = classes[:, :, None] == classes[:, None]
    return torch.stack((overlap.amax(-1), (overlap * same).amax(-1)), dim=-1)
