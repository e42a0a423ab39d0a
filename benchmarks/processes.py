"""One optimizer step, spread in different ways over processes (gloo, CPU) and batches that are accumulated, beside the
same step of one process with all images in one batch: loss terms, gradients and weights, in float32.

    python benchmarks/processes.py

Images have different sizes, so batches are padded differently; batch norm is frozen, as in the paper, and without
dropout and noise nothing is random. Starts itself with `torch.distributed.run`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import hf_detr.model.queries
from hf_detr import DetrConfig, DetrForDetection, DetrForSegmentation
from hf_detr.training import TrainStep, parameter_groups

SMALL = {
    "backbone": "test_resnet", "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 12,
    "num_labels": 5, "dropout": 0.0,
}  # fmt: skip
MODELS = {
    "paper": {},
    "recipe": {
        "query_type": "anchor", "dense_loss_coefficient": 1, "denoising_groups": 3, "class_loss": "iou_aware",
        "prior_probability": 0.05, "feature_stride": 16, "pre_norm": True,
    },
    "all options": {
        "query_type": "anchor", "dense_loss_coefficient": 1, "denoising_groups": 2,
        "class_loss": "cross_entropy", "modulate_attention": True, "feature_stride": 16,
    },
    "masks": {  # with GELU: rounding may turn a gradient on or off where a ReLU is near 0
        "query_type": "anchor", "denoising_groups": 2, "feature_stride": 16, "activation_function": "gelu",
    },
}  # fmt: skip
# objects of each image, by batch: one list a process, in it one list a batch
CASES: dict[str, list[list[list[int]]]] = {
    "2 processes": [[[3, 1, 4, 2]], [[2, 5, 1, 1]]],
    "2 processes, one without objects": [[[3, 1, 4, 2]], [[0, 0, 0, 0]]],
    "2 processes, 5 and 4 images": [[[3, 1, 4, 2, 0]], [[2, 5, 1, 1]]],
    "1 process, 3 batches": [[[3, 1, 4], [2, 5, 1], [1, 0]]],
    "2 processes, 2 batches, one empty": [[[3, 1], [4, 2]], [[0, 0], [2, 5]]],
    "2 processes, no object at all": [[[0, 0]], [[0, 0]]],
}
SIZES = [(64, 96), (96, 64), (80, 80), (64, 64)]


def make_batch(objects: list[int], first: int) -> dict[str, Any]:
    """Images `first`, `first` + 1, ..., each drawn from its number, whatever it is batched with."""
    images, labels = [], []
    for number, count in enumerate(objects, first):
        generator = torch.Generator().manual_seed(number)
        height, width = SIZES[number % len(SIZES)]
        images.append(torch.randn(3, height, width, generator=generator))
        size = torch.rand(count, 2, generator=generator) * 0.4 + 0.1
        center = size / 2 + torch.rand(count, 2, generator=generator) * (1 - size)
        classes = torch.randint(5, (count,), generator=generator)
        masks = torch.rand(count, height, width, generator=generator) > 0.6
        labels.append({"class_labels": classes, "boxes": torch.cat((center, size), dim=1), "masks": masks})
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    pixel_values = torch.zeros(len(images), 3, height, width)
    pixel_mask = torch.zeros(len(images), height, width, dtype=torch.long)
    for image, values, mask in zip(images, pixel_values, pixel_mask, strict=True):
        values[:, : image.shape[1], : image.shape[2]] = image
        mask[: image.shape[1], : image.shape[2]] = 1
    return {"pixel_values": pixel_values, "pixel_mask": pixel_mask, "labels": labels}


def take_step(model_name: str, share: list[list[list[int]]]) -> dict[str, Any]:
    """The step of all processes together; of process 0: mean loss terms, gradients before clipping, weights after."""
    accelerator = Accelerator(cpu=True)
    hf_detr.model.queries.LABEL_NOISE = hf_detr.model.queries.BOX_NOISE = 0.0
    torch.manual_seed(0)
    kind = DetrForSegmentation if model_name == "masks" else DetrForDetection
    model = kind(DetrConfig(**SMALL | MODELS[model_name])).train()
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-4, 1e-5, 1e-4))
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer.optimizer, 1.0)
    kept: dict[str, torch.Tensor] = {}

    def keep(parameters: Any, *rest: Any) -> torch.Tensor:
        kept.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        return clip(parameters, *rest)

    clip, accelerator.clip_grad_norm_ = accelerator.clip_grad_norm_, keep
    step = TrainStep(accelerator, wrapped, model, optimizer, scheduler)
    before = [sum(len(b) for b in batches) for batches in share[: accelerator.process_index]]
    first, batches = sum(before), []
    for objects in share[accelerator.process_index]:
        batches.append(make_batch(objects, first))
        first += len(objects)
    terms = step(batches, 1) or {}
    names = sorted(terms)
    means = accelerator.reduce(torch.stack([terms[name] for name in names]), reduction="mean")
    result = {"terms": dict(zip(names, means.tolist(), strict=True)), "gradients": kept, "weights": model.state_dict()}
    return result


def together(share: list[list[list[int]]]) -> list[list[list[int]]]:
    return [[[count for batches in share for objects in batches for count in objects]]]


def compare(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Largest differences: of the terms, relative; of gradients and weights, in the largest value of their tensor, but
    at least 0.01 and 1: some gradients are zero but for rounding."""

    def largest(name: str, floor: float) -> float:
        a, b = one[name], other[name]
        return max(float((a[n] - b[n]).abs().max() / a[n].abs().max().clamp(min=floor)) for n in a)

    if set(one["gradients"]) != set(other["gradients"]) or set(one["terms"]) != set(other["terms"]):
        raise SystemExit("Not the same gradients or loss terms are there.")
    terms = max(abs(v - other["terms"][n]) / max(1.0, abs(v)) for n, v in one["terms"].items())
    norms = one["terms"]["gradient_norm"], other["terms"]["gradient_norm"]
    return {
        "loss": one["terms"]["loss"],
        "norm, 1 process": norms[0],
        "norm": norms[1],
        "terms": terms,
        "gradients": largest("gradients", 1e-2),
        "weights": largest("weights", 1.0),
    }


