"""Frozen batch norm inside the convolution before it: the same features and gradients, less to compute and to keep."""

import copy

import pytest
import timm
import torch
from conftest import randomise_norms, relative_difference
from timm.utils.model import freeze_batch_norm_2d
from torch import nn

from hf_detr.model.backbone import Backbone
from hf_detr.speed.folding import FoldedConv2d, exclusive_pairs, fold

FAMILIES = [
    "test_resnet",
    "resnet10t",
    "test_efficientnet",
    "tf_mobilenetv3_small_minimal_100",
    "test_byobnet",
]


def plain_twin(backbone: Backbone) -> nn.Module:
    """timm's own network with the same weights, whose frozen norms do their work themselves."""
    network = freeze_batch_norm_2d(timm.create_model(backbone.name, **backbone._timm_kwargs))
    network.to(next(backbone.parameters()).dtype)
    network.load_state_dict(backbone.model.state_dict())
    return network.train(backbone.training)


def saved_bytes(run) -> int:
    """Memory that autograd keeps for the backward pass, each piece once."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    del result
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_features_and_gradients_are_those_of_the_network_with_its_norms(name):
    backbone = Backbone(name, frozen_stages=-1).double()
    randomise_norms(backbone)
    twin = plain_twin(backbone)
    fold(backbone)
    assert sum(isinstance(module, FoldedConv2d) for module in backbone.modules()) > 5
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    ours, theirs = backbone(images)[0].map, twin(images)[0]
    assert relative_difference(ours, theirs) < 1e-10
    direction = torch.randn_like(ours)
    (ours * direction).sum().backward()
    (theirs * direction).sum().backward()
    compared = 0
    for parameter, other in zip(backbone.model.parameters(), twin.parameters(), strict=True):
        if other.grad is not None:
            assert relative_difference(parameter.grad, other.grad) < 1e-10
            compared += 1
    assert compared > 5


def test_names_and_checkpoints_stay_those_of_the_network():
    backbone = Backbone("test_resnet")
    fold(backbone)
    assert backbone.model.state_dict().keys() == plain_twin(backbone).state_dict().keys()


def test_half_precision_keeps_less_for_the_backward_pass_than_the_norms_would():
    backbone = Backbone("resnet10t", frozen_stages=-1).train()
    twin, images = plain_twin(backbone), torch.randn(2, 3, 128, 128)
    fold(backbone)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = saved_bytes(lambda: backbone(images)), saved_bytes(lambda: twin(images))
    assert ours < 0.75 * theirs


def test_the_stem_and_frozen_stages_build_no_graph():
    backbone = Backbone("resnet10t", frozen_stages=1).train()
    fold(backbone)
    graphs = {}
    for name, module in backbone.model.named_modules():
        module.register_forward_hook(lambda _, __, output, name=name: graphs.__setitem__(name, output[0].requires_grad))
    backbone(torch.randn(1, 3, 64, 64))
    assert not any(graph for name, graph in graphs.items() if name.startswith(("conv1", "bn1", "layer1")))
    assert graphs["layer2.0.conv1"]
    assert graphs["layer4.0.conv2"]


def test_copies_and_other_types_follow_their_own_norms():
    backbone = Backbone("test_resnet")
    randomise_norms(backbone)
    fold(backbone)
    other = copy.deepcopy(backbone)
    randomise_norms(other)
    images = torch.randn(1, 3, 64, 64)
    assert relative_difference(backbone(images)[0].map, plain_twin(backbone)(images)[0]) < 1e-5
    assert relative_difference(other(images)[0].map, plain_twin(other)(images)[0]) < 1e-5
    wide = other.double()(images)[0].map
    assert wide.dtype == torch.float64
    assert relative_difference(wide, plain_twin(other)(images.double())[0]) < 1e-10


def test_norms_that_gather_statistics_are_not_folded():
    backbone = Backbone("test_resnet", freeze_batch_norm=False, frozen_stages=-1)
    fold(backbone)
    assert not any(isinstance(module, FoldedConv2d) for module in backbone.modules())
    backbone.freeze_batch_norm()
    fold(backbone)
    assert any(isinstance(module, FoldedConv2d) for module in backbone.modules())


class Shared(nn.Module):
    """Convolutions that must stay apart from their norm: read twice, running twice, returned; and one that need not."""

    def __init__(self) -> None:
        super().__init__()
        self.read_twice, self.runs_twice, self.returned, self.alone = (nn.Conv2d(3, 3, 1) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(4))

    def forward(self, x):
        y = self.read_twice(x)
        y = self.norms[0](y) + y
        y = self.norms[1](self.runs_twice(self.runs_twice(y)))
        y = self.norms[2](self.alone(y))
        last = self.returned(y)
        return [self.norms[3](last), last]


def test_only_a_convolution_whose_output_one_norm_reads_is_in_a_pair():
    network = Shared().eval()
    pairs = exclusive_pairs(copy.deepcopy(network).to("meta"), torch.zeros(1, 3, 8, 8, device="meta"))
    assert pairs == {"alone": "norms.2"}


@torch.no_grad()
def test_modules_that_were_replaced_or_have_hooks_are_not_folded():
    backbone = Backbone("test_resnet")
    randomise_norms(backbone)
    network, images = backbone.model, torch.randn(1, 3, 64, 64)
    network.layer1[0].conv2 = nn.Sequential(network.layer1[0].conv2)
    network.layer1[0].conv1.register_forward_hook(lambda module, inputs, output: 2 * output)
    before = backbone(images)[0].map
    fold(backbone)
    assert not isinstance(network.layer1[0].conv1, FoldedConv2d)
    assert isinstance(network.layer2[0].conv1, FoldedConv2d)
    assert relative_difference(backbone(images)[0].map, before) < 1e-5
