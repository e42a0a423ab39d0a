"""`hf-detr COMMAND ...`: the scripts of `examples/`, wherever this package is installed."""

import platform
import re
import runpy
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# command: its script, and what it does
COMMANDS = {
    "check": ("check_dataset", "report errors in a data set, and write a corrected copy"),
    "label-errors": ("label_errors", "find annotations that a model contradicts"),
    "finetune": ("finetune", "train on your images, from a checkpoint or an ImageNet backbone"),
    "evaluate": ("evaluate", "measure a checkpoint or stored detections, and write a page about its errors"),
    "predict": ("predict", "detect objects in images, folders and videos"),
    "serve": ("serve", "serve a model over HTTP"),
    "export": ("export", "export to ONNX, OpenVINO or torch.export, and compare"),
    "convert": ("convert", "convert checkpoints of transformers and of the papers' code"),
    "push": ("push_to_hub", "push a checkpoint to the Hub with its code and a model card"),
    "app": ("app", "look at a model in the browser, and correct its boxes"),
    "describe": ("describe", "list the parts of a model: shapes, parameters, FLOPs, times"),
}
PACKAGES = (
    "hf_detr", "torch", "torchvision", "timm", "transformers", "accelerate", "datasets", "huggingface_hub", "numpy",
    "pillow", "hotcoco", "onnxruntime", "openvino", "peft", "av", "matplotlib", "supervision", "gradio",
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
    elif command == "troubleshoot" and len(rest) < 2:
        print(troubleshoot(*rest))
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
            f"  {'troubleshoot':14}list symptoms, or print what to do about one",
            f"  {'env':14}print versions and devices, for a bug report",
            "",
            "hf-detr COMMAND --help lists the options of a command. On several GPUs:",
            "accelerate launch -m hf_detr.commands.finetune ...",
        ]
    )


def symptoms() -> dict[str, str]:
    """The sections of docs/troubleshooting.md, which a wheel has a copy of, by their anchors."""
    copy = Path(__file__).with_name("troubleshooting.md")
    page = copy if copy.exists() else Path(__file__).parents[2] / "docs" / copy.name
    sections = re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {re.sub(r"[^\w-]", "", s.partition("\n")[0].lower().replace(" ", "-")): s.strip() for s in sections}


def troubleshoot(symptom: str | None = None) -> str:
    """The symptoms, or what to do about one. Links are to the folder docs/ of the repository."""
    known = symptoms()
    if symptom is None:
        listed = [f"  {name:44}{text.partition(chr(10))[0]}" for name, text in known.items()]
        return "\n".join(["usage: hf-detr troubleshoot SYMPTOM", "", *listed])
    if symptom not in known:
        sys.exit(f"Unknown symptom {symptom!r}. Known: {', '.join(known)}.")
    text = re.sub(r"\[([^]]*)\]\(#([\w-]+)\)", r"\1 (hf-detr troubleshoot \2)", known[symptom])
    return re.sub(r"\[([^]]*)\]\(([\w-]+\.md[^)]*)\)", r"\1 (docs/\2)", text)


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
