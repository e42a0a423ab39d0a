"""Step 4: the decoder turns object queries into objects, all in parallel (paper, section 3.2)."""

from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from .attention import MultiHeadAttention
from .configuration_hf_detr import DetrConfig
from .encoder import LayerOptions, Memory, TransformerLayer
from .heads import BoxHead
from .position_embedding import TEMPERATURE
from .queries import Queries


class DecoderOutput(NamedTuple):
    """What every decoder returns, for L layers and T queries.

    Args:
        hidden_states: (L, B, T, d), the output of each layer, normed.
        boxes: (L, B, T, 4), the boxes of each layer, cxcywh in [0, 1] of the image without its padding.
        layer_states: the decoder's input, the output of each layer but the last one as the next layer reads it, and
            the normed result; each (B, T, d).
        attentions, cross_attentions: of each layer, (B, heads, T, T) among the queries and (B, heads, T, hw) from
            queries to locations; None from implementations that do not return them.
    """

    hidden_states: Tensor
    boxes: Tensor
    layer_states: tuple[Tensor, ...]
    attentions: tuple[Tensor | None, ...]
    cross_attentions: tuple[Tensor | None, ...]


class DetrDecoder(nn.Module):
    """The contract of a decoder: `forward(queries, memory, attn_implementation, **kwargs)` gives a [`DecoderOutput`].
    A new one is a file and an entry in `hf_detr.model.decoders.DECODERS`.

    Attributes:
        bbox_predictor: the box head, shared by all layers (paper, section 3.1).
        queries_are_boxes: whether it reads `queries.boxes`, or else `queries.positions`.
        predicts_offsets: whether its box head predicts offsets from a box or point, or else boxes.
        attn_implementations: those that it can run; None: all.
        temperature, centered_positions: of the sine embedding of the image, which its queries are compared with.
        scales_encoder_positions: whether the encoder in front of it scales its positions.
    """

    queries_are_boxes: ClassVar[bool] = False
    predicts_offsets: ClassVar[bool] = False
    attn_implementations: ClassVar[tuple[str, ...] | None] = None
    temperature: ClassVar[float] = TEMPERATURE
    centered_positions: ClassVar[bool] = False
    scales_encoder_positions: ClassVar[bool] = False

    bbox_predictor: BoxHead

    @classmethod
    def of(cls, config: DetrConfig, options: LayerOptions) -> Self:
        """The decoder that a config describes, with layers of these options."""
        raise NotImplementedError

    def forward(self, queries: Queries, memory: Memory, attn_implementation: str, **kwargs: Any) -> DecoderOutput:
        raise NotImplementedError

    def self_attn_implementation(self, queries: Queries, attn_implementation: str) -> str:
        """The implementation among the queries: a mask, which only training has, takes "eager" or "sdpa"."""
        masked = queries.attention_mask is not None and attn_implementation != "eager"
        return "sdpa" if masked else attn_implementation


class DecoderLayer(TransformerLayer):
    """Self-attention among the queries, cross-attention from queries to the image, then a feed-forward block."""

    def __init__(self, options: LayerOptions) -> None:
        super().__init__(options)
        self.encoder_attn = MultiHeadAttention(options.d_model, options.num_heads, options.attention_dropout)
        self.encoder_attn_layer_norm = nn.LayerNorm(options.d_model)

    def forward(
        self,
        hidden_states: Tensor,
        query_positions: Tensor,
        features: Tensor,
        positioned_features: Tensor,
        query_mask: Tensor | None,
        attention_mask: Any,
        attn_implementation: str,
        self_attn_implementation: str,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Args:
            hidden_states: (B, T, d) content of the queries; `query_positions` (B, T, d).
            features: (B, hw, d), the values; `positioned_features` (B, hw, d), with positions added, the keys.
            query_mask: for the self-attention, (1 or B, 1, T, T); `attention_mask` excludes padding.

        Returns:
            (B, T, d), weights of the self-attention (B, heads, T, T) and of the cross-attention (B, heads, T, hw), or
            None for both.
        """
        hidden_states, self_weights = self.self_attention(
            hidden_states, query_positions, query_mask, self_attn_implementation, **kwargs
        )
        normed = self.before_block(self.encoder_attn_layer_norm, hidden_states)
        update, cross_weights = self.encoder_attn(
            normed + query_positions, positioned_features, features, attention_mask, attn_implementation, **kwargs
        )
        hidden_states = self.after_block(self.encoder_attn_layer_norm, hidden_states, update)
        return self.feed_forward(hidden_states), self_weights, cross_weights


class Decoder(DetrDecoder):
    """The paper's decoder. The final norm is applied to a *copy* of each layer's output: the next layer reads the
    output that is not normed, with auxiliary losses or without.

    Args:
        norm_between_layers: see `DetrConfig`.
    """

    def __init__(self, num_layers: int, options: LayerOptions, *, norm_between_layers: bool = False) -> None:
        super().__init__()
        self.norm_between_layers = norm_between_layers
        self.layers = nn.ModuleList(DecoderLayer(options) for _ in range(num_layers))
        self.layernorm = nn.LayerNorm(options.d_model)
        self.bbox_predictor = BoxHead(options.d_model)

    @classmethod
    def of(cls, config: DetrConfig, options: LayerOptions) -> Self:
        return cls(config.decoder_layers, options, norm_between_layers=config.norm_between_layers)

    def forward(self, queries: Queries, memory: Memory, attn_implementation: str, **kwargs: Any) -> DecoderOutput:
        positioned_features = memory.features + memory.positions
        self_attn_implementation = self.self_attn_implementation(queries, attn_implementation)
        states, normed, self_weights, cross_weights = [queries.content], [], [], []
        for layer in self.layers:
            hidden_states, layer_self, layer_cross = layer(
                states[-1],
                queries.positions,
                memory.features,
                positioned_features,
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
        boxes = self.bbox_predictor(hidden_states)
        layer_states = (*states[:-1], normed[-1])
        return DecoderOutput(hidden_states, boxes, layer_states, tuple(self_weights), tuple(cross_weights))
