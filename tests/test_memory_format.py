"""Convolutions that corrupt memory in channels-last are replaced by ones that compute the same."""

import copy
import os
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

from hf_detr.model.backbone import Backbone
from hf_detr.speed.memory_format import (
    SubsampledConv2d,
    preferred_memory_format,
    replace_unsafe_convolutions,
    unsafe_convolutions,
    use_memory_format,
)

TRAIN = """
import torch
from hf_detr.model.backbone import Backbone
from hf_detr.speed.memory_format import use_memory_format
backbone = Backbone("repvgg_a0", freeze_batch_norm=False, frozen_stages=-1).train()
use_memory_format(backbone.model)
for _ in range(2):
    backbone(torch.randn(4, 3, 224, 224))[0].map.square().mean().backward()
print("alive", all(parameter.grad.isfinite().all() for parameter in backbone.parameters()))
"""


def meta(name, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, features_only=True, **kwargs)


class TestReplacedConvolutions:
    @pytest.mark.parametrize("size", [(16, 18), (15, 17), (1, 2)])
    @pytest.mark.parametrize("stride", [2, (2, 1), 3])
    def test_values_and_gradients_are_those_of_the_convolution(self, size, stride):
        """In float64, which the faulty kernel does not do, so that the plain convolution is a safe reference."""
        network = nn.Sequential(nn.Conv2d(3, 5, 1, stride)).double()
        plain = copy.deepcopy(network)
        assert replace_unsafe_convolutions(network) == ["0"]
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        one, other = images.clone().requires_grad_(), images.clone().requires_grad_()
        ours, theirs = network(one), plain(other)
        torch.testing.assert_close(ours, theirs)
        upstream = torch.randn_like(ours)
        ours.backward(upstream)
        theirs.backward(upstream)
        torch.testing.assert_close(one.grad, other.grad)
        torch.testing.assert_close(network[0].weight.grad, plain[0].weight.grad)
        torch.testing.assert_close(network[0].bias.grad, plain[0].bias.grad)

    def test_parameters_names_and_mode_stay(self):
        network = timm.create_model("repvgg_a0", features_only=True).eval()
        before = dict(network.named_parameters())
        keys = list(network.state_dict())
        assert replace_unsafe_convolutions(network) == ["stem.conv_1x1.conv"]
        assert list(network.state_dict()) == keys
        assert all(parameter is before[name] for name, parameter in network.named_parameters())
        assert not any(module.training for module in network.modules())
        assert not list(unsafe_convolutions(network))
        assert replace_unsafe_convolutions(network) == []

    def test_a_frozen_convolution_stays_frozen(self):
        network = nn.Sequential(nn.Conv2d(3, 5, 1, 2)).requires_grad_(False)
        replace_unsafe_convolutions(network)
        assert isinstance(network[0], SubsampledConv2d)
        assert not network[0].weight.requires_grad

    @pytest.mark.parametrize("name", ["repvgg_a0", "test_resnet"])
    def test_the_backbone_runs_in_channels_last_with_them_replaced(self, name):
        backbone = Backbone(name)
        assert use_memory_format(backbone.model) is torch.channels_last
        assert not list(unsafe_convolutions(backbone))
        assert any(isinstance(module, SubsampledConv2d) for module in backbone.modules()) == (name == "repvgg_a0")
        seen = []
        backbone.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        features = backbone(torch.randn(2, 3, 64, 64))[0].map
        assert seen[0].is_contiguous(memory_format=torch.channels_last)
        assert features.is_contiguous(memory_format=torch.channels_last)

    def test_training_in_channels_last_does_not_kill_the_process(self):
        environment = os.environ | {"OMP_NUM_THREADS": "2"}
        done = subprocess.run(
            [sys.executable, "-c", TRAIN], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert (done.returncode, done.stdout.strip()) == (0, "alive True"), done.stderr


class TestWhatIsUnsafe:
    @pytest.mark.parametrize(
        "safe",
        [
            nn.Conv2d(16, 8, 1, 2),  # as many channels as the vector register holds
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(3, 8, 3, 2),
            nn.Conv2d(4, 8, 1, 2, groups=2),
            nn.Conv2d(3, 8, 1, 2, padding=1),
        ],
    )
    def test_other_convolutions_are_left_alone(self, safe):
        network = nn.Sequential(safe)
        assert replace_unsafe_convolutions(network) == []
        assert network[0] is safe


class TestPreferredFormat:
    @pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "mobilenetv3_small_050", "regnetx_002"])
    def test_networks_that_convolve_take_channels_last(self, name):
        assert preferred_memory_format(meta(name)) is torch.channels_last

    @pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
    def test_networks_on_patches_stay_contiguous(self, name):
        assert preferred_memory_format(meta(name)) is torch.contiguous_format

    def test_what_cannot_be_replaced_keeps_the_network_contiguous(self):
        class Standardised(nn.Conv2d):
            def forward(self, images):
                return nn.functional.conv2d(images, self.weight - self.weight.mean(), self.bias, self.stride)

        network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Standardised(8, 8, 1, 2))
        assert replace_unsafe_convolutions(network) == []
        assert preferred_memory_format(network) is torch.contiguous_format
