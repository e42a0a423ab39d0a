"""One tester for every timm family: features, padding, freezing, loading. A new network is a line in FAMILIES."""

import pytest
import timm
import torch
from conftest import padded_batch, relative_difference, tiny_config, tiny_model
from safetensors.torch import save_file
from timm.layers.norm_act import FrozenBatchNormAct2d
from timm.models.vision_transformer import VisionTransformer
from torchvision.ops.misc import FrozenBatchNorm2d

from hf_detr import DetrForDetection
from hf_detr.model.backbone import Backbone

# name: (stride of the deepest level, arguments that make the network small)
FAMILIES = {
    "resnet18": (32, {}),
    "test_resnet": (32, {}),
    "test_convnext": (32, {}),
    "swin_tiny_patch4_window7_224": (32, {"depths": (1, 1, 1, 1), "embed_dim": 24}),
    "test_efficientnet": (32, {}),
    "mobilenetv3_small_050": (32, {}),
    "mobilenetv4_conv_small_050": (32, {}),
    "test_byobnet": (32, {}),
    "test_vit": (16, {}),
    "test_mambaout": (32, {}),
}
SIZES = [(96, 128), (64, 100), (77, 51)]


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture
def small(name):
    return FAMILIES[name][1]


class TestEveryFamily:
    def test_channels_and_stride_are_what_comes_out(self, name, small):
        backbone = Backbone(name, kwargs=small).eval()
        assert backbone.strides == [FAMILIES[name][0]]
        [level] = backbone(torch.randn(1, 3, 128, 192))
        features, mask = level.map, level.mask
        assert features.shape == (1, backbone.channels[0], 128 // level.stride, 192 // level.stride)
        assert mask is None

    def test_an_image_gives_the_same_features_alone_and_beside_larger_ones(self, name, small):
        backbone = Backbone(name, kwargs=small).eval()
        images, pixel_mask = padded_batch(SIZES)
        with torch.no_grad():
            [level] = backbone(images, pixel_mask)
            features, mask = level.map, level.mask
            for index, (height, width) in enumerate(SIZES):
                alone = backbone(images[index : index + 1, :, :height, :width])[0].map
                rows, columns = alone.shape[2:]
                torch.testing.assert_close(features[index, :, :rows, :columns], alone[0], atol=1e-4, rtol=1e-4)
                assert mask[index].sum() == rows * columns
                assert mask[index, :rows, :columns].all()

    def test_frozen_stages_are_exactly_what_leads_to_the_first_stage(self, name, small):
        """Which parameters a feature level depends on is asked of autograd."""
        backbone = Backbone(name, kwargs=small, freeze_batch_norm=False, frozen_stages=1).train()
        frozen = {n for n, p in backbone.model.named_parameters() if not p.requires_grad}
        arguments = backbone._timm_kwargs | {"out_indices": None}
        levels = timm.create_model(name, **(arguments | {"out_indices": (0,)})).feature_info.info
        first = next(i for i, level in enumerate(levels) if level["reduction"] >= 4)
        upto = timm.create_model(name, **(arguments | {"out_indices": (first,)})).eval()
        features = upto(torch.randn(1, 3, 96, 96))[0]
        grads = torch.autograd.grad(features.sum(), list(upto.parameters()), allow_unused=True)
        norms = {n.rpartition(".")[0] for n, _ in upto.named_buffers() if n.endswith("running_mean")}
        expected = {
            n
            for (n, _), grad in zip(upto.named_parameters(), grads, strict=True)
            if grad is not None and n.rpartition(".")[0] not in norms  # frozen batch norms have buffers instead
        }
        assert expected
        assert expected <= frozen
        # what autograd does not see on this path yet is frozen too lies in the same modules, such as unused tokens
        modules = {n.rpartition(".")[0] for n in expected}
        assert {n.rpartition(".")[0] for n in frozen} <= modules | {"model"}
        assert any(p.requires_grad for p in backbone.parameters())

    def test_frozen_parts_hold_still_in_training(self, name, small):
        backbone = Backbone(name, kwargs=small, freeze_batch_norm=True, frozen_stages=1).train()
        before = {n: t.clone() for n, t in backbone.state_dict().items()}
        optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=0.1)
        backbone(torch.randn(2, 3, 96, 96))[0].map.square().sum().backward()
        optimizer.step()
        trained = {n for n, p in backbone.named_parameters() if p.requires_grad}
        after = backbone.state_dict()
        assert all(torch.equal(before[n], after[n]) for n in before if n not in trained)
        assert any(not torch.equal(before[n], after[n]) for n in trained)
        assert not [m for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]

    def test_a_checkpoint_brings_everything_back(self, name, small, tmp_path):
        model = DetrForDetection(tiny_config(backbone=name, backbone_kwargs=small)).eval()
        model.save_pretrained(tmp_path)
        loaded = DetrForDetection.from_pretrained(tmp_path)
        images, mask = padded_batch(SIZES[:2])
        with torch.no_grad():
            torch.testing.assert_close(loaded(images, mask).logits, model(images, mask).logits)
        assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
            n for n, p in model.named_parameters() if p.requires_grad
        }


