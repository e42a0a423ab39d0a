"""Shared by all tests: tiny models, transformers' model with equal weights, images and labels from a seed."""

import logging
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait leave the cores to the other workers

import pytest
import torch
import transformers

import hf_detr
import hf_detr.data

THREADS = max(1, 2 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))

TINY = {
    "num_queries": 12,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_labels": 5,
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)


@pytest.fixture
def warnings(caplog, monkeypatch):
    """The log, with the messages of this package, whose loggers do not pass them on."""
    monkeypatch.setattr(logging.getLogger("hf_detr"), "propagate", True)
    return caplog


@pytest.fixture
def load(tmp_path):
    """`load_detection_dataset` with a cache of its own, and without a validation cut."""

    def load_anew(path, split="train", **kwargs):
        kwargs = {"cache_dir": tmp_path / "cache", "progress": False, "validation_fraction": 0} | kwargs
        return hf_detr.data.load_detection_dataset(path, split, **kwargs)

    return load_anew


def tiny_config(**changes) -> hf_detr.DetrConfig:
    values = {"backbone": "test_resnet"} | TINY | changes
    if "id2label" in changes:
        del values["num_labels"]
    return hf_detr.DetrConfig(**values)


def tiny_model(**changes) -> hf_detr.DetrForDetection:
    return hf_detr.DetrForDetection(tiny_config(**changes)).eval()


def tiny_segmentation(**changes) -> hf_detr.DetrForSegmentation:
    return hf_detr.DetrForSegmentation(tiny_config(**changes)).eval()


@torch.no_grad()
def randomise_norms(model: torch.nn.Module) -> None:
    """Statistics and weights of every norm, so that none is an identity by chance of its initial values."""
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    norms = [name for name, module in model.named_modules() if "Norm" in type(module).__name__]
    for norm in norms:
        for name in ("weight", "running_var"):
            if f"{norm}.{name}" in state:
                state[f"{norm}.{name}"].uniform_(0.7, 1.3)
        for name in ("bias", "running_mean"):
            if f"{norm}.{name}" in state:
                state[f"{norm}.{name}"].normal_(0, 0.2)


@torch.no_grad()
def save_tiny_checkpoint(path: Path, names: dict[int, str]) -> Path:
    """A checkpoint with its processor. Its box head is spread, so that boxes reach over the image's edge."""
    torch.manual_seed(0)
    model = tiny_model(id2label=names, label2id={name: index for index, name in names.items()})
    model.bbox_predictor.layers[-1].weight.mul_(20)
    model.class_labels_classifier.weight.mul_(3)
    model.save_pretrained(path)
    hf_detr.DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 120}).save_pretrained(path)
    return path


def transformers_twin(model: hf_detr.DetrForDetection, **changes) -> transformers.DetrForObjectDetection:
    """transformers' own DETR with the same weights; post-norm only, which is all it has."""
    names = [name for name in TINY if name != "num_labels"]
    config = transformers.DetrConfig(
        backbone=model.config.backbone,
        num_labels=model.config.num_labels,
        **({name: getattr(model.config, name) for name in (*names, "dropout", "position_embedding_type")} | changes),
    )
    twin = transformers.DetrForObjectDetection(config)
    state = {
        name.replace("model.decoder.bbox_predictor", "bbox_predictor"): t for name, t in model.state_dict().items()
    }
    twin.load_state_dict(state)
    return twin.eval()


def random_labels(counts: list[int], num_labels: int = 5, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Labels with this many objects an image, boxes well inside the image."""
    generator = torch.Generator().manual_seed(seed)
    labels = []
    for index, count in enumerate(counts):
        size = torch.rand(count, 2, generator=generator) * 0.4 + 0.05
        center = size / 2 + torch.rand(count, 2, generator=generator) * (1 - size)
        labels.append(
            {
                "class_labels": torch.randint(num_labels, (count,), generator=generator),
                "boxes": torch.cat((center, size), dim=1),
                "image_id": torch.tensor([100 + index]),
            }
        )
    return labels


def padded_batch(sizes: list[tuple[int, int]], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images of these (height, width), padded with zeros at the bottom and the right."""
    generator = torch.Generator().manual_seed(seed)
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    pixel_values = torch.zeros(len(sizes), 3, height, width)
    pixel_mask = torch.zeros(len(sizes), height, width, dtype=torch.long)
    for index, (h, w) in enumerate(sizes):
        pixel_values[index, :, :h, :w] = torch.randn(3, h, w, generator=generator)
        pixel_mask[index, :h, :w] = 1
    return pixel_values, pixel_mask


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference over the largest value, or over 1 for small tensors of values near 0."""
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)).item()
