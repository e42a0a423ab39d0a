"""`prepare_for_inference`: the same predictions from a copy that is made for them."""

import pickle

import pytest
import torch
from conftest import padded_batch, randomise_norms, relative_difference, tiny_model

from hf_detr.model.folding import FoldedConv2d

MODELS = {
    "frozen norms": {},
    "norms that train": {"freeze_batch_norm": False, "frozen_stages": -1},
    "norms with activations": {"backbone": "efficientnet_b0", "feature_stride": 16},
    "no batch norm": {"backbone": "convnext_atto", "feature_stride": 16},
    "windows": {"backbone": "swin_tiny_patch4_window7_224", "feature_stride": 8},
    "anchors": {"query_type": "anchor", "dense_loss_coefficient": 1, "query_groups": 2},
    "learned positions, pre-norm": {"position_embedding_type": "learned", "pre_norm": True},
}


@pytest.fixture(params=MODELS)
def model(request):
    model = tiny_model(**MODELS[request.param])
    randomise_norms(model)
    return model


@torch.no_grad()
def test_predictions_are_the_models_and_the_model_stays_as_it_is(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prepared = model.prepare_for_inference()
    images, mask = padded_batch([(64, 96), (80, 64), (64, 96)])
    for inputs in ((images,), (images, mask), (images[:1],)):
        ours, theirs = prepared(*inputs), model(*inputs)
        assert relative_difference(ours.logits, theirs.logits) < 1e-5
        assert relative_difference(ours.pred_boxes, theirs.pred_boxes) < 1e-5
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(isinstance(module, FoldedConv2d) and module.norm for module in prepared.modules())


@torch.no_grad()
def test_bfloat16_keeps_heads_and_boxes_in_float32(model):
    prepared = model.prepare_for_inference(torch.bfloat16)
    images = torch.randn(2, 3, 64, 96)
    ours, theirs = prepared(images), model(images)  # float32 images are taken as well
    assert prepared.dtype == torch.bfloat16
    assert ours.logits.dtype == ours.pred_boxes.dtype == torch.float32
    assert (ours.pred_boxes - theirs.pred_boxes).abs().max() < 0.05
    assert (ours.pred_boxes != ours.pred_boxes.bfloat16()).any()


@torch.no_grad()
def test_a_bfloat16_model_stays_one_unless_told_otherwise():
    model = tiny_model().bfloat16()
    assert model.prepare_for_inference().dtype == torch.bfloat16
    assert model.prepare_for_inference(torch.float32).dtype == torch.float32


def test_a_prepared_copy_neither_trains_nor_saves(tmp_path):
    model = tiny_model().train()
    prepared = model.prepare_for_inference()
    assert model.training
    assert not prepared.training
    with pytest.raises(ValueError, match="prepared for prediction"):
        prepared.train()
    with pytest.raises(ValueError, match="prepared for prediction"):
        prepared.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    assert not any(parameter.requires_grad for parameter in prepared.parameters())


@torch.no_grad()
def test_preparing_twice_is_preparing_once():
    model = tiny_model()
    randomise_norms(model)
    images = torch.randn(1, 3, 64, 64)
    once = model.prepare_for_inference()
    assert torch.equal(once.prepare_for_inference()(images).logits, once(images).logits)


@torch.no_grad()
def test_a_copy_goes_to_another_process():
    model = tiny_model()
    images = torch.randn(1, 3, 64, 64)
    for prepared in (model.prepare_for_inference(), model.prepare_for_inference("bfloat16")):
        again = pickle.loads(pickle.dumps(prepared))
        assert torch.equal(again(images).logits, prepared(images).logits)


@torch.no_grad()
def test_a_compiled_copy_can_be_prepared_again():
    """Functions are not copied with what they are called on. Nothing is compiled before the first call."""
    model = tiny_model()
    images = torch.randn(1, 3, 64, 64)
    again = model.prepare_for_inference(compile=True).prepare_for_inference(torch.bfloat16)
    assert torch.equal(again(images).logits, model.prepare_for_inference(torch.bfloat16)(images).logits)


def test_a_dtype_that_there_is_not_is_refused():
    assert tiny_model().prepare_for_inference("bfloat16").dtype == torch.bfloat16
    with pytest.raises(ValueError, match='no dtype "bf16"'):
        tiny_model().prepare_for_inference("bf16")


@torch.no_grad()
def test_compiled_copies_take_other_sizes():
    """How few recompiles real sizes need is measured by `benchmarks/inference.py`; tiny networks need more."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny_model(encoder_layers=1, decoder_layers=1)
    randomise_norms(model)
    prepared = model.prepare_for_inference(compile=True)
    for height, width in ((224, 288), (256, 300)):
        images = torch.randn(1, 3, height, width)
        ours, theirs = prepared(images), model(images)
        assert relative_difference(ours.logits, theirs.logits) < 1e-4
        assert relative_difference(ours.pred_boxes, theirs.pred_boxes) < 1e-4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