def test_padding_does_not_change_predictions():
    """Nor does a batch that is padded further than its largest image needs."""
    model = tiny_model(backbone="resnet18")
    images, mask = padded_batch([(96, 96), (40, 90), (96, 33)])
    with torch.no_grad():
        together = model(images, mask)
        more = torch.nn.functional.pad(images, (0, 50, 0, 70)), torch.nn.functional.pad(mask, (0, 50, 0, 70))
        for index, (height, width) in enumerate([(96, 96), (40, 90), (96, 33)]):
            alone = model(images[index : index + 1, :, :height, :width])
            padded_more = model(more[0][index : index + 1], more[1][index : index + 1])
            for other in (alone, padded_more):
                torch.testing.assert_close(other.logits[0], together.logits[index], atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(other.pred_boxes[0], together.pred_boxes[index], atol=1e-4, rtol=1e-4)


def test_a_network_that_reads_values_to_know_its_sizes_tells_them_on_the_cpu(monkeypatch):
    """As gemma4_vit does; tensors on the meta device have no values."""
    embed = VisionTransformer._pos_embed

    def count_first(self, x):
        assert int(torch.ones_like(x[:, 0]).sum().item()) == x[:, 0].numel()
        return embed(self, x)

    monkeypatch.setattr(VisionTransformer, "_pos_embed", count_first)
    backbone = Backbone("test_vit").eval()
    images, pixel_mask = padded_batch([(64, 96), (32, 64)])
    assert backbone(images, pixel_mask)[0].mask.sum((1, 2)).tolist() == [24, 8]


def test_parameters_that_timm_has_fixed_stay_fixed(tmp_path):
    config = tiny_config(backbone="efficientvim_m1", feature_stride=16)
    DetrForDetection(config).save_pretrained(tmp_path)
    for model in (DetrForDetection(config), DetrForDetection.from_pretrained(tmp_path)):
        network = model.model.backbone.model
        assert not network.get_parameter("model.weights").requires_grad
        model.train()(torch.randn(1, 3, 64, 64)).pred_boxes.sum().backward()
        assert all(parameter.grad is not None for parameter in network.parameters() if parameter.requires_grad)


def test_a_batch_of_equal_sizes_goes_through_in_one_piece_without_a_mask():
    backbone = Backbone("test_resnet").eval()
    calls = []
    backbone.model.register_forward_pre_hook(lambda _, args: calls.append(tuple(args[0].shape)))
    images, mask = padded_batch([(64, 96), (64, 96)])
    assert backbone(images, mask)[0].mask is None
    assert backbone(torch.nn.functional.pad(images, (0, 9)), torch.nn.functional.pad(mask, (0, 9)))[0].mask is None
    assert calls == [(2, 3, 64, 96)] * 2


def test_images_of_one_size_share_a_forward_pass():
    backbone = Backbone("test_resnet").eval()
    calls = []
    backbone.model.register_forward_pre_hook(lambda _, args: calls.append(tuple(args[0].shape)))
    backbone(*padded_batch([(64, 96), (96, 64), (64, 96)]))
    assert sorted(calls) == [(1, 3, 96, 64), (2, 3, 64, 96)]


@pytest.mark.parametrize("why", ["batch norm in training", "mask is no rectangle"])
def test_where_images_cannot_run_apart_the_padded_batch_goes_through(why):
    backbone = Backbone("test_resnet", freeze_batch_norm=False, frozen_stages=-1).eval()
    images, mask = padded_batch([(64, 96), (96, 64)])
    if why == "batch norm in training":
        backbone.train()
    else:
        mask[0, 10:20, 10:20] = 0
    calls = []
    backbone.model.register_forward_pre_hook(lambda _, args: calls.append(tuple(args[0].shape)))
    [level] = backbone(images, mask)
    assert calls == [(2, 3, 96, 96)]
    assert level.mask.shape == (2, *level.map.shape[2:])


def test_the_feature_level_is_chosen_by_stride():
    for stride, channels in ((8, 128), (16, 256), (32, 512)):
        backbone = Backbone("resnet18", feature_stride=stride).eval()
        assert (backbone.strides, backbone.channels) == ([stride], [channels])
        assert backbone(torch.randn(1, 3, 64, 64))[0].map.shape == (1, channels, 64 // stride, 64 // stride)
    dc5 = Backbone("resnet18", output_stride=16).eval()
    assert (dc5.strides, dc5.channels) == ([16], [512])
    with pytest.raises(ValueError, match=r"no feature level of stride 64; it has \[2, 4, 8, 16, 32\]"):
        Backbone("resnet18", feature_stride=64)


def test_further_levels_come_shallow_to_deep_each_without_padding():
    backbone = Backbone("resnet18", further_strides=(8, 4)).eval()
    assert (backbone.strides, backbone.channels) == ([4, 8, 32], [64, 128, 512])
    sizes = [(96, 64), (64, 128)]
    images, mask = padded_batch(sizes)
    with torch.no_grad():
        levels = backbone(images, mask)
        assert [level.stride for level in levels] == [4, 8, 32]
        for index, (height, width) in enumerate(sizes):
            alone = backbone(images[index : index + 1, :, :height, :width])
            for level, own in zip(levels, alone, strict=True):
                rows, columns = own.map.shape[2:]
                assert (rows, columns) == (height // level.stride, width // level.stride)
                torch.testing.assert_close(level.map[index, :, :rows, :columns], own.map[0], atol=1e-4, rtol=1e-4)
                assert level.mask[index].sum() == level.mask[index, :rows, :columns].sum() == rows * columns
    with pytest.raises(ValueError, match="no feature level of stride 5"):
        Backbone("resnet18", further_strides=(5,))


@pytest.mark.parametrize(("stages", "first_trained"), [(-1, "conv1"), (0, "layer1"), (1, "layer2"), (3, "layer4")])
def test_the_number_of_frozen_stages(stages, first_trained):
    backbone = Backbone("resnet18", frozen_stages=stages)
    trained = [name for name, parameter in backbone.model.named_parameters() if parameter.requires_grad]
    assert trained[0].startswith(first_trained)
    frozen = [name for name, parameter in backbone.model.named_parameters() if not parameter.requires_grad]
    assert not [name for name in frozen if name.startswith(first_trained)]


def test_frozen_batch_norm_keeps_the_networks_own_eps():
    backbone = Backbone("mobilenetv3_small_050", freeze_batch_norm=True)
    original = timm.create_model("mobilenetv3_small_050", features_only=True)
    expected = [m.eps for m in original.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    actual = [m.eps for m in backbone.modules() if isinstance(m, (FrozenBatchNorm2d, FrozenBatchNormAct2d))]
    assert actual == expected[: len(actual)]
    assert actual


def test_unknown_and_unfit_networks_are_named():
    with pytest.raises(ValueError, match='timm has no model "resnet5"'):
        Backbone("resnet5")
    with pytest.raises(ValueError, match="frozen_stages=9"):
        Backbone("resnet18", frozen_stages=9)
    with pytest.raises(ValueError, match="does not take these arguments"):
        Backbone("swin_tiny_patch4_window7_224", output_stride=16)


def test_parts_behind_the_chosen_level_do_not_wait_for_gradients():
    """timm builds EfficientNet whole; DistributedDataParallel would wait for gradients that never come."""
    for name in ("test_efficientnet", "test_resnet", "test_vit"):
        backbone = Backbone(name, feature_stride=16, frozen_stages=-1, freeze_batch_norm=False).train()
        backbone(torch.randn(2, 3, 64, 64))[0].map.sum().backward()
        assert all(p.grad is not None for p in backbone.parameters() if p.requires_grad), name


def test_equal_sizes_need_no_mask_while_batch_norm_trains():
    backbone = Backbone("test_resnet", freeze_batch_norm=False, frozen_stages=-1).train()
    assert backbone(*padded_batch([(64, 96), (64, 96)]))[0].mask is None


class TestPretrainedWeights:
    @pytest.fixture
    def network(self):
        network = timm.create_model("test_resnet", num_classes=10)
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_()
                module.weight.data.uniform_(0.5, 1.5)
        return network.eval()

    @pytest.mark.parametrize("ending", ["safetensors", "pth"])
    def test_from_a_local_file(self, network, ending, tmp_path):
        path = tmp_path / f"weights.{ending}"
        save_file(network.state_dict(), path) if ending == "safetensors" else torch.save(network.state_dict(), path)
        model = DetrForDetection.from_pretrained_backbone(tiny_config(), path).eval()
        image = torch.randn(1, 3, 64, 64)
        assert relative_difference(model.model.backbone(image)[0].map, network.forward_features(image)) < 1e-5

    def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(self, tmp_path):
        class Malicious:
            def __reduce__(self):
                return (open, (str(tmp_path / "ran"), "w"))

        path = tmp_path / "weights.pth"
        torch.save({"conv1.weight": Malicious()}, path)
        with pytest.raises(ValueError, match="does not hold weights"):
            DetrForDetection.from_pretrained_backbone(tiny_config(), path)
        assert not (tmp_path / "ran").exists()

    def test_weights_of_another_network_are_refused(self, tmp_path):
        path = tmp_path / "weights.safetensors"
        save_file({"some.weight": torch.randn(3, 3)}, path)
        with pytest.raises(ValueError, match=r"no weights for .* tensors"):
            DetrForDetection.from_pretrained_backbone(tiny_config(), path)
        with pytest.raises(FileNotFoundError, match="No backbone weights at"):
            DetrForDetection.from_pretrained_backbone(tiny_config(), tmp_path / "missing.pth")

    def test_a_full_checkpoint_never_asks_for_backbone_weights(self, tmp_path, monkeypatch):
        tiny_model().save_pretrained(tmp_path)

        def refuse(*args, **kwargs):
            raise AssertionError("asked for weights")

        monkeypatch.setattr("timm.models._builder.load_pretrained", refuse)
        monkeypatch.setattr("socket.socket.connect", refuse)
        DetrForDetection.from_pretrained(tmp_path)
