"""Step 4: the encoder relates all places of the image, the decoder turns object queries into objects.

Against a plain transformer: positions are added to queries and keys at *every* attention, never to values, and all
objects are decoded in parallel (paper, section 3.2 and figure 10).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, softmax
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .linear import Linear


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, the one implementation that also returns its weights.

    Args:
        query: (B, heads, Q, head_dim); `key` and `value` (B, heads, K, head_dim).
        attention_mask: bool, True = attend, broadcast to (B, heads, Q, K); None attends to everything.

    Returns:
        output (B, Q, heads, head_dim) and weights (B, heads, Q, K).
    """
    scores = (query * scaling) @ key.transpose(2, 3)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = softmax(scores, dim=-1)  # in float32 inside, whatever the type of its numbers
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class MultiHeadAttention(nn.Module):
    """Attention over `num_heads` heads through transformers' attention interface."""

    is_causal = False  # read by the interface's implementations

    def __init__(self, d_model: int, num_heads: int, attention_dropout: float) -> None:
        super().__init__()
        self.head_dim = d_model // num_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = attention_dropout
        self.q_proj = Linear(d_model, d_model)
        self.k_proj = Linear(d_model, d_model)
        self.v_proj = Linear(d_model, d_model)
        self.o_proj = Linear(d_model, d_model)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, attn_implementation: str
    ) -> tuple[Tensor, Tensor | None]:
        """(B, Q, d), (B, K, d), (B, K, d) to (B, Q, d) and, from "eager" only, the weights (B, heads, Q, K)."""

        return self.attend(
            self.heads(self.q_proj(query)),
            self.heads(self.k_proj(key)),
            self.heads(self.v_proj(value)),
            attention_mask,
            attn_implementation,
        )

    def heads(self, states: Tensor) -> Tensor:
        """(B, tokens, d) to (B, heads, tokens, head_dim)"""
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, attn_implementation: str
    ) -> tuple[Tensor, Tensor | None]:
        """What `forward` does after its projections; all of (B, heads, tokens, head_dim)."""
        written_out = attn_implementation == "sdpa" and _written_out_is_faster(query, key)
        if written_out:
            attn_implementation = "eager"
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
        )
        return self.o_proj(output.flatten(2)), None if written_out else weights


def _written_out_is_faster(query: Tensor, key: Tensor) -> bool:
    """On a CPU in bfloat16, PyTorch's kernel takes two to four times as long as matrix multiplies and a softmax, whose
    table of weights is small for DETR's few places."""
    small = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] <= 2**25
    return query.device.type == "cpu" and query.dtype == torch.bfloat16 and small


class FeedForward(nn.Module):
    def __init__(self, d_model: int, ffn_dim: int, activation_function: str, activation_dropout: float) -> None:
        super().__init__()
        self.fc1 = Linear(d_model, ffn_dim)
        self.fc2 = Linear(ffn_dim, d_model)
        self.activation_fn = ACT2FN[activation_function]
        self.activation_dropout = activation_dropout

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.activation_fn(self.fc1(hidden_states))
        return self.fc2(dropout(hidden_states, p=self.activation_dropout, training=self.training))


class EncoderLayer(GradientCheckpointingLayer):
    """Self-attention over the image's places, then a feed-forward block."""

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        ffn_dim: int,
        *,
        dropout: float,
        attention_dropout: float,
        activation_dropout: float,
        activation_function: str,
        pre_norm: bool,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.pre_norm = pre_norm
        self.self_attn = MultiHeadAttention(d_model, num_heads, attention_dropout)
        self.self_attn_layer_norm = nn.LayerNorm(d_model)
        self.mlp = FeedForward(d_model, ffn_dim, activation_function, activation_dropout)
        self.final_layer_norm = nn.LayerNorm(d_model)

    def _enter(self, norm: nn.LayerNorm, hidden_states: Tensor) -> Tensor:
        return norm(hidden_states) if self.pre_norm else hidden_states

    def _leave(self, norm: nn.LayerNorm, residual: Tensor, update: Tensor) -> Tensor:
        hidden_states = residual + dropout(update, p=self.dropout, training=self.training)
        return hidden_states if self.pre_norm else norm(hidden_states)

    def _self_attention(
        self, hidden_states: Tensor, position_embeddings: Tensor, attention_mask: Any, attn_implementation: str
    ) -> tuple[Tensor, Tensor | None]:
        entered = self._enter(self.self_attn_layer_norm, hidden_states)
        placed = entered + position_embeddings
        update, weights = self.self_attn(placed, placed, entered, attention_mask, attn_implementation)
        return self._leave(self.self_attn_layer_norm, hidden_states, update), weights

    def _feed_forward(self, hidden_states: Tensor) -> Tensor:
        update = self.mlp(self._enter(self.final_layer_norm, hidden_states))
        return self._leave(self.final_layer_norm, hidden_states, update)

    def forward(
        self,
        hidden_states: Tensor,
        spatial_position_embeddings: Tensor,
        attention_mask: Any,
        attn_implementation: str,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, hw, d) to (B, hw, d) and the attention weights (B, heads, hw, hw) or None."""
        hidden_states, weights = self._self_attention(
            hidden_states, spatial_position_embeddings, attention_mask, attn_implementation
        )
        return self._feed_forward(hidden_states), weights


class DecoderLayer(EncoderLayer):
    """Self-attention among the queries, cross-attention from queries to the image, then a feed-forward block."""

    def __init__(self, d_model: int, num_heads: int, ffn_dim: int, **kwargs: Any) -> None:
        super().__init__(d_model, num_heads, ffn_dim, **kwargs)
        self.encoder_attn = MultiHeadAttention(d_model, num_heads, kwargs["attention_dropout"])
        self.encoder_attn_layer_norm = nn.LayerNorm(d_model)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        query_position_embeddings: Tensor,
        encoder_last_hidden_state: Tensor,
        placed_encoder_state: Tensor,
        query_mask: Tensor | None,
        attention_mask: Any,
        attn_implementation: str,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Args:
            hidden_states: (B, Q, d) content of the queries.
            query_position_embeddings: (B, Q, d) or (1, Q, d).
            encoder_last_hidden_state: (B, hw, d), the values.
            placed_encoder_state: (B, hw, d), the same with its position added, the keys.
            query_mask: for the self-attention, see [`self_attention_implementation`]; None: all see each other.
            attention_mask: for the cross-attention, hides padding.

        Returns:
            (B, Q, d), weights of the self-attention (B, heads, Q, Q) and of the cross-attention (B, heads, Q, hw), or
            None for both.
        """
        hidden_states, self_weights = self._self_attention(
            hidden_states,
            query_position_embeddings,
            query_mask,
            self_attention_implementation(query_mask, attn_implementation),
        )
        entered = self._enter(self.encoder_attn_layer_norm, hidden_states)
        update, cross_weights = self.encoder_attn(
            entered + query_position_embeddings,
            placed_encoder_state,
            encoder_last_hidden_state,
            attention_mask,
            attn_implementation,
        )
        hidden_states = self._leave(self.encoder_attn_layer_norm, hidden_states, update)
        return self._feed_forward(hidden_states), self_weights, cross_weights


