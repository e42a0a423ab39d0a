"""`hf_detr.speed`: the same predictions from a faster copy, the same training in place, and what each refuses."""

import io
import pickle
from copy import deepcopy

import accelerate
import pytest
import torch
from conftest import padded_batch, random_labels, randomise_norms, relative_difference, tiny_config, tiny_model
from timm.layers.conv2d_same import Conv2dSame
from torch import nn

from hf_detr import DetrForDetection
from hf_detr.speed import prepare_for_inference, prepare_for_training
from hf_detr.speed.depthwise import WideConv2d, has_slow_gradient, narrow, widen
from hf_detr.speed.folding import FoldedConv2d

MODELS = {
    "frozen norms": {},
    "norms that train": {"freeze_batch_norm": False, "frozen_stages": -1},
    "norms with activations": {"backbone": "test_efficientnet", "feature_stride": 16},
    "no batch norm": {"backbone": "test_convnext", "feature_stride": 16},
    "windows": {"backbone": "swin_tiny_patch4_window7_224", "feature_stride": 8, "backbone_kwargs": {"embed_dim": 24}},
    "anchors": {"query_type": "anchor", "dense_loss_coefficient": 1, "denoising_groups": 2},
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
    prepared = prepare_for_inference(model)
    images, mask = padded_batch([(64, 96), (80, 64), (64, 96)])
    for inputs in ((images,), (images, mask), (images[:1],)):
        ours, theirs = prepared(*inputs), model(*inputs)
        assert relative_difference(ours.logits, theirs.logits) < 1e-5
        assert relative_difference(ours.pred_boxes, theirs.pred_boxes) < 1e-5
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    norms = [m for m in prepared.model.backbone.modules() if "BatchNorm" in type(m).__name__]
    assert not norms or len(norms) < len([m for m in model.model.backbone.modules() if "BatchNorm" in type(m).__name__])


@torch.no_grad()
def test_bfloat16_keeps_heads_and_boxes_in_float32(model):
    prepared = prepare_for_inference(model, torch.bfloat16)
    images = torch.randn(2, 3, 64, 96)
    ours, theirs = prepared(images), model(images)  # float32 images are taken as well
    assert prepared.dtype == torch.bfloat16
    assert ours.logits.dtype == ours.pred_boxes.dtype == torch.float32
    assert (ours.pred_boxes - theirs.pred_boxes).abs().max() < 0.05
    assert (ours.pred_boxes != ours.pred_boxes.bfloat16()).any()


@torch.no_grad()
def test_a_bfloat16_model_stays_one_unless_told_otherwise():
    model = tiny_model().bfloat16()
    assert prepare_for_inference(model).dtype == torch.bfloat16
    assert prepare_for_inference(model, torch.float32).dtype == torch.float32


def test_a_prepared_copy_neither_trains_nor_saves(tmp_path):
    model = tiny_model().train()
    prepared = prepare_for_inference(model)
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
    once = prepare_for_inference(model)
    assert torch.equal(prepare_for_inference(once)(images).logits, once(images).logits)


@torch.no_grad()
def test_a_copy_goes_to_another_process():
    model = tiny_model()
    images = torch.randn(1, 3, 64, 64)
    for prepared in (prepare_for_inference(model), prepare_for_inference(model, "bfloat16")):
        again = pickle.loads(pickle.dumps(prepared))
        assert torch.equal(again(images).logits, prepared(images).logits)


@torch.no_grad()
def test_a_compiled_copy_can_be_prepared_again():
    """Functions are not copied with what they are called on. Nothing is compiled before the first call."""
    model = tiny_model()
    images = torch.randn(1, 3, 64, 64)
    again = prepare_for_inference(prepare_for_inference(model, compile=True), torch.bfloat16)
    assert torch.equal(again(images).logits, prepare_for_inference(model, torch.bfloat16)(images).logits)


def test_a_dtype_that_there_is_not_is_refused():
    assert prepare_for_inference(tiny_model(), "bfloat16").dtype == torch.bfloat16
    with pytest.raises(ValueError, match='no dtype "bf16"'):
        prepare_for_inference(tiny_model(), "bf16")


@pytest.mark.slow  # minutes of compiling
@torch.no_grad()
def test_compiled_copies_take_other_sizes():
    """How few recompiles real sizes need is measured by `benchmarks/inference.py`; tiny networks need more."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny_model(encoder_layers=1, decoder_layers=1)
    randomise_norms(model)
    prepared = prepare_for_inference(model, compile=True)
    for height, width in ((224, 288), (256, 300)):
        images = torch.randn(1, 3, height, width)
        ours, theirs = prepared(images), model(images)
        assert relative_difference(ours.logits, theirs.logits) < 1e-4
        assert relative_difference(ours.pred_boxes, theirs.pred_boxes) < 1e-4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


# -- training in place -------------------------------------------------------------------------------------------------


def gradients(model, images, mask, labels):
    model.zero_grad()
    torch.manual_seed(3)
    model(images, mask, labels=labels).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["frozen norms", "norms with activations", "anchors"])
def test_training_in_place_keeps_names_losses_and_gradients(kind):
    model = tiny_model(**MODELS[kind], dropout=0.0)
    randomise_norms(model)
    model.double().train()
    images, mask = padded_batch([(64, 96), (80, 64)])
    inputs = images.double(), mask, random_labels([2, 3])
    names, plain = list(model.state_dict()), gradients(model, *inputs)
    parameters = dict(model.named_parameters())
    prepare_for_training(model)
    prepare_for_training(model)  # twice is once
    assert list(model.state_dict()) == names
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    prepared = gradients(model, *inputs)
    assert prepared.keys() == plain.keys()
    for name, gradient in plain.items():
        assert relative_difference(prepared[name], gradient) < 1e-8, name


def test_depthwise_convolutions_with_folded_norms_run_in_float32_as_well():
    model = tiny_model(**MODELS["norms with activations"]).train()
    randomise_norms(model)
    prepare_for_training(model)
    modules = [m for m in model.model.backbone.modules() if isinstance(m, FoldedConv2d) and has_slow_gradient(m)]
    assert modules
    seen = {}
    for module in modules:
        module._conv_forward = lambda *given, plain=module._conv_forward, key=module: (
            seen.update({key: given[0].dtype}) or plain(*given)
        )
    with torch.autocast("cpu", torch.bfloat16):
        model(*padded_batch([(64, 96), (80, 64)]), labels=random_labels([2, 3])).loss.backward()
    assert set(seen) == set(modules)
    assert set(seen.values()) == {torch.float32}
    assert all(module.weight.grad.isfinite().all() for module in modules if module.weight.requires_grad)


def test_weights_are_folded_once_for_all_sizes_of_a_batch_and_anew_for_the_next(monkeypatch):
    model = tiny_model().train()
    randomise_norms(model)
    prepare_for_training(model)
    folded, plain = [], FoldedConv2d.folded
    monkeypatch.setattr(FoldedConv2d, "folded", lambda self: folded.append(self) or plain(self))
    images, mask = padded_batch([(64, 96), (80, 64), (48, 48)])
    backbone = model.model.backbone
    convolutions = [module for module in backbone.modules() if isinstance(module, FoldedConv2d)]
    before = backbone(images, mask)[0].map
    assert len(convolutions) == len(folded) == len(set(folded)) > 1
    with torch.no_grad():
        convolutions[0].weight.mul_(2)
    assert not torch.equal(backbone(images, mask)[0].map, before)
    assert len(folded) == 2 * len(convolutions)
    with pytest.raises(Exception, match="channels"):
        backbone(images[:, :1], mask)
    backbone.model(images)  # by itself: nothing is kept
    assert len(folded) >= 3 * len(convolutions)
    assert convolutions[0].shared.of_module is None
    fast = prepare_for_inference(model).model.backbone
    assert not fast._forward_hooks
    assert not fast._forward_pre_hooks


def test_depthwise_convolutions_with_a_slow_gradient_train_in_float32_inside_bfloat16():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(16, 16, 5, padding=2, groups=16),
        Conv2dSame(16, 16, 3, stride=2, groups=16, bias=False),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.Conv2d(16, 16, 1),
    )
    kinds = [type(module) for module in network]
    plain, images = deepcopy(network), torch.randn(2, 16, 17, 20).bfloat16()
    widen(network)
    assert [type(module) for module in network] == [WideConv2d, WideConv2d, nn.Conv2d, nn.Conv2d]
    exact = [plain[:1](images.float()), plain[1](images.float())]
    with torch.autocast("cpu", torch.bfloat16):
        found, rounded = [network[0](images), network[1](images)], [plain[0](images), plain[1](images)]
        with torch.no_grad():  # nothing to gain without a gradient
            assert torch.equal(network[0](images), rounded[0])
        network(images).square().mean().backward()
    for ours, theirs in zip(found, exact, strict=True):
        assert torch.equal(ours, theirs.bfloat16())
    assert torch.equal(network[0](images.float()), exact[0])
    plain(images.float()).square().mean().backward()
    for (name, ours), (_, theirs) in zip(network.named_parameters(), plain.named_parameters(), strict=True):
        assert relative_difference(ours.grad, theirs.grad) < 0.02, name
    narrow(network)
    assert [type(module) for module in network] == kinds
    assert all(vars(module).keys() == vars(other).keys() for module, other in zip(network, plain, strict=True))


@torch.no_grad()
def test_a_model_that_was_prepared_for_training_is_saved_and_prepared_for_prediction(tmp_path):
    model = tiny_model()
    randomise_norms(model)
    images = torch.randn(1, 3, 64, 64)
    expected = model(images).logits
    prepare_for_training(model)
    model.save_pretrained(tmp_path)
    for again in (
        type(model).from_pretrained(tmp_path),
        prepare_for_inference(model),
        pickle.loads(pickle.dumps(model)),
    ):
        torch.testing.assert_close(again(images).logits, expected, atol=1e-5, rtol=1e-5)


# -- a module's public tree is what it appears to be -------------------------------------------------------------------


def same_convolution(old: nn.Conv2d) -> nn.Conv2d:
    new = nn.Conv2d(
        old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, bias=old.bias is not None
    )
    new.load_state_dict(old.state_dict())
    return new


class LowRank(nn.Module):
    """What LoRA does to a convolution, without its update."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base

    def forward(self, x):
        return self.base_layer(x) + 0.0


@torch.no_grad()
@pytest.mark.parametrize("change", [same_convolution, LowRank])
def test_replacing_a_convolution_by_an_equal_one_changes_nothing_or_is_refused(change):
    model = tiny_model()
    randomise_norms(model)
    images = torch.randn(1, 3, 64, 64)
    expected = model(images).logits
    network = model.model.backbone.model
    block = network.layer1[0]
    block.conv1 = change(block.conv1)
    torch.testing.assert_close(model(images).logits, expected)
    prepare_for_training(model)  # what was replaced before is respected
    torch.testing.assert_close(model(images).logits, expected, atol=1e-5, rtol=1e-5)
    convolution = network.layer2[0].conv1
    network.layer2[0].conv1 = (
        change(convolution)
        if change is LowRank
        else nn.Conv2d(convolution.in_channels, convolution.out_channels, 3, convolution.stride, 1, bias=False)
    )
    if change is LowRank:  # the folded convolution still runs, with its norm
        torch.testing.assert_close(model(images).logits, expected, atol=1e-5, rtol=1e-5)
    else:
        with pytest.raises(RuntimeError, match="replaced or wrapped after prepare_for_training"):
            model(images)


@torch.no_grad()
def test_lora_on_convolutions_of_a_plain_model():
    peft = pytest.importorskip("peft")
    model = tiny_model()
    randomise_norms(model)
    images = torch.randn(1, 3, 64, 64)
    expected = model(images).logits
    config = peft.LoraConfig(r=2, target_modules=r".*backbone.*layer\d.*conv\d", init_lora_weights=True)
    adapted = peft.get_peft_model(model, config)
    torch.testing.assert_close(adapted(images).logits, expected)
    assert any("lora_A" in name for name, _ in adapted.named_parameters())


def references(module: nn.Module) -> list[str]:
    """Attributes that hold modules or tensors outside the public tree, which no copy, replica or offloading follows."""

    def holds(value) -> bool:
        if isinstance(value, dict):
            value = list(value.values())
        return (
            any(map(holds, value)) if isinstance(value, (list, tuple)) else isinstance(value, (nn.Module, torch.Tensor))
        )

    private = {"_parameters", "_buffers", "_modules"}
    return [name for name, value in vars(module).items() if name not in private and holds(value)]


@pytest.mark.parametrize("changes", [{}, {"query_type": "anchor"}, {"backbone": "test_efficientnet"}])
def test_no_module_of_a_plain_model_refers_to_another_behind_the_public_tree(changes):
    """Replicas of nn.DataParallel and offloading follow the public tree only."""
    model = tiny_model(**changes)
    assert {f"{name}.{held}" for name, module in model.named_modules() for held in references(module)} == set()


def test_a_model_prepared_for_training_refuses_data_parallel_replicas():
    model = tiny_model()
    model.model.backbone.model.layer1[0].conv1._replicate_for_data_parallel()
    prepare_for_training(model)
    with pytest.raises(NotImplementedError, match=r"nn\.DataParallel"):
        model.model.backbone.model.layer1[0].conv1._replicate_for_data_parallel()


@torch.no_grad()
def test_buffers_are_offloaded_or_it_is_refused():
    images = torch.randn(1, 3, 64, 64)
    model = tiny_model()
    randomise_norms(model)
    expected = model(images).logits
    copy = pickle.loads(pickle.dumps(model))
    accelerate.cpu_offload(copy, execution_device=torch.device("cpu"), offload_buffers=True)
    torch.testing.assert_close(copy(images).logits, expected)
    prepare_for_training(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    with pytest.raises(RuntimeError, match="cannot be offloaded"):
        model(images)


@torch.no_grad()
def test_a_whole_model_is_saved_by_torch():
    images = torch.randn(1, 3, 64, 64)
    model = tiny_model()
    expected = model(images, output_attentions=True, output_hidden_states=True).logits
    for each in (model, prepare_for_inference(model)):
        file = io.BytesIO()
        torch.save(each, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
        torch.testing.assert_close(again(images).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_model_is_built_with_empty_weights():
    with accelerate.init_empty_weights():
        model = DetrForDetection(tiny_config())
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.state_dict().keys() == tiny_model().state_dict().keys()


@torch.no_grad()
@pytest.mark.parametrize("prepared", [False, True])
def test_dynamic_quantisation_keeps_features_in_floating_point(prepared):
    model = tiny_model(d_model=32)
    images = torch.randn(1, 3, 64, 64)
    expected = model(images)
    model = prepare_for_inference(model) if prepared else model
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    output = quantised(images)
    assert output.pred_boxes.dtype == torch.float32
    assert (output.pred_boxes - expected.pred_boxes).abs().max() < 0.05


class Int8Linear(nn.Module):
    """A linear layer as bitsandbytes and torchao store it: int8 weights and a scale."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = linear.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


@torch.no_grad()
def test_int8_weights_in_the_box_head_do_not_cast_features_to_int8():
    model = tiny_model()
    images = torch.randn(1, 3, 64, 64)
    expected = model(images).pred_boxes
    head = model.bbox_predictor
    head.layers = nn.ModuleList(map(Int8Linear, head.layers))
    assert (model(images).pred_boxes - expected).abs().max() < 0.02
