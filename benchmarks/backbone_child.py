"""What `backbones.py` runs in processes of their own, printed as JSON lines.

python benchmarks/backbone_child.py NAME [COMBINATION ...]
python benchmarks/backbone_child.py --members FILE SECONDS
"""

import json
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from hf_detr.model.backbone import Backbone
from hf_detr.model.timm_network import feature_strides, plan_levels
from hf_detr.speed.folding import fold
from hf_detr.speed.memory_format import (
    MemoryFormatHook,
    preferred_memory_format,
    replace_unsafe_convolutions,
    unsafe_convolutions,
)

FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"float32": 1e-4, "bf16": 5e-2}  # beyond it float64 is asked
DRAWS = 6  # of images on which that is done
KINDS = ("timm", "Backbone")
MANY_PARAMETERS, LONG = 40e6, 2.0  # from there, or if a run takes that many seconds: one image, and nothing is timed
NAMES = {torch.channels_last: "channels-last", torch.contiguous_format: "contiguous"}


def isolated(output: Path, errors: Path, function: Callable[..., None], *arguments: object) -> None:
    """Call a function with all that is printed, also by C, going to files."""
    for path, descriptor in ((output, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    torch.set_num_threads(2)
    function(*arguments)


# -- which networks --------------------------------------------------------------------------------------------------


def find_member(family: str, names: list[str]) -> dict[str, Any]:
    """The smallest network of a family that gives features, from copies without weights; and which of the networks have
    unsafe convolutions."""
    sizes, affected = {}, []
    for name in names:
        with torch.device("meta"):
            network = timm.create_model(name)
        sizes[name] = sum(parameter.numel() for parameter in network.parameters())
        affected += [name] if next(unsafe_convolutions(network), None) else []
    record: dict[str, Any] = {"family": family, "networks": len(names), "affected": affected}
    for name in sorted(names, key=lambda name: sizes[name]):
        try:
            strides = feature_strides(name)
        except ValueError as error:
            record["unsupported"] = str(error)[:120]
            continue
        record.pop("unsupported", None)
        return record | {"member": name, "parameters": sizes[name], "strides": strides} | describe(name)
    return record


def describe(name: str) -> dict[str, Any]:
    with torch.device("meta"):
        network = timm.create_model(name, features_only=True)
        unsafe = [name for name, _ in unsafe_convolutions(network)]
        replace_unsafe_convolutions(network)
        return {"unsafe": unsafe, "prefers": NAMES[preferred_memory_format(network)]}


def find_members(path: Path, seconds: float, also: dict[str, list[str]]) -> None:
    """One line a family is added to the file, from where the last call stopped."""
    end = time.perf_counter() + seconds
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    found = {line.get("family") for line in known}
    with path.open("a") as file:
        for family in timm.list_modules():
            every = timm.list_models(module=family, include_tags=False)
            if family in found or not every:
                continue
            if time.perf_counter() > end:
                return
            members = [find_member(family, every)]
            for name in also.get(family, []):
                if name != members[0].get("member"):
                    members += [find_member(family, [name]) | {"networks": 0, "affected": []}]
            file.writelines(json.dumps(member) + "\n" for member in members)
            file.flush()
        if not any("versions" in line for line in known):
            file.write(json.dumps({"versions": versions()}) + "\n")


def versions() -> str:
    flags = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else set()
    isa = ", ".join(flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags)
    onednn = re.search(r"MKL-DNN v([\d.]+)", torch.__config__.show())
    return (
        f"torch {torch.__version__} (oneDNN {onednn.group(1) if onednn else '?'}), timm {timm.__version__}, "
        f"{platform.machine()} ({isa}), 2 threads"
    )


# -- one network -----------------------------------------------------------------------------------------------------


def distance(ones: list[Tensor | None], others: list[Tensor | None]) -> float:
    """The largest difference, in the largest value of its tensor; but of tensors that are next to nothing beside the
    others (the gradient of a bias before a norm is rounding), in a thousandth of the largest value of all."""
    largest = max(1e-30, *(float(other.abs().max()) for other in others if other is not None))
    worst = 0.0
    for one, other in zip(ones, others, strict=True):
        if (one is None) != (other is None):
            return float("inf")
        if one is not None and other is not None:
            difference = (one - other).abs().max() / max(float(other.abs().max()), largest * 1e-3)
            worst = max(worst, float(difference)) if torch.isfinite(difference) else float("inf")
    return worst


def raw_network(name: str) -> nn.Module:
    """As timm builds it, all levels. Batch norm keeps its first statistics, 0 and 1: measured on noise, they would make
    a network that amplifies every rounding."""
    kwargs, _ = plan_levels(name, None, (), {"in_chans": 3})
    return timm.create_model(name, **{key: value for key, value in kwargs.items() if key != "out_indices"})


@torch.no_grad()
def wake(network: nn.Module) -> None:
    """Scales that start at (nearly) zero, of the last norm of a block and of layer scale, would hide its gradients."""
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        is_scale = tensor.is_floating_point() and tensor.ndim and tensor.numel() == max(tensor.shape)
        if is_scale and not name.endswith(("bias", "mean")) and tensor.abs().max() < 1e-2:
            tensor.fill_(0.5)


def backbone(name: str) -> Backbone:
    module = Backbone(name, freeze_batch_norm=True, frozen_stages=-1)
    fold(module)
    replace_unsafe_convolutions(module.model)
    return module


class Case:
    """A network and the images to run it on; `run` does one combination."""

    def __init__(self, kind: str, name: str, size: int) -> None:
        self.kind = kind
        torch.manual_seed(0)
        self.network: nn.Module = raw_network(name) if kind == "timm" else backbone(name)
        wake(self.network)
        self.hook = MemoryFormatHook(torch.contiguous_format)
        if isinstance(self.network, Backbone):
            self.network.model.register_forward_pre_hook(self.hook)
        parameters = sum(parameter.numel() for parameter in self.network.parameters())
        self.images = torch.empty(2, 3, size, size)
        self.draw(1)
        self.small = parameters < MANY_PARAMETERS and self.seconds(torch.contiguous_format, torch.float32) < LONG
        if not self.small:
            self.images = self.images[:1]

    def draw(self, seed: int) -> None:
        self.images = torch.randn(self.images.shape, generator=torch.Generator().manual_seed(seed))

    def forward(self, images: Tensor) -> list[Tensor]:
        features = self.network(images)
        return [level.map for level in features] if self.kind == "Backbone" else features

    def run(self, memory_format: torch.memory_format, dtype: torch.dtype) -> list[Tensor | None]:
        """Features (of the Backbone also those in eval mode) and the gradients of all parameters."""
        wide = dtype == torch.float64
        images = self.images.double() if wide else self.images
        images = images.contiguous(memory_format=memory_format)
        self.network.to(dtype=images.dtype, memory_format=memory_format).zero_grad()
        self.network.train(self.kind == "Backbone")
        self.hook.memory_format = memory_format
        torch.manual_seed(2)
        results: list[Tensor | None] = []
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            if self.kind == "Backbone":
                with torch.no_grad():
                    self.network.eval()
                    results += self.forward(images)
                    self.network.train()
            features = self.forward(images)
        upstream = [torch.randn(f.shape, generator=torch.Generator().manual_seed(3)).to(f) for f in features]
        torch.autograd.backward(features, upstream)
        results += [feature.detach() for feature in features]
        gradients = [None if p.grad is None else p.grad.clone() for p in self.network.parameters()]
        self.network.float()
        return results + gradients

    def seconds(self, memory_format: torch.memory_format, dtype: torch.dtype) -> float:
        """Of forward in eval mode (only `Backbone`), forward and backward in training."""
        started = time.perf_counter()
        self.run(memory_format, dtype)
        return time.perf_counter() - started


def check(name: str, combinations: list[str]) -> None:
    for kind in KINDS:
        mine = [(f, d) for d in DTYPES for f in FORMATS if not combinations or f"{kind} {f} {d}" in combinations]
        if not mine:
            continue
        try:
            case = Case(kind, name, 224)
            reference = case.run(torch.contiguous_format, torch.float32)
        except (RuntimeError, AssertionError):  # it is made for another size, or cuts feature maps into blocks
            case = Case(kind, name, timm.get_pretrained_cfg(name).input_size[-1])
            reference = case.run(torch.contiguous_format, torch.float32)
        check_kind(case, reference, mine)


def check_kind(case: Case, reference: list[Tensor | None], combinations: list[tuple[str, str]]) -> None:
    errors: dict[tuple[str, str], float] = {}
    for format_name, dtype_name in combinations:
        outcome: dict[str, Any] = {"combination": f"{case.kind} {format_name} {dtype_name}"}
        arguments = FORMATS[format_name], DTYPES[dtype_name]
        try:
            plain = (format_name, dtype_name) == ("contiguous", "float32")
            results = reference if plain else case.run(*arguments)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            outcome["exception"] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
        else:
            outcome["error"] = errors[format_name, dtype_name] = distance(results, reference)
            if case.kind == "Backbone" and case.small:
                outcome["seconds"] = case.seconds(*arguments)
            usual = 2 * errors.get(("contiguous", dtype_name), 0)
            if format_name == "channels-last" and outcome["error"] > max(TOLERANCE[dtype_name], usual):
                outcome |= judge(case, dtype_name)
        print(json.dumps(outcome), flush=True)


def judge(case: Case, dtype_name: str) -> dict[str, float]:
    """How far channels-last and contiguous are from float64, on the draw of images where channels-last does best beside
    contiguous; nothing if the network has float32 written into it.

    Where rounding takes a value over the zero of a ReLU, or over another pixel under a max pooling, gradients jump, in
    either format. That depends on the images; a wrong kernel is wrong on all of them."""
    found: list[tuple[float, float]] = []
    try:
        for seed in range(1, DRAWS + 1):
            case.draw(seed)
            exact = case.run(torch.contiguous_format, torch.float64)
            pair = [distance(case.run(f, DTYPES[dtype_name]), exact) for f in FORMATS.values()]
            found.append((pair[1], pair[0]))
            if pair[1] <= max(TOLERANCE[dtype_name], pair[0]):
                break
    except RuntimeError:
        pass
    case.draw(1)
    if not found:
        return {}
    ours, contiguous = min(found, key=lambda pair: pair[0] / max(TOLERANCE[dtype_name], pair[1]))
    return {"from_float64": ours, "contiguous_from_float64": contiguous, "draws": len(found)}
