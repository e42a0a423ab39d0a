"""Config, initialisation, saving and loading, Auto classes, and defects seen in other implementations of DETR."""

import math

import pytest
import torch
import transformers
from conftest import random_labels, tiny_config, tiny_model
from huggingface_hub.errors import StrictDataclassError
from torch import nn

import hf_detr
from hf_detr import DetrConfig, DetrForDetection, DetrModel
from hf_detr.model.attention import MultiHeadAttention


def test_auto_classes_know_our_models(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert type(transformers.AutoConfig.from_pretrained(tmp_path)) is DetrConfig
    assert type(transformers.AutoModel.from_pretrained(tmp_path)) is DetrModel
    loaded = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path)
    assert type(loaded) is DetrForDetection
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(loaded(images).logits, model(images).logits)


def test_transformers_own_detr_is_untouched():
    config = transformers.DetrConfig(num_labels=3)
    with torch.device("meta"):
        model = transformers.AutoModelForObjectDetection.from_config(config)
    assert type(model) is transformers.DetrForObjectDetection


def test_checkpoints_are_stable_from_round_to_round(tmp_path):
    tiny_model().save_pretrained(tmp_path / "a")
    DetrForDetection.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 30}, "must be a multiple"),
        ({"d_model": 6, "encoder_attention_heads": 1, "decoder_attention_heads": 1}, "multiple of 4"),
        ({"encoder_attention_heads": 7}, "encoder_attention_heads"),
        ({"position_embedding_type": "rotary"}, "sine"),
        ({"class_cost": 0, "bbox_cost": 0, "giou_cost": 0}, "not all 0"),
        ({"num_queries": 0}, "num_queries"),
        ({"frozen_stages": -2}, "frozen_stages"),
        ({"num_queries": "many"}, "num_queries"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(StrictDataclassError, match=message):
        tiny_config(**change)


def test_initialisation_is_the_papers():
    """Xavier-uniform matrices (query, key and value as one (3d, d) matrix), N(0, 1) queries, PyTorch's heads."""
    model = DetrForDetection(tiny_config(d_model=128, num_queries=100, encoder_ffn_dim=256))
    layer = model.model.encoder.layers[0]
    for weight, bound in (
        (layer.self_attn.q_proj.weight, math.sqrt(6 / (128 + 3 * 128))),
        (layer.self_attn.o_proj.weight, math.sqrt(6 / (128 + 128))),
        (layer.mlp.fc1.weight, math.sqrt(6 / (128 + 256))),
        (model.class_labels_classifier.weight, 1 / math.sqrt(128)),
        (model.bbox_predictor.layers[0].bias, 1 / math.sqrt(128)),
    ):
        assert 0.9 * bound < weight.abs().max().item() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)
    assert layer.self_attn.q_proj.bias.abs().max() == 0
    queries = model.model.query_position_embeddings.weight
    assert queries.std().item() == pytest.approx(1, rel=0.03)


