"""On a GPU: the same values as on the CPU, every precision, and the jobs. Skipped where there is none."""

import json
from pathlib import Path

import pytest
import torch
from conftest import padded_batch, random_labels, relative_difference, tiny_model
from script_runner import run_script
from transformers import pipeline

from hf_detr import DetrImageProcessor
from hf_detr.evaluation import evaluate_detection
from hf_detr.speed import prepare_for_inference, prepare_for_training

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.xdist_group("gpu"),
]

EXAMPLE = Path(__file__).parents[1] / "examples" / "finetune.py"
SIZES = [(64, 96), (96, 64), (96, 96)]
EVERYTHING = {
    "query_type": "anchor", "denoising_groups": 2, "dense_loss_coefficient": 1.0,
    "class_loss": "iou_aware", "class_weights": {"LABEL_1": 3.0},
}  # fmt: skip


@pytest.fixture(autouse=True)
def exact_float32():
    """Convolutions in all digits, as matrix products are by default."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


def both(model, function):
    """The result of a function of the model, on the CPU and on the GPU."""
    on_cpu = function(model, "cpu")
    return on_cpu, function(model.to("cuda"), "cuda")


@pytest.mark.parametrize("changes", [{}, {"query_type": "anchor"}, {"pre_norm": True}], ids=["paper", "anchor", "pre"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_predictions_of_a_padded_batch_are_those_of_the_cpu(changes, attention):
    def predict(model, device):
        images, mask = padded_batch(SIZES)
        outputs = model(images.to(device), mask.to(device))
        return torch.cat((outputs.logits, outputs.pred_boxes), dim=-1).cpu()

    model = tiny_model(**changes)
    model.set_attn_implementation(attention)
    on_cpu, on_gpu = both(model, predict)
    assert relative_difference(on_gpu, on_cpu) < 1e-4


@torch.no_grad()
def test_an_image_gives_the_same_alone_and_beside_larger_ones():
    model = tiny_model().to("cuda")
    images, mask = (tensor.to("cuda") for tensor in padded_batch(SIZES))
    together = model(images, mask).logits
    for index, (height, width) in enumerate(SIZES):
        alone = model(images[index : index + 1, :, :height, :width]).logits
        assert relative_difference(together[index : index + 1], alone) < 1e-4


@pytest.mark.parametrize("changes", [{}, {"class_loss": "focal"}, EVERYTHING], ids=["paper", "focal", "everything"])
@pytest.mark.parametrize("prepared", [False, True])
def test_losses_and_gradients_are_those_of_the_cpu(changes, prepared):
    def step(model, device):
        torch.manual_seed(0)
        model.zero_grad()
        images, mask = padded_batch(SIZES)
        loss = model(images.to(device), mask.to(device), labels=random_labels([2, 0, 3])).loss  # labels on the host
        loss.backward()
        head = model.class_labels_classifier.weight.grad, model.model.input_projection.weight.grad
        return loss.detach().cpu(), *(gradient.cpu().clone() for gradient in head)

    # without random numbers, which differ between devices
    quiet = {"dropout": 0.0} | {k: v for k, v in changes.items() if k != "denoising_groups"}
    model = tiny_model(**quiet).train()
    if prepared:
        prepare_for_training(model)
    on_cpu, on_gpu = both(model, step)
    for ours, expected in zip(on_gpu, on_cpu, strict=True):
        assert relative_difference(ours, expected) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_training_lowers_the_loss_in_every_precision(dtype):
    torch.manual_seed(0)
    model = tiny_model(dropout=0.0, **EVERYTHING).to("cuda").train()
    prepare_for_training(model)
    optimizer, scaler = torch.optim.AdamW(model.parameters(), 1e-3, fused=True), torch.amp.GradScaler("cuda")
    images, mask = (tensor.to("cuda") for tensor in padded_batch(SIZES))
    labels = [{name: value.to("cuda") for name, value in label.items()} for label in random_labels([2, 0, 3])]
    losses = []
    for _ in range(30):
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            loss = model(images, mask, labels=labels).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
@torch.no_grad()
def test_the_prepared_copy_predicts_the_same(dtype, tolerance):
    model = tiny_model().to("cuda")
    images = torch.rand(2, 3, 96, 128, device="cuda")
    expected, found = model(images).logits, prepare_for_inference(model, dtype)(images).logits
    assert found.device.type == "cuda"
    assert relative_difference(found, expected) < tolerance


@torch.no_grad()
def test_the_compiled_copy_predicts_the_same_at_every_size():
    model = tiny_model().to("cuda")
    compiled = prepare_for_inference(model, compile=True)
    for height, width in ((96, 128), (64, 96), (128, 160)):
        images = torch.rand(1, 3, height, width, device="cuda")
        assert relative_difference(compiled(images).logits, model(images).logits) < 1e-3


def test_the_pipeline_finds_the_boxes_of_the_cpu():
    processor, images = DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}), []
    for seed, (height, width) in enumerate(((80, 100), (100, 80), (90, 90))):
        generator = torch.Generator().manual_seed(seed)
        images.append(torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator))
    model = tiny_model()
    found = {}
    for device in ("cpu", "cuda"):
        detector = pipeline("object-detection", model=model.to(device), image_processor=processor, device=device)
        found[device] = detector(images, threshold=0.0, batch_size=2, round_boxes=False)
    for on_cpu, on_gpu in zip(found["cpu"], found["cuda"], strict=True):
        assert len(on_cpu) == len(on_gpu) > 0
        for one, other in zip(on_cpu, on_gpu, strict=True):
            assert other["score"] == pytest.approx(one["score"], abs=1e-4)
            assert list(other["box"].values()) == pytest.approx(list(one["box"].values()), abs=0.05)


def test_labels_of_another_frame_are_refused_on_the_gpu_too():
    model = tiny_model().to("cuda").train()
    images, mask = (tensor.to("cuda") for tensor in padded_batch(SIZES))
    labels = random_labels([1, 1, 1])
    for label in labels:
        label["size"] = torch.tensor([96, 96])
    with pytest.raises(ValueError, match="label is for an image of 96 x 96"):
        model(images, mask, labels=labels)


def test_the_processor_works_on_the_gpu():
    images = [torch.randint(256, (3, 80, 100), dtype=torch.uint8), torch.randint(256, (3, 60, 90), dtype=torch.uint8)]
    processor = DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
    on_cpu = processor(images, return_tensors="pt")
    on_gpu = processor(images, return_tensors="pt", device="cuda")
    assert on_gpu["pixel_values"].device.type == "cuda"
    assert torch.equal(on_gpu["pixel_mask"].cpu(), on_cpu["pixel_mask"])
    assert (on_gpu["pixel_values"].cpu() - on_cpu["pixel_values"]).abs().max() < 0.05  # rounding of 8-bit values


def test_finetune_trains_on_the_gpu_and_continues(tmp_path):
    options = {"cwd": tmp_path, "environment": {"ACCELERATE_USE_CPU": "false"}}
    arguments = ["--quick", "--output_dir", "out"]
    code, output = run_script(EXAMPLE, *arguments, **options)
    assert code == 0, output
    assert "cuda" in output
    assert "precision bf16" in output
    code, output = run_script(EXAMPLE, "--resume", "--output_dir", "out", "--epochs", "3", **options)
    assert code == 0, output
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [1, 2, 3]


def test_evaluation_on_the_gpu_gives_the_numbers_of_the_cpu(tmp_path):
    from hf_detr.data import DetectionCollator, build_loader, draw_shapes_dataset, load_detection_dataset

    folder = draw_shapes_dataset(tmp_path / "data", num_train=1, num_val=12, progress=False)
    dataset = load_detection_dataset(folder, "val", cache_dir=tmp_path / "cache", progress=False)
    processor = DetrImageProcessor(size={"height": 96, "width": 96})
    names = {0: "rectangle", 1: "ellipse", 2: "triangle"}
    model = tiny_model(id2label=names, label2id={name: index for index, name in names.items()})
    numbers = []
    for device in ("cpu", "cuda"):
        loader = build_loader(dataset, DetectionCollator(processor), batch_size=4, training=False)
        evaluator = evaluate_detection(model.to(device), loader, dataset, processor)
        numbers.append(evaluator.compute()["AR100"])
    assert numbers[1] == pytest.approx(numbers[0], abs=1e-3)
