"""What the models return: named tensors with their shapes."""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class DetrModelOutput(ModelOutput):
    """Hidden states of [`DetrModel`]. B images, Q queries, d = `d_model`, hw cells of the feature map.

    Args:
        last_hidden_state: (B, Q, d), the last decoder layer's output, normed.
        encoder_last_hidden_state: (B, hw, d), the paper's memory.
        intermediate_hidden_states: (decoder layers, B, Q, d), every decoder layer's output, normed; with
            `auxiliary_loss` only.
        intermediate_boxes: (decoder layers, B, Q, 4), the boxes that every decoder layer predicts, cxcywh in [0, 1]; of
            anchor queries only.
        encoder_input, cell_centers: (B, hw, d), the projected features, and (B or 1, hw, 2), x and y of their cells in
            [0, 1], -1 in the padding; in training with `dense_loss_coefficient` only.
        decoder_hidden_states: with `output_hidden_states`: the decoder's input (zeros), each layer's output, and last
            the normed result, each (B, Q, d).
        decoder_attentions, cross_attentions: with `output_attentions`: per decoder layer (B, heads, Q, Q) among the
            queries and (B, heads, Q, hw) from queries to the image.
        encoder_hidden_states: with `output_hidden_states`: the projected features, then each layer's output, each
            (B, hw, d).
        encoder_attentions: with `output_attentions`: per encoder layer (B, heads, hw, hw).
    """

    last_hidden_state: Tensor | None = None
    encoder_last_hidden_state: Tensor | None = None
    intermediate_hidden_states: Tensor | None = None
    intermediate_boxes: Tensor | None = None
    encoder_input: Tensor | None = None
    cell_centers: Tensor | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None


@dataclass
class DetrDetectionOutput(ModelOutput):
    """Predictions of [`DetrForDetection`], and their loss if labels were given.

    Args:
        loss: scalar, the weighted sum over decoder layers.
        loss_dict: the unweighted terms: `loss_ce`, `loss_bbox`, `loss_giou`, and others; see
            [`~hf_detr.model.loss.set_loss`].
        logits: (B, Q, num_labels + 1), the last one is no-object.
        pred_boxes: (B, Q, 4), cxcywh in [0, 1] of the image without its padding.
        auxiliary_outputs: `logits` and `pred_boxes` of each earlier decoder layer; with labels and `auxiliary_loss`.
        last_hidden_state and all that follow: see [`DetrModelOutput`]. In training they also hold further query groups
            and denoising queries, after the Q queries that predict.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    auxiliary_outputs: list[dict[str, Tensor]] | None = None
    last_hidden_state: Tensor | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None
