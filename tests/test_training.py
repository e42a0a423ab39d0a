"""Parts of the training loop: groups, schedule, processes, and learning at all."""

import os

import pytest
import torch
import torch.distributed as dist
from conftest import random_labels, tiny_config, tiny_model
from script_runner import run_script

from hf_detr import DetrConfig, DetrForDetection, DetrImageProcessor
from hf_detr.data import DetectionCollator, draw_shapes_dataset, id2label, load_detection_dataset
from hf_detr.evaluation import evaluate_detection
from hf_detr.model.loss import DetrLoss
from hf_detr.runtime.cores import KEPT_KERNELS
from hf_detr.training import parameter_groups, use_all_cores


def test_the_backbone_has_its_own_rate_and_frozen_parameters_are_in_no_group():
    model = tiny_model(backbone="resnet18")
    groups = parameter_groups(model, 1e-4, 1e-5, 1e-4)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    in_backbone = {id(p) for p in model.model.backbone.parameters()}
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert rates.pop(id(parameter)) == (1e-5 if id(parameter) in in_backbone else 1e-4)
    assert not rates


def test_all_cores_are_used_unless_told_otherwise(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # what accelerate launch sets
    assert use_all_cores() == cores
    assert torch.get_num_threads() == cores
    assert use_all_cores(processes=cores) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert use_all_cores(processes=cores) == cores
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    torch.set_num_threads(1)  # as PyTorch would have read the variable
    assert use_all_cores() == 1


def test_kernels_are_kept_unless_told_otherwise(monkeypatch):
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.delenv(name, raising=False)
    use_all_cores()
    assert int(os.environ[name]) == KEPT_KERNELS > 1024  # oneDNN's own
    monkeypatch.setenv(name, "7")
    use_all_cores()
    assert os.environ[name] == "7"


COUNTS = ([3, 1], [4, 0])


def losses_of_one_process(rank, folder):
    dist.init_process_group("gloo")
    losses = []
    for counts in COUNTS:
        torch.manual_seed(0)
        logits, boxes = torch.randn(2, len(counts), 6, 6), torch.rand(2, len(counts), 6, 4) * 0.5 + 0.2
        labels = random_labels(counts)
        own = slice(rank, rank + 1)
        terms = DetrLoss(tiny_config(num_queries=6))(logits[:, own], boxes[:, own], labels[own]).loss_dict
        losses.append({name: value.item() for name, value in terms.items()})
    torch.save(losses, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    folder = tmp_path_factory.mktemp("losses")
    code, said = run_script(losses_of_one_process, folder, cwd=folder, processes=2)
    assert code == 0, said
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", range(len(COUNTS)))
def test_box_losses_do_not_grow_with_the_number_of_processes(losses, case):
    """Averaged over processes, the terms are those of one process with the global batch."""
    counts, results = COUNTS[case], [of_rank[case] for of_rank in losses]
    torch.manual_seed(0)
    logits, boxes = torch.randn(2, 2, 6, 6), torch.rand(2, 2, 6, 4) * 0.5 + 0.2
    whole = DetrLoss(tiny_config(num_queries=6))(logits, boxes, random_labels(counts)).loss_dict
    for name in ("loss_bbox", "loss_giou", "loss_bbox_0", "loss_giou_0"):
        mean = (results[0][name] + results[1][name]) / 2
        assert mean == pytest.approx(whole[name].item(), rel=1e-5), name


def test_eight_images_are_learned_by_heart(tmp_path):
    """A model that cannot do this has a fault somewhere between labels and loss."""
    folder = draw_shapes_dataset(tmp_path / "data", num_train=8, num_val=1, progress=False)
    data = load_detection_dataset(folder, "train", cache_dir=tmp_path / "cache", progress=False)
    names = id2label(data)
    config = DetrConfig(
        backbone="test_resnet", feature_stride=16, freeze_batch_norm=False, frozen_stages=-1, num_queries=10,
        d_model=64, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=128, decoder_ffn_dim=128,
        encoder_attention_heads=4, decoder_attention_heads=4, dropout=0.0, pre_norm=True, id2label=names,
        label2id={name: index for index, name in names.items()},
    )  # fmt: skip
    model = DetrForDetection(config).train()
    processor = DetrImageProcessor(size={"height": 128, "width": 128})
    batch = DetectionCollator(processor)([data[index] for index in range(8)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    metrics = {"AP50": 0.0}
    for step in range(1, 1201):
        loss = model(pixel_values=batch["pixel_values"], labels=batch["labels"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            metrics = evaluate_detection(model, [batch], data, processor, progress=False).compute()
            if metrics["AP50"] > 0.95:
                break
    assert metrics["AP50"] > 0.95
