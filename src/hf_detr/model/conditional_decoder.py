"""Step 4, the decoder of Conditional DETR as published (`query_type="conditional"`, arXiv 2108.06152).

Queries are learned vectors, as in DETR. A reference point is predicted from each; it does not depend on the image. In
the cross-attention, contents are compared with contents, and the sines of the reference point with those of the image.
The box head predicts the centre as an offset from the reference point, and width and height directly.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn

from .attention import ConditionalAttention, PositionedSelfAttention
from .configuration_hf_detr import DetrConfig
from .decoder import DecoderOutput, DetrDecoder
from .encoder import LayerOptions, Memory, TransformerLayer
from .heads import MLP, BoxHead
from .position_embedding import TEMPERATURE, box_waves
from .queries import Queries


class ConditionalDecoderLayer(TransformerLayer):
    """Self-attention among the queries, conditional cross-attention to the image, then a feed-forward block."""

    def __init__(self, options: LayerOptions, *, is_first: bool) -> None:
        super().__init__(options)
        sizes = options.d_model, options.num_heads, options.attention_dropout
        self.self_attn = PositionedSelfAttention(*sizes)
        self.encoder_attn = ConditionalAttention(*sizes, adds_positions=is_first)
        self.encoder_attn_layer_norm = nn.LayerNorm(options.d_model)

    def forward(
        self,
        hidden_states: Tensor,
        query_positions: Tensor,
        center_positions: Tensor,
        features: Tensor,
        positions: Tensor,
        query_mask: Tensor | None,
        attention_mask: Any,
        attn_implementation: str,
        self_attn_implementation: str,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Args:
            hidden_states: (B, T, d) content of the queries; `query_positions` (B, T, d) for the self-attention and the
                first cross-attention, `center_positions` (B, T, d) for every cross-attention.
            features: (B, hw, d); `positions` (B or 1, hw, d), of the image.
            query_mask, attention_mask: as for [`~hf_detr.model.decoder.DecoderLayer`].

        Returns:
            as [`~hf_detr.model.decoder.DecoderLayer`].
        """
        normed = self.before_block(self.self_attn_layer_norm, hidden_states)
        update, self_weights = self.self_attn(normed, query_positions, query_mask, self_attn_implementation, **kwargs)
        hidden_states = self.after_block(self.self_attn_layer_norm, hidden_states, update)
        update, cross_weights = self.encoder_attn(
            self.before_block(self.encoder_attn_layer_norm, hidden_states),
            center_positions,
            features,
            positions,
            attention_mask,
            attn_implementation,
            added_position=query_positions,
            **kwargs,
        )
        hidden_states = self.after_block(self.encoder_attn_layer_norm, hidden_states, update)
        return self.feed_forward(hidden_states), self_weights, cross_weights


class ConditionalDecoder(DetrDecoder):
    """A stack of conditional decoder layers.

    The sines of the reference point are scaled by a function of the content from the second layer on (section 3.3). A
    box is `sigmoid(output + (inverse_sigmoid(reference point), 0, 0))`, with the same reference point after every
    layer.

    In the cross-attention, queries and keys are twice as wide as values, which only "eager" and "sdpa" support.

    Args:
        norm_between_layers: see `DetrConfig`.
        temperature: of the sines of the reference points, as of those of the image that they are compared with.
    """

    predicts_offsets = True
    attn_implementations = ("eager", "sdpa")

    def __init__(
        self,
        num_layers: int,
        options: LayerOptions,
        *,
        norm_between_layers: bool = False,
        temperature: float = TEMPERATURE,
    ) -> None:
        super().__init__()
        self.norm_between_layers = norm_between_layers
        self.point_temperature = temperature
        self.d_model = d_model = options.d_model
        self.layers = nn.ModuleList(ConditionalDecoderLayer(options, is_first=n == 0) for n in range(num_layers))
        self.layernorm = nn.LayerNorm(d_model)
        self.reference_point = MLP([d_model, d_model, 2])
        self.position_scale = MLP([d_model, d_model, d_model]) if num_layers > 1 else None
        self.bbox_predictor = BoxHead(d_model)

    @classmethod
    def of(cls, config: DetrConfig, options: LayerOptions) -> Self:
        return cls(
            config.decoder_layers,
            options,
            norm_between_layers=config.norm_between_layers,
            temperature=config.position_temperature or cls.temperature,
        )

    def forward(self, queries: Queries, memory: Memory, attn_implementation: str, **kwargs: Any) -> DecoderOutput:
        if queries.positions is None:
            raise ValueError("The conditional decoder needs queries that are learned vectors.")
        centers = self.reference_point(queries.positions).float().sigmoid()  # (B, T, 2)
        waves = box_waves(centers, self.d_model // 2, self.point_temperature).to(queries.content.dtype)
        self_attn_implementation = self.self_attn_implementation(queries, attn_implementation)
        states, normed, self_weights, cross_weights = [queries.content], [], [], []
        for number, layer in enumerate(self.layers):
            scaled = waves if self.position_scale is None or number == 0 else waves * self.position_scale(states[-1])
            hidden_states, layer_self, layer_cross = layer(
                states[-1],
                queries.positions,
                scaled,
                memory.features,
                memory.positions,
                queries.attention_mask,
                memory.attention_mask,
                attn_implementation,
                self_attn_implementation,
                **kwargs,
            )
            normed.append(self.layernorm(hidden_states))
            states.append(normed[-1] if self.norm_between_layers else hidden_states)
            self_weights.append(layer_self)
            cross_weights.append(layer_cross)
        if self.norm_between_layers:
            normed[-1] = self.layernorm(normed[-1])
        hidden_states = torch.stack(normed)  # (L, B, T, d)
        sides = torch.full_like(centers, 0.5)  # whose logit is 0: sides are those that the head predicts
        boxes = self.bbox_predictor(hidden_states, torch.cat((centers, sides), dim=-1))
        layer_states = (*states[:-1], normed[-1])
        return DecoderOutput(hidden_states, boxes, layer_states, tuple(self_weights), tuple(cross_weights))
