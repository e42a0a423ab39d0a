"""`hf-detr COMMAND ...`: the scripts of `examples/`, wherever this package is installed."""

import platform
import runpy
import sys
from importlib.metadata import PackageNotFoundError, version

# command: its script, and what it does
COMMANDS = {
    "check": ("check_dataset", "report errors in a data set, and write a corrected copy"),
    "label-errors": ("label_errors", "find annotations that a model contradicts"),
    "finetune": ("finetune", "train on your images, from a checkpoint or an ImageNet backbone"),
    "evaluate": ("evaluate", "measure a checkpoint, and write a page about its errors"),
    "predict": ("predict", "detect objects in images, folders and videos"),
    "export": ("export", "export to ONNX, OpenVINO or torch.export, and compare"),
    "convert": ("convert", "convert checkpoints of transformers and of the paper's code"),
    "push": ("push_to_hub", "push a checkpoint to the Hub with its code and a model card"),
    "describe": ("describe", "list the parts of a model: shapes, parameters, FLOPs, times"),
}
PACKAGES = (
    "hf_detr", "torch", "torchvision", "timm", "transformers", "accelerate", "datasets", "huggingface_hub", "numpy",
    "pillow", "hotcoco", "onnxruntime", "openvino", "peft", "av",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """The console script. Exits with the code of the command, or with 1 and a message for an unknown one."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print(usage())
    elif command == "--version":
        print(version("hf_detr"))
    elif command == "env" and not rest:
        print(environment())
    elif command in COMMANDS:
        script = COMMANDS[command][0]
        sys.argv = [f"hf-detr {command}", *rest]
        runpy.run_module(f"hf_detr.commands.{script}", run_name="__main__")
    else:
        unknown = f"{command} {' '.join(rest)}".strip()
        sys.exit(f"hf-detr has no command {unknown!r}.\n\n{usage()}")


def usage() -> str:
    listed = [f"  {name:14}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: hf-detr COMMAND ...",
            "",
            *listed,
            f"  {'env':14}print versions and devices, for a bug report",
            "",
            "hf-detr COMMAND --help lists the options of a command. On several GPUs:",
            "accelerate launch -m hf_detr.commands.finetune ...",
        ]
    )


def environment() -> str:
    """Versions and devices, a line each."""
    import torch

    lines = [f"python {platform.python_version()}, {platform.platform()}"]
    for package in PACKAGES:
        try:
            lines.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package}: not installed")
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    lines.append(f"GPUs: {', '.join(gpus) or 'none'}; CPU: {torch.get_num_threads()} threads, {cpu_features()}")
    return "\n".join(lines)


def cpu_features() -> str:
    """The instruction sets of this CPU that PyTorch can use, such as "AMX, AVX2"; its architecture if none."""
    found = [
        name
        for name, has in (
            ("AMX", torch_cpu("_is_amx_tile_supported")),
            ("AVX-512 BF16", torch_cpu("_is_avx512_bf16_supported")),
            ("AVX-512", torch_cpu("_is_avx512_supported")),
            ("AVX2", torch_cpu("_is_avx2_supported")),
        )
        if has
    ]
    return ", ".join(found) or platform.machine()


def torch_cpu(name: str) -> bool:
    import torch

    check = getattr(torch.cpu, name, None)
    return bool(check and check())
