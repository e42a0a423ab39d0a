"""Step 4, the other decoder: object queries that are boxes, and that each layer moves (`query_type="anchor"`).

A learned query of DETR has to find out where to look. Here a query *is* a place and a size, an anchor (x, y, w, h): its
position embedding is made of the same sines as that of the image, so that attention starts out at the anchor, and
every decoder layer says how the box should change (DAB-DETR, arXiv 2201.12329). In the cross-attention contents are
compared with contents and places with places (Conditional DETR, arXiv 2108.06152).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .heads import MLP, BoxHead
from .linear import Linear
from .position_embedding import ANCHOR_TEMPERATURE, sine_waves
from .transformer import EncoderLayer, MultiHeadAttention


def anchor_waves(anchors: Tensor, d_model: int) -> Tensor:
    """Boxes (..., 4), cxcywh in [0, 1], to the sines of y, x, w and h, (..., 2 * d_model); the first half is the
    position embedding that the image has at (x, y)."""
    placed = anchors[..., [1, 0, 2, 3]] * (2 * math.pi)
    return sine_waves(placed, d_model // 2, ANCHOR_TEMPERATURE).flatten(-2)


class ConditionalAttention(MultiHeadAttention):
    """Cross-attention whose score is content · content + place · place (arXiv 2108.06152, equation 2)."""

    def __init__(self, d_model: int, num_heads: int, attention_dropout: float) -> None:
        super().__init__(d_model, num_heads, attention_dropout)
        self.scaling = (2 * self.head_dim) ** -0.5
        self.q_position_proj = Linear(d_model, d_model)
        self.k_position_proj = Linear(d_model, d_model)

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        query_place: Tensor,
        key: Tensor,
        key_place: Tensor,
        attention_mask: Any,
        attn_implementation: str,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, Q, d) twice, (B, hw, d), (B or 1, hw, d) to (B, Q, d) and, from "eager" only, the weights."""
        queries = torch.cat(
            (self.heads(self.q_proj(query)), self.heads(self.q_position_proj(query_place.to(query.dtype)))), dim=-1
        )
        placed_keys = self.heads(self.k_position_proj(key_place)).expand(key.shape[0], -1, -1, -1)
        keys = torch.cat((self.heads(self.k_proj(key)), placed_keys), dim=-1)
        return self.attend(queries, keys, self.heads(self.v_proj(key)), attention_mask, attn_implementation)


