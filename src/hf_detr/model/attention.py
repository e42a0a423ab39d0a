"""Step 4: multi-head attention, the paper's and the one that anchors use, through transformers' attention interface."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


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
    """Attention written out, the only implementation that also returns its weights.

    Args:
        query: (B, heads, Q, head_dim); `key` and `value` (B, heads, K, head_dim).
        attention_mask: bool, True = attend, broadcast to (B, heads, Q, K); None attends to everything.

    Returns:
        output (B, Q, heads, head_dim) and weights (B, heads, Q, K).
    """
    scores = (query * scaling) @ key.transpose(2, 3)
    if attention_mask is not None:
        # added, because filling copies the scores twice; half of the minimum, because the sum must not overflow
        bias = torch.zeros_like(attention_mask, dtype=scores.dtype)
        scores = scores + bias.masked_fill_(~attention_mask, torch.finfo(scores.dtype).min / 2)
    weights = nn.functional.softmax(scores, dim=-1)  # accumulates in float32 in every dtype
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class Attention(nn.Module):
    """What every kind of attention shares: value and output projections, and the call of an implementation.

    Args:
        score_width: channels per head that queries and keys are compared in.
    """

    is_causal = False  # read by the interface's implementations

    def __init__(self, d_model: int, num_heads: int, attention_dropout: float, score_width: int) -> None:
        super().__init__()
        self.head_dim = d_model // num_heads
        self.scaling = score_width**-0.5
        self.attention_dropout = attention_dropout
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.o_proj = nn.Linear(d_model, d_model)

    def split_heads(self, states: Tensor) -> Tensor:
        """(B, tokens, d) to (B, heads, tokens, head_dim)"""
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, attn_implementation: str, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Everything after the projections of query, key and value, each (B, heads, tokens, width)."""
        attention_function: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            attn_implementation, eager_attention_forward
        )
        output, weights = attention_function(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.flatten(2)), weights


class MultiHeadAttention(Attention):
    """Scaled dot-product attention over `num_heads` heads (paper, section A.1)."""

    def __init__(self, d_model: int, num_heads: int, attention_dropout: float) -> None:
        super().__init__(d_model, num_heads, attention_dropout, score_width=d_model // num_heads)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, attn_implementation: str, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(B, Q, d), (B, K, d), (B, K, d) to (B, Q, d) and, from "eager" only, the weights (B, heads, Q, K)."""
        queries, keys = self.split_heads(self.q_proj(query)), self.split_heads(self.k_proj(key))
        values = self.split_heads(self.v_proj(value))
        return self.attend(queries, keys, values, attention_mask, attn_implementation, **kwargs)


class PositionedSelfAttention(Attention):
    """Self-attention in which contents and positions have projections of their own, whose sums are compared (the
    decoders of Conditional DETR's and DAB-DETR's code)."""

    def __init__(self, d_model: int, num_heads: int, attention_dropout: float) -> None:
        super().__init__(d_model, num_heads, attention_dropout, score_width=d_model // num_heads)
        self.q_position_proj = nn.Linear(d_model, d_model)
        self.k_position_proj = nn.Linear(d_model, d_model)

    def forward(
        self, content: Tensor, positions: Tensor, attention_mask: Any, attn_implementation: str, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(B, Q, d) twice to (B, Q, d) and, from "eager" only, the weights (B, heads, Q, Q)."""
        queries = self.split_heads(self.q_proj(content) + self.q_position_proj(positions))
        keys = self.split_heads(self.k_proj(content) + self.k_position_proj(positions))
        values = self.split_heads(self.v_proj(content))
        return self.attend(queries, keys, values, attention_mask, attn_implementation, **kwargs)


class ConditionalAttention(Attention):
    """Cross-attention with scores content · content + position · position (arXiv 2108.06152, equation 2).

    Args:
        adds_positions: also add a projected position of the query to its content, and the projected position of the key
            to its content, as the code of Conditional DETR does in the first layer, where the content carries no
            information yet.
    """

    def __init__(self, d_model: int, num_heads: int, attention_dropout: float, *, adds_positions: bool = False) -> None:
        super().__init__(d_model, num_heads, attention_dropout, score_width=2 * d_model // num_heads)
        self.q_position_proj = nn.Linear(d_model, d_model)
        self.k_position_proj = nn.Linear(d_model, d_model)
        self.q_added_proj = nn.Linear(d_model, d_model) if adds_positions else None

    def forward(
        self,
        query: Tensor,
        query_position: Tensor,
        key: Tensor,
        key_position: Tensor,
        attention_mask: Any,
        attn_implementation: str,
        *,
        added_position: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, Q, d) twice, (B, hw, d), (B or 1, hw, d) to (B, Q, d) and, from "eager" only, the weights.
        `added_position` (B, Q, d) is what `adds_positions` adds."""
        positions, query_content, key_content = self.k_position_proj(key_position), self.q_proj(query), self.k_proj(key)
        if self.q_added_proj is not None:
            query_content = query_content + self.q_added_proj(added_position)
            key_content = key_content + positions
        query_position = self.split_heads(self.q_position_proj(query_position.to(query.dtype)))
        key_position = self.split_heads(positions).expand(key.shape[0], -1, -1, -1)
        queries = torch.cat((self.split_heads(query_content), query_position), dim=-1)
        keys = torch.cat((self.split_heads(key_content), key_position), dim=-1)
        values = self.split_heads(self.v_proj(key))
        return self.attend(queries, keys, values, attention_mask, attn_implementation, **kwargs)