Job = tuple[str, list[list[list[int]]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="also write the numbers as JSON")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.worker:
        results = [take_step(*job) for job in json.loads((args.worker / "jobs.json").read_text())]
        if int(os.environ.get("RANK", "0")) == 0:
            torch.save(results, args.worker / "results.pt")
        return
    jobs: list[Job] = [(model, share) for model in MODELS for share in CASES.values()]
    ones = run([(model, together(share)) for model, share in jobs], processes=1)
    alone = iter(run([job for job in jobs if len(job[1]) == 1], processes=1))
    pairs = iter(run([job for job in jobs if len(job[1]) == 2], processes=2))
    rows = {}
    print(
        "| model | case | loss | gradient norm, 1 process | here | terms | gradients | weights |\n" + "|---" * 8 + "|"
    )
    for (model, share), one in zip(jobs, ones, strict=True):
        case = next(name for name, of_case in CASES.items() if of_case == share)
        found = rows[f"{model}: {case}"] = compare(one, next(alone if len(share) == 1 else pairs))
        numbers = [f"{v:.5f}" for v in list(found.values())[:3]] + [f"{v:.0e}" for v in list(found.values())[3:]]
        print(f"| {model} | {case} | {' | '.join(numbers)} |", flush=True)
    if args.output:
        args.output.write_text(json.dumps(rows))


def run(jobs: list[Job], processes: int) -> list[dict[str, Any]]:
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "jobs.json").write_text(json.dumps(jobs))
        command = [*launch, __file__, "--worker", folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        results: list[dict[str, Any]] = torch.load(Path(folder) / "results.pt")
        return results


if __name__ == "__main__":
    main()
