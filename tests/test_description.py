"""`model.describe`: the table of a model's parts."""

import pytest
import torch

from hf_detr import DetrConfig, DetrForDetection, DetrForSegmentation

SMALL = {
    "backbone": "test_resnet", "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 48, "num_queries": 6, "attn_implementation": "eager",
}  # fmt: skip


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_operations_are_those_of_the_formula(attention):
    model = DetrForDetection(DetrConfig(**SMALL | {"attn_implementation": attention})).train()
    images = torch.zeros(2, 3, 64, 96)
    result = model.describe(images)
    assert model.training
    stages = {stage.name: stage for stage in result.stages}
    with torch.no_grad():
        rows, columns = model.eval()(images).feature_mask.shape[-2:]
    n, d, hw, q = 2, 32, rows * columns, 6
    projections = 2 * n * hw * d * d * 4
    attention = 2 * n * hw * hw * d * 2  # scores, and the weighted sum of values
    feed_forward = 2 * n * hw * d * 64 * 2
    assert stages["encoder"].flops == 2 * (projections + attention + feed_forward)
    own = 2 * n * q * d * d * 4 + 2 * n * q * q * d * 2
    cross = 2 * n * q * d * d * 2 + 2 * n * hw * d * d * 2 + 2 * n * q * hw * d * 2
    boxes = 2 * n * q * (d * d * 2 + d * 4)  # of every layer
    assert stages["decoder, box head"].flops == 3 * (own + cross + 2 * n * q * d * 48 * 2 + boxes)
    assert stages["class head"].flops == 2 * n * q * d * 3
    assert result.whole.flops == sum(stage.flops for stage in result.stages)
    assert stages["encoder"].shapes == f"2 x {hw} x 32"
    assert stages["decoder, box head"].shapes == "3 x 2 x 6 x 32"


def test_parameters_add_up_and_frozen_ones_are_not_trained():
    model = DetrForDetection(DetrConfig(**SMALL | {"query_type": "anchor", "denoising_groups": 1}))
    result = model.describe(torch.zeros(1, 3, 64, 64))
    everything = list(model.parameters())
    assert sum(stage.parameters for stage in result.stages) == sum(p.numel() for p in everything)
    assert sum(s.trained for s in result.stages) == sum(p.numel() for p in everything if p.requires_grad)
    backbone = result.stages[0]
    assert backbone.name == "backbone"
    assert backbone.trained < backbone.parameters
    assert "queries, training-only parts" in str(result)


@pytest.mark.parametrize(
    ("kind", "fields", "name"),
    [
        (DetrForSegmentation, {}, "mask head"),
        (DetrForDetection, {"query_type": "anchor", "query_proposals": True, "dense_loss_coefficient": 1}, "proposals"),
    ],
)
def test_parts_that_only_some_models_have_are_listed(kind, fields, name):
    result = kind(DetrConfig(**SMALL | fields)).describe(torch.zeros(1, 3, 64, 64))
    stage = {stage.name: stage for stage in result.stages}[name]
    assert stage.flops > 0
    assert stage.milliseconds > 0
    assert " x " in stage.shapes
    assert len(str(result).splitlines()) == len(result.stages) + 3
