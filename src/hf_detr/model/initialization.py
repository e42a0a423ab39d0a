"""The initial weights: the paper's (section A.4 and its code). Nothing that a checkpoint has filled is overwritten."""

import math

import torch
from torch import nn
from transformers import initialization as init

from .attention import Attention, ConditionalAttention, PositionedSelfAttention
from .backbone import Backbone
from .configuration_hf_detr import DetrConfig
from .decoder import DetrDecoder
from .dense_supervision import PRIOR, DenseHead
from .encoder import Encoder, FeedForward
from .heads import MLP, inverse_sigmoid
from .position_embedding import LearnedPositionEmbedding
from .proposals import Proposals
from .queries import Denoising


def init_module(module: nn.Module, config: DetrConfig) -> None:
    """Initial weights of one part of the model; parts that contain it are initialised after it."""
    if isinstance(module, Backbone):
        module.reset_parameters()
        module.freeze()
    elif isinstance(module, (Encoder, DetrDecoder)):
        init_transformer(module, config.init_xavier_std)
    elif isinstance(module, LearnedPositionEmbedding):
        init.uniform_(module.row_embeddings.weight)
        init.uniform_(module.column_embeddings.weight)
    elif isinstance(module, Denoising):
        init.normal_(module.class_embedding.weight)
    elif isinstance(module, Proposals):
        init_mlp(module.overlap_embedding)
    elif isinstance(module, DenseHead):
        init_class_head(module.class_labels_classifier, PRIOR)
        init_mlp(module.bbox_predictor)


def init_as_torch(layer: nn.Linear | nn.Conv2d) -> None:
    """PyTorch's default for linear layers and convolutions."""
    bound = layer.weight[0].numel() ** -0.5
    init.uniform_(layer.weight, -bound, bound)
    init.uniform_(layer.bias, -bound, bound)


def init_mlp(mlp: MLP) -> None:
    for layer in mlp.layers:
        if isinstance(layer, nn.Linear):
            init_as_torch(layer)


def init_transformer(stack: Encoder | DetrDecoder, gain: float) -> None:
    """Xavier-uniform matrices as in the paper's code, where query, key and value form one (3d, d) matrix: its bound is
    the square root of 1/2 of the one for a (d, d) matrix. Attention biases are 0, those of feed-forward PyTorch's."""
    for module in stack.modules():
        if isinstance(module, Attention):
            for projection in (module.q_proj, module.k_proj, module.v_proj, module.o_proj):
                fused = projection is not module.o_proj
                init.xavier_uniform_(projection.weight, gain=gain * (0.5**0.5 if fused else 1.0))
                init.zeros_(projection.bias)
            for projection in _position_projections(module):
                init.xavier_uniform_(projection.weight, gain=gain)
                init.zeros_(projection.bias)
        elif isinstance(module, MLP):
            init_mlp(module)
        elif isinstance(module, FeedForward):
            for layer in (module.fc1, module.fc2):
                init.xavier_uniform_(layer.weight, gain=gain)
                bound = layer.in_features**-0.5
                init.uniform_(layer.bias, -bound, bound)
            if isinstance(module.activation_fn, nn.PReLU):
                init.constant_(module.activation_fn.weight, 0.25)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
    if isinstance(stack, DetrDecoder) and stack.predicts_offsets:  # which start at 0
        init.zeros_(stack.bbox_predictor.layers[-1].weight)
        init.zeros_(stack.bbox_predictor.layers[-1].bias)


def _position_projections(attention: Attention) -> list[nn.Linear]:
    """Of positions, which have matrices of their own."""
    if not isinstance(attention, (ConditionalAttention, PositionedSelfAttention)):
        return []
    added = [attention.q_added_proj] if isinstance(attention, ConditionalAttention) and attention.q_added_proj else []
    return [attention.q_position_proj, attention.k_position_proj, *added]


def init_queries(queries: nn.Embedding, are_boxes: bool) -> None:
    """N(0, 1) for learned queries. Anchors cover the image evenly: their centres are the R2 sequence of M. Roberts (a
    low-discrepancy sequence, evenly distributed at any length), their sides a quarter of the image's."""
    if not are_boxes:
        init.normal_(queries.weight)
        return
    number = torch.arange(1, queries.num_embeddings + 1, dtype=torch.float64, device="cpu")
    step = torch.tensor([1 / 1.32471795724474602596, 1 / 1.32471795724474602596**2], dtype=torch.float64, device="cpu")
    centers = ((0.5 + number[:, None] * step) % 1).float()
    boxes = torch.cat((centers, torch.full_like(centers, 0.25)), dim=1)
    init.copy_(queries.weight, inverse_sigmoid(boxes))


def init_class_head(head: nn.Linear, prior_probability: float | None, *, has_no_object: bool = True) -> None:
    """PyTorch's default, or a bias that gives the prior probability (arXiv 1708.02002, 4.1): to all classes together
    beside "no object", or to each class of a head without it."""
    init_as_torch(head)
    if prior_probability is not None:
        log_odds = math.log(prior_probability / (1 - prior_probability))
        bias = torch.zeros(head.out_features, device="cpu")
        if has_no_object:
            bias[-1] = math.log(head.out_features - 1) - log_odds
        else:
            bias += log_odds
        init.copy_(head.bias, bias)
