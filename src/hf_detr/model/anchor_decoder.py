"""Step 4, another decoder: object queries are boxes, and every layer refines them (`query_type="anchor"`).

A learned query of DETR has to discover where to attend. Here a query *is* a box, an anchor (x, y, w, h): its position
embedding consists of the same sines as that of the image, so that attention starts at the anchor, and every decoder
layer predicts how the box changes (DAB-DETR, arXiv 2201.12329). In the cross-attention contents are compared with
contents and positions with positions (Conditional DETR, arXiv 2108.06152).
"""

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from .attention import ConditionalAttention
from .configuration_hf_detr import DetrConfig
from .decoder import DecoderOutput, DetrDecoder
from .encoder import LayerOptions, Memory, TransformerLayer
from .heads import MLP, BoxHead
from .position_embedding import LOW_TEMPERATURE, box_waves
from .queries import Queries


class AnchorDecoderLayer(TransformerLayer):
    """Self-attention among the queries, conditional cross-attention to the image, then a feed-forward block."""

    def __init__(self, options: LayerOptions) -> None:
        super().__init__(options)
        self.encoder_attn = ConditionalAttention(options.d_model, options.num_heads, options.attention_dropout)
        self.encoder_attn_layer_norm = nn.LayerNorm(options.d_model)

    def forward(
        self,
        hidden_states: Tensor,
        query_positions: Tensor,
        center_positions: Tensor,
        is_first: bool,
        features: Tensor,
        positions: Tensor,
        query_mask: Tensor | None,
        attention_mask: Any,
        attn_implementation: str,
        self_attn_implementation: str,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Args:
            hidden_states: (B, T, d) content of the queries.
            query_positions: (B, T, d), of the whole anchor; for the self-attention.
            center_positions: (B, T, d), of the anchor's centre; for the cross-attention.
            is_first: the content of the first layer carries no information yet, so the anchor's embedding is added to
                it in the cross-attention. (DAB-DETR's code then adds positions to the content of the keys, too; here
                positions are compared in their own half of the channels only.)
            features: (B, hw, d); `positions` (B or 1, hw, d), of the image.
            query_mask, attention_mask: as for [`~hf_detr.model.decoder.DecoderLayer`].

        Returns:
            as [`~hf_detr.model.decoder.DecoderLayer`].
        """
        hidden_states, self_weights = self.self_attention(
            hidden_states, query_positions, query_mask, self_attn_implementation, **kwargs
        )
        normed = self.before_block(self.encoder_attn_layer_norm, hidden_states)
        update, cross_weights = self.encoder_attn(
            normed + query_positions if is_first else normed,
            center_positions,
            features,
            positions,
            attention_mask,
            attn_implementation,
            **kwargs,
        )
        hidden_states = self.after_block(self.encoder_attn_layer_norm, hidden_states, update)
        return self.feed_forward(hidden_states), self_weights, cross_weights


class AnchorDecoder(DetrDecoder):
    """A stack of anchor decoder layers. Each layer reads the boxes that the previous one predicted, without gradient,
    and refines them with the box head that all layers share (arXiv 2201.12329, section 4.2).

    Queries and keys are twice as wide as values, which only "eager" and "sdpa" attention support.

    Args:
        modulate_attention, relative_boxes: see `DetrConfig`.
        temperature: of the sines of the boxes, as of those of the image that they are compared with.
    """

    queries_are_boxes = True
    predicts_offsets = True
    attn_implementations = ("eager", "sdpa")
    temperature = LOW_TEMPERATURE
    centered_positions = True
    min_side: ClassVar[float] = 1e-3  # of a box that attention is scaled by

    def __init__(
        self,
        num_layers: int,
        options: LayerOptions,
        *,
        modulate_attention: bool,
        relative_boxes: bool,
        temperature: float = LOW_TEMPERATURE,
    ) -> None:
        super().__init__()
        self.box_temperature = temperature
        d_model = options.d_model
        self.d_model = d_model
        self.layers = nn.ModuleList(self.build_layer(options, is_first=n == 0) for n in range(num_layers))
        self.layernorm = nn.LayerNorm(d_model)
        self.anchor_embedding = MLP([2 * d_model, d_model, d_model])
        self.position_scale = MLP([d_model, d_model, d_model]) if num_layers > 1 else None
        self.reference_size = MLP([d_model, d_model, 2]) if modulate_attention else None
        self.bbox_predictor = BoxHead(d_model, relative=relative_boxes)

    @classmethod
    def of(cls, config: DetrConfig, options: LayerOptions) -> Self:
        return cls(
            config.decoder_layers,
            options,
            modulate_attention=config.modulate_attention,
            relative_boxes=config.relative_boxes,
            temperature=config.position_temperature or cls.temperature,
        )

    def build_layer(self, options: LayerOptions, *, is_first: bool) -> nn.Module:
        return AnchorDecoderLayer(options)

    def center_positions(self, waves: Tensor, anchors: Tensor, hidden_states: Tensor, is_first: bool) -> Tensor:
        """Position embedding of the anchors' centres, (B, T, d), scaled by the content (arXiv 2108.06152, section 3.3)
        and by the width and height of the box (arXiv 2201.12329, equation 6)."""
        positions = waves[..., : self.d_model]
        if self.position_scale is not None and not is_first:
            positions = positions * self.position_scale(hidden_states)
        if self.reference_size is not None:
            reference = self.reference_size(hidden_states).sigmoid().float()  # (B, T, 2): width, height
            ratio = reference / anchors[..., 2:].clamp(min=self.min_side)
            positions = positions * ratio.flip(-1).repeat_interleave(self.d_model // 2, dim=-1)  # sines of y come first
        return positions

    def forward(self, queries: Queries, memory: Memory, attn_implementation: str, **kwargs: Any) -> DecoderOutput:
        if queries.boxes is None:
            raise ValueError("The anchor decoder needs queries that are boxes.")
        anchors = queries.boxes
        self_attn_implementation = self.self_attn_implementation(queries, attn_implementation)
        states, normed, boxes, self_weights, cross_weights = [queries.content], [], [], [], []
        for number, layer in enumerate(self.layers):
            waves = box_waves(anchors, self.d_model // 2, self.box_temperature)
            query_positions = self.anchor_embedding(waves.to(states[-1].dtype)).to(states[-1].dtype)
            hidden_states, layer_self, layer_cross = layer(
                states[-1],
                query_positions,
                self.center_positions(waves, anchors, states[-1], number == 0),
                number == 0,
                memory.features,
                memory.positions,
                queries.attention_mask,
                memory.attention_mask,
                attn_implementation,
                self_attn_implementation,
                **kwargs,
            )
            states.append(hidden_states)
            normed.append(self.layernorm(hidden_states))
            boxes.append(self.bbox_predictor(normed[-1], anchors))
            anchors = boxes[-1].detach()
            self_weights.append(layer_self)
            cross_weights.append(layer_cross)
        layer_states = (*states[:-1], normed[-1])
        return DecoderOutput(
            torch.stack(normed), torch.stack(boxes), layer_states, tuple(self_weights), tuple(cross_weights)
        )