class AnchorDecoderLayer(EncoderLayer):
    """Self-attention among the queries, conditional cross-attention to the image, then a feed-forward block."""

    def __init__(self, d_model: int, num_heads: int, ffn_dim: int, **kwargs: Any) -> None:
        super().__init__(d_model, num_heads, ffn_dim, **kwargs)
        self.encoder_attn = ConditionalAttention(d_model, num_heads, kwargs["attention_dropout"])
        self.encoder_attn_layer_norm = nn.LayerNorm(d_model)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        query_position_embeddings: Tensor,
        query_place: Tensor,
        first: bool,
        encoder_last_hidden_state: Tensor,
        spatial_position_embeddings: Tensor,
        query_mask: Tensor | None,
        attention_mask: Any,
        attn_implementation: str,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Args:
            hidden_states: (B, Q, d) content of the queries.
            query_position_embeddings: (B, Q, d), of the whole anchor; for the self-attention.
            query_place: (B, Q, d), of the anchor's centre; for the cross-attention.
            first: the content says nothing yet, so the anchor stands in for it in the cross-attention. (DAB-DETR's code
                then adds positions to the content of the keys, too; here places meet places in their own half only.)
            encoder_last_hidden_state: (B, hw, d); `spatial_position_embeddings` (B, hw, d) or (1, hw, d).
            query_mask, attention_mask: as for [`DecoderLayer`].

        Returns:
            as [`DecoderLayer`].
        """
        hidden_states, self_weights = self._self_attention(
            hidden_states,
            query_position_embeddings,
            query_mask,
            attn_implementation,
        )
        entered = self._enter(self.encoder_attn_layer_norm, hidden_states)
        update, cross_weights = self.encoder_attn(
            entered + query_position_embeddings if first else entered,
            query_place,
            encoder_last_hidden_state,
            spatial_position_embeddings,
            attention_mask,
            attn_implementation,
        )
        hidden_states = self._leave(self.encoder_attn_layer_norm, hidden_states, update)
        return self._feed_forward(hidden_states), self_weights, cross_weights


class AnchorDecoder(nn.Module):
    """A stack of anchor decoder layers, for "eager" and "sdpa" attention: queries and keys are twice as wide as values,
    which other kernels do not take. Each layer reads the boxes that the one before it predicted, as constants, and
    predicts better ones with the box head that all layers share (arXiv 2201.12329, section 4.2)."""

    def __init__(
        self,
        num_layers: int,
        d_model: int,
        num_heads: int,
        ffn_dim: int,
        *,
        modulate_attention: bool,
        **layer: Any,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.layers = nn.ModuleList(AnchorDecoderLayer(d_model, num_heads, ffn_dim, **layer) for _ in range(num_layers))
        self.layernorm = nn.LayerNorm(d_model)
        self.anchor_embedding = MLP([2 * d_model, d_model, d_model])
        self.place_scale = MLP([d_model, d_model, d_model]) if num_layers > 1 else None
        self.reference_size = MLP([d_model, d_model, 2]) if modulate_attention else None
        self.bbox_predictor = BoxHead(d_model)

    def _place(self, waves: Tensor, anchors: Tensor, hidden_states: Tensor, first: bool) -> Tensor:
        """Position embedding of the anchors' centres, (B, Q, d), as the content wants it: scaled (arXiv 2108.06152,
        section 3.3), and narrower or wider with the box (arXiv 2201.12329, equation 6)."""
        place = waves[..., : self.d_model]
        if self.place_scale is not None and not first:
            place = place * self.place_scale(hidden_states)
        if self.reference_size is not None:
            wanted = self.reference_size(hidden_states).sigmoid().float()  # (B, Q, 2): width, height
            ratio = wanted / anchors[..., 2:].clamp(min=1e-3)
            place = place * ratio.flip(-1).repeat_interleave(self.d_model // 2, dim=-1)  # the sines of y come first
        return place

    def forward(
        self,
        hidden_states: Tensor,
        anchors: Tensor,
        encoder_last_hidden_state: Tensor,
        spatial_position_embeddings: Tensor,
        query_mask: Tensor | None,
        attention_mask: Any,
        attn_implementation: str,
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor, tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
        """Args:
            hidden_states: (B, Q, d), the content to start with.
            anchors: (B, Q, 4) boxes, cxcywh in [0, 1] of the image without its padding.
            encoder_last_hidden_state: (B, hw, d); `spatial_position_embeddings` (B, hw, d) or (1, hw, d).
            query_mask: who sees whom among the queries, bool (1 or B, 1, Q, Q), True = attend; None: everybody.

        Returns:
            as [`Decoder`], with the boxes that each layer predicts, (layers, B, Q, 4), as the third.
        """
        states, normed, boxes, self_weights, cross_weights = [hidden_states], [], [], [], []
        for number, layer in enumerate(self.layers):
            first = number == 0
            waves = anchor_waves(anchors, self.d_model)
            hidden_states, layer_self, layer_cross = layer(
                hidden_states,
                self.anchor_embedding(waves.to(hidden_states.dtype)).to(hidden_states.dtype),
                self._place(waves, anchors, hidden_states, first),
                first,
                encoder_last_hidden_state,
                spatial_position_embeddings,
                query_mask,
                attention_mask,
                attn_implementation,
            )
            states.append(hidden_states)
            normed.append(self.layernorm(hidden_states))
            boxes.append(self.bbox_predictor(normed[-1], anchors))
            anchors = boxes[-1].detach()
            self_weights.append(layer_self)
            cross_weights.append(layer_cross)
        states[-1] = normed[-1]
        return tuple(states), torch.stack(normed), torch.stack(boxes), tuple(self_weights), tuple(cross_weights)