def test_weights_missing_from_a_checkpoint_are_initialised_not_left_over(tmp_path):
    """Also those of the backbone, and buffers that no checkpoint holds."""
    model = tiny_model(
        backbone="swin_tiny_patch4_window7_224", backbone_kwargs={"depths": (1, 1, 1, 1), "embed_dim": 24}
    )
    state = {k: v for k, v in model.state_dict().items() if "fc1" not in k and "layers_0.blocks.0.mlp" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = DetrForDetection.from_pretrained(tmp_path)
    again = dict(loaded.named_parameters())
    for name, parameter in model.named_parameters():
        assert again[name].isfinite().all()
        if name in state:
            assert torch.equal(again[name], parameter), name
    weight = loaded.model.encoder.layers[0].mlp.fc1.weight
    assert 0.8 < weight.abs().max().item() / math.sqrt(6 / (32 + 48)) <= 1
    timm_weight = again["model.backbone.model.layers_0.blocks.0.mlp.fc1.weight"]
    assert 0.015 < timm_weight.std().item() < 0.025  # timm's truncated normal
    buffers = dict(loaded.named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffers[name], buffer), name


def test_switching_auxiliary_losses_on_does_not_change_predictions():
    """They do in transformers, which feeds each layer's normed output to the next."""
    on, off = tiny_model(auxiliary_loss=True), tiny_model(auxiliary_loss=False)
    off.load_state_dict(on.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(on(images).logits, off(images).logits)
    assert torch.equal(on(images, labels=random_labels([1, 2])).logits, off(images).logits)


def test_backbone_freezing_works_on_timm_networks():
    """It freezes nothing there in transformers."""
    model = tiny_model(backbone="resnet18")
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert len(frozen) == 5  # the stem's convolution and four of the first stage; norms are buffers
    assert all("conv1" in n or "layer1" in n for n in frozen)


def test_learned_positions_on_grids_beyond_50():
    """The paper's code ends at 50 rows or columns."""
    model = tiny_model(position_embedding_type="learned", feature_stride=8)
    with torch.no_grad():
        assert model(torch.randn(1, 3, 416, 480)).logits.isfinite().all()


def test_a_label_id_equal_to_num_labels_is_refused():
    """It is the index of "no object"."""
    labels = random_labels([1])
    labels[0]["class_labels"][:] = 5
    with pytest.raises(ValueError, match=r"not in \[0, 5\)"):
        tiny_model()(torch.randn(1, 3, 64, 64), labels=labels)


def test_nan_pixels_are_reported_as_such():
    """And do not end in a failed check inside GIoU."""
    images = torch.randn(1, 3, 64, 64)
    images[0, 0, 5, 5] = float("nan")
    with pytest.raises(FloatingPointError, match="`logits` is NaN"):
        tiny_model()(images, labels=random_labels([1]))


def test_wrong_shapes_of_images_are_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"must be \(batch, 3, height, width\)"):
        model(torch.randn(2, 1, 64, 64))
    with pytest.raises(ValueError, match=r"`pixel_mask` must be \(2, 64, 64\)"):
        model(torch.randn(2, 3, 64, 64), torch.ones(2, 32, 32))


def test_one_class_and_one_decoder_layer():
    model = tiny_model(num_labels=1, decoder_layers=1)
    labels = [{"class_labels": torch.zeros(1, dtype=torch.long), "boxes": torch.full((1, 4), 0.5)}]
    outputs = model(torch.randn(1, 3, 64, 64), labels=labels)
    assert outputs.auxiliary_outputs == []
    assert outputs.logits.shape == (1, 12, 2)
    outputs.loss.backward()


def test_bfloat16_autocast_trains_and_predicts():
    model = tiny_model().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(torch.randn(2, 3, 64, 64), labels=random_labels([1, 2]))
    assert outputs.loss.dtype == torch.float32
    assert outputs.pred_boxes.dtype == torch.float32  # bfloat16 would round boxes to 1/256 of the image
    outputs.loss.backward()
    half = tiny_model().to(torch.bfloat16)
    assert half(torch.randn(1, 3, 64, 64, dtype=torch.bfloat16)).logits.dtype == torch.bfloat16


def test_grey_and_many_channel_images():
    model = tiny_model(num_channels=5)
    assert model(torch.randn(1, 5, 64, 64)).logits.shape == (1, 12, 6)


def test_every_attention_goes_through_the_interface():
    attentions = [m for m in tiny_model().modules() if isinstance(m, MultiHeadAttention)]
    assert len(attentions) == 2 + 3 * 2
    assert not any(isinstance(m, nn.MultiheadAttention) for m in tiny_model().modules())


def test_public_names():
    for name in hf_detr.__all__:
        assert getattr(hf_detr, name).__doc__
    assert hf_detr.DetrImageProcessor.__doc__


def test_an_argument_that_no_model_has_is_refused_by_name():
    images = torch.randn(1, 3, 64, 64)
    with pytest.raises(TypeError, match="pixel_msk"):
        tiny_model()(images, pixel_msk=torch.ones(1, 64, 64))
    with pytest.raises(TypeError, match="label_ids"):
        tiny_model().model(images, label_ids=3)


def test_trainer_divides_the_loss_by_the_accumulated_batches():
    """A `forward` with **kwargs would be taken for one that does it by itself."""
    assert tiny_model().accepts_loss_kwargs is False


def test_the_alias_for_code_that_comes_from_transformers():
    assert hf_detr.DetrForObjectDetection is DetrForDetection


def test_another_number_of_queries_in_the_config_than_in_the_model_is_refused():
    model = tiny_model()
    model.config.num_queries = 6
    with pytest.raises(ValueError, match="num_queries=6, but the model has 12 queries"):
        model(torch.randn(1, 3, 64, 64))
    model.config.num_queries = 12
    model.resize_queries(6)
    assert model(torch.randn(1, 3, 64, 64)).logits.shape[1] == 6


def test_the_feature_mask_has_the_values_of_a_pixel_mask():
    """By hand: at stride 32, an image of 64 x 96 fills 2 x 3 locations of a batch of 96 x 96. transformers' common
    tests subtract outputs from one another, which bool tensors do not allow."""
    model = tiny_model().eval()
    mask = torch.ones(2, 96, 96)
    mask[0, 64:] = 0
    padded = model(torch.randn(2, 3, 96, 96) * mask[:, None], mask).feature_mask
    assert padded.dtype == torch.int64
    assert padded.tolist() == [[[1, 1, 1], [1, 1, 1], [0, 0, 0]], [[1, 1, 1]] * 3]
    assert model(torch.randn(1, 3, 96, 96)).feature_mask.tolist() == [[[1, 1, 1]] * 3]
