"""Equal weights give what transformers' DETR gives (auxiliary_loss=False, where it follows the paper)."""

import pytest
import torch
from conftest import padded_batch, random_labels, randomise_norms, relative_difference, tiny_model, transformers_twin

TOLERANCE = 1e-5
STATES = ("logits", "pred_boxes", "last_hidden_state", "encoder_last_hidden_state")


@pytest.fixture(params=["resnet18", "sine-dc5", "learned"])
def models(request):
    changes = {
        "resnet18": {"backbone": "resnet18"},
        "sine-dc5": {"backbone": "resnet26", "dilation": True},
        "learned": {"backbone": "test_resnet", "position_embedding_type": "learned"},
    }[request.param]
    ours = tiny_model(auxiliary_loss=False, dropout=0.0, **changes)
    randomise_norms(ours)
    return ours, transformers_twin(ours, **({"dilation": True} if "dilation" in changes else {}))


@pytest.fixture
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_float64")  # in float32 a ReLU may say otherwise about a value near 0
def test_states_losses_and_gradients_equal_those_of_transformers(models):
    ours, theirs = models[0].double(), models[1].double()
    images, labels = torch.randn(3, 3, 96, 128), random_labels([2, 0, 5])
    a = ours(images, labels=labels, output_hidden_states=True)
    b = theirs(images, labels=labels, output_hidden_states=True)
    for name in STATES:
        assert relative_difference(a[name], b[name]) < TOLERANCE, name
    for name in ("encoder_hidden_states", "decoder_hidden_states"):
        assert len(a[name]) == len(b[name])
        for x, y in zip(a[name], b[name], strict=True):
            assert relative_difference(x, y) < TOLERANCE, name
    assert a.loss_dict.keys() == b.loss_dict.keys()
    for name, value in b.loss_dict.items():
        assert a.loss_dict[name].item() == pytest.approx(value.item(), abs=TOLERANCE, rel=TOLERANCE), name
    a.loss.backward()
    b.loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    compared = 0
    for name, parameter in ours.named_parameters():
        if parameter.grad is not None:
            assert (
                relative_difference(parameter.grad, gradients[name.replace("model.decoder.bbox", "bbox")]) < TOLERANCE
            ), name
            compared += 1
    assert compared > 100


def test_each_image_of_a_padded_batch_equals_transformers_on_that_image_alone(models):
    ours, theirs = models
    sizes = [(96, 128), (64, 100), (80, 70)]
    images, mask = padded_batch(sizes)
    with torch.no_grad():
        batch = ours(images, mask)
        for index, (height, width) in enumerate(sizes):
            alone = theirs(images[index : index + 1, :, :height, :width])
            assert relative_difference(batch.logits[index], alone.logits[0]) < TOLERANCE
            assert relative_difference(batch.pred_boxes[index], alone.pred_boxes[0]) < TOLERANCE


def test_attentions_equal_those_of_transformers():
    ours = tiny_model(auxiliary_loss=False)
    theirs = transformers_twin(ours)
    theirs.set_attn_implementation("eager")
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        a, b = ours(images, output_attentions=True), theirs(images, output_attentions=True)
    for name in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        for x, y in zip(a[name], b[name], strict=True):
            assert relative_difference(x, y) < TOLERANCE, name