def self_attention_implementation(query_mask: Tensor | None, attn_implementation: str) -> str:
    """Which implementation takes a mask among the queries: bool, (1 or B, 1, Q, Q), True = attend. Only training has
    one, and the queries are few: what "eager" does not do, "sdpa" does."""
    return attn_implementation if query_mask is None or attn_implementation == "eager" else "sdpa"


class Encoder(nn.Module):
    """A stack of encoder layers; pre-norm needs one more norm at its end."""

    def __init__(self, num_layers: int, d_model: int, num_heads: int, ffn_dim: int, **layer: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(d_model, num_heads, ffn_dim, **layer) for _ in range(num_layers))
        self.layernorm = nn.LayerNorm(d_model) if layer["pre_norm"] else nn.Identity()

    def forward(
        self,
        hidden_states: Tensor,
        spatial_position_embeddings: Tensor,
        attention_mask: Any,
        attn_implementation: str,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """(B, hw, d) to the hidden states (input, after each layer; the last one is the encoder's result, each
        (B, hw, d)) and the attention weights of each layer."""
        states, weights = [hidden_states], []
        for layer in self.layers:
            hidden_states, layer_weights = layer(
                hidden_states, spatial_position_embeddings, attention_mask, attn_implementation
            )
            states.append(hidden_states)
            weights.append(layer_weights)
        states[-1] = self.layernorm(states[-1])
        return tuple(states), tuple(weights)


class Decoder(nn.Module):
    """A stack of decoder layers. The final norm is applied to a *copy* of each layer's output: what the next layer
    reads is not normed, with auxiliary losses or without."""

    def __init__(self, num_layers: int, d_model: int, num_heads: int, ffn_dim: int, **layer: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(d_model, num_heads, ffn_dim, **layer) for _ in range(num_layers))
        self.layernorm = nn.LayerNorm(d_model)

    def forward(
        self,
        query_position_embeddings: Tensor,
        encoder_last_hidden_state: Tensor,
        spatial_position_embeddings: Tensor,
        query_mask: Tensor | None,
        attention_mask: Any,
        attn_implementation: str,
    ) -> tuple[tuple[Tensor, ...], Tensor, tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
        """Args:
            query_position_embeddings: (Q, d), the learned object queries; their content starts at zero.
            encoder_last_hidden_state: (B, hw, d); `spatial_position_embeddings` (B, hw, d) or (1, hw, d).
            query_mask: who sees whom among the queries, see [`self_attention_implementation`].

        Returns:
            hidden states (zeros, after each layer but the last, the normed result; each (B, Q, d)), normed copies of
            each layer's output (layers, B, Q, d), self-attention weights, cross-attention weights.
        """
        batch_size = encoder_last_hidden_state.shape[0]
        query_positions = query_position_embeddings.to(encoder_last_hidden_state.dtype)[None].expand(batch_size, -1, -1)
        placed_encoder_state = encoder_last_hidden_state + spatial_position_embeddings
        hidden_states = torch.zeros_like(query_positions)
        states, normed, self_weights, cross_weights = [hidden_states], [], [], []
        for layer in self.layers:
            hidden_states, layer_self, layer_cross = layer(
                hidden_states,
                query_positions,
                encoder_last_hidden_state,
                placed_encoder_state,
                query_mask,
                attention_mask,
                attn_implementation,
            )
            states.append(hidden_states)
            normed.append(self.layernorm(hidden_states))
            self_weights.append(layer_self)
            cross_weights.append(layer_cross)
        states[-1] = normed[-1]
        return tuple(states), torch.stack(normed), tuple(self_weights), tuple(cross_weights)
